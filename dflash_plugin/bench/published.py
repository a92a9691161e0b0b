"""Measured against published, where the settings are the same; else which of them differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..matrix import Published
from .plan import DFLASH


@dataclass(frozen=True)
class Comparison:
    """One published number beside ours.

    ``measured`` None: not measured. ``differ``: settings that are not the same (or not
    known to be); empty: the two may be compared. ``metric``: ``AL`` or ``speed-up``.
    """

    dataset: str
    metric: str
    published: float
    measured: float | None
    differ: tuple[str, ...]
    row: Published

    @property
    def differing(self) -> str:
        """The names of the settings that differ."""
        return ", ".join(text.partition(":")[0] for text in self.differ)


def compare(
    settings: Mapping[str, Any], summary: Mapping[str, Any], rows: Iterable[Published]
) -> list[Comparison]:
    """Every published number of this run's pair for a data set of this run."""
    names = {settings.get("model"), settings.get("target")}
    found = []
    for row in rows:
        if row.target not in names:
            continue
        for metric, values in (("AL", row.al), ("speed-up", row.speedup)):
            for dataset, value in values.items():
                if dataset in summary["datasets"]:
                    found.append(
                        Comparison(
                            dataset, metric, value, _measured(summary, dataset, metric, row),
                            _differences(settings, dataset, row), row,
                        )
                    )  # fmt: skip
    return found


def _measured(
    summary: Mapping[str, Any], dataset: str, metric: str, row: Published
) -> float | None:
    level = f"c{row.concurrency}"
    if metric == "AL":  # of all levels together: it does not depend on the load
        stats = summary["acceptance"].get(dataset, {}).get(DFLASH)
        return stats["al"] if stats else None
    taken = summary["datasets"][dataset].get(level, {}).get("speedup", {}).get(DFLASH)
    return taken["median"] if taken else None


def _differences(settings: Mapping[str, Any], dataset: str, row: Published) -> tuple[str, ...]:
    sampling = settings.get("sampling", {})
    arm: dict[str, Any] = next((a for a in settings.get("arms", []) if a["name"] == DFLASH), {})
    source = next((d["source"] for d in settings["datasets"] if d["name"] == dataset), "")
    ours: dict[str, Any] = {
        "engine": str(settings.get("engine")).split(" ")[0],
        "hardware": settings.get("hardware"),
        "template": settings.get("template"),
        "temperature": sampling.get("temperature"),
        "K": arm.get("num_speculative_tokens"),
        "max tokens": sampling.get("max_tokens"),
        "draft": settings.get("draft"),
    }
    theirs = {
        "engine": row.engine,
        "hardware": row.hardware,
        "template": row.template,
        "temperature": row.temperature,
        "K": row.num_speculative_tokens,
        "max tokens": row.max_tokens,
        "draft": row.draft,
    }
    differ = [
        f"{name}: {_shown(ours[name])} (published: {_shown(theirs[name])})"
        for name in ours
        if _plain(ours[name]) != _plain(theirs[name])
    ]
    if "@" not in source:  # not the public data set at a revision
        differ.append(f"prompts: of {source}")
    if row.revision:
        differ.append(f"draft revision: not known (published: {row.revision})")
    return tuple(differ)


def _shown(value: Any) -> str:
    return "not stated" if value is None else str(value)


def _plain(value: Any) -> str:
    """Hardware is written in several ways: `1x H200` and `1x NVIDIA H200` are the same."""
    return _shown(value).replace("NVIDIA ", "").strip().lower()
