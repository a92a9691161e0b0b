"""Tiny targets and drafts for the tests of ``dflash_plugin.reference``; needs torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dflash_plugin.pair import DraftConfig
from dflash_plugin.reference.model import DraftModel
from dflash_plugin.reference.target import HFTarget, TargetOutput

# For matrices this small a second thread only waits, for long on a busy machine.
torch.set_num_threads(1)

VOCAB, HIDDEN, TAPS = 50, 64, (0, 2)


def draft_json(**changes: Any) -> dict[str, Any]:
    """A published-style ``config.json``; ``dflash`` entries go to ``dflash_config``."""
    nested = changes.pop("dflash", {})
    raw = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "block_size": 6,
        "dflash_config": {"mask_token_id": 49, "target_layer_ids": list(TAPS), **nested},
    }
    return {k: v for k, v in {**raw, **changes}.items() if v is not None}


def draft_weights(config: DraftConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random float64 weights; norms around 1, everything else wide enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name] = 1 + 0.1 * noise if "norm" in name else 0.15 * noise
    return weights


def make_draft(embedding: Tensor, head: Tensor, *, seed: int = 0, **changes: Any) -> DraftModel:
    """A random draft in memory."""
    config = DraftConfig.from_dict(draft_json(**changes), Path("config.json"))
    return DraftModel(config, draft_weights(config, seed), embedding, head)


def save_draft(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random draft on disk."""
    folder.mkdir(parents=True)
    raw = draft_json(**changes)
    (folder / "config.json").write_text(json.dumps(raw))
    config = DraftConfig.from_dir(folder)
    save_file(draft_weights(config, seed), folder / "model.safetensors")
    return folder


def make_model(kind: str = "qwen3", *, layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """A random Transformers model in float64 whose greedy text does not get stuck."""
    import transformers

    config_class, model_class = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[kind]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**{**settings, **changes})).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def make_target(kind: str = "qwen3", *, taps: Sequence[int] = TAPS, **changes: Any) -> HFTarget:
    """:func:`make_model` as a target."""
    return HFTarget(make_model(kind, **changes), taps)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 48, (length,), generator=generator).tolist()


class TableTarget:
    """A target whose next-token logits are a row of a table: the last token's."""

    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self, table: Tensor) -> None:
        self.table, self.vocab_size = table, len(table)

    def session(self) -> TableSession:
        return TableSession(self.table)


class TableSession:
    def __init__(self, table: Tensor) -> None:
        self._table, self._tokens = table, list[int]()

    @property
    def length(self) -> int:
        return len(self._tokens)

    def forward(self, tokens: Sequence[int], *, rows: int | None = None) -> TargetOutput:
        self._tokens += tokens
        kept = list(tokens)[-(rows or len(tokens)) :]
        return TargetOutput(self._table[kept], torch.zeros(len(tokens), 1))

    def rewind(self, length: int) -> None:
        del self._tokens[length:]


class StubDraft:
    """A draft that is a function ``(position, known, k) -> logits [k, vocab]``."""

    def __init__(self, k: int, logits: Callable[[int, int, int], Tensor]) -> None:
        self.max_speculative_tokens, self._logits = k, logits

    def new_cache(self) -> Any:
        return SimpleNamespace(length=0)

    def append(self, cache: Any, taps: Tensor) -> None:
        cache.length += len(taps)

    def draft_logits(self, cache: Any, known: int, k: int, *, context: int | None = None) -> Tensor:
        return self._logits(cache.length if context is None else context, known, k)


def oracle(text: Sequence[int], k: int, accepted: Callable[[int], int]) -> StubDraft:
    """A draft that knows the whole ``text`` and gets ``accepted(position)`` tokens right."""

    def logits(position: int, _known: int, count: int) -> Tensor:
        rows = torch.zeros(count, VOCAB)
        for i in range(count):
            right = text[position + 1 + i]
            rows[i, right if i < accepted(position) else (right + 1) % VOCAB] = 1 + i
        return rows

    return StubDraft(k, logits)


def every_count(start: int, k: int, length: int = 100) -> dict[int, int]:
    """Accepted counts by position that go through 0..K again and again from ``start``."""
    schedule, count = {}, 0
    while start < length:
        schedule[start] = count
        start, count = start + count + 1, (count + 1) % (k + 1)
    return schedule
