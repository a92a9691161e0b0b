"""What a support decision is made of."""

from __future__ import annotations

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
