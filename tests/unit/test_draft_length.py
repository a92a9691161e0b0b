"""Lengths chosen step by step, in simulation: costs, acceptance and times are made up."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.backends.draft_length import AdaptiveLength, FixedLength
from dflash_plugin.errors import PairMismatchError

MOST = 7
Cost = Callable[[int], float]


def free(length: int) -> float:
    """A GPU: the rows of a block are nearly free."""
    return 1.0 + (0.2 + 0.01 * length if length else 0)


def linear(length: int) -> float:
    """Every row costs as much as the first."""
    return 1.0 + (0.3 + length if length else 0)


def half(length: int) -> float:
    return 1.0 + (0.2 + 0.3 * length if length else 0)


class Machine:
    """Steps of a pair whose cost and acceptance are set, on a machine as noisy as wanted."""

    def __init__(self, cost: Cost, acceptance: Sequence[float], *, noise=0.0, seed=0) -> None:
        self.cost, self.acceptance, self.noise = cost, list(acceptance), noise
        self.random = random.Random(seed)
        self.pair = AdaptiveLength(len(self.acceptance))
        self.request = self.pair.request()

    def run(self, steps: int, rows: int = 1) -> list[int]:
        """The lengths chosen."""
        return [self.step(rows) for _ in range(steps)]

    def step(self, rows: int) -> int:
        length = self.request.choose(rows)
        accepted = []
        for _ in range(rows):
            lucky = [self.random.random() < chance for chance in self.acceptance[:length]]
            accepted.append(sum(accumulate(lucky, mul)))
        late = self.noise * self.random.expovariate(1)
        if self.random.random() < self.noise / 10:
            late += 4  # something else had the processor
        self.request.took(accepted, self.cost(length) * (1 + late))
        return length

    def share_of_best(self, lengths: Sequence[int]) -> float:
        """Expected tokens per second of these steps, by those of the best fixed length."""
        tokens = list(accumulate([1.0, *accumulate(self.acceptance, mul)]))
        best = max(count / self.cost(length) for length, count in enumerate(tokens))
        seconds = sum(self.cost(length) for length in lengths)
        return sum(tokens[length] for length in lengths) / seconds / best


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize(
    "cost, chance, best",
    [(free, 0.95, {6, 7}), (linear, 0.95, {0}), (linear, 0.3, {0}), (half, 0.05, {0}),
     (half, 0.8, {2, 3, 4, 5})],
)  # fmt: skip
def test_it_settles_on_the_fastest_length(cost, chance, best, noise):
    machine = Machine(cost, [chance] * MOST, noise=noise)
    machine.run(40)
    lengths = machine.run(400)
    assert noise or sum(length in best for length in lengths) > 0.8 * len(lengths)
    assert machine.share_of_best(lengths) > (0.93 if noise else 0.96)


def test_it_begins_with_the_pairs_own_length():
    assert AdaptiveLength(15).request().choose(1) == 15


@settings(max_examples=60, deadline=None)
@given(
    most=st.integers(1, 15),
    draft=st.floats(0, 0.5),
    row=st.sampled_from([0, 0.01, 0.05, 0.1, 0.3, 1.0, 1.5]),
    jump=st.tuples(st.integers(1, 16), st.sampled_from([0, 0.5, 1.0])),
    chance=st.floats(0, 0.97),
    falls=st.sampled_from([1.0, 0.95, 0.9]),
    noise=st.sampled_from([0, 0.1, 0.2]),
    seed=st.integers(0, 2**32),
)
def test_it_ends_near_the_best_fixed_length(*, most, draft, row, jump, chance, falls, noise, seed):
    def cost(length: int) -> float:
        more = draft + row * length if length else 0
        return 1 + more + (jump[1] if length >= jump[0] else 0)

    chances = [chance * falls**place for place in range(most)]
    machine = Machine(cost, chances, noise=noise, seed=seed)
    lengths = machine.run(600)
    assert all(0 <= length <= most for length in lengths)
    assert machine.share_of_best(machine.run(600)) > 0.88


@pytest.mark.parametrize("cost", [free, half, linear])
@pytest.mark.parametrize("chance", [0.0, 0.5, 0.95])
def test_trials_of_other_lengths_are_rare_and_cheap(cost, chance):
    machine = Machine(cost, [chance] * MOST)
    trials, wasted, seconds = 0, 0.0, 0.0
    rng = machine.random.getstate()
    lengths = machine.run(1000)[200:]
    machine.random.setstate(rng)
    usual = max(set(lengths), key=lengths.count)
    tokens = list(accumulate([1.0, *accumulate(machine.acceptance, mul)]))
    for length in lengths:
        seconds += cost(length)
        wasted += cost(length) - tokens[length] * cost(usual) / tokens[usual]
        trials += length != usual
    if chance in (0.0, 0.95):  # else several lengths are as good
        assert trials < len(lengths) / 4
    assert wasted < 0.06 * seconds


@pytest.mark.parametrize("cost", [free, half])
def test_it_follows_acceptance_down_to_no_draft_and_up_again(cost):
    machine = Machine(cost, [0.95] * MOST)
    assert min(machine.run(100)[-8:]) > 2
    machine.acceptance = [0.01] * MOST
    machine.run(150)
    assert sum(length > 0 for length in machine.run(100)) < 20
    machine.acceptance = [0.95] * MOST
    machine.run(200)
    lengths = machine.run(100)
    assert machine.share_of_best(lengths) > 0.9


def test_it_follows_a_machine_that_becomes_slow_for_long_blocks():
    machine = Machine(free, [0.9] * MOST)
    machine.run(100)
    machine.cost = linear
    machine.run(150)
    assert machine.share_of_best(machine.run(200)) > 0.9


def test_one_late_step_decides_nothing():
    machine = Machine(free, [0.95] * MOST)
    machine.run(60)
    machine.cost = lambda length: 50.0
    machine.run(1)
    machine.cost = free
    assert machine.share_of_best(machine.run(20)) > 0.95


def test_the_first_step_of_all_may_be_slow():
    machine = Machine(lambda length: 100.0, [0.95] * MOST)
    machine.run(1)
    machine.cost = free
    machine.run(30)
    assert machine.share_of_best(machine.run(60)) > 0.95


def test_the_next_text_begins_with_what_is_known():
    machine = Machine(linear, [0.5] * MOST)
    machine.run(60)
    machine.request = machine.pair.request()
    assert sum(length > 0 for length in machine.run(8)) <= 1
    machine = Machine(half, [0.9] * MOST)
    machine.run(60)
    machine.request = machine.pair.request()
    assert machine.request.choose(1) >= 3


def test_batches_of_another_size_have_their_own_costs():
    machine = Machine(free, [0.95] * MOST)
    machine.run(60, rows=4)
    machine.cost = linear
    machine.run(60, rows=1)
    assert machine.share_of_best(machine.run(100, rows=1)) > 0.9
    machine.cost = free
    assert machine.share_of_best(machine.run(100, rows=4)) > 0.9


def test_a_fixed_length_is_fixed():
    length = FixedLength.of(None, 8)
    assert (length.most, FixedLength.of(1, 8).most, FixedLength.of(3, 8).most) == (7, 0, 2)
    request = length.request()
    request.took([0], 100.0)
    assert request.choose(1) == request.choose(4) == 7
    with pytest.raises(PairMismatchError, match="block_size is 9, but the draft's is 8"):
        FixedLength.of(9, 8)
    with pytest.raises(PairMismatchError, match="block_size is 2, but no draft is loaded"):
        FixedLength.of(2, 1)
