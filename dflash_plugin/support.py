"""(engine, version, platform) -> how DFlash gets to run there, and why.

The one place that decides. Engines nobody has looked at are refused politely:
they run as if this package were not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from packaging.version import Version


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


_KNOWN_GOOD = "use vLLM 0.31.0 to 0.33.0"
_MIXED_SWA = "drafts that mix sliding-window and full layers need the V2 model runner"
_GEMMA4 = (
    "Gemma 4 targets: the draft's input-embedding scale is not applied, which lowers acceptance"
)


@dataclass(frozen=True)
class _Row:
    """Releases ``first`` .. ``last`` on one platform (None: on every other)."""

    first: str
    last: str
    platform: str | None
    level: Level
    reason: str
    limits: tuple[str, ...] = ()
    shims: tuple[str, ...] = ()


# Releases looked at; the first row that fits decides.
# Sources: the releases' own source, and runs recorded in docs/results/.
_VLLM = (
    _Row("0.0", "0.19.1", None, Level.REFUSED, "the release has no dflash method"),
    _Row(
        "0.20.0",
        "0.22.1",
        None,
        Level.REFUSED,
        "the release taps the wrong target layers or looks ahead one token short, silently",
    ),
    _Row("0.23.0", "0.24.0", "cpu", Level.REFUSED, "the release's dflash crashes on the CPU"),
    _Row(
        "0.23.0",
        "0.25.1",
        None,
        Level.REFUSED,
        "the release ignores sliding windows in drafts, or their causality, silently",
    ),
    _Row("0.30.0", "0.30.0", "cpu", Level.REFUSED, "the release's dflash crashes on the CPU"),
    _Row(
        "0.26.0",
        "0.30.0",
        None,
        Level.REFUSED,
        "the release has dflash, but this version of dflash-plugin has no recorded run of it",
    ),
    _Row(
        "0.31.0",
        "0.33.0",
        "cpu",
        Level.SHIM,
        "the release's own dflash, repaired: its CPU kernels normalise the context keys of all "
        "draft layers with the first layer's weight",
        (_MIXED_SWA + ", which the CPU build lacks", _GEMMA4),
        ("context-k-norm",),
    ),
    _Row(
        "0.31.0",
        "0.33.0",
        None,
        Level.NATIVE,
        "the release's own dflash is used unchanged",
        (_MIXED_SWA, _GEMMA4),
    ),
)


def decide(engine: str, version: str, platform: str) -> Support:
    """The support decision for an installed engine; never raises.

    Args:
        engine: ``vllm`` or ``sglang``.
        version: as its metadata says, local part allowed.
        platform: ``cpu``, ``cuda``, ``rocm``, ``xpu`` or ``unknown``.
    """

    def refused(reason: str, next_step: str) -> Support:
        return Support(engine, version, platform, Level.REFUSED, reason, next_step=next_step)

    if engine != "vllm":
        return refused(
            f"this version of dflash-plugin does nothing on {engine}; the engine runs as published",
            "see the support table in the README for what is covered",
        )
    try:
        parsed = Version(version)
    except ValueError:  # InvalidVersion, or more digits than Python converts
        return refused(f"{version!r} is not a version number", "install a published release")
    base = Version(parsed.base_version if not parsed.is_postrelease else parsed.public)
    newest = max(Version(row.last) for row in _VLLM)
    if parsed.is_prerelease or base > newest:
        return refused(
            f"not known to this version of dflash-plugin (newest known release: {newest}); "
            "the engine runs as published",
            "use a known release, or update dflash-plugin",
        )
    for row in _VLLM:
        fits = Version(row.first) <= base <= Version(row.last)
        if fits and row.platform in (None, platform):
            step = _KNOWN_GOOD if row.level is Level.REFUSED else ""
            return Support(
                engine, version, platform, row.level, row.reason, row.limits, step, row.shims
            )
    return refused(
        "not a release this version of dflash-plugin knows; the engine runs as published",
        _KNOWN_GOOD,
    )
