"""What a patched engine says of itself: enough to check and undo it without its patch set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import PatchStateError
from .format import Patch, parse

FORMAT = 1


@dataclass(frozen=True)
class Recorded:
    """How to restore what the installer wrote.

    Attributes:
        folder: the dist-info's name before.
        dropped: (line number, line) of each line of RECORD that was replaced or removed.
    """

    folder: str
    dropped: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class State:
    """The state file.

    Attributes:
        release: the published release that the patches are for.
        base_version, version: as the metadata said before, and say now (a git checkout: the
            release, both times).
        series_sha256: :attr:`PatchSet.sha256` of what was applied.
        files: path -> sha256 before and after; None: no such file.
        patches: (name, text) in the order of application.
        recorded: None for a git checkout.
    """

    engine: str
    release: str
    variant: str
    base_version: str
    version: str
    series_sha256: str
    replaces_shims: tuple[str, ...]
    files: Mapping[str, tuple[str | None, str | None]]
    patches: tuple[tuple[str, str], ...]
    recorded: Recorded | None = None

    def dump(self) -> bytes:
        """The file's content."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode()

    def parsed(self) -> tuple[Patch, ...]:
        """Its patches, read."""
        return tuple(parse(text, name) for name, text in self.patches)


def read_state(path: Path) -> State | None:
    """The state in a file; None: no such file.

    Raises:
        PatchStateError: it is not a state file, or of a newer format.
    """
    try:
        raw = json.loads(path.read_bytes())
        if raw.pop("format") != FORMAT:
            raise ValueError("of another format")
        recorded = raw.pop("recorded")
        if recorded is not None:
            recorded["dropped"] = tuple((int(n), str(line)) for n, line in recorded["dropped"])
            recorded = Recorded(**recorded)
        raw["files"] = {name: (old, new) for name, (old, new) in raw["files"].items()}
        raw["patches"] = tuple((name, text) for name, text in raw["patches"])
        raw["replaces_shims"] = tuple(raw["replaces_shims"])
        return State(**raw, recorded=recorded)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise PatchStateError(
            f"{path}: cannot be read as the state of a patched engine: {err}",
            hint="reinstall the engine, or use the dflash-plugin that has patched it",
        ) from err
