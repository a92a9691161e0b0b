"""A CPU attention back-end in plain torch, with and without vLLM's defect, and a reference."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 32, 16
SCALE = DIM**-0.5


def attend(query, keys, values, mask):
    """Plain attention: query [q, heads, d], keys and values [k, kv_heads, d], mask [q, k]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * SCALE
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def reference(query, keys, values, window, causal=False):
    """Rows at the end of a sequence of ``len(keys)``, as the draft's definition has it."""
    length, rows = len(keys), len(query)
    behind = torch.arange(length - rows, length)[:, None] - torch.arange(length)[None]
    mask = torch.ones_like(behind, dtype=torch.bool)
    if causal:
        mask &= behind >= 0
    if window is not None:
        mask &= behind.abs() < window
    return attend(query, keys, values, mask)


@dataclass
class Metadata:
    """The fields of vLLM's ``CPUAttentionMetadata`` that matter here."""

    isa: str
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Any
    max_seq_len: int
    seq_lens: Any
    block_table: Any
    slot_mapping: Any
    scheduler_metadata: Any
    causal: bool = True
    use_sdpa_prefill: bool = False


def back_end(*, reads_past_the_end: bool) -> ModuleType:
    """vLLM's ``cpu_attn`` module as far as the shims use it; plain cache layout."""
    module = ModuleType("fake_cpu_attn")

    def store(key, value, key_cache, value_cache, slot_mapping, isa):  # noqa: PLR0917
        module.stored.append(len(key))
        for row, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                block, at = divmod(slot, key_cache.shape[2])
                key_cache[block, :, at], value_cache[block, :, at] = key[row], value[row]

    def schedule(**given):
        return SimpleNamespace(**given)

    def run(
        *, query, key_cache, value_cache, output, query_start_loc, seq_lens, causal,
        sliding_window, block_table, scheduler_metadata, **unused,
    ):  # fmt: skip
        made = scheduler_metadata
        assert (made.num_heads, made.num_kv_heads) == (query.shape[1], key_cache.shape[1])
        assert made.causal is causal
        assert torch.equal(made.seq_lens, seq_lens)
        block = key_cache.shape[2]
        starts = query_start_loc.tolist()
        for request, length in enumerate(seq_lens.tolist()):
            start, end = starts[request], starts[request + 1]
            pages = -(-length // block)
            kept = pages * block if reads_past_the_end and not causal else length
            table = block_table[request, :pages].long()
            keys, values = (
                cache[table].transpose(1, 2).flatten(0, 1)[:kept]
                for cache in (key_cache, value_cache)
            )
            at = torch.arange(length - (end - start), length)[:, None]
            behind = at - torch.arange(kept)[None]
            mask = torch.ones_like(behind, dtype=torch.bool)
            if causal:
                mask &= behind >= 0
            if sliding_window[0] >= 0:
                mask &= behind <= sliding_window[0]
            output[start:end] = attend(query[start:end], keys, values, mask)

    class CPUAttentionBackendImpl:
        def __init__(self, window=None, attn_type="decoder"):
            self.num_heads, self.num_kv_heads, self.head_size = HEADS, KV_HEADS, DIM
            self.scale, self.kv_cache_dtype, self.attn_type = SCALE, "auto", attn_type
            self.sliding_window = (-1, -1) if window is None else (window - 1, 0)

        def forward(  # noqa: PLR0917
            self, layer, query, key, value, kv_cache, attn_metadata, output=None
        ):
            if attn_metadata is None:
                return output
            md, n = attn_metadata, attn_metadata.num_actual_tokens
            keys, values = kv_cache.unbind(0)
            if key is not None:
                module.ops.cpu_attn_reshape_and_cache(
                    key, value, keys, values, md.slot_mapping, md.isa
                )
            module.ops.cpu_attention_with_kv_cache(
                query=query[:n], key_cache=keys, value_cache=values, output=output[:n],
                query_start_loc=md.query_start_loc, seq_lens=md.seq_lens, causal=md.causal,
                sliding_window=self.sliding_window, block_table=md.block_table,
                scheduler_metadata=md.scheduler_metadata,
            )  # fmt: skip
            return output

    module.stored = []
    module.ops = SimpleNamespace(
        cpu_attn_reshape_and_cache=store,
        cpu_attn_get_scheduler_metadata=schedule,
        cpu_attention_with_kv_cache=run,
    )
    module._get_attn_isa = lambda dtype, block_size, head_size=None: "plain"
    module.AttentionType = SimpleNamespace(DECODER="decoder")
    module.CPUAttentionBackendImpl = CPUAttentionBackendImpl
    return module


@dataclass(frozen=True)
class Batch:
    """Requests whose last rows are attended; earlier keys are in the cache already."""

    metadata: Metadata
    cache: Any  # [2, blocks, kv_heads, block, dim], stale values wherever nothing was stored
    query: Any
    key: Any
    value: Any
    sequences: list[tuple[Any, Any]]  # keys and values of each whole sequence
    rows: list[int]


def batch(module, lengths: list[int], rows: list[int], *, causal: bool = False) -> Batch:
    """Random sequences of ``lengths``, the last ``rows`` of each being queried."""
    random = torch.Generator().manual_seed(7)
    pages = [-(-length // BLOCK) for length in lengths]
    cache = torch.full((2, 1 + sum(pages), KV_HEADS, BLOCK, DIM), 50.0)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    sequences, slots, first = [], [], 1
    for request, length in enumerate(lengths):
        table[request, : pages[request]] = torch.arange(first, first + pages[request])
        first += pages[request]
        keys, values = torch.randn(2, length, KV_HEADS, DIM, generator=random)
        position = torch.arange(length)
        slot = table[request].long()[position // BLOCK] * BLOCK + position % BLOCK
        old = length - rows[request]
        module.ops.cpu_attn_reshape_and_cache(
            keys[:old], values[:old], cache[0], cache[1], slot[:old], "plain"
        )
        slots.append(slot[old:])
        sequences.append((keys, values))
    module.stored.clear()
    total = sum(rows)
    starts = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    schedule = SimpleNamespace(
        num_heads=HEADS, num_kv_heads=KV_HEADS, causal=causal, seq_lens=seq_lens
    )
    metadata = Metadata(
        "plain", total, max(rows), starts, max(lengths), seq_lens, table,
        torch.cat(slots), schedule, causal,
    )  # fmt: skip
    new = [(k[-n:], v[-n:]) for (k, v), n in zip(sequences, rows, strict=True)]
    return Batch(
        metadata,
        cache,
        torch.randn(total, HEADS, DIM, generator=random),
        torch.cat([keys for keys, _ in new]),
        torch.cat([values for _, values in new]),
        sequences,
        rows,
    )


def expected(made: Batch, window: int | None, *, causal: bool = False):
    """What the reference gives for every queried row."""
    queries = made.query.split(made.rows)
    return torch.cat(
        [
            reference(query, keys, values, window, causal)
            for query, (keys, values) in zip(queries, made.sequences, strict=True)
        ]
    )


def run(impl, made: Batch):
    """One forward pass of the back-end."""
    out = torch.full_like(made.query, torch.nan)
    impl.forward(None, made.query, made.key, made.value, made.cache, made.metadata, out)
    return out
