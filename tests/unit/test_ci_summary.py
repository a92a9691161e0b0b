"""The README's table: one line a release, nothing called passed that was not."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from ci import __main__ as ci_main
from ci import report, summary
from ci.records import CellResult, Verdict
from dflash_plugin import demo, matrix, shims, support

PASSED, FAILED = Verdict("passed"), Verdict("failed", "why")


def result(**verdicts: Verdict) -> CellResult:
    return CellResult("e-1/plugin/cpu/p", "any", "", settings={"k": 1}, **verdicts)


GOOD = result(serves=PASSED, lossless=PASSED, faithful=PASSED)


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([], "–"),
        ([GOOD, GOOD], "2 of 2 lossless and faithful"),
        ([GOOD, result(serves=FAILED)], "1 of 2 lossless and faithful, 1 not served"),
        (
            [result(lossless=FAILED, faithful=FAILED), result(lossless=PASSED, faithful=FAILED)],
            "0 of 2 lossless and faithful, 1 not lossless, 1 not faithful",
        ),
        ([GOOD, result(lossless=PASSED)], "1 of 2 lossless and faithful, 1 not judged"),
        ([CellResult("c", "not_run", "no GPU")], "not run"),
        ([GOOD, CellResult("c", "not_run", "")], "1 of 2 lossless and faithful, 1 not run"),
    ],
)
def test_outcome(results: list[CellResult], text: str) -> None:
    assert summary.outcome(results) == text


def test_every_release_and_platform_has_a_line_oldest_first() -> None:
    data = matrix.load()
    results = [CellResult(cell.id, "not_run", "") for cell in data.cells]
    lines = summary.by_release(results, data)[2:]
    assert len(lines) == len({(cell.engine.id, cell.platform) for cell in data.cells})
    (first, *_) = (line for line in lines if line.startswith("| vllm"))
    assert first.startswith("| vllm 0.18.1 | cpu |")
    assert lines[-1].startswith("| vllm 0.33.0 | cuda |")
    assert all("| not run | not run | – |" in line for line in lines)


def test_patched_cells_have_a_column_of_their_own() -> None:
    data = matrix.load()
    (cell,) = (c for c in data.cells if c.id == "vllm-0.30.0/patched-cpu/cpu/tiny-qwen3")
    results = [CellResult(c.id, "not_run", "") for c in data.cells if c != cell]
    good = CellResult(cell.id, "any", "", serves=PASSED, lossless=PASSED, faithful=PASSED)
    (line,) = (x for x in summary.by_release([*results, good], data) if "| vllm 0.30.0" in x)
    assert line.endswith("| not run | not run | 1 of 1 lossless and faithful | – |")


def test_the_readme_s_table_counts_the_cells_that_a_plan_lists(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ci_main.main(["plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["cells"]
    wanted: Counter[tuple[str, str, str]] = Counter()
    for cell in planned:
        release, variant, platform, _ = cell.split("/")
        wanted[release.replace("-", " ", 1), platform, variant.partition("-")[0]] += 1
    root = Path(__file__).parents[2]
    block = (root / "README.md").read_text().split(report.BEGIN)[1].split(report.END)[0]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines() if line[:1] == "|"][2:]
    assert {(row[0], row[1]) for row in rows} == {key[:2] for key in wanted}
    for release, platform, _, *columns in rows:
        for variant, text in zip(("stock", "plugin", "patched"), columns, strict=False):
            count = wanted[release, platform, variant]
            if (found := re.match(r"\d+ of (\d+) ", text)) is not None:
                assert int(found[1]) == count, (release, platform, variant)
            else:
                assert text == ("not run" if count else "–"), (release, platform, variant)
    page = (root / "docs" / "results" / "README.md").read_text()
    assert set(re.findall(r"^\| `([^`]+)`", page, re.M)) <= set(planned)


def test_every_repair_has_its_place_on_the_page() -> None:
    lines = summary.differences()
    for row in support.differences("vllm"):
        assert f"## {row.shim}" in lines
    assert len([line for line in lines if line.startswith("- It goes ")]) == len(shims.NAMES)


@pytest.mark.parametrize(
    ("pair", "sha256", "marked"),
    [("smollm2-135m", "other", True), ("smollm2-135m", "", False), ("tiny-qwen3", "other", False)],
)
def test_a_result_of_a_draft_that_was_replaced_is_marked(
    tmp_path: Path, pair: str, sha256: str, marked: bool
) -> None:
    today = json.loads((demo.DRAFT / "manifest.json").read_text())
    found = sha256 or today["files"]["model.safetensors"]["sha256"]
    recorded = CellResult(
        f"vllm-0.32.0/plugin/cpu/{pair}", "passed", "", serves=PASSED, lossless=PASSED,
        faithful=PASSED, al=1.5, al_reference=1.5, settings={"draft_sha256": found},
    )  # fmt: skip
    root = tmp_path / "docs" / "results"
    report.save([recorded], root)
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    report.readme(matrix.load(), check=False, path=tmp_path / "README.md", root=root)
    detail = (root / "README.md").read_text()
    mark = " †" if marked else ""
    assert f"| `{recorded.id}` | passed | passed | passed | passed | 1.50 (1.50){mark} |" in detail
    assert ("With an earlier packaged draft" in detail) == marked
