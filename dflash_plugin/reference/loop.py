"""Prefill, draft, verify, rewind: DFlash decoding of one sequence.

Invariant between steps: the target session and the draft's cache hold the same
tokens, all but the last known one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..acceptance import AcceptanceStats
from ..errors import PairMismatchError, UsageError
from .sampling import Sampler
from .target import Target, TargetSession, prefill


class Draft(Protocol):
    """What the loop needs of a draft; :class:`~.model.DraftModel` is the real one."""

    @property
    def max_speculative_tokens(self) -> int:
        """The most tokens one block can draft."""
        ...

    def new_cache(self) -> Any:
        """An empty context, with ``length`` and ``crop``."""
        ...

    def append(self, cache: Any, taps: Tensor) -> None:
        """Add context tokens by their taps [n, taps * hidden]."""
        ...

    def draft_logits(self, cache: Any, known: int, k: int, *, context: int | None = None) -> Tensor:
        """Logits [k, vocab] of the ``k`` tokens after ``known``."""
        ...


@dataclass(frozen=True)
class Step:
    """One draft and one verify.

    Attributes:
        position: of the last known token in the sequence, prompt included.
        known: that token.
        draft: the K drafted tokens.
        accepted: how many the target accepted, even past the end of the text.
        emitted: tokens the step added to the text (accepted ones and the
            target's own, up to the end of the text).
    """

    position: int
    known: int
    draft: tuple[int, ...]
    accepted: int
    emitted: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """A generated text: ids without the prompt, and ``stop`` (EOS) or ``length``."""

    token_ids: list[int]
    finish_reason: str
    steps: list[Step]
    stats: AcceptanceStats


class _Text:
    """The generated tokens; takes no more than the limit and nothing after EOS."""

    def __init__(self, limit: int, eos: Collection[int]) -> None:
        self.tokens: list[int] = []
        self._limit, self._eos = limit, eos

    @property
    def stopped(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self._eos

    @property
    def done(self) -> bool:
        return self.stopped or len(self.tokens) >= self._limit

    def extend(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Take what still belongs to the text, and return it."""
        before = len(self.tokens)
        for token in tokens:
            if self.done:
                break
            self.tokens.append(token)
        return tuple(self.tokens[before:])


@torch.inference_mode()
def generate(
    target: Target,
    draft: Draft,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    num_speculative_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_ids: Collection[int] | None = None,
    ignore_eos: bool = False,
) -> Generation:
    """Generate with DFlash; the text is as the target's alone would be.

    Args:
        prompt_ids: at least one token.
        max_new_tokens: exact unless an end-of-text token comes first; may be 0.
        num_speculative_tokens: K; None means the draft's block size - 1.
        temperature, top_k, top_p, generator: see :class:`~.sampling.Sampler`.
        eos_token_ids: None means the target's; the text ends with the first of them.
        ignore_eos: go on to ``max_new_tokens``.

    Raises:
        UsageError: an argument is out of range.
        PairMismatchError: the draft's block has no room for K.
    """
    sampler = Sampler(temperature, top_k, top_p, generator)
    k = check_k(draft, num_speculative_tokens)
    text = _start(target, prompt_ids, max_new_tokens, eos_token_ids, ignore_eos)
    steps: list[Step] = []
    if not text.done:
        session, cache = target.session(), draft.new_cache()
        text.extend([sampler.choose(_read(session, prompt_ids, draft, cache))])
        while not text.done:
            known = text.tokens[-1]
            draft_logits = draft.draft_logits(cache, known, k)
            drafted = sampler.draft(draft_logits)
            verified = session.forward([known, *drafted])
            accepted, own = sampler.verify(drafted, draft_logits, verified.logits)
            position = cache.length
            draft.append(cache, verified.taps[: accepted + 1])
            session.rewind(cache.length)
            emitted = text.extend([*drafted[:accepted], own])
            steps.append(Step(position, known, tuple(drafted), accepted, emitted))
    stats = AcceptanceStats.from_steps([step.accepted for step in steps], k)
    return Generation(text.tokens, "stop" if text.stopped else "length", steps, stats)


@torch.inference_mode()
def generate_plain(
    target: Target,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_ids: Collection[int] | None = None,
    ignore_eos: bool = False,
) -> Generation:
    """The target alone, one token a time; arguments as for :func:`generate`."""
    sampler = Sampler(temperature, top_k, top_p, generator)
    text = _start(target, prompt_ids, max_new_tokens, eos_token_ids, ignore_eos)
    if not text.done:
        session = target.session()
        text.extend([sampler.choose(_read(session, prompt_ids))])
        while not text.done:
            logits = session.forward([text.tokens[-1]]).logits
            text.extend([sampler.choose(logits[-1])])
    reason = "stop" if text.stopped else "length"
    return Generation(text.tokens, reason, [], AcceptanceStats(0, ()))


def check_k(draft: Draft, num_speculative_tokens: int | None) -> int:
    """K, by default all the block has room for.

    Raises:
        PairMismatchError: out of range.
    """
    most = draft.max_speculative_tokens
    k = most if num_speculative_tokens is None else num_speculative_tokens
    if not 1 <= k <= most:
        raise PairMismatchError(
            f"num_speculative_tokens is {k}, expected 1..{most} (the draft's block size - 1)",
            hint=f"use num_speculative_tokens {most} or less",
        )
    return k


def check_tokens(name: str, tokens: Sequence[int], vocab_size: int, *, at_least: int = 0) -> None:
    """Refuse token ids the target has no embedding for, and too short a list.

    Raises:
        UsageError: names ``name`` and what was found.
    """
    if len(tokens) < at_least:
        raise UsageError(f"{name} has {len(tokens)} tokens, expected at least {at_least}")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise UsageError(f"{name} has {token!r}, expected token ids 0..{vocab_size - 1}")


def _start(
    target: Target,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Collection[int] | None,
    ignore_eos: bool,
) -> _Text:
    check_tokens("prompt_ids", prompt_ids, target.vocab_size, at_least=1)
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    eos = target.eos_token_ids if eos_token_ids is None else eos_token_ids
    return _Text(max_new_tokens, () if ignore_eos else eos)


def _read(
    session: TargetSession, prompt: Sequence[int], draft: Draft | None = None, cache: Any = None
) -> Tensor:
    """Prefill target and draft with the prompt; the logits [vocab] of the first new token."""
    for _offset, output in prefill(session, prompt, rows=1):
        if draft is not None:
            draft.append(cache, output.taps)
    return output.logits[-1]
