"""Patch sets of a made-up engine: written, checked offline and on sources, compared with newer."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ci import drift, engine_sources, patch_files, patch_lint, patches
from ci.engine_sources import Tree
from dflash_plugin import errors, patchset, shims, support
from dflash_plugin.shims import Shim, fingerprint_of
from dflash_plugin.support import Difference

METHOD = "    def norm(self):\n        return 1\n"
SOURCE = f'''"""A module of an engine."""

FIRST = 1


class Draft:
{METHOD}
    def other(self):
        return 2


def helper():
    return Draft().norm()


LAST = 2
'''
REPAIRS = """
releases = ["1.0.0", "1.1.0"]
updated = 2026-11-22
[[repair]]
shim = "norm"
patch = "repair-norm"
variant = "cpu"
subject = "Repair the norm"
bug = "none known"
upstream = "no"
measured = "seen"
[[repair]]
shim = "helper"
patch = "repair-helper"
variant = "swa"
subject = "Repair the helper"
bug = "none known"
upstream = "no"
measured = "seen"
after = "Draft"
"""


def _shim(name: str, engine: str) -> Shim:
    return Shim(
        name,
        symptom=f"the {name} is wrong",
        mechanism=f"the {name} is replaced",
        removal="when it is right",
        module=f"{engine}.model",
        fingerprints={"Draft.norm": frozenset({fingerprint_of(METHOD)})},
        apply=lambda module: "done",
    )


class World:
    """An engine's releases and a folder of patch sets for them."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder, self.root, self.engine = folder, folder / "patches", engine
        (self.root / engine).mkdir(parents=True)
        (self.root / "README.md").touch()
        self.repairs(REPAIRS)
        for version in ("1.0.0", "1.1.0"):
            self.release(version, SOURCE)

    def repairs(self, text: str) -> None:
        (self.root / self.engine / "repairs.toml").write_text(text)

    def release(self, version: str, source: str) -> Tree:
        site = self.folder / "sources" / f"{self.engine}-{version}"
        (site / self.engine).mkdir(parents=True, exist_ok=True)
        (site / self.engine / "model.py").write_text(source)
        return Tree(version, self.engine, site, None)

    def write(self) -> None:
        assert patches.run(arguments("--write")) == 0

    def set(self, name: str) -> Path:
        return self.root / self.engine / name

    def load(self, variant: str) -> patchset.PatchSet:
        return patchset.load(self.root, self.engine, "1.0.0", variant)

    def patched(self, one: patchset.PatchSet) -> str:
        path = f"{self.engine}/model.py"
        return patches.patched_texts(one, {path: SOURCE})[path]


