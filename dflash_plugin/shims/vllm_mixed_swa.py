"""The V1 proposer of vLLM 0.25 - 0.33 with drafts whose layers are in several KV cache groups.

It knows one group and one causality. A draft that mixes sliding and full layers has several
of both; one with full layers alone has several groups beside a target with fewer layers of
another kind (gpt-oss: groups are cut to the size of the smallest). Layers are sorted into
parts that agree on both, and each of the proposer's own methods that uses a block table or
a slot mapping runs once per part, seeing that part alone.

The refusals this makes void are lifted by ``vllm_mixed_swa_model`` (only where this is in
place) and ``vllm_mixed_swa_config``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import Shim


def mixed(config: Any) -> bool:
    """Whether a draft's config has sliding and other layers; the releases' own criterion."""
    kinds = getattr(config, "layer_types", None) or ()
    sliding = [kind for kind in kinds if kind == "sliding_attention"]
    return 0 < len(sliding) < len(kinds)


class OneKind:
    """A mixed draft's config in which every layer is of one layer's kind."""

    def __init__(self, config: Any, layer: int) -> None:
        self._config = config
        self.layer_types = [config.layer_types[layer]] * len(config.layer_types)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


@dataclass
class Part:
    """Layers of one KV cache group, causality and window.

    ``attributes``: the proposer's, by name, while it works on this part.
    """

    causal: bool
    attributes: dict[str, Any]
    metadata: Any = field(default=None)  # the current step's, common to the part's layers


def apply(module: Any) -> str:
    """Put a subclass in the place of ``DFlashProposer``; for other drafts it adds nothing."""
    import torch
    from vllm.model_executor.models import qwen3_dflash

    base: Any = module.DFlashProposer

    class DFlashProposer(base):
        def __init__(self, vllm_config: Any, device: Any, runner: Any = None) -> None:
            super().__init__(vllm_config, device, runner)
            self._parts: list[Part] = []
            self._part_runner = runner
            self._part_of: dict[str, Part] = {}

        def initialize_attn_backend(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
            config = self.draft_model_config.hf_config
            groups = {
                name: gid
                for gid, group in enumerate(kv_cache_config.kv_cache_groups)
                for name in group.layer_names
            }
            mixture = mixed(config)
            if not mixture and len({groups[name] for name in self._draft_attn_layer_names}) == 1:
                super().initialize_attn_backend(kv_cache_config, *args, **kwargs)
                return
            parts: dict[tuple[int, bool, int | None], list[str]] = {}
            for i, layer in enumerate(self._draft_layers()):
                name = layer.self_attn.attn.layer_name
                # Asked of a config without a mixture: the release resolves those only.
                kind = OneKind(config, i) if mixture else config
                window, causal = qwen3_dflash._resolve_layer_attention(kind, i)
                parts.setdefault((groups[name], bool(causal), window), []).append(name)
            slots = ("_context_slot_mapping_buffer", "_slot_mapping_buffer")
            self._parts = []
            for (_, causal, _), names in parts.items():
                part = Part(causal, {"_draft_attn_layer_names": set(names)})
                # Buffers of its own: kernels of the same step read those of all parts.
                part.attributes |= {slot: torch.zeros_like(getattr(self, slot)) for slot in slots}
                with self._as(part):
                    super().initialize_attn_backend(kv_cache_config, *args, **kwargs)
                    made = ("draft_attn_groups", "kv_cache_gid", "block_size")
                    part.attributes |= {attribute: getattr(self, attribute) for attribute in made}
                self._parts.append(part)
                self._part_of |= dict.fromkeys(names, part)
            # As before the parts: the runner hands over the first one's block table.
            self.kv_cache_gid = self._parts[0].attributes["kv_cache_gid"]
            self.block_size = self._parts[0].attributes["block_size"]
            self.draft_attn_groups = [
                group for part in self._parts for group in part.attributes["draft_attn_groups"]
            ]
            module.logger.info(
                "dflash-plugin: draft in several parts on the V1 runner: %s",
                "; ".join(
                    f"{len(names)} layers, KV group {gid}, window {window}, "
                    + ("causal" if causal else "bidirectional")
                    for (gid, causal, window), names in parts.items()
                ),
            )

        def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> Any:
            if not self._parts:
                return super().set_inputs_first_pass(*args, **kwargs)
            common = kwargs.pop("cad")
            for part in reversed(self._parts):  # the first one's results are returned
                with self._as(part):
                    cad = common
                    if part is not self._parts[0]:
                        tables = self._part_runner.input_batch.block_table
                        cad = copy.copy(common)
                        cad.block_table_tensor = tables[self.kv_cache_gid].get_device_tensor(
                            common.num_reqs
                        )
                    tokens, indices, metadata = super().set_inputs_first_pass(
                        *args, cad=cad, **kwargs
                    )
                part.metadata = copy.copy(metadata)
                part.metadata.causal = part.causal
            return tokens, indices, metadata

        def build_per_group_and_layer_attn_metadata(self, *args: Any, **kwargs: Any) -> Any:
            if not self._parts:
                return super().build_per_group_and_layer_attn_metadata(*args, **kwargs)
            per_group: list[Any] = []
            per_layer: dict[str, Any] = {}
            for part in self._parts:
                with self._as(part):
                    # Past DFlash's own, which asserts one causality for all layers.
                    groups, layers = super(base, self).build_per_group_and_layer_attn_metadata(
                        part.metadata
                    )
                for name, built in layers.items():
                    assert getattr(built, "causal", None) is part.causal, (
                        f"the attention back-end of {name} does not support causal={part.causal}"
                    )
                per_group += groups
                per_layer |= layers
            return per_group, per_layer

        def build_model_inputs_first_pass(
            self, num_tokens: int, num_input_tokens: int, mm_embed_inputs: Any
        ) -> Any:
            if not self._parts:
                return super().build_model_inputs_first_pass(
                    num_tokens, num_input_tokens, mm_embed_inputs
                )
            context = self._dflash_num_context
            self.model.precompute_and_store_context_kv(
                self._dflash_hidden_states,
                self._context_positions_buffer[:context],
                [
                    self._part_of[layer.self_attn.attn.layer_name].attributes[
                        "_context_slot_mapping_buffer"
                    ][:context]
                    for layer in self._draft_layers()
                ],
            )
            inputs = {
                "input_ids": self.input_ids[:num_input_tokens],
                "positions": self._get_positions(num_input_tokens),
                "inputs_embeds": None,
            }
            return inputs, num_input_tokens

        def _get_slot_mapping(self, num_tokens: int, slot_mapping: Any = None) -> Any:
            if not self._parts:
                return super()._get_slot_mapping(num_tokens, slot_mapping)
            mappings: dict[str, Any] = {}
            for part in self._parts:
                with self._as(part):
                    own = part.metadata.slot_mapping if slot_mapping is not None else None
                    mappings |= super()._get_slot_mapping(num_tokens, own)
            return mappings

        def _draft_layers(self) -> Any:
            model = self.model
            return (model.unwrap() if hasattr(model, "unwrap") else model).model.layers

        @contextlib.contextmanager
        def _as(self, part: Part) -> Iterator[None]:
            """With the part's attributes in the place of the proposer's."""
            kept = {name: getattr(self, name) for name in part.attributes}
            self.__dict__.update(part.attributes)
            try:
                yield
            finally:
                self.__dict__.update(kept)

    DFlashProposer.__qualname__ = DFlashProposer.__name__ = base.__name__
    DFlashProposer.__module__ = module.__name__
    module.DFlashProposer = DFlashProposer
    return "the V1 proposer takes drafts whose layers are in several KV cache groups"


_MODEL = "vllm.model_executor.models.qwen3_dflash:DFlashQwen3Model"
_BASE = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
SHIM = Shim(
    name="mixed-swa",
    symptom="drafts that mix sliding-window and full layers are refused on the V1 model runner, "
    "which is the only one on the CPU; so are others whose layers are in several KV cache groups, "
    "as beside gpt-oss ('All drafting layers should belong to the same kv cache group')",
    mechanism="the proposer has one KV cache group and one causality; its methods run once for "
    "each set of layers that has both in common",
    removal="when the V1 proposer takes several KV cache groups, or the V1 runner is gone, which "
    "test_mixed_swa_is_still_needed shows by failing",
    module="vllm.v1.spec_decode.dflash",
    fingerprints={
        "DFlashProposer.set_inputs_first_pass": frozenset(
            {
                "fc2b912a1e650a7f",  # 0.25.0 - 0.29.0
                "42379db3133aeec5",  # 0.30.0 - 0.33.0
            }
        ),
        "DFlashProposer.build_model_inputs_first_pass": frozenset(
            {"556c17905cad87e8"}  # 0.25.0 - 0.33.0
        ),
        "DFlashProposer.build_per_group_and_layer_attn_metadata": frozenset(
            {"0ab47f1bac22ee53"}  # 0.25.0 - 0.33.0
        ),
        "DFlashProposer.dummy_run": frozenset(
            {
                "1a421e4cc5b8b3a3",  # 0.25.0 - 0.30.0
                "81db8e00b435e9c7",  # 0.31.0 - 0.33.0
            }
        ),
        f"{_BASE}.initialize_attn_backend": frozenset(
            {
                "271cae0e912c80b5",  # 0.25.0 - 0.26.0
                "7427e8f1250ab1af",  # 0.27.0 - 0.30.0
                "ad238b7b9fac5f9c",  # 0.31.0
                "b5b9d48288538e1e",  # 0.32.0, 0.33.0
            }
        ),
        f"{_BASE}.validate_same_kv_cache_group": frozenset(
            {
                "7082a65de6c30bf3",  # 0.25.0 - 0.30.0
                "90f425974dc8afeb",  # 0.31.0 - 0.33.0
            }
        ),
        f"{_BASE}.build_per_group_and_layer_attn_metadata": frozenset(
            {
                "89f1fb1e5cb898db",  # 0.25.0 - 0.31.0
                "e392a7d9b6d6044b",  # 0.32.0, 0.33.0
            }
        ),
        f"{_BASE}._get_slot_mapping": frozenset({"74a4feec84aff840"}),  # 0.25.0 - 0.33.0
        f"{_BASE}.propose": frozenset(
            {
                "fd1ccd2d05a52959",  # 0.25.0 - 0.29.0
                "0164aa5ab8084b66",  # 0.30.0 - 0.33.0
            }
        ),
        "vllm.v1.worker.block_table:BlockTable.get_device_tensor": frozenset(
            {"fe707b7a52a275a4"}  # 0.25.0 - 0.33.0
        ),
        "vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__": frozenset(
            {"9869c0f6c9dd305a"}  # 0.25.0 - 0.33.0
        ),
        f"{_MODEL}.precompute_and_store_context_kv": frozenset(
            {
                "4cc82159034838e0",  # 0.25.0 - 0.30.0
                "afad4d4f452933ae",  # 0.31.0 - 0.33.0
            }
        ),
    },
    apply=apply,
)
