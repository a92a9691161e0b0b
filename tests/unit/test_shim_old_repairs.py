# ruff: noqa: N803, PLR0917 (the engine's arguments)
"""The small repairs of vLLM 0.20 to 0.24, on stand-ins for what they change."""

from __future__ import annotations

import inspect
from types import ModuleType, SimpleNamespace

import pytest

from dflash_plugin.shims import (
    vllm_cpu_packed_qkv,
    vllm_cpu_sampler_arguments,
    vllm_cpu_taps,
    vllm_draft_context_end,
    vllm_draft_lookahead,
    vllm_draft_lora,
    vllm_draft_scaling,
    vllm_register_lookahead,
    vllm_tap_offset,
)

K = 4


def module(**names) -> ModuleType:
    found = ModuleType("fake")
    vars(found).update(names)
    return found


def speculative(method="dflash", **hf):
    return SimpleNamespace(
        method=method,
        num_speculative_tokens=K,
        draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(**hf)),
    )


# --- LoRA --------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "expected"), [("dflash", "table"), ("eagle3", "wrapper")])
def test_drafts_embed_without_adapters(method, expected):
    wrapper = SimpleNamespace(name="wrapper", base_layer=SimpleNamespace(name="table"))

    class SpecDecodeBaseProposer:
        def _maybe_share_embeddings(self, target_language_model):
            self.model.model.embed_tokens = target_language_model.model.embed_tokens

    vllm_draft_lora.apply(module(SpecDecodeBaseProposer=SpecDecodeBaseProposer))
    proposer = SpecDecodeBaseProposer()
    proposer.method, proposer.model = method, SimpleNamespace(model=SimpleNamespace())
    proposer._maybe_share_embeddings(SimpleNamespace(model=SimpleNamespace(embed_tokens=wrapper)))
    assert proposer.model.model.embed_tokens.name == expected
    assert vllm_draft_lora.unwrapped(wrapper.base_layer) is wrapper.base_layer


# --- taps ----------------------------------------------------------------------


def runner(config, layers):
    class GPUModelRunner:
        speculative_config = config

        def _get_eagle3_aux_layers_from_config(self):
            return layers

    vllm_tap_offset.apply(module(GPUModelRunner=GPUModelRunner))
    return GPUModelRunner()._get_eagle3_aux_layers_from_config()


def test_taps_are_outputs():
    assert runner(speculative(), (1, 8, 15)) == (2, 9, 16)


def test_other_ways_of_naming_layers_are_left_alone():
    assert runner(speculative("eagle3"), (1, 8)) == (1, 8)
    assert runner(speculative(eagle_aux_hidden_state_layer_ids=[2, 9]), (2, 9)) == (2, 9)
    assert runner(None, None) is None
    assert runner(speculative(), None) is None


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        (speculative(), (2, 9), [(2, 9)]),
        (speculative(), None, [(3, 5)]),
        (speculative("eagle3"), (2, 9), []),
        (None, None, []),
    ],
)
def test_the_cpu_asks_for_the_draft_s_features(config, layers, expected):
    told = []

    class CPUModelRunner:
        speculative_config = config

        def load_model(self):
            self.model = SimpleNamespace(
                get_eagle3_default_aux_hidden_state_layers=lambda: (3, 5),
                set_aux_hidden_state_layers=told.append,
            )

        def _get_eagle3_aux_layers_from_config(self):
            return layers

    vllm_cpu_taps.apply(module(CPUModelRunner=CPUModelRunner))
    CPUModelRunner().load_model()
    assert told == expected


# --- lookahead -----------------------------------------------------------------


def scheduler(config, shim=vllm_draft_lookahead):
    asked = []

    class Scheduler:
        def __init__(self, vllm_config):
            self.vllm_config = vllm_config
            self.num_spec_tokens = self.num_lookahead_tokens = K
            self.kv_cache_manager = SimpleNamespace(
                allocate_slots=lambda *args, **kwargs: asked.append((args, kwargs)) or "blocks"
            )

    shim.apply(module(Scheduler=Scheduler))
    return Scheduler(SimpleNamespace(speculative_config=config)), asked


