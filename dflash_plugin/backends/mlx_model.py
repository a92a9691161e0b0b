"""The MLX back-end: prefill, draft, verify, rewind; several rows take turns.

Invariant between steps: the target's cache holds all known tokens but the last,
and where tokens are drafted the draft's context holds the same, but for those of
steps without a draft, whose taps wait until the next draft.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm

from .. import hub
from ..errors import PairMismatchError, UsageError
from .api import Options, Pair
from .draft_length import AUTO, Lengths
from .mlx_cache import TargetCache
from .mlx_draft import DraftCache, DraftModel
from .mlx_sampling import Sampler
from .mlx_target import Target
from .rows import Row, Step


class PromptCache:
    """The state a text left behind; see :meth:`dflash_plugin.backends.api.Pair.prompt_cache`."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.target: TargetCache | None = None
        self.draft: DraftCache | None = None


class MLXBackend:
    """A loaded target and, unless it is None, its draft."""

    name = "mlx"

    def __init__(self, model: Any, draft: DraftModel | None, tokenizer: Any = None) -> None:
        """Put the two together.

        Args:
            tokenizer: mlx_lm's wrapper, or the tokenizer in it.

        Raises:
            PairMismatchError: they do not fit.
        """
        self.target = Target(model, draft.config.target_layer_ids if draft is not None else ())
        self.draft = draft
        self.wrapper = tokenizer
        self.tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)
        if draft is not None:
            found = (self.target.vocab_size, self.target.hidden_size)
            expected = (draft.config.vocab_size, draft.config.hidden_size)
            if found != expected:
                raise PairMismatchError(
                    f"{draft.config.source}: the target's embedding is {list(found)}, expected "
                    f"[vocab_size, hidden_size] = {list(expected)}",
                    hint="this draft was trained for another target",
                )

    @property
    def vocab_size(self) -> int:
        """Rows of embedding and head."""
        return self.target.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokenizer's, which mlx_lm completes from the configs."""
        many = getattr(self.wrapper, "eos_token_ids", None)
        one = getattr(self.wrapper, "eos_token_id", None)
        return frozenset(many or ([] if one is None else [one]))

    @property
    def max_length(self) -> int | None:
        """The target's ``max_position_embeddings``."""
        return self.target.max_length

    @property
    def block_size(self) -> int:
        """The draft's; 1 without a draft."""
        return self.draft.config.block_size if self.draft is not None else 1

    def prompt_cache(self) -> PromptCache:
        """An empty one."""
        return PromptCache()

    def run(
        self, rows: Sequence[Row], options: Options, lengths: Lengths, cache: Any = None
    ) -> Iterator[Step]:
        """Decode until every row is done; see :class:`dflash_plugin.backends.api.Backend`."""
        mx.clear_cache()  # buffers of earlier texts, of other sizes
        for row in rows:
            row.start()
        live = [row for row in rows if not row.done]
        sampler = Sampler(options)
        draft = self.draft if lengths.most else None
        states = {row.index: _State(self.target, draft) for row in live}
        requests = {row.index: lengths.request() for row in live}
        timed = options.block_size == AUTO
        if cache is not None and live:
            states[live[0].index].resume(cache, live[0])
        try:
            for row in live:
                yield states[row.index].read(row, sampler, options.prefill_chunk)
            while live := [row for row in live if not row.done]:
                for row in live:
                    state, request = states[row.index], requests[row.index]
                    k = request.choose(1)
                    if k or len(state.unread) >= options.prefill_chunk:
                        state.catch_up()
                    begin = state.now(timed)
                    step = state.step(row, sampler, k) if k else state.plain(row, sampler)
                    request.took([step.accepted], state.now(timed) - begin)
                    yield step
        finally:
            if cache is not None and states:
                states[rows[0].index].leave(cache, rows[0])


