"""``python -m ci.load_bench``: what the benchmark's load generator can do, by itself.

Against a server that answers at once with a canned stream, in a process of its own. Rates
are by wall time and by the generator's own processor time; the second does not depend on
what else the machine does, and is what one core of it can do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from dflash_plugin import hardware
from dflash_plugin.bench.client import Client, Sampling
from dflash_plugin.errors import run_cli

_STUB = Path(__file__).parent / "workers" / "stub_server.py"
_MESSAGES = [{"role": "user", "content": "How many rolls are left for the afternoon?"}]
CASES = ((1, 1), (256, 1), (256, 4))
"""(tokens of an answer, tokens of an event)"""
_HEAD = """\
| client | tokens of an answer, of an event | concurrency | requests/s | tokens/s \
| requests per CPU second | tokens per CPU second |
|---|---|---|---|---|---|---|"""
Ask = Callable[[], Awaitable[int]]


async def _ours(stack: AsyncExitStack, url: str) -> Ask:
    client = await stack.enter_async_context(Client(url, "stub"))
    sampling = Sampling(256)

    async def ask() -> int:
        answer = await client.answer(_MESSAGES, sampling)
        assert answer.error is None, answer.detail
        return answer.tokens

    return ask


async def _httpx(stack: AsyncExitStack, url: str) -> Ask:
    """The least that can be done with httpx: no times, no text, no errors."""
    import httpx

    limits = httpx.Limits(max_connections=None)
    client = await stack.enter_async_context(
        httpx.AsyncClient(timeout=60, trust_env=False, limits=limits)
    )
    body = json.dumps(Sampling(256).body("stub", _MESSAGES)).encode()

    async def ask() -> int:
        tokens, rest = 0, b""
        async with client.stream("POST", url + "/v1/chat/completions", content=body) as response:
            async for chunk in response.aiter_raw():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        tokens += len(json.loads(line[6:])["choices"][0]["token_ids"])
        return tokens

    return ask


SIDES = {"dflash-plugin (aiohttp)": _ours, "httpx": _httpx}


async def _measure(side: str, url: str, width: int, seconds: float) -> dict[str, float]:
    requests = tokens = 0
    async with AsyncExitStack() as stack:
        ask = await SIDES[side](stack, url)
        await ask()

        async def worker() -> None:
            nonlocal requests, tokens
            while time.perf_counter() < end:
                got = await ask()  # first: += would read the sum before the others add to it
                tokens += got
                requests += 1

        start, cpu = time.perf_counter(), time.process_time()
        end = start + seconds
        await asyncio.gather(*(worker() for _ in range(width)))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "requests_per_second": requests / wall,
        "tokens_per_second": tokens / wall,
        "requests_per_cpu_second": requests / cpu,
        "tokens_per_cpu_second": tokens / cpu,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m ci.load_bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of a case")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64], metavar="N")
    parser.add_argument("--httpx", action="store_true", help="beside it, if it is installed")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    print(_HEAD)
    for tokens, per_event in CASES:
        options = json.dumps({"tokens": tokens, "per_event": per_event})
        stub = subprocess.Popen([sys.executable, str(_STUB), options], stdout=subprocess.PIPE)
        try:
            assert stub.stdout is not None
            url = f"http://127.0.0.1:{int(stub.stdout.readline())}"
            for side in SIDES if args.httpx else list(SIDES)[:1]:
                for width in args.concurrency:
                    found = asyncio.run(_measure(side, url, width, args.seconds))
                    rows.append({"client": side, "tokens": tokens, "per_event": per_event,
                                 "concurrency": width, **found})  # fmt: skip
                    numbers = " | ".join(f"{value:,.0f}" for value in found.values())
                    print(f"| {side} | {tokens}, {per_event} | {width} | {numbers} |", flush=True)
        finally:
            stub.terminate()
            stub.wait()
    if args.out is not None:
        machine = {"hardware": hardware.describe(cpu=True), "load": os.getloadavg()}
        document = {**machine, "seconds": args.seconds, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
