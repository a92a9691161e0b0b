"""The rows of ``compat_matrix.toml``, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import architectures

VERDICTS = ("lossless", "faithful", "faster")
SERVES = "serves"
"""What comes before the verdicts: the engine starts with the draft and answers."""
PUBLISHED, DFLASH2, ANNOUNCED = "published", "dflash2", "announced"
DEMO, REPLICA = "demo", "replica"
STATUSES = (PUBLISHED, DFLASH2, ANNOUNCED, DEMO, REPLICA)


@dataclass(frozen=True)
class Build:
    """How one engine release is installed and started on one platform."""

    platform: str
    distribution: str
    torch: str
    requires_python: str
    lock: str | None  # None: not built here, an interpreter that has it must be named
    env: Mapping[str, str]
    args: tuple[str, ...]
    torchvision: str | None = None  # where the engine does not start without it


@dataclass(frozen=True)
class Engine:
    """One engine release, e.g. ``vllm-0.32.0``."""

    name: str
    version: str
    builds: Mapping[str, Build]

    @property
    def id(self) -> str:
        """``<name>-<version>``, the first part of a cell id."""
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Variant:
    """What is done to the stock engine: nothing, the plugin, a patch set.

    ``plugin``: its entry point is called. ``patches``: the variant of the patch set; the plugin
    is installed then too, for the patches call its functions.
    """

    name: str
    plugin: bool
    description: str
    patches: str | None = None


@dataclass(frozen=True)
class Expected:
    """A known acceptance length of a pair, and the settings it belongs to."""

    prompts: str
    num_speculative_tokens: int
    al: float
    tolerance: float
    source: str


@dataclass(frozen=True)
class Pair:
    """A target and its draft.

    ``embedded`` pairs travel with this package. ``replica`` names a tiny pair that the
    harness builds; ``target`` and ``draft`` are then no repositories. ``status``: published,
    dflash2 (published, of the second kind), announced, demo or replica. An empty ``draft``,
    and 0 ``num_speculative_tokens``: not known. ``generation`` tells drafts apart that were
    one repository's at different times. ``args``: what the engine is started with on GPUs
    besides the speculation, by engine.
    """

    id: str
    target: str
    target_revision: str | None
    draft: str
    draft_revision: str | None
    embedded: bool
    num_speculative_tokens: int
    notes: str
    expected: tuple[Expected, ...]
    replica: str | None = None
    status: str = PUBLISHED
    generation: str = ""
    target_shape: architectures.Target | None = None
    draft_shape: architectures.Draft | None = None
    args: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def memory(self, tokens: int = 8192, sequences: int = 1) -> architectures.Memory | None:
        """What the pair takes in the published precision; None where a size is not known."""
        if self.target_shape is None or self.draft_shape is None:
            return None
        k = self.num_speculative_tokens
        return architectures.memory(self.target_shape, self.draft_shape, k, tokens, sequences)


@dataclass(frozen=True)
class Cell:
    """One engine release x variant x platform x pair.

    ``not_run``: why it is listed and yet not run by default; empty: it is run.
    """

    engine: Engine
    variant: Variant
    platform: str
    pair: Pair
    not_run: str = ""

    @property
    def id(self) -> str:
        """Names the result, the test, the log and the container."""
        return f"{self.engine.id}/{self.variant.name}/{self.platform}/{self.pair.id}"

    @property
    def build(self) -> Build:
        """The engine's build for this cell's platform."""
        return self.engine.builds[self.platform]


@dataclass(frozen=True)
class Profile:
    """How much of a cell is run: counts of prompts, tokens and rounds.

    Zero ``control_prompts``, ``speed_prompts`` or ``speed_rounds``: that stage is not run.
    """

    name: str
    lossless_prompts: int
    control_prompts: int
    speed_prompts: int
    speed_rounds: int
    max_tokens: int
    concurrency: tuple[int, ...]

    @property
    def measures_speed(self) -> bool:
        """Whether there is anything to time."""
        return bool(self.speed_prompts and self.speed_rounds and self.concurrency)


@dataclass(frozen=True)
class Known:
    """A verdict (or ``serves``) that is known not to pass, why, and until when.

    ``cell`` is a cell's id or a glob of several.
    """

    cell: str
    verdict: str
    reason: str
    until: str


@dataclass(frozen=True)
class Published:
    """Numbers as a pair's authors state them, and the settings they belong to.

    ``al`` and ``speedup`` (to the same engine without speculation) are by data set.
    ``temperature`` or ``max_tokens`` None: not stated.
    """

    target: str
    draft: str
    revision: str
    engine: str
    hardware: str
    template: str
    temperature: float | None
    num_speculative_tokens: int
    max_tokens: int | None
    concurrency: int
    al: Mapping[str, float]
    speedup: Mapping[str, float]
    source: str
    grade: str
