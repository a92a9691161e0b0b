"""Small engines to patch: installed, as pip would, and patch sets for them."""

from __future__ import annotations

import difflib
import itertools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dflash_plugin.patchset import blob_id
from dflash_plugin.patchset.distinfo import record_hash
from dflash_plugin.patchset.format import FROM_LINE, NO_BLOB

FIELDS = """Origin: vendor
Bug: none
Forwarded: no
Applied-Upstream: no
Last-Update: 2026-11-22
Removal-Condition: the release has it
Effect: every draft is wrong,
 measured on two pairs"""
ENGINE = {
    "vllm/__init__.py": "__version__ = '0.24.0'\n",
    "vllm/draft.py": "".join(f"line {n}\n" for n in range(30)),
    "vllm/v1/old.py": "only = 1\n",
    "vllm/v1/kept.py": "kept = 1\n",
}
PATCHED = {
    **ENGINE,
    "vllm/draft.py": ENGINE["vllm/draft.py"]
    .replace("line 3\n", "LINE 3\n")
    .replace("line 20\n", ""),
    "vllm/v1/new/file.py": "new = 1\nend = 2",
}
del PATCHED["vllm/v1/old.py"]


def _diff_one(path: str, old: str | None, new: str | None) -> str:
    a, b = (text.split("\n") if text else [] for text in (old, new))
    a, b = ([line + "\n" for line in x[:-1]] + ([x[-1]] if x and x[-1] else []) for x in (a, b))
    ids = [NO_BLOB if text is None else blob_id(text.encode()) for text in (old, new)]
    out = f"diff --git a/{path} b/{path}\n"
    out += "new file mode 100644\n" if old is None else ""
    out += "deleted file mode 100644\n" if new is None else ""
    out += f"index {ids[0]}..{ids[1]}" + ("" if None in (old, new) else " 100644") + "\n"
    lines = list(
        difflib.unified_diff(
            a,
            b,
            "/dev/null" if old is None else f"a/{path}",
            "/dev/null" if new is None else f"b/{path}",
        )
    )
    for line in lines:
        out += line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
    return out


def patch_text(
    old: Mapping[str, str], new: Mapping[str, str], *, subject: str = "Fix it", fields: str = FIELDS
) -> str:
    """A patch file that leads from one set of files to another."""
    paths = [path for path in sorted({*old, *new}) if old.get(path) != new.get(path)]
    diffs = "".join(_diff_one(path, old.get(path), new.get(path)) for path in paths)
    return (
        f"{FROM_LINE}\nFrom: Somebody <some@body.org>\nDate: Sun, 22 Nov 2026 10:00:00 +0000\n"
        f"Subject: [PATCH] {subject}\n\nIt was broken.\n\n{fields}\n---\n\n{diffs}"
    )


def write_set(
    root: Path,
    steps: Sequence[Mapping[str, str]],
    *,
    engine: str = "vllm",
    version: str = "0.24.0",
    variant: str = "swa",
    fields: str = FIELDS,
) -> Path:
    """A patch set that leads from each step to the next; returns its folder."""
    folder = root / engine / version / variant
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, (old, new) in enumerate(itertools.pairwise(steps)):
        names.append(f"fix-it-{number}.patch")
        (folder / names[-1]).write_text(patch_text(old, new, fields=fields), newline="")
    (folder / "series").write_text("".join(f"{name}\n" for name in names))
    return folder


def wheel_files(
    files: Mapping[str, str], name: str = "vllm", version: str = "0.24.0"
) -> dict[str, bytes]:
    """Path -> content of a wheel, RECORD included."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    found = {path: text.encode() for path, text in files.items()}
    found |= {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nVersion: not this\n"
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
        f"{info}/licenses/LICENSE": b"free\n",
    }
    rows = [f"{path},{record_hash(data)},{len(data)}\r\n" for path, data in found.items()]
    found[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\r\n"]).encode()
    return found


def unpack(
    folder: Path, files: Mapping[str, str], name: str = "vllm", version: str = "0.24.0"
) -> Path:
    """An installed engine (or an unpacked wheel: the same) in ``folder``."""
    for path, data in wheel_files(files, name, version).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def write_wheel(
    folder: Path, files: Mapping[str, str], name: str = "vllm", version: str = "0.24.0"
) -> Path:
    """A wheel that pip installs."""
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in wheel_files(files, name, version).items():
            archive.writestr(member, data)
    return path


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below a folder and its content, git's own and byte-code aside."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not {".git", "__pycache__"} & set(path.parts)
    }
