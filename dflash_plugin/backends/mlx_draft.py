"""The DFlash draft in MLX: the reference's computation, one sequence at a time.

:mod:`dflash_plugin.reference.model` explains the model. Module names are those of the
published tensors, so that ``nn.quantize`` and ``load_weights`` work as for any model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from .. import draft_math, hub
from ..checkpoint import check_tensors, weight_files
from ..errors import CheckpointError, UsageError
from ..pair import DraftConfig, LayerAttention, check_block

_GROWTH = 256  # positions a buffer grows by at least
_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
}


class DraftCache:
    """Keys and values of the context tokens per layer; a block's own lie behind them."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self._held: list[list[Any]] = [[None, None] for _ in range(layers)]

    def store(self, layer: int, start: int, keys: mx.array, values: mx.array) -> list[Any]:
        """Write [1, heads, n, dim] from position ``start``; all keys and values up to there."""
        end = start + keys.shape[2]
        held = self._held[layer]
        for place, new in enumerate((keys, values)):
            have = 0 if held[place] is None else held[place].shape[2]
            if have < end:
                more = mx.zeros((1, new.shape[1], end - have + _GROWTH, new.shape[3]), new.dtype)
                held[place] = (
                    more if held[place] is None else mx.concatenate([held[place], more], axis=2)
                )
            held[place][:, :, start:end] = new
        return [buffer[:, :, :end] for buffer in held]

    def arrays(self) -> list[Any]:
        """What has been written."""
        return [buffer for held in self._held for buffer in held if buffer is not None]


