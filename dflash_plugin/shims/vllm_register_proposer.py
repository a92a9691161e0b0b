"""vLLM 0.18 and 0.19: where the engine makes EAGLE's proposer, make dflash's."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim


def apply(module: ModuleType) -> str:
    """Let ``EagleProposer(...)`` give a subclass of it where the method is dflash."""
    published = module.EagleProposer

    def make(cls: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is published and vllm_config.speculative_config.method == "dflash":
            from .vllm_proposer import DFlashProposer
            from .vllm_register_arguments import register_model

            register_model()
            cls = DFlashProposer
        return object.__new__(cls)

    published.__new__ = make
    return "EagleProposer may be dflash's"


SHIM = Shim(
    name="register-proposer",
    symptom="the engine has no proposer for dflash",
    mechanism="the model runner names EagleProposer in isinstance checks, so dflash's is a "
    "subclass, made where the runner makes EAGLE's",
    removal="with register-arguments; test_registration_is_still_needed",
    module="vllm.v1.spec_decode.eagle",
    fingerprints={
        "EagleProposer.__init__": frozenset(
            {
                "0612a10d16aeb69a",  # 0.18.0 to 0.19.1
            }
        ),
        "SpecDecodeBaseProposer.__init__": frozenset(
            {
                "ece4979d4df91233",  # 0.18.0 to 0.18.1
                "8b98d8075a916c04",  # 0.19.0 to 0.19.1
            }
        ),
        "SpecDecodeBaseProposer.propose": frozenset(
            {
                "172afe3a95df98ab",  # 0.18.0 to 0.18.1
                "02c9072914b57770",  # 0.19.0 to 0.19.1
            }
        ),
        "SpecDecodeBaseProposer.load_model": frozenset(
            {
                "2a82aa9176761595",  # 0.18.0 to 0.19.0
                "118a4c092a69cd85",  # 0.19.1
            }
        ),
        "SpecDecodeBaseProposer.initialize_attn_backend": frozenset(
            {
                "271cae0e912c80b5",  # 0.18.0 to 0.19.1
            }
        ),
        "SpecDecodeBaseProposer.dummy_run": frozenset(
            {
                "1827848905cf5744",  # 0.18.0 to 0.19.1
            }
        ),
        "SpecDecodeBaseProposer._determine_batch_execution_and_padding": frozenset(
            {
                "97fef2de291d3ebc",  # 0.18.0 to 0.19.1
            }
        ),
        "SpecDecodeBaseProposer.prepare_inputs_padded": frozenset(
            {
                "56d078f3afcdee42",  # 0.18.0 to 0.18.1
                "42493394f5a1baaa",  # 0.19.0 to 0.19.1
            }
        ),
        "SpecDecodeBaseProposer.prepare_next_token_ids_padded": frozenset(
            {
                "0984e5c0e432a273",  # 0.18.0 to 0.18.1
                "2e40d877618e63ec",  # 0.19.0 to 0.19.1
            }
        ),
    },
    apply=apply,
)
