"""Train a draft against a frozen target: random anchors, masked blocks, decayed loss.

Paper: arXiv 2602.06036, section 3.3. A block's early tokens count for more, since a
wrong one makes all after it worthless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import TrainingError
from ..reference.target import HFTarget
from .draft import TrainableDraft
from .features import channel_scale, tapped

NO_LABEL = -100
FEWEST_LABELS = 1
"""Tokens of the text after an anchor, at least."""


@dataclass(frozen=True)
class Batch:
    """Texts of one step.

    Attributes:
        ids: [texts, length], padded on the right.
        starts: [texts], first position that may be an anchor (of an answer, say); at least 1.
        ends: [texts], length of each text without padding.
    """

    ids: Tensor
    starts: Tensor
    ends: Tensor

    @classmethod
    def whole(cls, ids: Tensor) -> Batch:
        """Texts without padding in which every token but the first may be an anchor."""
        texts, length = ids.shape
        return cls(ids, torch.ones(texts, dtype=torch.long), torch.full((texts,), length))


@dataclass(frozen=True)
class Recipe:
    """What a fit does; the defaults suit small drafts.

    Attributes:
        anchors: blocks per text and step.
        decay: the loss of a block's i-th drafted token weighs exp(-i / decay).
        floor: of the learning rate at the end, as a share of its peak.
    """

    steps: int
    learning_rate: float = 2e-3
    anchors: int = 16
    decay: float = 4.0
    warmup: int = 30
    floor: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


def fit(
    draft: TrainableDraft,
    target: HFTarget,
    batches: Iterator[Batch],
    recipe: Recipe,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train ``draft`` in place; the loss of every step.

    Same draft, batches, recipe, versions and number of threads: same result, bit by bit.

    Args:
        target: its taps are the draft's.
        progress: is told (step, loss) after each step.

    Raises:
        TrainingError: a loss or gradient that is not a number; ``draft`` is as it was
            before that step.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    matrices = [p for p in draft.parameters() if p.ndim > 1]
    vectors = [p for p in draft.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    losses: list[float] = []
    draft.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe)
        batch = next(batches)
        taps = tapped(target, batch.ids)
        if step == 0:
            draft.tap_scale.copy_(channel_scale(taps))
        anchors = choose_anchors(batch, recipe.anchors, generator)
        logits = draft(taps, batch.ids, anchors)
        loss = block_loss(logits, labels(batch, anchors, draft.config.block_size), recipe.decay)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(draft.parameters(), recipe.clip))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or not math.isfinite(norm):
            raise TrainingError(
                f"step {step + 1} of {recipe.steps}: loss {losses[-1]}, gradient norm {norm}",
                hint="lower learning_rate, and look for broken texts or target weights",
            )
        optimizer.step()
        progress(step + 1, losses[-1])
    draft.eval()
    return losses


def schedule(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to the floor."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    return warm * (recipe.floor + (1 - recipe.floor) * cosine)


def choose_anchors(batch: Batch, count: int, generator: torch.Generator) -> Tensor:
    """Anchors [texts, count]: uniform over the places with a token of the text after them.

    Drawn with replacement, so any text that has one such place will do.

    Raises:
        TrainingError: a text too short for one.
    """
    room = batch.ends - FEWEST_LABELS - batch.starts
    if int(room.min()) < 1 or int(batch.starts.min()) < 1:
        raise TrainingError(
            f"a text of {batch.ends.tolist()} tokens has no room for an anchor at or after "
            f"{batch.starts.tolist()}",
            hint="leave out texts whose answer has fewer than two tokens",
        )
    draw = torch.rand((len(room), count), generator=generator)
    return batch.starts[:, None] + (draw * room[:, None]).long()


def labels(batch: Batch, anchors: Tensor, size: int) -> Tensor:
    """The tokens after each anchor [texts, anchors, size - 1]; ``NO_LABEL`` past the end."""
    places = anchors[..., None] + torch.arange(1, size)
    inside = places < batch.ends[:, None, None]
    places = places.clamp_max(batch.ids.shape[1] - 1).flatten(1)
    found = batch.ids.gather(1, places).view(inside.shape)
    return torch.where(inside, found, torch.full_like(found, NO_LABEL))


def block_loss(logits: Tensor, wanted: Tensor, decay: float) -> Tensor:
    """Cross-entropy, weighted by position in the block; a mean over the labels there are."""
    losses = cross_entropy(
        logits.flatten(0, -2).float(), wanted.flatten(), ignore_index=NO_LABEL, reduction="none"
    ).view(wanted.shape)
    weights = torch.exp(-torch.arange(wanted.shape[-1]) / decay) * (wanted != NO_LABEL)
    return (losses * weights).sum() / weights.sum()
