"""One cell through the stages: environment -> serve -> check -> measure -> result."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dflash_plugin import checkpoint, demo, hardware, hub, pair
from dflash_plugin.backends.server import ServerClient
from dflash_plugin.cache import make_dir
from dflash_plugin.errors import DFlashError, EngineExitedError, UsageError
from dflash_plugin.matrix import Cell

from . import check, environment, image_build, measure, prompts, replay, replicas
from . import judge as judging
from .environment import Environment
from .plan import Overrides, Plan
from .records import (
    ABORTED,
    FAILED,
    NOT_RUN,
    PASSED,
    UNTESTED,
    CellResult,
    Verdict,
    load_json,
    overall,
)
from .serve import ServerSpec, serve_all, taps_beside
from .stages import Shared, Stages

CHECK, MEASURE = "check", "measure"
SHARED = "shared"
"""Folder of a run for what its cells have in common."""
EXACT_DTYPE, FAST_DTYPE = "float32", "bfloat16"


@dataclass(frozen=True)
class CellRun:
    """A cell with everything resolved: folders, environments, settings."""

    cell: Cell
    plan: Plan
    folder: Path
    shared: Path
    target: Path
    draft: Path
    reference_draft: Path
    num_speculative_tokens: int
    environment: Environment
    reference: Environment

    def server(self, draft: bool, dtype: str, *, record: Path | None = None) -> ServerSpec:
        """What to start for one arm."""
        arm = "dflash" if draft else "base"
        overrides = self.plan.overrides
        return ServerSpec(
            cell=self.cell,
            environment=self.environment,
            target=self.target,
            draft=self.draft if draft else None,
            num_speculative_tokens=self.num_speculative_tokens,
            dtype=dtype,
            log=self.folder / f"server-{arm}-{dtype}.log",
            eager=dtype == EXACT_DTYPE or not overrides.compiled,
            record=record,
            port=overrides.port if draft else 0,
        )

    @cached_property
    def _weights(self) -> dict[Path, str]:
        """Hashes of the drafts' weights, read once: real ones are gigabytes."""
        return {draft: _weights_hash(draft) for draft in {self.draft, self.reference_draft}}

    def settings(self) -> dict[str, Any]:
        """Everything a number depends on and a reader needs, without paths."""
        return {
            "profile": asdict(self.plan.profile),
            "prompt_set": self.plan.prompts_of(self.cell).name,
            "template": "chat, one user message",
            "temperature": 0.0,
            "num_speculative_tokens": self.num_speculative_tokens,
            "dtype": {"exact": EXACT_DTYPE, "fast": FAST_DTYPE},
            "compiled": self.plan.overrides.compiled,
            "draft_sha256": self._weights[self.draft],
            "reference_draft_sha256": self._weights[self.reference_draft],
        }

    def facts(self) -> dict[str, Any]:
        """Everything a stage's raw data depends on."""
        return {
            **self.settings(),
            "target": _fingerprint(self.target),
            "build": [self.cell.build.args, self.cell.build.env],
            "environment": [self.environment.packages, str(self.environment.path)],
            "reference": [self.reference.packages, str(self.reference.path)],
        }

    def base_facts(self, chosen: Sequence[prompts.Prompt], max_tokens: int) -> list[Any]:
        """What the engine's answers without a draft depend on: not whether we are installed."""
        build = self.cell.build
        decisive = (build.distribution, "torch", "transformers")
        packages = [self.environment.packages.get(name) for name in decisive]
        asked = [[prompt.id, prompt.text] for prompt in chosen]
        return [
            *(self.cell.engine.id, self.cell.platform, build.args, build.env, packages),
            *(_fingerprint(self.target), EXACT_DTYPE, max_tokens, asked),
        ]

    def replay_facts(self) -> list[Any]:
        """What the reference's replay of given answers depends on."""
        return [
            *(_fingerprint(self.target), self._weights[self.reference_draft]),
            load_json(self.reference_draft / "config.json"),
            *(self.num_speculative_tokens, self.reference.packages, str(self.reference.path)),
        ]


