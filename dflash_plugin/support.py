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


_MIXED_SWA = "drafts that mix sliding-window and full layers need the V2 model runner"
_GEMMA4 = (
    "Gemma 4 targets: the draft's input-embedding scale is not applied, which lowers acceptance"
)

_WHOLE_KV = (
    "sliding-window layers of drafts keep the keys of the whole sequence: right, and more KV "
    "memory than their window needs"
)


@dataclass(frozen=True)
class _Releases:
    """``first`` .. ``last`` and what they have of DFlash; ``limits`` hold with the shims on."""

    first: str
    last: str
    level: Level
    reason: str
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Difference:
    """What one shim bridges, in which releases; ``platform`` None: on all of them."""

    shim: str
    first: str
    last: str
    platform: str | None
    what: str


_OWN = "the release's own dflash"
_BETWEEN = _Releases(
    "0",
    "0",
    Level.REFUSED,
    "not a release this version of dflash-plugin knows; the engine runs as published",
)

# Releases looked at, oldest first. SHIM is not written here: it is NATIVE with a difference.
# Sources: the releases' own source, and runs recorded in docs/results/.
_VLLM = (
    _Releases("0.0", "0.18.0", Level.REFUSED, "the release has no dflash method"),
    _Releases("0.18.1", "0.19.1", Level.REFUSED, "the release has no dflash method"),
    _Releases(
        "0.20.0",
        "0.24.0",
        Level.NATIVE,
        _OWN,
        (_WHOLE_KV,),
    ),
    _Releases(
        "0.25.0",
        "0.30.0",
        Level.REFUSED,
        "the release has dflash, but this version of dflash-plugin has no recorded run of it",
    ),
    _Releases("0.31.0", "0.33.0", Level.NATIVE, _OWN, (_MIXED_SWA, _GEMMA4)),
)

# One line per shim and range of releases, in the order in which they are applied.
_VLLM_DIFFERENCES = (
    _Difference(
        "tap-offset",
        "0.20.0",
        "0.21.0",
        None,
        "a draft's features come from the layers below those it names",
    ),
    _Difference(
        "draft-lookahead",
        "0.20.0",
        "0.22.1",
        None,
        "the scheduler reserves one KV slot too few for a draft",
    ),
    _Difference(
        "draft-context-end",
        "0.20.0",
        "0.22.1",
        None,
        "the last draft reaches past the end of the context",
    ),
    _Difference(
        "draft-windows",
        "0.20.0",
        "0.24.0",
        None,
        "sliding windows of drafts are ignored, silently",
    ),
    _Difference(
        "draft-windows-v2",
        "0.24.0",
        "0.24.0",
        None,
        "sliding windows of drafts are ignored, silently",
    ),
    _Difference(
        "draft-scaling",
        "0.20.0",
        "0.24.0",
        None,
        "a draft's embedding scale and logit soft cap are ignored",
    ),
    _Difference(
        "cpu-taps",
        "0.20.0",
        "0.21.0",
        "cpu",
        "the CPU never asks the target for a draft's features, and dies",
    ),
    _Difference(
        "cpu-packed-qkv",
        "0.20.0",
        "0.24.0",
        "cpu",
        "the draft's attention reads a weight that the CPU has packed away, and dies",
    ),
    _Difference(
        "cpu-dflash-inputs",
        "0.20.0",
        "0.24.0",
        "cpu",
        "the CPU has no kernel for the draft's inputs, and dies",
    ),
    _Difference(
        "cpu-sampler-arguments",
        "0.20.0",
        "0.20.2",
        "cpu",
        "the CPU's rejection sampler refuses its own arguments",
    ),
    _Difference(
        "cpu-sampler-arguments",
        "0.23.0",
        "0.24.0",
        "cpu",
        "the CPU's rejection sampler refuses its own arguments",
    ),
    _Difference(
        "cpu-kv-update",
        "0.18.0",
        "0.23.0",
        "cpu",
        "the CPU back-end has no way to store a draft's context keys and values",
    ),
    _Difference(
        "cpu-stale-kv",
        "0.18.0",
        "0.23.0",
        "cpu",
        "the CPU kernel's non-causal attention reads past the end of a sequence",
    ),
    _Difference(
        "context-k-norm",
        "0.31.0",
        "0.33.0",
        "cpu",
        "the CPU kernels normalise the context keys of all draft layers with the first "
        "layer's weight",
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
    known_good = f"use vLLM {_oldest_usable()} to {newest}"
    if parsed.is_prerelease or base > newest:
        return refused(
            f"not known to this version of dflash-plugin (newest known release: {newest}); "
            "the engine runs as published",
            "use a known release, or update dflash-plugin",
        )
    row = next((r for r in _VLLM if Version(r.first) <= base <= Version(r.last)), _BETWEEN)
    if row.level is Level.REFUSED:
        return refused(row.reason, known_good)
    bridged = [
        d
        for d in _VLLM_DIFFERENCES
        if Version(d.first) <= base <= Version(d.last) and d.platform in (None, platform)
    ]
    level, reason = row.level, f"{row.reason} is used unchanged"
    if bridged:
        level = Level.SHIM if level is Level.NATIVE else level
        verb = "repaired" if level is Level.SHIM else "added"
        reason = f"{row.reason}, {verb}: {'; '.join(dict.fromkeys(d.what for d in bridged))}"
    names = tuple(dict.fromkeys(d.shim for d in bridged))
    return Support(engine, version, platform, level, reason, row.limits, shims=names)


def _oldest_usable() -> str:
    return next(row.first for row in _VLLM if row.level is not Level.REFUSED)
