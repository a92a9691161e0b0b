"""What stands for SGLang's kernels on a CPU, against plain loops and the reference's masks."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from dflash_plugin.pair_config import LayerAttention  # noqa: E402
from dflash_plugin.reference.model import visible as reference_visible  # noqa: E402
from dflash_plugin.shims import sglang_torch_kernels as kernels  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def table() -> torch.Tensor:
    """[requests, tokens] -> slots, all different."""
    return torch.randperm(5 * 20).view(5, 20).to(torch.int32)


def test_slots_of_windows_are_read_one_request_after_another():
    slots, requests = table(), torch.tensor([3, 0, 4])
    start, end = torch.tensor([2, 0, 7]), torch.tensor([6, 4, 11])
    found = kernels.assign_extend_cache_locs_func(requests, slots, start, end, 3, 4, "cpu")
    assert found.dtype == torch.int64
    assert found.tolist() == [*slots[3, 2:6], *slots[0, 0:4], *slots[4, 7:11]]


def test_slots_of_windows_of_any_length_are_written():
    slots, requests = torch.zeros(4, 9, dtype=torch.int32), torch.tensor([2, 0, 3])
    start, end = torch.tensor([1, 5, 0]), torch.tensor([4, 5, 2])
    new = torch.tensor([11, 12, 13, 14, 15, 99])
    kernels.assign_req_to_token_pool_func(requests, slots, start, end, new, 3)
    expected = torch.zeros(4, 9, dtype=torch.int32)
    expected[2, 1:4] = torch.tensor([11, 12, 13])
    expected[3, 0:2] = torch.tensor([14, 15])
    assert torch.equal(slots, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 40])
@pytest.mark.parametrize("prefix", [0, 3, 30])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_a_block_sees_what_the_reference_says(causal, window, prefix, heads, kv_heads):
    n, width = 8, 16
    pool = torch.randn(2, 64, kv_heads, width, dtype=torch.float64)
    slots = torch.randperm(64)[: prefix + n]
    query = torch.randn(n, heads, width, dtype=torch.float64)
    found = kernels.block_attention(
        query,
        pool[0],
        pool[1],
        slots,
        causal=causal,
        window=-1 if window is None else window - 1,
        scale=0.3,
    )
    positions = torch.arange(prefix + n)
    mask = reference_visible(positions[prefix:], positions, LayerAttention(window, causal))
    keys, values = (t[slots].repeat_interleave(heads // kv_heads, 1) for t in pool)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * 0.3
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("hqk,khd->qhd", expected, values))


def test_keys_may_be_of_another_type_than_queries():
    pool = torch.randn(2, 9, 2, 8).bfloat16()
    query = torch.randn(3, 4, 8)
    slots = torch.arange(9)
    found = kernels.block_attention(
        query, pool[0], pool[1], slots, causal=True, window=-1, scale=None
    )
    assert found.dtype == torch.float32
    assert found.shape == (3, 4, 8)


def sample(candidates, probabilities, batch, **options):
    """Kept tokens and the one after them, per row, as the engine reads them."""
    n, vocabulary = probabilities.shape
    predicts = torch.full((batch * n,), -1, dtype=torch.int32)
    index = torch.full((batch, n), -1, dtype=torch.int32)
    count = torch.full((batch,), -1, dtype=torch.int32)
    kernels.tree_speculative_sampling_target_only(
        predicts=predicts,
        accept_index=index,
        accept_token_num=count,
        candidates=torch.tensor(candidates).expand(batch, n),
        retrive_index=torch.arange(batch * n).view(batch, n),
        retrive_next_token=torch.empty(0),
        retrive_next_sibling=torch.empty(0),
        uniform_samples=options.get("coins", torch.rand(batch, n)),
        uniform_samples_for_final_sampling=options.get("last", torch.rand(batch)),
        target_probs=probabilities.expand(batch, n, vocabulary),
        draft_probs=torch.zeros(batch, n, vocabulary),
        **{key: options[key] for key in options if key.startswith("threshold")},
    )
    rows = torch.arange(batch)
    return predicts.view(batch, n), index, count, predicts[index[rows, count.long()].long()]


def test_sampled_blocks_are_distributed_as_the_target():
    first = torch.tensor([0.1, 0.6, 0.3, 0.0])
    second = torch.tensor([0.5, 0.0, 0.25, 0.25])
    third = torch.tensor([0.0, 0.0, 0.5, 0.5])
    batch = 20_000
    tokens, _, count, _ = sample([0, 1, 2], torch.stack([first, second, third]), batch)
    shares = torch.bincount(tokens[:, 0], minlength=4) / batch
    torch.testing.assert_close(shares, first, atol=0.02, rtol=0)
    after = tokens[tokens[:, 0] == 1][:, 1]  # the first drafted token, kept
    torch.testing.assert_close(
        torch.bincount(after, minlength=4) / len(after), second, atol=0.025, rtol=0
    )
    both = tokens[count == 2][:, 2]
    torch.testing.assert_close(
        torch.bincount(both, minlength=4) / len(both), third, atol=0.03, rtol=0
    )


def test_what_the_engine_reads_is_the_token_after_the_kept_ones():
    sure = torch.eye(5)[torch.tensor([1, 2, 4])]
    tokens, index, count, bonus = sample([0, 1, 2], sure, 3)
    assert count.tolist() == [2, 2, 2]
    assert tokens.tolist() == [[1, 2, 4]] * 3
    assert index.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert bonus.tolist() == [4, 4, 4]


@pytest.mark.parametrize("last", [0.0, 1 - 2**-24])
def test_a_refused_token_is_never_drawn_again(last):
    flat = torch.full((2, 4), 0.25)
    coins, ends = torch.full((1, 2), 0.9), torch.tensor([last])
    for drafted in range(4):
        tokens, _, count, bonus = sample([0, drafted], flat, 1, coins=coins, last=ends)
        assert count.item() == 0
        assert bonus.item() == tokens[0, 0].item() != drafted


def test_a_lower_threshold_keeps_what_is_likely_enough():
    flat = torch.full((2, 4), 0.25)
    coins = torch.full((1, 2), 0.9)
    assert sample([0, 3], flat, 1, coins=coins, threshold_single=0.2)[2].item() == 1