class _Attention(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, hidden, bias = config.head_dim, config.hidden_size, config.attention_bias
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.q_proj = nn.Linear(hidden, config.num_heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * size, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.scale = size**-0.5

    def keys_values(
        self, x: mx.array, rope: Callable[[mx.array, int], mx.array], start: int
    ) -> tuple[mx.array, mx.array]:
        """[1, kv_heads, n, head_dim] of features or of normed block rows."""
        keys = self.k_norm(_heads(self.k_proj(x), self.kv_heads))
        return rope(keys, start), _heads(self.v_proj(x), self.kv_heads)

    def __call__(
        self, x: mx.array, rope: Callable[[mx.array, int], mx.array], start: int,
        store: Callable[..., Any], mask: mx.array | None,
    ) -> mx.array:  # fmt: skip
        queries = rope(self.q_norm(_heads(self.q_proj(x), self.heads)), start)
        keys, values = store(start, *self.keys_values(x, rope, start))
        mixed = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.scale, mask=mask
        )
        return self.o_proj(mixed.transpose(0, 2, 1, 3).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        wide, hidden = config.intermediate_size, config.hidden_size
        self.gate_proj = nn.Linear(hidden, wide, bias=False)
        self.up_proj = nn.Linear(hidden, wide, bias=False)
        self.down_proj = nn.Linear(wide, hidden, bias=False)
        self._activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(config), _MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DraftModel(nn.Module):
    """A DFlash v1 draft; embedding and head are lent by the target at each call."""

    def __init__(self, config: DraftConfig) -> None:
        """Build with random weights.

        Raises:
            PairMismatchError: an option that is not implemented.
        """
        super().__init__()
        draft_math.check_supported(config)
        self.config = config
        taps = len(config.target_layer_ids) * config.target_hidden_size
        self.fc = nn.Linear(taps, config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = [_Layer(config) for _ in range(config.num_layers)]
        inverse, self._factor = draft_math.frequencies(config)
        self._periods = mx.array([1 / value for value in inverse])
        self.freeze()
        self.eval()

    @classmethod
    def load(cls, draft: str | Path, *, dtype: Any = None, bits: int | None = None) -> DraftModel:
        """Read a local folder or hub repository.

        Args:
            dtype: None keeps the checkpoint's.
            bits: quantise the matrices to so many (2, 3, 4, 5, 6 or 8).

        Raises:
            ModelNotFoundError, DownloadError: no such draft.
            PairMismatchError, CheckpointError: not a draft, or damaged.
            UsageError: no such ``bits``.
        """
        folder = hub.local_folder(str(draft)) or hub.fetch(str(draft), None, weights=True)
        model = cls(DraftConfig.from_dir(folder))
        check_tensors(folder, model.config.tensor_shapes())
        weights: list[tuple[str, Any]] = []
        for path in weight_files(folder):
            try:
                weights += mx.load(str(path)).items()
            except (RuntimeError, OSError) as err:
                raise CheckpointError(
                    f"{path}: not readable ({err})", hint="download the file again"
                ) from err
        model.load_weights(weights)
        if dtype is not None:
            model.set_dtype(dtype)
        if bits is not None:
            model.quantize(bits)
        mx.eval(model.parameters())
        return model

    def quantize(self, bits: int, group_size: int = 64) -> None:
        """Quantise every matrix whose rows the group size divides.

        Raises:
            UsageError: no such ``bits``.
        """
        if bits not in (2, 3, 4, 5, 6, 8):
            raise UsageError(f"draft_bits is {bits}, expected 2, 3, 4, 5, 6 or 8")
        nn.quantize(
            self, group_size=group_size, bits=bits,
            class_predicate=lambda _path, module: isinstance(module, nn.Linear)
            and module.weight.shape[-1] % group_size == 0,
        )  # fmt: skip

    @property
    def dtype(self) -> Any:
        """Of the activations."""
        return self.hidden_norm.weight.dtype

    def new_cache(self) -> DraftCache:
        """An empty context."""
        return DraftCache(self.config.num_layers)

    def append(self, cache: DraftCache, taps: mx.array) -> None:
        """Project context tokens [1, n, taps * hidden]; the length stays for the caller to set."""
        features = self.hidden_norm(self.fc(taps.astype(self.dtype)))
        for i, layer in enumerate(self.layers):
            keys, values = layer.self_attn.keys_values(features, self._rope, cache.length)
            cache.store(i, cache.length, keys, values)

    def logits(
        self,
        cache: DraftCache,
        known: int,
        k: int,
        embed: Callable[[mx.array], mx.array],
        head: Callable[[mx.array], mx.array],
        *,
        model_type: str = "",
    ) -> mx.array:
        """Logits [k, vocab] of the ``k`` tokens after ``known``.

        ``model_type``: the target's, for what the draft's config leaves to it.

        Raises:
            PairMismatchError: ``k`` is more than the block has room for.
        """
        config, start = self.config, cache.length
        check_block(config, k)
        x = embed(mx.array([[known] + [config.mask_token_id] * k]))
        wide, x = x.dtype, x.astype(self.dtype) * config.embedding_scale(model_type)
        masks = {kind: _mask(kind, start, k + 1) for kind in set(config.layers)}
        for i, layer in enumerate(self.layers):

            def store(at: int, keys: mx.array, values: mx.array, i: int = i) -> Any:
                return cache.store(i, at, keys, values)

            mask = masks[config.layers[i]]
            x = x + layer.self_attn(layer.input_layernorm(x), self._rope, start, store, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = head(self.norm(x[:, 1:]).astype(wide))[0]
        cap = config.final_logit_softcapping
        return logits if cap is None else cap * mx.tanh(logits / cap)

    def _rope(self, x: mx.array, start: int) -> mx.array:
        turned = mx.fast.rope(
            x, self.config.head_dim, traditional=False, base=None, scale=1.0, offset=start,
            freqs=self._periods,
        )  # fmt: skip
        return turned if self._factor == 1 else turned * self._factor


def _heads(x: mx.array, count: int) -> mx.array:
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


def _mask(kind: LayerAttention, start: int, count: int) -> mx.array | None:
    """What each row of a block at ``start`` sees, bool [count, start + count]; None is all."""
    if not kind.causal and kind.window is None:
        return None
    behind = mx.arange(start, start + count)[:, None] - mx.arange(start + count)[None]
    seen = behind >= 0 if kind.causal else mx.ones_like(behind).astype(mx.bool_)
    if kind.window is not None:
        seen = seen & (mx.abs(behind) < kind.window)
    return seen