@pytest.mark.parametrize("shim", [vllm_register_lookahead, vllm_draft_lookahead])
@pytest.mark.parametrize("given", [0, K])
def test_a_draft_has_a_slot_for_each_of_its_rows(given, shim):
    found, asked = scheduler(speculative(), shim)
    assert found.num_lookahead_tokens == K + 1
    allocate = found.kv_cache_manager.allocate_slots
    assert allocate("request", 3, num_lookahead_tokens=given, num_encoder_tokens=0) == "blocks"
    assert asked == [
        (
            ("request", 3),
            {
                "delay_cache_blocks": False,
                "num_lookahead_tokens": K + 1,
                "num_encoder_tokens": 0,
            },
        )
    ]


def test_blocks_that_come_from_elsewhere_are_as_many_as_there():
    found, asked = scheduler(speculative())
    found.kv_cache_manager.allocate_slots(
        "request", 3, num_lookahead_tokens=0, delay_cache_blocks=True
    )
    assert asked[0][1]["num_lookahead_tokens"] == 0


@pytest.mark.parametrize("config", [None, speculative("eagle3")])
def test_other_schedulers_reserve_what_they_did(config):
    found, asked = scheduler(config)
    assert found.num_lookahead_tokens == K
    found.kv_cache_manager.allocate_slots("request", 3, num_lookahead_tokens=0)
    assert asked == [(("request", 3), {"num_lookahead_tokens": 0})]


@pytest.mark.parametrize(
    ("config", "expected"), [(speculative(), 99), (speculative("eagle3"), 100), (None, 100)]
)
def test_drafts_end_with_the_context(config, expected):
    class GPUModelRunner:
        def __init__(self, vllm_config, device):
            self.speculative_config = vllm_config
            self.effective_drafter_max_model_len = 100

    vllm_draft_context_end.apply(module(GPUModelRunner=GPUModelRunner))
    assert GPUModelRunner(config, "cpu").effective_drafter_max_model_len == expected


# --- the sampler's CPU kernels --------------------------------------------------


def adapters(calls, *, synthetic, noise):
    """The adapters as 0.20 has them, or with the arguments that later releases take."""

    def greedy(output, cu, draft, argmax, bonus, is_greedy, length):
        calls.append("greedy")

    def later_greedy(
        output, cu, draft, argmax, bonus, is_greedy, length, u=None, rates=None, SYNTHETIC_MODE=0
    ):
        calls.append("greedy")

    def random(a, b, c, d, e, f, g, h, i, j, vocab, NO_DRAFT_PROBS=False):
        calls.append(("random", vocab, NO_DRAFT_PROBS))

    def later_random(
        a, b, c, d, e, f, g, h, i, j, vocab, rates=None, NO_DRAFT_PROBS=False, SYNTHETIC_MODE=0
    ):
        calls.append(("random", vocab, NO_DRAFT_PROBS))

    def recovered(out, cu, draft, draft_probs, probs, inv_q, vocab, BLOCK=0, NO_DRAFT_PROBS=False):
        calls.append(("recovered", inv_q, vocab, NO_DRAFT_PROBS))

    def later_recovered(out, cu, draft, dp, probs, inv_q, vocab, BLOCK=0, USE_FP64_GUMBEL=False):
        calls.append("later")

    return module(
        rejection_greedy_sample_kernel=SimpleNamespace(func=later_greedy if synthetic else greedy),
        rejection_random_sample_kernel=SimpleNamespace(func=later_random if synthetic else random),
        sample_recovered_tokens_kernel=SimpleNamespace(
            func=later_recovered if noise else recovered
        ),
    )


class Noise:
    """Float64 noise as the engine draws it."""

    def float(self):
        return "float32"


def test_kernels_that_lack_arguments_get_what_they_know():
    calls = []
    found = adapters(calls, synthetic=False, noise=False)
    assert "synthetic" in vllm_cpu_sampler_arguments.apply(found)
    found.rejection_greedy_sample_kernel.func(*range(7), None, None, SYNTHETIC_MODE=False)
    found.rejection_random_sample_kernel.func(
        *range(11), None, NO_DRAFT_PROBS=True, SYNTHETIC_MODE=False
    )
    recovered = found.sample_recovered_tokens_kernel.func
    recovered(0, 1, 2, 3, 4, "noise", 6, 8192, NO_DRAFT_PROBS=True, USE_FP64_GUMBEL=False)
    recovered(0, 1, 2, 3, 4, Noise(), 6, 8192, NO_DRAFT_PROBS=False, USE_FP64_GUMBEL=True)
    assert calls == [
        "greedy",
        ("random", 10, True),
        ("recovered", "noise", 6, True),
        ("recovered", "float32", 6, False),
    ]


