"""DFlash's proposer for vLLM 0.18 and 0.19: one draft pass over a block per request.

Loaded by vLLM only, inside the engine. Everything is computed on the device without
waiting for it, so that asynchronous scheduling stays asynchronous.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models import supports_multimodal
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.utils import AttentionGroup

from ..errors import UnsupportedEngineError
from .vllm_block_inputs import Block, block, slots
from .vllm_draft_lora import unwrapped


@dataclass(frozen=True)
class Group:
    """Draft layers with one block table, back-end, window and causality."""

    attention: Any  # vLLM's AttentionGroup
    block_size: int
    causal: bool

    @property
    def table(self) -> int:
        """Index of the KV cache group whose block table these layers use."""
        return int(self.attention.kv_cache_group_id)


class DFlashProposer(EagleProposer):
    """Where the runner has EAGLE's, for its isinstance checks; shares its bookkeeping."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.rows = 1 + self.num_speculative_tokens
        self.runner = runner
        self.supports_mm_inputs = False
        self.groups: list[Group] = []
        runner.use_aux_hidden_state_outputs = True

    def load_model(self, target_model: Any) -> None:
        """Load the draft; embedding and head become the target's."""
        before = self._attention_layers()
        self.model = self._get_model()
        self._draft_attn_layer_names = set(self._attention_layers()) - set(before)
        target = target_model
        if supports_multimodal(target_model):
            target = target_model.get_language_model()
        # Without the target's LoRA adapters, whose rows are those of its own batch.
        self.model.embed_tokens = unwrapped(target.model.embed_tokens)
        # A target with tied embeddings may have no head of its own.
        self.model.lm_head = unwrapped(getattr(target, "lm_head", target.model.embed_tokens))

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Sort the draft's layers into groups that share one attention metadata."""
        layers = self._attention_layers()
        # Builders size their work by the model they are told of: the draft, not the target.
        config = copy.copy(self.vllm_config)
        config.model_config = self.draft_model_config
        found: dict[tuple[int, int | None, bool], AttentionGroup] = {}
        for layer, own in zip(self.model.layers, self.model.draft.layers, strict=True):
            name = layer.self_attn.attn.layer_name
            table = next(
                index
                for index, group in enumerate(kv_cache_config.kv_cache_groups)
                if name in group.layer_names
            )
            key = (table, own.window, own.causal)
            if key not in found:
                spec = kv_cache_config.kv_cache_groups[table].kv_cache_spec
                if isinstance(spec, UniformTypeKVCacheSpecs):
                    spec = spec.kv_cache_specs[name]
                # Only the CPU's builder looks at it, to schedule a window's work.
                spec = dataclasses.replace(spec, sliding_window=own.window)
                found[key] = AttentionGroup(layers[name].get_attn_backend(), [], spec, table)
            found[key].layer_names.append(name)
        self.groups = []
        for (table, _, causal), attention in found.items():
            size = kernel_block_sizes[table] if kernel_block_sizes else None
            attention.create_metadata_builders(config, self.device, kernel_block_size=size)
            block_size = attention.get_metadata_builder().kv_cache_spec.block_size
            self.groups.append(Group(attention, block_size, causal))
        self.draft_attn_groups = [group.attention for group in self.groups]
        self.kv_cache_gid = self.groups[0].table
        self.block_size = self.groups[0].block_size

    def propose(  # noqa: PLR0917 (the engine's)
        self,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        common_attn_metadata: CommonAttentionMetadata,
        num_rejected_tokens_gpu: Tensor | None = None,
        **unused: object,
    ) -> Tensor:
        """Draft K tokens for every request: [requests, K].

        Args:
            target_positions: of this step's tokens [n], or [3, n] with M-RoPE.
            target_hidden_states: their taps [n, feature_size].
            next_token_ids: each request's last known token [requests].
            common_attn_metadata: the target's, of the group ``kv_cache_gid``.
            num_rejected_tokens_gpu: per request, tokens at its end that were rejected.
        """
        if target_hidden_states.shape[-1] != self.model.feature_size:
            raise UnsupportedEngineError(
                f"the target handed out {target_hidden_states.shape[-1]} tap values a token, "
                f"expected {self.model.feature_size}",
                hint="this vLLM cannot tap one of the layers that the draft needs",
            )
        if target_positions.dim() > 1:  # the rows are equal for text
            target_positions = target_positions[0]
        given = common_attn_metadata
        made = block(
            next_token_ids,
            target_positions,
            given.query_start_loc,
            num_rejected_tokens_gpu,
            rows=self.rows,
            mask_token_id=self.model.draft.mask_token_id,
        )
        metadata, places = self._attention_metadata(given, made)
        self.model.store_context(
            target_hidden_states,
            target_positions,
            [places[name][0] for name in self._layer_names()],
        )
        rows = {name: place[1] for name, place in places.items()}
        hidden = self._run(made.input_ids, made.positions, metadata, rows)
        drafted = hidden.view(given.num_reqs, self.rows, -1)[:, 1:]
        tokens = self._greedy_sample(drafted.reshape(-1, hidden.shape[-1]))
        return tokens.view(given.num_reqs, -1)

    @torch.inference_mode()
    def dummy_run(
        self, num_tokens: int, *, is_graph_capturing: bool = False, **unused: object
    ) -> None:
        """The most work that ``num_tokens`` of the target can bring, for memory profiling."""
        if is_graph_capturing:  # the draft has no graphs
            return
        requests = min(num_tokens, self.vllm_config.scheduler_config.max_num_seqs)
        count = requests * self.rows
        zeros = torch.zeros(max(count, num_tokens), dtype=torch.int64, device=self.device)
        taps = torch.zeros(
            num_tokens, self.model.feature_size, dtype=self.dtype, device=self.device
        )
        nowhere = torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device)
        names = self._layer_names()
        self.model.store_context(taps, zeros[:num_tokens], [nowhere] * len(names))
        hidden = self._run(zeros[:count].int(), zeros[:count], None, {})
        self._greedy_sample(hidden.view(requests, self.rows, -1)[:, 1:].flatten(0, 1))

    def _run(
        self, input_ids: Tensor, positions: Tensor, metadata: Any, rows: dict[str, Tensor]
    ) -> Tensor:
        _, count, across_ranks = self._determine_batch_execution_and_padding(
            len(input_ids), use_cudagraphs=False
        )
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=count,
            num_tokens_across_dp=across_ranks,
            slot_mapping=rows,
        ):
            hidden: Tensor = self.model(input_ids, positions)
        return hidden

    def _attention_metadata(
        self, given: CommonAttentionMetadata, made: Block
    ) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
        """Per layer: attention metadata, and slots of the context and of the block's rows."""
        requests, limit = given.num_reqs, self.max_model_len
        starts = torch.arange(requests + 1, dtype=torch.int32) * self.rows
        starts_there = torch.arange(requests + 1, dtype=torch.int32, device=self.device)
        metadata: dict[str, Any] = {}
        places: dict[str, tuple[Tensor, Tensor]] = {}
        for group in self.groups:
            table = given.block_table_tensor
            if group.table != self.kv_cache_gid:
                tables = self.runner.input_batch.block_table
                table = tables[group.table].get_device_tensor(requests)
            place = tuple(
                slots(table, owner, position, group.block_size, limit, valid)
                for owner, position, valid in (
                    (made.context_owner, made.context_positions, made.context_valid),
                    (made.owner, made.positions, None),
                )
            )
            common = CommonAttentionMetadata(
                query_start_loc=starts_there * self.rows,
                query_start_loc_cpu=starts,
                seq_lens=made.seq_lens.clamp(max=limit),
                num_reqs=requests,
                num_actual_tokens=len(made.input_ids),
                max_query_len=self.rows,
                max_seq_len=min(given.max_seq_len + self.rows, limit),
                block_table_tensor=table,
                slot_mapping=place[1],
                causal=group.causal,
            )
            builder = group.attention.get_metadata_builder()
            built = builder.build_for_drafting(common_attn_metadata=common, draft_index=0)
            if built.causal is not group.causal:
                raise UnsupportedEngineError(
                    f"{type(builder).__name__} attends with causal={built.causal}, expected "
                    f"{group.causal}",
                    hint="this vLLM's attention back-end cannot run the draft",
                )
            for name in group.attention.layer_names:
                metadata[name], places[name] = built, (place[0], place[1])
        return metadata, places

    def _attention_layers(self) -> dict[str, Any]:
        found: dict[str, Any] = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        return found

    def _layer_names(self) -> list[str]:
        return [layer.self_attn.attn.layer_name for layer in self.model.layers]
