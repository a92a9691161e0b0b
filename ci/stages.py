"""Raw data of stages, kept as they finish and read back where it is still good."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .records import load_json, save_json


class Stages:
    """Runs a cell's stages and keeps their raw data, or reads it back.

    ``facts``: everything the data depends on, JSON-ready.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.facts, self.resume = folder, facts, resume

    def done(self, name: str) -> bool:
        """Whether :meth:`__call__` would only read it back."""
        return self.resume and _Kept(self._path(name), [self.facts, None]).read() is not None

    def __call__(
        self, name: str, produce: Callable[[], dict[str, Any]], *, after: object = None
    ) -> dict[str, Any]:
        """The stage's data; ``after`` is that of the stage it builds on."""
        kept = _Kept(self._path(name), [self.facts, after])
        data = kept.read() if self.resume else None
        if data is not None:
            print(f"{name}: read back from {kept.path}", file=sys.stderr, flush=True)
            return data
        data = produce()
        kept.keep(data)
        return data

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class _Kept:
    """Data in a file, with a hash of the facts it depends on."""

    def __init__(self, path: Path, facts: object) -> None:
        self.path, self.key = path, _key(facts)

    def read(self) -> dict[str, Any] | None:
        """The data, if it is there and depends on the same facts."""
        if not self.path.exists():
            return None
        found = load_json(self.path)
        if not isinstance(found, dict) or found.get("key") != self.key:
            return None
        data: dict[str, Any] | None = found.get("data")
        return data

    def keep(self, data: Mapping[str, Any]) -> None:
        """Write it, atomically."""
        save_json(self.path, {"key": self.key, "data": data})


class Shared(_Kept):
    """Data that several cells of one run have in common: a file for each set of facts."""

    def __init__(self, folder: Path, name: str, facts: object) -> None:
        super().__init__(folder / f"{name}-{_key(facts)[:16]}.json", facts)


def _key(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
