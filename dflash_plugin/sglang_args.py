"""What DFlash asks of SGLang's own arguments: said before any weight is loaded.

Limits of SGLang 0.5.18 to 0.5.23, from its source (``_handle_dflash`` and the DFlash worker);
it meets most of them only after minutes of loading, and one of them (a draft back-end that it
replaces by another) in a line of its log. Options in a ``--config`` file are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import UsageError

WRITTEN = (
    *("--model-path", "--model", "--speculative-algorithm", "--speculative-algo"),
    *("--speculative-draft-model-path", "--speculative-draft-model"),
    *("--speculative-draft-model-revision", "--speculative-num-draft-tokens"),
    *("--speculative-num-steps", "--speculative-eagle-topk", "--speculative-dflash-block-size"),
)
"""The options that ``serve`` writes, or that DFlash has one value for."""

DRAFT_BACKENDS = ("flashinfer", "fa3", "fa4", "triton", "ascend", "trtllm_mha", "intel_xpu")
"""``--speculative-draft-attention-backend`` on devices; on the CPU it is ``torch_native``."""
CPU_BACKEND = "torch_native"

_PIPELINE = ("--pp-size", "--pipeline-parallel-size")
_TENSOR = ("--tp-size", "--tensor-parallel-size", "--tp")
_ATTENTION_DATA = ("--attn-dp-size", "--attention-data-parallel-size")
_DRAFT_BACKEND = "--speculative-draft-attention-backend"
_WINDOW = "--speculative-draft-window-size"


def check(
    given: Sequence[str],
    platform: str,
    num_speculative_tokens: int,
    *,
    target: Callable[[], Mapping[str, Any]] | None = None,
    all_sliding_or_causal: Callable[[], bool] | None = None,
) -> None:
    """Raise where DFlash would not run with ``given``, or not as asked.

    Args:
        given: SGLang's arguments, as on its command line.
        platform: cpu, cuda, ….
        num_speculative_tokens: K; a block is one more.
        target: reads the target's ``config.json``, where it matters; None: not known.
        all_sliding_or_causal: tells it of the draft's layers, likewise.

    Raises:
        UsageError: with the option, what it may be, and what to do.
    """
    options = _options(given)
    pipeline = _number(options, *_PIPELINE)
    if pipeline is not None and pipeline[1] != 1:
        raise UsageError(
            f"{pipeline[0]} {pipeline[1]}: DFlash runs on SGLang with one pipeline stage only",
            hint=f"drop it, and spread the model with --tp-size {pipeline[1]} instead",
        )
    _check_attention_data(options, platform)
    tensor = _number(options, *_TENSOR)
    if tensor is not None and tensor[1] > 1 and target is not None and quantised_head(target()):
        raise UsageError(
            f"{tensor[0]} {tensor[1]}: the target's lm_head is quantised, and DFlash reads a "
            "quantised head on SGLang with one rank only",
            hint="--tp-size 1, or a checkpoint that leaves lm_head unquantised",
        )
    _check_backends(options, platform, all_sliding_or_causal)
    block = num_speculative_tokens + 1
    window = _number(options, _WINDOW)
    if window is not None and window[1] < block:
        raise UsageError(
            f"{_WINDOW} {window[1]}: a window holds at least one block, which is {block} tokens",
            hint=f"{_WINDOW} {block} or more, or drop it",
        )
    _number(options, "--page-size")


def quantised_head(target: Mapping[str, Any]) -> bool:
    """Whether a target's ``config.json`` says that its ``lm_head`` is quantised."""
    text = target.get("text_config")
    quantisation = target.get("quantization_config")
    if not isinstance(quantisation, dict):
        quantisation = text.get("quantization_config") if isinstance(text, dict) else None
    if not isinstance(quantisation, dict):
        return False
    if quantisation.get("quant_method") != "compressed-tensors":
        return quantisation.get("lm_head") is True
    groups = quantisation.get("config_groups")
    targets = [
        name
        for group in (groups.values() if isinstance(groups, dict) else ())
        for name in (group.get("targets") or () if isinstance(group, dict) else ())
    ]
    ignored = [str(name) for name in quantisation.get("ignore") or ()]
    return "Linear" in targets and not any("lm_head" in name for name in ignored)


def _check_attention_data(options: Mapping[str, str | None], platform: str) -> None:
    ranks = _number(options, *_ATTENTION_DATA)
    if "--enable-dp-attention" in options:
        option = "--enable-dp-attention"
    elif ranks is not None and ranks[1] > 1:
        option = f"{ranks[0]} {ranks[1]}"
    else:
        return
    if platform == "cpu":
        raise UsageError(
            f"{option}: DFlash runs with data-parallel attention on CUDA and NPU only",
            hint="drop it on the CPU",
        )
    if "--enable-dp-lm-head" not in options:
        raise UsageError(
            f"{option}: DFlash needs the head spread in the same way",
            hint="add --enable-dp-lm-head",
        )


def _check_backends(
    options: Mapping[str, str | None],
    platform: str,
    all_sliding_or_causal: Callable[[], bool] | None,
) -> None:
    asked = options.get(_DRAFT_BACKEND)
    known = (CPU_BACKEND,) if platform == "cpu" else DRAFT_BACKENDS
    if _DRAFT_BACKEND in options and asked not in known:
        raise UsageError(
            f"{_DRAFT_BACKEND} {asked or '(no value)'}: a draft runs on {platform} with "
            f"{' or '.join(known)}",
            hint="choose one of them, or drop it: a draft uses its target's where it can",
        )
    if asked == "trtllm_mha" and all_sliding_or_causal is not None and not all_sliding_or_causal():
        raise UsageError(
            f"{_DRAFT_BACKEND} trtllm_mha: SGLang uses it for drafts whose layers are all sliding "
            "or causal, which this one's are not, and takes another without asking",
            hint="fa4 on Blackwell, flashinfer elsewhere",
        )
    target = options.get("--attention-backend")
    if platform == "cpu" and "--attention-backend" in options and target != CPU_BACKEND:
        raise UsageError(
            f"--attention-backend {target or '(no value)'}: DFlash runs on the CPU with "
            f"{CPU_BACKEND}",
            hint="drop it",
        )


def _options(given: Sequence[str]) -> dict[str, str | None]:
    """Options by name, the last one of a name; None: without a value."""
    found: dict[str, str | None] = {}
    for position, arg in enumerate(given):
        if not arg.startswith("--"):
            continue
        name, equals, value = arg.partition("=")
        following = given[position + 1] if position + 1 < len(given) else "--"
        found[name] = value if equals else None if following.startswith("--") else following
    return found


def _number(options: Mapping[str, str | None], *names: str) -> tuple[str, int] | None:
    """The option given of several names of one, and its value."""
    for name in names:
        if name not in options:
            continue
        value = options[name]
        if value is None or not value.isdecimal() or int(value) < 1:
            raise UsageError(
                f"{name}: expected a whole number of at least 1, found {value or 'nothing'}",
                hint="correct it, or drop it",
            )
        return name, int(value)
    return None
