"""The replicas of :mod:`local_replicas` as mlx_lm models, with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from local_replicas import make_target
from mlx_lm.generate import generate_step

# What mlx_lm wants to find in a config.json where Transformers writes something else.
_CHANGES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"num_experts": 4},
    "qwen3.5": {"model_type": "qwen3_5", "full_attention_interval": 3},
    "qwen3-next": {"full_attention_interval": 3, "num_experts": 4, "decoder_sparse_step": 1},
    "gemma4": {"global_head_dim": 16},
}
ARCHITECTURES = ("qwen3", "qwen3-moe", "llama", "qwen3.5", "qwen3-next", "gemma4")


def make_pair(name: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    """A Transformers model, and the mlx_lm model read from what it saved."""
    model = make_target(name, **changes)
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 1e4))
    config.setdefault("num_experts", 0)
    path.write_text(json.dumps({**config, **_CHANGES.get(name, {})}))
    loaded, _config = mlx_lm.utils.load_model(folder)
    return model, loaded


def plain(model: Any, ids: list[int], count: int) -> list[int]:
    """mlx_lm's own greedy text."""
    return [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=count)]
