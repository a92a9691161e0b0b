"""Lossless and faithful on made-up data: every rule, and never "passed" for nothing."""

from __future__ import annotations

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from ci import check, judge
from ci.prompts import Prompt
from dflash_plugin.acceptance import AcceptanceStats
from dflash_plugin.backends.server import Completion
from dflash_plugin.matrix import Expected

K = 3


def _step(position: int, draft: list[int], accepted: int, gap: float = 1.0) -> dict[str, Any]:
    return {
        "position": position,
        "known": position + 100,
        "draft": draft,
        "gaps": [gap] * len(draft),
        "accepted": accepted,
    }


STEPS = [
    [_step(4, [1, 2, 3], 3), _step(8, [4, 5, 6], 1)],
    [_step(4, [7, 8, 9], 0), _step(5, [1, 1, 1], 2)],
]


def _replayed() -> dict[str, Any]:
    accepted = [step["accepted"] for steps in STEPS for step in steps]
    stats = AcceptanceStats.from_steps(accepted, K)
    sequences = [{"id": f"p{i}", "steps": copy.deepcopy(s)} for i, s in enumerate(STEPS)]
    return {"al": stats.al, "stats": stats.to_dict(), "sequences": sequences}


def _exact() -> dict[str, Any]:
    """Two prompts, as an engine that does everything right leaves them."""
    blocks = [{k: s[k] for k in ("position", "known", "draft")} for s in chain(*STEPS)]
    sequences = [
        {
            "id": f"p{i}",
            "kind": ("maths", "chat")[i],
            "prompt": [1],
            "base": [5, 6, 7],
            "generated": [5, 6, 7],
            "chunk_sizes": [1, 4, 2] if i == 0 else [1, 1, 3],
            "record_start": 2 * i,
        }
        for i in range(2)
    ]
    return {"sequences": sequences, "blocks": blocks, "stats": _replayed()["stats"]}


def _control(dflash: int = 0, control: int = 0, prompts: int = 8) -> dict[str, Any]:
    def rows(count: int) -> list[dict[str, Any]]:
        return [{"id": str(i), "index": 3, "tokens": [1, 2], "gap": 0.1 * i} for i in range(count)]

    return {
        "prompts": prompts,
        "tokens": 32 * prompts,
        "control_width": K + 1,
        "dflash": rows(dflash),
        "control": rows(control),
    }


# --- lossless ------------------------------------------------------------------------------


def test_lossless_passes() -> None:
    verdict = judge.judge_lossless(_exact(), _control())
    assert (verdict.status, verdict.reason) == ("passed", "")
    assert verdict.evidence["float32"] == {
        "prompts": 2, "equal": 2, "tokens": 6, "different": []
    }  # fmt: skip


@pytest.mark.parametrize(
    ("generated", "index"), [([5, 9, 7], 1), ([5, 6], 2), ([5, 6, 7, 8], 3), ([], 0)]
)
def test_one_other_token_fails(generated: list[int], index: int) -> None:
    exact = _exact()
    exact["sequences"][1]["generated"] = generated
    verdict = judge.judge_lossless(exact, _control())
    assert verdict.status == "failed"
    assert verdict.reason == f"float32: 1 of 2 prompts differ, first p1 at token {index}"


def test_float32_failure_needs_no_control() -> None:
    exact = _exact()
    exact["sequences"][0]["generated"] = [1, 1, 1]
    assert judge.judge_lossless(exact, None).status == "failed"


def test_without_control_not_run() -> None:
    verdict = judge.judge_lossless(_exact(), None)
    assert (verdict.status, verdict.reason) == (
        "not_run", "bfloat16 was not compared with its control"
    )  # fmt: skip


def test_float32_alone_where_the_profile_says_so() -> None:
    verdict = judge.judge_lossless(_exact(), None, float32_only=True)
    assert verdict.status == "passed"
    assert verdict.evidence["bfloat16"] is None
    exact = _exact()
    exact["sequences"][0]["generated"] = [1, 1, 1]
    assert judge.judge_lossless(exact, None, float32_only=True).status == "failed"
    assert judge.judge_lossless({"sequences": []}, None, float32_only=True).status == "not_run"


