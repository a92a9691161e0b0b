"""vLLM drafts greedily at temperature > 0 unless told otherwise; sampling gets more accepted.

``draft_sample_method``: "greedy" verifies the most likely tokens as if the draft were
certain of them; "probabilistic" samples them and weighs the draft's probabilities. Both
leave the distribution of the text as it is. The default was changed to greedy to save
memory: what is kept for the next step is [max_num_seqs, K, vocabulary].
"""

from __future__ import annotations

from typing import Any

from . import Shim

MOST_BYTES = 4 << 30
"""Above this the release's default is kept."""


def size(config: Any, k: int) -> int:
    """Bytes of the probabilities (V1, float32) or logits (V2) kept between two steps."""
    import torch

    dtype = config.model_config.head_dtype if config.use_v2_model_runner else torch.float32
    vocabulary = config.model_config.get_vocab_size()
    return int(config.scheduler_config.max_num_seqs * k * vocabulary * dtype.itemsize)


def choose(config: Any, given: Any, log: Any) -> None:
    """Set ``draft_sample_method`` in a complete configuration; one line says what was done.

    Args:
        given: the user's own ``speculative_config``.
    """
    speculation = config.speculative_config
    if (
        speculation is None
        or speculation.method != "dflash"
        or "draft_sample_method" in (given or {})
        or speculation.draft_sample_method != "greedy"
        or speculation.rejection_sample_method != "standard"
        or speculation.use_local_argmax_reduction
        or getattr(speculation, "use_heterogeneous_vocab", False)
    ):
        return
    needed = size(config, speculation.num_speculative_tokens)
    if needed > MOST_BYTES:
        log.info(
            "dflash-plugin: draft_sample_method stays greedy: probabilistic, which has more "
            "accepted at temperature > 0, would keep up to %.1f GiB for %d requests",
            *(needed / (1 << 30), config.scheduler_config.max_num_seqs),
        )
        return
    speculation.draft_sample_method = "probabilistic"
    log.info(
        "dflash-plugin: draft_sample_method=probabilistic: more is accepted at temperature > 0, "
        "at up to %.0f MiB; set it in the speculative config to choose yourself",
        needed / (1 << 20),
    )


def apply(module: Any) -> str:
    """Choose once a configuration is complete."""
    arguments = module.EngineArgs
    original = arguments.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        choose(config, self.speculative_config, module.logger)
        return config

    arguments.create_engine_config = create_engine_config
    return "drafts are sampled at temperature > 0 unless the user chose"


SHIM = Shim(
    name="draft-sampling",
    symptom="at temperature > 0 less is accepted than the draft allows",
    mechanism="draft_sample_method is greedy by default; it is set to probabilistic where the "
    "user left it open and what it keeps is at most 4 GiB",
    removal="when the default is probabilistic, which test_draft_sampling_is_still_needed shows "
    "by failing",
    module="vllm.engine.arg_utils",
    fingerprints={
        "EngineArgs.create_speculative_config": frozenset(
            {
                "599150c0b1d9a80e",  # 0.25.0, 0.25.1
                "20582c958aa753a9",  # 0.26.0 - 0.33.0
            }
        ),
    },
    apply=apply,
)
