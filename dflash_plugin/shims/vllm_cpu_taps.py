"""vLLM 0.20 and 0.21 on the CPU never ask the target for the draft's features.

The GPU runner's ``load_model`` tells the target which layers to return; the CPU runner
has one of its own, which does not.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim


def apply(module: ModuleType) -> str:
    """Set the target's layers after the CPU runner has loaded the models."""
    runner: Any = module.CPUModelRunner
    published = runner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        published(self, *args, **kwargs)
        config = self.speculative_config
        if config is None or config.method != "dflash":
            return
        layers = self._get_eagle3_aux_layers_from_config()
        if not layers:
            layers = self.model.get_eagle3_default_aux_hidden_state_layers()
        self.model.set_aux_hidden_state_layers(layers)

    runner.load_model = load_model
    return "the target returns the layers that the draft needs"


SHIM = Shim(
    name="cpu-taps",
    symptom="the engine dies while warming up: too many values to unpack, for the target returns "
    "no features",
    mechanism="CPUModelRunner.load_model does not call set_aux_hidden_state_layers; it is called "
    "after it",
    removal="when 0.21 and older are no longer supported, which "
    "test_each_repair_is_still_needed shows by failing",
    module="vllm.v1.worker.cpu_model_runner",
    fingerprints={"CPUModelRunner.load_model": frozenset({"14aeebc9d0a576b2"})},
    apply=apply,
)
