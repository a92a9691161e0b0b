"""``patches/<engine>/<version>/<variant>``: where patch sets are, and how one is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PatchError, PatchVersionError
from .format import Patch, parse

SERIES = "series"
NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*\.patch")
VARIANT = re.compile(r"[a-z][a-z0-9]*")
"""It becomes a part of the version's local label, where `-` and `_` are not kept."""


@dataclass(frozen=True)
class PatchSet:
    """The patches of one variant for one release, in the order of application.

    ``comments``: per patch the `#` lines above it in the series, without the `# `.
    """

    engine: str
    version: str
    variant: str
    patches: tuple[Patch, ...]
    comments: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    @property
    def id(self) -> str:
        """``<engine>/<version>/<variant>``, its folder."""
        return f"{self.engine}/{self.version}/{self.variant}"

    @property
    def sha256(self) -> str:
        """Changes when any patch, its name or the order does."""
        digest = hashlib.sha256()
        for patch in self.patches:
            digest.update(f"{patch.name} {len(patch.text.encode())}\n{patch.text}".encode())
        return digest.hexdigest()

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file it touches, once, sorted."""
        return tuple(sorted({f.path for patch in self.patches for f in patch.files}))

    @property
    def replaces_shims(self) -> tuple[str, ...]:
        """The shims its patches stand for."""
        return tuple(dict.fromkeys(s for patch in self.patches for s in patch.replaces_shims))


def patches_dir() -> Path:
    """The folder with the patch sets: of the installed package, or of the checkout."""
    packaged = Path(__file__).parents[1] / "data" / "patches"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "patches"


def available(root: Path) -> list[tuple[str, str, str]]:
    """Every (engine, version, variant) below ``root`` that has a series file, sorted."""
    found = [path.relative_to(root).parts[:3] for path in root.glob(f"*/*/*/{SERIES}")]
    return sorted((engine, version, variant) for engine, version, variant in found)


def load(root: Path, engine: str, version: str, variant: str) -> PatchSet:
    """Read one patch set.

    Raises:
        PatchVersionError: there is none for that release, or not in that variant.
        PatchError: the series or a patch is missing, unreadable or malformed.
    """
    here = [found for found in available(root) if found[0] == engine]
    if (engine, version, variant) not in here:
        variants = [found[2] for found in here if found[1] == version]
        versions = dict.fromkeys(found[1] for found in here)
        wanted = f"no patch set {variant!r} for {engine} {version}"
        if variants:
            raise PatchVersionError(wanted, hint=f"there are: {', '.join(variants)}")
        known = ", ".join(versions) or "none"
        raise PatchVersionError(wanted, hint=f"releases of {engine} with patch sets: {known}")
    if not VARIANT.fullmatch(variant):
        raise PatchError(f"{engine}/{version}/{variant}: a variant is a word in lower case")
    folder = root / engine / version / variant
    names, comments = _series(folder / SERIES)
    patches = tuple(parse(_text(folder / name), name) for name in names)
    _check_order(patches)
    return PatchSet(engine, version, variant, patches, tuple(comments))


def series_text(names: Sequence[str], comments: Sequence[Sequence[str]]) -> str:
    """The content of a series file."""
    lines = []
    for name, above in zip(names, comments, strict=True):
        lines += [*(f"# {line}" for line in above), name]
    return "".join(f"{line}\n" for line in lines)


def _series(path: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    text = _text(path)
    where = "/".join(path.parts[-4:])
    names: list[str] = []
    comments: list[tuple[str, ...]] = []
    above: list[str] = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if line.startswith("# ") and line == line.strip() and line.isascii():
            above.append(line[2:])
        elif not NAME.fullmatch(line):
            raise PatchError(
                f"{where}:{number}: expected `verb-object.patch` or `# comment`, found {line!r}",
                hint="one name a line, small letters, digits and `-`; comments above a name, ASCII",
            )
        elif line in names:
            raise PatchError(f"{where}:{number}: {line} is listed twice")
        else:
            names.append(line)
            comments.append(tuple(above))
            above = []
    if not names or above or not text.endswith("\n"):
        raise PatchError(f"{where}: expected a patch on the last line, and a newline after it")
    return names, comments


def _text(path: Path) -> str:
    where = "/".join(path.parts[-4:])
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as err:
        raise PatchError(f"{where}: listed in the series, and not there") from err
    except (OSError, UnicodeDecodeError) as err:
        raise PatchError(f"{where}: cannot be read: {err}") from err


def _check_order(patches: Sequence[Patch]) -> None:
    """A file that two patches touch: the second begins where the first ends."""
    state: dict[str, tuple[str, str]] = {}
    for patch in patches:
        for file in patch.files:
            if file.path in state and state[file.path][0] != file.old_blob:
                raise PatchError(
                    f"{patch.name}: {file.path} is not as {state[file.path][1]} leaves it",
                    hint="the order in the series is wrong, or one of the two was edited by hand",
                )
            state[file.path] = (file.new_blob, patch.name)
