"""Cells of the matrix in images built from this checkout: the same verdicts as in a `venv:`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ci import containers, image_build, images

ROOT = Path(__file__).parents[2]
# Two images of one release: all layers but the last are the same.
CELLS = ["vllm-0.32.0/plugin/cpu/tiny-qwen3", "vllm-0.32.0/patched-all/cpu/tiny-qwen3-mixed"]
TAGS = ["vllm-openai:0.32.0-dflash-stock-cpu", "vllm-openai:0.32.0-dflash-all-cpu"]
ADDED = 5_000_000
"""Bytes that the plugin and a patch set may add to a base."""


def run(out: Path, cell: str, *args: str) -> tuple[int, str, dict[str, Any]]:
    """`python -m ci run` in a container; exit code, output and result."""
    line = [sys.executable, "-m", "ci", "run", cell, "--env", "image", "--profile", "tiny"]
    done = subprocess.run(
        [*line, "--out", str(out), *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (result,) = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return done.returncode, done.stdout + done.stderr, result


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_passes_in_a_container(client: Any, tmp_path: Path, cell: str) -> None:
    code, output, result = run(tmp_path, cell)
    assert code == 0, output
    assert result["environment"]["kind"] == "image"
    assert result["environment"]["packages"]["dflash-plugin"]
    exact = result["lossless"]["evidence"]["float32"]
    assert exact["equal"] == exact["prompts"] >= 12
    blocks = result["faithful"]["evidence"]["blocks"]
    assert blocks["equal"] + blocks["tie"] == blocks["steps"] > 100
    assert abs(result["al"] / result["al_reference"] - 1) <= 0.01
    logs = [path.read_text(encoding="utf-8") for path in tmp_path.glob("cells/**/server-*.log")]
    assert len(logs) == 2


def test_too_little_memory_is_the_outcome_of_the_cell(client: Any, tmp_path: Path) -> None:
    code, _, result = run(tmp_path, CELLS[0], "--memory", "0.25")
    assert code == 62
    assert result["status"] == "aborted"
    assert "out of memory: the container was given 0.2 GiB" in result["reason"]


@pytest.mark.parametrize("tag", TAGS)
def test_an_image_is_what_its_labels_say(client: Any, tag: str) -> None:
    image = image_build.by_tag(tag)
    found = client.images.get(tag)
    assert found.labels["dflash.engine.version"] == image.version
    assert found.labels["dflash.patches.variant"] == image.variant
    assert found.labels["dflash.patches.sha256"] == image.series_sha256
    assert found.labels["dflash.plugin.version"] == images.plugin_version(ROOT)
    assert found.attrs["Config"]["User"] == "2000:0"
    assert found.attrs["Config"]["Healthcheck"]["Test"]

    def inside(*command: str) -> str:
        return containers.output(client, tag, *command)

    compilers = "import shutil; print(*filter(shutil.which, ('cc', 'gcc', 'g++', 'clang')))"
    assert inside("-c", compilers).strip() == ""
    assert inside("-c", "import os; print(os.getuid())").strip() == "2000"
    state = inside("-m", "dflash_plugin.cli", "patch", "status")
    assert ("not patched" in state) == (image.variant == images.STOCK), state


@pytest.mark.parametrize("tag", TAGS)
def test_the_plugin_adds_little(client: Any, tag: str) -> None:
    layers = client.images.get(tag).history()
    sizes = [layer["Size"] for layer in layers if "/install.sh" in layer["CreatedBy"]]
    assert len(sizes) == 1
    assert 0 < sizes[0] <= ADDED


def test_the_demo_draft_is_not_in_an_image(client: Any) -> None:
    code = (
        "from dflash_plugin import demo, errors\n"
        "try: demo.packaged_draft()\n"
        "except errors.CheckpointError as err: print(err)"
    )
    said = containers.output(client, TAGS[0], "-c", code)
    assert "model.safetensors is missing" in said
    assert "container images leave its weights out" in said
