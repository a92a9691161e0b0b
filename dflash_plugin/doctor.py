"""Every check of an installation and a pair, each with its remedy."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

from . import __version__, engines, known_pairs, launch, matrix, support
from .errors import DFlashError, EngineNotFoundError, PatchStateError, UnsupportedEngineError
from .pair import Check

_ENTRY_POINTS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
_ALLOWED = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}


def examine(
    target: str | None = None,
    draft: str | None = None,
    num_speculative_tokens: int | None = None,
    engine: str | None = None,
    *,
    pair: str | None = None,
) -> list[Check]:
    """Run every check that applies; never raises.

    Args:
        target, draft, num_speculative_tokens: the pair to preflight; no target: none.
        engine: only this engine; None: every engine found.
        pair: a pair's id or target; what the matrix knows of it, without its files.
    """
    checks = [
        Check("dflash-plugin", "ok", f"{__version__}, Python {platform.python_version()}"),
        _matrix(),
    ]
    wanted = [engine] if engine else list(engines.DISTRIBUTIONS)
    found = [name for name in wanted if engines.find(name) is not None]
    if not found:
        names = " or ".join(wanted)
        checks.append(
            Check(
                "engine",
                "failed",
                f"no {names} in this environment",
                "install dflash-plugin in the environment the engine is in",
                EngineNotFoundError.exit_code,
            )
        )
    for name in found:
        checks += _engine(name)
    if pair is not None:
        checks += _known_pair(pair, [found_ for name in found if (found_ := engines.find(name))])
    if target is not None:
        try:
            resolved = launch.resolve_pair(target, draft)
        except DFlashError as err:
            checks.append(Check("pair", "failed", err.message, err.hint, err.exit_code))
        else:
            detail = f"target {resolved.target}, draft {resolved.draft}"
            if resolved.draft_revision:
                detail += f" at revision {resolved.draft_revision[:12]}"
            checks.append(Check("pair", "ok", detail))
            checks += resolved.preflight(num_speculative_tokens)
    return checks


def _known_pair(name: str, found: Sequence[engines.Installed]) -> list[Check]:
    try:
        row = launch.matrix_row(name) or matrix.load().pair(name)
    except DFlashError as err:
        return [Check("pair", "failed", err.message, err.hint, err.exit_code)]
    return known_pairs.checks(row, found)


def exit_code(checks: Sequence[Check]) -> int:
    """0, or the exit code of the first failed check."""
    return next((c.exit_code or 1 for c in checks if c.status == "failed"), 0)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The ``--json`` document: ``ok``, ``exit_code`` and every check."""
    code = exit_code(checks)
    return {"ok": code == 0, "exit_code": code, "checks": [asdict(check) for check in checks]}


def as_text(checks: Sequence[Check]) -> str:
    """One line a check; remedies under the failed ones."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:>7}  {check.name:<{width}}  {check.detail}")
        if check.remedy and check.status != "ok":
            lines.append(f"{'':>9}{'':<{width}}  -> {check.remedy}")
    return "\n".join(lines)


def _matrix() -> Check:
    try:
        data = matrix.load()
    except DFlashError as err:
        return Check("matrix", "failed", err.message, err.hint, err.exit_code)
    return Check("matrix", "ok", f"{len(data.pairs)} pairs, {len(data.cells)} tested cells")


def _engine(name: str) -> list[Check]:
    engine = engines.find(name)
    assert engine is not None
    found = f"{engine.version} ({engine.distribution}), platform {engine.platform}"
    decision = support.decide_for(engine)
    checks = [
        Check(name, "ok", found),
        Check(
            f"{name} support",
            "ok" if decision.usable else "failed",
            f"{decision.level.value}: {decision.reason}",
            decision.next_step,
            0 if decision.usable else UnsupportedEngineError.exit_code,
        ),
        _entry_point(name, needed=bool(decision.shims)),
        *_patches(engine),
    ]
    checks += [_shim(name, shim) for shim in decision.shims]
    checks += [Check(f"{name} limit", "ok", limit) for limit in decision.limits]
    return checks


def _patches(engine: engines.Installed) -> list[Check]:
    """Whether the files are as its patch set left them; nothing where it has none."""
    from . import patchset

    site, label = Path(engine.location or ""), f"{engine.name} patches"
    if patchset.interrupted(site):
        return [
            Check(
                label,
                "failed",
                "a patch command was interrupted: files may be old or new",
                "dflash-plugin patch status, which settles it",
                PatchStateError.exit_code,
            )
        ]
    if engine.variant is None:
        return []
    try:
        found = patchset.status(patchset.site_tree(site, engine.name), patchset.patches_dir())
    except DFlashError as err:
        return [Check(label, "failed", err.message, err.hint, err.exit_code)]
    return [
        Check(
            label,
            "failed" if found.edited else "ok",
            found.line(),
            "reinstall the engine" if found.edited else "",
            PatchStateError.exit_code if found.edited else 0,
        )
    ]


def _shim(engine: str, name: str) -> Check:
    """Whether a shim meets the sources it was written against; without importing the engine."""
    from . import shims
    from .shims import sources

    label, shim = f"{engine} shim", shims.load(name)
    spec = util.find_spec(engine)
    if spec is None or spec.origin is None:
        return Check(label, "skipped", f"{name}: no package {engine} to look into")
    site = Path(spec.origin).parents[1]
    wrong = sources.differences(shim, sources.installed(site))
    if wrong:
        return Check(
            label,
            "failed",
            f"{name} will not be applied: {'; '.join(wrong)}",
            "update dflash-plugin, or reinstall the engine if its files were edited",
            UnsupportedEngineError.exit_code,
        )
    return Check(label, "ok", f"{name}: {shim.mechanism} (else {shim.symptom})")


def _entry_point(name: str, *, needed: bool) -> Check:
    """Whether the engine loads the plugin; ``needed``: something is to be done at run time."""
    group = _ENTRY_POINTS[name]
    label = f"{name} plugin"
    registered = [ep for ep in metadata.entry_points(group=group) if ep.name == "dflash"]
    if not registered:
        return Check(
            label,
            "failed",
            f"no entry point `dflash` in {group}",
            "pip install dflash-plugin in this environment (a source tree is not enough)",
            EngineNotFoundError.exit_code,
        )
    variable = _ALLOWED[name]
    allowed = os.environ.get(variable)
    # Empty means none to vLLM, and all to SGLang.
    listed = allowed is not None and (allowed != "" or name == "vllm")
    if listed and "dflash" not in (allowed or "").replace(" ", "").split(","):
        said = f"{variable}={allowed!r} leaves `dflash` out, so {name} does not load it"
        if not needed:
            return Check(label, "ok", f"{said}; nothing is left to do at run time")
        return Check(
            label,
            "failed",
            said,
            f"add dflash to {variable}, or unset it",
            EngineNotFoundError.exit_code,
        )
    return Check(label, "ok", f"{registered[0].value} in {group}")
