"""Replaying a generated text gives the steps that generated it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from reference_helpers import (  # noqa: E402
    VOCAB,
    every_count,
    make_draft,
    make_target,
    oracle,
    prompt,
)

from dflash_plugin.errors import PairMismatchError, UsageError  # noqa: E402
from dflash_plugin.reference.loop import Generation, generate, generate_plain  # noqa: E402
from dflash_plugin.reference.replay import Replay, replay  # noqa: E402
from dflash_plugin.reference.target import HFTarget  # noqa: E402

pytestmark = pytest.mark.torch

K = 4


@cache
def target() -> HFTarget:
    return make_target()


@cache
def plain() -> tuple[int, ...]:
    text = generate_plain(target(), prompt(7), max_new_tokens=70, ignore_eos=True)
    return tuple(text.token_ids)


def same_steps(result: Replay, generation: Generation) -> None:
    assert [(s.position, s.known, s.draft, s.accepted) for s in result.steps] == [
        (s.position, s.known, s.draft, s.accepted) for s in generation.steps
    ]
    assert result.stats == generation.stats
    assert result.first_disagreement is None


@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_steps_of_a_draft_model(k: int, length: int, chunk: int) -> None:
    draft = make_draft(
        target().embedding,
        target().head,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
    )
    given = {"num_speculative_tokens": k}
    generation = generate(
        target(), draft, prompt(length), max_new_tokens=40, ignore_eos=True, **given
    )
    result = replay(target(), draft, prompt(length), generation.token_ids, chunk=chunk, **given)
    same_steps(result, generation)
    assert all(len(step.gaps) == k and min(step.gaps) >= 0 for step in result.steps)


@pytest.mark.parametrize("limit", range(24))
def test_steps_of_an_oracle_wherever_the_text_ends(limit: int) -> None:
    draft = oracle([*prompt(7), *plain()], K, every_count(7, K).__getitem__)
    generation = generate(target(), draft, prompt(7), max_new_tokens=limit, ignore_eos=True)
    same_steps(replay(target(), draft, prompt(7), generation.token_ids), generation)


def test_steps_of_a_text_that_ended_by_eos_inside_a_block() -> None:
    draft = oracle([*prompt(7), *plain()], K, lambda _: K)
    inside = 0
    for index in range(1, 30):
        if plain()[index] in plain()[:index]:
            continue
        generation = generate(
            target(), draft, prompt(7), max_new_tokens=60, eos_token_ids={plain()[index]}
        )
        inside += len(generation.steps[-1].emitted) <= K
        same_steps(replay(target(), draft, prompt(7), generation.token_ids), generation)
    assert inside


def test_without_extension_only_given_tokens_count() -> None:
    draft = oracle([*prompt(7), *plain()], K, lambda _: K)
    text = plain()[:8]  # one by the prefill, 5 by a step, 2 by the next
    full = replay(target(), draft, prompt(7), text)
    cut = replay(target(), draft, prompt(7), text, extend=False)
    assert [step.accepted for step in full.steps] == [4, 4]
    assert [step.accepted for step in cut.steps] == [4, 2]


def test_the_first_wrong_token_is_reported() -> None:
    draft = oracle([*prompt(7), *plain()], K, lambda _: 1)
    text = list(plain()[:12])
    text[5] = (text[5] + 1) % VOCAB
    found = replay(target(), draft, prompt(7), text).first_disagreement
    assert found is not None
    assert (found.index, found.given, found.choice) == (5, text[5], plain()[5])
    logits = target().session().forward([*prompt(7), *text[:5]]).logits[-1]
    assert found.gap == pytest.approx(float(logits[plain()[5]] - logits[text[5]]), abs=1e-4)
    assert found.gap > 0


@pytest.mark.parametrize("index", [0, 11])
def test_the_first_and_the_last_token_are_looked_at(index: int) -> None:
    draft = oracle([*prompt(7), *plain()], K, lambda _: 1)
    text = list(plain()[:12])
    text[index] = (text[index] + 1) % VOCAB
    found = replay(target(), draft, prompt(7), text).first_disagreement
    assert found is not None
    assert found.index == index


def test_accepted_tokens_are_those_of_the_text_not_of_the_target() -> None:
    """An engine's tokens are what its drafts were compared with, right or wrong."""
    text = list(plain()[:20])
    text[6] = (text[6] + 1) % VOCAB
    draft = oracle([*prompt(7), *text, *plain()[20:]], K, lambda _: K)
    assert [step.accepted for step in replay(target(), draft, prompt(7), text).steps[:2]] == [4, 4]


@pytest.mark.parametrize("count", [0, 1])
def test_no_step(count: int) -> None:
    draft = oracle([*prompt(7), *plain()], K, lambda _: 1)
    result = replay(target(), draft, prompt(7), plain()[:count])
    assert result.steps == []
    assert result.stats.al is None
    assert result.first_disagreement is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt_ids": []}, UsageError, "prompt has 0 tokens"),
        ({"generated_ids": [VOCAB]}, UsageError, f"generated has {VOCAB}"),
        ({"num_speculative_tokens": 9}, PairMismatchError, r"expected 1\.\.4"),
    ],
)
def test_arguments_out_of_range(change: Any, error: type[Exception], message: str) -> None:
    draft = oracle([*prompt(7), *plain()], K, lambda _: 1)
    given = {"prompt_ids": prompt(7), "generated_ids": [5], **change}
    with pytest.raises(error, match=message):
        replay(target(), draft, **given)
