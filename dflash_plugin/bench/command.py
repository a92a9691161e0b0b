"""``dflash-plugin bench``: set up the arms, measure, advise, report; the exit code."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from .. import __version__, hardware, launch, matrix, pair
from ..cache import atomic_write_text
from ..errors import RequestError, UsageError
from . import advice, analysis, datasets, local_run, report, run, servers
from .client import Sampling
from .options import LOCAL
from .plan import BASE, DFLASH, Arm, Plan, portable
from .records import Level, Store, load_run, read
from .sides import ServerSide, Side


def bench(args: argparse.Namespace, engine_args: Sequence[str] = ()) -> int:
    """Run one benchmark as :mod:`.options` describes it; returns the exit code.

    Raises:
        UsageError: options that do not go together, or a folder with another run.
        RequestError: a server is gone, or requests failed; the report tells which.
        EngineExitedError, EngineTimeoutError: of a server started here.
    """
    if engine_args and not args.serve:
        raise UsageError("arguments after -- are for --serve", hint="add --serve")
    if args.report_only:
        settings = load_run(args.out)
        return _finish(args, settings, read(args.out / "records.jsonl"))
    if args.backend in LOCAL:
        return _local(args)
    if args.serve:
        return _served(args, engine_args)
    return _at_urls(args)


def _plan(args: argparse.Namespace, arms: Sequence[Arm], draft: str | None = None) -> Plan:
    chosen = tuple(
        datasets.load(spec, args.num_prompts) for spec in args.datasets or [datasets.OWN]
    )
    names = [dataset.name for dataset in chosen]
    if len(set(names)) < len(names):
        raise UsageError(f"--dataset names {names} hold one twice", hint="use NAME=FILE")
    levels = [Level(rate=value) for value in args.request_rate or ()]
    widths = args.concurrency or ([] if levels else [1])
    levels = [Level(concurrency=value) for value in widths] + levels
    for dataset in chosen:
        if widths and max(widths) > len(dataset.items):
            raise UsageError(
                f"{dataset.name} has {len(dataset.items)} prompts, too few for --concurrency "
                f"{max(widths)}",
                hint="raise --num-prompts, or lower --concurrency",
            )
    return Plan(
        backend=args.backend, model=args.model or "", draft=draft, arms=tuple(arms),
        datasets=chosen, levels=tuple(levels), rounds=args.rounds, seed=args.seed,
        sampling=Sampling(
            max_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
            top_k=args.top_k, enable_thinking=args.enable_thinking, raw=args.raw,
        ),
    )  # fmt: skip


def _facts(
    model: str, engine: str, machine: str, engine_args: Sequence[str] = ()
) -> dict[str, Any]:
    row = matrix.load().pair_for(model)
    return {
        "target": row.target if row is not None else portable(model),
        "engine": engine,
        "engine_args": list(engine_args),
        "hardware": machine,
        "system": f"{platform.system()} {platform.machine()}",
        "dflash_plugin": __version__,
    }


def _open(args: argparse.Namespace, settings: Mapping[str, Any]) -> Store:
    store = Store(args.out, settings, resume=args.resume)
    if "began" not in store.settings:
        now = datetime.datetime.now(datetime.timezone.utc)
        store.update({"began": now.isoformat(timespec="seconds")})
    return store


def _k(args: argparse.Namespace) -> int | None:
    """K as given, in either way."""
    given: int | None = args.num_speculative_tokens
    if args.block_size is None:
        return given
    k: int = args.block_size - 1
    if given not in (None, k) or k < 1:
        raise UsageError(
            f"--block-size {args.block_size} means K {k}",
            hint="a block of 2 or more, and one of the two options",
        )
    return k


# --- servers that are there -------------------------------------------------


def _at_urls(args: argparse.Namespace) -> int:
    if args.sweep_k:
        raise UsageError("--sweep-k starts the servers itself", hint="add --serve")
    if args.base_url is None:
        raise UsageError(
            f"{args.backend}: no server named",
            hint="--base-url URL (and --baseline-url URL for the speed-up), or --serve",
        )
    k = _k(args)
    urls = {BASE: args.baseline_url, DFLASH: args.base_url}
    urls = {name: url for name, url in urls.items() if url is not None}
    for peer in args.peer:
        name, equals, url = peer.partition("=")
        if not equals or name in urls:
            raise UsageError(f"--peer {peer}: expected NAME=URL, each name once")
        urls[name] = url
    sides = {
        name: ServerSide(
            url, args.model, timeout=args.timeout, stall=args.stall,
            engine=args.backend,
        )
        for name, url in urls.items()
    }  # fmt: skip
    plan = _plan(args, [Arm(name, k if name == DFLASH else None) for name in urls])
    plan = replace(plan, model=sides[DFLASH].model, draft=args.draft_model)
    version = sides[DFLASH].version()
    local = all(
        urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in urls.values()
    )
    machine = args.hardware or (hardware.describe() if local else "not known (give --hardware)")
    facts = _facts(plan.model, f"{args.backend} {version}" if version else args.backend, machine)
    with _open(args, plan.settings(facts)) as store:
        return _measured(args, plan, sides, store)


# --- servers started here ---------------------------------------------------


def _served(args: argparse.Namespace, engine_args: Sequence[str]) -> int:
    if args.base_url or args.baseline_url:
        raise UsageError("--serve starts the servers itself", hint="drop the URLs, or --serve")
    engine = servers.find_engine(args.backend, args.engine_python)
    launch.refuse_speculation(engine_args, engine.name)
    resolved = launch.resolve_pair(args.model or launch.DEMO, args.draft_model)
    pair.require(resolved.preflight(_k(args)))
    most = pair.DraftConfig.from_dir(resolved.draft_dir).max_speculative_tokens
    k = _k(args) or resolved.num_speculative_tokens or most
    starter = servers.Starter(
        engine, args.engine_python, resolved.target, tuple(engine_args), args.out / "logs",
        args.ready_timeout, args.timeout, args.stall,
    )  # fmt: skip
    machine = args.hardware or hardware.describe(cpu=engine.platform == "cpu")
    args.model = args.model or launch.DEMO
    facts = _facts(args.model, f"{engine.name} {engine.base_version}", machine, engine_args)
    facts["plugin_of_engine"] = servers.plugin_version(args.engine_python)
    facts["draft_sha256"] = (resolved.draft_sha256 or {}).get("model.safetensors")
    if args.sweep_k:
        return _swept(args, starter, resolved, most, facts)
    peers = [servers.peer_arm(spec, k, engine.name) for spec in args.peer]
    plan = _plan(args, [Arm(BASE), servers.dflash_arm(resolved, k), *peers], resolved.draft)
    with _open(args, plan.settings(facts)) as store:
        if not run.todo(plan, store):
            return _finish(args, store.settings, store.lines)
        with _report_on_error(args, store), starter.running(plan.arms) as (sides, not_run):
            store.update({"not_run": not_run})
            plan = replace(plan, arms=tuple(arm for arm in plan.arms if arm.name in sides))
            run.measure(plan, sides, store)
        return _finish(args, store.settings, store.lines)


def _swept(
    args: argparse.Namespace,
    starter: servers.Starter,
    resolved: launch.ResolvedPair,
    most: int,
    facts: Mapping[str, Any],
) -> int:
    """A few K for the model, each beside base; then the best three again, as a check."""
    values = advice.first_values(most)
    plan = _plan(args, [Arm(BASE)], resolved.draft)
    sweep = {"values": values, "rounds": args.rounds, "most": most}
    with _open(args, {**plan.settings(facts), "sweep": sweep}) as store:
        if args.request_rate:
            raise UsageError("--sweep-k needs concurrency", hint="drop --request-rate")

        def look(number: int, k: int, *, check: bool) -> None:
            arm = servers.dflash_arm(resolved, k, advice.arm_name(k, check=check))
            both = replace(
                plan, arms=(Arm(BASE), arm), first_round=number * args.rounds
            )  # fmt: skip
            known = {row["name"]: row for row in store.settings["arms"]}
            known.update({row["name"]: row for row in both.settings({})["arms"]})
            store.update({"arms": list(known.values())})
            if run.todo(both, store):
                with _report_on_error(args, store), starter.running(both.arms) as (sides, _):
                    run.measure(both, sides, store)

        for number, k in enumerate(values):
            look(number, k, check=False)
        first = [line for line in store.lines if not line["arm"].endswith("-check")]
        for number, k in enumerate(advice.fit(first).best(most), len(values)):
            look(number, k, check=True)
        found = advice.advise(store.lines, most)
        path = advice.store(advice.key_of(starter.engine, resolved), found)
        atomic_write_text(args.out / "advice.json", json.dumps(found, indent=1) + "\n")
        print("\n".join(advice.text(found)))
        print(f"kept for `serve --num-speculative-tokens auto`: {path}", file=sys.stderr)
        return _finish(args, store.settings, store.lines)


# --- local back-ends --------------------------------------------------------


def _local(args: argparse.Namespace) -> int:
    for name in ("serve", "base_url", "baseline_url", "sweep_k", "request_rate"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} is not for {args.backend}")
    if args.concurrency not in (None, [1]):
        raise UsageError(f"{args.backend} is measured at concurrency 1", hint="drop --concurrency")
    ranks = local_run.Ranks.from_environment()
    arms, sides = local_run.arms(args, ranks, _k(args))
    plan = ranks.share(_plan(args, arms, args.draft_model))
    plan = replace(plan, model=args.model or launch.DEMO)
    machine = args.hardware or hardware.describe()
    facts = _facts(plan.model, local_run.versions(args.backend), machine)
    root = args.out
    args.out = ranks.folder(root)
    with _open(args, plan.settings({**facts, "ranks": ranks.count})) as store:
        try:
            run.measure(plan, sides, store)
        finally:
            if ranks.count == 1:
                _write(args, store.settings, store.lines)
        ranks.wait()
        if ranks.rank:
            return 0
        args.out = root
        return _finish(args, store.settings, ranks.gather(root, store.lines))


# --- the end ----------------------------------------------------------------


def _measured(args: argparse.Namespace, plan: Plan, sides: Mapping[str, Side], store: Store) -> int:
    with _report_on_error(args, store):
        run.measure(plan, sides, store)
    return _finish(args, store.settings, store.lines)


@contextlib.contextmanager
def _report_on_error(args: argparse.Namespace, store: Store) -> Any:
    """What was measured before a failure or Ctrl-C is reported all the same."""
    try:
        yield
    except BaseException:
        _write(args, store.settings, store.lines)
        print(f"{args.out}: {len(store.lines)} records kept; --resume goes on", file=sys.stderr)
        raise


def _write(
    args: argparse.Namespace, settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    objective = None
    if args.goodput_ttft_ms is not None or args.goodput_itl_ms is not None:
        objective = analysis.Objective(args.goodput_ttft_ms, args.goodput_itl_ms)
    summary = analysis.summarise(settings, lines, objective)
    report.write(args.out, settings, summary, results=args.results)
    return summary


def _finish(
    args: argparse.Namespace, settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> int:
    summary = _write(args, settings, lines)
    print(report.terminal(settings, summary))
    print(f"{args.out / 'report.html'}", file=sys.stderr)
    if summary["errors"]:
        failed = ", ".join(f"{count} {kind}" for kind, count in summary["errors"].items())
        raise RequestError(
            f"{sum(summary['errors'].values())} of {summary['requests']} requests failed: {failed}",
            hint=f"see {args.out / 'records.jsonl'}; --resume asks again what was cut off",
        )
    return 0
