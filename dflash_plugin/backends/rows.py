"""One text being generated: its tokens, its end, and its text as it comes in."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Result

_INCOMPLETE = "\ufffd"  # what decoders make of half a character


@dataclass(frozen=True)
class Step:
    """One draft and one verify of one row; the first step of a text is its prefill.

    Attributes:
        row: the prompt's place in the batch.
        text: what the step added that is certain to stay; a stop string that may
            have begun is held back until it is known.
        token_ids: what it added to the ids, end-of-text token included.
        drafted: the tokens drafted, empty for the prefill and for plain decoding.
        accepted: how many of them the target accepted, even past the end of the text.
        seconds: since the generation began.
        finish_reason: ``stop`` or ``length`` in the row's last step.
        result: the whole, in the last step of a stream.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    drafted: tuple[int, ...]
    accepted: int
    seconds: float
    finish_reason: str | None = None
    result: Result | None = None


class Row:
    """Prompt, text and end of one sequence of a batch."""

    def __init__(self, index: int, prompt: list[int], limit: int) -> None:
        """Begin the row ``index`` of a batch; its text has ``limit`` tokens at most."""
        self.index, self.prompt, self.reused = index, prompt, 0
        self.tokens: list[int] = []
        self.steps: list[Step] = []
        self.finish_reason = None if limit else "length"
        self._limit, self._eos = limit, frozenset[int]()
        self._text = TextStream(None)
        self._started = self._first = self._last = time.perf_counter()

    def ends_with(self, eos: Collection[int]) -> None:
        """Let the first of these tokens end the text."""
        self._eos = frozenset(eos)

    def shows(self, text: TextStream) -> None:
        """Decode the tokens."""
        self._text = text

    @property
    def done(self) -> bool:
        """Whether nothing is to be added."""
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """All text so far."""
        return self._text.text

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return 0 if self.done else self._limit - len(self.tokens)

    @property
    def last(self) -> int:
        """The last known token."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def prefill_seconds(self) -> float:
        """From the start to the first token."""
        return self._first - self._started

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last."""
        return self._last - self._first

    def start(self) -> None:
        """Begin to measure the time."""
        self._started = self._first = self._last = time.perf_counter()

    def take(self, tokens: Sequence[int], drafted: Sequence[int] = (), accepted: int = 0) -> Step:
        """Add what still belongs to the text, and say what that was."""
        taken, text = 0, ""
        for token in tokens:
            self.tokens.append(token)
            taken += 1
            if token in self._eos:
                self.finish_reason = "stop"
            else:
                text += self._text.push(token)
                if self._text.stopped:
                    self.finish_reason = "stop"
                elif len(self.tokens) >= self._limit:
                    self.finish_reason = "length"
            if self.done:
                text += self._text.finish()
                break
        self._last = time.perf_counter()
        if not self.steps:
            self._first = self._last
        step = Step(
            row=self.index,
            text=text,
            token_ids=tuple(tokens[:taken]),
            drafted=tuple(drafted),
            accepted=accepted,
            seconds=self._last - self._started,
            finish_reason=self.finish_reason,
        )
        self.steps.append(step)
        return step

    def last_step(self, result: Result) -> Step:
        """The step that ended the row, with its result."""
        if self.steps:
            return replace(self.steps[-1], result=result)
        return Step(self.index, "", (), (), 0, 0.0, self.finish_reason, result)


class TextStream:
    """Tokens in, text out, cut before the first stop string.

    Decoded is a window that begins at a token whose text is known, since a token's
    text may depend on the one before it (spaces, halves of characters).
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), skip_special_tokens: bool = True
    ) -> None:
        """Without a tokenizer there is no text."""
        self.text = ""
        self.stopped = False
        self._held = ""
        self._tokenizer, self._stop, self._skip = tokenizer, tuple(stop), skip_special_tokens
        self._tokens: list[int] = []
        self._window = self._read = 0

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain to stay."""
        if self._tokenizer is None:
            return ""
        self._tokens.append(token)
        return self._release(self._decode_new(), last=False)

    def finish(self) -> str:
        """The text still held back, now that nothing follows."""
        if self._tokenizer is None or self.stopped:
            return ""
        return self._release(self._decode_new(last=True), last=True)

    def _decode_new(self, last: bool = False) -> str:
        known = self._decode(self._tokens[self._window : self._read])
        text = self._decode(self._tokens[self._window :])
        if len(text) <= len(known) or (text.endswith(_INCOMPLETE) and not last):
            return ""
        self._window, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip))

    def _release(self, new: str, *, last: bool) -> str:
        """Text up to a stop string, or to what may be the beginning of one."""
        text = self._held + new
        self._held = ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        elif not last:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            if keep:
                text, self._held = text[:-keep], text[-keep:]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
