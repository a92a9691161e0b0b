"""The command line of ``dflash-plugin bench`` and ``python -m dflash_plugin.benchmark``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

LOCAL = ("transformers", "mlx")
BACKENDS = ("vllm", "sglang", *LOCAL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option; the first group is what published commands use."""
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="vllm")
    add("--base-url", metavar="URL", help="server with the draft (the arm `dflash`)")
    add("--model", help="server: the served name; otherwise demo, a pair id, hub id or folder")
    add("--draft-model", metavar="D", help="draft folder or hub id (default: from the matrix)")
    add(
        *("--dataset", "--datasets"), action="append", dest="datasets", metavar="NAME[=FILE]",
        help="gsm8k, math500, humaneval, mbpp, mt-bench, packaged[/NAME], a JSONL file, or "
        "NAME=FILE; may be repeated (default: packaged)",
    )  # fmt: skip
    add(*("--num-prompts", "--max-samples"), type=_positive, metavar="N", help="of each data set")
    add("--concurrency", type=_integers, default=None, metavar="N,N,…", help="default: 1")
    add("--request-rate", type=_numbers, default=None, metavar="R,R,…",
        help="requests a second, at random: an open loop")  # fmt: skip
    add("--enable-thinking", action="store_true")
    add("--block-size", type=_positive, metavar="B", help="K + 1")
    add("--max-new-tokens", type=_positive, default=512, metavar="N")
    add("--temperature", type=float, default=0.0, metavar="T")
    add("--top-p", type=float, default=1.0, metavar="P")
    add("--top-k", type=int, default=0, metavar="K")

    ours = parser.add_argument_group("what is compared")
    ours.add_argument("--baseline-url", metavar="URL", help="the same model without speculation")
    ours.add_argument(
        "--peer", action="append", default=[], metavar="NAME[=URL]",
        help="another arm: NAME=URL; with --serve ngram, suffix or NAME={JSON}; "
        "transformers: ngram",
    )  # fmt: skip
    ours.add_argument("--serve", action="store_true", help="start the servers; "
                      "engine arguments after --")  # fmt: skip
    ours.add_argument("--engine-python", default=sys.executable, metavar="PATH",
                      help="interpreter of the engine's environment")  # fmt: skip
    ours.add_argument("--num-speculative-tokens", type=_positive, metavar="K")
    ours.add_argument("--sweep-k", action="store_true", help="with --serve: which K to use; kept "
                      "for `serve --num-speculative-tokens auto`")  # fmt: skip
    ours.add_argument("--raw", action="store_true", help="no chat template")
    ours.add_argument("--device", help="transformers: cpu, cuda, mps")
    ours.add_argument("--dtype", help="local: such as bfloat16")

    how = parser.add_argument_group("how it is measured and kept")
    how.add_argument("--out", type=Path, default=Path("out/bench"), metavar="FOLDER")
    how.add_argument("--resume", action="store_true", help="go on with the run in --out")
    how.add_argument("--report-only", action="store_true", help="of the run in --out")
    how.add_argument("--rounds", type=_positive, default=2, metavar="N",
                     help="of every arm in turn (default 2)")  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="of the arrivals of an open loop")
    how.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of an answer")
    how.add_argument("--stall", type=float, default=120.0, metavar="S",
                     help="without a byte: the answer counts as hanging")  # fmt: skip
    how.add_argument("--ready-timeout", type=float, default=600.0, metavar="S")
    how.add_argument("--goodput-ttft-ms", type=float, metavar="MS")
    how.add_argument("--goodput-itl-ms", type=float, metavar="MS")
    how.add_argument("--hardware", metavar="TEXT", help="of the servers, where they are elsewhere")
    how.add_argument("--results", type=Path, metavar="FOLDER",
                     help="recorded results of the matrix, for the report")  # fmt: skip


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _integers(text: str) -> list[int]:
    return sorted({_positive(part) for part in text.split(",")})


def _numbers(text: str) -> list[float]:
    values = sorted({float(part) for part in text.split(",")})
    if values[0] <= 0:
        raise argparse.ArgumentTypeError(f"{values[0]:g} is not a positive number")
    return values
