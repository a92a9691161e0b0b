"""What a draft pass is fed, against a straightforward loop over requests."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
torch.set_num_threads(1)

from dflash_plugin.shims.vllm_block_inputs import block, slots  # noqa: E402

MASK = 9


def loop(starts, lengths, rejected, known, rows):
    """(ids, positions, sequence lengths, valid) by hand; ``starts``: first position of each."""
    ids, positions, seq_lens, valid = [], [], [], []
    for start, length, gone, token in zip(starts, lengths, rejected, known, strict=True):
        last = start + length - gone - 1
        ids += [token] + [MASK] * (rows - 1)
        positions += [last + 1 + row for row in range(rows)]
        seq_lens.append(last + 1 + rows)
        valid += [True] * (length - gone) + [False] * gone
    return ids, positions, seq_lens, valid


REQUEST = st.tuples(st.integers(0, 50), st.integers(1, 9), st.integers(0, 8), st.integers(0, 8))


@settings(max_examples=100)
@given(st.lists(REQUEST, min_size=1, max_size=5), st.integers(2, 6), st.booleans())
def test_blocks_as_a_loop_makes_them(requests, rows, some_rejected):
    starts, lengths, gone, known = (list(column) for column in zip(*requests, strict=True))
    rejected = [
        min(g, length - 1) if some_rejected else 0 for g, length in zip(gone, lengths, strict=True)
    ]
    positions = [s + i for s, n in zip(starts, lengths, strict=True) for i in range(n)]
    made = block(
        torch.tensor(known, dtype=torch.int32),
        torch.tensor(positions),
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.tensor(rejected, dtype=torch.int32) if some_rejected else None,
        rows=rows,
        mask_token_id=MASK,
    )
    ids, at, seq_lens, valid = loop(starts, lengths, rejected, known, rows)
    assert made.input_ids.tolist() == ids
    assert made.positions.tolist() == at
    assert made.owner.tolist() == [r for r in range(len(known)) for _ in range(rows)]
    assert made.seq_lens.tolist() == seq_lens
    assert made.context_positions.tolist() == positions
    assert made.context_owner.tolist() == [r for r, n in enumerate(lengths) for _ in range(n)]
    assert made.context_valid.tolist() == valid
    assert (made.input_ids.dtype, made.seq_lens.dtype) == (torch.int32, torch.int32)


def test_slots_follow_the_block_table():
    table = torch.tensor([[7, 3, 0], [5, 0, 0]], dtype=torch.int32)
    owner, positions = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 15, 17, 2])
    assert slots(table, owner, positions, 16, 48).tolist() == [112, 127, 49, 82]


def test_nothing_is_stored_past_the_limit_or_where_it_was_rejected():
    table = torch.tensor([[7, 3]], dtype=torch.int32)
    owner, positions = torch.zeros(4, dtype=torch.int64), torch.tensor([1, 2, 19, 40])
    valid = torch.tensor([True, False, True, True])
    # Position 40 is past the table, too: it must not be looked up there.
    assert slots(table, owner, positions, 16, 20, valid).tolist() == [113, -1, 51, -1]
    assert slots(table, owner, positions, 16, 19, valid).tolist() == [113, -1, -1, -1]
