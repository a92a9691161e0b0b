"""vLLM 0.18 and 0.19 reserve KV slots for K drafted tokens; a DFlash block has K + 1 rows."""

from __future__ import annotations

from types import ModuleType

from . import Shim


def apply(module: ModuleType) -> str:
    """Reserve one slot more where the method is dflash."""
    scheduler = module.Scheduler
    published = scheduler.__init__

    def init(self, vllm_config, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        published(self, vllm_config, *args, **kwargs)
        config = vllm_config.speculative_config
        if config is not None and config.method == "dflash":
            self.num_lookahead_tokens = config.num_speculative_tokens + 1

    scheduler.__init__ = init
    return "dflash's blocks get a KV slot for every row"


SHIM = Shim(
    name="register-lookahead",
    symptom="the last row of a block is drafted without a KV slot at the end of a KV block",
    mechanism="EAGLE's K slots come after a known token whose slot is already there; DFlash "
    "computes that token's row too",
    removal="with register-arguments; test_registration_is_still_needed",
    module="vllm.v1.core.sched.scheduler",
    fingerprints={
        "Scheduler.__init__": frozenset(
            {
                "58cc8a2097e5865e",  # 0.18.0 to 0.18.1
                "0bdb8800460c19fb",  # 0.19.0 to 0.19.1
            }
        )
    },
    apply=apply,
)
