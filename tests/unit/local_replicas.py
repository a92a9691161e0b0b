"""Tiny random targets of many architectures, and drafts that accept as they are told."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from dflash_plugin.backends.draft_length import FixedLength
from dflash_plugin.backends.transformers_cache import Places

torch.set_num_threads(1)  # for matrices this small a second thread only waits

VOCAB, HIDDEN, WINDOW = 64, 32, 12
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_WINDOWS = ["sliding_attention", "full_attention"] * 2
# name: (configuration class, model class, changes of _BASE)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "qwen3-sliding": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _WINDOWS},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _GDN),
    "qwen3.5-moe": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**_GDN, **_MOE, "shared_expert_intermediate_size": 24},
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_GDN, **_MOE, "shared_expert_intermediate_size": 24},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "global_head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 30.0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _WINDOWS,
        },
    ),
    "minimax-m2": (
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
}


def available(name: str) -> bool:
    """Whether this release of Transformers has the architecture."""
    return hasattr(transformers, ARCHITECTURES[name][1])


def make_target(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model whose greedy text does not get stuck."""
    config_name, model_name, own = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**{**_BASE, **own, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "conv" not in parameter_name:
            torch.nn.init.normal_(parameter, std=0.25)
    # Their buffers and vectors are not all set by every release.
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of the words w0, w1, …, with a chat template."""
    words = {f"w{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="w2", pad_token="w0", unk_token="w0"
    )
    made.chat_template = (
        "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w8{% endif %}"
    )
    made.save_pretrained(folder)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 1, (length,), generator=generator).tolist()


def plain(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """Transformers' own greedy text."""
    given = torch.tensor([list(ids)])
    output = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


class OracleDraft:
    """A draft that knows each row's text, and gets each token right with a given chance."""

    block_size = 6
    mask_token_id = 0

    def __init__(self, texts: Sequence[Sequence[int]], chance: float, taps: Sequence[int]) -> None:
        self.texts, self.chance, self.target_layer_ids = texts, chance, list(taps)
        self._random = torch.Generator().manual_seed(int(chance * 100))

    def check_target(self, *_facts: Any) -> None:
        """It fits every target."""

    def new_cache(self, rows: int = 1) -> OracleCache:
        assert rows == len(self.texts)
        return OracleCache(list(self.texts))

    def append(self, cache: Any, rows: Sequence[int], taps: Tensor) -> None:
        assert taps.shape[0] == len(rows)

    def logits(
        self,
        cache: OracleCache,
        known: Sequence[int],
        k: int,
        _embed: Tensor,
        _head: Any,
        **_: Any,
    ) -> Tensor:
        logits = torch.zeros(len(known), k, VOCAB)
        for row, (text, length, token) in enumerate(
            zip(cache.texts, cache.lengths, known, strict=True)
        ):
            assert text[length] == token, "the context is not what the text says"
            for place in range(k):
                after = length + 1 + place
                right = text[after] if after < len(text) else 5
                lucky = float(torch.rand((), generator=self._random)) < self.chance
                logits[row, place, right if lucky else (right + 1) % VOCAB] = 9.0
        return logits


class OracleCache(Places):
    def __init__(self, texts: list[Sequence[int]]) -> None:
        super().__init__(len(texts))
        self.texts = texts

    def keep(self, rows: Sequence[int], _device: Any) -> None:
        self.texts = [self.texts[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]


class Schedule(FixedLength):
    """Lengths in turn, over and over: what ``block_size="auto"`` might choose."""

    def __init__(self, *lengths: int) -> None:
        super().__init__(max(lengths))
        self._turns = itertools.cycle(lengths)

    def choose(self, rows: int) -> int:
        return next(self._turns)


SCHEDULES = [(5, 0, 0, 3, 1, 0), (0, 0, 0, 5), (0, 2, 4)]
"""Every way into and out of steps without a draft, in blocks of 6 at most."""


def check_drafts_after_plain_steps(pair: Any, prompts: list[list[int]]) -> None:
    """Every draft of every schedule is what a fresh start on the same tokens drafts."""
    for schedule in SCHEDULES:
        pair.adaptive = Schedule(*schedule)
        results = pair.generate(prompts, max_tokens=12, ignore_eos=True, block_size="auto")
        for ids, result in zip(prompts, results, strict=True):
            known = 0
            for step in result.steps:
                if step.drafted:
                    text = ids + result.token_ids[: known - 1]
                    size = len(step.drafted) + 1
                    fresh = pair.generate(text, max_tokens=2, ignore_eos=True, block_size=size)
                    assert fresh.steps[1].drafted == step.drafted
                known += len(step.token_ids)
