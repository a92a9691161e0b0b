"""One side of ``ci.local_bench``, in an environment of its own: JSON lines in and out.

A request is ``{"chat": text}`` (answered with ``{"ids": …}``) or ``{"ids": …, "max_tokens":
n, "profile": bool}``, answered with the generated tokens, seconds, AL, mean draft length
(both null where the side does not tell) and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HELD: list[Any] = []  # a tokenizer: not used, but whoever generates has one in memory
Generate = Callable[[list[int], int], tuple[list[int], dict[str, float | None]]]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--backend", "--side", "--target", "--draft", "--dtype"):
        parser.add_argument(name, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--block-size")
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    pair, run = _SIDES[args.backend, args.side](args)

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    answer({"versions": _versions()})
    for line in sys.stdin:
        request = json.loads(line)
        if "chat" in request:
            answer({"ids": pair.token_ids(request["chat"])})
            continue
        shares = _watch(pair) if request.get("profile") else None
        begin, cpu = time.perf_counter(), time.process_time()
        tokens, told = run(request["ids"], request["max_tokens"])
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer(
            {
                "tokens": tokens,
                "seconds": seconds,
                "cpu_seconds": cpu,  # of all threads: what a busy machine changes least
                "al": told.get("al"),
                "mean_drafted": told.get("mean_drafted"),
                "peak_mb": peak,
                "shares": shares,
            }
        )
        if shares is not None:
            shares.clear()


def _unpacked(args: argparse.Namespace) -> tuple[Any, Generate]:
    return _ours(args, pack=False)


def _ours(args: argparse.Namespace, **options: Any) -> tuple[Any, Generate]:
    if args.backend == "transformers":
        import torch

        torch.set_num_threads(args.threads)
    import dflash_plugin

    pair = dflash_plugin.load(
        args.target, args.draft, backend=args.backend, dtype=args.dtype, **options
    )

    size = args.block_size if args.block_size in (None, "auto") else int(args.block_size)

    def run(ids: list[int], count: int) -> tuple[list[int], dict[str, float | None]]:
        result = pair.generate(ids, max_tokens=count, block_size=size)
        # Of a text of one token there is no mean.
        drafted = result.mean_drafted if len(result.steps) > 1 else None
        return result.token_ids, {"al": result.al, "mean_drafted": drafted}

    return pair, run


def _transformers(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _HELD.append(AutoTokenizer.from_pretrained(args.target))
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    return torch, AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).eval()


def _stops(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids or [])


def _own_generate(args: argparse.Namespace) -> tuple[Any, Generate]:
    torch, model = _transformers(args)

    def run(ids: list[int], count: int) -> tuple[list[int], dict[str, float | None]]:
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        out = model.generate(
            given, attention_mask=mask, max_new_tokens=count, do_sample=False,
            pad_token_id=_stops(model)[0],
        )  # fmt: skip
        return out[0, len(ids) :].tolist(), {}

    return None, run


def _public(args: argparse.Namespace) -> tuple[Any, Generate]:
    """The package ``dflash``, unchanged: its function that needs no CUDA."""
    torch, model = _transformers(args)
    from dflash.model import DFlashDraftModel, dflash_generate

    dtype = getattr(torch, args.dtype)
    draft = DFlashDraftModel.from_pretrained(args.draft, dtype=dtype).eval()

    def run(ids: list[int], count: int) -> tuple[list[int], dict[str, float | None]]:
        with torch.inference_mode():
            out = dflash_generate(draft, model, torch.tensor([ids]), count, _stops(model))
        return out[0, len(ids) :].tolist(), {}

    return None, run


def _mlx_own(args: argparse.Namespace) -> tuple[Any, Generate]:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    model, tokenizer = mlx_lm.load(args.target)
    model.set_dtype(getattr(mx, args.dtype))

    def run(ids: list[int], count: int) -> tuple[list[int], dict[str, float | None]]:
        tokens: list[int] = []
        for token, _ in generate_step(mx.array(ids), model, max_tokens=count):
            tokens.append(int(token))
            if tokens[-1] in tokenizer.eos_token_ids:
                break
        return tokens, {}

    return None, run


def _mlx_public(args: argparse.Namespace) -> tuple[Any, Generate]:
    """The package ``dflash``, unchanged; it takes drafts from a hub's cache only: make one."""
    folder = Path(tempfile.mkdtemp(prefix="dflash-bench-hub-"))
    os.environ.update(HF_HUB_CACHE=str(folder), HF_HUB_OFFLINE="1")
    repo = folder / "models--local--draft"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    for file in Path(args.draft).iterdir():
        (snapshot / file.name).symlink_to(file.resolve())

    import mlx.core as mx
    import mlx_lm
    from dflash.model_mlx import load_draft, stream_generate

    model, tokenizer = mlx_lm.load(args.target)
    draft = load_draft("local/draft")
    model.set_dtype(getattr(mx, args.dtype))
    draft.set_dtype(getattr(mx, args.dtype))

    def run(ids: list[int], count: int) -> tuple[list[int], dict[str, float | None]]:
        answers = stream_generate(model, draft, tokenizer, mx.array(ids), max_tokens=count)
        return [token for answer in answers for token in answer.tokens], {}

    return None, run


_SIDES = {
    ("transformers", "ours"): _ours,
    ("transformers", "unpacked"): _unpacked,
    ("transformers", "generate"): _own_generate,
    ("transformers", "public"): _public,
    ("mlx", "ours"): _ours,
    ("mlx", "generate"): _mlx_own,
    ("mlx", "public"): _mlx_public,
}


def _watch(pair: Any) -> dict[str, float]:
    """Seconds in the parts of a step, from now on; Transformers only."""
    backend, seconds = pair.backend, dict[str, float]()
    if backend.name != "transformers":
        return seconds

    def timed(holder: Any, method: str, label: str) -> None:
        inner = getattr(type(holder), method)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(holder, *args, **kwargs)
            finally:
                seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - begin

        setattr(holder, method, call)

    timed(backend.target, "forward", "target forward")
    timed(backend.target, "rewind", "rewind")
    timed(backend.draft, "logits", "draft with head")
    timed(backend.draft, "append", "draft context")
    head = backend.target.head

    def timed_head(x: Any) -> Any:
        begin = time.perf_counter()
        made = head(x)
        seconds["of it the head"] = seconds.get("of it the head", 0.0) + time.perf_counter() - begin
        return made

    backend.target.head = timed_head
    return seconds


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "mlx", "mlx-lm", "dflash"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


main()
