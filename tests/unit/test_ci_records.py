"""Results as files: what is written can be read back, and what is not one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ci import records, report
from ci.records import CellResult, Verdict
from dflash_plugin.errors import CacheError, UsageError

RESULT = CellResult(
    "vllm-0.32.0/stock/cpu/a",
    "failed",
    "faithful: no",
    lossless=Verdict("passed", "", {"float32": {"prompts": 1}}),
    faithful=Verdict("failed", "no"),
    al=1.5,
    settings={"k": 4},
    raw={"speed": {"levels": []}},
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    records.save_json(path, RESULT.to_json())
    assert CellResult.from_json(records.load_json(path), str(path)) == RESULT
    assert path.read_text().endswith("}\n")


def test_verdicts_not_run_are_the_default() -> None:
    found = CellResult.from_json({"id": "a", "status": "not_run", "reason": ""}, "x")
    assert found.lossless.status == found.faithful.status == found.faster.status == "not_run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, r"unknown \['colour'\]"),
        ({"status": "fine"}, "status is 'fine', expected one of"),
        ({"lossless": {"status": "passed", "extra": 1}}, "lossless: not a verdict"),
        ({"lossless": {"status": "good"}}, "lossless: status is 'good'"),
        ({"lossless": {}}, "lossless: not a verdict"),
        ({"lossless": "passed"}, "lossless: not a verdict"),
    ],
)
def test_what_is_not_a_result(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"^file\.json.*{message}"):
        CellResult.from_json({**RESULT.to_json(), **change}, "file.json")


@pytest.mark.parametrize("data", [{"id": "a"}, {}, [], "passed", 1, None])
def test_something_else_altogether(data: Any) -> None:
    with pytest.raises(UsageError, match=r"^x: not a cell result"):
        CellResult.from_json(data, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "not JSON"),
        ('[{"id": 1', "not JSON"),
        ("{}", "expected a list"),
        ("[1]", "not a cell result"),
    ],
)
def test_bad_report_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        report.read(tmp_path)
    assert str(path) in caught.value.message


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CacheError, match="cannot write"):
        records.save_json(tmp_path / "out" / "report.json", [])


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ("passed passed passed", "passed"),
        ("passed not_run failed", "failed"),
        ("passed not_run passed", "not_run"),
        ("aborted not_run passed", "aborted"),
        ("passed skipped passed", "skipped"),
    ],
)
def test_overall(statuses: str, status: str) -> None:
    names = ("lossless", "faithful", "faster")
    verdicts = {n: Verdict(s, "why") for n, s in zip(names, statuses.split(), strict=True)}
    found, reason = records.overall(verdicts)
    assert found == status
    assert (": why" in reason) == (status != "passed")


def test_result_path_is_one_file_per_cell(tmp_path: Path) -> None:
    path = records.result_path(tmp_path, "vllm-0.32.0/plugin/cpu/qwen3-4b")
    assert path == tmp_path / "vllm-0.32.0" / "plugin.cpu.qwen3-4b.json"


def test_saved_result_keeps_numbers_and_drops_tokens(tmp_path: Path) -> None:
    sequence = {"id": "p", "kind": "chat", "prompt": [1], "generated": [1, 2], "base": [1, 2]}
    raw = {
        "exact": {"stats": {"drafts": 1}, "sequences": [sequence], "blocks": [{"draft": [9]}]},
        "replay": {"stats": {"drafts": 1}, "versions": {"torch": "2"}, "sequences": [1]},
    }
    result = CellResult("e-1/stock/cpu/a", "passed", "", raw=raw)
    (path,) = report.save([result], tmp_path)
    assert json.loads(path.read_text())["raw"] == {
        "exact": {
            "stats": {"drafts": 1},
            "sequences": [{"id": "p", "kind": "chat", "tokens": 2}],
        },
        "replay": {"stats": {"drafts": 1}, "versions": {"torch": "2"}},
    }
