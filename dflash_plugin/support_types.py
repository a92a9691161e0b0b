"""What a support decision is made of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How DFlash comes to run, nearest extension point first."""

    NATIVE = "native"
    REGISTERED = "registered"
    SHIM = "shim"
    PATCH = "patch"
    REFUSED = "refused"


@dataclass(frozen=True)
class Support:
    """A decision, its reason, what does not work all the same, and the next step."""

    engine: str
    version: str
    platform: str
    level: Level
    reason: str
    limits: tuple[str, ...] = ()
    next_step: str = ""
    shims: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether `method: dflash` can be used at all."""
        return self.level is not Level.REFUSED

    def line(self) -> str:
        """One line for logs and `doctor`."""
        where = f"{self.engine} {self.version} on {self.platform}"
        return f"DFlash on {where}: {self.level.value} ({self.reason})"


@dataclass(frozen=True)
class Releases:
    """``first`` .. ``last`` and what they have of DFlash; ``limits`` hold with the shims on."""

    first: str
    last: str
    level: Level
    reason: str
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """What one shim bridges, in which releases; ``platform`` None: on all of them."""

    shim: str
    first: str
    last: str
    platform: str | None
    what: str


def decided(
    engine: str,
    version: str,
    platform: str,
    row: Releases,
    needed: Collection[Difference],
    *,
    variant: str | None,
    replaced: Collection[str],
) -> Support:
    """The decision for a release that can be used.

    Args:
        needed: the differences it has on this platform, in the order of application.
        variant, replaced: as ``support.decide`` has them.
    """
    bridged = [d for d in needed if d.shim not in replaced]
    level, parts = row.level, [row.reason]
    if variant is not None:
        level = Level.PATCH
        parts += [f"patched ({variant})" + _what([d for d in needed if d.shim in replaced])]
    if bridged:
        level = Level.SHIM if level is Level.NATIVE else level
        verb = "added" if row.level is Level.REGISTERED else "repaired"
        parts += [verb + _what(bridged)]
    reason = ", ".join(parts) if len(parts) > 1 else f"{row.reason} is used unchanged"
    names = tuple(dict.fromkeys(d.shim for d in bridged))
    return Support(engine, version, platform, level, reason, row.limits, shims=names)


def _what(differences: Collection[Difference]) -> str:
    texts = "; ".join(dict.fromkeys(d.what for d in differences))
    return f": {texts}" if texts else ""
