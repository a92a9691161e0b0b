"""A run divided among machines, and its results put together again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ci import __main__ as ci_main
from ci import plan, report
from ci.plan import Shard
from ci.records import CellResult
from dflash_plugin import matrix
from dflash_plugin.errors import UsageError

Captured = pytest.CaptureFixture[str]
CELLS = matrix.load().cells
RELEASES = len(plan.jobs(CELLS))


@given(st.integers(1, RELEASES))
def test_shards_are_a_partition(count: int) -> None:
    shares = [Shard(i, count).of(CELLS) for i in range(1, count + 1)]
    ids = [cell.id for share in shares for cell in share]
    assert sorted(ids) == sorted(cell.id for cell in CELLS)
    for share in shares:
        # In the order of the whole run, and no release in two of them.
        assert share == [cell for cell in CELLS if cell in share]
    assert sum(len(plan.jobs(share)) for share in shares) == RELEASES


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", "1/0", ""])
def test_impossible_shards(text: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        ci_main.main(["plan", f"--shard={text}"])
    assert caught.value.code == 2
    assert "--shard" in capsys.readouterr().err


def test_a_shard_without_cells_is_an_error(capsys: Captured) -> None:
    assert ci_main.main(["plan", "vllm-0.32.0/*", "--shard", "2/2"]) == 2
    err = capsys.readouterr().err
    assert "shard 2/2 has no cells: the chosen ones are of 1 release(s)" in err


def test_plan_json_lists_every_cell_in_one_job(capsys: Captured) -> None:
    assert ci_main.main(["plan", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert sorted(c for job in made["jobs"] for c in job["cells"]) == sorted(made["cells"])
    assert {job["platform"] for job in made["jobs"]} == {"cpu", "cuda"}


def shard(folder: Path, index: int, count: int) -> list[CellResult]:
    """A shard's report in ``folder``, with a result for each of its cells."""
    results = [CellResult(c.id, "passed", "", al=2.0) for c in Shard(index, count).of(CELLS)]
    folder.mkdir()
    report.write(folder, results)
    return results


def test_merged_shards_are_the_whole_run(tmp_path: Path, capsys: Captured) -> None:
    folders = [tmp_path / str(i) for i in (1, 2, 3)]
    for i, folder in enumerate(folders, 1):
        shard(folder, i, 3)
    out = tmp_path / "out"
    merge = ["report", "--merge", *map(str, reversed(folders)), "--out", str(out)]
    assert ci_main.main(merge) == 0
    assert [r.id for r in report.read(out)] == [c.id for c in CELLS]
    assert {r.status for r in report.read(out)} == {"passed"}
    assert (out / "report.md").read_text() == capsys.readouterr().out


def test_a_shard_that_is_not_there_is_not_run(tmp_path: Path) -> None:
    passed = {r.id for r in shard(tmp_path / "1", 1, 2)}
    merged = report.merge([tmp_path / "1"], matrix.load())
    assert len(merged) == len(CELLS)
    for result in merged:
        assert result.status == ("passed" if result.id in passed else "not_run")
        assert result.reason or result.id in passed


def test_the_same_folder_twice_is_harmless_and_two_runs_are_not(tmp_path: Path) -> None:
    results = shard(tmp_path / "1", 1, 2)
    report.merge([tmp_path / "1", tmp_path / "1"], matrix.load())
    (tmp_path / "2").mkdir()
    report.write(tmp_path / "2", [CellResult(results[0].id, "failed", "why")])
    with pytest.raises(UsageError, match=f"{results[0].id} has another result than in"):
        report.merge([tmp_path / "1", tmp_path / "2"], matrix.load())


def test_a_folder_without_a_report(tmp_path: Path, capsys: Captured) -> None:
    assert ci_main.main(["report", "--merge", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert f"{tmp_path / 'report.json'}: no such file" in capsys.readouterr().err
