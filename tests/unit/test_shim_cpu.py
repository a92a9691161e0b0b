"""The CPU's kernels of 0.30.0, and per-request values for verification."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from shim_fakes import engine  # noqa: F401

from dflash_plugin.shims import vllm_cpu_expand as expand
from dflash_plugin.shims import vllm_cpu_kernels as kernels

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

ALL = [name for names in kernels.KERNELS.values() for name in names]


def runner_module(calls):
    class CPUModelRunner:
        def _postprocess_triton(self):
            calls.append(self)

    fallbacks = SimpleNamespace(**{f"{name}_kernel": f"cpu {name}" for name in ALL})
    return SimpleNamespace(CPUModelRunner=CPUModelRunner, cpu_tl=fallbacks)


@pytest.mark.parametrize("triton", [False, True])
def test_kernels_reach_their_dispatchers_where_there_is_no_triton(engine, triton):  # noqa: F811
    calls = []
    module = runner_module(calls)
    engine("vllm.triton_utils", HAS_TRITON=triton)
    owners = {
        owner: engine(owner, **{f"_{name}": SimpleNamespace(kernel="stub") for name in names})
        for owner, names in kernels.KERNELS.items()
    }
    kernels.apply(module)
    runner = module.CPUModelRunner()
    runner._postprocess_triton()
    assert calls == [runner], "the release's own step runs too"
    for owner, names in kernels.KERNELS.items():
        for name in names:
            found = getattr(owners[owner], f"_{name}").kernel
            assert found == ("stub" if triton else f"cpu {name}")


@pytest.fixture
def expand_batch_to_tokens():
    module = SimpleNamespace(expand_batch_to_tokens=None)
    expand.apply(module)
    return module.expand_batch_to_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_every_token_has_its_requests_value(expand_batch_to_tokens, dtype):
    given = torch.tensor([7, 1, 50], dtype=dtype)
    found = expand_batch_to_tokens(given, torch.tensor([2, 5, 6], dtype=torch.int32), 6)
    assert found.dtype is dtype
    assert found.tolist() == [7, 7, 1, 1, 1, 50]


def test_requests_without_drafts_have_no_tokens(expand_batch_to_tokens):
    found = expand_batch_to_tokens(torch.tensor([1.5, 2.5, 3.5]), torch.tensor([0, 3, 3]), 3)
    assert found.tolist() == [2.5, 2.5, 2.5]


def test_a_value_can_be_replaced(expand_batch_to_tokens):
    temperatures = torch.tensor([0.0, 0.7])
    found = expand_batch_to_tokens(
        temperatures, torch.tensor([1, 3]), 3, replace_from=0, replace_to=1
    )
    assert torch.equal(found, torch.tensor([1.0, 0.7, 0.7]))
    assert temperatures.tolist()[0] == 0, "the argument is not changed"
