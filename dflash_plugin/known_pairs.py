"""What can be said of a pair from the matrix alone: no hub, no engine, no file of the models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from . import architectures, engines, launch, matrix, patchset, support, traits
from .errors import ModelNotFoundError, UnsupportedEngineError
from .pair import Check

NO_FILES = "from facts alone: the pair's files are looked at when it is served"


def decide(row: matrix.Pair, engine: engines.Installed) -> support.Support:
    """The support decision for a pair on an engine; never raises."""
    shape, draft = row.target_shape, row.draft_shape
    return support.decide_pair(
        support.decide_for(engine),
        shape.model_type if shape is not None else None,
        dflash2=draft is not None and draft.dflash2 is not None,
    )


def require(row: matrix.Pair, engine: engines.Installed) -> support.Support:
    """:func:`decide`; ``UnsupportedEngineError``, with what to use instead, where it refuses."""
    decision = decide(row, engine)
    if decision.usable:
        return decision
    hint = decision.next_step
    if engine.name != "vllm":
        first, last = vllm_releases(row)
        hint = f"use --engine vllm ({first} to {last}); {engine.name} itself runs as published"
    raise UnsupportedEngineError(f"{row.id}: {decision.line()}", hint=hint)


def vllm_releases(row: matrix.Pair) -> tuple[str, str]:
    """The oldest and the newest vLLM release for a pair."""
    shape, draft = row.target_shape, row.draft_shape
    dflash2 = draft is not None and draft.dflash2 is not None
    first = support.first_release(shape.model_type if shape else None, dflash2=dflash2)
    return first, support.releases("vllm")[1]


def notes(row: matrix.Pair, tokens: int = 8192) -> list[str]:
    """Lines for people about a pair: its memory, generation and what else is known."""
    memory = row.memory(tokens)
    lines = [f"memory: {memory.line() if memory else 'unknown, as is the shape of one half'}"]
    if row.generation:
        lines.append(f"draft: {row.generation}")
    if row.status == matrix.DFLASH2:
        lines.append("DFlash 2: this package cannot check such drafts; serve it --no-preflight")
    return [*lines, *([row.notes] if row.notes else [])]


def patch_note(decision: support.Support) -> list[str]:
    """A line about the patch sets that do the same as the shims of ``decision``, if any does."""
    root = patchset.patches_dir()
    if not decision.shims or not root.is_dir():
        return []
    wanted = (decision.engine, decision.version, "all")
    if wanted not in {tuple(found) for found in patchset.available(root)}:
        return []
    return ["the same repairs in the engine's files instead: dflash-plugin patch apply all"]


def select(
    rows: Iterable[matrix.Pair],
    *,
    family: str | None = None,
    status: str | None = None,
    memory: float | None = None,
    tokens: int = 8192,
    engine: engines.Installed | None = None,
) -> list[matrix.Pair]:
    """The rows that match all of what is given; replicas only where asked for by status.

    Args:
        family: part of, or a glob over, the target's model type or name.
        memory: GiB that the weights and the cache of one sequence of ``tokens`` have to fit
            in; pairs of unknown size are left out.
        engine: only pairs that can be used on it.
    """
    found = []
    for row in rows:
        if row.status != status if status else row.status == matrix.REPLICA:
            continue
        if family and not _matches(row, family.lower()):
            continue
        if memory is not None:
            needed = row.memory(tokens)
            if needed is None or needed.total > memory * architectures.GIB:
                continue
        if engine is not None and not (row.draft and decide(row, engine).usable):
            continue
        found.append(row)
    return found


def as_json(
    row: matrix.Pair, chosen: Sequence[engines.Installed], tokens: int = 8192
) -> dict[str, Any]:
    """One pair for ``pairs --json``; None and empty: not known."""
    needed, shape = row.memory(tokens), row.target_shape
    first, last = vllm_releases(row)
    return {
        "id": row.id,
        "status": row.status,
        "target": row.target,
        "target_revision": row.target_revision,
        "draft": row.draft or None,
        "draft_revision": row.draft_revision,
        "generation": row.generation,
        "num_speculative_tokens": row.num_speculative_tokens or None,
        "model_type": shape.model_type if shape else None,
        "traits": list(traits.traits(shape, row.draft_shape)),
        "memory_gib": _gib(needed),
        "vllm": {"first": first, "last": last} if row.draft else None,
        "args": {name: list(args) for name, args in row.args.items()},
        "engines": [_decision(decide(row, engine)) for engine in chosen],
        "published": [
            {"engine": p.engine, "hardware": p.hardware, "al": p.al, "speedup": p.speedup,
             "num_speculative_tokens": p.num_speculative_tokens, "template": p.template,
             "temperature": p.temperature, "concurrency": p.concurrency, "source": p.source,
             "grade": p.grade}
            for p in matrix.load().published_for(row)
        ],
        "notes": row.notes,
    }  # fmt: skip


def as_text(rows: Sequence[matrix.Pair], engine: engines.Installed, tokens: int = 8192) -> str:
    """A table for people; the last column is the named engine's."""
    head = ("pair", "target", "status", "K", "GiB", f"{engine.name} {engine.version}")
    lines = [head]
    for row in rows:
        needed, decision = row.memory(tokens), decide(row, engine)
        level = decision.level.value if row.draft else "no draft yet"
        if row.draft and not decision.usable and decision.next_step:
            level += f": {decision.next_step}"
        size = f"{needed.total / architectures.GIB:.1f}" if needed else "?"
        k = str(row.num_speculative_tokens or "?")
        lines.append((row.id, row.target, row.status, k, size, level))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)] + [0]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def checks(row: matrix.Pair, found: Sequence[engines.Installed]) -> list[Check]:
    """For ``doctor --pair``: the pair itself, its memory, and each engine that is installed."""
    revision = row.draft_revision[:12] if row.draft_revision else "unknown revision"
    draft = f"draft {row.draft} ({revision})" if row.draft else "no draft yet"
    results = [Check("pair", "ok", f"{row.id}, {row.status}: target {row.target}, {draft}")]
    try:
        launch.require_draft(row)
    except ModelNotFoundError as err:
        return [Check("pair", "failed", err.message, err.hint, err.exit_code)]
    results += [Check("pair facts", "ok", line) for line in notes(row)]
    if has := traits.traits(row.target_shape, row.draft_shape):
        results.append(Check("pair traits", "ok", ", ".join(has)))
    for engine in found:
        name = f"{engine.name} {engine.version}"
        try:
            decision = require(row, engine)
        except UnsupportedEngineError as err:
            results.append(Check(name, "failed", err.message, err.hint, err.exit_code))
        else:
            results.append(Check(name, "ok", f"{row.id}: {decision.level.value}"))
    return results


def _matches(row: matrix.Pair, family: str) -> bool:
    names = [row.target.lower(), row.id]
    if row.target_shape is not None:
        names.append(row.target_shape.model_type)
    return any(family in name or fnmatchcase(name, family) for name in names)


def _decision(decision: support.Support) -> Mapping[str, Any]:
    return {
        "engine": decision.engine,
        "version": decision.version,
        "platform": decision.platform,
        "level": decision.level.value,
        "reason": decision.reason,
        "next_step": decision.next_step,
        "shims": list(decision.shims),
    }


def _gib(memory: architectures.Memory | None) -> Mapping[str, float] | None:
    if memory is None:
        return None
    parts = {name: getattr(memory, name) for name in ("target", "draft", "cache", "total")}
    return {name: round(value / architectures.GIB, 2) for name, value in parts.items()}
