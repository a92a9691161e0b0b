"""``python -m ci local``: every replica, and the demo pair, on reference and local back-ends.

One process per pair and back-end holds the models (``ci/workers/local_replica.py``); the
rules are those of cells: lossless against the framework's own plain decoding in float32,
faithful against the reference's replay of the text. Taps are compared directly besides, with
Transformers' hidden states of the same tokens: taps off by one hardly change an acceptance
length.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dflash_plugin import demo, matrix
from dflash_plugin.acceptance import AcceptanceStats
from dflash_plugin.errors import ReplayError, UnknownCellError, VerdictFailedError, near_names
from dflash_plugin.matrix import Expected, Pair

from . import environment, judge, prompts, replay, replica_specs, replicas
from .environment import Environment
from .local_bench import Side
from .records import FAILED, NOT_RUN, Verdict, load_json, overall, save_json
from .replica_builder import tokenizer
from .replicas import Replica

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "local"
BACKENDS = ("reference", "transformers", "mlx")
PREFIX = "replica-prefix"
"""The kind of the texts that begin as the one before them did."""
_WORKER = ROOT / "ci" / "workers" / "local_replica.py"
DEMO = next(row.id for row in matrix.load().pairs.values() if row.embedded)
"""The packaged pair: it is asked the packaged prompts, where replicas have their own."""
_SHARED = (64, 75)
"""Tokens of a prefix: whole blocks of 16, and the middle of one."""


@dataclass(frozen=True)
class LocalResult:
    """What one back-end made of one replica."""

    replica: str
    status: str
    reason: str
    lossless: Verdict
    faithful: Verdict
    taps: Verdict
    al: float | None = None
    al_reference: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, verdicts: Mapping[str, Verdict], versions: Mapping[str, str]
    ) -> LocalResult:
        """The result of three verdicts."""
        status, reason = overall(verdicts)
        evidence = verdicts["faithful"].evidence
        return cls(
            name, status, reason,
            lossless=verdicts["lossless"], faithful=verdicts["faithful"], taps=verdicts["taps"],
            al=evidence.get("al"), al_reference=evidence.get("al_reference"), versions=versions,
        )  # fmt: skip

    @classmethod
    def not_run(cls, name: str, reason: str, versions: Mapping[str, str]) -> LocalResult:
        """A back-end that cannot load the pair."""
        none = Verdict(NOT_RUN, reason)
        return cls(name, NOT_RUN, reason, none, none, none, versions=versions)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LocalResult:
        """Read one back."""
        verdicts = {k: Verdict(**data[k]) for k in ("lossless", "faithful", "taps")}
        return cls(**{**data, **verdicts})


@dataclass(frozen=True)
class Text:
    """One prompt.

    Attributes:
        keep: generated after the one before it, in the same prompt cache.
        follows: its prompt comes after all of the text before, answer included.
        limit: of its new tokens, where it is less than the run's.
    """

    id: str
    kind: str
    ids: tuple[int, ...]
    keep: bool = False
    follows: bool = False
    limit: int | None = None

    def new_tokens(self, most: int) -> int:
        """How many are generated in a run of so many at most."""
        return most if self.limit is None else min(self.limit, most)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command ``local``."""
    parser.add_argument("ids", nargs="*", metavar="PAIR", help=f"replicas, or {DEMO}; none: all")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="of the prompts")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N")
    parser.add_argument(
        "--mlx-python", type=Path, default=Path(sys.executable), metavar="PATH",
        help="an interpreter with mlx-lm (default: this one)",
    )  # fmt: skip
    parser.add_argument("--save", action="store_true", help="keep the results in docs/results/")


def run(args: argparse.Namespace) -> int:
    """Run, print a line each, and with ``--save`` keep them."""
    specs = replica_specs.load()
    names = [DEMO if name == DEMO else specs.pair(name).id for name in args.ids or all_pairs()]
    failed = []
    for name in dict.fromkeys(names):
        found = run_replica(
            demo_pair() if name == DEMO else replicas.ensure(name),
            list(dict.fromkeys(args.backend or BACKENDS)),
            args.count,
            args.max_tokens,
            args.mlx_python,
        )
        for backend, result in found.items():
            al = "" if result.al is None else f", AL {result.al:.2f}"
            words = f"{backend} {name}: {result.status.replace('_', ' ')}{al} {result.reason}"
            print(words.rstrip(), flush=True)
            if result.status == FAILED:
                failed.append(f"{backend} {name}: {result.reason}")
            if args.save:
                save(backend, result, args.count, args.max_tokens)
    if failed:
        raise VerdictFailedError("; ".join(failed))
    return 0


def all_pairs() -> tuple[str, ...]:
    """Every replica, and the demo pair."""
    return (*replica_specs.load().pairs, DEMO)


