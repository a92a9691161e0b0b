"""A tiny target: its config and tokenizer from the spec, its weights trained from nothing."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from . import tokenizer
from .language import Language

BUCKETS = ((128, 8), (128, 8), (256, 4), (256, 4), (512, 2), (1024, 1), (2048, 1))
"""(length, documents) of a training step: as many tokens in each, some of them far apart."""
BACKGROUND = (0, 0, 0, 40, 150, 400, 900)
"""Characters of other text before a request."""


def documents(language: Language, seed: int) -> Iterator[Tensor]:
    """Training batches without end: ids [documents, length]."""
    chance = random.Random(seed)
    while True:
        length, count = chance.choice(BUCKETS)
        rows = [document(language, chance, length) for _ in range(count)]
        yield torch.tensor(rows)


def document(language: Language, chance: random.Random, length: int) -> list[int]:
    """A conversation of exactly ``length`` tokens, cut at its end."""
    ids: list[int] = []
    while len(ids) < length:
        turn = language.turn(chance, chance.choice(BACKGROUND))
        prompt = tokenizer.chat(turn.request)
        ids += prompt[1:] if ids else prompt
        ids += [*tokenizer.encode(turn.answer), tokenizer.EOS]
    return ids[:length]


def build(
    spec: dict[str, Any],
    language: Language,
    folder: Path,
    progress: Callable[[int, int, float], None],
) -> None:
    """Write a complete model folder.

    Args:
        spec: a ``[[target]]`` row.
        progress: is told (step, steps, loss).

    Raises:
        FloatingPointError: the loss is not a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**spec["config"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    text = json.dumps(config, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    torch.manual_seed(spec["seed"])
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    _train(model, spec, documents(language, spec["seed"]), progress)
    # Rounded, so that loading in float32 and in bfloat16 gives the same weights.
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(text, encoding="utf-8")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    tokenizer.save(folder)


def _train(
    model: Any,
    spec: dict[str, Any],
    batches: Iterator[Tensor],
    progress: Callable[[int, int, float], None],
) -> None:
    steps, peak = spec["steps"], spec["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / 40) * (0.02 + 0.98 * _cosine(step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, steps, float(loss.detach()))
    model.eval()


def _cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))
