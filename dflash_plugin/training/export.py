"""A trained draft as a folder in the published format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .draft import TrainableDraft


def export(draft: TrainableDraft, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json`` (the one the draft was made from) and ``model.safetensors``.

    Raises:
        CheckpointError: a weight is not finite in ``dtype``.
    """
    from safetensors.torch import save_file

    weights = {name: value.to(dtype).contiguous() for name, value in draft.published().items()}
    broken = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{broken[0]} is not finite in {dtype}", hint="train again with a lower learning rate"
        )
    name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = {**draft.config.raw, "dtype": name, "torch_dtype": name}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
