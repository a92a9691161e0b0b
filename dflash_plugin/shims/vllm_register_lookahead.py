"""vLLM 0.18 and 0.19 reserve KV slots for K drafted tokens, and none for a new request.

The same as in 0.20 to 0.22 (:mod:`.vllm_draft_lookahead`), and worse in 0.18: past the last
reserved block its block table holds what an earlier request left there, so a draft at the end of a
block writes into blocks that the prefix cache gives to the next request.
"""

from __future__ import annotations

from . import Shim
from .vllm_draft_lookahead import apply

SHIM = Shim(
    name="register-lookahead",
    symptom="drafts of requests that run side by side disturb each other at the ends of KV "
    "blocks, and in 0.18 those of later requests with the same prompt; acceptance falls, silently",
    mechanism="EAGLE's K slots come after a known token whose slot is already there, DFlash "
    "computes that token's row too; and a new request gets none",
    removal="with register-arguments; test_registration_is_still_needed",
    module="vllm.v1.core.sched.scheduler",
    fingerprints={
        "Scheduler.__init__": frozenset(
            {
                "58cc8a2097e5865e",  # 0.18.0 to 0.18.1
                "0bdb8800460c19fb",  # 0.19.0 to 0.19.1
            }
        ),
        "Scheduler.schedule": frozenset(
            {
                "36169b942e0256b1",  # 0.18.0 to 0.18.1
                "213f9f9586403c9a",  # 0.19.0 to 0.19.1
            }
        ),
    },
    apply=apply,
)
