"""Stage 6: a folder in the published format, with a model card that says what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import __version__
from ...cache import staged_dir
from ...checkpoint import sha256_file
from ...errors import DownloadError, MissingDependencyError
from ...pair import DraftConfig, preflight, require
from . import curve, models
from .config import Config

FILES = ("config.json", "model.safetensors")


def publish(
    config: Config, fitted: Path, folder: Path, state: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Write ``folder`` whole: weights, config, card, learning curve; check it as a pair.

    Args:
        fitted: the folder that ``fit`` wrote.
        state: facts of the stages.
        results: of :func:`~.evaluate.evaluate`.

    Raises:
        CacheError: the disk is full.
        PairMismatchError, CheckpointError: the draft does not fit its target.
    """
    curve.plot(fitted.parent)
    with staged_dir(folder) as staging:
        for name in FILES:
            shutil.copyfile(fitted / name, staging / name)
        plot = fitted.parent / curve.PLOT
        if plot.exists():
            shutil.copyfile(plot, staging / plot.name)
        require(preflight(models.target_folder(config.target), staging))
        card = model_card(config, staging, state, results, plot=plot.exists())
        (staging / "README.md").write_text(card, encoding="utf-8")
    return {"folder": str(folder), "sha256": sha256_file(folder / "model.safetensors")}


def model_card(
    config: Config, folder: Path, state: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Any], *, plot: bool,
) -> str:  # fmt: skip
    """Markdown with the hub's front matter; every number in it was measured in this run."""
    shape = DraftConfig.from_dir(folder)
    facts = models.describe(shape)
    base = config.export.base_model or config.target.model
    front = ["---", *([f"license: {config.export.licence}"] if config.export.licence else [])]
    front += [f"base_model: {base}", "tags: [dflash, speculative-decoding]", "---", ""]
    fit, answers = state.get("fit", {}), state.get("regenerate", {})
    lines = [
        f"# {config.name}", "",
        f"A DFlash draft for speculative decoding of {base}.", "",
        f"- {shape.num_layers} layers, {facts['parameters'] / 1e6:.1f} M parameters, block "
        f"{shape.block_size} (up to {shape.max_speculative_tokens} drafted tokens), taps "
        f"`{facts['taps']}`, mask token {shape.mask_token_id}.",
        f"- Weights: sha256 `{sha256_file(folder / 'model.safetensors')}`.",
        f"- Trained with dflash-plugin {__version__} on {answers.get('answers', '?')} of the "
        f"target's own answers ({answers.get('tokens', '?')} tokens): {fit.get('steps', '?')} "
        f"steps, {fit.get('labels', '?')} labels, {fit.get('seconds', '?')} s on "
        f"{fit.get('device', '?')}.",
        "",
    ]  # fmt: skip
    if config.export.notes:
        lines += [config.export.notes, ""]
    titles = {
        "heldout": "held-out answers, along the text (reference)",
        "generated": "greedy decoding (reference)",
        "server": "an engine's own counters",
    }
    lines += [
        "## Acceptance length", "",
        "Mean tokens per target verify, the target's own token included"
        + (f"; K = {results['k']}, greedy, {results['dtype']}." if results else "."), "",
        "| measured on | prompts | AL | accepted at position 1, 2, … |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, title in titles.items():
        for kind, row in results.get(name, {}).items():
            rates = " ".join(f"{rate:.2f}" for rate in row["accepted_rate_per_position"])
            al = "not measured" if row["al"] is None else f"{row['al']:.2f}"
            lines.append(f"| {title} | {kind} ({row['texts']}) | {al} | {rates} |")
    for name, title in titles.items():
        if name not in results:
            lines.append(f"| {title} | | not run | |")
    if plot:
        lines += ["", f"![learning curve]({curve.PLOT})"]
    return "\n".join([*front, *lines]) + "\n"


def upload(folder: Path, repo: str) -> str:
    """Put the exported folder on the hub, as a private repository if it is new; its address.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        DownloadError: the hub refused, or cannot be reached.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as err:
        raise MissingDependencyError(
            "huggingface_hub is needed to upload", hint="pip install huggingface_hub"
        ) from err
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo))
    except Exception as err:  # the library raises a dozen unrelated types
        raise DownloadError(
            f"{repo}: not uploaded: {str(err).splitlines()[0] if str(err) else type(err).__name__}",
            hint="check the name, the network and your hub token (hf auth login)",
        ) from err


def results_of(path: Path) -> dict[str, Any]:
    """What the stage ``evaluate`` wrote; empty where it was not run."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
