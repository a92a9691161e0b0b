"""A tiny draft, trained by the package's own recipe, and what it is good for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dflash_plugin.acceptance import total
from dflash_plugin.pair import DraftConfig
from dflash_plugin.reference.loop import generate
from dflash_plugin.reference.model import DraftModel
from dflash_plugin.reference.target import HFTarget
from dflash_plugin.training.draft import TrainableDraft
from dflash_plugin.training.export import export
from dflash_plugin.training.fit import Batch, Recipe, fit

from . import tokenizer
from .language import Language
from .prompts import prompts
from .target import documents

NEW_TOKENS = 48


def build(
    spec: dict[str, Any],
    language: Language,
    folder: Path,
    progress: Callable[[int, int, float], None],
) -> None:
    """Train the draft of ``folder/target`` into ``folder/draft``.

    Args:
        spec: a ``[[pair]]`` row.
        progress: is told (step, steps, loss).
    """
    config = DraftConfig.from_dict(spec["draft"], folder / "draft" / "config.json")
    target = HFTarget.load(folder / "target", config.target_layer_ids)
    draft = TrainableDraft(config, target.embedding, target.head, seed=spec["seed"])
    recipe = Recipe(steps=spec["steps"], learning_rate=spec["learning_rate"], seed=spec["seed"])
    fit(
        draft,
        target,
        _batches(language, spec["seed"]),
        recipe,
        lambda step, loss: progress(step, recipe.steps, loss),
    )
    export(draft, folder / "draft")


def _batches(language: Language, seed: int) -> Iterator[Batch]:
    for ids in documents(language, 1000 + seed):
        yield Batch.whole(ids)


def measure(folder: Path, language: Language) -> dict[str, float]:
    """Acceptance length by kind of prompt: the reference, greedy, float32, all of the block.

    Raises:
        ValueError: no step was taken on some kind of prompt.
    """
    config = DraftConfig.from_dir(folder / "draft")
    target = HFTarget.load(folder / "target", config.target_layer_ids, dtype=torch.float32)
    draft = DraftModel.load(folder / "draft", target.embedding, target.head)
    found: dict[str, list[Any]] = {}
    for prompt in prompts(language):
        ids = tokenizer.chat(prompt.text)
        result = generate(target, draft, ids, max_new_tokens=NEW_TOKENS)
        found.setdefault(prompt.kind, []).append(result.stats)
    lengths = {
        kind: total(stats, config.max_speculative_tokens).al for kind, stats in found.items()
    }
    missing = [kind for kind, al in lengths.items() if al is None]
    if missing:
        raise ValueError(f"{missing[0]}: no step")
    return {kind: round(al, 4) for kind, al in lengths.items() if al is not None}
