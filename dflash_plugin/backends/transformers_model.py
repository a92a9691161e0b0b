"""The Transformers back-end: prefill, draft, verify, rewind, for several rows at once.

Invariant between steps: the target's cache holds all known tokens of a row but
the last, and where tokens are drafted the draft's context holds the same, but for
those of steps without a draft, whose taps wait until the next draft.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import UsageError
from .api import Options, Pair
from .draft_length import AUTO, Lengths
from .rows import Row, Step
from .transformers_cache import TargetCache
from .transformers_draft import DFlashDraftModel, DraftCache
from .transformers_packing import pack as pack_linears
from .transformers_sampling import Sampler
from .transformers_target import Target


class PromptCache:
    """The state a text left behind; see :meth:`dflash_plugin.backends.api.Pair.prompt_cache`."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.target: TargetCache | None = None
        self.draft: DraftCache | None = None


class TransformersBackend:
    """A loaded target and, unless it is None, its draft."""

    name = "transformers"

    def __init__(self, model: Any, draft: DFlashDraftModel | None, tokenizer: Any = None) -> None:
        """Put the two together.

        Raises:
            PairMismatchError: they do not fit.
            UsageError: they are on different devices, or an attention without masks.
        """
        self.target = Target(model, draft.target_layer_ids if draft is not None else ())
        self.draft, self.tokenizer = draft, tokenizer
        if draft is not None:
            embedding = self.target.embedding
            vocab, hidden = embedding.shape
            draft.check_target(vocab, hidden, embedding.dtype, embedding.device)

    @property
    def vocab_size(self) -> int:
        """Rows of embedding and head."""
        return self.target.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The target's."""
        return self.target.eos_token_ids

    @property
    def max_length(self) -> int | None:
        """The target's ``max_position_embeddings``."""
        return getattr(self.target.config, "max_position_embeddings", None)

    @property
    def block_size(self) -> int:
        """The draft's; 1 without a draft."""
        return self.draft.block_size if self.draft is not None else 1

    def prompt_cache(self) -> PromptCache:
        """An empty one."""
        return PromptCache()

    def run(
        self, rows: Sequence[Row], options: Options, lengths: Lengths, cache: Any = None
    ) -> Iterator[Step]:
        """Decode until every row is done; see :class:`dflash_plugin.backends.api.Backend`."""
        for row in rows:
            row.start()
        live = [row for row in rows if not row.done]
        if not live:
            return
        sampler = Sampler(options, self.target.device)
        draft = self.draft if lengths.most else None
        state = _State(self.target, draft, len(live))
        request, timed = lengths.request(), options.block_size == AUTO
        if cache is not None:
            state.resume(cache, live[0])
        try:
            start = 0  # prompts of one length that follow each other are read together
            for _length, group in groupby(live, key=lambda row: len(row.prompt)):
                some = list(group)
                prompts = [row.prompt for row in some]
                with torch.inference_mode():
                    unread = [row.prompt[row.reused :] for row in some]
                    logits = state.read(start, unread, options.prefill_chunk)
                    first = sampler.choose(sampler.processed(logits, prompts, 0)[:, -1])
                start += len(some)
                yield from [row.take([token]) for row, token in zip(some, first, strict=True)]
            while live := state.keep(live):
                k = request.choose(len(live))
                with torch.inference_mode():
                    if k or len(state.unread) >= options.prefill_chunk:
                        state.catch_up()
                    begin = self._now(timed)
                    steps = _step(state, live, sampler, k) if k else _plain(state, live, sampler)
                    seconds = self._now(timed) - begin
                request.took([step.accepted for step in steps], seconds)
                yield from steps
        finally:
            if cache is not None:
                with torch.inference_mode():
                    state.leave(cache, rows[0])

    def _now(self, waiting: bool) -> float:
        """The time in seconds, ``waiting`` for all that the device has been given."""
        device = self.target.device.type
        if waiting and device != "cpu":
            getattr(torch, device).synchronize()
        return time.perf_counter()


