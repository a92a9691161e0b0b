"""In plain torch, what SGLang has Triton and CUDA kernels for on DFlash's way.

Imports torch at its top: loaded by shims once an engine's own module is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def _columns(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of every entry in the windows ``start[i] .. end[i]`` of each row i."""
    first, length = start.long(), (end - start).long()
    rows = torch.repeat_interleave(length)
    within = torch.arange(len(rows)) - (length.cumsum(0) - length)[rows]
    return rows, first[rows] + within


def assign_extend_cache_locs_func(  # noqa: PLR0917 (the engine's)
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> Tensor:
    """KV slots of the tokens ``start_offset .. end_offset`` of each request, one after another."""
    rows, columns = _columns(start_offset, end_offset)
    return req_to_token[req_pool_indices.long()[rows], columns].long()


def assign_req_to_token_pool_func(  # noqa: PLR0917 (the engine's)
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Write KV slots into the table of each request, in place."""
    rows, columns = _columns(start_offset, end_offset)
    slots = out_cache_loc[: len(rows)].to(req_to_token.dtype)
    req_to_token[req_pool_indices.long()[rows], columns] = slots


def visible(queries: Tensor, keys: Tensor, *, causal: bool, window: int) -> Tensor | None:
    """Which key positions [k] each query position [q] sees; None: all of them.

    ``window`` counts the positions before the query's own that it sees; -1: all.
    """
    behind = queries[:, None] - keys[None, :]
    seen = behind >= 0 if causal else None
    if window >= 0:
        near = behind.abs() <= window
        seen = near if seen is None else seen & near
    return seen


def block_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    *,
    causal: bool,
    window: int,
    scale: float | None,
) -> Tensor:
    """Attention of a block's queries over its context and itself.

    Args:
        query: [n, heads, head_dim], at the last n positions.
        keys, values: the KV pool's, [slots, kv_heads, head_dim].
        slots: [length], of all positions; the block's keys are stored already.

    Returns:
        [n, heads, width of the values].
    """
    (n, heads, _), length = query.shape, len(slots)
    # Keys that no query of the block sees are not read.
    first = max(0, length - n - window) if window >= 0 else 0
    positions = torch.arange(first, length)
    k, v = (pool[slots[first:]].to(query.dtype).transpose(0, 1) for pool in (keys, values))
    # Queries that share a key head are rows of one product: no copies of keys.
    kv_heads = k.shape[0]
    groups = heads // kv_heads
    q = query.unflatten(1, (kv_heads, groups)).permute(1, 2, 0, 3).flatten(1, 2)
    mask = visible(positions[-n:], positions, causal=causal, window=window)
    mixed = scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=None if mask is None else mask.repeat(groups, 1),
        scale=scale,
    )[0]
    return mixed.unflatten(1, (groups, n)).permute(2, 0, 1, 3).flatten(1, 2)


def tree_speculative_sampling_target_only(  # noqa: PLR0917 (the engine's)
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Rejection sampling of a chain of drafted tokens, each drafted with certainty.

    A drafted token is kept with its target probability; the first that is not is drawn again
    from the target's distribution without it; after the last, one more is drawn.

    Args:
        predicts: [batch * n], written: the token after each kept one.
        accept_index: [batch, n], written: places of the kept ones in ``predicts``.
        accept_token_num: [batch], written: how many drafted tokens are kept.
        candidates: [batch, n]: the known token and n - 1 drafted ones.
        retrive_index: [batch, n]: the place of each candidate.
        target_probs: [batch, n, vocabulary].
        uniform_samples, uniform_samples_for_final_sampling: [batch, n] and [batch], in [0, 1).
    """
    batch, n = candidates.shape
    drafted = candidates[:, 1:].long()
    p = target_probs[:, :-1].gather(2, drafted[..., None])[..., 0]
    kept = (uniform_samples[:, : n - 1] < p / threshold_acc) | (p >= threshold_single)
    count = kept.long().cumprod(1).sum(1)

    rows = torch.arange(batch)
    left = target_probs[rows, count].double()
    rejected = count < n - 1
    left[rows[rejected], drafted[rejected, count[rejected]]] = 0
    cumulated = left.cumsum(1)
    drawn = uniform_samples_for_final_sampling.double() * cumulated[:, -1]
    last = torch.searchsorted(cumulated, drawn[:, None], right=True)[:, 0]
    # Rounding may put the draw on the total itself.
    last = torch.minimum(last, torch.searchsorted(cumulated, cumulated[:, -1:].clone())[:, 0])

    after = torch.cat([drafted, drafted.new_zeros(batch, 1)], 1)
    after[rows, count] = last
    places = retrive_index.long()
    written = torch.arange(n) <= count[:, None]
    predicts[places[written]] = after[written].to(predicts.dtype)
    accept_index[written] = places[written].to(accept_index.dtype)
    accept_token_num.copy_(count)