class _State:
    """What the models know of one row."""

    def __init__(self, target: Target, draft: DraftModel | None) -> None:
        self.target, self.draft = target, draft
        self.cache = target.cache()
        self.context = draft.new_cache() if draft is not None else None
        self.unread: list[mx.array] = []  # taps [1, 1, …] that the draft's context lacks

    def read(self, row: Row, sampler: Sampler, chunk: int) -> Step:
        """Prefill, chunk by chunk, and choose the first token."""
        tokens = row.prompt[row.reused :]
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            logits, taps, _calls = self.target.forward(self.cache, part)
            if self.draft is not None:
                self.extend(taps)
            # Evaluated chunk by chunk, or the graph of all of them would be held; a step
            # has no use for buffers of a chunk's size.
            self.evaluate()
            mx.clear_cache()
        last = sampler.processed(logits[0, -1:], lambda: row.prompt, 0)
        return row.take([sampler.choose(last[0])])

    def plain(self, row: Row, sampler: Sampler) -> Step:
        """One token, without a draft."""
        logits, taps, _calls = self.target.forward(self.cache, [row.last])
        if self.draft is not None:
            self.unread.append(taps)
        last = sampler.processed(logits[0], lambda: [*row.prompt, *row.tokens], 0)
        return row.take([sampler.choose(last[-1])])

    def step(self, row: Row, sampler: Sampler, k: int) -> Step:
        """One draft and one verify."""
        draft, context, target = self.draft, self.context, self.target
        assert draft is not None and context is not None
        offered = draft.logits(
            context, row.last, k, target.embed, target.head, model_type=target.name
        )
        chosen, drawn_from = sampler.draft(offered)
        mx.async_eval(chosen)  # drafts while the graph of the verify is built
        block = mx.concatenate([mx.array([row.last], dtype=chosen.dtype), chosen])
        logits, taps, calls = target.forward(self.cache, block)
        scores = sampler.processed(
            logits[0], lambda: [*row.prompt, *row.tokens, *chosen.tolist()], k
        )
        accepted, own = sampler.verify(chosen, drawn_from, scores)
        drafted: list[int] = chosen.tolist()
        self.cache.rewind(k + 1, accepted + 1, calls)
        self.extend(taps[:, : accepted + 1])
        return row.take([*drafted[:accepted], own], drafted, accepted)

    def extend(self, taps: mx.array) -> None:
        """Append tokens to the draft's context by their taps [1, n, …]."""
        assert self.draft is not None and self.context is not None
        self.draft.append(self.context, taps)
        self.context.length += taps.shape[1]

    def catch_up(self) -> None:
        """Let the draft's context have the tokens of the steps without a draft."""
        if self.unread:
            self.extend(mx.concatenate(self.unread, axis=1))
            self.unread = []

    def evaluate(self) -> None:
        """Compute what is still a graph."""
        drafts = self.context.arrays() if self.context is not None else []
        mx.eval(self.cache.arrays(), drafts, self.unread)

    def now(self, waiting: bool) -> float:
        """The time in seconds, ``waiting`` for all that is still a graph."""
        if waiting:
            self.evaluate()
        return time.perf_counter()

    def resume(self, cache: PromptCache, row: Row) -> None:
        """Go on from where ``cache`` and the row's prompt part."""
        if cache.target is None:
            return
        held, common = cache.target.length, 0
        for mine, its in zip(row.prompt[:-1], cache.token_ids, strict=False):
            if mine != its:
                break
            common += 1
        if self.draft is not None:
            common = min(common, cache.draft.length) if cache.draft is not None else 0
        back = held - common
        if common == 0 or (back and not cache.target.reaches(back)):
            return
        row.reused = common
        self.cache = cache.target
        self.cache.forget(back)
        if self.context is not None and cache.draft is not None:
            self.context, self.context.length = cache.draft, common

    def leave(self, cache: PromptCache, row: Row) -> None:
        """Put the state into ``cache``."""
        self.catch_up()
        cache.target, cache.draft = self.cache, self.context
        cache.token_ids = [*row.prompt, *row.tokens][: self.cache.length]


def load(
    target: Any,
    draft: Any,
    *,
    dtype: Any = None,
    draft_bits: int | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    **model_options: Any,
) -> Pair:
    """Load or take both halves; see :func:`dflash_plugin.load`.

    Args:
        target: a folder, hub id or loaded model.
        draft: a folder, hub id, loaded draft, or None for plain decoding.
        dtype: an MLX dtype or its name; None keeps the checkpoints'.
        draft_bits: quantise the draft to so many bits.
        model_options: further arguments of ``mlx_lm.load``.
    """
    kind = getattr(mx, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(kind, mx.Dtype):
        raise UsageError(f"dtype is {dtype!r}, expected an MLX dtype such as bfloat16")
    if isinstance(target, (str, Path)):
        name = str(hub.local_folder(str(target)) or target)
        model, wrapper, config = mlx_lm.load(
            name, revision=revision, return_config=True, **model_options
        )
        _refuse_lost_windows(config, name)
        tokenizer = wrapper if tokenizer is None else tokenizer
        if kind is not None:
            model.set_dtype(kind)
    else:
        model = target
    if isinstance(draft, (str, Path)):
        draft = DraftModel.load(draft, dtype=kind, bits=draft_bits)
    elif draft_bits is not None:
        raise UsageError(
            "draft_bits is given, but the draft is loaded already",
            hint="draft.quantize(bits) before, or give its name",
        )
    return Pair(MLXBackend(model, draft, tokenizer))


def peak_memory() -> float:
    """The most memory MLX has held, in GB."""
    return float(mx.get_peak_memory()) / 1e9


def _refuse_lost_windows(config: dict[str, Any], name: str) -> None:
    """mlx_lm runs Qwen3 targets that have sliding windows with full attention.

    Raises:
        PairMismatchError: this is one.
    """
    if config.get("model_type") in ("qwen3", "qwen3_moe") and config.get("use_sliding_window"):
        raise PairMismatchError(
            f"{name}: the target has sliding windows (use_sliding_window), which mlx_lm's "
            f"{config['model_type']} ignores",
            hint="use backend='transformers'",
        )
