"""``data/architectures.toml`` -> shapes of published models: parameters and memory.

Everything here is arithmetic on facts; a fact that is not known makes what needs it None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .pair_config import FULL, SLIDING
from .toml_table import Table, read_toml, unique

LINEAR = "linear_attention"
PATH = Path(__file__).parent / "data" / "architectures.toml"
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "mxfp4": 4.25 / 8, "int4": 4.5 / 8}
"""Bytes per weight; the 4-bit formats with a scale per 32 weights (8 and 16 bits wide)."""
GIB = 2.0**30
_KV_BYTES = 2  # engines keep keys and values in 16 bits unless told otherwise
_STATE_BYTES = 4  # recurrent states are kept in float32

_TARGET_COUNTS = (
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "global_head_dim",
    "num_global_key_value_heads",
    "named_parameters",
)
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_LINEAR = (
    "linear_num_value_heads",
    "linear_num_key_heads",
    "linear_value_head_dim",
    "linear_key_head_dim",
    "linear_conv_kernel_dim",
)
_MLA = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class Target:
    """A target's shape in the words of its ``config.json``; None: unknown, or not there.

    ``experts``, ``linear`` and ``mla`` are empty where the model has none (or, for a hybrid's
    ``linear``, where its heads are unknown). ``weights``: dtype of the published checkpoint,
    by ``dtype`` and, where they differ, ``experts``.
    """

    id: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    intermediate_size: int | None
    num_key_value_heads: int | None
    head_dim: int | None
    sliding_window: int | None
    global_head_dim: int | None
    num_global_key_value_heads: int | None
    named_parameters: int | None
    unit: tuple[str, ...]
    tie_word_embeddings: bool | None
    attention_k_eq_v: bool
    attention_sinks: bool
    attn_output_gate: bool
    final_logit_softcapping: float | None
    experts: Mapping[str, int]
    linear: Mapping[str, int]
    mla: Mapping[str, int]
    rope: Mapping[str, Any]
    weights: Mapping[str, str]
    source: str

    def kind(self, layer: int) -> str:
        """How target layer ``layer`` attends: ``full_attention``, ``sliding_`` or ``linear_``."""
        return self.unit[layer % len(self.unit)]

    def count(self, kind: str) -> int:
        """Layers of that kind."""
        return sum(self.kind(layer) == kind for layer in range(self.num_hidden_layers))

    def _heads(self, kind: str) -> tuple[int, int]:
        """KV heads and their size in a layer that is not linear attention."""
        heads, size = self.num_key_value_heads or 0, self.head_dim or 0
        if kind == FULL and self.global_head_dim is not None:
            return self.num_global_key_value_heads or heads, self.global_head_dim
        return heads, size

    def parameters(self) -> tuple[int, int] | None:
        """Matrices of the text model as (all but routed experts, routed experts).

        Left out: norms, biases, vision towers, MTP heads. None: the shape is not known.
        """
        if LINEAR in self.unit and not self.linear:
            return (self.named_parameters, 0) if self.named_parameters else None
        width, rest, routed = self.hidden_size, 0, 0
        # Where it is not known whether they are one, embedding and head are counted as two.
        rest += self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        for layer in range(self.num_hidden_layers):
            rest += self._attention(self.kind(layer))
            experts = self.experts
            sparse = bool(experts) and layer >= experts["first_dense"]
            if not sparse or experts["beside_dense"]:
                rest += 3 * width * (self.intermediate_size or 0)
            if sparse:
                one = 3 * width * experts["moe_intermediate_size"]
                routed += experts["num_experts"] * one
                rest += experts["shared_experts"] * one + width * experts["num_experts"]
        return rest, routed

    def _attention(self, kind: str) -> int:
        width, heads = self.hidden_size, self.num_attention_heads
        if kind == LINEAR:
            keys = self.linear["linear_num_key_heads"] * self.linear["linear_key_head_dim"]
            v_heads = self.linear["linear_num_value_heads"]
            values = v_heads * self.linear["linear_value_head_dim"]
            # q, k, v and gate; two numbers a value head; the way out
            return width * (2 * keys + 2 * values + 2 * v_heads) + values * width
        if self.mla:
            rope, nope, v = (
                self.mla[k] for k in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
            )
            q_rank, kv_rank = self.mla["q_lora_rank"], self.mla["kv_lora_rank"]
            queries = width * q_rank + q_rank * heads * (nope + rope)
            keys = width * (kv_rank + rope) + kv_rank * heads * (nope + v)
            return queries + keys + heads * v * width
        kv_heads, size = self._heads(kind)
        queries = width * heads * size * (2 if self.attn_output_gate else 1)
        one = kind == FULL and self.attention_k_eq_v
        return queries + width * kv_heads * size * (1 if one else 2) + heads * size * width

    def weight_bytes(self) -> float | None:
        """Of the published checkpoint's text model; None: its shape is not known."""
        counted = self.parameters()
        if counted is None:
            return None
        rest, routed = counted
        dtype = self.weights["dtype"]
        return rest * BYTES[dtype] + routed * BYTES[self.weights.get("experts", dtype)]

    def kv_bytes(self, tokens: int) -> int:
        """KV cache of one sequence of that length; sliding layers hold their window."""
        total = 0
        for kind in (FULL, SLIDING):
            held = min(tokens, self.sliding_window or tokens) if kind == SLIDING else tokens
            if self.mla:
                one = self.mla["kv_lora_rank"] + self.mla["qk_rope_head_dim"]
            else:
                heads, size = self._heads(kind)
                one = 2 * heads * size
            total += self.count(kind) * held * one * _KV_BYTES
        return total

    def state_bytes(self) -> int | None:
        """Recurrent and convolution state of one sequence; None: unknown."""
        if LINEAR not in self.unit:
            return 0
        if not self.linear:
            return None
        keys = self.linear["linear_num_key_heads"] * self.linear["linear_key_head_dim"]
        values = self.linear["linear_num_value_heads"] * self.linear["linear_value_head_dim"]
        recurrent = values * self.linear["linear_key_head_dim"] * _STATE_BYTES
        conv = (2 * keys + values) * (self.linear["linear_conv_kernel_dim"] - 1) * _KV_BYTES
        return self.count(LINEAR) * (recurrent + conv)


