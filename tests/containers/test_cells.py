"""Cells of the matrix in images built from this checkout: the same verdicts as in a `venv:`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from container_runs import ROOT, run

from ci import containers, image_build, images
from ci.images import Image
from dflash_plugin import matrix

# Two images of one release: all layers but the last are the same. Then one of another release
# with the same torch, and another engine.
CELLS = [
    "vllm-0.32.0/plugin/cpu/tiny-qwen3",
    "vllm-0.32.0/patched-all/cpu/tiny-qwen3-mixed",
    "vllm-0.30.0/patched-cpu/cpu/tiny-qwen3",
    "sglang-0.5.23/plugin/cpu/tiny-qwen3",
]
ADDED = 5_000_000
"""Bytes that the plugin and a patch set may add to a base."""
ROOM = {"vllm": 6 << 30, "sglang": 12 << 30}
"""Bytes of disk that a build may need: PyPI's torch for SGLang is one for CUDA."""


def image_of(client: Any, cell: str) -> Image:
    """The image of a cell, if it is there or this machine has the room to build it."""
    image = image_build.of_cell(matrix.load().cell(cell))
    there = {tag for found in client.images.list() for tag in found.tags}
    disk = Path(client.info()["DockerRootDir"])
    if image.tag not in there and disk.is_dir():
        free = shutil.disk_usage(disk).free
        if free < ROOM[image.engine]:
            pytest.skip(
                f"not run: {free >> 30} GiB are free on {disk}, building {image.tag} may need "
                f"{ROOM[image.engine] >> 30}"
            )
    return image


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_passes_in_a_container(client: Any, tmp_path: Path, cell: str) -> None:
    image_of(client, cell)
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


@pytest.mark.parametrize("cell", CELLS)
def test_an_image_is_what_its_labels_say(client: Any, cell: str) -> None:
    image = image_of(client, cell)
    found = client.images.get(image.tag)
    assert found.labels["dflash.engine.version"] == image.version
    assert found.labels["dflash.patches.variant"] == image.variant
    assert found.labels["dflash.patches.sha256"] == image.series_sha256
    assert found.labels["dflash.plugin.version"] == images.plugin_version(ROOT)
    assert found.attrs["Config"]["User"] == "2000:0"
    assert found.attrs["Config"]["Healthcheck"]["Test"]

    def inside(*command: str) -> str:
        return containers.output(client, image.tag, *command)

    compilers = "import shutil; print(*filter(shutil.which, ('cc', 'gcc', 'g++', 'clang')))"
    assert inside("-c", compilers).strip() == ""
    assert inside("-c", "import os; print(os.getuid())").strip() == "2000"
    state = inside("-m", "dflash_plugin.cli", "patch", "status")
    assert ("not patched" in state) == (image.variant == images.STOCK), state


@pytest.mark.parametrize("cell", CELLS)
def test_the_plugin_adds_little(client: Any, cell: str) -> None:
    layers = client.images.get(image_of(client, cell).tag).history()
    sizes = [layer["Size"] for layer in layers if "/install.sh" in layer["CreatedBy"]]
    assert len(sizes) == 1
    assert 0 < sizes[0] <= ADDED


def test_the_demo_draft_is_not_in_an_image(client: Any) -> None:
    code = (
        "from dflash_plugin import demo, errors\n"
        "try: demo.packaged_draft()\n"
        "except errors.CheckpointError as err: print(err)"
    )
    said = containers.output(client, image_of(client, CELLS[0]).tag, "-c", code)
    assert "model.safetensors is missing" in said
    assert "container images leave its weights out" in said
