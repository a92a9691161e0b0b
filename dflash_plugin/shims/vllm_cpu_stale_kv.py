"""vLLM's CPU attention with ``causal=False`` reads the KV cache past a sequence's end.

Found by comparing the compiled kernel with plain attention (CPU wheels 0.18 to 0.22;
0.24 is right): whatever an earlier request left in the last block takes part in the
softmax. Drafts attend within their block in both directions, so acceptance falls.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from types import ModuleType
from typing import Any

from . import Shim


def kernel_is_wrong(module: Any) -> bool:
    """Whether one query over one key sees the rest of the KV block too."""
    import torch

    block, head = 16, 32
    isa = module._get_attn_isa(torch.float32, block, head)
    cache = torch.full((2, 1, 1, block, head), 8.0)
    token = torch.ones(1, 1, head)
    first, start = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32)
    length, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    module.ops.cpu_attn_reshape_and_cache(token, token, cache[0], cache[1], first, isa)
    schedule = module.ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head,
        seq_lens=length,
        dtype=torch.float32,
        query_start_loc=start,
        causal=False,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    out = torch.empty_like(token)
    module.ops.cpu_attention_with_kv_cache(
        query=token,
        key_cache=cache[0],
        value_cache=cache[1],
        output=out,
        query_start_loc=start,
        seq_lens=length,
        scale=1.0,
        causal=False,
        alibi_slopes=None,
        sliding_window=(-1, -1),
        block_table=table,
        softcap=0,
        scheduler_metadata=schedule,
        s_aux=None,
    )
    return not torch.allclose(out, token)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Query rows that one call of the causal kernel computes; ``index`` None: all of them."""

    index: Any
    window: int | None
    metadata: Any


def plan(metadata: Any, window: int | None, schedule: Any) -> list[Rows]:
    """Non-causal attention as calls of the causal kernel, one request a query row.

    The only row of a request is its last position, which sees the whole sequence. With a
    window (positions that a row sees on either side, its own included) the rows at one
    distance from their sequence's end go together: their windows reach equally far.

    Args:
        metadata: ``CPUAttentionMetadata``.
        schedule: (query_start_loc, seq_lens, window or None) -> scheduler metadata.
    """
    import torch

    starts = metadata.query_start_loc.long()
    rows = torch.arange(int(starts[-1]))
    request = torch.repeat_interleave(starts.diff())

    def part(index: Any, seq_lens: Any, reach: int | None) -> Rows:
        owner = request if index is None else request[index]
        start = torch.arange(len(owner) + 1, dtype=torch.int32)
        seq_lens = seq_lens.to(torch.int32)
        replaced = dataclasses.replace(
            metadata,
            num_actual_tokens=len(owner),
            max_query_len=1,
            query_start_loc=start,
            seq_lens=seq_lens,
            block_table=metadata.block_table[owner],
            scheduler_metadata=schedule(start, seq_lens, reach),
            causal=True,
            use_sdpa_prefill=False,
        )
        return Rows(index, reach, replaced)

    if window is None:
        return [part(None, metadata.seq_lens[request], None)]
    parts = []
    from_end = starts[1:][request] - 1 - rows
    for distance in range(int(from_end.max()) + 1):
        index = (from_end == distance).nonzero()[:, 0]
        ahead = min(distance, window - 1)  # positions after the row's own that it sees
        seq_lens = metadata.seq_lens[request[index]] - (distance - ahead)
        parts.append(part(index, seq_lens, window + ahead))
    return parts


def apply(module: ModuleType) -> str:
    """Run non-causal decoder attention through the causal kernel where that is needed.

    The kernel is asked when a draft first needs it, not in processes without one.
    """
    import torch

    wrong = functools.cache(lambda: kernel_is_wrong(module))
    impl = module.CPUAttentionBackendImpl
    published = impl.forward
    envs = getattr(module, "envs", None)  # below 0.20 the schedule has no setting
    split = True if envs is None else envs.VLLM_CPU_ATTN_SPLIT_KV

    def forward(  # type: ignore[no-untyped-def]  # noqa: PLR0917 (the engine's)
        self, layer, query, key, value, kv_cache, attn_metadata, output=None, *args, **kwargs
    ):
        usual = attn_metadata is None or attn_metadata.causal
        if usual or self.attn_type != module.AttentionType.DECODER or not wrong():
            return published(
                self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )

        def schedule(start: Any, seq_lens: Any, window: int | None) -> Any:
            return module.ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(seq_lens),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_size,
                seq_lens=seq_lens,
                dtype=query.dtype,
                query_start_loc=start,
                causal=True,
                sliding_window_size=window or -1,
                isa=attn_metadata.isa,
                enable_kv_split=split,
            )

        behind = self.sliding_window[0]  # the impl keeps (window - 1, 0), or -1 for none
        window = None if behind < 0 else behind + 1
        # The layers of a group share their metadata object.
        plans = attn_metadata.__dict__.setdefault("_dflash_plugin_plans", {})
        geometry = (self.num_heads, self.num_kv_heads, self.head_size, window)
        if geometry not in plans:
            plans[geometry] = plan(attn_metadata, window, schedule)
        for rows in plans[geometry]:
            view, queries, out = self, query, output
            if rows.index is not None:
                view = copy.copy(self)
                view.sliding_window = (rows.window - 1, 0)
                queries = query[rows.index]
                out = torch.empty_like(output[: len(rows.index)])
            published(
                view, layer, queries, key, value, kv_cache, rows.metadata, out, *args, **kwargs
            )
            if rows.index is not None:
                output[rows.index] = out
            key = value = None  # in the cache since the first call
        return output

    impl.forward = forward
    return "non-causal attention runs row by row through the causal kernel"


SHIM = Shim(
    name="cpu-stale-kv",
    symptom="drafts on the CPU depend on what earlier requests left in the KV cache; "
    "acceptance falls, silently",
    mechanism="the compiled kernel ignores the sequence length where causal is False; every "
    "query row becomes a request of its own, whose causal attention is the same",
    removal="when no supported CPU wheel's kernel reads past a sequence's end, which "
    "test_cpu_stale_kv_is_still_needed shows by failing",
    module="vllm.v1.attention.backends.cpu_attn",
    fingerprints={
        "CPUAttentionBackendImpl.forward": frozenset(
            {
                "33fe77936a1ab380",  # 0.18.0 to 0.19.1
                "42880c2425af8e8e",  # 0.20.0 to 0.20.2
                "b14d22cba6ba67d5",  # 0.21.0 to 0.22.1
                "b65d21cc72a52d20",  # 0.23.0
            }
        ),
        "CPUAttentionMetadataBuilder.build": frozenset(
            {
                "2d54fef52184e4be",  # 0.18.0 to 0.19.1
                "b21d7bb242c235af",  # 0.20.0 to 0.23.0
            }
        ),
    },
    apply=apply,
)