@pytest.mark.parametrize("names", [["p0", "p1"], ["p1"]])
def test_empty_answers_are_not_equal_answers(names: list[str]) -> None:
    exact = _exact()
    for seq in exact["sequences"]:
        if seq["id"] in names:
            seq["base"] = seq["generated"] = []
    verdict = judge.judge_lossless(exact, _control())
    assert verdict.status == "not_run"
    assert ", ".join(names) in verdict.reason


def test_no_prompts_at_all() -> None:
    empty = {"sequences": [], "blocks": [], "stats": AcceptanceStats(0, (0,) * K).to_dict()}
    nothing = {"al": None, "stats": empty["stats"], "sequences": []}
    assert judge.judge_lossless(empty, _control()).status == "not_run"
    assert judge.judge_faithful(empty, nothing).status == "not_run"


@pytest.mark.parametrize(
    ("dflash", "control", "status"),
    [(0, 0, "passed"), (3, 0, "passed"), (4, 0, "failed"), (8, 7, "passed"), (8, 4, "failed")],
)
def test_bfloat16_against_the_control(dflash: int, control: int, status: str) -> None:
    verdict = judge.judge_lossless(_exact(), _control(dflash, control))
    assert verdict.status == status
    evidence = verdict.evidence["bfloat16"]
    assert (evidence["diverged"], evidence["control_diverged"]) == (dflash, control)
    assert evidence["gaps"]["max"] == (pytest.approx(0.1 * (dflash - 1)) if dflash else None)


@pytest.mark.parametrize("prompts", [0, 1, 3])
def test_too_few_bfloat16_prompts_pass_nothing(prompts: int) -> None:
    """With three prompts not even three divergences would fail."""
    assert judge.judge_lossless(_exact(), _control(prompts=prompts)).status == "not_run"
    assert judge.judge_lossless(_exact(), _control(prompts=4)).status == "passed"


def test_empty_bfloat16_answers_pass_nothing() -> None:
    verdict = judge.judge_lossless(_exact(), {**_control(), "tokens": 0})
    assert (verdict.status, verdict.reason) == (
        "not_run", "bfloat16: 8 prompts, 0 tokens are too few to fail"
    )  # fmt: skip


# --- faithful ------------------------------------------------------------------------------


def test_faithful_passes() -> None:
    verdict = judge.judge_faithful(_exact(), _replayed())
    assert (verdict.status, verdict.reason) == ("passed", "")
    assert verdict.evidence["al"] == 2.5
    assert verdict.evidence["al_by_kind"] == {"maths": 3.0, "chat": 2.0}
    assert verdict.evidence["blocks"] == {
        "steps": 4, "equal": 4, "tie": 0, "different": 0, "missing": 0,
        "recorded": 4, "exceptions": [],
    }  # fmt: skip


@pytest.mark.parametrize(("factor", "status"), [(1.009, "passed"), (1.011, "failed")])
def test_acceptance_length_within_one_percent(factor: float, status: str) -> None:
    for ratio in (factor, 1 / factor):
        replayed = _replayed()
        replayed["al"] *= ratio
        verdict = judge.judge_faithful(_exact(), replayed)
        assert verdict.status == status
        assert ("AL is 2.500" in verdict.reason) == (status == "failed")


def _blocks(change: str) -> tuple[dict[str, Any], dict[str, Any]]:
    exact, replayed = _exact(), _replayed()
    if change == "tie":
        replayed["sequences"][0]["steps"][1]["gaps"] = [1.0, 1.0, judge.TIE_GAP]
    if change in ("tie", "different"):
        exact["blocks"][1]["draft"] = [4, 5, 7]
    elif change == "longer":
        exact["blocks"][1]["draft"] = [4, 5, 6, 7]
    elif change == "no such position":
        exact["blocks"][1]["position"] += 1
    elif change == "other known token":
        exact["blocks"][1]["known"] += 1
    elif change == "another prompt's":
        exact["sequences"][1]["record_start"] = 1
    return exact, replayed


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ("different", "different"),
        ("longer", "different"),
        ("no such position", "missing"),
        ("other known token", "missing"),
        ("another prompt's", "missing"),
        ("tie", "tie"),
    ],
)
def test_one_other_block(change: str, outcome: str) -> None:
    verdict = judge.judge_faithful(*_blocks(change))
    blocks = verdict.evidence["blocks"]
    assert (blocks[outcome], blocks["equal"]) == (1, 3)
    assert verdict.status == ("passed" if outcome == "tie" else "failed")
    (row,) = blocks["exceptions"]  # also what is excused is listed
    assert (row["id"], row["position"], row["outcome"]) == ("p0", 8, outcome)
    assert row["reference"] == [4, 5, 6]