def test_synthetic_acceptance_is_not_dropped_in_silence():
    found = adapters([], synthetic=False, noise=False)
    vllm_cpu_sampler_arguments.apply(found)
    with pytest.raises(NotImplementedError, match="synthetic"):
        found.rejection_greedy_sample_kernel.func(*range(9), SYNTHETIC_MODE=True)


def test_kernels_that_take_the_arguments_are_left_alone():
    found = adapters([], synthetic=True, noise=True)
    before = [adapter.func for name, adapter in vars(found).items() if name.endswith("_kernel")]
    vllm_cpu_sampler_arguments.apply(found)
    after = [adapter.func for name, adapter in vars(found).items() if name.endswith("_kernel")]
    assert before == after


# --- scaling -------------------------------------------------------------------


def head(model_type="qwen3", **config):
    class DFlashQwen3Model:
        def embed_input_ids(self, input_ids):
            return 10.0

    class DFlashQwen3ForCausalLM:
        def __init__(self, *, vllm_config, prefix=""):
            self.config = SimpleNamespace(**config)
            self.model = DFlashQwen3Model()
            self.logits_processor = SimpleNamespace(soft_cap=None)

    found = module(DFlashQwen3Model=DFlashQwen3Model, DFlashQwen3ForCausalLM=DFlashQwen3ForCausalLM)
    vllm_draft_scaling.apply(found)
    target = SimpleNamespace(model_type=model_type, hidden_size=64)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=target))
    made = DFlashQwen3ForCausalLM(vllm_config=vllm_config, prefix="draft")
    assert "vllm_config" in inspect.signature(DFlashQwen3ForCausalLM.__init__).parameters
    return made.model.embed_input_ids(None), made.logits_processor.soft_cap


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (10.0, None)),
        ({"dflash_config": None}, (10.0, None)),
        ({"model_type": "gemma4_text"}, (80.0, None)),
        ({"model_type": "gemma4_text", "input_embedding_scale": 1}, (10.0, None)),
        ({"dflash_config": {"input_embedding_scale": 2.5}}, (25.0, None)),
        ({"dflash_config": {"final_logit_softcapping": 30}}, (10.0, 30.0)),
        ({"final_logit_softcapping": 20.0, "input_embedding_scale": 3}, (30.0, 20.0)),
        ({"final_logit_softcapping": 0.0, "input_embedding_scale": 1}, (10.0, None)),
        (
            {"final_logit_softcapping": 20.0, "dflash_config": {"final_logit_softcapping": 30.0}},
            (10.0, 30.0),
        ),
    ],
)
def test_scale_and_cap_are_what_the_config_says(config, expected):
    assert head(**config) == expected


# --- the packed weight ----------------------------------------------------------


@pytest.mark.torch
def test_attention_does_not_need_the_weight():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(1)
    heads, kv_heads, dim, hidden, tokens = 4, 2, 8, 16, 5
    weight = torch.randn((heads + 2 * kv_heads) * dim, hidden, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator)

    class DFlashQwen3Attention:
        pass

    vllm_cpu_packed_qkv.apply(module(DFlashQwen3Attention=DFlashQwen3Attention))
    layer = DFlashQwen3Attention()
    layer.q_size, layer.kv_size, layer.head_dim = heads * dim, kv_heads * dim, dim
    layer.qkv_proj = lambda states: (states @ weight.T, None)
    shapes = []

    def norm(factor):
        def apply(t):
            shapes.append(tuple(t.shape))
            return t * factor

        return apply

    layer.q_norm, layer.k_norm = norm(2.0), norm(3.0)
    layer.rotary_emb = lambda positions, q, k: (q + positions[:, None], k - positions[:, None])
    layer.attn = lambda q, k, v: torch.cat([q, k, v], dim=-1)
    layer.o_proj = lambda out: (out, None)
    positions = torch.arange(tokens)
    found = layer.forward(positions, x)
    q, k, v = (x @ weight.T).split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    expected = torch.cat([2 * q + positions[:, None], 3 * k - positions[:, None], v], dim=-1)
    assert torch.allclose(found, expected)
    assert shapes == [(tokens, heads, dim), (tokens, kv_heads, dim)]
