"""Whether a draft and a target fit, by their configs and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import check_tensors, read_tensors, sha256_file
from .errors import CheckpointError, DFlashError, ModelNotFoundError, PairMismatchError
from .pair_config import (
    FULL,
    SLIDING,
    DraftConfig,
    LayerAttention,
    TargetConfig,
    layer_attention,
    target_embedding_scale,
)

__all__ = [
    "FULL",
    "SLIDING",
    "Check",
    "DraftConfig",
    "LayerAttention",
    "TargetConfig",
    "check_block",
    "layer_attention",
    "preflight",
    "require",
    "target_embedding_scale",
]


@dataclass(frozen=True)
class Check:
    """One preflight result: ``status`` is ``ok``, ``failed`` or ``skipped``."""

    name: str
    status: str
    detail: str
    remedy: str = ""
    exit_code: int = 0


def preflight(
    target: Path,
    draft: Path,
    num_speculative_tokens: int | None = None,
    *,
    draft_sha256: Mapping[str, str] | None = None,
    target_weights: bool = True,
) -> list[Check]:
    """Every check of a pair that needs no weights in memory; never raises.

    Args:
        target, draft: local model folders.
        num_speculative_tokens: K asked for; None means block size - 1.
        draft_sha256: what the draft's files must hash to, by name.
        target_weights: False where only the target's configs are on this machine.
    """
    configs: dict[str, Any] = {}

    def target_config() -> str:
        configs["target"] = found = TargetConfig.from_dir(target)
        return f"{found.model_type}, {found.num_layers} layers, hidden {found.hidden_size}"

    def weights_of_target() -> str:
        if not target_weights:
            raise _SkippedError("not on this machine yet; the engine downloads them")
        return f"{len(read_tensors(target))} tensors, headers and sizes consistent"

    def draft_config() -> str:
        configs["draft"] = found = DraftConfig.from_dir(draft)
        taps = list(found.target_layer_ids)
        return f"{found.num_layers} layers, block {found.block_size}, taps {taps}"

    steps: list[tuple[str, tuple[str, ...], Callable[[], str]]] = [
        ("target config", (), target_config),
        ("target weights", ("target",), weights_of_target),
        ("draft config", (), draft_config),
        ("draft tensors", ("draft",), lambda: check_draft_tensors(configs["draft"], draft)),
        (
            "hidden size",
            ("target", "draft"),
            lambda: check_hidden(configs["target"], configs["draft"]),
        ),
        (
            "vocabulary",
            ("target", "draft"),
            lambda: check_vocabulary(configs["target"], configs["draft"]),
        ),
        ("taps", ("target", "draft"), lambda: check_taps(configs["target"], configs["draft"])),
        (
            "mask token",
            ("target", "draft"),
            lambda: check_mask_token(configs["target"], configs["draft"]),
        ),
        (
            "block size",
            ("draft",),
            lambda: check_block(configs["draft"], num_speculative_tokens),
        ),
    ]
    if draft_sha256 is not None:
        steps.append(("revision", ("draft",), lambda: check_revision(draft, draft_sha256)))

    checks = []
    for name, needs, step in steps:
        lacking = [need for need in needs if need not in configs]
        if lacking:
            checks.append(Check(name, "skipped", f"no readable {lacking[0]} config"))
            continue
        try:
            checks.append(Check(name, "ok", step()))
        except _SkippedError as skip:
            checks.append(Check(name, "skipped", str(skip)))
        except DFlashError as err:
            checks.append(Check(name, "failed", err.message, err.hint, err.exit_code))
        except OSError as err:
            remedy = "check the permissions and the disk"
            code = CheckpointError.exit_code
            checks.append(Check(name, "failed", f"cannot be read: {err}", remedy, code))
    return checks


class _SkippedError(Exception):
    """Raised by a preflight step that has nothing to look at; says why."""


def require(checks: list[Check]) -> None:
    """Raise the first failed check as the error it was found as."""
    for check in checks:
        if check.status == "failed":
            kinds = (ModelNotFoundError, PairMismatchError, CheckpointError)
            kind = next((k for k in kinds if k.exit_code == check.exit_code), PairMismatchError)
            raise kind(f"{check.name}: {check.detail}", hint=check.remedy)


def check_draft_tensors(draft: DraftConfig, folder: Path) -> str:
    """Names and shapes of the draft's tensors against its config."""
    found = check_tensors(folder, draft.tensor_shapes())
    return f"{len(found)} tensors, names and shapes as the config says"