def test_every_token_of_a_block_must_be_excused() -> None:
    exact, replayed = _blocks("tie")
    exact["blocks"][1]["draft"] = [0, 5, 7]  # the first is no tie
    verdict = judge.judge_faithful(exact, replayed)
    assert verdict.status == "failed"
    assert verdict.evidence["blocks"]["exceptions"][0]["gap"] == 1.0


def _tapped(shift: float = 0.0, width: int = 4) -> tuple[dict, dict]:
    exact, replayed = _exact(), _replayed()
    # Two layers of two channels, two tokens.
    values = [[1.0, -1.0, 2.0, 2.0 + shift][:width]] * 2
    exact["taps"] = {"ids": [1, 2], "values": values}
    replayed["taps"] = {"layers": [1, 5], "values": [[1.0, -1.0, 2.0, 2.0]] * 3}
    return exact, replayed


def test_recorded_taps_that_are_the_references() -> None:
    verdict = judge.judge_faithful(*_tapped(1e-5))
    assert verdict.status == "passed"
    assert [row["tap"] for row in verdict.evidence["taps"]] == [1, 5]
    assert verdict.evidence["taps"][1]["distance"] == pytest.approx(5e-6)


@pytest.mark.parametrize("change", [{"shift": 0.5}, {"width": 2}, {"shift": float("nan")}])
def test_recorded_taps_of_another_layer_or_size_fail(change: dict[str, Any]) -> None:
    """Every block and AL as they should be: the taps alone show it."""
    verdict = judge.judge_faithful(*_tapped(**change))
    assert verdict.status == "failed"
    assert "away from the output of layer 5" in verdict.reason


def test_no_recorded_taps_are_no_finding() -> None:
    exact, replayed = _tapped()
    exact["taps"] = None
    verdict = judge.judge_faithful(exact, replayed)
    assert (verdict.status, verdict.evidence["taps"]) == ("passed", [])


def test_no_recorded_block_is_not_run() -> None:
    exact = _exact()
    exact["blocks"] = []
    for seq in exact["sequences"]:
        seq["record_start"] = 0
    verdict = judge.judge_faithful(exact, _replayed())
    assert (verdict.status, verdict.reason) == ("not_run", "no drafted block was recorded")


@pytest.mark.parametrize("side", ["engine", "reference"])
def test_no_drafts_is_not_run(side: str) -> None:
    exact, replayed = _exact(), _replayed()
    if side == "engine":
        exact["stats"] = AcceptanceStats(0, (0,) * K).to_dict()
    else:
        replayed["al"] = None
    verdict = judge.judge_faithful(exact, replayed)
    assert (verdict.status, verdict.reason) == ("not_run", "no drafts were made")


@pytest.mark.parametrize(
    ("prompts", "k", "al", "status"),
    [
        ("maths", K, 3.1, "passed"),  # 3.0 is within 5 % of it
        ("maths", K, 3.2, "failed"),
        ("maths", K + 1, 9.0, "passed"),  # of another K
        ("gsm8k", K, 9.0, "passed"),  # of prompts that were not run
    ],
)
def test_expected_acceptance_length(prompts: str, k: int, al: float, status: str) -> None:
    row = Expected(prompts, k, al, 0.05, "made up")
    verdict = judge.judge_faithful(_exact(), _replayed(), [row])
    assert verdict.status == status
    assert ("AL on maths is 3.0, expected" in verdict.reason) == (status == "failed")


