"""What an installer wrote about an engine, kept true while the engine is patched.

A patched engine is release ``0.24.0+dflash.swa`` (``0.24.0+cpu.dflash.swa``) in ``METADATA`` and in
the name of its ``.dist-info`` folder: pip reads the one, uv the other, and a wheel needs both.
``RECORD`` has the hashes of the files as they are, so that uninstalling removes every one of them.
Edits are made to single lines; the rest of both files stays as it is, byte for byte.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engines import DISTRIBUTIONS
from ..errors import EngineNotFoundError, PatchStateError

_VERSION = re.compile(rb"^Version:[ \t]*(\S+)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class DistInfo:
    """An engine's ``.dist-info`` folder in ``root``."""

    root: Path
    folder: str
    distribution: str
    version: str

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.root / self.folder

    def files(self) -> dict[str, bytes]:
        """Path below ``root`` -> content, of all files in it."""
        found = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in found}

    def record(self) -> bytes:
        """``RECORD``; raises ``PatchStateError`` where an installation has none."""
        try:
            return (self.path / "RECORD").read_bytes()
        except FileNotFoundError as err:
            raise PatchStateError(
                f"{self.path}: no RECORD, so nothing says how the engine was installed",
                hint="reinstall it with pip or uv; for a source checkout use --git",
            ) from err


def find(root: Path, engine: str) -> DistInfo:
    """The engine's dist-info in a site-packages folder or an unpacked wheel.

    Raises:
        EngineNotFoundError: there is none.
        PatchStateError: there are several: a broken installation.
    """
    names = [name.replace("-", "_") for name in DISTRIBUTIONS[engine]]
    found = [
        path
        for name in names
        for path in sorted(root.glob(f"{name}-*.dist-info"))
        if (path / "METADATA").is_file()
    ]
    if not found:
        raise EngineNotFoundError(
            f"{root}: no {engine} is installed there",
            hint=f"expected a folder {names[0]}-<version>.dist-info; see --python, --site-packages",
        )
    if len(found) > 1:
        listed = ", ".join(path.name for path in found)
        raise PatchStateError(f"{root}: {len(found)} installations of {engine}: {listed}")
    name = found[0].name.partition("-")[0].replace("_", "-")
    version = _VERSION.search(_head((found[0] / "METADATA").read_bytes()))
    if version is None:
        raise PatchStateError(f"{found[0]}/METADATA: no Version", hint="reinstall the engine")
    return DistInfo(root, found[0].name, name, version[1].decode())


def release(version: str) -> str:
    """The published release a version is of: without its local label."""
    return version.partition("+")[0]


def patched_version(base: str, variant: str) -> str:
    """The version of an engine of version ``base`` with the patches of a variant."""
    return f"{base}{'.' if '+' in base else '+'}dflash.{variant}"


def is_cpu(info: DistInfo) -> bool:
    """Whether it is a CPU build, as its name and version say."""
    return info.distribution.endswith("-cpu") or "cpu" in info.version.partition("+")[2]


def set_version(metadata: bytes, version: str) -> bytes:
    """``METADATA`` with another version."""
    head = _head(metadata)
    match = _VERSION.search(head)
    assert match is not None  # `find` has read it
    return metadata[: match.start(1)] + version.encode() + metadata[match.end(1) :]


def recorded(record: bytes) -> dict[str, str]:
    """Path -> hash as ``RECORD`` writes it (``sha256=…``)."""
    return {row[0]: row[1] for row in csv.reader(_lines(record)) if len(row) > 1}


def record_hash(data: bytes) -> str:
    """A file's hash as ``RECORD`` writes it."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def edit_record(
    record: bytes, contents: Mapping[str, bytes | None], old_folder: str, new_folder: str
) -> tuple[bytes, list[tuple[int, str]]]:
    """``RECORD`` after files have changed and the dist-info folder has another name.

    Args:
        contents: path -> new content; None: it is gone.

    Returns:
        The new file; (number, line) of each line that is not in it any more.
    """
    lines = _lines(record)
    end = _line_end(record)
    kept: list[str] = []
    dropped: list[tuple[int, str]] = []
    left = dict(contents)
    for number, line in enumerate(lines):
        new = _moved(line, old_folder, new_folder)
        path = _path(new)
        if path in left:
            dropped.append((number, line))
            data = left.pop(path)
            if data is not None:
                kept.append(_row(path, data, end))
        else:
            kept.append(new)
    kept += [_row(path, data, end) for path, data in left.items() if data is not None]
    return "".join(kept).encode(), dropped


def restore_record(
    record: bytes,
    dropped: Sequence[tuple[int, str]],
    edited: Sequence[str],
    old_folder: str,
    new_folder: str,
) -> bytes:
    """:func:`edit_record` undone. ``edited``: the paths it was given, below ``new_folder``."""
    own, end = set(edited), _line_end(record)
    lines = [
        _moved(line, new_folder, old_folder) for line in _lines(record) if _path(line) not in own
    ]
    for number, line in sorted(dropped):
        lines.insert(number, line.rstrip("\r\n") + end)
    return "".join(lines).encode()


def _head(metadata: bytes) -> bytes:
    """The header of a ``METADATA``: a description may have lines like it."""
    return re.split(rb"\r?\n\r?\n", metadata, maxsplit=1)[0]


def _lines(record: bytes) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+", record.decode())


def _line_end(record: bytes) -> str:
    return "\r\n" if record.partition(b"\n")[0].endswith(b"\r") else "\n"


def _path(line: str) -> str:
    row = next(csv.reader([line.rstrip("\r\n")]), [])
    return row[0] if row else ""


def _moved(line: str, old: str, new: str) -> str:
    return new + line[len(old) :] if line.startswith(old + "/") else line


def _row(path: str, data: bytes, end: str) -> str:
    return f"{path},{record_hash(data)},{len(data)}{end}"