@dataclass(frozen=True)
class Draft:
    """A draft's shape, as :class:`Target`. ``dflash2``: None for a draft of the first kind."""

    id: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int | None
    block_size: int | None
    sliding_layers: int
    sliding_window: int | None
    target_layer_ids: tuple[int, ...]
    num_taps: int | None
    num_target_layers: int | None
    mask_token_id: int | None
    mask_past_tokenizer: bool
    vocab_size: int | None
    final_logit_softcapping: float | None
    rope: Mapping[str, Any]
    dflash2: Mapping[str, Any] | None
    source: str

    def parameters(self) -> int | None:
        """Weights of its checkpoint (embedding and head are the target's).

        None: a size is not known, or it has DFlash 2's further tensors.
        """
        if self.intermediate_size is None or self.num_taps is None or self.dflash2 is not None:
            return None
        d, f, size = self.hidden_size, self.intermediate_size, self.head_dim
        attention = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * size * d
        layer = attention + 3 * d * f + 2 * d + 2 * size
        return self.num_hidden_layers * layer + self.num_taps * d * d + 2 * d

    def kv_bytes(self, tokens: int) -> int:
        """KV cache of one sequence of that length; sliding layers hold their window."""
        full = self.num_hidden_layers - self.sliding_layers
        held = min(tokens, self.sliding_window or tokens)
        one = 2 * self.num_key_value_heads * self.head_dim * _KV_BYTES
        return one * (full * tokens + self.sliding_layers * held)


@dataclass(frozen=True)
class Memory:
    """What a pair takes, in bytes; without activations, CUDA graphs and vision towers.

    ``cache`` is the KV cache (and states) of ``sequences`` of ``tokens`` each.
    """

    target: float
    draft: float
    cache: float
    tokens: int
    sequences: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.target + self.draft + self.cache

    def line(self) -> str:
        """For people."""
        return (
            f"about {self.total / GIB:.1f} GiB: target {self.target / GIB:.1f}, draft "
            f"{self.draft / GIB:.1f}, cache {self.cache / GIB:.2f} ({self.sequences} x "
            f"{self.tokens} tokens); activations, CUDA graphs and vision towers come on top"
        )


def memory(
    target: Target, draft: Draft, speculative_tokens: int, tokens: int = 8192, sequences: int = 1
) -> Memory | None:
    """Memory of a pair in the published precision; None where a size is not known.

    A hybrid target keeps one state a drafted token besides its own, to go back to.
    """
    weights, drafted, state = target.weight_bytes(), draft.parameters(), target.state_bytes()
    if weights is None or drafted is None:
        return None
    # The states of a hybrid whose heads are unknown are small beside its weights: left out.
    each = target.kv_bytes(tokens) + draft.kv_bytes(tokens)
    each += (state or 0) * (1 + speculative_tokens)
    return Memory(weights, drafted * BYTES["bf16"], each * sequences, tokens, sequences)


