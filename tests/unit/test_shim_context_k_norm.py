"""The CPU context-key repair, on kernels that are wrong and kernels that are right."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from dflash_plugin import shims
from dflash_plugin.shims import vllm_context_k_norm as repair

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # for tensors this small a second thread only waits
pytestmark = pytest.mark.torch

# The method as vLLM 0.32.0 has it (Apache-2.0): the fingerprint is of this text.
ENGINE = """\
import torch
from fake_vllm_ops import ops


class DFlashQwen3Model:
    def _normalize_context_k(self, all_k: torch.Tensor) -> torch.Tensor:
        # --- Grouped RMSNorm K across all layers ([L, num_ctx, nkv, hd]) ---
        # The weight is selected per layer by the outermost (layer) index.
        all_k_normed = torch.empty_like(all_k)
        ops.rms_norm(
            all_k_normed,
            all_k,
            self._k_norm_weights,
            self._rms_norm_eps,
        )
        return all_k_normed
"""
LAYERS, TOKENS, HEADS, DIM, EPS = 3, 5, 2, 8, 1e-6


def normed(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def first_row_for_all(out, x, weight, eps):
    """The defect: a stacked weight is read as if it had one row."""
    out.copy_(normed(x, weight.reshape(-1, x.shape[-1])[0], eps))


def a_row_each(out, x, weight, eps):
    """What a repaired kernel does."""
    shape = (-1, *[1] * (x.ndim - 2), x.shape[-1]) if weight.ndim == 2 else (-1,)
    out.copy_(normed(x, weight.reshape(shape), eps))


def engine_module(rms_norm) -> ModuleType:
    """The engine's module with that kernel, not imported from anywhere; ``calls``: shapes seen."""

    def recorded(out, x, weight, eps):
        module.calls.append(tuple(x.shape))
        rms_norm(out, x, weight, eps)

    class DFlashQwen3Model:
        def _normalize_context_k(self, all_k):
            out = torch.empty_like(all_k)
            module.ops.rms_norm(out, all_k, self._k_norm_weights, self._rms_norm_eps)
            return out

    module = ModuleType("fake_qwen3_dflash")
    module.calls = []
    module.ops = SimpleNamespace(rms_norm=recorded)
    module.DFlashQwen3Model = DFlashQwen3Model
    return module


def with_weights(model):
    model._k_norm_weights = 1 + torch.rand(LAYERS, DIM, generator=torch.Generator().manual_seed(1))
    model._rms_norm_eps = EPS
    return model


@pytest.fixture
def keys():
    return torch.randn(LAYERS, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(2))


def expected(model, keys):
    weights = model._k_norm_weights
    return torch.stack([normed(keys[i], weights[i], EPS) for i in range(LAYERS)])


@pytest.mark.parametrize(("kernel", "wrong"), [(first_row_for_all, True), (a_row_each, False)])
def test_the_kernel_is_asked_not_assumed(kernel, wrong):
    assert repair.kernel_is_wrong(SimpleNamespace(rms_norm=kernel)) is wrong


def test_the_repair_gives_every_layer_its_own_weight(keys):
    module = engine_module(first_row_for_all)
    model = with_weights(module.DFlashQwen3Model())
    assert not torch.allclose(model._normalize_context_k(keys), expected(model, keys))
    assert "own weight" in repair.apply(module)
    assert torch.allclose(model._normalize_context_k(keys), expected(model, keys))


@pytest.mark.parametrize("tokens", [0, 1])
def test_the_repair_takes_any_number_of_tokens(keys, tokens):
    module = engine_module(first_row_for_all)
    repair.apply(module)
    model = with_weights(module.DFlashQwen3Model())
    few = keys[:, :tokens]
    assert torch.allclose(model._normalize_context_k(few), expected(model, few))


def test_a_right_kernel_is_left_alone(keys):
    module = engine_module(a_row_each)
    repair.apply(module)
    model = with_weights(module.DFlashQwen3Model())
    assert torch.allclose(model._normalize_context_k(keys), expected(model, keys))
    assert module.calls.count(tuple(keys.shape)) == 1  # all layers at once, as published


def test_the_kernel_is_asked_when_first_needed(keys):
    module = engine_module(first_row_for_all)
    repair.apply(module)
    assert module.calls == []
    model = with_weights(module.DFlashQwen3Model())
    for _ in range(2):
        model._normalize_context_k(keys)
    assert len(module.calls) == 1 + 2 * LAYERS  # asked once


def test_it_is_installed_on_the_source_it_was_written_for(tmp_path, monkeypatch, keys, caplog):
    if "vllm" in sys.modules:
        pytest.skip("the real vllm is imported in this process")
    name = repair.SHIM.module
    folder = tmp_path.joinpath(*name.split(".")[:-1])
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "qwen3_dflash.py").write_text(ENGINE)
    ops = ModuleType("fake_vllm_ops")
    ops.ops = SimpleNamespace(rms_norm=first_row_for_all)
    monkeypatch.setitem(sys.modules, "fake_vllm_ops", ops)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    try:
        with caplog.at_level(logging.DEBUG):
            shims.install(["context-k-norm"], logging.getLogger("test"))
            module = importlib.import_module(name)
        model = with_weights(module.DFlashQwen3Model())
        assert torch.allclose(model._normalize_context_k(keys), expected(model, keys))
        assert "context-k-norm: context keys are normalised" in caplog.text
    finally:
        for loaded in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
            del sys.modules[loaded]
