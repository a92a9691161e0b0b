"""What was measured, written as it is measured: one JSON line a request, nothing rewritten.

A run's folder holds ``run.json`` (what decides the numbers), ``records.jsonl`` (here) and
the reports. A line is either a request's (``type`` ``request``) or the end of a pass
(``type`` ``pass``: its wall time and acceptance counters). A pass is one arm with one data
set at one level in one round; what interrupted it leaves further *segments* to do.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..cache import atomic_write_text, make_dir
from ..errors import UsageError, from_os_error

# Why a request failed: `http_<status>`, or one of these.
REFUSED = "refused"
"""No connection was to be had."""
CUT_OFF = "cut_off"
"""The connection or the stream ended before the answer did."""
TIMEOUT = "timeout"
MALFORMED = "malformed"
SERVER_ERROR = "server_error"
"""The stream itself told of an error."""
EMPTY = "empty"
"""A complete answer without a token."""
INTERRUPTED = "interrupted"
LOST = (REFUSED, CUT_OFF, INTERRUPTED)
"""Errors that say nothing about the request: it is made again when the run is resumed."""


_MAY_CHANGE = {"levels", "rounds", "arms", "not_run", "began"}


@dataclass(frozen=True)
class Level:
    """Load: so many requests at a time, or so many a second at random (Poisson)."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"c{self.concurrency}" if self.concurrency is not None else f"r{self.rate:g}"

    @classmethod
    def parse(cls, text: str) -> Level:
        """The inverse of ``str``."""
        if text.startswith("c"):
            return cls(concurrency=int(text[1:]))
        return cls(rate=float(text[1:]))


@dataclass(frozen=True)
class Pass:
    """One arm, one data set, one level, one round."""

    dataset: str
    level: str
    round: int
    arm: str


class Store:
    """A run's folder.

    Raises:
        UsageError: the folder holds another run, or one that was not to be resumed.
        CacheError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        """Open or begin a run; ``settings`` are what decides its numbers."""
        self.folder, self.settings = folder, dict(settings)
        self.path = make_dir(folder) / "records.jsonl"
        self.lines = read(self.path)
        if self.lines and not resume:
            raise UsageError(
                f"{self.path}: holds {len(self.lines)} records of an earlier run",
                hint="continue it with --resume, or choose another --out",
            )
        if self.lines:
            before = load_run(folder)
            self._require_same(before)
            for key in ("began", "not_run"):
                if key in before:
                    self.settings.setdefault(key, before[key])
        self._file: TextIO | None = None
        self.update({})

    def _require_same(self, before: Mapping[str, Any]) -> None:
        """Levels, rounds and arms may be added to; the rest decides what is compared."""
        for key in sorted({*before, *self.settings} - _MAY_CHANGE):
            old, new = before.get(key), self.settings.get(key)
            if old != new:
                raise UsageError(
                    f"{self.folder}: its {key} was {old!r}, now it is {new!r}",
                    hint="give the same options, or choose another --out",
                )
        arms = {arm["name"]: arm for arm in before.get("arms", [])}
        for arm in self.settings.get("arms", []):
            old = arms.pop(arm["name"], arm)
            if old != arm:
                raise UsageError(
                    f"{self.folder}: arm {arm['name']!r} was {old!r}, now it is {arm!r}",
                    hint="give the same options, or choose another --out",
                )
        self.settings["arms"] = [*self.settings.get("arms", []), *arms.values()]

    def update(self, values: Mapping[str, Any]) -> None:
        """Write ``run.json``, with these settings changed."""
        self.settings.update(values)
        text = json.dumps(self.settings, indent=1, ensure_ascii=False)
        atomic_write_text(self.folder / "run.json", text + "\n")

    def done(self, key: Pass) -> set[str]:
        """Ids of the prompts of a pass that need not be asked again."""
        return {
            line["id"]
            for line in self.lines
            if line["type"] == "request"
            and _is(line, key)
            and line["last"]
            and line["error"] not in LOST
        }

    def segment(self) -> str:
        """A name for the part of a pass that begins now."""
        return secrets.token_hex(4)

    def append(self, kind: str, key: Pass, values: Mapping[str, Any]) -> None:
        """Add one line; what is written survives the end of this process."""
        line = {"type": kind, **asdict(key), **values}
        self.lines.append(line)
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as err:
            raise from_os_error(err, str(self.path)) from err

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def load_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a folder.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = folder / "run.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UsageError(
            f"{path}: not a benchmark's run ({err})", hint="name the folder given as --out"
        ) from err
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected an object", hint="name the folder given as --out")
    return data


def read(path: Path) -> list[dict[str, Any]]:
    """Every line of ``records.jsonl``; none where there is no file.

    What a killed process wrote of its last line is cut off, and only that.

    Raises:
        UsageError: any other line is damaged.
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    whole, newline, rest = text.rpartition(b"\n")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
    lines = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            record = json.loads(line)
            Pass(record["dataset"], record["level"], record["round"], record["arm"])
            record["type"]
        except (ValueError, KeyError, TypeError) as err:
            raise UsageError(
                f"{path}:{number}: damaged ({type(err).__name__})",
                hint="remove the line to go on without it",
            ) from err
        lines.append(record)
    return lines


def passes(lines: Iterable[Mapping[str, Any]]) -> dict[Pass, list[Mapping[str, Any]]]:
    """The lines of each pass, in order."""
    found: dict[Pass, list[Mapping[str, Any]]] = {}
    for line in lines:
        key = Pass(line["dataset"], line["level"], line["round"], line["arm"])
        found.setdefault(key, []).append(line)
    return found


def _is(line: Mapping[str, Any], key: Pass) -> bool:
    return all(line[name] == value for name, value in asdict(key).items())