@dataclass(frozen=True)
class Architectures:
    """The whole file."""

    path: Path
    targets: Mapping[str, Target]
    drafts: Mapping[str, Draft]


@lru_cache(maxsize=8)
def load(path: Path = PATH) -> Architectures:
    """Read and check the file; raises ``MatrixError`` with file, table and field."""
    top = Table(path, "top level", read_toml(path))
    targets = unique(path, "target", [_target(table) for table in top.tables("target")])
    drafts = unique(path, "draft", [_draft(table) for table in top.tables("draft")])
    top.finish()
    return Architectures(path, targets, drafts)


def _target(table: Table) -> Target:
    name = table.identifier("id")
    weights = table.strings_by_name("weights")
    for key, dtype in weights.items():
        table.reference(f"weights.{key}", dtype, BYTES)
    experts = _sizes(table, "experts", _EXPERTS, ("first_dense", "shared_experts"))
    unit = table.strings("layer_types") if "layer_types" in table.raw else (FULL,)
    if not unit:
        raise table.error("layer_types is empty", hint="leave it out: full attention throughout")
    for kind in unit:
        table.reference("layer_types", kind, dict.fromkeys((FULL, SLIDING, LINEAR)))
    target = Target(
        id=name,
        model_type=table.take("model_type", str),
        num_hidden_layers=table.count("num_hidden_layers"),
        hidden_size=table.count("hidden_size"),
        vocab_size=table.count("vocab_size"),
        num_attention_heads=table.count("num_attention_heads"),
        **{key: _optional(table, key) for key in _TARGET_COUNTS},
        unit=unit,
        tie_word_embeddings=table.take("tie_word_embeddings", bool, default=None),
        attention_k_eq_v=table.take("attention_k_eq_v", bool, default=False),
        attention_sinks=table.take("attention_sinks", bool, default=False),
        attn_output_gate=table.take("attn_output_gate", bool, default=False),
        final_logit_softcapping=table.take("final_logit_softcapping", float, default=None),
        experts=experts,
        linear=_sizes(table, "linear", _LINEAR),
        mla=_sizes(table, "mla", _MLA),
        rope=table.take("rope", dict, default={}),
        weights={"dtype": "bf16", **weights},
        source=table.take("source", str),
    )
    if not target.mla and None in (target.num_key_value_heads, target.head_dim):
        raise table.error("neither mla nor num_key_value_heads and head_dim")
    table.finish()
    return target


def _draft(table: Table) -> Draft:
    name = table.identifier("id")
    taps = tuple(table.take("target_layer_ids", list, default=[]))
    draft = Draft(
        id=name,
        num_hidden_layers=table.count("num_hidden_layers"),
        hidden_size=table.count("hidden_size"),
        num_attention_heads=table.count("num_attention_heads"),
        num_key_value_heads=table.count("num_key_value_heads"),
        head_dim=table.count("head_dim"),
        sliding_layers=_optional(table, "sliding_layers") or 0,
        target_layer_ids=taps,
        num_taps=len(taps) or _optional(table, "num_taps"),
        **{
            key: _optional(table, key)
            for key in (
                *("intermediate_size", "block_size", "sliding_window", "num_target_layers"),
                *("mask_token_id", "vocab_size"),
            )
        },
        mask_past_tokenizer=table.take("mask_past_tokenizer", bool, default=False),
        final_logit_softcapping=table.take("final_logit_softcapping", float, default=None),
        rope=table.take("rope", dict, default={}),
        dflash2=table.take("dflash2", dict, default=None),
        source=table.take("source", str),
    )
    if draft.sliding_layers > draft.num_hidden_layers:
        raise table.error(f"{draft.sliding_layers} of {draft.num_hidden_layers} layers slide")
    if draft.num_target_layers and any(tap >= draft.num_target_layers for tap in taps):
        raise table.error(f"target_layer_ids is {list(taps)}, of {draft.num_target_layers} layers")
    table.finish()
    return draft


def _optional(table: Table, key: str) -> int | None:
    return table.count(key) if key in table.raw else None


def _sizes(
    table: Table, key: str, names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Mapping[str, int]:
    """The counts of a subtable; absent: none of them."""
    if key not in table.raw:
        return {}
    inner = table.table(key)
    sizes = {name: inner.count(name) for name in names}
    sizes |= {name: inner.take(name, int, default=0) for name in optional}
    if key == "experts":
        sizes["beside_dense"] = int(inner.take("beside_dense", bool, default=False))
    inner.finish()
    return sizes
