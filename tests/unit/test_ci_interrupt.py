"""Ctrl-C and SIGTERM in every stage: 130, no process left, no half a file, and --resume goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ci_fake import (  # noqa: F401  # fixtures
    ROOT,
    STOCK,
    Fake,
    fake_fixture,
    pythons_fixture,
    wait_for,
)

# `python -m ci` with the fake reference; a first argument "hold" keeps it in the report.
DRIVER = f"""
import signal, sys, time
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import ci_fake
from ci import __main__, environment, report
signal.signal(signal.SIGINT, signal.default_int_handler)
folder, hold, *args = sys.argv[1:]
environment.ensure_reference = lambda: ci_fake.environments(Path(folder), Path("python"))[1]
ci_fake.hurry()

def held(results, markdown=report.markdown):
    Path(folder, "report-hangs").touch()
    time.sleep(600)

if hold == "hold":
    report.markdown = held
sys.exit(__main__.main(args))
"""


@contextmanager
def _driver(fake: Fake, *args: object, hold: str = "go") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", DRIVER, str(fake.folder), hold, *fake.args(*args)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _contains(path: Path, text: str) -> Callable[[], bool]:
    return lambda: path.exists() and text in path.read_text()


def _stage(fake: Fake, name: str) -> tuple[list[dict[str, Any]], Callable[[], bool]]:
    """Faults that make a run stay in that stage, and how to see that it is there."""
    dflash = fake.stage("server-dflash-float32.log")
    hang = {"fault": "hang", "after": 2, "mode": "dflash"}
    if name == "serve":
        return [{"fault": "never_ready"}], _contains(dflash, "serving")
    if name == "check":
        return [{**hang, "dtype": "float32"}], _contains(dflash, "hanging")
    if name == "replay":
        row = {"fault": "hang", "mode": "replay"}
        return [row], (fake.model() / "replay-hangs").exists
    if name == "control":
        log = fake.stage("server-dflash-bfloat16.log")
        return [{**hang, "dtype": "bfloat16"}], _contains(log, "hanging")
    if name == "measure":
        slow = {"fault": "slow", "seconds": 0.05, "mode": "dflash", "dtype": "bfloat16"}
        return [slow], fake.stage("control.json").exists
    return [], (fake.folder / "report-hangs").exists


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("serve", signal.SIGINT),
        ("serve", signal.SIGTERM),
        ("check", signal.SIGINT),
        ("replay", signal.SIGTERM),
        ("control", signal.SIGINT),
        ("measure", signal.SIGTERM),
        ("report", signal.SIGINT),
    ],
)
def test_interrupt(fake: Fake, name: str, number: signal.Signals) -> None:
    rows, reached = _stage(fake, name)
    fake.faults(*rows)
    with _driver(fake, "run", STOCK, hold="hold" if name == "report" else "go") as process:
        wait_for(reached, name)
        process.send_signal(number)  # to it alone, not to its children
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130, stderr
    assert stderr.rstrip().endswith("interrupted")
    assert "Traceback" not in stderr
    assert fake.processes() == []
    documents = {path.name: json.loads(path.read_text()) for path in fake.out.rglob("*.json")}
    assert list(fake.out.rglob("*.tmp")) == []

    # What was finished is kept, and the rest can be made up for.
    fake.faults()
    with _driver(fake, "run", STOCK, "--resume") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    done = {"exact.json", "replay.json", "control.json", "speed.json"} & set(documents)
    assert stderr.count("read back from") == len(done)
    (row,) = fake.report()
    assert row["status"] == "passed"


def test_interrupted_run_leaves_the_old_report(fake: Fake) -> None:
    assert fake.main("check", STOCK) == 0
    old = (fake.out / "report.json").read_bytes()
    fake.faults({"fault": "hang", "after": 2})
    with _driver(fake, "check", STOCK) as process:
        wait_for(_contains(fake.stage("server-base-float32.log"), "hanging"), "a request")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert (fake.out / "report.json").read_bytes() == old


def test_interrupt_of_serve(fake: Fake) -> None:
    with _driver(fake, "serve", STOCK, "--mode", "base") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "serves model 'target'; Ctrl-C stops it" in line
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert fake.processes() == []
