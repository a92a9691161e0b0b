"""Drafts of the `speculators` package (vLLM project) to the published format, and back.

Its DFlash weights have the published names and are taken as they are; embedding and head are
the target's in both. The config differs: the draft's layers are under
``transformer_layer_config``, and ``aux_hidden_state_layer_ids`` counts the embedding's output
as 0, so our tap i is its i + 1. Written against speculators 0.9.0 (``models/dflash/config.py``
and ``convert/dflash/converter.py``); nothing of that package is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ...cache import staged_dir
from ...checkpoint import check_tensors, weight_files
from ...config_file import read_config
from ...errors import PairMismatchError
from ...pair import DraftConfig, TargetConfig

_OURS_ALONE = ("architectures", "auto_map", "block_size", "dflash_config", "num_target_layers")
_TARGETS = {"embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight"}
_TARGETS |= {"verifier_norm.weight", "t2d", "d2t"}
VERSION = "0.9.0"


def is_speculators(folder: Path) -> bool:
    """Whether the folder's config is one of that package."""
    return "speculators_model_type" in read_config(folder)


def to_published(source: Path, out: Path) -> None:
    """A speculators DFlash draft as a folder in the published format.

    Raises:
        PairMismatchError: another kind of draft, or one with a vocabulary of its own or that
            drafts from the anchor: no published field says so.
        CheckpointError: tensors are missing, extra or misshapen.
    """
    raw = read_config(source)
    path = source / "config.json"
    layers = raw.get("transformer_layer_config")
    if raw.get("speculators_model_type") != "dflash" or not isinstance(layers, Mapping):
        kind = raw.get("speculators_model_type")
        raise PairMismatchError(
            f"{path}: speculators_model_type is {kind!r}, expected 'dflash'",
            hint="only its DFlash (v1) drafts can be converted",
        )
    vocab = layers.get("vocab_size")
    for name, default, wanted in (
        ("draft_vocab_size", vocab, vocab), ("sample_from_anchor", False, False),
    ):  # fmt: skip
        if raw.get(name, default) != wanted:
            raise PairMismatchError(
                f"{path}: {name} is {raw[name]!r}, expected {wanted!r}",
                hint="the published format has no such drafts; serve it with speculators' own",
            )
    taps = raw.get("aux_hidden_state_layer_ids")
    if not isinstance(taps, list) or not all(type(tap) is int and tap >= 1 for tap in taps):
        raise PairMismatchError(
            f"{path}: aux_hidden_state_layer_ids is {taps!r}, expected layer numbers from 1"
        )
    config: dict[str, Any] = {
        **layers,
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": raw.get("block_size", 8),
        "dflash_config": {
            "mask_token_id": raw.get("mask_token_id"),
            "target_layer_ids": [tap - 1 for tap in taps],
        },
    }
    if raw.get("sliding_window_non_causal"):
        config["is_causal"] = False
    weights = {
        name: value
        for file in weight_files(source)
        for name, value in load_file(file).items()
        if name not in _TARGETS
    }
    shape = DraftConfig.from_dict(config, path)
    with _written(out, config, weights) as staging:
        check_tensors(staging, shape.tensor_shapes())


def from_published(source: Path, target: Path, out: Path, *, target_name: str) -> None:
    """A published draft as speculators' ``from_pretrained`` reads it.

    Args:
        target: the target's folder, for its architecture and depth.
        target_name: what it calls the verifier: a hub id or a folder.

    Raises:
        PairMismatchError: a tap on the target's last layer, which that package keeps apart.
    """
    shape, facts = DraftConfig.from_dir(source), TargetConfig.from_dir(target)
    if facts.num_layers - 1 in shape.target_layer_ids:
        raise PairMismatchError(
            f"{shape.source}: a tap on the target's last layer {facts.num_layers - 1}, which "
            "speculators cannot have",
            hint="train the draft with other taps",
        )
    layers = {k: v for k, v in shape.raw.items() if k not in _OURS_ALONE}
    sliding = [one for one in shape.layers if one.window is not None]
    config = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "speculators_version": VERSION,
        "transformer_layer_config": layers,
        "draft_vocab_size": shape.vocab_size,
        "block_size": shape.block_size,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in shape.target_layer_ids],
        "mask_token_id": shape.mask_token_id,
        "sliding_window_non_causal": bool(sliding) and not any(one.causal for one in sliding),
        "sample_from_anchor": False,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": shape.max_speculative_tokens}
            ],
            "verifier": {
                "name_or_path": target_name,
                "architectures": read_config(target).get("architectures", []),
            },
        },
    }
    check_tensors(source, shape.tensor_shapes())
    weights = {k: v for file in weight_files(source) for k, v in load_file(file).items()}
    with _written(out, config, weights):
        pass


@contextmanager
def _written(out: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that becomes ``out`` if the block succeeds."""
    with staged_dir(out) as staging:
        save_file(dict(weights), staging / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=1) + "\n"
        (staging / "config.json").write_text(text, encoding="utf-8")
        yield staging
