"""One small API over the local back-ends: load a pair, then generate or stream.

    pair = dflash_plugin.load("demo")
    print(pair.generate("What is a prime number?").text)

A back-end turns rows of token ids into more of them; prompts, chat templates,
stop strings, limits and results are the same for all of them and live here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..acceptance import AcceptanceStats
from ..errors import UsageError
from .draft_length import AUTO, AdaptiveLength, FixedLength, Lengths
from .rows import Row, Step, TextStream

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass."""


@dataclass(frozen=True)
class Options:
    """How to generate.

    Attributes:
        max_tokens: of each text; exact unless it stops before; may be 0.
        block_size: one known token and the drafted ones; 1 is plain decoding, None
            all the draft has room for, ``auto`` what is fastest at the moment, up to the
            pair's own (:mod:`dflash_plugin.backends.draft_length`).
        temperature: 0 takes the most likely token.
        top_k: keep so many most likely tokens; 0 keeps all.
        top_p: of those, keep the fewest that reach this probability; 1 keeps all.
        min_p: of those, keep what is at least so likely as this share of the likeliest.
        seed: of the sampling; None is random. With ``block_size="auto"`` it does not repeat
            a text: how many tokens are drafted depends on the time that steps take.
        stop: the text ends before the first of these strings.
        eos_token_ids: None means the target's own; the text ends with the first of them.
        ignore_eos: go on to ``max_tokens``.
        logits_processors: called with the ids so far and the next token's logits
            [1, vocab], arrays of the back-end; return changed logits.
        prefill_chunk: prompt tokens per forward pass.
        skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int = 256
    block_size: int | Literal["auto"] | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    eos_token_ids: Collection[int] | None = None
    ignore_eos: bool = False
    logits_processors: Sequence[Callable[[Any, Any], Any]] = ()
    prefill_chunk: int = PREFILL_CHUNK
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("max_tokens", self.max_tokens >= 0, ">= 0"),
            ("block_size", _is_block_size(self.block_size), ">= 1, or 'auto'"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("prefill_chunk", self.prefill_chunk >= 1, ">= 1"),
        ):
            if not ok:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {expected}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if any(not isinstance(stop, str) or not stop for stop in self.stop):
            raise UsageError(f"stop is {list(self.stop)!r}, expected strings that are not empty")

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0


@dataclass(frozen=True)
class Result:
    """One generated text.

    Attributes:
        text: without the prompt, stop string and end-of-text token.
        token_ids: likewise, but with the end-of-text token.
        finish_reason: ``stop`` (end-of-text token or stop string) or ``length``.
        steps: one per verify, in order; the first is the prefill's token.
        stats: what the drafts were worth; ``stats.al`` is the acceptance length.
        prompt_tokens: of the prompt, the template's included.
        reused_tokens: of those, how many came from a prompt cache.
        prefill_seconds, decode_seconds: until the first token, and after it.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    steps: list[Step]
    stats: AcceptanceStats
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def al(self) -> float | None:
        """Mean tokens per verify, the target's own included; None without drafts.

        With ``block_size="auto"`` steps without a draft are not verifies and do not count.
        """
        return self.stats.al

    @property
    def mean_drafted(self) -> float:
        """Drafted tokens per step, steps without a draft included; NaN for a single token."""
        lengths = [len(step.drafted) for step in self.steps[1:]]
        return sum(lengths) / len(lengths) if lengths else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the first token (the prefill's) not counted; NaN for a single token."""
        later = len(self.token_ids) - 1
        return later / self.decode_seconds if later > 0 else float("nan")

    @classmethod
    def of(cls, row: Row) -> Result:
        """What has become of ``row``."""
        drafted = [step for step in row.steps if step.drafted]
        k = max((len(step.drafted) for step in drafted), default=0)
        return cls(
            text=row.text,
            token_ids=row.tokens,
            finish_reason=row.finish_reason or "length",
            steps=row.steps,
            stats=AcceptanceStats.from_steps([step.accepted for step in drafted], k),
            prompt_tokens=len(row.prompt),
            reused_tokens=row.reused,
            prefill_seconds=row.prefill_seconds,
            decode_seconds=row.decode_seconds,
        )


class PromptCache(Protocol):
    """What a finished text left behind, for the next prompt that begins alike."""

    @property
    def token_ids(self) -> list[int]:
        """The tokens held."""
        ...


class Backend(Protocol):
    """A loaded target and its draft."""

    name: str
    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        """Rows of embedding and head."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text of the target."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and text together that the target takes; None if unknown."""
        ...

    @property
    def block_size(self) -> int:
        """The draft's; 1 without a draft."""
        ...

    def prompt_cache(self) -> Any:
        """An empty :class:`PromptCache` of the back-end's own kind."""
        ...

    def run(
        self, rows: Sequence[Row], options: Options, lengths: Lengths, cache: Any
    ) -> Iterator[Step]:
        """Decode until every row is done, yielding each row's steps as they are taken.

        ``lengths`` say how many tokens each step drafts.
        """
        ...


Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
Prompts = Sequence[Prompt]


@dataclass
class Pair:
    """A target and its draft, ready to generate; made by :func:`dflash_plugin.load`.

    A prompt is a string (a user's message where the tokenizer has a chat template and
    ``raw`` is false), a list of chat messages, or a list of token ids; a list of
    prompts, or a tokenizer's output with ``input_ids`` and ``attention_mask``, is a batch.
    """

    backend: Backend
    block_size: int | None = None
    adaptive: AdaptiveLength | None = None
    """What ``block_size="auto"`` has learned so far."""

    @property
    def tokenizer(self) -> Any:
        """The target's."""
        return self.backend.tokenizer

    def prompt_cache(self) -> PromptCache:
        """An empty prompt cache: give it to consecutive calls whose prompts begin alike."""
        made: PromptCache = self.backend.prompt_cache()
        return made

    def generate(
        self,
        prompt: Any,
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        prompt_cache: PromptCache | None = None,
        **options: Any,
    ) -> Any:
        """Generate to the end: a :class:`Result`, or a list of them for a batch.

        Args:
            prompt: see the class.
            raw: a string is text to continue, not a user's message.
            template: further arguments of the chat template, such as ``enable_thinking``.
            prompt_cache: see :meth:`prompt_cache`; one prompt at a time.
            **options: fields of :class:`Options`.

        Raises:
            UsageError: an option or prompt is out of range.
            PairMismatchError: the draft's block has no room for ``block_size``.
        """
        rows, batch, settings = self._start(prompt, raw, template, options, prompt_cache)
        lengths = self._lengths(settings)
        for _step in self.backend.run(rows, settings, lengths, prompt_cache):
            pass
        results = [Result.of(row) for row in rows]
        return results if batch else results[0]

    def stream_generate(
        self,
        prompt: Any,
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        prompt_cache: PromptCache | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Yield each step as it is taken; arguments as for :meth:`generate`.

        The last step of a row has its ``finish_reason`` and ``result``. Arguments are
        checked before the first step is asked for.
        """
        rows, _batch, settings = self._start(prompt, raw, template, options, prompt_cache)
        lengths = self._lengths(settings)

        def steps() -> Iterator[Step]:
            for row in rows:
                if row.done:  # max_tokens 0: no step will end it
                    yield row.last_step(Result.of(row))
            for step in self.backend.run(rows, settings, lengths, prompt_cache):
                row = rows[step.row]
                yield row.last_step(Result.of(row)) if step.finish_reason else step

        return steps()

    def token_ids(
        self, prompt: Prompt, *, raw: bool = False, template: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids of one prompt, through the chat template where there is one."""
        if isinstance(prompt, str):
            if raw or not getattr(self.tokenizer, "chat_template", None):
                return _plain_ids(self.tokenizer(prompt)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        if prompt and isinstance(prompt[0], Mapping):
            if not getattr(self.tokenizer, "chat_template", None):
                raise UsageError(
                    "the tokenizer has no chat template, so messages cannot be formatted",
                    hint="give a string or token ids",
                )
            text = self.tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True, **(template or {})
            )
            return _plain_ids(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return _plain_ids(prompt)

    def _start(
        self,
        prompt: Any,
        raw: bool,
        template: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        cache: PromptCache | None,
    ) -> tuple[list[Row], bool, Options]:
        """Rows, whether they are a batch, and checked options."""
        options = Options(**{"block_size": self.block_size, **given})
        if options.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer", hint="give one to load()")
        batch, prompts = _split(prompt)
        if batch and cache is not None:
            raise UsageError(
                "prompt_cache holds one text, and a batch has several",
                hint="give one prompt, or no prompt_cache",
            )
        backend = self.backend
        eos = backend.eos_token_ids if options.eos_token_ids is None else options.eos_token_ids
        rows = []
        for number, one in enumerate(prompts):
            name = f"prompt {number}" if batch else "prompt"
            ids = self.token_ids(one, raw=raw, template=template)
            check_prompt(name, ids, backend, options.max_tokens)
            row = Row(number, ids, options.max_tokens)
            row.ends_with(frozenset() if options.ignore_eos else eos)
            row.shows(TextStream(self.tokenizer, options.stop, options.skip_special_tokens))
            rows.append(row)
        return rows, batch, options

    def _lengths(self, options: Options) -> Lengths:
        """How many tokens to draft, step by step."""
        room = self.backend.block_size
        if not isinstance(options.block_size, str):
            return FixedLength.of(options.block_size, room)
        own = FixedLength.of(self.block_size, room)
        if self.adaptive is None and own.most:
            self.adaptive = AdaptiveLength(own.most)
        return self.adaptive or own


def check_prompt(name: str, ids: Sequence[int], backend: Backend, max_tokens: int) -> None:
    """Refuse what the target cannot take.

    Raises:
        UsageError: no tokens, tokens it does not have, or more than it has room for.
    """
    if not ids:
        raise UsageError(f"{name} has no tokens, expected at least 1")
    for token in ids:
        if not 0 <= token < backend.vocab_size:
            raise UsageError(
                f"{name} has token {token}, but the target has tokens 0..{backend.vocab_size - 1}",
                hint="use the target's own tokenizer",
            )
    longest = backend.max_length
    if longest is not None and len(ids) + max_tokens > longest:
        room = longest - len(ids)
        raise UsageError(
            f"{name} has {len(ids)} tokens and max_tokens is {max_tokens}, "
            f"but the target takes {longest} together",
            hint=f"max_tokens {room} at most" if room > 0 else "shorten the prompt",
        )


def _is_block_size(given: Any) -> bool:
    return given in (None, AUTO) or (not isinstance(given, str) and given >= 1)


def _split(prompt: Any) -> tuple[bool, list[Any]]:
    """Whether it is a batch, and its prompts."""
    if isinstance(prompt, str):
        return False, [prompt]
    if hasattr(prompt, "keys"):  # a tokenizer's output, or like it
        if "input_ids" not in prompt:
            raise UsageError(
                "prompt is a mapping without input_ids",
                hint="give messages as a list: [{'role': 'user', 'content': …}]",
            )
        ids = _nested(prompt["input_ids"])
        mask = _nested(prompt["attention_mask"]) if "attention_mask" in prompt else None
        if ids and not isinstance(ids[0], list):
            ids, mask = [ids], [mask] if mask is not None else None
        if mask is None:
            return True, ids
        kept = zip(ids, mask, strict=True)
        return True, [[i for i, m in zip(a, b, strict=True) if m] for a, b in kept]
    values = _nested(prompt)
    if not values:
        raise UsageError("prompt is empty", hint="give a string, messages or token ids")
    if isinstance(values[0], (str, list)):
        return True, values
    return False, [values]


def _nested(value: Any) -> Any:
    """Arrays of any library as lists."""
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _plain_ids(ids: Any) -> list[int]:
    try:
        return [int(token) for token in ids]
    except (TypeError, ValueError) as err:
        raise UsageError(
            f"prompt is {str(ids)[:60]!r}, expected a string, messages or token ids"
        ) from err
