"""vLLM's speculative-decoding kernels in torch: what they decide, and that it is lossless."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
torch.set_num_threads(1)

from dflash_plugin.shims import vllm_torch_kernels as kernels  # noqa: E402

EMPTY = -1


def ends(*counts):
    return torch.tensor(counts).cumsum(0).int()


def test_kernels_are_launched_on_a_grid():
    called = []
    kernels.Launched(lambda *args, **kwargs: called.append((args, kwargs)))[(3, 4)](1, size=2)
    assert called == [((1,), {"size": 2})]


def test_every_kernel_named_is_there():
    for name in (*kernels.REJECTION, *kernels.PROPOSER):
        assert callable(getattr(kernels, name))


def test_greedy_accepts_the_prefix_that_agrees():
    drafted = torch.tensor([4, 5, 6, 7, 8, 9])
    best = torch.tensor([4, 1, 6, 7, 2, 9])
    out = torch.full((4, 4), EMPTY, dtype=torch.int32)
    kernels.rejection_greedy_sample_kernel(
        out, ends(3, 1, 0, 2), drafted, best, torch.tensor([[10], [11], [12], [13]]), None, 3
    )
    assert out.tolist() == [[4, 1, -1, -1], [7, 11, -1, -1], [12, -1, -1, -1], [2, -1, -1, -1]]


def test_greedy_leaves_sampled_requests_alone():
    out = torch.full((2, 2), EMPTY, dtype=torch.int32)
    both = torch.tensor([4, 4])
    kernels.rejection_greedy_sample_kernel(
        out, ends(1, 1), both, both, torch.tensor([[1], [1]]), torch.tensor([False, True]), 1
    )
    assert out.tolist() == [[-1, -1], [4, 1]]


def sampled(target_probs, drafted, draws, generator):
    """First token decided at each of ``draws`` requests with one drafted token each."""
    probs = target_probs.expand(draws, -1).contiguous()
    tokens = torch.full((draws,), drafted)
    noise = torch.empty_like(probs).exponential_(generator=generator).reciprocal()
    recovered = torch.empty(draws, dtype=torch.int64)
    count = ends(*[1] * draws)
    kernels.sample_recovered_tokens_kernel(
        recovered, count, tokens, None, probs, noise, probs.shape[1], 8192, NO_DRAFT_PROBS=True
    )
    assert (recovered != drafted).all()
    out = torch.full((draws, 2), EMPTY, dtype=torch.int32)
    kernels.rejection_random_sample_kernel(
        out, count, tokens, None, probs, torch.full((draws, 1), 7), recovered,
        torch.rand(draws, dtype=torch.float64, generator=generator),
        torch.zeros(draws, dtype=torch.bool), 1, probs.shape[1], NO_DRAFT_PROBS=True,
    )  # fmt: skip
    accepted = out[:, 0] == drafted
    assert (out[accepted, 1] == 7).all()
    assert (out[~accepted, 1] == EMPTY).all()
    return out[:, 0]


@pytest.mark.parametrize("drafted", [0, 2, 4])
def test_what_is_sampled_has_the_targets_distribution(drafted):
    """Whatever is proposed: the definition of lossless at a temperature."""
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    draws = 20000
    tokens = sampled(probs, drafted, draws, torch.Generator().manual_seed(drafted))
    counts = torch.bincount(tokens.long(), minlength=5).double()
    assert counts[4] == 0
    expected = probs[:4].double() * draws
    chi_squared = float(((counts[:4] - expected) ** 2 / expected).sum())
    assert chi_squared < 21.1  # 3 degrees of freedom, p = 1e-4


def test_random_stops_at_the_first_rejection_and_skips_greedy_requests():
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    out = torch.full((2, 4), EMPTY, dtype=torch.int32)
    kernels.rejection_random_sample_kernel(
        out, ends(3, 1), torch.tensor([0, 1, 0, 0]), None, probs, torch.tensor([[5], [6]]),
        torch.tensor([1, 0, 1, 1]), torch.full((4,), 0.5, dtype=torch.float64),
        torch.tensor([False, True]), 3, 2, NO_DRAFT_PROBS=True,
    )  # fmt: skip
    assert out.tolist() == [[0, 0, -1, -1], [-1, -1, -1, -1]]


def test_probabilities_of_drafts_are_refused():
    some = torch.zeros(1, 2)
    with pytest.raises(NotImplementedError, match="do not occur"):
        kernels.sample_recovered_tokens_kernel(some, ends(1), some, some, some, some, 2, 8192)


def test_values_are_repeated_per_drafted_token():
    out = torch.zeros(5)
    kernels.expand_kernel(out, torch.tensor([0.0, 0.5, 2.0]), ends(2, 0, 3), 0, 1)
    assert out.tolist() == [1, 1, 2, 2, 2]


def test_rejected_tokens_and_the_row_to_continue_from():
    """Requests with 3 drafted tokens (2 of 4 sampled valid), none, and 2 (all valid)."""
    indices, rejected = torch.empty(3, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    kernels.eagle_prepare_inputs_padded_kernel(
        ends(3, 0, 2), torch.tensor([2, 1, 3]), torch.tensor([0, 4, 9, 12]), indices, rejected, 3
    )
    assert rejected.tolist() == [2, 0, 0]
    assert indices.tolist() == [1, 8, 11]


def test_the_last_valid_token_or_the_prompts_next():
    tokens = torch.tensor([[5, 6, -1], [7, -1, -1], [-1, -1, -1], [5, 99, -1]])
    discard = torch.tensor([False, True, False, False, False])
    following, count = torch.empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    backup = torch.tensor([1, 2, 3, 4, 0], dtype=torch.int32)
    kernels.eagle_prepare_next_token_padded_kernel(
        tokens, discard, backup, following, count, 50, 3, 4, 3, BLOCK_SIZE_TOKENS=4
    )
    assert following.tolist() == [6, 2, 3, 5]
    assert count.tolist() == [2, 0, 0, 1]
