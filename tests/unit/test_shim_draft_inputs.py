"""The draft inputs in torch, against a loop over requests and rows."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from dflash_plugin.shims import vllm_cpu_dflash_inputs as repair

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
pytestmark = pytest.mark.torch

BLOCK, COLUMNS, MASK, UNTOUCHED = 4, 8, 999, -7


def engine_buffers(rows, requests, k):
    """Outputs longer than needed, as the engine's are, and full of a known value."""

    def full(n):
        return torch.full((n + 3,), UNTOUCHED, dtype=torch.int64)

    return {
        "out_input_ids_ptr": full(requests * (k + 1)).int(),
        "out_context_positions_ptr": full(rows),
        "out_query_positions_ptr": full(requests * (k + 1)),
        "out_context_slot_mapping_ptr": full(rows),
        "out_query_slot_mapping_ptr": full(requests * (k + 1)),
        "out_token_indices_ptr": full(requests * k).int(),
    }


def by_hand(out, new, positions, table, starts, rejected, k):  # noqa: PLR0917
    """The same, one value at a time."""

    def slot(r, position):
        column = min(position // BLOCK, COLUMNS - 1)
        return int(table[r][column]) * BLOCK + position % BLOCK

    for r in range(len(starts) - 1):
        for row in range(starts[r], starts[r + 1]):
            out["out_context_positions_ptr"][row] = positions[row]
            out["out_context_slot_mapping_ptr"][row] = slot(r, positions[row])
        last = positions[starts[r + 1] - 1 - rejected[r]]
        for i in range(k + 1):
            row = r * (k + 1) + i
            out["out_query_positions_ptr"][row] = last + 1 + i
            out["out_query_slot_mapping_ptr"][row] = slot(r, last + 1 + i)
            out["out_input_ids_ptr"][row] = new[r] if i == 0 else MASK
            if i:
                out["out_token_indices_ptr"][r * k + i - 1] = row
    return out


@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mrope", [False, True])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 9], [3, 3]])
def test_it_is_what_a_loop_would_do(k, padded, mrope, lengths):
    generator = torch.Generator().manual_seed(k + 10 * padded + 100 * mrope + len(lengths))
    requests = len(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    first = torch.randint(0, 20, (requests,), generator=generator)
    positions = torch.cat([first[r] + torch.arange(n) for r, n in enumerate(lengths)])
    rejected = [min(n - 1, 2) if padded else 0 for n in lengths]
    table = torch.randint(1, 50, (requests + 2, COLUMNS), generator=generator).int()
    new = torch.randint(0, 300, (requests + 1,), generator=generator).int()
    found = engine_buffers(int(starts[-1]), requests, k)
    expected = by_hand(
        *({name: out.clone() for name, out in found.items()}, new.tolist(), positions.tolist()),
        *(table.tolist(), starts.tolist(), rejected, k),
    )
    # With M-RoPE the other rows differ on images only; here they show that row 0 is read.
    given = torch.stack([positions, positions + 1, positions + 2]) if mrope else positions
    repair.Launcher()[(requests, 3)](
        next_token_ids_ptr=new,
        target_positions_ptr=given,
        block_table_ptr=table,
        block_table_stride=table.stride(0),
        query_start_loc_ptr=torch.cat([starts, starts[-1:]]).int(),
        num_rejected_tokens_ptr=torch.tensor(rejected).int() if padded else 0,
        parallel_drafting_token_id=MASK,
        block_size=BLOCK,
        num_query_per_req=k + 1,
        num_speculative_tokens=k,
        total_input_tokens=len(positions),
        BLOCK_SIZE=256,
        HAS_NUM_REJECTED=padded,
        **found,
    )
    for name, out in found.items():
        assert out.tolist() == expected[name].tolist(), name


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_next_power_of_2(n, power):
    assert repair._next_power_of_2(n) == power


@pytest.fixture
def module(monkeypatch):
    def make(has_triton, **triton):
        utils = ModuleType("vllm.triton_utils")
        utils.HAS_TRITON = has_triton
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.triton_utils", utils)
        found = ModuleType("fake_dflash")
        found.triton = SimpleNamespace(**triton)
        found.copy_and_expand_dflash_inputs_kernel = "the Triton kernel"
        return found

    return make


def test_the_kernel_and_the_placeholder_are_completed(module):
    def own(a, b):
        return -(-a // b)

    found = module(has_triton=False, cdiv=own)
    assert "in torch" in repair.apply(found)
    assert isinstance(found.copy_and_expand_dflash_inputs_kernel, repair.Launcher)
    assert found.triton.next_power_of_2(5) == 8
    assert found.triton.cdiv is own
    bare = module(has_triton=False)
    repair.apply(bare)
    assert bare.triton.cdiv(9, 4) == 3


def test_a_cpu_with_triton_keeps_its_kernel(module):
    found = module(has_triton=True)
    assert "not needed" in repair.apply(found)
    assert found.copy_and_expand_dflash_inputs_kernel == "the Triton kernel"
    assert not hasattr(found.triton, "next_power_of_2")
