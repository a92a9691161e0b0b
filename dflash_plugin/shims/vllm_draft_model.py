"""The DFlash draft on vLLM's layers, for releases that have none (0.18, 0.19).

Loaded by vLLM only, inside the engine. Same computation as ``dflash_plugin.reference``:
context tokens enter as keys and values made from the target's taps, straight into the KV
cache; a block [known token, mask, ...] runs through the layers and sees both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..errors import CheckpointError, UnsupportedEngineError
from ..pair import DraftConfig, LayerAttention
from .vllm_register_arguments import read_draft

# Published tensor -> the parameter that holds it, and which part of it.
_STACKED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class DraftAttention(nn.Module):
    """One layer's attention: over the KV cache, with this layer's own window and causality."""

    def __init__(
        self, draft: DraftConfig, layer: LayerAttention, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = draft.head_dim
        self.qkv_proj = QKVParallelLinear(
            draft.hidden_size,
            draft.head_dim,
            draft.num_heads,
            draft.num_kv_heads,
            bias=draft.attention_bias,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            draft.num_heads * draft.head_dim,
            draft.hidden_size,
            bias=draft.attention_bias,
            prefix=f"{prefix}.o_proj",
        )
        self.q_size = self.qkv_proj.num_heads * draft.head_dim
        self.kv_size = self.qkv_proj.num_kv_heads * draft.head_dim
        self.q_norm = RMSNorm(draft.head_dim, eps=draft.rms_norm_eps)
        self.k_norm = RMSNorm(draft.head_dim, eps=draft.rms_norm_eps)
        self.rotary_emb = rope(draft, vllm_config)
        # Not the target's window, which the cache's configuration would bring along.
        cache_config = copy.copy(vllm_config.cache_config)
        cache_config.sliding_window = None
        self.attn = Attention(
            draft.num_heads // ranks,
            draft.head_dim,
            draft.head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=cache_config,
            per_layer_sliding_window=layer.window,
            prefix=f"{prefix}.attn",
            attn_backend=attention_backend(),
        )
        # Slots for every position, window or not: then all layers can share the target's
        # block tables. The window is the kernel's affair.
        self.attn.sliding_window = None
        if layer.window is not None and not layer.causal:
            self.attn.impl.sliding_window = (layer.window - 1, layer.window - 1)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Rows ``x`` [n, hidden] at absolute ``positions`` [n]."""
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.normed(q, self.q_norm), self.normed(k, self.k_norm)
        q, k = self.rotary_emb(positions, q, k)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out

    def store(self, positions: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Put context keys (not normed yet) and values, each [n, kv_size], into the cache."""
        keys, _ = self.rotary_emb(positions, self.normed(keys, self.k_norm), None)
        cache = self.attn.kv_cache
        if isinstance(cache, list):  # one a virtual engine, of which there is one (0.18)
            cache = cache[0]
        if not cache.numel():  # memory is being profiled, before there is a cache
            return
        heads = (-1, self.attn.num_kv_heads, self.head_dim)
        values = values.contiguous().view(heads)
        self.attn.impl.do_kv_cache_update(self.attn, keys.view(heads), values, cache, slots)

    def normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """RMS norm of each head of ``x`` [n, heads * head_dim]."""
        return norm(x.reshape(*x.shape[:-1], -1, self.head_dim)).view(x.shape)


class DraftMLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, draft: DraftConfig, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            draft.hidden_size,
            [draft.intermediate_size] * 2,
            bias=False,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            draft.intermediate_size, draft.hidden_size, bias=False, prefix=f"{prefix}.down_proj"
        )
        self.activation = get_act_and_mul_fn(draft.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [n, hidden]."""
        both, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.activation(both))
        return out


