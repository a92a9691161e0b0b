"""(engine, version, platform) -> how DFlash gets to run there, and why.

The one place that decides. Engines nobody has looked at are refused politely:
they run as if this package were not installed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from packaging.version import Version

from . import engines, support_sglang
from .support_types import Difference as Difference  # noqa: PLC0414 (re-exported)
from .support_types import Level as Level  # noqa: PLC0414
from .support_types import Releases, decided
from .support_types import Support as Support  # noqa: PLC0414

_CPU_RUNS = (
    "recorded runs are on the CPU; on GPUs the repairs were held against the release's sources only"
)
_CAUSAL = "blocks of sliding-window drafts see what comes after"
_MIXED_SWA = "the V1 runner refuses drafts that mix sliding-window and full layers"

_WHOLE_KV = (
    "sliding-window layers of drafts keep the keys of the whole sequence: right, and more KV "
    "memory than their window needs"
)


_NO_GEMMA4 = (
    "with a Gemma 4 target the release puts a draft's layers into several KV cache groups and stops"
)
_TOO_OLD = "the release has no dflash method, and its targets no common way to hand out taps"
_NO_GRAPHS = "the draft runs without CUDA graphs and torch.compile"
_OWN = "the release's own dflash"
_BETWEEN = Releases(
    "0",
    "0",
    Level.REFUSED,
    "not a release this version of dflash-plugin knows; the engine runs as published",
)

# Releases looked at, oldest first. SHIM is not written here: it is NATIVE with a difference.
# Sources: the releases' own source, and runs recorded in docs/results/.
_VLLM = (
    Releases("0.0", "0.17.1", Level.REFUSED, _TOO_OLD),
    Releases("0.18.0", "0.19.1", Level.REGISTERED, "the plugin's own dflash", (_NO_GRAPHS,)),
    Releases(
        "0.20.0",
        "0.24.0",
        Level.NATIVE,
        _OWN,
        (_WHOLE_KV, _NO_GEMMA4),
    ),
    Releases("0.25.0", "0.33.0", Level.NATIVE, _OWN, (_CPU_RUNS,)),
)

# One line per shim and range of releases, in the order in which they are applied.
_VLLM_DIFFERENCES = (
    *(
        Difference(shim, "0.18.0", "0.19.1", platform, "the method, its model and its proposer")
        for shim, platform in (
            ("register-arguments", None),
            ("register-config", None),
            ("register-async", None),
            ("register-proposer", None),
            ("register-lookahead", None),
            ("register-cpu-runner", "cpu"),
        )
    ),
    Difference(
        "cpu-kv-update",
        "0.18.0",
        "0.23.0",
        "cpu",
        "the CPU back-end has no way to store a draft's context keys and values",
    ),
    Difference(
        "cpu-stale-kv",
        "0.18.0",
        "0.23.0",
        "cpu",
        "the CPU kernel's non-causal attention reads past the end of a sequence",
    ),
    Difference(
        "tap-offset",
        "0.20.0",
        "0.21.0",
        None,
        "a draft's features come from the layers below those it names",
    ),
    Difference(
        "draft-lookahead",
        "0.20.0",
        "0.22.1",
        None,
        "the scheduler reserves one KV slot too few for a draft",
    ),
    Difference(
        "draft-context-end",
        "0.20.0",
        "0.22.1",
        None,
        "the last draft reaches past the end of the context",
    ),
    Difference(
        "draft-windows",
        "0.20.0",
        "0.24.0",
        None,
        "sliding windows of drafts are ignored, silently",
    ),
    Difference(
        "draft-windows-v2",
        "0.24.0",
        "0.24.0",
        None,
        "sliding windows of drafts are ignored, silently",
    ),
    Difference(
        "draft-scaling",
        "0.20.0",
        "0.24.0",
        None,
        "a draft's embedding scale and logit soft cap are ignored",
    ),
    Difference(
        "cpu-taps",
        "0.20.0",
        "0.21.0",
        "cpu",
        "the CPU never asks the target for a draft's features, and dies",
    ),
    Difference(
        "cpu-packed-qkv",
        "0.20.0",
        "0.24.0",
        "cpu",
        "the draft's attention reads a weight that the CPU has packed away, and dies",
    ),
    Difference(
        "cpu-dflash-inputs",
        "0.20.0",
        "0.24.0",
        "cpu",
        "the CPU has no kernel for the draft's inputs, and dies",
    ),
    Difference(
        "cpu-sampler-arguments",
        "0.20.0",
        "0.20.2",
        "cpu",
        "the CPU's rejection sampler refuses its own arguments",
    ),
    Difference(
        "cpu-sampler-arguments",
        "0.23.0",
        "0.24.0",
        "cpu",
        "the CPU's rejection sampler refuses its own arguments",
    ),
    Difference(
        "cpu-kernels",
        "0.30.0",
        "0.30.0",
        "cpu",
        "the CPU's kernels do not reach speculation",
    ),
    Difference(
        "context-k-norm",
        "0.25.0",
        "0.33.0",
        "cpu",
        "the CPU kernels normalise the context keys of all draft layers with the first "
        "layer's weight",
    ),
    Difference(
        "cpu-expand",
        "0.20.0",
        "0.33.0",
        "cpu",
        "the CPU kernels verify sampled drafts at an uninitialised temperature",
    ),
    Difference(
        "draft-scale",
        "0.25.0",
        "0.33.0",
        None,
        "drafts are not given their Gemma target's embedding scale and soft cap",
    ),
    Difference(
        "draft-lora",
        "0.20.0",
        "0.33.0",
        None,
        "with LoRA on, drafts embed through their target's adapters, and die",
    ),
    Difference(
        "draft-sampling",
        "0.28.0",
        "0.33.0",
        None,
        "DFlash2 drafts are taken for certain at temperature > 0, which lowers acceptance",
    ),
    # Before mixed-swa: both change the V1 proposer, and this knows it as published.
    Difference("swa-causal", "0.25.0", "0.25.1", None, _CAUSAL),
    Difference("swa-causal-v2", "0.25.0", "0.25.1", None, _CAUSAL),
    Difference("mixed-swa", "0.25.0", "0.33.0", None, _MIXED_SWA),
    Difference("mixed-swa-model", "0.25.0", "0.33.0", None, _MIXED_SWA),
    Difference("mixed-swa-config", "0.26.0", "0.33.0", None, _MIXED_SWA),
    *(
        Difference(
            shim,
            "0.25.0",
            "0.33.0",
            platform,
            "with a Gemma 4 target, drafts get its attention's geometry and back-end",
        )
        for shim in ("mm-prefix", "triton-geometry")
        for platform in ("cuda", "rocm", "xpu", "unknown")
    ),
)


_NO_TAPS = "the release has no target of that type that hands out taps"
# The first release for targets of a type, where that is not the oldest usable one, and why.
# Sources: the releases' model classes (SupportsEagle3); Gemma 4's draft in a run of 0.24.0.
_VLLM_TARGETS = {
    "gemma4": (
        "0.25.0",
        "the release has no Gemma 4 target, or does not load it, or refuses a draft beside it, "
        "whose layers then fall into several KV groups",
    ),
    "minimax_m2": ("0.20.0", _NO_TAPS),
    "qwen3_next": ("0.24.0", _NO_TAPS),
}
_VLLM_DFLASH2 = "0.28.0"
_SEVERAL_GROUPS = "0.25.0"
"""From there on a draft's layers may be in several KV cache groups (mixed-swa)."""
_LINEAR_TARGETS = ("qwen3_5", "qwen3_5_moe", "qwen3_next")


