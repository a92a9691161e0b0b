"""The loss: position-decayed cross-entropy over part of the head, and distillation.

The softmax over a whole vocabulary is most of a small draft's step. Here it runs over the
labels, the commonest tokens and some random ones; a random row stands for all the rows that
were not drawn (importance weight), so the sum is the whole vocabulary's in expectation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..fit import NO_LABEL, Batch


@dataclass(frozen=True)
class Rows:
    """Rows of the head in one step.

    Attributes:
        ids: [rows], sorted.
        correction: [rows], added to the logits; 0 where a row stands for itself.
    """

    ids: Tensor
    correction: Tensor

    def places(self, tokens: Tensor) -> Tensor:
        """Where these tokens are among the rows; ``NO_LABEL`` stays."""
        found = torch.searchsorted(self.ids, tokens.clamp_min(0))
        return torch.where(tokens == NO_LABEL, tokens, found)


def choose_rows(
    wanted: Tensor, common: Tensor, negatives: int, vocab_size: int, generator: torch.Generator
) -> Rows:
    """The rows for these labels: those, ``common``, and random ones."""
    sure = torch.cat([wanted[wanted != NO_LABEL].flatten(), common]).unique()
    is_sure = torch.zeros(vocab_size, dtype=torch.bool)
    is_sure[sure] = True
    rest = vocab_size - len(sure)
    drawn = torch.randint(0, vocab_size, (negatives,), generator=generator).unique()
    drawn = drawn[~is_sure[drawn]]
    ids, order = torch.cat([sure, drawn]).sort()
    weight = float(torch.tensor(rest / max(1, len(drawn))).log()) if len(drawn) else 0.0
    correction = torch.cat([torch.zeros(len(sure)), torch.full((len(drawn),), weight)])
    return Rows(ids, correction[order])


def spread_anchors(batch: Batch, count: int, generator: torch.Generator) -> Tensor:
    """Anchors [texts, count]: one in each of ``count`` equal parts of the answer, at random."""
    room = batch.ends - batch.starts - 1  # a label has to follow
    draw = torch.rand((len(room), count), generator=generator)
    part = (torch.arange(count) + draw) / count
    return batch.starts[:, None] + (part * room[:, None]).long().minimum(room[:, None] - 1)


def teacher_at(last: Tensor, anchors: Tensor, size: int) -> Tensor:
    """What the target predicts each label from: [texts, anchors, size - 1, hidden]."""
    length, hidden = last.shape[1:]
    before = torch.arange(size - 1, device=anchors.device)
    places = (anchors[..., None] + before).clamp_max(length - 1).flatten(1)
    found = last.gather(1, places[..., None].expand(-1, -1, hidden))
    return found.view(*anchors.shape, size - 1, hidden)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits as a target with ``final_logit_softcapping`` has them."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def weighted_loss(
    logits: Tensor, places: Tensor, decay: float, teacher: Tensor | None, distill: float
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted losses, and the sum of the weights.

    Args:
        logits: [texts, anchors, size - 1, rows].
        places: [texts, anchors, size - 1], the labels' places among the rows.
        teacher: the target's logits over the same rows.
        distill: the teacher's share of the loss.
    """
    logs = logits.float().log_softmax(-1)
    there = places != NO_LABEL
    loss = -logs.gather(-1, places.clamp_min(0)[..., None])[..., 0]
    if teacher is not None and distill:
        from_teacher = -(teacher.float().softmax(-1) * logs).sum(-1)
        loss = (1 - distill) * loss + distill * from_teacher
    size = torch.arange(places.shape[-1], device=places.device)
    weights = torch.exp(-size / decay) * there
    return (loss * weights).sum(), weights.sum()
