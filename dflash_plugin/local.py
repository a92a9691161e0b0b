"""``dflash_plugin.load``: a pair by name, on the back-end that this machine has."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import launch, pair
from .backends.api import Pair
from .backends.rows import Step
from .errors import MissingDependencyError, UsageError

BACKENDS = ("transformers", "mlx")


def load(
    target: Any,
    draft: Any = None,
    *,
    backend: str = "auto",
    preflight: bool = True,
    **options: Any,
) -> Pair:
    """Load a target and its draft.

    Args:
        target: ``demo``, a pair id, a hub id, a local folder, or a loaded model.
        draft: folder, hub id or loaded draft; None looks the target up in the matrix.
        backend: ``transformers``, ``mlx``, or ``auto``: MLX on a Mac that has it.
        preflight: check configs and tensor names of a pair given by name before loading it.
        **options: of the back-end: ``dtype``, ``device``, ``tokenizer``, ``pack`` and
            ``from_pretrained``'s for Transformers; ``dtype``, ``draft_bits``, ``tokenizer``
            for MLX.

    Raises:
        UsageError: no such back-end, or an argument does not fit.
        MissingDependencyError: its packages are not installed.
        ModelNotFoundError, DownloadError: a half of the pair is not to be had.
        PairMismatchError, CheckpointError: the halves do not fit, or one is damaged.
    """
    name = _backend(backend, target)
    block_size = revision = None
    if isinstance(target, (str, Path)):
        given = str(draft) if isinstance(draft, (str, Path)) else None
        if draft is None or given is not None:
            resolved = launch.resolve_pair(str(target), given)
            if preflight:
                pair.require(resolved.preflight())
            target, draft = resolved.target, str(resolved.draft_dir)
            k = resolved.num_speculative_tokens
            block_size = None if k is None else k + 1
    elif draft is None:
        raise UsageError(
            "the target is a loaded model, so its draft cannot be looked up",
            hint="give draft=, a folder, hub id or loaded draft",
        )
    module = _module(name)
    loaded: Pair = module.load(target, draft, revision=revision, **options)
    loaded.block_size = block_size
    return loaded


def generate(loaded: Pair, prompt: Any, **options: Any) -> Any:
    """:meth:`Pair.generate` as a function."""
    return loaded.generate(prompt, **options)


def stream_generate(loaded: Pair, prompt: Any, **options: Any) -> Iterator[Step]:
    """:meth:`Pair.stream_generate` as a function."""
    return loaded.stream_generate(prompt, **options)


def _backend(name: str, target: Any) -> str:
    if name == "auto":
        if not isinstance(target, (str, Path)):
            return "mlx" if type(target).__module__.startswith("mlx") else "transformers"
        return "mlx" if _has("mlx_lm") and not _has("torch") else "transformers"
    if name not in BACKENDS:
        raise UsageError(f"backend is {name!r}, expected auto, " + " or ".join(BACKENDS))
    return name


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"{__package__}.backends.{name}_model")
    except ImportError as err:
        if (err.name or "").startswith("dflash_plugin"):
            raise
        raise MissingDependencyError(
            f"the {name} back-end needs {err.name}", hint=f"pip install 'dflash-plugin[{name}]'"
        ) from err
