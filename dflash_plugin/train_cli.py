"""``dflash-plugin train``, and drafts converted between formats."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from .errors import MissingDependencyError, UsageError

_STAGES = ("prompts", "regenerate", "features", "fit", "evaluate", "export")


def add_parser(commands: Any) -> None:
    """The `train` command."""
    train = commands.add_parser("train", help="make a draft for a target: see docs/training.md")
    train.add_argument("--config", required=True, metavar="FILE", help="such as examples/*.toml")
    train.add_argument(
        "--stage", action="append", choices=_STAGES, help="only this one (repeatable)"
    )
    train.add_argument("--budget", metavar="TIME", help="such as 10m: of all stages together")
    train.add_argument("--out", metavar="DIR", help="instead of the file's `out`")
    train.add_argument("--dry-run", action="store_true", help="check everything, do nothing")
    train.add_argument("--upload", metavar="REPO", help="put the exported draft on the hub")


def run(args: argparse.Namespace) -> int:
    """The stages asked for, resumed; returns the exit code."""
    config, clock, stages = (_recipe(name) for name in ("config", "clock", "run"))
    told = config.load(Path(args.config), Path(args.out) if args.out else None)
    work = stages.Run(told, clock.seconds(args.budget) if args.budget else None)
    if args.dry_run:
        print("\n".join(work.plan()))
        return 0
    _recipe("memory").keep_pages()
    work.run(args.stage or config.STAGES)
    if args.upload:
        print(_recipe("publish").upload(told.out / "draft", args.upload))
    return 0


def convert(args: argparse.Namespace) -> int:
    """`pair convert`: a draft in `speculators` format to the published one, or back."""
    from . import hub

    recipe = _recipe("speculators")
    source, out = Path(args.source), Path(args.out)
    if recipe.is_speculators(source):
        recipe.to_published(source, out)
    elif args.target is None:
        raise UsageError(
            f"{source} is a published draft; --target is missing",
            hint="name the target: speculators' format refers to it",
        )
    else:
        target = hub.local_folder(args.target) or hub.fetch(args.target, None, weights=False)
        recipe.from_published(source, target, out, target_name=args.target)
    return 0


def _recipe(name: str) -> Any:
    """A module of the training recipe, which needs torch."""
    try:
        return importlib.import_module(f".training.recipe.{name}", __package__)
    except ImportError as err:
        if (err.name or "").startswith("dflash_plugin"):
            raise
        raise MissingDependencyError(
            f"training needs the Python package {err.name}",
            hint="pip install 'dflash-plugin[train]'",
        ) from err
