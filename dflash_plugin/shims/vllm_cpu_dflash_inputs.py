"""vLLM 0.20 to 0.24 prepares a draft's inputs with a Triton kernel, and the CPU has no Triton.

The CPU runner replaces the Triton kernels of EAGLE by compiled ones and forgot DFlash's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from . import Shim


def expand_inputs(
    num_reqs: int,
    *,
    next_token_ids_ptr: Any,
    target_positions_ptr: Any,
    out_input_ids_ptr: Any,
    out_context_positions_ptr: Any,
    out_query_positions_ptr: Any,
    out_context_slot_mapping_ptr: Any,
    out_query_slot_mapping_ptr: Any,
    out_token_indices_ptr: Any,
    block_table_ptr: Any,
    query_start_loc_ptr: Any,
    num_rejected_tokens_ptr: Any,
    parallel_drafting_token_id: int,
    block_size: int,
    num_query_per_req: int,
    num_speculative_tokens: int,
    HAS_NUM_REJECTED: bool,  # noqa: N803 - the engine passes it by this name
    **_grid: Any,
) -> None:
    """Write positions, cache slots, ids and sampled rows of one drafting step.

    Request ``r`` has the context rows ``start[r]`` to ``start[r + 1] - 1``, of which the
    last ``rejected[r]`` were refused by the target, and ``num_query_per_req`` query rows:
    its newest token, then masks. All tensors are the engine's buffers, written in place:

    Args:
        next_token_ids_ptr: [requests] newest token of each.
        target_positions_ptr: [rows], or [3, rows] with M-RoPE, whose rows agree on text.
        block_table_ptr: [requests or more, blocks] cache block of each run of ``block_size``.
        query_start_loc_ptr: [requests + 1 or more].
        out_context_positions_ptr, out_context_slot_mapping_ptr: [rows or more].
        out_input_ids_ptr, out_query_positions_ptr, out_query_slot_mapping_ptr:
            [requests * num_query_per_req or more].
        out_token_indices_ptr: [requests * num_speculative_tokens] rows of the masks.
    """
    import torch

    start = query_start_loc_ptr[: num_reqs + 1].long()
    positions = target_positions_ptr if target_positions_ptr.dim() == 1 else target_positions_ptr[0]
    positions = positions[: int(start[-1])].long()
    ends = start[1:]
    if HAS_NUM_REJECTED:
        ends = ends - num_rejected_tokens_ptr[:num_reqs].long()
    requests = torch.arange(num_reqs, device=positions.device)
    offsets = torch.arange(num_query_per_req, device=positions.device)

    def slots(rows: Any, at: Any) -> Any:
        blocks = (at // block_size).clamp(max=block_table_ptr.shape[1] - 1)
        return block_table_ptr[rows, blocks].long() * block_size + at % block_size

    context = len(positions)
    owner = requests.repeat_interleave(start[1:] - start[:-1])
    out_context_positions_ptr[:context] = positions
    out_context_slot_mapping_ptr[:context] = slots(owner, positions)

    queries = num_reqs * num_query_per_req
    query_positions = positions[ends - 1, None] + 1 + offsets
    out_query_positions_ptr[:queries] = query_positions.flatten()
    out_query_slot_mapping_ptr[:queries] = slots(requests[:, None], query_positions).flatten()

    ids = out_input_ids_ptr[:queries].view(num_reqs, num_query_per_req)
    ids.fill_(parallel_drafting_token_id)
    ids[:, 0] = next_token_ids_ptr[:num_reqs]
    masks = requests[:, None] * num_query_per_req + offsets[1 : 1 + num_speculative_tokens]
    out_token_indices_ptr[: masks.numel()] = masks.flatten()


class Launcher:
    """Stands where a Triton kernel stood: ``launcher[grid](**arguments)``."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(expand_inputs, grid[0])


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def apply(module: ModuleType) -> str:
    """Replace the kernel, and give the placeholder for Triton what its caller asks it."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        return "not needed, this CPU has Triton"
    module.copy_and_expand_dflash_inputs_kernel = Launcher()  # type: ignore[attr-defined]
    for name, function in (("next_power_of_2", _next_power_of_2), ("cdiv", _cdiv)):
        if not hasattr(module.triton, name):
            setattr(module.triton, name, function)
    return "draft inputs are prepared in torch"


SHIM = Shim(
    name="cpu-dflash-inputs",
    symptom="the first request kills the engine: module 'triton' has no attribute "
    "'next_power_of_2', and behind it a Triton kernel that is only a function",
    mechanism="the CPU runner has no replacement of copy_and_expand_dflash_inputs_kernel; "
    "one in torch is put in its place",
    removal="when the CPU runner brings its own (0.25), which "
    "test_each_repair_is_still_needed shows by failing",
    module="vllm.v1.spec_decode.dflash",
    fingerprints={
        "DFlashProposer.set_inputs_first_pass": frozenset(
            {
                "04298a00fe802d40",  # 0.20.0 to 0.22.1
                "4f7512f5afdebb4b",  # 0.23.0, 0.24.0
            }
        ),
    },
    apply=apply,
)
