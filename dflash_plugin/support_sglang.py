"""SGLang releases: what each has of DFlash, and what the plugin does about the rest.

Sources: the releases' own source, and runs on the CPU (docs/sglang.md).
"""

from __future__ import annotations

from collections.abc import Collection

from packaging.version import InvalidVersion, Version

from .support_types import Difference, Level, Releases, Support, decided

PLATFORM = "dflash_cpu"
"""The plugin's platform for machines without an accelerator, as ``SGLANG_PLATFORM`` names it."""

_UNKNOWN = "not a release this version of dflash-plugin knows; the engine runs as published"
_GPU_NOT_RUN = "on GPUs the repairs were held against the release's sources only, and not run"

_RELEASES = (
    Releases(
        "0.0",
        "0.5.10.post1",
        Level.REFUSED,
        "the release has no DFLASH, and loads no plugins",
    ),
    Releases(
        "0.5.11",
        "0.5.13",
        Level.REFUSED,
        "the release's draft worker is another one, which the repairs do not know; the engine runs "
        "as published",
    ),
    Releases(
        "0.5.14",
        "0.5.17",
        Level.REFUSED,
        "nobody has held the repairs against it; the engine runs as published",
    ),
    Releases("0.5.18", "0.5.23", Level.NATIVE, "the release's own DFLASH", (_GPU_NOT_RUN,)),
)

_ON_CPU = "a platform for CPUs, on plain torch"

# In the order of application.
DIFFERENCES = (
    *(
        Difference(shim, first, last, "cpu", _ON_CPU)
        for shim, first, last in (
            ("sglang-cpu-guard", "0.5.18", "0.5.23"),
            ("sglang-cpu-arguments", "0.5.18", "0.5.20"),
            ("sglang-cpu-cache-locs", "0.5.18", "0.5.20"),
            ("sglang-cpu-streams", "0.5.18", "0.5.23"),
            ("sglang-cpu-draft-backend", "0.5.18", "0.5.23"),
            ("sglang-cpu-req-to-token", "0.5.18", "0.5.23"),
            ("sglang-cpu-kv-copy", "0.5.18", "0.5.23"),
            ("sglang-cpu-norm-rope", "0.5.18", "0.5.23"),
            ("sglang-cpu-verify", "0.5.18", "0.5.23"),
        )
    ),
    Difference(
        "sglang-cpu-sampling",
        "0.5.18",
        "0.5.23",
        "cpu",
        "at temperature > 0 drafts are verified greedily on the CPU",
    ),
    Difference("sglang-draft-dtype", "0.5.18", "0.5.23", None, "float32 and float16 drafts crash"),
    Difference(
        "sglang-draft-tensors",
        "0.5.18",
        "0.5.23",
        None,
        "drafts with missing or unknown tensors are loaded without a word",
    ),
    Difference(
        "sglang-draft-attention",
        "0.5.18",
        "0.5.23",
        None,
        "windows and causality stated in dflash_config are ignored",
    ),
    Difference(
        "sglang-minimax-taps", "0.5.18", "0.5.23", None, "MiniMax-M2 targets hand out no taps"
    ),
)


def decide(
    version: str, platform: str, *, variant: str | None = None, replaced: Collection[str] = ()
) -> Support:
    """The support decision for an installed SGLang; never raises. See ``support.decide``."""

    def refused(reason: str, next_step: str) -> Support:
        return Support("sglang", version, platform, Level.REFUSED, reason, next_step=next_step)

    known_good = f"use SGLang {oldest()} to {newest()}"
    try:
        parsed = Version(version)
    except InvalidVersion:
        return refused(f"{version!r} is not a version number", "install a published release")
    base = Version(parsed.public)
    row = next(
        (
            row
            for row in _RELEASES
            if Version(row.first) <= base <= Version(row.last) and not base.is_prerelease
        ),
        None,
    )
    if row is None or parsed.local not in (None, variant and f"dflash.{variant}"):
        return refused(_UNKNOWN, known_good + ", or update dflash-plugin")
    if row.level is Level.REFUSED:
        return refused(row.reason, known_good)
    needed = [
        d
        for d in DIFFERENCES
        if Version(d.first) <= base <= Version(d.last) and d.platform in (None, platform)
    ]
    return decided("sglang", version, platform, row, needed, variant=variant, replaced=replaced)


def oldest() -> str:
    """The oldest release that the plugin supports."""
    return next(row.first for row in _RELEASES if row.level is not Level.REFUSED)


def newest() -> str:
    """The newest release that the plugin knows."""
    return max((row.last for row in _RELEASES), key=Version)