class DraftLayer(nn.Module):
    """Attention and feed-forward with their norms; the residual is carried along."""

    def __init__(
        self, draft: DraftConfig, layer: LayerAttention, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.self_attn = DraftAttention(draft, layer, vllm_config, f"{prefix}.self_attn")
        self.mlp = DraftMLP(draft, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(draft.hidden_size, eps=draft.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(draft.hidden_size, eps=draft.rms_norm_eps)

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(output of the feed-forward layer, residual to add to it)."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions, x)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class DFlashDraftModel(nn.Module):
    """A DFlash v1 draft that shares the embedding and the head of its target.

    ``embed_tokens`` and ``lm_head`` are set by the proposer once both models are loaded.
    """

    embed_tokens: Any
    lm_head: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        spec = vllm_config.speculative_config
        model_config = spec.draft_model_config
        self.draft = draft = read_draft(model_config.model, model_config.revision)
        # Layer names are global in the engine: count on from the target's.
        first = vllm_config.model_config.get_total_num_hidden_layers()
        self.fc = ReplicatedLinear(
            len(draft.target_layer_ids) * draft.target_hidden_size,
            draft.hidden_size,
            bias=False,
            prefix="draft.fc",
        )
        self.hidden_norm = RMSNorm(draft.hidden_size, eps=draft.rms_norm_eps)
        self.layers = nn.ModuleList(
            DraftLayer(draft, layer, vllm_config, f"draft.layers.{first + index}")
            for index, layer in enumerate(draft.layers)
        )
        self.norm = RMSNorm(draft.hidden_size, eps=draft.rms_norm_eps)
        self.logits_processor = LogitsProcessor(
            draft.vocab_size, soft_cap=draft.final_logit_softcapping
        )
        self.context_weight: Tensor | None = None
        self.context_bias: Tensor | None = None

    @property
    def feature_size(self) -> int:
        """Width of the target's taps side by side."""
        return len(self.draft.target_layer_ids) * self.draft.target_hidden_size

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embedded rows [n, hidden], scaled as the draft was trained."""
        embedded: Tensor = self.embed_tokens(input_ids)
        scale = self.draft.input_embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states [n, hidden] of block rows; the context is in the KV cache."""
        x = self.embed_input_ids(input_ids)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        x, _ = self.norm(x, residual)
        return x

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [n, vocab] by the target's head."""
        logits: Tensor = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """Likeliest tokens [n], without gathering logits across ranks."""
        tokens: Tensor = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        return tokens

    def store_context(self, taps: Tensor, positions: Tensor, slots: list[Tensor]) -> None:
        """Keys and values of context tokens, from the target's taps into the KV cache.

        Args:
            taps: [n, feature_size]. positions: [n].
            slots: per layer, where each token goes [n]; -1 leaves it out.
        """
        if self.context_weight is None:
            raise CheckpointError(
                f"{self.draft.source.parent}: the draft's weights were not read",
                hint="load_format dummy cannot be used with dflash",
            )
        features, _ = self.fc(taps)
        both = linear(self.hidden_norm(features), self.context_weight, self.context_bias)
        sizes = [layer.self_attn.kv_size for layer in self.layers for _ in range(2)]
        parts = both.split(sizes, dim=-1)
        for index, layer in enumerate(self.layers):
            keys, values = parts[2 * index : 2 * index + 2]
            layer.self_attn.store(positions, keys, values, slots[index])

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Read the published tensors, all of them and nothing else.

        Raises:
            CheckpointError: names what is missing, unexpected or misshapen.
        """
        expected = self.draft.tensor_shapes()
        parameters = dict(self.named_parameters())
        seen, loaded = set(), set()
        for published, tensor in weights:
            shape = expected.get(published)
            if shape != tuple(tensor.shape):
                what = f"expected {list(shape)}" if shape else "not a tensor of a DFlash draft"
                raise self._wrong(f"{published} is {list(tensor.shape)}, {what}")
            seen.add(published)
            module, _, kind = published.rpartition(".")
            parent, _, leaf = module.rpartition(".")
            stacked, *shard = _STACKED.get(leaf, (leaf,))
            name = f"{parent}.{stacked}.{kind}".lstrip(".")
            parameter = parameters[name]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, tensor, *shard)
            loaded.add(name)
        missing = sorted(set(expected) - seen)
        if missing:
            raise self._wrong(f"{len(missing)} tensors missing, the first is {missing[0]}")
        self._gather_context_weights()
        return loaded

    def _gather_context_weights(self) -> None:
        """One matrix for the keys and values of all layers.

        Now, because some platforms repack a layer's weight after loading.
        """
        projections = [layer.self_attn.qkv_proj for layer in self.layers]
        sizes = [layer.self_attn.q_size for layer in self.layers]
        self.context_weight = torch.cat(
            [p.weight.data[size:] for p, size in zip(projections, sizes, strict=True)]
        )
        if self.draft.attention_bias:
            self.context_bias = torch.cat(
                [p.bias.data[size:] for p, size in zip(projections, sizes, strict=True)]
            )

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.draft.source.parent}: {what}", hint="use the published, unquantised draft"
        )


def rope(draft: DraftConfig, vllm_config: VllmConfig) -> Any:
    """vLLM's rotary embedding for the draft, long enough for every position of a block.

    Raises:
        UnsupportedEngineError: a scaled RoPE ends before the engine's context does.
    """
    spec = vllm_config.speculative_config
    needed = vllm_config.model_config.max_model_len + spec.num_speculative_tokens + 1
    plain = draft.rope["rope_type"] == "default"
    length = max(needed, draft.max_position_embeddings) if plain else draft.max_position_embeddings
    made = get_rope(draft.head_dim, max_position=length, rope_parameters=dict(draft.rope))
    covered = made.cos_sin_cache.shape[0]
    if covered < needed:
        raise UnsupportedEngineError(
            f"{draft.source}: the draft's RoPE covers {covered} positions, expected {needed}",
            hint=f"use --max-model-len {covered - spec.num_speculative_tokens - 1} or less",
        )
    return made


def attention_backend() -> Any:
    """The back-end that can attend in both directions over the KV cache.

    Before 0.20 vLLM cannot choose one by that, and may choose one that cannot.
    """
    if current_platform.is_cpu():
        return AttentionBackendEnum.CPU_ATTN.get_class()
    if current_platform.is_cuda():
        return AttentionBackendEnum.FLASH_ATTN.get_class()
    raise UnsupportedEngineError(
        f"dflash on this vLLM runs on the CPU and on CUDA, not on {current_platform.device_name}",
        hint="use a release with its own dflash",
    )
