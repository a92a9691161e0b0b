"""The DFlash draft: one forward pass over a block, conditioned on target features.

Paper: arXiv 2602.06036, section 3. Same computation as vLLM's
``qwen3_dflash.py`` and SGLang's ``models/dflash.py``, one sequence at a time.

Every context token (all tokens before the last known one) gives one feature:
``hidden_norm(fc(taps))``. Each layer projects these features to keys and
values directly, without its input norm; they never pass through a layer, so
the keys and values of a token are final once its taps are known. The block
[last known token, mask, mask, …] runs through the layers as usual, its
queries seeing context and block; row i predicts the token AT its position
(not the next one), so rows 1.. are the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from ..checkpoint import check_tensors, weight_files
from ..draft_math import check_supported as check_supported  # noqa: PLC0414 (re-exported)
from ..errors import CheckpointError, PairMismatchError
from ..pair import DraftConfig, LayerAttention, check_block
from .rope import frequencies, rotate, rotation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
}


class DraftCache:
    """Keys and values of the context tokens, per layer [length, kv_heads, head_dim].

    Token i of the context is at position i. A block's own keys and values never
    enter: they are those of masks.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def append(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Add keys and values of further tokens, one pair per layer."""
        if self._layers:
            layers = [
                (torch.cat([old_k, k]), torch.cat([old_v, v]))
                for (old_k, old_v), (k, v) in zip(self._layers, layers, strict=True)
            ]
        self._layers = layers
        self.length = len(layers[0][0])

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self._layers = [(k[:length], v[:length]) for k, v in self._layers]
        self.length = min(self.length, length)

    def layer(self, index: int, length: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of one layer, first ``length`` tokens; None when empty."""
        if not self._layers:
            return None
        keys, values = self._layers[index]
        return keys[:length], values[:length]


class DraftModel:
    """A DFlash v1 draft that shares the embedding and the head of its target."""

    def __init__(
        self,
        config: DraftConfig,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        head: Tensor,
    ) -> None:
        """Build from weights that are already in memory.

        Args:
            config: the draft's.
            weights: by published name, shapes as ``config.tensor_shapes()``.
            embedding, head: the target's, each [vocab, hidden].

        Raises:
            PairMismatchError: a config this module does not implement, or a
                target of another size.
        """
        check_supported(config)
        expected = (config.vocab_size, config.hidden_size)
        for name, shared in (("embedding", embedding), ("head", head)):
            if tuple(shared.shape) != expected:
                raise PairMismatchError(
                    f"{config.source}: the target's {name} is {list(shared.shape)}, expected "
                    f"[vocab_size, hidden_size] = {list(expected)}",
                    hint="this draft was trained for another target",
                )
        some = weights["fc.weight"]
        self.config = config
        self.dtype, self.device = some.dtype, some.device
        self._weights = weights
        self._embedding = embedding.detach().to(some.device, some.dtype)
        self._head = head.detach().to(some.device, some.dtype)
        self._activation = ACTIVATIONS[config.hidden_act]
        inverse, self._rope_factor = frequencies(config)
        self._inverse_frequencies = inverse.to(some.device)

    @classmethod
    def load(
        cls,
        folder: Path,
        embedding: Tensor,
        head: Tensor,
        *,
        model_type: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> DraftModel:
        """Read ``config.json`` and the safetensors files of ``folder``.

        ``model_type``: the target's, for what the draft's config leaves to it.

        Raises:
            ModelNotFoundError: no such folder or file.
            PairMismatchError: see ``__init__``.
            CheckpointError: a tensor is missing, extra, misshapen or not of
                floats, or a file is truncated; the message names it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = DraftConfig.from_dir(folder).for_target(model_type)
        check_supported(config)
        check_tensors(folder, config.tensor_shapes())
        weights: dict[str, Tensor] = {}
        for path in weight_files(folder):
            try:
                loaded = load_file(path, device=str(device))
            except (SafetensorError, OSError) as err:
                raise CheckpointError(
                    f"{path}: not readable ({err})", hint="download the file again"
                ) from err
            for name, tensor in loaded.items():
                if tensor.dtype not in (
                    torch.bfloat16, torch.float16, torch.float32, torch.float64
                ):  # fmt: skip
                    raise CheckpointError(
                        f"{path}: {name} is {tensor.dtype}, expected 16, 32 or 64 bit floats",
                        hint="use the published, not quantised, draft",
                    )
                weights[name] = tensor.to(dtype)
        return cls(config, weights, embedding, head)

    @property
    def max_speculative_tokens(self) -> int:
        """The most tokens one block can draft: block size - 1."""
        return self.config.max_speculative_tokens

    def new_cache(self) -> DraftCache:
        """An empty context."""
        return DraftCache()

    def append(self, cache: DraftCache, taps: Tensor) -> None:
        """Add the next context tokens to ``cache``.

        Args:
            taps: [n, taps * target hidden], outputs of the target's layers
                ``target_layer_ids`` side by side in that order, for the tokens
                at positions ``cache.length`` and following.
        """
        config, w = self.config, self._weights
        features = self._norm(taps.to(self.device, self.dtype) @ w["fc.weight"].T, "hidden_norm")
        rotary = self._rotation(cache.length, len(features))
        cache.append([self._keys_values(i, features, rotary) for i in range(config.num_layers)])

    def draft_logits(
        self, cache: DraftCache, known: int, k: int, *, context: int | None = None
    ) -> Tensor:
        """Logits [k, vocab] of the ``k`` tokens after ``known``.

        Args:
            cache: the context.
            known: the last known token; its position is the context's length.
            k: 1 .. block size - 1.
            context: use only so many tokens of ``cache``; None means all.

        Raises:
            PairMismatchError: ``k`` is more than the block has room for.
        """
        config = self.config
        check_block(config, k)
        start = cache.length if context is None else context
        block = torch.tensor([known] + [config.mask_token_id] * k, device=self.device)
        x = self._embedding[block] * config.input_embedding_scale
        rotary = self._rotation(start, len(block))
        for i in range(config.num_layers):
            name = f"layers.{i}."
            x = x + self._attention(
                i, self._norm(x, name + "input_layernorm"), rotary, cache.layer(i, start), start
            )
            x = x + self._mlp(i, self._norm(x, name + "post_attention_layernorm"))
        logits = self._norm(x[1:], "norm") @ self._head.T
        cap = config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _attention(
        self,
        index: int,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        """Block rows ``x`` [n, hidden] at positions ``start``.. over context and block."""
        config, name = self.config, f"layers.{index}.self_attn."
        queries = self._linear(name + "q_proj", x).view(len(x), config.num_heads, -1)
        queries = rotate(self._norm(queries, name + "q_norm"), *rotary)
        keys, values = self._keys_values(index, x, rotary)
        if context is not None:
            keys, values = torch.cat([context[0], keys]), torch.cat([context[1], values])
        group = config.num_heads // config.num_kv_heads
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))

        positions = torch.arange(start + len(x), device=self.device)
        mask = visible(positions[start:], positions, config.layers[index])
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * config.head_dim**-0.5
        scores = scores.to(_wide(self.dtype)).masked_fill(~mask, -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(self.dtype), values)
        return self._linear(name + "o_proj", mixed.flatten(1))

    def _keys_values(
        self, index: int, x: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [n, kv_heads, head_dim] of features or of normed block rows."""
        name, kv_heads = f"layers.{index}.self_attn.", self.config.num_kv_heads
        keys = self._linear(name + "k_proj", x).view(len(x), kv_heads, -1)
        values = self._linear(name + "v_proj", x).view(len(x), kv_heads, -1)
        return rotate(self._norm(keys, name + "k_norm"), *rotary), values

    def _mlp(self, index: int, x: Tensor) -> Tensor:
        name = f"layers.{index}.mlp."
        gate = self._activation(self._linear(name + "gate_proj", x))
        return self._linear(name + "down_proj", gate * self._linear(name + "up_proj", x))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self._weights[name + ".weight"].T
        bias = self._weights.get(name + ".bias")
        return y if bias is None else y + bias

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm over the last dimension, in float32 or wider."""
        wide = x.to(_wide(x.dtype))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale).to(x.dtype) * self._weights[name + ".weight"]

    def _rotation(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + count, device=self.device)
        return rotation(positions, self._inverse_frequencies, self._rope_factor, _wide(self.dtype))


def visible(queries: Tensor, keys: Tensor, attention: LayerAttention) -> Tensor:
    """Which key positions [k] each query position [q] sees: bool [q, k]."""
    behind = queries[:, None] - keys[None, :]
    seen = torch.ones_like(behind, dtype=torch.bool)
    if attention.causal:
        seen &= behind >= 0
    if attention.window is not None:
        seen &= behind.abs() < attention.window
    return seen


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where that is the working precision."""
    return torch.promote_types(dtype, torch.float32)
