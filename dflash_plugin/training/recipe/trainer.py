"""Stage 4: the loop. Every step is a function of (seed, step), so a run can stop anywhere.

Weights and optimizer are float32; products run in the run's precision. On the CPU a resumed
run ends with the same bits as one that was never stopped, given the same versions and
threads. Under ``torchrun`` each process takes its part of every step's texts.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ...errors import CheckpointError, TrainingError
from ..draft import TrainableDraft
from ..fit import Recipe, labels, schedule
from . import curve, tensors
from .clock import Clock
from .config import Config, Fit
from .objective import capped, choose_rows, spread_anchors, teacher_at, weighted_loss
from .optimizer import Optimizer
from .parallel import World
from .simulate import simulate
from .store import Features, Texts

CHECKPOINT = "checkpoint.safetensors"
_WARM, _TIMED = 3, 12  # steps: before, and until, a step's time is believed
_RESERVE = 0.9  # share of a budget that is planned for steps; the rest is for evaluation


class Source(Protocol):
    """Where features come from: :class:`~.store.Stored` or :class:`~.store.Computed`."""

    texts: Texts

    def get(self, indices: Any) -> Features:
        """Features of these texts."""
        ...


@dataclass
class State:
    """What a checkpoint holds beside tensors.

    Attributes:
        step: steps done; ``steps``: of the whole run, fixed once a step's time is known.
        labels: tokens learned from so far, in all processes.
    """

    key: str
    step: int = 0
    steps: int = 0
    timed: bool = False
    labels: int = 0
    seconds: float = 0.0


class Trainer:
    """A draft, its optimizer and its averaged weights.

    Args:
        cap: the target's ``final_logit_softcapping``, for the logits of a teacher.
    """

    def __init__(
        self,
        config: Config,
        draft: TrainableDraft,
        source: Source,
        folder: Path,
        key: str,
        *,
        clock: Clock,
        world: World | None = None,
        cap: float | None = None,
    ) -> None:
        self._cap = cap
        self.config, self.source, self.folder, self.clock = config, source, folder, clock
        self.world = world or World()
        fit = config.fit
        self.draft = draft.to(self.world.device)
        if fit.gradient_checkpointing:
            for layer in self.draft.layers:
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)
        self.names = [name for name, _ in draft.named_parameters()]
        self.parameters = [parameter for _, parameter in draft.named_parameters()]
        self.average = [p.detach().clone() for p in self.parameters] if fit.ema else None
        self.optimizer = Optimizer(fit, list(draft.named_parameters()))
        self.model = self.world.wrap(self.draft)
        self.head = self.draft._head
        self.state = State(key)
        per_epoch = len(batches(source.texts, fit.batch * self.world.size, config.seed, 0))
        self.state.steps = max(1, round(fit.epochs * per_epoch))
        self.per_epoch = per_epoch
        self._plan: tuple[int, list[list[int]]] = (-1, [])
        counts = source.texts.counts(len(self.head))
        self.common = counts.argsort(descending=True, stable=True)[: fit.head_rows]
        self.common = self.common[counts[self.common] > 0]
        if (folder / CHECKPOINT).exists():
            self._resume()

    def run(self) -> State:
        """Train to the end; leaves the exported weights in the draft.

        Raises:
            TrainingError: a loss or gradient that is not a number; the last checkpoint stands.
            KeyboardInterrupt: after Ctrl-C or a termination; a checkpoint is written first.
            CacheError: the disk is full; the last checkpoint stands.
        """
        fit, state = self.config.fit, self.state
        started = time.monotonic() - state.seconds
        times: list[float] = []
        self.draft.train()
        with _stops() as stop, self.clock.progress("step", state.steps, state.step) as told:
            while state.step < state.steps:
                begun = time.monotonic()
                loss, rate = self.step()
                times.append(time.monotonic() - begun)
                state.seconds = time.monotonic() - started
                if not state.timed and len(times) >= _TIMED:
                    self._plan_for_budget(statistics.median(times[_WARM:]))
                row = {"step": state.step, "loss": loss, "lr": rate, "labels": state.labels}
                if state.step % fit.evaluate_every == 0 or state.step == state.steps:
                    row.update(self.evaluate())
                if self.world.first:
                    curve.append(self.folder, {**row, "seconds": round(state.seconds, 2)})
                told(state.step, loss=f"{loss:.3f}", al=row.get("al", "?"))
                stopped = self.world.any(stop())
                if stopped or state.step % fit.checkpoint_every == 0 or state.step == state.steps:
                    self.save()
                if stopped and state.step < state.steps:
                    raise KeyboardInterrupt
        with self.averaged():
            weights = [parameter.detach().clone() for parameter in self.parameters]
        self._put(weights)
        self.draft.eval()
        return state

    def step(self) -> tuple[float, float]:
        """One step; its loss and learning rate."""
        fit, state = self.config.fit, self.state
        generator = torch.Generator().manual_seed(
            self.config.seed << 40 ^ state.step << 12 ^ self.world.rank
        )
        found = self.source.get(self._indices(state.step))
        anchors = spread_anchors(found.batch, fit.anchors, generator)
        wanted = labels(found.batch, anchors, self.draft.config.block_size)
        logits, places, soft = self._forward(found, anchors, wanted, generator)
        total, weight = weighted_loss(logits, places, fit.decay, soft, fit.distill)
        # Gradients are averaged over processes: each one's share of all weights counts.
        everywhere = self.world.sum(weight.detach())
        loss = total * self.world.size / everywhere
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, fit.clip)
        told = float(self.world.sum(total.detach()) / everywhere)
        if not math.isfinite(told) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"step {state.step + 1} of {state.steps}: loss {told}, gradient {float(norm)}; "
                f"the last checkpoint stands ({self.folder / CHECKPOINT})",
                hint="lower fit.learning_rate, and look for broken texts or target weights",
            )
        rate = fit.learning_rate * schedule(state.step, _recipe(fit, state.steps))
        self.optimizer.step(rate)
        state.step += 1
        state.labels += int(self.world.sum((wanted != -100).sum()))
        if self.average is not None:
            decay = min(fit.ema, (1 + state.step) / (10 + state.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return told, rate

    def evaluate(self) -> dict[str, Any]:
        """Acceptance length on held-out texts, with the averaged weights."""
        held = self.source.texts.heldout[: self.config.fit.evaluate_texts]
        if not held or not self.world.first:
            return {}
        with self.averaged(), self._precision():
            stats = simulate(self.draft, self.source, held, self.head, self.world.device)
        return {} if stats.al is None else {"al": round(stats.al, 4)}

    def save(self) -> None:
        """Write the checkpoint, by the first process."""
        if not self.world.first:
            return
        self.clock.over()  # what it says now is what a later process starts from
        held: dict[str, Tensor] = {"tap_scale": self.draft.tap_scale}
        for i, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            held[f"draft.{name}"] = parameter.detach()
            if self.average is not None:
                held[f"average.{name}"] = self.average[i]
        held.update(self.optimizer.tensors())
        tensors.save(self.folder / CHECKPOINT, held, vars(self.state))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights are the draft's while the context lasts."""
        if self.average is None:
            yield
            return
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    def _forward(
        self, found: Features, anchors: Tensor, wanted: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits over the chosen rows, the labels' places among them, and the teacher's logits."""
        fit, size, device = self.config.fit, self.draft.config.block_size, self.world.device
        correction = None
        places = wanted
        head = self.head
        if fit.head_rows:
            rows = choose_rows(wanted, self.common, fit.negatives, len(self.head), generator)
            places, correction = rows.places(wanted), rows.correction.to(device)
            head = self.head[rows.ids.to(device)]
        taps = found.taps.to(device)
        ids = found.batch.ids.to(device)
        soft = None
        self.draft._head = head
        try:
            with self._precision():
                logits = self.model(taps, ids, anchors.to(device))
                if fit.distill and found.last is not None:
                    seen = teacher_at(found.last.to(device), anchors.to(device), size)
                    soft = capped(seen.to(head.dtype) @ head.T, self._cap)
        finally:
            self.draft._head = self.head
        if correction is not None:
            logits = logits + correction
            soft = None if soft is None else soft + correction
        return logits, places.to(device), soft

    def _precision(self) -> Any:
        if self.config.fit.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _indices(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        if self._plan[0] != epoch:
            size = self.config.fit.batch * self.world.size
            self._plan = (epoch, batches(self.source.texts, size, self.config.seed, epoch))
        return self._plan[1][place][self.world.rank :: self.world.size]

    def _plan_for_budget(self, seconds_per_step: float) -> None:
        """Fix the number of steps, once, to what the time allows; saved at once."""
        state = self.state
        state.timed = True
        left = self.world.agree(self.clock.left)
        if left is not None:
            steps = state.step + int(max(0.0, left) * _RESERVE / seconds_per_step)
            state.steps = max(state.step + 1, min(state.steps, steps))
        self.save()

    def _put(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, weights)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        facts, held = tensors.facts(path), tensors.load(path)
        if facts.get("key") != self.state.key:
            raise TrainingError(
                f"{path}: of a run with other settings or texts",
                hint="another --out, or delete the folder to train anew",
            )
        try:
            state = State(**facts)
            self._put([held[f"draft.{name}"] for name in self.names])
            self.draft.tap_scale.copy_(held["tap_scale"])
            if self.average is not None:
                for mean, name in zip(self.average, self.names, strict=True):
                    mean.copy_(held[f"average.{name}"])
            self.optimizer.load(held)
        except (KeyError, TypeError, RuntimeError) as err:
            raise CheckpointError(
                f"{path}: not a checkpoint of this draft ({err})", hint="delete it to train anew"
            ) from err
        self.state = state
        if self.world.first:
            curve.rewind(self.folder, state.step)


def batches(texts: Texts, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Texts of every step of an epoch: shuffled, those of one step of about one length.

    What is left over at the end of an epoch is left out of it; another epoch has it.
    """
    chance = random.Random(f"{seed} {epoch}")
    order = list(texts.training)
    chance.shuffle(order)
    while len(order) < size:  # a tiny data set
        order += order[: size - len(order)]
    found = []
    for start in range(0, len(order), size * 8):
        near = sorted(order[start : start + size * 8], key=texts.length)
        found += [near[i : i + size] for i in range(0, len(near) - size + 1, size)]
    chance.shuffle(found)
    return found


def _recipe(fit: Fit, steps: int) -> Recipe:
    # A run cut short by its budget has no time for a long warm-up.
    warmup = min(fit.warmup, steps // 10)
    return Recipe(steps=steps, learning_rate=fit.learning_rate, warmup=warmup, floor=fit.floor)


@contextmanager
def _stops() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C or a termination came; a step is never left half done."""
    seen: list[int] = []
    before: Mapping[int, Any] = {
        number: signal.signal(number, lambda got, _frame: seen.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
