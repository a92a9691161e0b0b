"""Greedy DFlash decoding gives the target's own text, whatever the draft."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from reference_helpers import (  # noqa: E402
    VOCAB,
    StubDraft,
    every_count,
    make_draft,
    make_target,
    oracle,
    prompt,
)

from dflash_plugin.errors import PairMismatchError, UsageError  # noqa: E402
from dflash_plugin.reference.loop import Generation, generate, generate_plain  # noqa: E402
from dflash_plugin.reference.target import HFTarget  # noqa: E402

pytestmark = pytest.mark.torch

SLIDING = "sliding_attention"


@cache
def target(kind: str = "qwen3") -> HFTarget:
    return make_target(kind)


@cache
def plain(length: int = 7, kind: str = "qwen3") -> tuple[int, ...]:
    """The target's own text of 60 tokens after a prompt."""
    text = generate_plain(target(kind), prompt(length), max_new_tokens=60, ignore_eos=True)
    return tuple(text.token_ids)


def check_steps(result: Generation, prompt_length: int, k: int) -> None:
    """What every generation's record must satisfy."""
    emitted, position = result.token_ids[:1], prompt_length
    for step in result.steps:
        assert step.known == emitted[-1]
        assert step.position == position
        assert len(step.draft) == k
        assert step.emitted[: step.accepted] == step.draft[: min(step.accepted, len(step.emitted))]
        emitted += step.emitted
        position += step.accepted + 1
    for step in result.steps[:-1]:
        assert len(step.emitted) == step.accepted + 1
    assert emitted == result.token_ids
    assert result.stats.drafts == len(result.steps)
    assert result.stats.accepted == sum(step.accepted for step in result.steps)
    assert result.stats.num_speculative_tokens == k


def test_the_plain_text_is_not_trivial() -> None:
    assert len(set(plain())) > 10
    assert plain() != plain(8)
    assert plain()[:3] == tuple(
        target().model.generate(
            torch.tensor([prompt(7)]), max_new_tokens=3, do_sample=False, eos_token_id=None
        )[0, 7:]
    )


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_types": [SLIDING, "full_attention"], "sliding_window": 4}],
    ids=["full", "mixed"],
)
@pytest.mark.parametrize("length", [1, 2, 20])
def test_greedy_equals_plain(length: int, changes: dict[str, Any], kind: str, k: int) -> None:
    draft = make_draft(target(kind).embedding, target(kind).head, **changes)
    result = generate(
        target(kind),
        draft,
        prompt(length),
        max_new_tokens=60,
        num_speculative_tokens=k,
        ignore_eos=True,
    )
    assert tuple(result.token_ids) == plain(length, kind)
    assert result.finish_reason == "length"
    check_steps(result, length, k)


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("pattern", ["right", "wrong", "every count"])
def test_oracle_drafts(pattern: str, k: int) -> None:
    counts = {
        "right": lambda _: k,
        "wrong": lambda _: 0,
        "every count": every_count(7, k).__getitem__,
    }[pattern]
    text = generate_plain(target(), prompt(7), max_new_tokens=60 + k, ignore_eos=True).token_ids
    draft = oracle([*prompt(7), *text], k, counts)
    result = generate(target(), draft, prompt(7), max_new_tokens=60, ignore_eos=True)
    assert tuple(result.token_ids) == plain()
    assert [s.accepted for s in result.steps] == [counts(s.position) for s in result.steps]
    check_steps(result, 7, k)
    if pattern == "every count":
        assert {s.accepted for s in result.steps} == set(range(k + 1))
    assert result.stats.al == {"right": k + 1, "wrong": 1}.get(pattern, result.stats.al)


@pytest.mark.parametrize("accepted", range(5))
@pytest.mark.parametrize("limit", range(12))
def test_length_is_exact(limit: int, accepted: int) -> None:
    draft = oracle([*prompt(7), *plain()], 4, lambda _: accepted)
    result = generate(target(), draft, prompt(7), max_new_tokens=limit, ignore_eos=True)
    assert tuple(result.token_ids) == plain()[:limit]
    assert result.finish_reason == "length"
    assert len(result.steps) == max(0, -(-(limit - 1) // (accepted + 1)))
    # The last step counts in full, as engines count it.
    assert all(step.accepted == accepted for step in result.steps)


def test_eos_stops_exactly_wherever_it_is_in_a_block() -> None:
    text, seen = plain(), set()
    for k, accepted in ((4, 4), (4, 2), (1, 1), (1, 0)):
        for index, token in enumerate(text[:24]):
            if token in text[:index]:
                continue
            result = generate(
                target(),
                oracle([*prompt(7), *text], k, lambda _, n=accepted: n),
                prompt(7),
                max_new_tokens=50,
                eos_token_ids={token, VOCAB + 1},
            )
            assert tuple(result.token_ids) == text[: index + 1]
            assert result.finish_reason == "stop"
            check_steps(result, 7, k)
            if result.steps:
                assert result.steps[-1].accepted == accepted
                seen.add((k, accepted, len(result.steps[-1].emitted) - 1))
    assert seen >= {(4, 4, i) for i in range(5)} | {(4, 2, i) for i in range(3)}


def test_the_targets_own_eos_and_ignoring_it() -> None:
    text = plain()
    token = next(t for i, t in enumerate(text) if i > 5 and t not in text[:i])
    draft = oracle([*prompt(7), *text], 4, lambda _: 3)
    eos, target().model.generation_config.eos_token_id = (
        target().model.generation_config.eos_token_id,
        [token],
    )
    try:
        stopped = generate(target(), draft, prompt(7), max_new_tokens=40)
        both = generate_plain(target(), prompt(7), max_new_tokens=40)
        ignored = generate(target(), draft, prompt(7), max_new_tokens=40, ignore_eos=True)
    finally:
        target().model.generation_config.eos_token_id = eos
    assert tuple(stopped.token_ids) == text[: text.index(token) + 1] == tuple(both.token_ids)
    assert stopped.finish_reason == both.finish_reason == "stop"
    assert tuple(ignored.token_ids) == text[:40]


def test_eos_at_the_limit_is_a_stop() -> None:
    draft = oracle([*prompt(7), *plain()], 4, lambda _: 4)
    result = generate(target(), draft, prompt(7), max_new_tokens=1, eos_token_ids={plain()[0]})
    assert (result.token_ids, result.finish_reason) == ([plain()[0]], "stop")
    assert result.steps == []
    assert result.stats.al is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "prompt_ids has 0 tokens"),
        ({"prompt_ids": [3, VOCAB]}, f"prompt_ids has {VOCAB}"),
        ({"prompt_ids": [-1]}, "prompt_ids has -1"),
        ({"prompt_ids": [True]}, "prompt_ids has True"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    draft = StubDraft(4, lambda *_: torch.zeros(4, VOCAB))
    given = {"prompt_ids": prompt(3), "max_new_tokens": 4, **arguments}
    with pytest.raises(UsageError, match=message):
        generate(target(), draft, given.pop("prompt_ids"), **given)


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k: int) -> None:
    draft = StubDraft(4, lambda *_: torch.zeros(4, VOCAB))
    with pytest.raises(PairMismatchError, match=r"expected 1\.\.4"):
        generate(target(), draft, prompt(3), max_new_tokens=4, num_speculative_tokens=k)