def demo_pair() -> Replica:
    """The demo pair, in the form of a replica."""
    found = demo.demo_pair()
    return Replica(DEMO, found.target, found.draft, {})


def run_replica(
    replica: Replica, backends: Sequence[str], count: int, max_tokens: int, mlx_python: Path
) -> dict[str, LocalResult]:
    """The three verdicts of one pair on each of the back-ends."""
    reference = environment.ensure_reference()
    runs: dict[str, tuple[dict[str, Any], Verdict, Mapping[str, str]]] = {}
    found: dict[str, LocalResult] = {}
    with ExitStack() as stack:
        torch = stack.enter_context(started(replica, "torch", reference.python))
        if error := torch.ask(op="load", backend="reference")["error"]:
            raise ReplayError(f"{replica.id}: the reference does not load it: {error}")
        wanted = chat_texts(torch, count) if replica.id == DEMO else texts(count)
        plain = plain_texts(torch, wanted, max_tokens)
        for backend in backends:
            side = torch
            if backend == "mlx":
                side = stack.enter_context(started(replica, "mlx", mlx_python))
            if error := side.ask(op="load", backend=backend)["error"]:
                found[backend] = LocalResult.not_run(replica.id, error, side.versions)
                continue
            base = plain if side is torch else plain_texts(side, wanted, max_tokens)
            exact = generate(side, wanted, base, max_tokens)
            runs[backend] = exact, compared_taps(side, torch, wanted[-1].ids), side.versions
    replayed = replay_all(reference, replica, [exact for exact, *_ in runs.values()])
    for (backend, (exact, taps, versions)), document in zip(runs.items(), replayed, strict=True):
        known = expected(replica.id, count)
        verdicts = {
            "lossless": judge.judge_lossless(exact, None, float32_only=True),
            "faithful": judge.judge_faithful(exact, document, known),
            "taps": taps,
        }
        found[backend] = LocalResult.of(replica.id, verdicts, versions)
    return {backend: found[backend] for backend in backends}


