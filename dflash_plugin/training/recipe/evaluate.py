"""Stage 5: acceptance lengths, by the reference and, where there is one, by a real engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...acceptance import AcceptanceStats, total
from ...backends.server import ServerClient
from ...errors import UsageError
from ...pair import DraftConfig
from ...reference.loop import generate
from ...reference.model import DraftModel
from ...reference.replay import replay
from . import models
from .clock import Clock
from .config import Config
from .prompts import Prompt
from .regenerate import prompt_ids
from .sources import read_source
from .store import Texts


def evaluate(
    config: Config, texts: Texts, draft: Path, clock: Clock, device: torch.device
) -> dict[str, Any]:
    """AL and acceptance per position, by kind of prompt.

    ``heldout``: the reference along held-out answers. ``generated``: the reference's own
    greedy decoding of the prompts in ``evaluate.source``. ``server``: an engine's counters
    over the held-out prompts.

    Raises:
        UsageError: K is more than the block has room for.
        RequestError: the server failed.
    """
    settings = config.evaluate
    shape = DraftConfig.from_dir(draft)
    k = settings.k or shape.max_speculative_tokens
    if k > shape.max_speculative_tokens:
        raise UsageError(
            f"{config.path}: evaluate.k is {k}, the block has room for "
            f"{shape.max_speculative_tokens}",
            hint="0 means all of it",
        )
    target = models.load_target(config, shape.target_layer_ids, device)
    model = DraftModel.load(
        draft, target.embedding, target.head, dtype=target.embedding.dtype, device=device
    )
    chosen = _per_kind(texts, settings.texts)
    found: dict[str, Any] = {"k": k, "dtype": config.target.dtype}

    def along(i: int) -> AcceptanceStats:
        prompt, answer = texts.prompt(chosen[i]), texts.answer(chosen[i])
        return replay(target, model, prompt, answer, num_speculative_tokens=k).stats

    kinds = [texts.kinds[i] for i in chosen]
    found["heldout"] = _measure("heldout text", kinds, along, k, clock)
    asked = [
        Prompt.of(source.name, messages)
        for source in settings.source
        for messages in read_source(source, config, config.seed + 1)
    ]
    if asked:
        tokenizer = models.tokenizer(config.target)

        def decoded(i: int) -> AcceptanceStats:
            ids = prompt_ids(tokenizer, asked[i], config)
            tokens = settings.tokens
            return generate(
                target, model, ids, max_new_tokens=tokens, num_speculative_tokens=k
            ).stats

        names = [prompt.kind for prompt in asked]
        found["generated"] = _measure("prompt", names, decoded, k, clock)
    if settings.url:
        client = ServerClient(settings.url, settings.model)

        def served(i: int) -> AcceptanceStats:
            before = client.acceptance(k)
            client.answer(texts.prompt(chosen[i]), settings.tokens)
            return client.acceptance(k) - before

        found["server"] = _measure("served prompt", kinds, served, k, clock)
    return found


def _measure(
    unit: str,
    kinds: Sequence[str],
    measure: Callable[[int], AcceptanceStats],
    k: int,
    clock: Clock,
) -> dict[str, Any]:
    """By kind, and ``all``; fewer where the time is up, but at least one text."""
    stats: dict[str, list[AcceptanceStats]] = {}
    with clock.progress(unit, len(kinds)) as told:
        for i, kind in enumerate(kinds):
            if i and clock.over():
                break
            stats.setdefault(kind, []).append(measure(i))
            told(i + 1)
    everything = [one for some in stats.values() for one in some]
    return {
        kind: {"texts": len(some), **_row(total(some, k))}
        for kind, some in (*sorted(stats.items()), ("all", everything))
    }


def _row(stats: AcceptanceStats) -> dict[str, Any]:
    rates = stats.rate_per_position or ()
    return {
        "al": None if stats.al is None else round(stats.al, 4),
        "steps": stats.drafts,
        "accepted_rate_per_position": [round(rate, 4) for rate in rates],
    }


def _per_kind(texts: Texts, most: int) -> list[int]:
    """Held-out texts, at most so many of a kind, kinds in turn: whatever time allows is mixed."""
    by_kind: dict[str, list[int]] = {}
    for index in texts.heldout:
        by_kind.setdefault(texts.kinds[index], []).append(index)
    ranked = [
        (place, kind, index)
        for kind, indices in by_kind.items()
        for place, index in enumerate(indices[:most])
    ]
    return [index for _, _, index in sorted(ranked)]
