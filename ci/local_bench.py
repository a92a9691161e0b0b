"""``python -m ci.local_bench``: our local back-ends beside the public package and plain decoding.

Each side is a process that loads its models once and waits; prompts go to the sides in
turn (A B C, C B A, …), so that a machine that slows down slows all of them down. The
environment is the caller's: nothing is installed (docs/local-backends.md says what).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import dflash_plugin
from dflash_plugin import demo
from dflash_plugin.errors import ReplayError, run_cli

from . import prompts

_WORKER = Path(__file__).parent / "workers" / "local_pair.py"
SIDES = ("ours", "public", "generate", "unpacked")
"""``unpacked``: ours with the target's and draft's matrices as they are (Transformers)."""
OURS = ("ours", "unpacked")


class Side:
    """A running worker."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(env)
        )
        self.versions: dict[str, str] = self._read()["versions"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            ReplayError: the worker ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the worker."""
        self._process.terminate()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ReplayError(
                f"side {self.name!r} ended with exit code {self._process.wait()}",
                hint="its last lines are above; --python and --path must name its packages",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m ci.local_bench", description=__doc__)
    parser.add_argument("--backend", choices=["transformers", "mlx"], default="transformers")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the packages")
    parser.add_argument("--path", action="append", default=[], help="also on its PYTHONPATH")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:3]))
    parser.add_argument("--target", help="folder (default: the demo pair)")
    parser.add_argument("--draft", help="folder")
    parser.add_argument("--prompts", action="append", default=[], metavar="FILE[:COUNT]")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="of the prompts")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--block-size", type=_block_size, metavar="B",
        help="of our sides: a number, or auto (default: all the draft has room for); "
        "the public package always takes the draft's",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args(arguments)
    if args.target is None:
        pair = demo.demo_pair()
        args.target, args.draft = str(pair.target), args.draft or str(pair.draft)
    chosen = prompts.spread(prompts.load(args.prompts), args.count)
    root = str(Path(dflash_plugin.__file__).parents[1])
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*args.path, root]),
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
    }
    sides: list[Side] = []
    try:
        for name in args.sides:
            command = [
                *(args.python, str(_WORKER), "--backend", args.backend, "--side", name),
                *("--target", args.target, "--draft", args.draft, "--dtype", args.dtype),
                *("--threads", str(args.threads)),
            ]
            if args.block_size is not None and name in OURS:
                command += ["--block-size", str(args.block_size)]
            sides.append(Side(name, command, env))
        runs = _measure(sides, chosen, args.max_tokens, args.rounds)
        shares = _shares(sides, chosen, args.max_tokens)
    finally:
        for side in sides:
            side.close()
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "python", "path")}
    for half in ("target", "draft"):
        settings[half] = "/".join(Path(settings[half]).parts[-2:])
    document = {
        "settings": {**settings, "prompts": prompts.digest(chosen)},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "load": os.getloadavg(),
        "versions": {side.name: side.versions for side in sides},
        "summary": summary(runs),
        "seconds_of_a_text": shares,
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: document[k] for k in ("summary", "seconds_of_a_text")}, indent=1))
    return 0


def _measure(
    sides: Sequence[Side], chosen: Sequence[prompts.Prompt], count: int, rounds: int
) -> list[dict[str, Any]]:
    chat = next(side for side in sides if side.name == "ours")
    ids = [chat.ask(chat=prompt.text)["ids"] for prompt in chosen]
    for side in sides:
        side.ask(ids=ids[0], max_tokens=8)
    runs = []
    with tqdm(total=rounds * len(ids) * len(sides), unit="text", disable=None) as bar:
        for number in range(rounds):
            order = list(sides) if number % 2 == 0 else list(reversed(sides))
            for prompt, tokens in zip(chosen, ids, strict=True):
                for side in order:
                    answer = side.ask(ids=tokens, max_tokens=count)
                    answer.pop("shares")
                    runs.append({"round": number, "prompt": prompt.id, "side": side.name, **answer})
                    bar.update()
    return runs


def _shares(
    sides: Sequence[Side], chosen: Sequence[prompts.Prompt], count: int
) -> dict[str, float]:
    """Where the time of one text goes, seconds; timed apart, since timing costs time."""
    side = next(side for side in sides if side.name == "ours")
    ids = side.ask(chat=chosen[0].text)["ids"]
    answer = side.ask(ids=ids, max_tokens=count, profile=True)
    parts: dict[str, float] = answer["shares"] or {}
    head = parts.get("of it the head", 0.0)
    whole: float = answer["seconds"]
    rest = whole - sum(parts.values()) + head
    return {"whole": whole, **parts, "sampling, text and the loop": rest} if parts else {}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per side tokens per second (median over rounds), AL, draft length, peak memory; ratios.

    A ratio is the median over rounds of ours divided by the other's of the same round;
    also by processor seconds (of all threads), which a busy machine changes least.
    """
    rates = _rates(runs, "seconds")
    cpu = _rates(runs, "cpu_seconds")
    made: dict[str, Any] = {}
    for side, values in rates.items():
        mine = [r for r in runs if r["side"] == side]
        als = [r["al"] for r in mine if r["al"] is not None]
        drafted = [r["mean_drafted"] for r in mine if r["mean_drafted"] is not None]
        made[side] = {
            "tokens_per_second": statistics.median(values),
            "tokens_per_cpu_second": statistics.median(cpu[side]),
            "mean_al": statistics.fmean(als) if als else None,
            "mean_drafted": statistics.fmean(drafted) if drafted else None,
            "peak_mb": max(r["peak_mb"] for r in mine),
        }
        if side != "ours":
            made[side]["ours_is_faster"] = _median_ratio(rates["ours"], values)
            made[side]["ours_is_faster_in_cpu_time"] = _median_ratio(cpu["ours"], cpu[side])
    return made


def _rates(runs: Sequence[Mapping[str, Any]], clock: str) -> dict[str, list[float]]:
    """Tokens per second by ``clock``, of each side in each round."""
    made: dict[str, list[float]] = {}
    for number in sorted({run["round"] for run in runs}):
        for side in dict.fromkeys(run["side"] for run in runs):
            mine = [r for r in runs if r["round"] == number and r["side"] == side]
            seconds = sum(r[clock] for r in mine)
            made.setdefault(side, []).append(sum(len(r["tokens"]) for r in mine) / seconds)
    return made


def _block_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _median_ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


if __name__ == "__main__":
    sys.exit(run_cli(main))