@contextmanager
def started(replica: Replica, name: str, python: Path) -> Iterator[Side]:
    """A worker with one pair; ended afterwards."""
    threads = str(os.cpu_count() or 1)
    command = [
        *(str(python), str(_WORKER), "--threads", threads),
        *("--target", str(replica.target), "--draft", str(replica.draft)),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    side = Side(name, command, env)
    try:
        yield side
    finally:
        side.close()


def texts(count: int) -> list[Text]:
    """``count`` of the replicas' prompts, and some whose beginning a prompt cache holds."""
    every = [Text(p.id, p.kind, tuple(tokenizer.chat(p.text))) for p in prompts.of_replicas()]
    chosen = {p.id for p in prompts.spread(prompts.of_replicas(), count)}
    first, other = (next(t for t in every if len(t.ids) >= n) for n in (100, 161))
    found = [text for text in every if text.id in chosen]
    found.append(Text("prefix-none", PREFIX, first.ids))
    for shared in _SHARED:
        ids = (*first.ids[:shared], *other.ids[shared:])
        found.append(Text(f"prefix-{shared}", PREFIX, ids, keep=True))
        found.append(Text(f"prefix-{shared}-back", PREFIX, first.ids, keep=True))
    # Another request after the same text: what is asked for is in the block that is shared in part.
    found.append(Text("prefix-request", PREFIX, (*first.ids[:-24], *other.ids[-24:]), keep=True))
    # All that the text before left behind, answer included: what a recurrent state can go on from.
    found.append(Text("prefix-whole", PREFIX, other.ids[-24:], keep=True, follows=True))
    # Cut short and gone on with: the draft's last cached block is what it drafts from.
    found.append(Text("prefix-cut", PREFIX, first.ids, keep=True, limit=8))
    found.append(Text("prefix-continued", PREFIX, (), keep=True, follows=True))
    # As many tokens as a recurrent state has read, and two more, after another request.
    found.append(Text("prefix-read", PREFIX, first.ids, keep=True, limit=1))
    ids = (*first.ids[:-24], *other.ids[-26:])
    found.append(Text("prefix-other-request", PREFIX, ids, keep=True))
    return found


def chat_texts(side: Side, count: int) -> list[Text]:
    """``count`` of the packaged prompts, in the target's chat template."""
    chosen = prompts.spread(prompts.load(), count)
    found = side.ask(op="chat", texts=[p.text for p in chosen])["ids"]
    return [Text(p.id, p.kind, tuple(ids)) for p, ids in zip(chosen, found, strict=True)]


def plain_texts(side: Side, wanted: Sequence[Text], max_tokens: int) -> list[list[int]]:
    """The framework's own greedy texts."""
    found: list[list[int]] = []
    for text in tqdm(wanted, desc="plain", unit="text", disable=None):
        ids = prompt_of(text, wanted, found)
        count = text.new_tokens(max_tokens)
        found.append(side.ask(op="plain", ids=ids, max_tokens=count)["tokens"])
    return found


def prompt_of(text: Text, wanted: Sequence[Text], before: Sequence[Sequence[int]]) -> list[int]:
    """A text's prompt: its own, after the whole of the text before where it continues that."""
    if not text.follows:
        return list(text.ids)
    return [*wanted[wanted.index(text) - 1].ids, *before[-1], *text.ids]


def generate(
    side: Side, wanted: Sequence[Text], plain: Sequence[Sequence[int]], max_tokens: int
) -> dict[str, Any]:
    """Every text with DFlash, in the form of :func:`ci.check.run_exact`."""
    sequences: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    accepted: list[int] = []
    k = 0
    for at, text in enumerate(tqdm(wanted, desc="generate", unit="text", disable=None)):
        ids = prompt_of(text, wanted, plain[:at])
        count = text.new_tokens(max_tokens)
        made = side.ask(op="generate", ids=ids, max_tokens=count, keep=text.keep)
        sequences.append(
            {
                "id": text.id,
                "kind": text.kind,
                "prompt": ids,
                "base": plain[at],
                "generated": made["tokens"],
                "chunk_sizes": [1, *(step["size"] for step in made["steps"])],
                "record_start": len(blocks),
                "reused": made["reused"],
            }
        )
        blocks += [
            {name: step[name] for name in ("position", "known", "draft")} for step in made["steps"]
        ]
        accepted += [step["accepted"] for step in made["steps"]]
        k = max([k, *(len(step["draft"]) for step in made["steps"])])
    stats = AcceptanceStats.from_steps(accepted, k)
    return {
        "sequences": sequences,
        "stats": stats.to_dict(),
        "blocks": blocks,
        "max_tokens": max_tokens,
    }


def replay_all(
    reference: Environment, replica: Replica, runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The reference's replay of each run; what several generated alike is replayed once."""
    names: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for one in runs:
        for seq in one["sequences"]:
            names.setdefault(_text(seq), f"text-{len(names)}")
    given = [
        {"id": name, "prompt": prompt, "generated": generated}
        for (prompt, generated), name in names.items()
    ]
    k = _row(replica.id).num_speculative_tokens
    document = replay.replay(reference, replica.target, replica.draft, k, given)
    found = {entry["id"]: entry for entry in document["sequences"]}
    documents = []
    for one in runs:
        entries = [{**found[names[_text(seq)]], "id": seq["id"]} for seq in one["sequences"]]
        steps = [step["accepted"] for entry in entries for step in entry["steps"]]
        stats = AcceptanceStats.from_steps(steps, k)
        documents.append({"al": stats.al, "stats": stats.to_dict(), "sequences": entries})
    return documents


def _text(sequence: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(sequence["prompt"]), tuple(sequence["generated"])


def compared_taps(side: Side, torch: Side, ids: Sequence[int]) -> Verdict:
    """A side's tapped states of a prompt, held by the side with torch against Transformers'."""
    values = side.ask(op="taps", ids=ids)["values"]
    return judge.judge_taps(torch.ask(op="compare", ids=ids, values=values)["taps"])


def expected(name: str, count: int) -> tuple[Expected, ...]:
    """The acceptance lengths a pair is known for; a replica's are of all of its prompts."""
    return _row(name).expected if name == DEMO or count >= len(prompts.of_replicas()) else ()


def _row(name: str) -> Pair:
    return next(row for row in matrix.load().pairs.values() if name in (row.replica, row.id))


def save(backend: str, result: LocalResult, count: int, max_tokens: int) -> None:
    """Put a result into the back-end's file, in place of the pair's last one."""
    asked, name = prompts.of_replicas(), "replica"
    if result.replica == DEMO:
        asked, name = prompts.load(), "packaged"
    settings = {
        "prompts": count,
        "prompt_set": f"{name}@{prompts.digest(asked)}",
        "max_tokens": max_tokens,
        "dtype": "float32",
    }
    new = replace(result, settings=settings)
    kept = {r.replica: r for r in saved(backend)} | {result.replica: new}
    document = {
        "backend": backend,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "results": [asdict(kept[name]) for name in all_pairs() if name in kept],
    }
    save_json(_path(backend), document)


def saved(backend: str) -> list[LocalResult]:
    """The recorded results of a back-end; none where nothing is recorded."""
    path = _path(backend)
    if not path.exists():
        return []
    return [LocalResult.from_json(row) for row in load_json(path)["results"]]


def _path(backend: str) -> Path:
    if backend not in BACKENDS:
        raise UnknownCellError(f"no back-end {backend!r}", hint=near_names(backend, BACKENDS))
    return RESULTS / f"{backend}.json"
