"""Acceptance length along stored texts, from their features: many anchors in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...acceptance import AcceptanceStats, total
from ..draft import TrainableDraft
from ..fit import NO_LABEL, labels

_ANCHORS = 32  # in one pass: bounds the logits, [anchors, block - 1, vocab]


@torch.no_grad()
def simulate(
    draft: TrainableDraft, source: Any, indices: Sequence[int], head: Tensor, device: torch.device
) -> AcceptanceStats:
    """Steps that greedy decoding takes along these texts, as the reference's replay counts them.

    Tokens past the end of a text count as not accepted.

    Args:
        source: gives features of texts by index.
        head: [vocab, hidden], all of it.
    """
    was_training = draft.training
    draft.eval()
    k = draft.config.max_speculative_tokens
    accepted: list[AcceptanceStats] = []
    for index in indices:
        found = source.get([index])
        start, end = int(found.batch.starts[0]), int(found.batch.ends[0])
        taps, ids = found.taps.to(device), found.batch.ids.to(device)
        draft._head = head
        matches: list[int] = []
        for first in range(start, end - 1, _ANCHORS):
            anchors = torch.arange(first, min(first + _ANCHORS, end - 1))[None]
            chosen = draft(taps, ids, anchors.to(device)).argmax(-1).cpu()
            wanted = labels(found.batch, anchors, k + 1)
            right = (chosen == wanted) & (wanted != NO_LABEL)
            matches += right[0].long().cumprod(-1).sum(-1).tolist()
        place, steps = 0, []
        while place < len(matches):
            steps.append(matches[place])
            place += matches[place] + 1
        accepted.append(AcceptanceStats.from_steps(steps, k))
    draft.train(was_training)
    return total(accepted, k)
