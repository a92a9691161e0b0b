"""SGLang before 0.5.21 refuses DFLASH by the name of the device.

From 0.5.21 it asks the platform, for the draft's attention back-end too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import Shim


class _View:
    """Resolved arguments, but for the device."""

    device = "cuda"

    def __init__(self, view: Any) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


@contextmanager
def _named_cuda(module: Any, server_args: Any) -> Iterator[None]:
    """The functions of ``module`` read the device ``cuda``, which is all they ask of it."""
    view = getattr(module, "resolving_view", None)
    if view is None:  # 0.5.18 reads the arguments themselves
        device = server_args.device
        server_args.device = "cuda"
    else:
        module.resolving_view = lambda args: _View(view(args))
    try:
        yield
    finally:
        if view is None:
            server_args.device = device
        else:
            module.resolving_view = view


def apply(module: Any) -> str:
    """Let the CPU through, with torch_native for the draft."""
    published = module._handle_dflash
    asked = "speculative_draft_attention_backend"

    def _resolve_dflash_draft_attention_backend(server_args: Any) -> None:
        if hasattr(module, "declare_resolution"):
            name = _resolve_dflash_draft_attention_backend.__name__
            module.declare_resolution(server_args, name, **{asked: "torch_native"})
        else:
            setattr(server_args, asked, "torch_native")

    def _handle_dflash(server_args: Any) -> None:
        with _named_cuda(module, server_args):
            published(server_args)

    module._resolve_dflash_draft_attention_backend = _resolve_dflash_draft_attention_backend
    module._handle_dflash = _handle_dflash
    return "DFLASH is let through on the CPU"


SHIM = Shim(
    name="sglang-cpu-arguments",
    symptom="the server stops: DFLASH speculative decoding only supports CUDA and NPU devices",
    mechanism="the device's name is looked at, not the platform; it is given one that passes "
    "while the arguments of DFLASH are checked, and the draft is given torch_native",
    removal="when releases before 0.5.21, which asks the platform, are no longer supported",
    module="sglang.srt.arg_groups.speculative_hook",
    fingerprints={
        "_handle_dflash": frozenset(
            {
                "af421d754f571c0e",  # 0.5.18
                "39fb96c8021fa21b",  # 0.5.19
                "a0502a988ee9a749",  # 0.5.20
            }
        ),
        "_resolve_dflash_draft_attention_backend": frozenset(
            {
                "4bc8039dad3eca1c",  # 0.5.18
                "a12cfe6cfd80aa9c",  # 0.5.19
                "660d305de1d8f17a",  # 0.5.20
            }
        ),
    },
    apply=apply,
)