class _State:
    """What the models know of the rows being decoded."""

    def __init__(self, target: Target, draft: DFlashDraftModel | None, rows: int) -> None:
        self.target, self.draft = target, draft
        self.cache = target.cache(rows)
        self.context = draft.new_cache(rows) if draft is not None else None
        self.unread: list[Tensor] = []  # taps [rows, 1, …] that the draft's context lacks

    @property
    def rows(self) -> list[int]:
        """Places of all rows."""
        return list(range(len(self.cache.lengths)))

    def read(self, first: int, prompts: list[list[int]], chunk: int) -> Tensor:
        """Prefill rows ``first``.. with prompts of one length, ``chunk`` tokens at a time.

        Returns the logits [rows, 1, vocab] of their next tokens.
        """
        places = list(range(first, first + len(prompts)))
        length, count = len(prompts[0]), max(1, chunk // len(prompts))
        for start in range(0, length, count):
            parts = [tokens[start : start + count] for tokens in prompts]
            output, _undo = self.target.forward(self.cache, places, parts, keep=1)
            if self.draft is not None:
                self.extend(places, output.taps, [len(parts[0])] * len(places))
            self.cache.leave(places)
        return output.logits

    def extend(self, places: list[int], taps: Tensor, counts: Sequence[int]) -> None:
        """Append to the draft's context: of each row's ``taps`` [rows, n, …] the first count."""
        assert self.draft is not None and self.context is not None
        self.draft.append(self.context, places, taps)
        for place, count in zip(places, counts, strict=True):
            self.context.lengths[place] += count

    def catch_up(self) -> None:
        """Let the draft's context have the tokens of the steps without a draft."""
        if self.unread:
            taps = torch.cat(self.unread, dim=1)
            self.extend(self.rows, taps, [taps.shape[1]] * len(taps))
            self.unread = []

    def keep(self, live: list[Row]) -> list[Row]:
        """Drop the rows that are done; returns the others."""
        places = [place for place, row in enumerate(live) if not row.done]
        if len(places) < len(live) and places:
            self.cache.keep(places, self.target.device)
            if self.context is not None:
                self.context.keep(places, self.target.device)
            self.unread = [taps[places] for taps in self.unread]
        return [live[place] for place in places]

    def resume(self, cache: PromptCache, row: Row) -> None:
        """Go on from where ``cache`` and the row's prompt part."""
        if cache.target is None:
            return
        held = cache.target.lengths[0]
        common = 0
        for mine, its in zip(row.prompt[:-1], cache.token_ids, strict=False):
            if mine != its:
                break
            common += 1
        common = min(common, held)
        if self.draft is not None:
            common = min(common, cache.draft.lengths[0]) if cache.draft is not None else 0
        if common < held and cache.target.linear_indices:
            return  # a recurrent state cannot go back
        if common == 0:
            return
        row.reused = common
        self.cache, self.cache.lengths[0] = cache.target, common
        if self.context is not None and cache.draft is not None:
            self.context, self.context.lengths[0] = cache.draft, common

    def leave(self, cache: PromptCache, row: Row) -> None:
        """Put the state into ``cache``."""
        self.catch_up()
        cache.target, cache.draft = self.cache, self.context
        cache.token_ids = [*row.prompt, *row.tokens][: self.cache.lengths[0]]


def _plain(state: _State, live: list[Row], sampler: Sampler) -> list[Step]:
    """One token of each row, without a draft."""
    places = state.rows
    output, _undo = state.target.forward(state.cache, places, [[row.last] for row in live], keep=1)
    state.cache.leave(places)
    if state.draft is not None:
        state.unread.append(output.taps)
    texts = [[*row.prompt, *row.tokens] for row in live]
    tokens = sampler.choose(sampler.processed(output.logits, texts, 0)[:, -1])
    return [row.take([token]) for row, token in zip(live, tokens, strict=True)]


def _step(state: _State, live: list[Row], sampler: Sampler, k: int) -> list[Step]:
    """One draft and one verify of each row."""
    target, draft, context, places = state.target, state.draft, state.context, state.rows
    assert draft is not None and context is not None
    known = [row.last for row in live]
    offered = draft.logits(
        context, known, k, target.embedding, target.head, model_type=target.config.model_type
    )
    drafted, drawn_from = sampler.draft(offered)
    blocks = [[token, *more] for token, more in zip(known, drafted, strict=True)]
    output, undo = target.forward(state.cache, places, blocks, keep=k + 1)
    texts = [[*r.prompt, *r.tokens, *more] for r, more in zip(live, drafted, strict=True)]
    accepted, own = sampler.verify(drafted, drawn_from, sampler.processed(output.logits, texts, k))
    kept = [count + 1 for count in accepted]
    target.rewind(undo, kept)
    # All of them, kept or not: for each other number of rows the CPU keeps kernels of its own.
    state.extend(places, output.taps, kept)
    return [
        row.take([*more[:count], token], more, count)
        for row, more, count, token in zip(live, drafted, accepted, own, strict=True)
    ]


def load(
    target: Any,
    draft: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    pack: bool = True,
    **model_options: Any,
) -> Pair:
    """Load or take both halves; see :func:`dflash_plugin.load`.

    Args:
        target: a folder, hub id or loaded model.
        draft: a folder, hub id, loaded draft, or None for plain decoding.
        pack: of what is loaded here, rearrange the matrices for the CPU where that pays;
            the target is then good for generating only.
        model_options: further arguments of ``from_pretrained``, such as
            ``quantization_config`` or ``attn_implementation``.
    """
    if isinstance(target, (str, Path)):
        place = torch.device(device or _best_device())
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(target, revision=revision)
        options = {"dtype": _dtype(dtype), "revision": revision, **model_options}
        model = AutoModelForCausalLM.from_pretrained(target, **options)
        if "device_map" not in options and not getattr(model, "is_quantized", False):
            model = model.to(place)
        if pack:
            pack_linears(model)
    else:
        model = target
        if dtype is not None or device is not None:
            raise UsageError(
                "dtype and device are given, but the target is loaded already",
                hint="target.to(…) before, or give its name",
            )
    if isinstance(draft, (str, Path)):
        weight = model.get_input_embeddings().weight
        draft = DFlashDraftModel.from_pretrained(draft, dtype=weight.dtype, device=weight.device)
        if pack:
            pack_linears(draft)
    return Pair(TransformersBackend(model, draft, tokenizer))


def spec_generate(
    draft: DFlashDraftModel, target: Any, ids: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """See :meth:`.transformers_draft.DFlashDraftModel.spec_generate`."""
    pair = Pair(TransformersBackend(target, draft))
    if ids.ndim != 2:
        raise UsageError(f"input_ids is {list(ids.shape)}, expected [rows, length]")
    kept = torch.ones_like(ids) if mask is None else mask
    results = pair.generate({"input_ids": ids, "attention_mask": kept}, **options)
    width = max(len(result.token_ids) for result in results)
    padding = getattr(target.config.get_text_config(), "pad_token_id", None) or 0
    new = [r.token_ids + [padding] * (width - len(r.token_ids)) for r in results]
    return torch.cat([ids, torch.tensor(new, dtype=ids.dtype, device=ids.device)], dim=1)


def _dtype(given: torch.dtype | str | None) -> torch.dtype | str:
    if given is None or given == "auto":
        return "auto"
    if isinstance(given, str):
        found = getattr(torch, given, None)
        if not isinstance(found, torch.dtype):
            raise UsageError(f"dtype is {given!r}, expected a torch dtype such as bfloat16")
        return found
    return given


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
