"""What a draft pass is fed, computed on the device: tokens, positions and KV slots.

Plain torch, free of vLLM. A step of the target computed n tokens of several requests; the
last ones of a request may have been rejected. The draft stores the accepted ones as context
and runs one block per request after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows of all requests' blocks (request by request) and the context before them.

    Attributes:
        input_ids: int32 [requests * rows]: the known token, then masks.
        positions: int64 [requests * rows], absolute.
        owner: the request of each row.
        seq_lens: int32 [requests]: context and block together.
        context_positions: int64 [n]. context_owner: the request of each of the n tokens.
        context_valid: bool [n]: False for rejected tokens.
    """

    input_ids: Tensor
    positions: Tensor
    owner: Tensor
    seq_lens: Tensor
    context_positions: Tensor
    context_owner: Tensor
    context_valid: Tensor


def block(
    next_token_ids: Tensor,
    target_positions: Tensor,
    query_start_loc: Tensor,
    num_rejected: Tensor | None,
    *,
    rows: int,
    mask_token_id: int,
) -> Block:
    """Lay out the blocks that follow a step of the target.

    Args:
        next_token_ids: [requests]. target_positions: [n].
        query_start_loc: [requests + 1], where each request's tokens begin.
        num_rejected: [requests], or None for none.
        rows: of a block, the known token's included.
    """
    device, requests = target_positions.device, len(next_token_ids)
    ends = query_start_loc[1 : requests + 1].long()
    accepted = ends if num_rejected is None else ends - num_rejected[:requests].long()
    tokens = torch.arange(len(target_positions), device=device)
    owner = torch.searchsorted(ends, tokens, right=True).clamp(max=requests - 1)
    known_at = target_positions[accepted - 1].long() + 1
    positions = known_at[:, None] + torch.arange(rows, device=device)
    input_ids = torch.full((requests, rows), mask_token_id, dtype=torch.int32, device=device)
    input_ids[:, 0] = next_token_ids
    return Block(
        input_ids=input_ids.flatten(),
        positions=positions.flatten(),
        owner=torch.arange(requests, device=device).repeat_interleave(rows),
        seq_lens=(known_at + rows).int(),
        context_positions=target_positions.long(),
        context_owner=owner,
        context_valid=tokens < accepted[owner],
    )


def slots(  # noqa: PLR0917
    block_table: Tensor,
    owner: Tensor,
    positions: Tensor,
    block_size: int,
    limit: int,
    valid: Tensor | None = None,
) -> Tensor:
    """KV slots int64 [n] of positions; -1 where nothing is to be stored.

    Args:
        block_table: [requests, blocks]. owner: each position's request.
        limit: positions from here on have no slot.
        valid: False: leave it out.
    """
    stored = positions < limit
    if valid is not None:
        stored = stored & valid
    page = (positions // block_size).clamp(max=block_table.shape[1] - 1)
    slot = block_table[owner, page].long() * block_size + positions % block_size
    return torch.where(stored, slot, -1)