def arguments(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    patches.add_arguments(parser)
    return parser.parse_args(args)


@pytest.fixture(name="written", scope="module", params=["vllm", "sglang"])
def written_fixture(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[World]:
    """With every set written; in place while the module's tests run."""
    engine: str = request.param
    made = {name: _shim(name, engine) for name in ("norm", "helper")}
    rows = (
        Difference("norm", "1.0.0", "1.1.0", "cpu", "wrong"),
        Difference("helper", "1.0.0", "1.1.0", None, "wrong"),
    )
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(shims, "load", made.__getitem__)
        patching.setattr(shims, "names", {engine: dict.fromkeys(made, "")}.__getitem__)
        patching.setattr(patch_files, "ENGINES", (engine,))
        patching.setattr(support, "differences", {engine: rows}.__getitem__)
        patching.setattr(engine_sources.environment, "built_engine", lambda *_: None)
        world = World(tmp_path_factory.mktemp("written"), engine)
        patching.setattr(patch_files, "ROOT", world.root)
        patching.setenv(engine_sources.VARIABLE, str(world.folder / "sources"))
        world.write()
        yield world


@pytest.fixture(name="world")
def world_fixture(written: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy that a test may change."""
    world = World(tmp_path / "world", written.engine)
    shutil.copytree(written.root, world.root, dirs_exist_ok=True)
    monkeypatch.setattr(patch_files, "ROOT", world.root)
    monkeypatch.setenv(engine_sources.VARIABLE, str(world.folder / "sources"))
    return world


# --- written ---


def test_a_patch_is_one_call_below_what_the_shim_knows(world: World) -> None:
    one = world.load("cpu")
    assert [patch.name for patch in one.patches] == ["repair-norm.patch"]
    assert one.replaces_shims == ("norm",)
    assert one.patches[0].fields["Effect"] == "the norm is wrong. Measured: seen"
    text = world.patched(one)
    added = text.replace("\n\n# Repaired by dflash-plugin: repair-norm.\n", "CALL")
    before, _, after = added.partition("CALL")
    assert before == SOURCE[: SOURCE.index("\n\ndef helper")]
    assert after.startswith(
        'from dflash_plugin.shims import patched  # noqa: E402\n\npatched("norm")\n\n\ndef helper'
    )


def test_the_set_of_all_has_the_order_of_application(world: World) -> None:
    one = world.load("all")
    text = world.patched(one)
    assert text.index('patched("norm")') < text.index('patched("helper")')


def test_writing_again_changes_nothing(world: World) -> None:
    def state() -> dict[Path, str]:
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in world.root.rglob("*.patch")}

    before = state()
    world.write()
    assert state() == before
    assert len(before) == 8


def test_a_definition_that_is_gone_is_told(world: World) -> None:
    world.release("1.0.0", SOURCE.replace("class Draft", "class Plan"))
    with pytest.raises(errors.UsageError, match=r"\.model has no top-level Draft"):
        patches.run(arguments("--write"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('shim = "helper"', 'shim = "norm"', "has a repair already"),
        ('variant = "swa"', 'variant = "sw"', "swa"),
        ("updated = 2026-11-22", "", "updated"),
        (REPAIRS[REPAIRS.rindex("[[repair]]") :], "", "no \\[\\[repair\\]\\] for shim helper"),
    ],
)
def test_bad_repairs(world: World, old: str, new: str, message: str) -> None:
    world.repairs(REPAIRS.replace(old, new))
    with pytest.raises(errors.MatrixError, match=message):
        patch_files.read(world.engine, world.root)


# --- offline ---


def test_all_is_well(world: World) -> None:
    assert patch_lint.problems(world.root) == []


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("1.0.0/cpu/repair-norm.patch", None, "listed in the series, and not there"),
        ("1.0.0/cpu/series", None, "missing: python -m ci patches --write"),
        ("1.0.0/cpu/other.patch", "", "other.patch: not listed in the series"),
        ("1.0.0/notes.txt", "", "notes.txt: in no set"),
        ("1.0.0/all/series", "repair-norm.patch\nrepair-norm.patch\n", "is listed twice"),
        ("1.0.0/core/series", "absent.patch\n", "not asked for by repairs.toml"),
        ("1.0.0/cpu/repair-norm.patch", "From me\n", "expected"),
    ],
)
def test_sets_that_are_not_whole(
    world: World, name: str, change: str | None, expected: str
) -> None:
    path = world.set(name)
    if change is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(change)
    found = patch_lint.problems(world.root)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("Measured: seen", "Measured: never", "not those of repairs.toml"),
        ("Replaces-Shim: norm", "Replaces-Shim: nrom", "replaces shim 'nrom'"),
        ("Replaces-Shim: norm\n", "", "replaces no shim"),
        ("Bug: none known\n", "", "Bug"),
    ],
)
def test_fields(world: World, old: str, new: str, expected: str) -> None:
    path = world.set("1.0.0/cpu/repair-norm.patch")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    found = patch_lint.problems(world.root)
    assert any(expected in line for line in found), found


def test_a_shim_whose_text_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {"norm": _shim("norm", world.engine), "helper": _shim("aide", world.engine)}
    monkeypatch.setattr(shims, "load", changed.__getitem__)
    found = patch_lint.problems(world.root)
    assert len(found) == 4
    assert all("repair-helper.patch: text or fields" in line for line in found)


def test_little_context_and_much_text(world: World) -> None:
    patch = world.load("cpu").patches[0]
    (file,) = patch.files
    hunk = replace(file.hunks[0], lines=file.hunks[0].lines[2:-1])
    (found,) = patch_lint.patch_problems(
        replace(patch, files=(replace(file, hunks=(hunk,)),)), world.engine
    )
    assert "1 and 2 lines of context, expected 3" in found
    long = patch.text.replace("Origin:", "word\n" * 120 + "\nOrigin:")
    (found,) = patch_lint.patch_problems(patchset.parse(long, patch.name), world.engine)
    assert "at most 120" in found


# --- on sources ---


def test_sets_hold_on_their_sources(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert patches.run(arguments("--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["set"] for row in rows] == [
        f"{world.engine}/{version}/{variant}"
        for version in ("1.0.0", "1.1.0")
        for variant in ("all", "cpu", "swa")
    ]
    for row in rows:
        assert row["checks"].pop("imports") == "not_run", "no interpreter has this engine"
        assert set(row["checks"].values()) == {"passed"}


@pytest.mark.parametrize(
    ("source", "failed"),
    [
        (SOURCE.replace("        return 2\n", "        return 3\n"), "applies"),
        (SOURCE.replace("FIRST = 1", "FIRST = 7"), "written"),  # another file, the same lines
        (SOURCE.replace("FIRST = 1", "FIRST = = 1"), "compiles"),
    ],
)
def test_other_sources(
    world: World, source: str, failed: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if failed == "compiles":  # nothing can be rendered from it either
        monkeypatch.setattr(patch_files, "render", lambda *_: {})
    world.release("1.1.0", source)
    capsys.readouterr()
    with pytest.raises(errors.VerdictFailedError, match="1 of 1 failed"):
        patches.run(arguments("--version", "1.1.0", "--variant", "cpu"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "1.1.0/" in line]
    columns = dict(zip(("set", "tree", "patches", *patches.CHECKS), line.split(), strict=True))
    assert columns[failed] == "failed"


def test_nothing_at_hand_is_no_success(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(engine_sources.VARIABLE)
    with pytest.raises(errors.UsageError, match="nothing was checked"):
        patches.run(arguments())
    with pytest.raises(errors.UsageError, match="no such patch set"):
        patches.run(arguments("--version", "7.0"))
    with pytest.raises(errors.UsageError, match="--to is for --drift"):
        patches.run(arguments("--to", "7.0"))
    with pytest.raises(errors.UsageError, match="a release of which engine"):
        patches.run(arguments("--drift", "--to", "7.0"))


# --- on newer releases ---


def _drift(world: World, source: str, *, version: str = "1.1.0") -> drift.Row:
    one = world.load("cpu")
    (row,) = drift.report(one.patches, world.release(version, source), one.id)
    return row


MOVED = SOURCE.replace("FIRST = 1\n", "FIRST = 1\nSECOND = 2\n")


@pytest.mark.parametrize(
    ("source", "status", "work"),
    [
        (SOURCE, drift.APPLIES, False),
        (MOVED, drift.ELSEWHERE, False),
        (SOURCE.replace("        return 2\n", "        return 3\n"), drift.CONFLICTS, False),
        (SOURCE.replace("return 1", "return 4"), drift.APPLIES, True),
        (SOURCE + SOURCE[SOURCE.index("class Draft") :], drift.APPLIES, False),
        (MOVED + SOURCE[SOURCE.index("class Draft") :], drift.CONFLICTS, False),
    ],
)
def test_drift(world: World, source: str, status: str, work: bool) -> None:
    row = _drift(world, source)
    assert (row.status, row.work) == (status, work)
    assert bool(row.hunk) == (status != drift.APPLIES)
    assert bool(row.sources) == work


def test_a_release_that_has_the_text(world: World) -> None:
    one = world.load("cpu")
    text = world.patched(one)
    row = _drift(world, text)
    assert (row.status, row.work) == (drift.UPSTREAMED, True)
    assert "end the shim's range in support.py before 1.1.0" in row.suggestion


def test_a_release_without_the_difference(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Difference("norm", "1.0.0", "1.0.0", "cpu", "wrong"),
        Difference("helper", "1.0.0", "1.1.0", None, "wrong"),
    )
    monkeypatch.setattr(support, "differences", {world.engine: rows}.__getitem__)
    row = _drift(world, SOURCE)
    assert (row.status, row.work) == (drift.UPSTREAMED, False)
    assert "remove it" in row.suggestion


def test_a_release_nobody_knows(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    row = _drift(world, SOURCE, version="1.2.0")
    assert (row.status, row.work) == (drift.APPLIES, True)
    assert "list 1.2.0 in support.py" in row.suggestion
    with pytest.raises(errors.VerdictFailedError, match="4 of 4 patches want a person"):
        patches.run(
            arguments("--drift", "--engine", world.engine, "--to", "1.2.0", "--version", "1.1.0")
        )
    assert "1.1.0/cpu" in capsys.readouterr().out


def test_each_set_is_held_against_the_next_release(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert patches.run(arguments("--drift", "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["set"].split("/")[1], row["release"]) for row in rows} == {("1.0.0", "1.1.0")}
    with pytest.raises(errors.UsageError, match="nothing was compared"):
        patches.run(arguments("--drift", "--version", "1.1.0"))
