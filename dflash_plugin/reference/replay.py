"""The steps DFlash takes along a text that is already there.

An engine's greedy text fixes every step: which token was last known, and how
many drafted tokens were accepted. Only the draft has to be computed again, so
drafted blocks and acceptance can be compared with the engine's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..acceptance import AcceptanceStats
from .loop import Draft, check_k, check_tokens
from .target import PREFILL_CHUNK, Target, TargetSession, prefill


@dataclass(frozen=True)
class ReplayStep:
    """One draft and one verify.

    Attributes:
        position: of the last known token in the sequence, prompt included.
        known: that token.
        draft: the K drafted tokens.
        gaps: per drafted token, how far its logit is above the runner-up's;
            an engine that drafts otherwise is excused where this is rounding.
        accepted: how many the target accepts, even past the end of the text.
    """

    position: int
    known: int
    draft: tuple[int, ...]
    gaps: tuple[float, ...]
    accepted: int


@dataclass(frozen=True)
class Disagreement:
    """The first token of a text that is not the target's own greedy choice.

    Attributes:
        index: in the generated tokens.
        given, choice: the token there, and the target's.
        gap: how far the choice's logit is above the given token's.
    """

    index: int
    given: int
    choice: int
    gap: float


@dataclass(frozen=True)
class Replay:
    """Steps of one text; ``first_disagreement`` None if all of it is the target's greedy choice."""

    steps: list[ReplayStep]
    stats: AcceptanceStats
    first_disagreement: Disagreement | None


@torch.inference_mode()
def replay(
    target: Target,
    draft: Draft,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    *,
    num_speculative_tokens: int | None = None,
    extend: bool = True,
    chunk: int = PREFILL_CHUNK,
) -> Replay:
    """Reproduce the steps of a greedy DFlash generation.

    The first generated token comes from the prefill; steps follow until there
    are as many tokens as given.

    Args:
        prompt_ids: at least one token.
        generated_ids: what followed; empty or a single token give no step.
        num_speculative_tokens: K; None means the draft's block size - 1.
        extend: the last step's accepted tokens may run past the text, and
            engines count those: compare them with the target's own greedy
            continuation. Without, only tokens of the text count.
        chunk: tokens per forward pass of the target.

    Raises:
        UsageError: an empty prompt, or an id outside the vocabulary.
        PairMismatchError: the draft's block has no room for K.
    """
    k = check_k(draft, num_speculative_tokens)
    check_tokens("prompt", prompt_ids, target.vocab_size, at_least=1)
    check_tokens("generated", generated_ids, target.vocab_size)
    text = [*prompt_ids, *generated_ids]
    session, cache = target.session(), draft.new_cache()

    disagreement = None
    for start, output in prefill(session, text[:-1], chunk=chunk):
        draft.append(cache, output.taps)
        choices = output.logits.argmax(-1).tolist()
        for row, choice in enumerate(choices):
            index = start + row + 1 - len(prompt_ids)
            if disagreement is None and index >= 0 and choice != generated_ids[index]:
                logits, given = output.logits[row], generated_ids[index]
                gap = float(logits[choice] - logits[given])
                disagreement = Disagreement(index, given, choice, gap)

    continuation = _Continuation(session, text) if extend else None
    steps: list[ReplayStep] = []
    position = len(prompt_ids)
    while position < len(text) - 1:
        logits = draft.draft_logits(cache, text[position], k, context=position)
        best = logits.topk(min(2, logits.shape[-1]), dim=-1)
        drafted = best.indices[:, 0].tolist()
        gaps = (best.values[:, 0] - best.values[:, -1]).tolist()
        accepted = 0
        for offset, token in enumerate(drafted, start=position + 1):
            if offset < len(text):
                expected = text[offset]
            elif continuation is not None:
                expected = continuation.token(offset)
            else:
                break
            if token != expected:
                break
            accepted += 1
        steps.append(ReplayStep(position, text[position], tuple(drafted), tuple(gaps), accepted))
        position += accepted + 1
    stats = AcceptanceStats.from_steps([step.accepted for step in steps], k)
    return Replay(steps, stats, disagreement)


class _Continuation:
    """The target's greedy continuation of a text, computed as far as it is asked for."""

    def __init__(self, session: TargetSession, text: Sequence[int]) -> None:
        """``session`` holds all of ``text`` but its last token."""
        self._session, self._start = session, len(text)
        self._last, self._tokens = text[-1], list[int]()

    def token(self, position: int) -> int:
        """The token at ``position``, which is past the text."""
        while position - self._start >= len(self._tokens):
            self._last = int(self._session.forward([self._last]).logits[-1].argmax())
            self._tokens.append(self._last)
        return self._tokens[position - self._start]
