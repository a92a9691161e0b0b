"""A tiny target folder and a run's file for the tests of the training recipe; needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from local_replicas import VOCAB, make_target, save_tokenizer

from dflash_plugin.training.recipe import config, models, store
from dflash_plugin.training.recipe.answers import Answer
from dflash_plugin.training.recipe.clock import Clock
from dflash_plugin.training.recipe.config import Config
from dflash_plugin.training.recipe.trainer import Trainer

TOML = """
name = "tiny"
out = "{out}"
[target]
model = "{target}"
dtype = "float32"
[draft]
layers = 2
block_size = 5
mask_token_id = 63
taps = [0, 2]
init = "{init}"
[prompts]
heldout = 0.2
[[prompts.source]]
kind = "jsonl"
name = "words"
path = "{prompts}"
[regenerate]
batch = 4
max_tokens = 14
[features]
shard = 5
batch = 2
{features}
[fit]
epochs = {epochs}
batch = 4
anchors = 3
warmup = 2
learning_rate = 0.005
precision = "float32"
head_rows = {head_rows}
negatives = 8
evaluate_every = 4
checkpoint_every = 3
{fit}
[evaluate]
texts = 2
"""


def save_target(folder: Path, **changes: Any) -> Path:
    """A random four-layer model with a tokenizer of words w0 … w63."""
    model = make_target("qwen3", **changes)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_prompts(path: Path, count: int = 24) -> Path:
    """Different prompts of words the tokenizer knows."""
    lines = [
        json.dumps({"prompt": f"w{3 + i} w{4 + 2 * i % 50} w{9 + i % 7}"}) for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_config(folder: Path, target: Path, **changes: Any) -> Config:
    """The run of :data:`TOML`, its folder in ``folder``."""
    told = {"init": "random", "features": "", "fit": "", "epochs": 3, "head_rows": 16, **changes}
    path = folder / "run.toml"
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
    path.write_text(TOML.format(out=folder / "out", target=target, prompts=prompts, **told))
    return config.load(path)


def write_answers(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Random answers of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def some(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB - 2, (size,), generator=generator).tolist())

    rows = [Answer(f"{i * 178956970:08x}", "words", some(3), some(6 + i % 5)) for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    return path


def texts_of(told: Config) -> store.Texts:
    """The answers of a run's folder, made at random if there are none."""
    path = told.out / "answers.jsonl"
    if not path.exists():
        write_answers(path)
    return store.Texts(told, path, VOCAB)


def source_of(told: Config) -> tuple[store.Computed, Any]:
    """Features made as they are needed, and the target."""
    target = models.load_target(told, told.draft.taps, torch.device("cpu"))
    return store.Computed(texts_of(told), target, told.features.teacher), target


def make_trainer(told: Config, name: str = "fit", **options: Any) -> Trainer:
    """A trainer in a folder of its own."""
    source, target = source_of(told)
    shape = models.draft_config(told, Path(told.target.model))
    draft = models.new_draft(told, shape, target, source.scale())
    return Trainer(told, draft, source, told.out / name, "key", clock=Clock(), **options)
