"""What a benchmark compares: its arms, and everything else that decides its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .client import Sampling
from .datasets import Dataset
from .records import Level

BASE, DFLASH = "base", "dflash"


@dataclass(frozen=True)
class Arm:
    """One way to generate: ``base`` (no speculation), ``dflash`` (or ``dflash-k<K>``), a peer.

    ``speculation``: the engine's own description of it; None where it is not known.
    """

    name: str
    num_speculative_tokens: int | None = None
    speculation: Mapping[str, Any] | None = None

    def shown(self) -> dict[str, Any]:
        """JSON for ``run.json``, without a path of this machine."""
        values = asdict(self)
        if self.speculation is not None and "model" in self.speculation:
            values["speculation"]["model"] = portable(str(self.speculation["model"]))
        return values


def portable(name: str | None) -> str | None:
    """A model's name: of a local folder its last part."""
    return Path(name).name if name is not None and Path(name).is_absolute() else name


@dataclass(frozen=True)
class Plan:
    """Data sets x levels x rounds x arms; within a round the arms take turns."""

    backend: str
    model: str
    draft: str | None
    arms: tuple[Arm, ...]
    datasets: tuple[Dataset, ...]
    levels: tuple[Level, ...]
    rounds: int
    sampling: Sampling
    seed: int = 0
    first_round: int = 0

    @property
    def template(self) -> str:
        """How prompts are put to the model."""
        if self.sampling.raw:
            return "raw"
        return "chat, thinking on" if self.sampling.enable_thinking else "chat, thinking off"

    @property
    def numbers(self) -> range:
        """The rounds; the groups of a sweep have rounds of their own."""
        return range(self.first_round, self.first_round + self.rounds)

    def settings(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """JSON for ``run.json``; ``facts``: engine, versions, hardware."""
        return {
            "backend": self.backend,
            "model": portable(self.model),
            "draft": portable(self.draft),
            "arms": [arm.shown() for arm in self.arms],
            "datasets": [
                {"name": d.name, "source": d.source, "prompts": len(d.items), "digest": d.digest}
                for d in self.datasets
            ],
            "levels": [str(level) for level in self.levels],
            "rounds": self.rounds,
            "sampling": asdict(self.sampling),
            "template": self.template,
            "seed": self.seed,
            **facts,
        }

    def order(self, number: int) -> Sequence[Arm]:
        """The arms of a round: A B C, then C B A, so that a drift hits all alike."""
        return self.arms if number % 2 == 0 else self.arms[::-1]
