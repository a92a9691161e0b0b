"""The data that flows between stages, and the one JSON file per cell they end in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dflash_plugin.cache import atomic_write_text
from dflash_plugin.errors import UsageError
from dflash_plugin.matrix import SERVES, VERDICTS

PASSED, FAILED, SKIPPED, ABORTED, NOT_RUN = "passed", "failed", "skipped", "aborted", "not_run"
STATUSES = (PASSED, FAILED, SKIPPED, ABORTED, NOT_RUN)


@dataclass(frozen=True)
class Verdict:
    """One of the three tests: its status, why, and the numbers it rests on."""

    status: str
    reason: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


UNTESTED = Verdict(NOT_RUN, "the stage was not run")


@dataclass(frozen=True)
class CellResult:
    """What one run of one cell found; every number keeps its settings and raw data.

    ``serves``: the engine starts with the draft and answers; the three verdicts need it.
    """

    id: str
    status: str
    reason: str
    serves: Verdict = UNTESTED
    lossless: Verdict = UNTESTED
    faithful: Verdict = UNTESTED
    faster: Verdict = UNTESTED
    al: float | None = None
    al_reference: float | None = None
    speedup: float | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> CellResult:
        """Read one back; ``UsageError`` names ``source`` and the field that is off."""
        if not isinstance(data, Mapping):
            raise UsageError(f"{source}: not a cell result but {str(data)[:60]!r}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        missing = sorted({"id", "status", "reason"} - set(data))
        if unknown or missing:
            raise UsageError(
                f"{source}: not a cell result (unknown {unknown}, missing {missing})",
                hint="delete it and run the cell again",
            )
        if data["status"] not in STATUSES:
            raise UsageError(f"{source}: status is {data['status']!r}, expected one of {STATUSES}")
        values = dict(data)
        for name in (SERVES, *VERDICTS):
            if name in values:
                values[name] = _verdict(values[name], f"{source}: {name}")
        return cls(**values)


def _verdict(data: Any, source: str) -> Verdict:
    names = {f.name for f in fields(Verdict)}
    if not isinstance(data, Mapping) or not set(data) <= names or "status" not in data:
        raise UsageError(f"{source}: not a verdict: {str(data)[:60]!r}")
    if data["status"] not in STATUSES:
        raise UsageError(f"{source}: status is {data['status']!r}, expected one of {STATUSES}")
    return Verdict(**data)


def overall(verdicts: Mapping[str, Verdict]) -> tuple[str, str]:
    """A cell's status and reason from its three verdicts: all must have passed."""
    for status in (FAILED, ABORTED, NOT_RUN, SKIPPED):
        named = [f"{name}: {v.reason}" for name, v in verdicts.items() if v.status == status]
        if named:
            return status, "; ".join(named)
    return PASSED, ""


def save_json(path: Path, data: Any) -> None:
    """Write JSON atomically; readers see the old file or the new one, never a half."""
    atomic_write_text(path, json.dumps(data, indent=1) + "\n")


def load_json(path: Path) -> Any:
    """Read JSON; ``UsageError`` names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise UsageError(f"{path}: no such file", hint="run the stage that writes it") from err
    except ValueError as err:
        raise UsageError(f"{path}: not JSON ({err})", hint="delete it and run again") from err


def result_path(root: Path, cell_id: str, *, image: bool = False) -> Path:
    """``<root>/<engine>-<version>/<variant>.<platform>.<pair>.json``; ``….image.json`` in one."""
    engine, rest = cell_id.split("/", 1)
    return root / engine / (rest.replace("/", ".") + (".image.json" if image else ".json"))