def decide_for(engine: engines.Installed) -> Support:
    """:func:`decide` for an engine that was found."""
    return decide(
        engine.name,
        engine.version,
        engine.platform,
        variant=engine.variant,
        replaced=engine.replaced_shims,
    )


def decide(  # noqa: PLR0911
    engine: str,
    version: str,
    platform: str,
    *,
    variant: str | None = None,
    replaced: Collection[str] = (),
) -> Support:
    """The support decision for an installed engine; never raises.

    Args:
        engine: ``vllm`` or ``sglang``.
        version: as its metadata says, local part allowed.
        platform: ``cpu``, ``cuda``, ``rocm``, ``xpu`` or ``unknown``.
        variant: the patch set that its sources were given; None: none.
        replaced: the shims which that set stands for.
    """

    def refused(reason: str, next_step: str) -> Support:
        return Support(engine, version, platform, Level.REFUSED, reason, next_step=next_step)

    if engine != "vllm":
        if engine == "sglang":
            return support_sglang.decide(version, platform, variant=variant, replaced=replaced)
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
    if row.level is Level.REGISTERED and platform in ("rocm", "xpu"):
        return refused(
            "the release has no dflash method, and the plugin's own is for CPUs and CUDA",
            f"use vLLM {_oldest_native()} to {newest}",
        )
    needed = [
        d
        for d in _VLLM_DIFFERENCES
        if Version(d.first) <= base <= Version(d.last) and d.platform in (None, platform)
    ]
    return decided(engine, version, platform, row, needed, variant=variant, replaced=replaced)


