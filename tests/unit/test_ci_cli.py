"""What ``python -m ci`` refuses, with which exit code and message, before anything is started."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ci_fake import (  # noqa: F401  # fixtures
    OTHER,
    PLUGIN,
    STOCK,
    Fake,
    fake_fixture,
    make_pair,
    pythons_fixture,
)

from ci import __main__ as ci_main
from ci import environment, report, serve
from ci.records import CellResult
from dflash_plugin import cache

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _nothing_started(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A wrong command is refused before the minutes: no environment is built, no server runs."""

    def never(*_: object, **__: object) -> Any:
        pytest.fail("an environment was built or a server started")

    monkeypatch.setattr(environment, "ensure_engine", never)
    monkeypatch.setattr(environment, "ensure_reference", never)
    monkeypatch.setattr(serve, "serve_all", never)
    yield


# --- plan ----------------------------------------------------------------------------------


def test_plan(fake: Fake, capsys: Captured) -> None:
    assert fake.main("plan") == 0
    cells = capsys.readouterr().out.split()
    assert cells == [STOCK, OTHER, PLUGIN, PLUGIN.replace("alpha", "beta")]
    assert fake.main("plan", "*/plugin/*", PLUGIN) == 0
    assert capsys.readouterr().out.split() == cells[2:]  # in order, and each once


def test_plan_json(fake: Fake, capsys: Captured) -> None:
    assert fake.main("plan", "--json", STOCK) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["cells"] == [STOCK]
    (job,) = made["jobs"]
    assert (job["engine"], job["platform"]) == ("vllm-0.32.0", "cpu")
    assert job["cells"] == [STOCK]
    assert made["profile"]["name"] == "demo"
    assert made["prompts"]["count"] >= 24
    assert made["prompts"]["set"].startswith("packaged@")


# --- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([STOCK.replace("alpha", "alhpa")], 11, ["alhpa", f"did you mean {STOCK}"]),
        (["*/nothing/*"], 11, ["no cell matches '*/nothing/*'", "python -m ci plan"]),
        ([STOCK, "--profile", "dmo"], 11, ["no profile 'dmo'", "did you mean demo"]),
        ([STOCK, "--target", "."], 2, ["--target without --draft"]),
        ([STOCK, "--num-speculative-tokens", "0"], 13, ["num_speculative_tokens is 0"]),
        ([STOCK, "--num-speculative-tokens", "5"], 13, ["is 5, expected 1..4"]),
        ([STOCK, "--draft", "nowhere"], 12, ["nowhere: no such model folder"]),
        ([STOCK, "--env-python", "vllm-0.32.0=nowhere"], 2, ["of an existing interpreter"]),
        ([STOCK, "--env-python", "no-equals-sign"], 2, ["expected ENGINE_ID=PATH"]),
        ([STOCK, "--env-python", "vllm-0.23.0=."], 2, ["no engine", "did you mean vllm-0.32.0"]),
    ],
)
def test_refused(
    fake: Fake, capsys: Captured, args: list[str], code: int, words: list[str]
) -> None:
    assert fake.main("run", *args) == code
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    for word in words:
        assert word in err
    assert not (fake.out / "report.json").exists() or fake.report()[0]["status"] == "aborted"


@pytest.mark.parametrize("port", ["x", "-1", "65536"])
def test_impossible_port(fake: Fake, capsys: Captured, port: str) -> None:
    with pytest.raises(SystemExit) as caught:
        fake.main("run", STOCK, f"--port={port}")
    assert caught.value.code == 2
    assert "--port" in capsys.readouterr().err


def test_serve_takes_one_cell(fake: Fake, capsys: Captured) -> None:
    assert fake.main("serve", "*") == 2
    assert "serve takes one cell, found 4" in capsys.readouterr().err


def test_interpreter_without_the_engine(fake: Fake, capsys: Captured) -> None:
    assert fake.main("run", STOCK, python=Path("/bin/sh")) == 17
    assert "does not run as a Python interpreter" in capsys.readouterr().err
    assert fake.report()[0]["settings"] == {"exit_code": 17}


def test_engine_with_the_plugin_in_a_stock_cell(
    fake: Fake, capsys: Captured, pythons: dict[str, Path]
) -> None:
    assert fake.main("run", STOCK, python=pythons["plugin"]) == 17
    assert "needs vllm-0.32.0 without it" in capsys.readouterr().err


