"""Locks: the checked-in ones are clean; what makes one unclean; writing, with a stub for uv."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from ci import lock
from dflash_plugin import matrix
from dflash_plugin.errors import (
    EnvironmentBuildError,
    MissingDependencyError,
    UnknownCellError,
    VerdictFailedError,
)

HASH = "    --hash=sha256:" + "0" * 64
RESOLVED = f"""\
numpy==2.0 ; python_full_version < '3.12' \\
{HASH}
    # via transformers
sympy==1.14.0 ; sys_platform == 'never' \\
{HASH}
    # via torch
transformers==5.19.0 \\
{HASH} \\
    --hash=sha256:{"1" * 64}

# The following packages were excluded from the output:
# torch
"""
# Answers like `uv pip compile … --output-file lock.txt`, and keeps what it was asked.
STUB = """\
#!{python}
import json, pathlib, sys
here = pathlib.Path({folder!r})
asked = {{"argv": sys.argv[1:]}}
for name in ("in.txt", "over.txt", "lock.txt"):
    path = pathlib.Path(name)
    asked[name] = path.read_text() if path.exists() else None
(here / "asked.json").write_text(json.dumps(asked))
if (here / "fail").exists():
    sys.exit((here / "fail").read_text())
pathlib.Path("lock.txt").write_text((here / "answer").read_text())
"""


@pytest.fixture(name="stub")
def _stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stub for uv, which is found; ``answer`` is what it resolves to."""
    program = tmp_path / "uv"
    program.write_text(STUB.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    (tmp_path / "answer").write_text(RESOLVED)
    monkeypatch.setattr(lock, "_uv", lambda: str(program))
    return tmp_path


def _run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    lock.add_arguments(parser)
    return lock.run(parser.parse_args(argv))


def _in(folder: Path) -> lock.Lock:
    return lock.Lock("reference", folder / "reference.txt", ("transformers==5.19.0",), "2.13.0")


# --- what is checked in --------------------------------------------------------------------


def test_checked_in_locks_are_clean() -> None:
    known = lock.known_locks()
    assert "reference" in known
    for made in known.values():
        assert lock.lock_problems(made.path) == []
        text = made.path.read_text()
        assert f"python -m ci lock {made.id}`" in text.splitlines()[0]
        for requirement in made.requirements:
            name = requirement.split("==")[0]
            assert f"\n{requirement} \\" in text or f"\n{name}==" in text
        assert not [name for name in made.left_out if f"\n{name}==" in text]
    assert set(lock.CUDA_ONLY) < set(known["sglang-0.5.23"].left_out)
    assert not set(lock.CUDA_ONLY) & set(known["vllm-0.32.0"].left_out)


def test_no_lock_is_left_that_nothing_names() -> None:
    named = {made.path for made in lock.known_locks().values()}
    assert set(lock.LOCKS.glob("*.txt")) == named


def test_reference_shares_torch_with_an_engine() -> None:
    engines = matrix.load().engines.values()
    assert lock.REFERENCE_TORCH in {b.torch for e in engines for b in e.builds.values()}


# --- the lint ------------------------------------------------------------------------------


def test_lint_accepts(tmp_path: Path) -> None:
    path = tmp_path / "lock.txt"
    path.write_text(f"# why\nuvicorn[standard]==0.30 ; python_version < '4' \\\n{HASH}\n")
    assert lock.lock_problems(path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"a>=1 \\\n{HASH}\n", "not pinned"),
        (f"a==1.* \\\n{HASH}\n", "not pinned"),
        (f"a==1,!=2 \\\n{HASH}\n", "not pinned"),
        (f"a \\\n{HASH}\n", "not pinned"),
        (f"a===1 \\\n{HASH}\n", "not pinned"),
        ("a==1\n", "no sha256 hash"),
        ("a==1 \\\n    --hash=sha256:12\n", "no sha256 hash"),
        ("a==1 \\\n    --hash=md5:" + "0" * 32 + "\n", "no sha256 hash"),
        ("a==1 \\\n    # --hash=sha256:" + "0" * 64 + "\n", "no sha256 hash"),
        (f"torch==2.13.0 \\\n{HASH}\n", "does not belong"),
        (f"Triton==3.0 \\\n{HASH}\n", "does not belong"),
        (f"a @ https://example.invalid/a.whl \\\n{HASH}\n", "address"),
        (f"--index-url https://example.invalid/simple\na==1 \\\n{HASH}\n", "address"),
        (f"--pre\na==1 \\\n{HASH}\n", "'--pre' is not"),
        ("# nothing\n", "no packages"),
    ],
)
def test_lint_refuses(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "lock.txt"
    path.write_text(text)
    problems = lock.lock_problems(path)
    assert any(problem in found for found in problems), problems
    assert all(found.startswith("lock.txt: ") for found in problems)


def test_lint_of_a_missing_file(tmp_path: Path) -> None:
    assert "is missing" in lock.lock_problems(tmp_path / "absent.txt")[0]


# --- writing -------------------------------------------------------------------------------


def test_compiled_text(stub: Path) -> None:
    text = lock.compile_lock(_in(stub))
    head = text.splitlines()[0]
    assert head == "# Written by `python -m ci lock reference` from: transformers==5.19.0"
    assert "# torch 2.13.0 is left out" in text
    assert "triton is left out" in text
    assert "sympy" not in text
    assert "excluded from the output" not in text
    assert text.count("==2.0") == text.count("==5.19.0 \\") == 1
    path = stub / "lock.txt"
    path.write_text(text)
    assert lock.lock_problems(path) == []


def test_what_uv_is_asked(stub: Path) -> None:
    import json

    made = _in(stub)
    made.path.write_text("transformers==5.18.0\n")
    lock.compile_lock(made)
    asked = json.loads((stub / "asked.json").read_text())
    assert asked["in.txt"] == "transformers==5.19.0\n"
    assert asked["lock.txt"] == "transformers==5.18.0\n"  # what is there is preferred
    assert "torch==2.13.0 ; sys_platform == 'never'\n" in asked["over.txt"]
    assert "triton ; sys_platform == 'never'\n" in asked["over.txt"]
    argv = " ".join(asked["argv"])
    for part in ("--universal --generate-hashes --python-version 3.11", "--no-emit-index-url"):
        assert part in argv
    assert "--upgrade" not in argv
    lock.compile_lock(made, upgrade=True)
    assert "--upgrade" in json.loads((stub / "asked.json").read_text())["argv"]


def test_command_line(
    stub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _in(stub)
    monkeypatch.setattr(lock, "known_locks", lambda: {"reference": made})
    with pytest.raises(VerdictFailedError, match=r"reference\.txt"):
        _run("reference", "--check")
    assert not made.path.exists()
    assert _run("reference") == 0
    assert "written, 2 packages" in capsys.readouterr().out
    assert _run("--all", "--check") == 0
    assert "up to date" in capsys.readouterr().out

    before = made.path.read_text()
    (stub / "answer").write_text(RESOLVED.replace("numpy==2.0", "numpy==2.1"))
    with pytest.raises(VerdictFailedError) as caught:
        _run("--all", "--check")
    assert caught.value.hint == "python -m ci lock reference"
    out = capsys.readouterr().out
    assert "-numpy==2.0" in out
    assert "+numpy==2.1" in out
    assert made.path.read_text() == before


def test_unknown_id() -> None:
    with pytest.raises(UnknownCellError, match="'vllm-9'"):
        _run("vllm-9")
    with pytest.raises(UnknownCellError):
        _run()


def test_uv_fails(stub: Path) -> None:
    (stub / "fail").write_text("no such version\n")
    with pytest.raises(EnvironmentBuildError, match="no such version"):
        lock.compile_lock(_in(stub))


def test_no_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingDependencyError) as caught:
        lock.compile_lock(_in(tmp_path))
    assert caught.value.hint == "pip install uv"
