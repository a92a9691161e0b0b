"""Model names: local folders, hub ids, and the library that looks them up."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from dflash_plugin import hub
from dflash_plugin.errors import DownloadError, MissingDependencyError, ModelNotFoundError


@pytest.fixture
def library(monkeypatch):
    """A stand-in for huggingface_hub that notes its calls and answers ``answer``."""
    stub = SimpleNamespace(calls=[], answer="snapshot")

    def snapshot_download(repo, **options):
        stub.calls.append((repo, options))
        if isinstance(stub.answer, BaseException):
            raise stub.answer
        return stub.answer

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return stub


def test_a_folder_is_itself(tmp_path):
    assert hub.local_folder(str(tmp_path)) == tmp_path.resolve()


def test_home_and_relative_paths_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    for name in ("~/org/model", "org/model", "./org/model"):
        assert hub.local_folder(name) == (tmp_path / "org" / "model").resolve()


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "z-lab/Qwen3.6-27B-DFlash", "a/b_c"])
def test_hub_ids_are_not_folders(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.local_folder(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "qwen3",
        "/no/such/folder",
        "./a/b",
        "a/b/c",
        "-a/b",
        "a/b?",
        "~no-such-user-here/x",
        "nul\0byte",
        "x" * 5000,
        "a/" + "b" * 5000,
    ],
)
def test_what_is_neither_is_not_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError) as caught:
        hub.local_folder(name)
    assert "Qwen/Qwen3-8B" in caught.value.hint


def test_a_file_that_looks_like_a_hub_id_is_not_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").touch()
    with pytest.raises(ModelNotFoundError):
        hub.local_folder("org/model")


def test_the_revision_and_the_files_are_passed_on(library):
    assert str(hub.fetch("org/model", "abc", weights=True)) == "snapshot"
    ((repo, options),) = library.calls
    assert (repo, options["revision"]) == ("org/model", "abc")
    assert {"config.json", "*.safetensors"} <= set(options["allow_patterns"])


def test_configs_alone_bring_no_weights(library):
    hub.fetch("org/model", None, weights=False)
    ((_, options),) = library.calls
    assert options["revision"] is None
    assert "*.safetensors" not in options["allow_patterns"]


@pytest.mark.parametrize(
    "answer",
    [
        OSError("no route to host\nsecond line"),
        ValueError("bad repo id"),
        RuntimeError(),
        KeyError("x"),
    ],
)
def test_whatever_the_library_raises_is_a_download_error(library, answer):
    library.answer = answer
    with pytest.raises(
        DownloadError, match="org/model at revision abc: not in the local"
    ) as caught:
        hub.fetch("org/model", "abc", weights=True)
    assert caught.value.exit_code == 15
    assert "\n" not in caught.value.message
    assert caught.value.__cause__ is answer


def test_ctrl_c_is_not_a_download_error(library):
    library.answer = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("org/model", None, weights=True)


def test_without_the_library_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="huggingface_hub") as caught:
        hub.fetch("org/model", None, weights=True)
    assert caught.value.exit_code == 24
    assert "pip install huggingface_hub" in caught.value.hint