def test_expected_of_a_kind_without_steps_fails() -> None:
    exact = _exact()
    exact["sequences"][0]["chunk_sizes"] = [1]
    row = Expected("maths", K, 2.0, 0.05, "made up")
    assert judge.judge_faithful(exact, _replayed(), [row]).status == "failed"


# --- helpers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "at"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)],
)
def test_first_difference(a: list[int], b: list[int], at: int | None) -> None:
    assert judge.first_difference(a, b) == judge.first_difference(b, a) == at


@pytest.mark.parametrize(
    ("a", "b", "n", "p"),
    [
        (0, 0, 5, 1.0),
        (4, 0, 4, 1 / 70),
        (3, 0, 3, 1 / 20),
        (3, 1, 4, 17 / 70),  # the lady tasting tea
        (0, 4, 4, 1.0),
        (5, 0, 12, 0.018634),  # scipy.stats.fisher_exact([[5, 7], [0, 12]], "greater")
        (12, 12, 12, 1.0),
    ],
)
def test_fisher_one_sided(a: int, b: int, n: int, p: float) -> None:
    assert judge.fisher_one_sided(a, b, n) == pytest.approx(p, rel=1e-4)


def test_acceptance_length_of_chunks() -> None:
    assert judge.al_of_chunks([{"chunk_sizes": [1, 2, 4]}, {"chunk_sizes": [1]}]) == 3.0
    assert judge.al_of_chunks([{"chunk_sizes": [1]}]) is None


# --- running -------------------------------------------------------------------------------


class Client:
    """A server that answers from a table: prompt -> tokens."""

    def __init__(self, answers: dict[str, list[int]], record: Path | None = None) -> None:
        self.answers, self.record, self.asked = answers, record, list[list[int]]()

    def chat_prompt(self, text: str) -> list[int]:
        return [ord(text)]

    def complete(self, prompt: list[int], max_tokens: int) -> Completion:
        if self.record is not None:
            with self.record.open("a") as file:
                file.write('{"position": 1}\n')
        tokens = tuple(self.answers[chr(prompt[0])])
        return Completion(tokens, "length", (len(tokens),), (0.1,))

    def acceptance(self, k: int) -> AcceptanceStats:
        return AcceptanceStats(0, (0,) * k)

    def next_logprobs(self, prompt: list[int]) -> dict[int, float]:
        self.asked.append(prompt)
        return {2: -0.5, 3: -0.75}


PROMPTS = [Prompt(name, "chat", name) for name in "abc"]


def test_run_exact_keeps_where_each_prompt_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "SETTLE", 0)
    answers = {"a": [1], "b": [2], "c": [3]}
    record = tmp_path / "blocks.jsonl"
    raw = check.run_exact(
        Client(answers), Client(answers, record), PROMPTS,  # type: ignore[arg-type]
        max_tokens=4, num_speculative_tokens=K, record=record,
    )  # fmt: skip
    assert [seq["record_start"] for seq in raw["sequences"]] == [0, 1, 2]
    assert len(raw["blocks"]) == 3


def test_recorded_taps_are_those_of_the_prompt(tmp_path: Path) -> None:
    record = tmp_path / "blocks.jsonl"
    assert check._taps(record, [1, 2, 3]) is None
    lines = [{"ids": [0, 0], "values": [[9.0]] * 2}, {"ids": [1, 2], "values": [[1.0]] * 2}]
    (tmp_path / "blocks.jsonl.taps").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert check._taps(record, [1, 2, 3]) == lines[1]
    assert check._taps(record, [2, 1]) is None


def test_run_control_asks_for_the_gap_where_answers_part() -> None:
    base = Client({"a": [1, 2], "b": [1, 2], "c": [1, 2]})
    fast = Client({"a": [1, 2], "b": [1, 3], "c": [1]})
    raw = check.run_control(base, fast, PROMPTS, max_tokens=2, width=2)  # type: ignore[arg-type]
    assert raw["dflash"] == [
        {"id": "b", "index": 1, "tokens": [2, 3], "gap": 0.25},
        {"id": "c", "index": 1, "tokens": [2, None], "gap": None},
    ]
    assert (raw["control"], raw["tokens"]) == ([], 5)
    assert base.asked == [[ord("b"), 1]]
