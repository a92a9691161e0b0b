"""The draft as a torch module: many blocks of many texts in one pass, with gradients.

The same computation as :class:`dflash_plugin.reference.model.DraftModel`, position by
position, so that what is trained is what is decoded. There one block at a time grows a
cache; here every text gives its whole context once, and each anchor (the last known
token of one block) sees the part of it before itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..pair import DraftConfig, LayerAttention
from ..reference.model import ACTIVATIONS, check_supported
from ..reference.rope import frequencies, rotate, rotation

Rotary = tuple[Tensor, Tensor]


class TrainableDraft(nn.Module):
    """A DFlash v1 draft; parameters have the published names.

    ``fc.weight`` works on features divided by ``tap_scale``: channels of one size train
    evenly. :meth:`published` folds the scale in.
    """

    tap_scale: Tensor

    def __init__(
        self, config: DraftConfig, embedding: Tensor, head: Tensor, *, seed: int = 0
    ) -> None:
        """Random weights from ``seed``.

        Args:
            config: the draft's; its taps fix the width of ``fc``.
            embedding, head: the target's, each [vocab, hidden]; not trained.

        Raises:
            PairMismatchError: a config that the reference does not implement.
        """
        super().__init__()
        check_supported(config)
        self.config = config
        width = len(config.target_layer_ids) * config.target_hidden_size
        self.fc = nn.Linear(width, config.hidden_size, bias=False)
        self.hidden_norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("tap_scale", torch.ones(width), persistent=False)
        self.register_buffer("_embedding", embedding.detach().clone(), persistent=False)
        self.register_buffer("_head", head.detach().clone(), persistent=False)
        self._inverse, self._rope_factor = frequencies(config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                deviation = parameter.shape[-1] ** -0.5
                nn.init.normal_(parameter, std=deviation, generator=generator)

    def forward(self, taps: Tensor, ids: Tensor, anchors: Tensor) -> Tensor:
        """Logits [texts, anchors, block - 1, vocab] of the tokens after each anchor.

        Args:
            taps: [texts, length, taps * hidden], the target's.
            ids: [texts, length].
            anchors: [texts, anchors], positions of the last known tokens; what is at
                and after an anchor in ``taps`` does not reach its block.
        """
        config = self.config
        texts, length = ids.shape
        size = config.block_size
        blocks = torch.full((*anchors.shape, size), config.mask_token_id, device=ids.device)
        blocks[:, :, 0] = ids.gather(1, anchors)
        x = self._embedding[blocks.flatten(1)] * config.input_embedding_scale
        positions = (anchors[..., None] + torch.arange(size, device=ids.device)).flatten(1)
        context = self.hidden_norm(self.fc(taps.to(x.dtype) / self.tap_scale))
        rotary = self._rotation(positions)
        context_rotary = self._rotation(torch.arange(length, device=ids.device).expand(texts, -1))
        masks = {
            attention: visible_rows(anchors, length, size, attention)[:, None]
            for attention in set(config.layers)
        }
        for layer, attention in zip(self.layers, config.layers, strict=True):
            x = layer(x, rotary, context, context_rotary, masks[attention])
        logits = self.norm(x.view(*anchors.shape, size, -1)[:, :, 1:]) @ self._head.T
        cap = config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def published(self) -> dict[str, Tensor]:
        """Weights by published name, shapes as ``config.tensor_shapes()``."""
        weights = {name: value.detach().clone() for name, value in self.state_dict().items()}
        weights["fc.weight"] /= self.tap_scale
        return weights

    def _rotation(self, positions: Tensor) -> Rotary:
        """Cosine and sine [texts, rows, 1, head_dim / 2] for positions [texts, rows]."""
        cosine, sine = rotation(
            positions.flatten(),
            self._inverse.to(positions.device),
            self._rope_factor,
            self._embedding.dtype,
        )
        shape = (*positions.shape, 1, -1)
        return cosine.view(shape), sine.view(shape)


def visible_rows(anchors: Tensor, length: int, size: int, attention: LayerAttention) -> Tensor:
    """What each block row sees: bool [texts, anchors * size, length + anchors * size].

    Columns are the context, then the rows of all blocks. A block sees the context before
    its anchor and itself, within window and causality as
    :func:`dflash_plugin.reference.model.visible` has them.
    """
    texts, count = anchors.shape
    offsets = torch.arange(size, device=anchors.device)
    rows = (anchors[..., None] + offsets).flatten(1)  # positions
    starts = anchors.repeat_interleave(size, dim=1)
    context = torch.arange(length, device=anchors.device)
    seen_context = context < starts[..., None]
    number = torch.arange(count * size, device=anchors.device) // size
    seen_block = (number[:, None] == number).expand(texts, -1, -1)
    if attention.causal:
        seen_block = seen_block & (rows[:, None, :] <= rows[:, :, None])
    if attention.window is not None:
        seen_context = seen_context & (rows[..., None] - context < attention.window)
        behind = rows[:, :, None] - rows[:, None, :]
        seen_block = seen_block & (behind.abs() < attention.window)
    return torch.cat([seen_context, seen_block], dim=-1)


class _Norm(nn.Module):
    """RMS norm over the last dimension, in float32 or wider."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale).to(x.dtype) * self.weight


class _Attention(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.q_proj = nn.Linear(size, queries, bias=bias)
        self.k_proj = nn.Linear(size, keys, bias=bias)
        self.v_proj = nn.Linear(size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, size, bias=bias)
        self.q_norm = _Norm(head_dim, config.rms_norm_eps)
        self.k_norm = _Norm(head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, context: Tensor, context_rotary: Rotary, mask: Tensor
    ) -> Tensor:
        """Block rows ``x`` [texts, rows, hidden] over context [texts, length, hidden]."""
        queries = self.q_proj(x).unflatten(-1, (self.heads, -1))
        queries = rotate(self.q_norm(queries), *rotary)
        group = self.heads // self.kv_heads
        keys, values = self._keys_values(x, rotary)
        context_keys, context_values = self._keys_values(context, context_rotary)
        keys, values = (
            torch.cat(both, dim=1).transpose(1, 2).repeat_interleave(group, dim=1)
            for both in ((context_keys, keys), (context_values, values))
        )
        mixed = scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        keys = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
        values = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        return rotate(self.k_norm(keys), *rotary), values


class _Mlp(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _Mlp(config)

    def forward(
        self, x: Tensor, rotary: Rotary, context: Tensor, context_rotary: Rotary, mask: Tensor
    ) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, rotary, context, context_rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x))
