"""vLLM 0.20 to 0.24 runs a draft's sliding-window layers as full attention, silently.

Its DFlash model has no window and one causality for all layers: acceptance falls as soon
as a sequence is longer than the window, and before that, as sliding layers are causal.

The layers get their window; each keeps the keys of the whole sequence all the same, so
that sliding and full layers stay in the one KV cache group that the proposer knows (at
the price of the memory that a window would save). Metadata is built once for each window
and causality, by builders that state their own causality: the proposer's is one for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..pair import LayerAttention, layer_attention
from . import Shim

PLAIN = LayerAttention(window=None, causal=False)
"""What the release runs every layer as."""


def layers_of(vllm_config: Any) -> tuple[LayerAttention, ...]:
    """How each layer of the engine's draft attends."""
    draft = vllm_config.speculative_config.draft_model_config
    names = ("num_hidden_layers", "layer_types", "sliding_window", "is_causal", "dflash_config")
    raw = {name: getattr(draft.hf_config, name, None) for name in names}
    return layer_attention(raw, Path(draft.model) / "config.json")


@contextlib.contextmanager
def windows(models: Any, vllm_config: Any) -> Iterator[None]:
    """While it lasts, draft attention is made with its layer's window and causality.

    ``models``: the engine's ``qwen3_dflash`` module, which makes the layers in their order.
    """
    published = models.Attention
    layers = layers_of(vllm_config)
    made: list[Any] = []

    def attention(*args: Any, **kwargs: Any) -> Any:
        how = layers[len(made)]
        new = published(*args, per_layer_sliding_window=how.window, **kwargs)
        new.sliding_window = None  # asked when the KV cache is laid out; the window stays in impl
        new.dflash_attention = how
        if how.window is not None and not how.causal:
            _look_ahead(new, how.window)
        made.append(new)
        return new

    models.Attention = attention
    try:
        yield
    finally:
        models.Attention = published
    if len(made) != len(layers):
        raise RuntimeError(
            f"dflash-plugin: the draft has {len(layers)} layers, {len(made)} were made; "
            "report this, with the engine's version"
        )


def _look_ahead(attention: Any, window: int) -> None:
    """Let a back-end that keeps (behind, ahead) see ahead too, where that is enough."""
    name = attention.attn_backend.get_name()
    if name == "FLASH_ATTN":
        attention.impl.sliding_window = (window - 1, window - 1)
    elif name != "CPU_ATTN":  # its window reaches both ways wherever causal is False
        raise NotImplementedError(
            f"dflash-plugin: a sliding window that is not causal is not known to work with "
            f"attention back-end {name}; use FLASH_ATTN"
        )


def split(groups: Sequence[Any], vllm_config: Any, device: Any) -> list[Any]:
    """The draft's attention groups, divided by window and causality; plain ones unchanged."""
    context = vllm_config.compilation_config.static_forward_context
    parts = []
    for group in groups:
        kinds: dict[LayerAttention, list[str]] = {}
        for name in group.layer_names:
            kinds.setdefault(context[name].dflash_attention, []).append(name)
        block_size = group.get_metadata_builder().kv_cache_spec.block_size
        for how, names in kinds.items():
            spec = dataclasses.replace(group.kv_cache_spec, sliding_window=how.window)
            part = dataclasses.replace(
                group, layer_names=names, kv_cache_spec=spec, metadata_builders=[]
            )
            part.create_metadata_builders(vllm_config, device, kernel_block_size=block_size)
            for builder in part.metadata_builders:
                _state_causality(builder, how.causal)
            parts.append(part)
    return parts


def _state_causality(builder: Any, causal: bool) -> None:
    """Have a metadata builder build for ``causal``, whatever it is asked for."""
    published = builder.build

    def build(common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        common = dataclasses.replace(common_attn_metadata, causal=causal)
        metadata = published(common_prefix_len, common, *args, **kwargs)
        if getattr(metadata, "causal", causal) is not causal:
            raise NotImplementedError(
                f"dflash-plugin: {type(builder).__name__} builds no metadata with causal={causal}, "
                "which the draft needs; choose another attention back-end"
            )
        return metadata

    builder.build = build


def apply(module: ModuleType) -> str:
    """Teach the V1 runner's ``DFlashProposer`` about windows."""
    from vllm.model_executor.models import qwen3_dflash as models

    proposer: Any = module.DFlashProposer
    base: Any = module.SpecDecodeBaseProposer
    published_metadata = proposer.build_per_group_and_layer_attn_metadata

    def plain(self: Any) -> bool:
        return set(layers_of(self.vllm_config)) == {PLAIN}

    def _get_model(self: Any) -> Any:
        if plain(self):
            return base._get_model(self)
        with windows(models, self.vllm_config):
            return base._get_model(self)

    def initialize_attn_backend(self: Any, *args: Any, **kwargs: Any) -> None:
        base.initialize_attn_backend(self, *args, **kwargs)
        if not plain(self):
            self.draft_attn_groups = split(self.draft_attn_groups, self.vllm_config, self.device)

    def build_per_group_and_layer_attn_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The published one insists on causal=False in all layers.
        build = published_metadata if plain(self) else base.build_per_group_and_layer_attn_metadata
        return build(self, *args, **kwargs)

    proposer._get_model = _get_model
    proposer.initialize_attn_backend = initialize_attn_backend
    proposer.build_per_group_and_layer_attn_metadata = build_per_group_and_layer_attn_metadata
    return "sliding-window layers of drafts have their window and causality"


_BASE = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer."
_MODELS = "vllm.model_executor.models.qwen3_dflash:"
_ATTENTION = "vllm.model_executor.layers.attention.attention:Attention."
LAYERS = {
    _MODELS + "DFlashQwen3Attention.__init__": frozenset({"07bdb93f367efce2"}),
    _MODELS + "DFlashQwen3DecoderLayer.__init__": frozenset({"0db457c73bb86273"}),
    _ATTENTION + "__init__": frozenset(
        {
            "1f4ed0e3bef45de9",  # 0.20.0 to 0.20.2
            "479384786a410e7d",  # 0.21.0
            "7b85528d51bf9819",  # 0.22.0 to 0.24.0
        }
    ),
    _ATTENTION + "get_kv_cache_spec": frozenset(
        {
            "88743937e9cd0a02",  # 0.20.0 to 0.23.0
            "cab5f61651cf58d8",  # 0.24.0
        }
    ),
}
"""Sources that make a draft's layers, common to both model runners."""

SHIM = Shim(
    name="draft-windows",
    symptom="drafts with sliding-window layers run as if all were full attention; acceptance "
    "falls with the length of the sequence, silently",
    mechanism="the draft model reads no layer_types; its layers are made with their window, and "
    "the V1 proposer builds metadata for each window and causality",
    removal="when 0.24 and older are no longer supported (0.26 reads layer_types), which "
    "test_each_repair_is_still_needed shows by failing",
    module="vllm.v1.spec_decode.dflash",
    fingerprints={
        **LAYERS,
        "DFlashProposer.build_per_group_and_layer_attn_metadata": frozenset(
            {
                "fc1281049830d5bf",  # 0.20.0 to 0.22.1
                "0ab47f1bac22ee53",  # 0.23.0, 0.24.0
            }
        ),
        _BASE + "initialize_attn_backend": frozenset({"271cae0e912c80b5"}),
        _BASE + "build_per_group_and_layer_attn_metadata": frozenset({"89f1fb1e5cb898db"}),
    },
    apply=apply,
)
