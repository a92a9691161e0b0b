"""The matrix's cells on the real engine: what is claimed, and that stock differs."""

from __future__ import annotations

import time
from pathlib import Path

from cell_runs import ENGINE, CellRun

from ci import pipeline, plan
from dflash_plugin import matrix, pair


def test_plugin_cell_passes_all_three(plugin_run: CellRun) -> None:
    assert plugin_run.exit_code == 0, plugin_run.output
    result = plugin_run.result
    assert [result[name]["status"] for name in ("lossless", "faithful", "faster")] == ["passed"] * 3
    exact = result["lossless"]["evidence"]["float32"]
    assert exact["equal"] == exact["prompts"] >= 12
    assert exact["tokens"] > 500
    assert result["speedup"] > 1


def test_plugin_drafts_are_the_references_own(plugin_run: CellRun) -> None:
    evidence = plugin_run.result["faithful"]["evidence"]
    blocks = evidence["blocks"]
    assert blocks["equal"] + blocks["tie"] == blocks["steps"] > 100
    assert blocks["tie"] <= blocks["steps"] * 0.005
    assert evidence["drafts"] == evidence["drafts_reference"]
    assert abs(plugin_run.result["al"] / plugin_run.result["al_reference"] - 1) <= 0.01


def test_every_verdict_keeps_its_raw_data(plugin_run: CellRun) -> None:
    raw = plugin_run.result["raw"]
    assert set(raw) == {"exact", "replay", "control", "speed"}
    assert raw["exact"]["sequences"][0]["generated"]
    assert raw["replay"]["sequences"][0]["steps"][0]["draft"]
    assert {level["concurrency"] for level in raw["speed"]["levels"]} == {1, 4}
    assert (plugin_run.out / "report.md").read_text(encoding="utf-8").startswith("# ")


def test_server_says_what_the_plugin_did(plugin_run: CellRun) -> None:
    logs = list(plugin_run.out.glob("cells/**/server-dflash-float32.log"))
    text = logs[0].read_text(encoding="utf-8")
    assert "dflash-plugin: DFlash on vllm 0.32.0 on cpu: shim (" in text
    assert "not applied" not in text


def test_stock_cell_is_lossless_but_not_faithful(stock_run: CellRun) -> None:
    """The text is right and AL within 1 %: only the blocks show what is wrong."""
    assert stock_run.exit_code == 0, stock_run.output  # the matrix knows, with reason and end
    result = stock_run.result
    assert result["lossless"]["status"] == "passed"
    assert result["faithful"]["status"] == "failed"
    blocks = result["faithful"]["evidence"]["blocks"]
    assert blocks["different"] > 0.01 * blocks["steps"]


def test_second_run_starts_serving_within_seconds(plugin_run: CellRun, tmp_path: Path) -> None:
    """Everything before the engine's own start, with environments and models in place."""
    made = plan.make(matrix.load(), [f"{ENGINE}/plugin/cpu/smollm2-135m"], "demo")
    start = time.monotonic()
    run = pipeline.prepare(made.cells[0], made, tmp_path)
    pair.require(pair.preflight(run.target, run.draft, run.num_speculative_tokens))
    run.settings()
    for draft in (False, True):
        run.server(draft, "float32").command(1)
    assert time.monotonic() - start < 5
