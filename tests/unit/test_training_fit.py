"""The training loop: what a step is given, what it weighs, and that it is repeatable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from reference_helpers import VOCAB, draft_json, make_target  # noqa: E402

from dflash_plugin.errors import TrainingError  # noqa: E402
from dflash_plugin.pair import DraftConfig  # noqa: E402
from dflash_plugin.training.draft import TrainableDraft  # noqa: E402
from dflash_plugin.training.fit import (  # noqa: E402
    NO_LABEL,
    Batch,
    Recipe,
    block_loss,
    choose_anchors,
    fit,
    labels,
    schedule,
)

pytestmark = pytest.mark.torch

RECIPE = Recipe(steps=4, anchors=3, warmup=1)


@pytest.fixture(scope="module")
def target():
    found = make_target()
    found.model.float()
    found.embedding, found.head = found.embedding.float(), found.head.float()
    return found


def new_draft(target, seed: int = 0) -> TrainableDraft:
    config = DraftConfig.from_dict(draft_json(), Path("config.json"))
    return TrainableDraft(config, target.embedding, target.head, seed=seed)


def batches(seed: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield Batch.whole(torch.randint(3, 48, (2, 20), generator=generator))


def test_same_seed_same_weights_after_some_steps(target):
    one, same, other = (new_draft(target) for _ in range(3))
    losses = fit(one, target, batches(), RECIPE)
    assert fit(same, target, batches(), RECIPE) == losses
    assert fit(other, target, batches(), replace(RECIPE, seed=1)) != losses
    for name, value in one.published().items():
        assert torch.equal(value, same.published()[name]), name
    assert not torch.equal(one.fc.weight, other.fc.weight)


def test_every_parameter_is_trained_and_the_target_is_not(target):
    draft = new_draft(target)
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    frozen = [parameter.clone() for parameter in target.model.parameters()]
    fit(draft, target, batches(), RECIPE)
    unchanged = [n for n, v in draft.state_dict().items() if torch.equal(v, before[n])]
    assert not unchanged
    after = list(target.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, frozen, strict=True))


def test_a_repeated_text_is_learned(target):
    draft = new_draft(target)
    text = Batch.whole(next(batches()).ids)
    losses = fit(draft, target, iter([text] * 60), replace(RECIPE, steps=60, learning_rate=5e-3))
    assert losses[-1] < 0.3 * losses[0]


def test_progress_is_told_every_step(target):
    seen: list[tuple[int, float]] = []
    losses = fit(
        new_draft(target), target, batches(), RECIPE, lambda step, loss: seen.append((step, loss))
    )
    assert seen == list(enumerate(losses, 1))


def test_not_a_number_ends_the_run_before_the_weights(target):
    draft = new_draft(target)
    seen = {}

    def poison(step: int, _loss: float) -> None:
        if step == 2:
            with torch.no_grad():
                draft.norm.weight[0] = math.nan
            seen.update({n: v.clone() for n, v in draft.state_dict().items()})

    with pytest.raises(TrainingError, match="step 3 of 4: loss nan"):
        fit(draft, target, batches(), RECIPE, poison)
    for name, value in draft.state_dict().items():
        torch.testing.assert_close(value, seen[name], equal_nan=True, rtol=0, atol=0)


def test_anchors_stay_where_there_is_a_label():
    ids = torch.zeros(2, 12, dtype=torch.long)
    batch = Batch(ids, starts=torch.tensor([1, 4]), ends=torch.tensor([12, 7]))
    anchors = choose_anchors(batch, 500, torch.Generator().manual_seed(0))
    assert set(anchors[0].tolist()) == set(range(1, 11))
    assert set(anchors[1].tolist()) == {4, 5}


@pytest.mark.parametrize(("start", "end"), [(4, 5), (0, 5), (9, 5)])
def test_a_text_without_room_is_an_error(start, end):
    batch = Batch(torch.zeros(1, 12), torch.tensor([start]), torch.tensor([end]))
    with pytest.raises(TrainingError, match="no room for an anchor"):
        choose_anchors(batch, 1, torch.Generator())


def test_labels_are_the_next_tokens_and_end_with_the_text():
    batch = Batch(torch.arange(10)[None], torch.tensor([1]), torch.tensor([8]))
    found = labels(batch, torch.tensor([[2, 6]]), 5)
    assert found.tolist() == [[[3, 4, 5, 6], [7, NO_LABEL, NO_LABEL, NO_LABEL]]]


def test_loss_weighs_early_tokens_more_and_leaves_padding_out():
    logits = torch.zeros(1, 2, 3, VOCAB)
    wanted = torch.tensor([[[1, 2, 3], [4, NO_LABEL, NO_LABEL]]])
    assert float(block_loss(logits, wanted, 4.0)) == pytest.approx(math.log(VOCAB))

    def with_wrong(position: int) -> float:
        worse = logits.clone()
        worse[0, 0, position, 0] = 10.0
        return float(block_loss(worse, wanted, 2.0))

    first, second = (with_wrong(i) - math.log(VOCAB) for i in (0, 1))
    assert second / first == pytest.approx(math.exp(-1 / 2), rel=1e-4)


def test_schedule_warms_up_and_ends_at_the_floor():
    recipe = Recipe(steps=100, warmup=10, floor=0.1)
    rates = [schedule(step, recipe) for step in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) == rates[9]
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