def run_cell(
    cell: Cell,
    plan: Plan,
    out: Path,
    *,
    stages: Collection[str] = (CHECK, MEASURE),
    resume: bool = False,
) -> CellResult:
    """Run the stages of one cell and judge them.

    Stages write their raw data to ``<out>/cells/<cell id>/`` as they finish; with
    ``resume`` those whose settings are unchanged are read back instead of run. Cells of one
    ``out`` share an engine's answers without a draft, and replays of the same answers.

    Raises:
        DFlashError: nothing was judged; use :func:`aborted` to record it.
    """
    run = prepare(cell, plan, out)
    stage = Stages(run.folder, run.facts(), resume)
    profile, rows = plan.profile, plan.prompts_of(cell).prompts
    exact = replayed = control = speed = None

    if CHECK in stages:
        chosen = prompts.spread(rows, profile.lossless_prompts)
        exact = stage("exact", lambda: _exact(run, chosen))
        replayed = stage("replay", lambda: _replay(run, exact), after=exact)

    def control_stage(base: ServerClient, dflash: ServerClient) -> dict[str, Any]:
        return check.run_control(
            base,
            dflash,
            prompts.spread(rows, profile.control_prompts),
            max_tokens=profile.max_tokens,
            width=run.num_speculative_tokens + 1,
        )

    def speed_stage(base: ServerClient, dflash: ServerClient) -> dict[str, Any]:
        return measure.run_speed(
            base,
            dflash,
            prompts.spread(rows, profile.speed_prompts),
            max_tokens=profile.max_tokens,
            rounds=profile.speed_rounds,
            concurrency=profile.concurrency,
        )

    wanted = []
    if CHECK in stages and profile.control_prompts:
        wanted.append("control")
    if MEASURE in stages and profile.measures_speed:
        wanted.append("speed")
    missing = [name for name in wanted if not stage.done(name)]
    servers = _lazy_servers(run) if missing else _no_servers()
    with servers as clients:
        if "control" in wanted:
            control = stage("control", lambda: control_stage(*clients()))
        if "speed" in wanted:
            speed = stage("speed", lambda: speed_stage(*clients()))
    return judge(run, exact, replayed, control, speed)


def judge(
    run: CellRun,
    exact: Mapping[str, Any] | None,
    replayed: Mapping[str, Any] | None,
    control: Mapping[str, Any] | None,
    speed: Mapping[str, Any] | None,
) -> CellResult:
    """The cell's result from its stages' raw data; stages not run stay "not run"."""
    lossless = faithful = faster = UNTESTED
    al = al_reference = speedup = None
    if exact is not None and replayed is not None:
        lossless = judging.judge_lossless(
            exact, control, float32_only=not run.plan.profile.control_prompts
        )
        faithful = judging.judge_faithful(exact, replayed, run.cell.pair.expected)
        al, al_reference = faithful.evidence["al"], faithful.evidence["al_reference"]
    if not run.plan.profile.measures_speed:
        faster = Verdict(NOT_RUN, f"profile {run.plan.profile.name} leaves speed out")
    if speed is not None:
        summary = measure.summarise(speed)
        faster = measure.judge_faster(summary)
        speedup = next((row["speedup"] for row in summary if row["concurrency"] == 1), None)
    verdicts = {"lossless": lossless, "faithful": faithful, "faster": faster}
    left_out = () if run.plan.profile.measures_speed else ("faster",)
    status, reason = overall({k: v for k, v in verdicts.items() if k not in left_out})
    raw = {"exact": exact, "replay": replayed, "control": control, "speed": speed}
    return CellResult(
        id=run.cell.id,
        status=status,
        reason=reason,
        # Its servers have answered, or an error had ended the run.
        serves=UNTESTED if exact is None and speed is None else Verdict(PASSED),
        **verdicts,
        al=al,
        al_reference=al_reference,
        speedup=speedup,
        environment=_facts(run),
        settings=run.settings(),
        raw={name: data for name, data in raw.items() if data is not None},
    )


def aborted(cell: Cell, error: DFlashError) -> CellResult:
    """A result for a cell whose run ended in an error.

    An engine that ended because of the draft is a finding ("serves" failed), not an abort.
    """
    serves, why = UNTESTED, "the run was aborted"
    status, reason = ABORTED, str(error)
    if isinstance(error, EngineExitedError) and error.drafting:
        found = error.cause or error.message.splitlines()[0]
        serves, why = Verdict(FAILED, found), "the engine does not serve"
        status = FAILED
        reason = f"serves: {found}" if error.cause else reason
    untested = Verdict(NOT_RUN, why)
    return CellResult(
        id=cell.id,
        status=status,
        reason=reason,
        serves=serves,
        lossless=untested,
        faithful=untested,
        faster=untested,
        settings={"exit_code": error.exit_code},
    )


def not_run(cell: Cell) -> CellResult:
    """A result for a cell that the matrix lists and says not to run."""
    return CellResult(id=cell.id, status=NOT_RUN, reason=cell.not_run)


def prepare(cell: Cell, plan: Plan, out: Path) -> CellRun:
    """Resolve a cell's models and check them, then its environments; build what is not there.

    Raises:
        DFlashError: a model is missing or does not fit, or an environment cannot be built.
    """
    overrides = plan.overrides
    target, draft = _models(cell, overrides)
    reference_draft = _local(overrides.reference_draft) if overrides.reference_draft else draft
    k = overrides.num_speculative_tokens
    k = cell.pair.num_speculative_tokens if k is None else k
    for half in dict.fromkeys((draft, reference_draft)):
        # The packaged draft has to be itself; one named on the command line may be anything.
        own = demo.manifest.hashes(half) if half == demo.DRAFT else None
        pair.require(pair.preflight(target, half, k, draft_sha256=own))
    folder = make_dir(out / "cells" / cell.id)
    say(f"{cell.id}: environments")
    return CellRun(
        cell=cell,
        plan=plan,
        folder=folder,
        shared=make_dir(out / SHARED),
        target=target,
        draft=draft,
        reference_draft=reference_draft,
        num_speculative_tokens=k,
        environment=engine_environment(cell, overrides),
        reference=environment.ensure_reference(),
    )


