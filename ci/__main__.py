"""``python -m ci``: the stages, in order, and nothing else."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dflash_plugin import errors, matrix
from dflash_plugin.cache import make_dir
from dflash_plugin.errors import DFlashError, UsageError, VerdictFailedError, near_names
from dflash_plugin.matrix import SERVES

from . import (
    environment_cli,
    images_cli,
    lint,
    local_runs,
    lock,
    mutations,
    patches,
    pipeline,
    plan,
    refresh,
    replicas,
    report,
    serve,
)
from .environment import Wanted
from .pipeline import CHECK, MEASURE
from .plan import Overrides, Plan, Shard
from .records import FAILED, CellResult


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ci", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="STAGE")

    _plan_arguments(commands.add_parser("plan", help="list the cells and settings of a run"))
    environment_cli.add_arguments(commands.add_parser("env", help="build engine environments"))
    lock.add_arguments(commands.add_parser("lock", help="write or check the lock files"))
    replicas.add_arguments(commands.add_parser("replicas", help="build the tiny pairs"))
    local_runs.add_arguments(commands.add_parser("local", help="replicas on the local back-ends"))
    mutations.add_arguments(commands.add_parser("mutate", help="which check sees which mistake"))
    run = commands.add_parser("run", help="every stage of the chosen cells")
    _run_arguments(run)
    run.add_argument("--save", action="store_true", help="keep the results in docs/results/")
    for name, what in ((CHECK, "lossless and faithful only"), (MEASURE, "speed only")):
        _run_arguments(commands.add_parser(name, help=what))
    server = commands.add_parser("serve", help="start one cell's server and keep it up")
    _cell_arguments(server)
    server.add_argument("--mode", choices=["base", "dflash"], default="dflash")
    server.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    rewrite = commands.add_parser("report", help="write the report of an earlier run again")
    rewrite.add_argument("--out", type=Path, default=Path("out/run"))
    rewrite.add_argument(
        "--merge", type=Path, nargs="+", metavar="DIR", help="the shards of a run into --out"
    )
    rewrite.add_argument("--matrix", type=Path, help="the one that was run, for --merge")
    rewrite.add_argument("--save", action="store_true", help="keep the results in docs/results/")
    rewrite.add_argument("--readme", action="store_true", help="rewrite the README's table")
    rewrite.add_argument("--check", action="store_true", help="with --readme: only compare")
    patches.add_arguments(commands.add_parser("patches", help="hold patch sets against sources"))
    refresh.add_arguments(commands.add_parser("refresh", help="what is new upstream"))
    images_cli.add_arguments(commands.add_parser("images", help="the container images there are"))
    commands.add_parser("lint", help="offline checks of the repository's own data")

    args = parser.parse_args(argv)
    return errors.run_cli(lambda: _COMMANDS[args.command](args))


def _cell_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cells", nargs="*", metavar="CELL", help="ids or globs; none: all")
    parser.add_argument("--matrix", type=Path, help="another compat_matrix.toml")
    parser.add_argument("--target", type=Path, help="target folder instead of the pair's")
    parser.add_argument("--draft", type=Path, help="draft folder instead of the pair's")
    parser.add_argument(
        "--reference-draft", type=Path, help="hold the engine against this draft's replay"
    )
    parser.add_argument("--num-speculative-tokens", type=int, metavar="K")
    parser.add_argument(
        "--env-python", action="append", default=[], metavar="ENGINE_ID=PATH",
        help="use this interpreter's engine instead of building an environment",
    )  # fmt: skip
    parser.add_argument(
        "--env", choices=["venv", "image"], default="venv", help="what engines run in"
    )
    parser.add_argument(
        "--registry", default="", metavar="PREFIX", help="pull images from there (default: build)"
    )
    parser.add_argument(
        "--memory", type=_positive, metavar="GIB", help="of a container (default: half of it all)"
    )
    parser.add_argument("--cpus", type=_positive, metavar="N", help="of a container (default: all)")
    parser.add_argument(
        "--port", type=_port, default=0, help="of the dflash server (default: free)"
    )
    parser.add_argument("--ready-timeout", type=float, default=serve.READY_TIMEOUT, metavar="S")
    parser.add_argument("--compiled", action="store_true", help="let the bf16 engines compile")


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise ValueError
    return port


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _cell_arguments(parser)
    parser.add_argument("--profile", default="demo", help="how much is run (default: demo)")
    parser.add_argument(
        "--prompts", action="append", default=[], metavar="FILE.jsonl[:COUNT]",
        help="prompts of your own; may be repeated (default: the packaged ones)",
    )  # fmt: skip
    parser.add_argument(
        "--shard", type=Shard.parse, metavar="I/N", help="of N machines' shares the I-th"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _plan_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("out/run"), help="results folder")
    parser.add_argument("--resume", action="store_true", help="reuse finished, unchanged stages")


def _containers(args: argparse.Namespace) -> Wanted | None:
    """What ``--env image`` and its limits say."""
    if args.env == "venv":
        if args.registry or args.memory or args.cpus:
            raise UsageError("--registry, --memory and --cpus are for --env image")
        return None
    if args.env_python:
        raise UsageError("--env image and --env-python exclude each other")
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = int(args.memory * (1 << 30)) if args.memory else pages // 2  # a cell has two servers
    return Wanted(args.registry, memory, args.cpus or float(os.cpu_count() or 1))


def _make_plan(args: argparse.Namespace) -> Plan:
    data = matrix.load(args.matrix)
    pairs = []
    for text in args.env_python:
        engine_id, sep, path = text.partition("=")
        if not sep or not Path(path).exists():
            raise UsageError(
                f"--env-python {text}: expected ENGINE_ID=PATH of an existing interpreter",
                hint="for example --env-python vllm-0.32.0=/path/to/venv/bin/python",
            )
        if engine_id not in data.engines:
            raise UsageError(
                f"--env-python {text}: no engine {engine_id!r} in {data.path.name}",
                hint=near_names(engine_id, data.engines),
            )
        pairs.append((engine_id, Path(path)))
    overrides = Overrides(
        target=args.target,
        draft=args.draft,
        reference_draft=args.reference_draft,
        num_speculative_tokens=args.num_speculative_tokens,
        env_python=tuple(pairs),
        containers=_containers(args),
        port=args.port,
        ready_timeout=args.ready_timeout,
        compiled=args.compiled,
    )
    return plan.make(
        data,
        args.cells,
        getattr(args, "profile", "demo"),
        getattr(args, "prompts", ()),
        overrides,
        shard=getattr(args, "shard", None),
    )


def _plan(args: argparse.Namespace) -> int:
    made = _make_plan(args)
    if args.json:
        print(json.dumps(made.to_json(), indent=1))
    else:
        print(*(cell.id for cell in made.cells), sep="\n")
    return 0


def _run(args: argparse.Namespace) -> int:
    stages = {CHECK: [CHECK], MEASURE: [MEASURE]}.get(args.command, [CHECK, MEASURE])
    made = _make_plan(args)
    known = matrix.load(args.matrix).known_failures
    results: list[CellResult] = []
    error: DFlashError | None = None
    named = {engine_id for engine_id, _ in made.overrides.env_python}
    if not args.resume:
        shutil.rmtree(args.out / pipeline.SHARED, ignore_errors=True)
    for cell in made.cells:
        try:
            # A cell for which this machine is not is run where its image is, if it is named.
            asked = made.overrides.containers is not None and cell.id in args.cells
            if cell.not_run and cell.engine.id not in named and not asked:
                result = pipeline.not_run(cell)
            else:
                result = pipeline.run_cell(cell, made, args.out, stages=stages, resume=args.resume)
        except DFlashError as err:
            result = pipeline.aborted(cell, err)
            if result.serves.status != FAILED or SERVES not in known(cell.id):
                error = err
        if made.overrides.containers is not None and not result.environment:
            result = replace(result, environment={"kind": "image"})  # nothing ran in one
        results.append(result)
        report.write(args.out, results)
        print(report.summary(result), flush=True)
        if getattr(args, "save", False):
            report.save([result])
    print(f"wrote {args.out / 'report.json'} and {args.out / 'report.md'}")
    if error is not None:
        raise error
    # A profile without speed leaves "faster" not run, which is no surprise then.
    timed = ("faster",) if made.profile.measures_speed else ()
    wanted = {CHECK: ("lossless", "faithful"), MEASURE: timed}
    names = [name for stage in stages for name in wanted[stage]]
    problems = [line for result in results for line in report.surprises(result, names, known)]
    if problems:
        raise VerdictFailedError("; ".join(problems), hint=f"see {args.out / 'report.md'}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    made = _make_plan(args)
    if len(made.cells) != 1:
        raise UsageError(
            f"serve takes one cell, found {len(made.cells)}", hint="python -m ci plan lists them"
        )
    run = pipeline.prepare(made.cells[0], made, Path("out/serve"))
    spec = run.server(args.mode == "dflash", args.dtype)
    with serve.serve_all([spec], timeout=args.ready_timeout) as (client,):
        print(f"{client.base_url}/v1 serves model {client.model!r}; Ctrl-C stops it", flush=True)
        while client.ready():
            time.sleep(1)
    return 0


def _report(args: argparse.Namespace) -> int:
    if args.readme:
        fresh = report.readme(matrix.load(), check=args.check)
        if args.check and not fresh:
            raise VerdictFailedError("README.md is stale", hint="python -m ci report --readme")
        return 0
    if args.merge:
        results = report.merge(args.merge, matrix.load(args.matrix))
        make_dir(args.out)
    else:
        results = report.read(args.out)
    report.write(args.out, results)
    if args.save:
        report.save(results)
    print(report.markdown(results), end="")
    return 0


def _lint(_: argparse.Namespace) -> int:
    problems = lint.problems()
    print(*problems, sep="\n", end="\n" if problems else "")
    if problems:
        raise VerdictFailedError(f"{len(problems)} problem(s)", hint="see the lines above")
    return 0


_COMMANDS = {
    "plan": _plan,
    "env": environment_cli.run,
    "lock": lock.run,
    "replicas": replicas.run,
    "local": local_runs.run,
    "mutate": mutations.run,
    "run": _run,
    CHECK: _run,
    MEASURE: _run,
    "serve": _serve,
    "report": _report,
    "patches": patches.run,
    "refresh": refresh.run,
    "images": images_cli.run,
    "lint": _lint,
}

if __name__ == "__main__":
    sys.exit(main())
