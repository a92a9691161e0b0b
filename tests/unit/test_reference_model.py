"""The draft model against a brute-force version that shares no code with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from reference_helpers import (  # noqa: E402
    HIDDEN,
    TAPS,
    VOCAB,
    draft_json,
    draft_weights,
    make_draft,
    save_draft,
)

from dflash_plugin.pair import DraftConfig  # noqa: E402
from dflash_plugin.reference.model import DraftModel  # noqa: E402
from dflash_plugin.reference.rope import frequencies  # noqa: E402

pytestmark = pytest.mark.torch

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn betas": {**YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn untruncated": {**YARN, "truncate": False},
    "yarn attention factor": {**YARN, "attention_factor": 0.7},
    "yarn mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn mscale of zero": {**YARN, "mscale": 1.0, "mscale_all_dim": 0},
    "yarn one dimension": {**YARN, "original_max_position_embeddings": 8},
}

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "one layer": {"num_hidden_layers": 1},
    "sliding": {"layer_types": [SLIDING, SLIDING], "sliding_window": 4},
    "mixed": {"layer_types": [SLIDING, FULL], "sliding_window": 4},
    "window 1": {"layer_types": [FULL, SLIDING], "sliding_window": 1},
    "sliding, not causal": {
        "layer_types": [SLIDING, SLIDING],
        "sliding_window": 3,
        "is_causal": False,
    },
    "full, causal": {"dflash": {"causal": True}},
    "use_swa": {"dflash": {"use_swa": True, "swa_window_size": 5}},
    "no GQA": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "narrow heads": {"head_dim": 8},
    "wide heads": {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3},
    "rope_parameters": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 321.0},
    },
    "rope_scaling": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "yarn": {"rope_parameters": YARN},
    "llama3": {"rope_parameters": LLAMA3},
    "embedding scale": {"dflash": {"input_embedding_scale": 8.0}},
    "softcap": {"final_logit_softcapping": 3.0},
    "attention bias": {"attention_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "nested block size": {"block_size": None, "dflash": {"block_size": 6}},
    "eps": {"rms_norm_eps": 0.1},
}


def parse(raw: dict[str, Any]) -> DraftConfig:
    return DraftConfig.from_dict(raw, Path("config.json"))


class BruteForce:
    """One token, one head, one key at a time; no cache, no config class, no masks."""

    def __init__(self, raw: dict[str, Any], weights: dict[str, Any], embedding: Any, head: Any):
        self.raw, self.w, self.embedding, self.head = raw, weights, embedding, head
        self.dim = raw["head_dim"]

    def norm(self, x: Any, name: str) -> Any:
        return x / math.sqrt(float((x * x).mean()) + self.raw["rms_norm_eps"]) * self.w[name]

    def project(self, name: str, x: Any) -> Any:
        y = self.w[name + ".weight"] @ x
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def angle(self, pair: int, position: int) -> tuple[float, float]:
        """Angle of a pair of dimensions, and the factor on its cosine and sine."""
        rope = {
            "rope_theta": self.raw.get("rope_theta"),
            **self.raw.get("rope_scaling", {}),
            **self.raw.get("rope_parameters", {}),
        }
        kind = rope.get("rope_type", rope.get("type", "default"))
        frequency = rope["rope_theta"] ** (-2 * pair / self.dim)
        original = rope.get("original_max_position_embeddings")
        if kind == "linear":
            frequency /= rope["factor"]
        if kind == "llama3":
            wavelength = 2 * math.pi / frequency
            if wavelength > original / rope["low_freq_factor"]:
                frequency /= rope["factor"]
            elif wavelength > original / rope["high_freq_factor"]:
                smooth = (original / wavelength - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"]
                )
                frequency *= (1 - smooth) / rope["factor"] + smooth
        if kind == "yarn":

            def edge(turns: float) -> float:
                wavelength = original / turns
                return self.dim / 2 * math.log(wavelength / (2 * math.pi), rope["rope_theta"])

            low, high = max(math.floor(edge(32)), 0), min(math.ceil(edge(1)), self.dim - 1)
            share = min(max((pair - low) / (high - low), 0), 1)
            frequency = frequency * (1 - share) + frequency / rope["factor"] * share
            return position * frequency, 1 + 0.1 * math.log(rope["factor"])
        return position * frequency, 1.0

    def turn(self, x: Any, position: int) -> Any:
        y, half = x.clone(), self.dim // 2
        for i in range(half):
            angle, factor = self.angle(i, position)
            cosine, sine = factor * math.cos(angle), factor * math.sin(angle)
            y[i] = x[i] * cosine - x[i + half] * sine
            y[i + half] = x[i + half] * cosine + x[i] * sine
        return y

    def sees(self, layer: int, query: int, key: int) -> bool:
        dflash = self.raw["dflash_config"]
        types = self.raw.get("layer_types", [FULL] * self.raw["num_hidden_layers"])
        sliding = types[layer] == SLIDING or dflash.get("use_swa", False)
        window = dflash.get("swa_window_size", self.raw.get("sliding_window"))
        causal = types[layer] == SLIDING
        causal = dflash.get("causal", self.raw.get("is_causal", causal))
        if sliding and abs(query - key) >= window:
            return False
        return key <= query if causal else True

    def heads(self, layer: int, kind: str, x: Any, position: int) -> list[Any]:
        name = f"layers.{layer}.self_attn.{kind}"
        parts = list(self.project(name + "_proj", x).split(self.dim))
        if kind == "v":
            return parts
        return [self.turn(self.norm(part, name + "_norm.weight"), position) for part in parts]

    def logits(self, taps: Any, known: int, k: int) -> Any:
        raw, w = self.raw, self.w
        features = [self.norm(w["fc.weight"] @ row, "hidden_norm.weight") for row in taps]
        n, nested = len(features), raw["dflash_config"]
        tokens = [known] + [nested["mask_token_id"]] * k
        scale = nested.get("input_embedding_scale", 1.0)
        block = [self.embedding[token] * scale for token in tokens]
        act = {
            "silu": lambda x: x / (1 + (-x).exp()),
            "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
            "gelu_pytorch_tanh": lambda x: (
                0.5 * x * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())
            ),
        }[raw.get("hidden_act", "silu")]
        for layer in range(raw["num_hidden_layers"]):
            name = f"layers.{layer}."
            normed = [self.norm(x, name + "input_layernorm.weight") for x in block]
            sources = features + normed
            keys = [self.heads(layer, "k", x, i) for i, x in enumerate(sources)]
            values = [self.heads(layer, "v", x, i) for i, x in enumerate(sources)]
            group = raw["num_attention_heads"] // raw["num_key_value_heads"]
            after = []
            for row, x in enumerate(block):
                mixed = []
                for h, query in enumerate(self.heads(layer, "q", normed[row], n + row)):
                    seen = [j for j in range(len(sources)) if self.sees(layer, n + row, j)]
                    scores = [
                        float(query @ keys[j][h // group]) / math.sqrt(self.dim) for j in seen
                    ]
                    shares = [math.exp(score - max(scores)) for score in scores]
                    mixed.append(
                        sum(
                            share / sum(shares) * values[j][h // group]
                            for share, j in zip(shares, seen, strict=True)
                        )
                    )
                x = x + self.project(name + "self_attn.o_proj", torch.cat(mixed))  # noqa: PLW2901
                y = self.norm(x, name + "post_attention_layernorm.weight")
                gate = act(w[name + "mlp.gate_proj.weight"] @ y)
                up = w[name + "mlp.up_proj.weight"] @ y
                after.append(x + w[name + "mlp.down_proj.weight"] @ (gate * up))
            block = after
        rows = torch.stack([self.head @ self.norm(x, "norm.weight") for x in block[1:]])
        cap = raw.get("final_logit_softcapping")
        return rows if cap is None else cap * (rows / cap).tanh()


def shared(seed: int = 1) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        0.5 * torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2)
    )


@pytest.mark.parametrize("name", CASES)
def test_draft_equals_brute_force(name: str) -> None:
    raw = draft_json(**CASES[name])
    config, (embedding, head) = parse(raw), shared()
    weights = draft_weights(config)
    draft = DraftModel(config, weights, embedding, head)
    brute = BruteForce(raw, weights, embedding, head)
    taps = torch.randn(
        9, len(TAPS) * HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    cache = draft.new_cache()
    draft.append(cache, taps[:2])
    small = draft.draft_logits(cache, 7, 5)
    assert (small - brute.logits(taps[:2], 7, 5)).abs().max() < 1e-10
    draft.append(cache, taps[2:3])
    draft.append(cache, taps[3:])
    for k in (1, 3):
        expected = brute.logits(taps, 11, k)
        assert (draft.draft_logits(cache, 11, k) - expected).abs().max() < 1e-10
    assert (draft.draft_logits(cache, 7, 5, context=2) - small).abs().max() < 1e-12


def test_block_never_enters_the_cache_and_crop_forgets() -> None:
    draft = make_draft(*shared(), layer_types=[SLIDING, FULL], sliding_window=4)
    taps = torch.randn(12, len(TAPS) * HIDDEN, dtype=torch.float64)
    fresh, used = draft.new_cache(), draft.new_cache()
    draft.append(fresh, taps[:7])
    draft.append(used, taps[:5])
    draft.draft_logits(used, 3, 5)
    draft.append(used, -taps[:4])
    used.crop(5)
    assert used.length == 5
    draft.append(used, taps[5:7])
    difference = draft.draft_logits(fresh, 9, 5) - draft.draft_logits(used, 9, 5)
    assert difference.abs().max() < 1e-12


def test_without_context_the_block_sees_itself_alone() -> None:
    raw, (embedding, head) = draft_json(), shared()
    weights = draft_weights(parse(raw))
    draft = DraftModel(parse(raw), weights, embedding, head)
    expected = BruteForce(raw, weights, embedding, head).logits(torch.empty(0, 1), 7, 2)
    assert (draft.draft_logits(draft.new_cache(), 7, 2) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_is_near(dtype: str, tmp_path: Path) -> None:
    folder, (embedding, head) = save_draft(tmp_path / "draft"), shared()
    taps = torch.randn(9, len(TAPS) * HIDDEN, dtype=torch.float64)
    logits = {}
    for name in ("float64", dtype):
        draft = DraftModel.load(folder, embedding, head, dtype=getattr(torch, name))
        cache = draft.new_cache()
        draft.append(cache, taps)
        logits[name] = draft.draft_logits(cache, 7, 5)
    assert logits[dtype].dtype == getattr(torch, dtype)
    scale = logits["float64"].std()
    worst = (logits[dtype].double() - logits["float64"]).abs().max() / scale
    assert worst < {"float32": 1e-5, "bfloat16": 0.2}[dtype]


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = ROPES[name]
    length = int(rope.get("factor", 1) * rope.get("original_max_position_embeddings", 64))
    inverse, factor = frequencies(
        parse(draft_json(rope_parameters=rope, max_position_embeddings=length))
    )
    if rope["rope_type"] == "default":
        expected = 1 / rope["rope_theta"] ** (torch.arange(0, 16, 2).double() / 16)
        expected_factor = 1.0
    else:
        config = Qwen3Config(
            hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=length
        )
        config.rope_theta, config.rope_scaling = rope["rope_theta"], dict(rope)
        config.rope_parameters = dict(rope)
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    torch.testing.assert_close(inverse, expected.double(), rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected_factor)