# --- the matrix ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("speed_rounds =", "speed_ronuds =", ["[[profile]]", "missing key 'speed_rounds'"]),
        ("plugin = false", "plugin = false\ncolour = 1", ["[[variant]]", "unknown key 'colour'"]),
        ('pairs = ["alpha"', 'pairs = ["alfa"', ["[[cells]]", "'alfa', which is not defined"]),
        ("schema = 1", "schema = ", ["not valid TOML"]),
    ],
)
def test_bad_matrix(fake: Fake, capsys: Captured, old: str, new: str, words: list[str]) -> None:
    bad = fake.folder / "bad.toml"
    bad.write_text(fake.matrix.read_text().replace(old, new, 1))
    assert ci_main.main(["plan", "--matrix", str(bad)]) == 10
    err = capsys.readouterr().err
    assert all(word in err for word in (str(bad), *words)), err


def test_missing_matrix(fake: Fake, capsys: Captured) -> None:
    assert ci_main.main(["plan", "--matrix", str(fake.folder / "none.toml")]) == 10
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err


# --- prompts -------------------------------------------------------------------------------


def test_missing_prompts_file(fake: Fake, capsys: Captured) -> None:
    assert fake.main("run", STOCK, "--prompts", fake.folder / "none.jsonl") == 2
    assert "none.jsonl: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_malformed_prompts_line(fake: Fake, capsys: Captured) -> None:
    path = fake.folder / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": \n')
    assert fake.main("run", STOCK, "--prompts", path) == 2
    assert f"{path}:2: expected an object" in capsys.readouterr().err


# --- models --------------------------------------------------------------------------------


def _aborted(fake: Fake, code: int, *args: object) -> str:
    assert fake.main("run", STOCK, *args) == code
    (row,) = fake.report()
    assert (row["status"], row["settings"]) == ("aborted", {"exit_code": code})
    reason: str = row["reason"]
    return reason


@pytest.mark.parametrize("half", ["target", "draft"])
def test_missing_model(fake: Fake, half: str) -> None:
    folder = fake.model(half=half)
    shutil.rmtree(folder)
    assert str(folder) in _aborted(fake, 12)


def test_wrong_pair(fake: Fake) -> None:
    make_pair(fake.folder / "gamma", hidden_size=16)
    reason = _aborted(fake, 13, "--draft", fake.folder / "gamma" / "draft")
    assert "hidden_size is 16, but the target's hidden_size is 8" in reason


def test_wrong_reference_draft(fake: Fake) -> None:
    make_pair(fake.folder / "gamma", vocab_size=64)
    reason = _aborted(fake, 13, "--reference-draft", fake.folder / "gamma" / "draft")
    assert "vocab_size is 64" in reason


@pytest.mark.parametrize("half", ["target", "draft"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_corrupted_weights(fake: Fake, half: str, damage: str) -> None:
    path = fake.model(half=half) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-8], "garbage": b"\xff" * 100, "empty": b""}[damage])
    assert "not a complete safetensors file" in _aborted(fake, 14)


# --- a full disk ---------------------------------------------------------------------------

RESULT = CellResult("vllm-0.32.0/stock/cpu/alpha", "not_run", "old")


def test_full_disk(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    report.write(fake.out, [RESULT])
    old = {path.name: path.read_bytes() for path in fake.out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.rmtree(fake.model())  # any end of a cell writes a report
    monkeypatch.setattr(cache.os, "fsync", full)
    assert fake.main("run", STOCK) == 16
    err = capsys.readouterr().err
    assert f"cannot write {fake.out / 'report.json'}: No space left on device" in err
    assert {path.name: path.read_bytes() for path in fake.out.iterdir()} == old


def test_really_full_disk(fake: Fake, capsys: Captured) -> None:
    disk = fake.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        report.write(disk, [RESULT])
        old = (disk / "report.json").read_bytes()
        with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb") as file:
            while True:
                file.write(b"x" * 1024)
                file.flush()
        assert ci_main.main(["report", "--out", str(disk)]) == 16
        assert "No space left on device" in capsys.readouterr().err
        assert (disk / "report.json").read_bytes() == old
        assert list(disk.glob(".*")) == []
        (disk / "filler").unlink()
        assert ci_main.main(["report", "--out", str(disk)]) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_output_folder_is_a_file(fake: Fake, capsys: Captured) -> None:
    fake.out.write_text("")
    assert fake.main("run", STOCK) == 16
    assert "cannot write" in capsys.readouterr().err


# --- report --------------------------------------------------------------------------------


def test_report_of_an_earlier_run(fake: Fake, capsys: Captured) -> None:
    report.write(fake.out, [RESULT])
    (fake.out / "report.md").unlink()
    assert ci_main.main(["report", "--out", str(fake.out)]) == 0
    assert capsys.readouterr().out == (fake.out / "report.md").read_text()


def test_report_without_a_run(fake: Fake, capsys: Captured) -> None:
    assert ci_main.main(["report", "--out", str(fake.folder / "none")]) == 2
    assert "report.json: no such file" in capsys.readouterr().err
