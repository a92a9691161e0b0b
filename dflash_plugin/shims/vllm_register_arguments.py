"""vLLM 0.18 and 0.19 have no ``method: dflash``: accept it and build its configuration.

Their configuration is validated before anything could be registered, and the method is one
of a fixed list there. So the validation sees ``eagle3``, the nearest method that exists (a
draft of its own with taps of the target), and the result is named ``dflash`` afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import pair
from ..errors import PairMismatchError, UnsupportedEngineError, UsageError
from . import Shim

METHOD = "dflash"
ARCHITECTURE = "DFlashDraftModel"
# Settings of vLLM's that change nothing here, each with its only allowed value.
_FIXED = {
    "disable_padded_drafter_batch": False,
    "parallel_drafting": False,
    "speculative_token_tree": None,
    "max_model_len": None,
    "quantization": None,
}


def register_model() -> None:
    """Make the draft's class known to ``ModelRegistry``; idempotent.

    vLLM looks for it by the checkpoint's own name, and by the one that ``eagle3`` gives it.
    """
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    names = (ARCHITECTURE, f"Eagle3{ARCHITECTURE}")
    if set(names) <= set(ModelRegistry.get_supported_archs()):
        return
    model: Any = f"{__package__}.vllm_draft_model:{ARCHITECTURE}"
    if current_platform.is_cpu():
        # By name, vLLM imports all of itself in a child process per name, lest a device be
        # initialised here. There is none on the CPU, and that takes half a minute.
        from .vllm_draft_model import DFlashDraftModel as model  # noqa: N813
    for name in names:
        ModelRegistry.register_model(name, model)


def read_draft(model: str, revision: str | None) -> pair.DraftConfig:
    """The draft's own ``config.json``, from a folder or the hub.

    Not Transformers' view of it, which fills in what the file leaves out.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    raw = get_hf_file_to_dict("config.json", model, revision)
    source = Path(model) / "config.json"
    if raw is None:
        raise PairMismatchError(f"{source}: not found", hint="check the draft's name")
    return pair.DraftConfig.from_dict(raw, source)


def target_facts(model_config: Any) -> pair.TargetConfig:
    """The facts of vLLM's target ``ModelConfig`` that a draft depends on."""
    text = model_config.hf_text_config
    return pair.TargetConfig(
        source=Path(model_config.model) / "config.json",
        model_type=text.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
    )


def check(draft: pair.DraftConfig, target: pair.TargetConfig, tokens: Any) -> None:
    """Refuse a pair that would run wrongly.

    Raises:
        PairMismatchError, UsageError: names the field, what was expected and found.
    """
    from ..draft_math import check_supported

    if type(tokens) is not int:
        raise UsageError(
            f"num_speculative_tokens is {tokens!r}, expected a whole number",
            hint=f"use num_speculative_tokens {draft.max_speculative_tokens}",
        )
    check_supported(draft)
    pair.check_hidden(target, draft)
    pair.check_vocabulary(target, draft)
    pair.check_taps(target, draft)
    pair.check_mask_token(target, draft)
    pair.check_block(draft, tokens)
    taps = list(draft.target_layer_ids)
    if taps != sorted(set(taps)):  # vLLM hands the taps over in the order of the layers
        raise PairMismatchError(
            f"{draft.source}: dflash_config.target_layer_ids is {taps}, expected ascending "
            "indices, each once",
            hint="this release cannot run the draft; use a newer vLLM",
        )


def check_settings(given: Mapping[str, Any], parallel: Any, *, v2_runner: bool) -> None:
    """Refuse settings that this registration does not implement.

    Raises:
        UsageError: a speculative setting. UnsupportedEngineError: a way of running.
    """
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise UsageError(
                f"speculative_config: {name} is {given[name]!r}, expected {value!r} with dflash",
                hint=f"leave {name} out",
            )
    ranks = parallel.tensor_parallel_size
    if given.get("draft_tensor_parallel_size", ranks) != ranks:
        raise UsageError(
            f"speculative_config: draft_tensor_parallel_size is "
            f"{given['draft_tensor_parallel_size']}, expected the target's {ranks}",
            hint="leave draft_tensor_parallel_size out",
        )
    for name in (
        *("pipeline_parallel_size", "decode_context_parallel_size"),
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) != 1:
            raise UnsupportedEngineError(
                f"{name} is {getattr(parallel, name)}, expected 1 with dflash on this vLLM",
                hint="use tensor or data parallelism, or a release with its own dflash",
            )
    if v2_runner:
        raise UnsupportedEngineError(
            "VLLM_USE_V2_MODEL_RUNNER is set, and dflash on this vLLM needs the V1 runner",
            hint="unset VLLM_USE_V2_MODEL_RUNNER",
        )


def configure(config: Any, draft: pair.DraftConfig, target_model_config: Any) -> Any:
    """Turn the ``SpeculativeConfig`` of the nearest method into one of dflash."""
    model_config = config.draft_model_config
    # The wrapper that EAGLE's checkpoints need hides the draft's own fields.
    hf_config = getattr(model_config.hf_config, "model", None) or model_config.hf_config
    hf_config.architectures = [ARCHITECTURE]
    # Layer i's output is the input of layer i + 1, which is what vLLM counts.
    hf_config.eagle_aux_hidden_state_layer_ids = [tap + 1 for tap in draft.target_layer_ids]
    model_config.hf_config = hf_config
    config.update_arch_()
    # vLLM skips drafting, and with it storing the context, for a whole batch as soon as one
    # request comes close to this length; the draft keeps up with the target instead.
    model_config.max_model_len = target_model_config.max_model_len + config.num_speculative_tokens
    config.method = METHOD
    return config


def apply(module: ModuleType) -> str:
    """Let ``EngineArgs`` build a configuration for ``method: dflash``."""
    arguments = module.EngineArgs
    published = arguments.create_speculative_config

    def create_speculative_config(  # type: ignore[no-untyped-def]
        self, target_model_config, target_parallel_config
    ):
        given = self.speculative_config
        if given is None or given.get("method") != METHOD:
            return published(self, target_model_config, target_parallel_config)
        import vllm.envs

        if not given.get("model"):
            raise UsageError(
                "speculative_config: method dflash needs a draft",
                hint='add "model": the draft\'s folder or hub id',
            )
        draft = read_draft(given["model"], given.get("revision"))
        check(draft, target_facts(target_model_config), given.get("num_speculative_tokens"))
        check_settings(given, target_parallel_config, v2_runner=vllm.envs.VLLM_USE_V2_MODEL_RUNNER)
        register_model()
        self.speculative_config = {**given, "method": "eagle3"}
        try:
            config = published(self, target_model_config, target_parallel_config)
        finally:
            self.speculative_config = given
        return configure(config, draft, target_model_config)

    arguments.create_speculative_config = create_speculative_config
    return "method dflash is accepted"


SHIM = Shim(
    name="register-arguments",
    symptom="--speculative-config with method dflash ends in a validation error",
    mechanism="vLLM validates the method against a fixed list; the configuration is built as "
    "the nearest method's and renamed",
    removal="when no supported release lacks the method, which "
    "test_registration_is_still_needed shows by failing",
    module="vllm.engine.arg_utils",
    fingerprints={
        "EngineArgs.create_speculative_config": frozenset(
            {
                "a34c0a5fced47453",  # 0.18.0 to 0.19.1
            }
        )
    },
    apply=apply,
)
