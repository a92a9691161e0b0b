"""Random drafts for the replicas of :mod:`local_replicas`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from local_replicas import HIDDEN, VOCAB
from reference_helpers import draft_json, draft_weights
from safetensors.torch import save_file
from torch import Tensor

from dflash_plugin.pair import DraftConfig

TAPS = (0, 2)
DRAFTS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding, causal": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
    },
    "sliding, not causal": {
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 9,
        "is_causal": False,
    },
    "bias": {"attention_bias": True},
    "soft cap and scaled embedding": {
        "dflash": {
            "mask_token_id": 63,
            "target_layer_ids": [3, 0],
            "final_logit_softcapping": 3.0,
            "input_embedding_scale": 2.5,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def _json(**changes: Any) -> dict[str, Any]:
    nested = {"mask_token_id": 63, "target_layer_ids": list(TAPS)}
    return draft_json(**{"hidden_size": HIDDEN, "vocab_size": VOCAB, "dflash": nested, **changes})


def random_draft(seed: int = 0, **changes: Any) -> tuple[DraftConfig, dict[str, Tensor]]:
    """Config and float32 weights."""
    config = DraftConfig.from_dict(_json(**changes), Path("draft/config.json"))
    return config, {name: w.float() for name, w in draft_weights(config, seed).items()}


def save_draft(folder: Path, **changes: Any) -> Path:
    """The same on disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_json(**changes)))
    save_file(random_draft(**changes)[1], folder / "model.safetensors")
    return folder