def decide_pair(decision: Support, model_type: str | None, *, dflash2: bool = False) -> Support:
    """``decision`` for one pair; never raises.

    Args:
        decision: of :func:`decide`.
        model_type: the target's, as its ``config.json`` says; None: not known.
        dflash2: the draft is one of the second kind.
    """
    if not decision.usable or decision.engine != "vllm":
        return decision
    base, newest = Version(Version(decision.version).base_version), releases("vllm")[1]

    def refused(reason: str, first: str) -> Support:
        step = f"use vLLM {first} to {newest}" + (" on a GPU" if dflash2 else "")
        return replace(
            decision, level=Level.REFUSED, reason=reason, limits=(), shims=(), next_step=step
        )

    first = first_release(model_type, dflash2=dflash2)
    if dflash2 and base < Version(_VLLM_DFLASH2):
        return refused("the release knows no DFlash 2 drafts", first)
    if dflash2 and decision.platform == "cpu":
        return refused("DFlash 2 drafts want vLLM's V2 runner, which is for GPUs", first)
    if base < Version(first):
        return refused(_VLLM_TARGETS[model_type or ""][1], first)
    limits = decision.limits
    if model_type in _LINEAR_TARGETS:
        limit = "targets with recurrent layers were read in the release's source, and not run"
        if decision.platform == "cpu":
            limit += "; linear attention is bfloat16 alone on the CPU"
        limits += (limit,)
    if model_type == "gpt_oss" and base < Version(_SEVERAL_GROUPS):
        limits += (
            "gpt-oss-20b's draft falls into two KV cache groups, which the release refuses: add "
            "--disable-hybrid-kv-cache-manager (read in the release's source, and not run)",
        )
    return replace(decision, limits=limits)


def first_release(model_type: str | None, *, dflash2: bool = False) -> str:
    """The oldest vLLM release for such a pair."""
    wanted = [_oldest_usable(), _VLLM_TARGETS.get(model_type or "", ("0", ""))[0]]
    return max([*wanted, _VLLM_DFLASH2] if dflash2 else wanted, key=Version)


def releases(engine: str) -> tuple[str, str]:
    """The oldest and newest release of an engine with a DFlash, its own or the plugin's."""
    if engine == "sglang":
        return support_sglang.oldest(), support_sglang.newest()
    return _oldest_usable(), max((row.last for row in _VLLM), key=Version)


def _oldest_native() -> str:
    return next(row.first for row in _VLLM if row.level is Level.NATIVE)


def _oldest_usable() -> str:
    return next(row.first for row in _VLLM if row.level is not Level.REFUSED)


def differences(engine: str) -> tuple[Difference, ...]:
    """Every upstream difference of an engine that a shim bridges, in the order of application."""
    return support_sglang.DIFFERENCES if engine == "sglang" else _VLLM_DIFFERENCES
