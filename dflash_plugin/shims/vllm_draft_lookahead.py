"""vLLM to 0.22 reserves one KV slot too few for a DFlash step, and none at first.

A step writes K + 1 slots behind a sequence: its newest token and K masks. The scheduler
reserves K, and nothing when a request is first scheduled. Past the last reserved block
the block table holds what an earlier request left, or the null block, which all requests
of a batch then share: their drafts overwrite each other's keys.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim


def apply(module: ModuleType) -> str:
    """Reserve K + 1 slots in every step of a scheduler that drafts with DFlash."""
    scheduler: Any = module.Scheduler
    published = scheduler.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        published(self, *args, **kwargs)
        config = self.vllm_config.speculative_config
        if config is None or config.method != "dflash":
            return
        self.num_lookahead_tokens = self.num_spec_tokens + 1
        manager = self.kv_cache_manager
        allocate = manager.allocate_slots
        lookahead = self.num_lookahead_tokens

        def allocate_slots(*args: Any, delay_cache_blocks: bool = False, **kwargs: Any) -> Any:
            # A transfer of KV from elsewhere must find as many blocks here as there.
            if not delay_cache_blocks:
                kwargs["num_lookahead_tokens"] = lookahead
            return allocate(*args, delay_cache_blocks=delay_cache_blocks, **kwargs)

        manager.allocate_slots = allocate_slots

    scheduler.__init__ = __init__
    return "the scheduler reserves K + 1 slots for each draft"


SHIM = Shim(
    name="draft-lookahead",
    symptom="drafts of requests that run side by side disturb each other at the ends of KV "
    "blocks; acceptance falls, silently",
    mechanism="Scheduler.num_lookahead_tokens is K, and 0 for a new request; both become K + 1, "
    "as from 0.23 on",
    removal="when 0.22 and older are no longer supported, which "
    "test_the_shim_knows_the_source shows by failing",
    module="vllm.v1.core.sched.scheduler",
    fingerprints={
        "Scheduler.__init__": frozenset(
            {
                "9f990eac91cf8161",  # 0.20.0 to 0.20.2
                "a263dddaff208b11",  # 0.21.0
                "2590bad324154353",  # 0.22.0, 0.22.1
            }
        ),
        "Scheduler.schedule": frozenset(
            {
                "5886abb43aa7b8f6",  # 0.20.0 to 0.20.2
                "2ab85c3e0647be5e",  # 0.21.0 to 0.22.1
            }
        ),
    },
    apply=apply,
)
