"""A run: its stages in order, what each has made, and the time each may take.

    <out>/prompts.jsonl        <out>/fit/checkpoint.safetensors, log.jsonl, curve.png
    <out>/answers.jsonl        <out>/fit/draft/   the averaged weights
    <out>/features/            <out>/evaluation.json
    <out>/state.json           <out>/draft/       the exported folder

A stage that is done is not done again, unless its settings or what it is made of changed:
then the run stops and says so, since what was made may have taken hours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...cache import atomic_write_text, locked, staged_dir
from ...errors import DFlashError, TrainingError, UsageError
from ...pair import DraftConfig
from ..export import export
from . import curve, evaluate, models, prompts, publish, regenerate, sources, store
from .clock import Clock
from .config import STAGES, Config
from .parallel import World
from .trainer import Trainer

_STATE = "state.json"


class Run:
    """One output folder.

    Args:
        budget: seconds for all stages together, earlier processes included (None: any).
    """

    def __init__(self, config: Config, budget: float | None = None) -> None:
        self.config, self.budget, self.out = config, budget, config.out
        self.state = _read_state(self.out / _STATE)
        self.world: World | None = None
        self._work: dict[str, Callable[[Clock], dict[str, Any]]] = {
            "prompts": self._prompts,
            "regenerate": self._regenerate,
            "features": self._features,
            "fit": self._fit,
            "evaluate": self._evaluate,
            "export": self._export,
        }

    def run(self, stages: Sequence[str] = STAGES) -> None:
        """Do these stages, in order; what is done already is only named.

        Raises:
            DFlashError: see the stages; what they made so far is kept.
        """
        name = "train-" + hashlib.sha256(str(self.out.absolute()).encode()).hexdigest()[:12]
        self.world = World(self.config.target.device)
        if self.world.size > 1 and list(stages) != ["fit"]:
            raise UsageError(
                "several processes, but not for `fit` alone",
                hint="torchrun … train --stage fit; the other stages in one process",
            )
        # The first process alone holds the lock and writes; the others train along.
        with locked(name) if self.world.first else contextlib.nullcontext():
            for stage in STAGES:
                if stage in stages:
                    self._stage(stage)
        self.world.close()

    def plan(self) -> list[str]:
        """What would be done, a line per stage, after every check that needs no weights."""
        lines = [f"run {self.config.name} in {self.out}"]
        try:
            folder = models.target_folder(self.config.target, weights=False)
            shape = models.draft_config(self.config, folder)
            facts = models.describe(shape, self.config.features.teacher)
            lines.append(f"draft: {json.dumps(facts)}")
        except DFlashError as err:
            if self.config.target.model == "demo" or Path(self.config.target.model).is_dir():
                raise
            lines.append(f"draft: not checked, the target cannot be looked up ({err.message})")
        for source in self.config.prompts.source:
            if source.kind not in ("hub", "target"):  # those are asked over a network
                next(iter(sources.read_source(source, self.config)), None)
        prompts.Exclusions.load(self.config.prompts.exclude)
        for stage in STAGES:
            done = self._done(stage)
            status = "done" if done else ("begun" if stage in self.state else "to do")
            allowed = self._allowed(stage)
            time = "" if allowed is None or done else f", at most {allowed:.0f} s"
            lines.append(f"{stage}: {status}{time}")
        return lines

    def _stage(self, stage: str) -> None:
        # Shards that were lost or damaged since are made again, as long as they are needed.
        again = stage == "features" and not self._done("fit")
        if self._done(stage) and not again:
            print(f"{stage}: done ({_facts(self.state[stage])})", file=sys.stderr)
            return
        at = STAGES.index(stage)
        # A card without an evaluation says "not run".
        needed = STAGES[: STAGES.index("evaluate") if stage == "export" else at]
        for earlier in needed:
            if not self._done(earlier):
                raise UsageError(
                    f"{stage} needs {earlier}, which is not done in {self.out}",
                    hint=f"--stage {earlier}, or no --stage for all",
                )
        key, told = self._key(stage), self.state.get(stage, {})
        if told and told.get("key") != key:
            raise TrainingError(
                f"{self.out}: {stage} was begun with other settings, or on other texts",
                hint=f"another --out; or remove what {stage} and later stages made, and their "
                f"entries in {self.out / _STATE}",
            )
        record = self.state.setdefault(stage, {"key": key, "done": False, "seconds": 0.0})
        first = self.world is None or self.world.first

        def save(seconds: float) -> None:
            record["seconds"] = round(seconds, 1)
            if first:
                self._save()

        clock = Clock(self._allowed(stage), record["seconds"], save)
        print(f"{stage}: started", file=sys.stderr)
        save(clock.spent)
        try:
            facts = self._work[stage](clock)
        except BaseException:
            save(clock.spent)
            raise
        record.update(facts, done=True)
        save(clock.spent)
        print(f"{stage}: done ({_facts(record)})", file=sys.stderr)

    def _prompts(self, _clock: Clock) -> dict[str, Any]:
        found, counts = sources.collect(self.config)
        text = "".join(prompt.to_json() + "\n" for prompt in found)
        atomic_write_text(self.out / "prompts.jsonl", text)
        return {"prompts": len(found), "counts": counts}

    def _regenerate(self, clock: Clock) -> dict[str, Any]:
        asked = prompts.read(self.out / "prompts.jsonl")
        return regenerate.regenerate(self.config, asked, self._answers, clock, self._device)

    def _features(self, clock: Clock) -> dict[str, Any]:
        shape = self._shape()
        texts = self._texts(shape)
        told = {"texts": len(texts), "too_short": texts.too_short}
        told |= {"heldout": len(texts.heldout)}
        if self.config.features.how == "on-the-fly":
            return told
        return told | store.build(
            self.config,
            texts,
            lambda: models.load_target(self.config, shape.target_layer_ids, self._device),
            self.out / "features",
            key=self._key("features"),
            clock=clock,
        )

    def _fit(self, clock: Clock) -> dict[str, Any]:
        shape, folder = self._shape(), self.out / "fit"
        texts = self._texts(shape)
        target = models.load_target(self.config, shape.target_layer_ids, self._device)
        source: store.Stored | store.Computed
        if self.config.features.how == "stored":
            key = self._key("features")
            source = store.Stored(self.config, texts, self.out / "features", key)
        else:
            source = store.Computed(texts, target, self.config.features.teacher)
        draft = models.new_draft(self.config, shape, target, source.scale())
        cap = getattr(target.config, "final_logit_softcapping", None)
        if self.config.features.how == "stored":
            del target
        trainer = Trainer(
            self.config, draft, source, folder, f"{self._key('fit')}-{texts.digest()}",
            clock=clock, world=self.world, cap=cap,
        )  # fmt: skip
        state = trainer.run()
        if trainer.world.first:
            with staged_dir(folder / "draft") as staging:
                export(trainer.draft.cpu(), staging)
            curve.plot(folder)
        return {
            "steps": state.step,
            "labels": state.labels,
            "device": f"{trainer.world.size} x {_device_name(trainer.world.device)}",
            "labels_per_second": round(state.labels / max(state.seconds, 1e-9)),
        }

    def _evaluate(self, clock: Clock) -> dict[str, Any]:
        texts = self._texts(self._shape())
        found = evaluate.evaluate(
            self.config, texts, self.out / "fit" / "draft", clock, self._device
        )
        atomic_write_text(self.out / "evaluation.json", models.as_json(found))
        return {"al": {name: found["heldout"][name]["al"] for name in found["heldout"]}}

    def _export(self, _clock: Clock) -> dict[str, Any]:
        results = publish.results_of(self.out / "evaluation.json")
        return publish.publish(
            self.config, self.out / "fit" / "draft", self.out / "draft", self.state, results
        )

    @property
    def _answers(self) -> Path:
        return self.out / "answers.jsonl"

    @property
    def _device(self) -> torch.device:
        return self.world.device if self.world else torch.device("cpu")

    def _shape(self) -> DraftConfig:
        return models.draft_config(self.config, models.target_folder(self.config.target))

    def _texts(self, shape: DraftConfig) -> store.Texts:
        return store.Texts(self.config, self._answers, shape.vocab_size)

    def _done(self, stage: str) -> bool:
        told = self.state.get(stage, {})
        return bool(told.get("done")) and told.get("key") == self._key(stage)

    def _key(self, stage: str) -> str:
        """Of a stage's settings and those of all it is made from."""
        tables = {
            "prompts": ("prompts",),
            "regenerate": ("target", "prompts", "regenerate"),
            "features": ("target", "prompts", "regenerate", "features", "draft"),
            "fit": ("target", "prompts", "regenerate", "features", "draft", "fit"),
            "evaluate": ("target", "prompts", "regenerate", "draft", "fit", "evaluate"),
            "export": ("target", "prompts", "regenerate", "draft", "fit", "evaluate", "export"),
        }
        return self.config.key(*tables[stage])

    def _allowed(self, stage: str) -> float | None:
        """Seconds for a stage, earlier tries of it included: its share of what is left."""
        if self.budget is None:
            return None
        shares = vars(self.config.budget)
        later = [name for name in STAGES[STAGES.index(stage) :] if name in shares]
        if stage not in shares:
            return None
        spent = sum(
            self.state.get(name, {}).get("seconds", 0.0) for name in STAGES[: STAGES.index(stage)]
        )
        whole = sum(shares[name] for name in later)
        return max(0.0, self.budget - spent) * shares[stage] / whole if whole else 0.0

    def _save(self) -> None:
        atomic_write_text(self.out / _STATE, models.as_json(self.state))


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise TrainingError(
            f"{path}: not JSON ({err})", hint="remove it; finished pieces are found again"
        ) from err
    return found


def _facts(record: dict[str, Any]) -> str:
    hidden = ("key", "done")
    return ", ".join(f"{name} {value}" for name, value in record.items() if name not in hidden)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"
