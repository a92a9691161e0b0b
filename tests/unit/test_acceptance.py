"""``dflash_plugin.acceptance``: pure functions, so mostly properties."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_plugin.acceptance import (
    AcceptanceStats,
    accepted_prefix,
    accepts,
    residual,
    total,
)

tokens = st.lists(st.integers(0, 2), max_size=6)


@st.composite
def distributions(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    size = draw(st.integers(1, 6))
    weights = st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any)
    p, q = draw(weights), draw(weights)
    return [w / sum(p) for w in p], [w / sum(q) for w in q]


@st.composite
def step_lists(draw: st.DrawFn) -> tuple[list[int], int]:
    k = draw(st.integers(1, 7))
    return draw(st.lists(st.integers(0, k), max_size=30)), k


@given(tokens, tokens)
def test_accepted_prefix_is_the_longest_common_one(a: list[int], b: list[int]) -> None:
    n = accepted_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@pytest.mark.parametrize(
    ("draft", "verified", "count"),
    [([], [], 0), ([], [5], 0), ([5], [5, 6], 1), ([4, 6], [5, 6], 0), ([5, 4], [5, 6, 7], 1)],
)
def test_accepted_prefix(draft: list[int], verified: list[int], count: int) -> None:
    assert accepted_prefix(draft, verified) == count


@given(distributions())
def test_rejection_sampling_leaves_exactly_the_targets_distribution(
    pair: tuple[list[float], list[float]],
) -> None:
    p, q = pair
    left = residual(p, q)
    rejected = sum(max(b - a, 0.0) for a, b in zip(p, q, strict=True))
    for token in range(len(p)):
        kept = min(p[token], q[token])  # q * min(1, p / q)
        assert kept + rejected * left[token] == pytest.approx(p[token], abs=1e-12)
    assert sum(left) == pytest.approx(1.0)


@given(st.floats(0, 1), st.floats(0.01, 1), st.floats(0, 1, exclude_max=True))
def test_accepts_with_probability_p_over_q(p: float, q: float, uniform: float) -> None:
    assert accepts(p, q, uniform) == (uniform * q < p)
    if p >= q:
        assert accepts(p, q, uniform)
    if p == 0:
        assert not accepts(p, q, uniform)


def test_acceptance_rate_is_p_over_q() -> None:
    rng = random.Random(0)
    kept = sum(accepts(0.3, 0.6, rng.random()) for _ in range(10_000))
    assert 4_800 < kept < 5_200


def test_residual_of_equal_distributions_is_the_targets() -> None:
    assert residual([0.25, 0.75], [0.25, 0.75]) == [0.25, 0.75]


def test_residual_wants_equal_lengths() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        residual([1.0], [0.5, 0.5])


@given(step_lists())
def test_stats_of_steps(case: tuple[list[int], int]) -> None:
    accepted, k = case
    stats = AcceptanceStats.from_steps(accepted, k)
    assert stats.drafts == len(accepted)
    assert stats.accepted == sum(accepted)
    assert stats.num_speculative_tokens == k
    assert stats.histogram == tuple(accepted.count(n) for n in range(k + 1))
    assert AcceptanceStats.from_dict(stats.to_dict()) == stats
    if accepted:
        assert stats.al == pytest.approx(sum(n + 1 for n in accepted) / len(accepted))
        assert 1 <= stats.al <= k + 1
        assert stats.rate_per_position is not None
        assert stats.rate_per_position[0] == sum(n > 0 for n in accepted) / len(accepted)


@given(step_lists(), st.data())
def test_adding_is_the_same_as_counting_together(
    case: tuple[list[int], int], data: st.DataObject
) -> None:
    accepted, k = case
    cut = data.draw(st.integers(0, len(accepted)))
    parts = [AcceptanceStats.from_steps(part, k) for part in (accepted[:cut], accepted[cut:])]
    assert total(parts, k) == parts[0] + parts[1] == AcceptanceStats.from_steps(accepted, k)


def test_without_a_step_there_is_no_acceptance_length() -> None:
    stats = total([], 4)
    assert stats == AcceptanceStats.from_steps([], 4)
    assert (stats.al, stats.rate_per_position, stats.drafts) == (None, None, 0)
    assert stats.histogram == (0, 0, 0, 0, 0)
    assert stats.to_dict()["al"] is None


@pytest.mark.parametrize("accepted", [[5], [-1], [0, 4, 5]])
def test_impossible_steps(accepted: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.\.4"):
        AcceptanceStats.from_steps(accepted, 4)


@pytest.mark.parametrize(("drafts", "counts"), [(1, (2, 0)), (3, (1, 2)), (3, (1, -1)), (-1, ())])
def test_impossible_counts(drafts: int, counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must fall"):
        AcceptanceStats(drafts, counts)


def test_statistics_of_different_k_do_not_add() -> None:
    with pytest.raises(ValueError, match="K 4 and K 5"):
        AcceptanceStats.from_steps([1], 4) + AcceptanceStats.from_steps([1], 5)
