"""vLLM's rejection sampler passes arguments that its CPU kernels do not take.

0.20: the rates and switch of synthetic acceptance. 0.23 and 0.24: USE_FP64_GUMBEL.
Both came with the Triton kernels' new features; the adapters to the compiled CPU
kernels were left behind, so sampling (0.20: greedy too) fails for every method.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from . import Shim

_GREEDY_ARGUMENTS = 7
_RANDOM_ARGUMENTS = 11
_NOISE = 5  # place of inv_q among the arguments of sample_recovered_tokens


def apply(module: ModuleType) -> str:
    """Wrap the adapters that lack an argument the sampler passes."""
    done = []
    greedy, random = module.rejection_greedy_sample_kernel, module.rejection_random_sample_kernel
    if "SYNTHETIC_MODE" not in inspect.signature(greedy.func).parameters:
        greedy.func = _without_synthetic(greedy.func, _GREEDY_ARGUMENTS)
        random.func = _without_synthetic(random.func, _RANDOM_ARGUMENTS)
        done.append("synthetic acceptance")
    recovered = module.sample_recovered_tokens_kernel
    if "USE_FP64_GUMBEL" not in inspect.signature(recovered.func).parameters:
        recovered.func = _with_any_noise(recovered.func)
        done.append("the precision of the sampling noise")
    return f"the sampler's CPU kernels are told nothing of {' and '.join(done)}"


def _without_synthetic(kernel: Any, known: int) -> Any:
    def adapted(*args: Any, SYNTHETIC_MODE: bool = False, **kwargs: Any) -> None:  # noqa: N803
        if SYNTHETIC_MODE:
            raise NotImplementedError("synthetic acceptance is not implemented on the CPU")
        kernel(*args[:known], **kwargs)

    return adapted


def _with_any_noise(kernel: Any) -> Any:
    def adapted(*args: Any, USE_FP64_GUMBEL: bool = False, **kwargs: Any) -> None:  # noqa: N803
        # The compiled kernel reads float32 whatever the engine drew the noise in.
        noise = args[_NOISE].float() if USE_FP64_GUMBEL else args[_NOISE]
        kernel(*args[:_NOISE], noise, *args[_NOISE + 1 :], **kwargs)

    return adapted


SHIM = Shim(
    name="cpu-sampler-arguments",
    symptom="verifying a draft fails: _rejection_greedy_sample_kernel_impl() got an unexpected "
    "keyword argument (0.20), or at temperature > 0 USE_FP64_GUMBEL (0.23, 0.24)",
    mechanism="the sampler passes arguments that the adapters to the CPU kernels lack; "
    "wrappers drop those that are off",
    removal="when the adapters take them (0.25), which test_each_repair_is_still_needed "
    "shows by failing",
    module="vllm.utils.cpu_triton_utils",
    fingerprints={
        "_rejection_greedy_sample_kernel_impl": frozenset(
            {
                "66631e395317def8",  # 0.20.0 to 0.20.2
                "338238d3cf2d61e3",  # 0.21.0 to 0.24.0
            }
        ),
        "_rejection_random_sample_kernel_impl": frozenset(
            {
                "e027de18f4f38c72",  # 0.20.0 to 0.20.2
                "07b8705b119dc62b",  # 0.21.0 to 0.24.0
            }
        ),
        "_sample_recovered_tokens_kernel_impl": frozenset({"99d4894628dfb9b6"}),
    },
    apply=apply,
)