def check_hidden(target: TargetConfig, draft: DraftConfig) -> str:
    """Embedding, head and taps come from the target: widths must be the same."""
    for name, width in (
        ("hidden_size", draft.hidden_size),
        ("target_hidden_size", draft.target_hidden_size),
    ):
        if width != target.hidden_size:
            raise PairMismatchError(
                f"{draft.source}: {name} is {width}, but the target's hidden_size is "
                f"{target.hidden_size} ({target.source})",
                hint="this draft was trained for another target",
            )
    return f"{target.hidden_size} in both"


def check_vocabulary(target: TargetConfig, draft: DraftConfig) -> str:
    """The draft uses the target's head, so the vocabularies must be equal."""
    if draft.vocab_size != target.vocab_size:
        raise PairMismatchError(
            f"{draft.source}: vocab_size is {draft.vocab_size}, but the target's is "
            f"{target.vocab_size} ({target.source})",
            hint="this draft was trained for another tokenizer; use the target's own draft",
        )
    return f"{target.vocab_size} in both"


def check_taps(target: TargetConfig, draft: DraftConfig) -> str:
    """Taps are target layer indices, and the target has the depth the draft expects."""
    if draft.num_target_layers not in (None, target.num_layers):
        raise PairMismatchError(
            f"{draft.source}: num_target_layers is {draft.num_target_layers}, but the target "
            f"has {target.num_layers} ({target.source})",
            hint="this draft was trained for another target",
        )
    beyond = [tap for tap in draft.target_layer_ids if tap >= target.num_layers]
    if beyond:
        raise PairMismatchError(
            f"{draft.source}: dflash_config.target_layer_ids has {beyond}, expected indices "
            f"0..{target.num_layers - 1}",
            hint="this draft was trained for a deeper target",
        )
    return f"{list(draft.target_layer_ids)} of {target.num_layers} layers"


def check_mask_token(target: TargetConfig, draft: DraftConfig) -> str:
    """The mask token is embedded with the target's table, so it must be a row of it."""
    if draft.mask_token_id >= target.vocab_size:
        raise PairMismatchError(
            f"{draft.source}: dflash_config.mask_token_id is {draft.mask_token_id}, expected "
            f"less than the vocabulary's {target.vocab_size}",
            hint="use the target the draft was trained for",
        )
    return f"id {draft.mask_token_id}"


def check_block(draft: DraftConfig, num_speculative_tokens: int | None) -> str:
    """K must leave room for the one known token of the block; engines do not check this."""
    k = draft.max_speculative_tokens if num_speculative_tokens is None else num_speculative_tokens
    if not 1 <= k <= draft.max_speculative_tokens:
        raise PairMismatchError(
            f"num_speculative_tokens is {k}, expected 1..{draft.max_speculative_tokens} "
            f"(block_size {draft.block_size} in {draft.source})",
            hint=f"use num_speculative_tokens {draft.max_speculative_tokens} or less",
        )
    return f"{draft.block_size}, num_speculative_tokens {k}"


def check_revision(folder: Path, sha256: Mapping[str, str]) -> str:
    """The files are the ones expected: a draft with other taps loads as well as a good one."""
    for name, expected in sha256.items():
        path = folder / name
        if not path.is_file():
            raise ModelNotFoundError(f"{path}: no such file", hint="get the whole draft")
        found = sha256_file(path)
        if found != expected:
            raise CheckpointError(
                f"{path}: sha256 is {found[:16]}…, expected {expected[:16]}…",
                hint="get that revision, or pass --draft to use these files knowingly",
            )
    return f"sha256 of {', '.join(sha256)} as expected"