def _models(cell: Cell, overrides: Overrides) -> tuple[Path, Path]:
    """Folders of target and draft: those named on the command line, else the pair's."""
    given = _local(overrides.draft) if overrides.draft else None
    if overrides.target is not None:
        if given is None:
            raise UsageError("--target without --draft", hint="name both halves of the pair")
        return _local(overrides.target), given
    row = cell.pair
    if row.replica:
        replica = replicas.ensure(row.replica)
        return replica.target, given or replica.draft
    if row.embedded:
        embedded = demo.demo_pair()
        return embedded.target, given or embedded.draft
    target = hub.local_folder(row.target) or hub.fetch(
        row.target, row.target_revision, weights=True
    )
    draft = given or hub.local_folder(row.draft)
    return target, draft or hub.fetch(row.draft, row.draft_revision, weights=True)


def engine_environment(cell: Cell, overrides: Overrides) -> Environment:
    """The cell's environment: its image, the interpreter the user named, or a built one."""
    variant = cell.variant
    if overrides.containers is not None:
        return image_build.ensure(cell, overrides.containers)
    for engine_id, python in overrides.env_python:
        if engine_id == cell.engine.id:
            if variant.patches is not None:
                raise UsageError(
                    f"{cell.id}: --env-python names an engine, and this cell needs a patched one",
                    hint="leave --env-python out: a copy of the engine is patched for the cell",
                )
            return environment.adopt(python, cell.engine, variant.plugin)
    return environment.ensure_engine(
        cell.engine, cell.platform, plugin=variant.plugin, patches=variant.patches
    )


def say(text: str) -> None:
    """One progress line on stderr."""
    print(text, file=sys.stderr, flush=True)


def _exact(run: CellRun, chosen: list[prompts.Prompt]) -> dict[str, Any]:
    max_tokens = run.plan.profile.max_tokens
    answers = Shared(run.shared, "base", run.base_facts(chosen, max_tokens))
    plain = answers.read()
    record = run.folder / "blocks.jsonl"
    for old in (record, taps_beside(record)):
        old.unlink(missing_ok=True)
    # Without a draft first: an engine that cannot serve the target is not the draft's finding.
    specs = [] if plain is not None else [run.server(False, EXACT_DTYPE)]
    specs.append(run.server(True, EXACT_DTYPE, record=record))
    with _servers(run, specs) as (*base, dflash):
        data = check.run_exact(
            base[0] if base else plain or {},
            dflash,
            chosen,
            max_tokens=max_tokens,
            num_speculative_tokens=run.num_speculative_tokens,
            record=record,
        )
    if plain is None:
        answers.keep({seq["id"]: seq["base"] for seq in data["sequences"]})
    return data


def _replay(run: CellRun, exact: Mapping[str, Any]) -> dict[str, Any]:
    sequences = [{k: seq[k] for k in ("id", "prompt", "generated")} for seq in exact["sequences"]]
    replayed = Shared(run.shared, "replay", [*run.replay_facts(), sequences])
    found = replayed.read()
    if found is None:
        say(f"{run.cell.id}: the reference replays {len(sequences)} answers")
        found = replay.replay(
            run.reference,
            run.target,
            run.reference_draft,
            run.num_speculative_tokens,
            sequences,
        )
        replayed.keep(found)
    return found


@contextmanager
def _servers(run: CellRun, specs: list[ServerSpec]) -> Iterator[list[ServerClient]]:
    say(f"{run.cell.id}: starting {len(specs)} servers in {specs[0].dtype}")
    start = time.monotonic()
    with serve_all(specs, timeout=run.plan.overrides.ready_timeout) as clients:
        say(f"{run.cell.id}: ready after {time.monotonic() - start:.0f} s")
        yield clients


@contextmanager
def _lazy_servers(run: CellRun) -> Iterator[Callable[[], list[ServerClient]]]:
    specs = [run.server(False, FAST_DTYPE), run.server(True, FAST_DTYPE)]
    with _servers(run, specs) as clients:
        yield lambda: clients


@contextmanager
def _no_servers() -> Iterator[Callable[[], list[ServerClient]]]:
    yield list


def _local(path: Path) -> Path:
    folder = hub.local_folder(str(path))
    if folder is None:
        raise UsageError(f"{path}: expected a local model folder", hint="download it first")
    return folder


def _weights_hash(folder: Path) -> str:
    hashes = [checkpoint.sha256_file(path) for path in checkpoint.weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _fingerprint(folder: Path) -> list[list[Any]]:
    """Which weights these are, on this machine: hashing a large target takes minutes."""
    files = [folder / "config.json", *checkpoint.weight_files(folder)]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _facts(run: CellRun) -> dict[str, Any]:
    container = run.environment.container
    return {
        "kind": run.environment.kind,
        **({"container": asdict(container)} if container else {}),
        "packages": dict(run.environment.packages),
        "reference_packages": dict(run.reference.packages),
        "python": run.environment.packages.get("python", platform.python_version()),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": hardware.cpu_model(),
        "cores": os.cpu_count(),
    }
