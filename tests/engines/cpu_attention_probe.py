"""Run by an engine environment's own python: the CPU attention shims on its real kernels.

Prints one JSON object: what the published back-end lacks, and how far the repaired one is
from plain attention.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import vllm.v1.attention.backends.cpu_attn as engine

from dflash_plugin.shims import fingerprint, resolve, vllm_cpu_kv_update, vllm_cpu_stale_kv

LENGTHS, ROWS = [40, 17, 5, 200], [5, 5, 5, 1]
LAYER = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)


def error(dtype: torch.dtype, block: int, dim: int, window: int | None) -> float:
    """Largest difference of non-causal attention from its definition, stale cache and all."""
    torch.manual_seed(1)
    heads, kv_heads, scale = 8, 2, dim**-0.5
    impl = engine.CPUAttentionBackendImpl(heads, dim, scale, kv_heads, None, window, "auto")
    shape = engine.CPUAttentionBackend.get_kv_cache_shape(64, block, kv_heads, dim)
    cache = torch.full(shape, 50.0, dtype=dtype)
    table = torch.zeros(len(LENGTHS), 16, dtype=torch.int32)
    sequences, slots, first = [], [], 1
    for request, (length, rows) in enumerate(zip(LENGTHS, ROWS, strict=True)):
        pages = -(-length // block)
        table[request, :pages] = torch.arange(first, first + pages)
        first += pages
        keys, values = torch.randn(2, length, kv_heads, dim).to(dtype)
        at = torch.arange(length)
        slot = table[request].long()[at // block] * block + at % block
        old = length - rows
        impl.do_kv_cache_update(LAYER, keys[:old], values[:old], cache, slot[:old])
        sequences.append((keys, values))
        slots.append(slot[old:])
    query = torch.randn(sum(ROWS), heads, dim).to(dtype)
    new = [(k[-n:], v[-n:]) for (k, v), n in zip(sequences, ROWS, strict=True)]
    metadata = engine.CPUAttentionMetadata(
        isa=engine._get_attn_isa(dtype, block, dim),
        num_actual_tokens=len(query),
        max_query_len=max(ROWS),
        query_start_loc=torch.tensor([0, *ROWS]).cumsum(0).int(),
        max_seq_len=max(LENGTHS),
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.cat(slots),
        scheduler_metadata=None,
        causal=False,
    )
    out = torch.full_like(query, torch.nan)
    keys, values = (torch.cat(part) for part in zip(*new, strict=True))
    impl.forward(LAYER, query, keys, values, cache, metadata, out)
    worst = 0.0
    for part, (keys, values), got in zip(
        query.split(ROWS), sequences, out.split(ROWS), strict=True
    ):
        length = len(keys)
        behind = torch.arange(length - len(part), length)[:, None] - torch.arange(length)
        k, v = (t.float().repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", part.float(), k) * scale
        if window is not None:
            scores = scores.masked_fill(behind.abs() >= window, -torch.inf)
        want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        worst = max(worst, float((want - got.float()).abs().max()))
    return worst


report: dict = {
    "wrong": vllm_cpu_stale_kv.kernel_is_wrong(engine),
    "no_update": "do_kv_cache_update" not in vars(engine.CPUAttentionBackendImpl),
}
for shim in (vllm_cpu_kv_update.SHIM, vllm_cpu_stale_kv.SHIM):
    found = {name: fingerprint(resolve(engine, name)) for name in shim.fingerprints}
    report[shim.name] = all(found[name] in known for name, known in shim.fingerprints.items())
    shim.apply(engine)
report["errors"] = [
    [str(dtype), block, dim, window, error(dtype, block, dim, window)]
    for dtype in (torch.float32, torch.bfloat16)
    for block in (16, 128)
    for dim in (32, 64, 128)
    for window in (None, 3, 8, 64)
]
print(json.dumps(report))
