"""Arms of the local back-ends, and the processes of ``torchrun``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import launch
from ..cache import atomic_write_text
from ..errors import UsageError
from .plan import BASE, DFLASH, Arm, Plan
from .records import read
from .sides import LocalSide, Side, load_pair


@dataclass(frozen=True)
class Ranks:
    """This process among those of ``torchrun``: each takes its share of the prompts."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Ranks:
        """What ``torchrun`` has set; one process without it."""
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        return cls(*(int(environ.get(name, value)) for name, value in defaults.items()))

    def share(self, plan: Plan) -> Plan:
        """Every ``count``-th prompt."""
        shares = []
        for dataset in plan.datasets:
            items = dataset.items[self.rank :: self.count]
            if not items:
                raise UsageError(
                    f"{dataset.name}: {len(dataset.items)} prompts for {self.count} processes",
                    hint="raise --max-samples",
                )
            shares.append(replace(dataset, items=items))
        return replace(plan, datasets=tuple(shares))

    def folder(self, root: Path) -> Path:
        """Where this process keeps its records."""
        return root / f"rank-{self.rank}" if self.count > 1 else root

    def wait(self) -> None:
        """Until every process has come here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo")
            dist.barrier()
            dist.destroy_process_group()

    def gather(self, root: Path, own: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Every process's records, also kept together in ``root``."""
        if self.count == 1:
            return list(own)
        folders = [root / f"rank-{n}" for n in range(self.count)]
        lines = [line for folder in folders for line in read(folder / "records.jsonl")]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        atomic_write_text(root / "records.jsonl", text)
        atomic_write_text(root / "run.json", (folders[0] / "run.json").read_text("utf-8"))
        return lines


def arms(
    args: argparse.Namespace, ranks: Ranks, k: int | None
) -> tuple[list[Arm], dict[str, Side]]:
    """Plain decoding, DFlash and, where asked for, prompt lookup on one loaded pair.

    Raises:
        UsageError: a peer that the back-end does not have.
        MissingDependencyError, ModelNotFoundError, PairMismatchError: see
            :func:`dflash_plugin.load`.
    """
    unknown = [peer for peer in args.peer if peer != "ngram"]
    if unknown:
        raise UsageError(f"--peer {unknown[0]}: {args.backend} has ngram alone")
    options = {name: getattr(args, name) for name in ("dtype", "device") if getattr(args, name)}
    if args.backend == "transformers" and ranks.count > 1:
        options.setdefault("device", f"cuda:{ranks.local}")
    loaded = load_pair(args.model or launch.DEMO, args.draft_model, args.backend, **options)
    size = k + 1 if k is not None else loaded.block_size
    drafted = (size or loaded.backend.block_size) - 1
    found = [Arm(BASE), Arm(DFLASH, drafted)]
    sides: dict[str, Side] = {BASE: LocalSide(loaded, 1), DFLASH: LocalSide(loaded, size)}
    for peer in args.peer:
        found.append(Arm(peer, drafted, {"prompt_lookup_num_tokens": drafted}))
        sides[peer] = LocalSide(loaded, 1, lookup=drafted)
    return found, sides


def versions(backend: str) -> str:
    """Back-end and its packages."""
    packages = {"transformers": ("transformers", "torch"), "mlx": ("mlx", "mlx-lm")}[backend]
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages)
