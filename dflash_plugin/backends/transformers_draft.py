"""The DFlash draft for several rows at once: the reference's computation, batched.

:mod:`dflash_plugin.reference.model` explains the model; this one differs in layout
only: context keys and values lie in buffers with room for the block behind them, so
a step copies nothing, and attention is one fused call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import (
    embedding,
    gelu,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)

from .. import draft_math, hub
from ..checkpoint import check_tensors, weight_files
from ..errors import CheckpointError, PairMismatchError, UsageError
from ..pair import DraftConfig, check_block
from .transformers_cache import Buffer, Places

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class DraftCache:
    """Keys and values of each row's context tokens; a block's own lie behind them."""

    def __init__(self, layers: int, rows: int) -> None:
        self.places = Places(rows)
        self.buffers = [Buffer(self.places) for _ in range(layers)]

    @property
    def lengths(self) -> list[int]:
        """Context tokens of each row."""
        return self.places.lengths

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Drop all other rows."""
        index = torch.tensor(list(rows), device=device)
        for buffer in self.buffers:
            buffer.keep(index)
        self.places.lengths = [self.places.lengths[row] for row in rows]
        self.places.rows = len(rows)


class DFlashDraftModel(nn.Module):
    """A DFlash v1 draft; embedding and head are lent by the target at each call."""

    def __init__(self, config: DraftConfig, weights: Mapping[str, Tensor]) -> None:
        """Build from weights in memory, names and shapes as ``config.tensor_shapes()``.

        Raises:
            PairMismatchError: an option that is not implemented.
        """
        super().__init__()
        draft_math.check_supported(config)
        self.config = config
        self.block_size, self.mask_token_id = config.block_size, config.mask_token_id
        self.target_layer_ids = list(config.target_layer_ids)
        self._linears = nn.ModuleDict()
        joined = _joined(config, weights)
        for name, weight in joined.items():
            if weight.ndim == 2:
                bias = joined.get(name.replace(".weight", ".bias"))
                self._linears[_key(name)] = _linear(weight, bias)
            elif not name.endswith(".bias"):
                self.register_buffer(_key(name), weight)
        inverse, self._rope_factor = draft_math.frequencies(config)
        self._inverse = torch.tensor(inverse, dtype=torch.float64)

    @classmethod
    def from_pretrained(
        cls,
        draft: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        device_map: torch.device | str | None = None,
        **_unused: Any,
    ) -> DFlashDraftModel:
        """Read a local folder or hub repository.

        Args:
            dtype: None or ``auto`` keeps the checkpoint's.
            device, device_map: where the weights go.

        Raises:
            ModelNotFoundError, DownloadError: no such draft.
            PairMismatchError, CheckpointError: not a draft, or damaged.
        """
        folder = hub.local_folder(str(draft)) or hub.fetch(str(draft), None, weights=True)
        config = DraftConfig.from_dir(folder)
        draft_math.check_supported(config)
        check_tensors(folder, config.tensor_shapes())
        wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        place = str(device if device_map in (None, "auto") else device_map)
        weights: dict[str, Tensor] = {}
        for path in weight_files(folder):
            try:
                loaded = load_file(path, device=place)
            except (SafetensorError, OSError) as err:
                raise CheckpointError(
                    f"{path}: not readable ({err})", hint="download the file again"
                ) from err
            for name, tensor in loaded.items():
                if tensor.dtype not in _FLOATS:
                    raise CheckpointError(
                        f"{path}: {name} is {tensor.dtype}, expected 16, 32 or 64 bit floats",
                        hint="use the published, not quantised, draft",
                    )
                kept = tensor.to(wanted) if wanted not in (None, "auto") else tensor
                # Small ones are copied: as views they would keep the whole file in memory.
                weights[name] = kept if kept.ndim == 2 else kept.clone()
        return cls(config, weights)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._weight("norm").dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self._weight("norm").device

    def new_cache(self, rows: int = 1) -> DraftCache:
        """Empty contexts."""
        return DraftCache(self.config.num_layers, rows)

    def check_target(self, vocab: int, hidden: int, dtype: torch.dtype, device: Any) -> None:
        """Refuse a target of another size, dtype or device.

        Raises:
            PairMismatchError: another size.
            UsageError: another dtype or device.
        """
        config = self.config
        if (vocab, hidden) != (config.vocab_size, config.hidden_size):
            raise PairMismatchError(
                f"{config.source}: the target's embedding is [{vocab}, {hidden}], expected "
                f"[vocab_size, hidden_size] = [{config.vocab_size}, {config.hidden_size}]",
                hint="this draft was trained for another target",
            )
        for name, mine, its in (("on", self.device, device), ("in", self.dtype, dtype)):
            if mine != its:
                raise UsageError(
                    f"the draft is {name} {mine}, but the target's embedding is {name} {its}",
                    hint="draft.to(…) the same device and dtype, or let load() do it",
                )

    def append(self, cache: DraftCache, rows: Sequence[int], taps: Tensor) -> None:
        """Project context tokens [rows, n, taps * hidden], the next ones of ``rows``.

        Lengths stay as they are: the caller says how many of them count.
        """
        starts = [cache.lengths[row] for row in rows]
        cache.places.begin(rows[0], starts, taps.shape[1], self.device)
        features = self._norm(self._linear("fc", taps), "hidden_norm")
        rotary = self._rotation(cache.places.host)
        for i, buffer in enumerate(cache.buffers):
            buffer.update(*self._keys_values(i, features, rotary))

    def logits(
        self,
        cache: DraftCache,
        known: Sequence[int],
        k: int,
        embed: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        model_type: str = "",
    ) -> Tensor:
        """Logits [rows, k, vocab] of the ``k`` tokens after each row's ``known``.

        ``model_type``: the target's, for what the draft's config leaves to it.

        Raises:
            PairMismatchError: ``k`` is more than the block has room for.
        """
        config = self.config
        check_block(config, k)
        rows = len(known)
        block = torch.full((rows, k + 1), config.mask_token_id, device=self.device)
        block[:, 0] = torch.tensor(list(known), device=self.device)
        positions = cache.places.begin(0, cache.lengths, k + 1, self.device)
        rotary = self._rotation(cache.places.host)
        masks = self._masks(positions, cache)
        x = embedding(block, embed) * config.embedding_scale(model_type)
        for i, buffer in enumerate(cache.buffers):
            x = x + self._attention(i, x, rotary, buffer, masks[config.layers[i]])
            x = x + self._mlp(i, x)
        logits = head(self._norm(x[:, 1:], "norm"))
        cap = config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def spec_generate(  # noqa: PLR0917 - the published signature
        self,
        target: Any,
        input_ids: Tensor,
        max_new_tokens: int = 2048,
        stop_token_ids: Sequence[int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        block_size: int | Literal["auto"] | None = None,
        attention_mask: Tensor | None = None,
        mask_token_id: int | None = None,
    ) -> Tensor:
        """Prompt and text [rows, length] of a loaded target, by the published signature.

        Args:
            input_ids: [rows, length]; several rows padded on the left need ``attention_mask``.
            stop_token_ids: None goes on to ``max_new_tokens``.
            mask_token_id: must be the draft's own.
        """
        from .transformers_model import spec_generate

        if mask_token_id not in (None, self.mask_token_id):
            raise UsageError(
                f"mask_token_id is {mask_token_id}, but the draft was trained with "
                f"{self.mask_token_id}",
                hint="leave mask_token_id out",
            )
        return spec_generate(
            self, target, input_ids, attention_mask,
            max_tokens=max_new_tokens, eos_token_ids=stop_token_ids or (),
            temperature=temperature, top_p=top_p, top_k=top_k, block_size=block_size,
        )  # fmt: skip

    def _masks(self, positions: Tensor, cache: DraftCache) -> dict[Any, Tensor | None]:
        """What the block's rows see in each kind of layer; None is everything."""
        width = cache.places.width
        ends = positions[:, -1:, None]
        behind = positions[:, :, None] - torch.arange(width, device=self.device)
        ragged = len(set(cache.lengths)) > 1
        masks: dict[Any, Tensor | None] = {}
        for kind in set(self.config.layers):
            seen = torch.arange(width, device=self.device) <= ends
            if kind.causal:
                seen = seen & (behind >= 0)
            if kind.window is not None:
                seen = seen & (behind.abs() < kind.window)
            everything = not (ragged or kind.causal or kind.window is not None)
            masks[kind] = None if everything else seen.expand(behind.shape)[:, None]
        return masks

    def _attention(
        self,
        i: int,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        buffer: Buffer,
        mask: Tensor | None,
    ) -> Tensor:
        config = self.config
        name = f"layers.{i}.self_attn"
        x = self._norm(x, f"layers.{i}.input_layernorm")
        queries = self._linear(name + ".q_proj", x)
        queries = queries.unflatten(-1, (config.num_heads, config.head_dim))
        queries = _rotate(self._norm(queries, name + ".q_norm").transpose(1, 2), *rotary)
        keys, values = buffer.update(*self._keys_values(i, x, rotary))
        group = config.num_heads // config.num_kv_heads
        if group > 1:
            keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self._linear(name + ".o_proj", mixed.transpose(1, 2).flatten(2))

    def _keys_values(
        self, i: int, x: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, n, head_dim] of features or of normed block rows."""
        joined = self._linear(f"layers.{i}.self_attn.kv_proj", x)
        keys, values = joined.unflatten(-1, (2, self.config.num_kv_heads, -1)).unbind(2)
        keys = self._norm(keys, f"layers.{i}.self_attn.k_norm").transpose(1, 2)
        return _rotate(keys, *rotary), values.transpose(1, 2)

    def _mlp(self, i: int, x: Tensor) -> Tensor:
        name = f"layers.{i}.mlp."
        x = self._norm(x, f"layers.{i}.post_attention_layernorm")
        gate, up = self._linear(name + "gate_up_proj", x).chunk(2, dim=-1)
        return self._linear(name + "down_proj", _ACTIVATIONS[self.config.hidden_act](gate) * up)

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self._buffers[_key(name + ".weight")]
        return weight

    def _linear(self, name: str, x: Tensor) -> Tensor:
        made: Tensor = self._linears[_key(name + ".weight")](x)
        return made

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm over the last dimension, in float32 or wider."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = rms_norm(wide, (x.shape[-1],), eps=self.config.rms_norm_eps)
        return scaled.to(x.dtype) * self._weight(name)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [rows, 1, n, head_dim / 2]; angles in float64, then rounded once."""
        wide = torch.promote_types(self.dtype, torch.float32)
        angles = positions.to(torch.float64)[:, None, :, None] * self._inverse
        turn = (angles.cos() * self._rope_factor, angles.sin() * self._rope_factor)
        return turn[0].to(self.device, wide), turn[1].to(self.device, wide)


def _key(name: str) -> str:
    """A tensor's name as torch allows it for an attribute."""
    return name.replace(".", "__")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of this matrix [out, in] and bias, without making another first."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def _joined(config: DraftConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with keys and values of a layer as one matrix, gate and up as another."""
    made = dict(weights)
    parts = [".weight", ".bias"] if config.attention_bias else [".weight"]
    for i in range(config.num_layers):
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        for part in parts:
            two = [made.pop(f"{attention}{kind}_proj{part}") for kind in "kv"]
            made[f"{attention}kv_proj{part}"] = torch.cat(two)
        two = [made.pop(f"{mlp}{kind}_proj.weight") for kind in ("gate", "up")]
        made[f"{mlp}gate_up_proj.weight"] = torch.cat(two)
    return made


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn ``x`` [rows, heads, n, head_dim]; dimension i pairs with i + head_dim / 2."""
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x.dtype)
