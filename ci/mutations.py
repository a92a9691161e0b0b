"""``python -m ci mutate``: mistakes an engine can make, and which check sees each.

A pair of the Transformers back-end plays the engine, with one fault of
``ci/workers/faults.py`` at a time; what it generates is judged as any engine's is. A fault that
no check sees is an error, and so is a check that fails without one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dflash_plugin.errors import VerdictFailedError

from . import environment, judge, local_runs, replica_specs, replicas
from .records import FAILED, PASSED, Verdict, load_json, save_json
from .replicas import Replica

PATH = local_runs.RESULTS / "mutations.json"
NONE = "none"
"""The name of the run without a fault."""
FAULTS = {
    "taps-plus-one": "every tap is the output of the layer after its own",
    "wrong-mask-id": "the block is filled with the token before the mask",
    "wrong-rope": "the draft's rope is a plain one with theta 10000",
    "windows-ignored": "the draft's sliding layers see everything",
    "target-windows-ignored": "the target's sliding layers see everything while it verifies",
    "no-embedding-scale": "embeddings enter the draft as they are stored",
    "state-not-rewound": "recurrent states keep the rejected tokens",
    "stale-prefix-block": "a prefix cache hands out a block whose end is another text's",
    "stale-draft-block": "a block of the draft's cache holds another block's keys and values",
}
CHECKS = {
    "T": "taps: not Transformers' `hidden_states[i + 1]`",
    "L": "lossless: another text than plain decoding's",
    "B": "faithful, blocks: a drafted block is not the reference's",
    "A": f"faithful, AL: not within {judge.AL_TOLERANCE:.0%} of the reference's replay",
}
COUNT, MAX_TOKENS = 6, 32
"""Prompts, beside those that share a prefix, and new tokens of each."""


@dataclass(frozen=True)
class Mutation:
    """A fault in a pair. ``caught``: keys of :data:`CHECKS`; None: the pair cannot have it."""

    replica: str
    fault: str
    caught: tuple[str, ...] | None
    al: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command ``mutate``."""
    parser.add_argument("ids", nargs="*", metavar="REPLICA", help="none: all of them")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="may be repeated")
    parser.add_argument("--save", action="store_true", help="keep the table in docs/results/")


def run(args: argparse.Namespace) -> int:
    """Print a line per pair and fault; ``VerdictFailedError`` where one survives."""
    specs = replica_specs.load()
    survived = []
    for name in dict.fromkeys(specs.pair(name).id for name in args.ids or specs.pairs):
        found = of_replica(replicas.ensure(name), args.fault or list(FAULTS))
        for row in found:
            print(f"{name} {row.fault}: {words(row)}", flush=True)
        survived += [f"{name}: {row.fault} {words(row)}" for row in found if not right(row)]
        if args.save:
            save(name, found)
    if survived:
        raise VerdictFailedError("; ".join(survived), hint="a check has a hole there")
    return 0


def of_replica(
    replica: Replica,
    faults: Sequence[str],
    count: int = COUNT,
    max_tokens: int = MAX_TOKENS,
) -> list[Mutation]:
    """What the checks say of a pair without a fault, and with each."""
    reference = environment.ensure_reference()
    wanted = local_runs.texts(count)
    runs: dict[str, tuple[dict[str, Any], Verdict]] = {}
    with local_runs.started(replica, "torch", reference.python) as side:
        if error := side.ask(op="load", backend="transformers")["error"]:
            raise VerdictFailedError(f"{replica.id}: {error}")
        plain = local_runs.plain_texts(side, wanted, max_tokens)
        for name in (NONE, *faults):
            if side.ask(op="fault", name=None if name == NONE else name)["applies"]:
                taps = local_runs.compared_taps(side, side, wanted[-1].ids)
                runs[name] = local_runs.generate(side, wanted, plain, max_tokens), taps
    replayed = local_runs.replay_all(reference, replica, [exact for exact, _ in runs.values()])
    found = {
        name: Mutation(replica.id, name, _caught(exact, taps, document), exact["stats"]["al"])
        for (name, (exact, taps)), document in zip(runs.items(), replayed, strict=True)
    }
    return [found.get(n, Mutation(replica.id, n, None, None)) for n in (NONE, *faults)]


def _caught(
    exact: Mapping[str, Any], taps: Verdict, replayed: Mapping[str, Any]
) -> tuple[str, ...]:
    lossless = judge.judge_lossless(exact, None, float32_only=True)
    evidence = judge.judge_faithful(exact, replayed).evidence
    al, al_reference = evidence["al"], evidence["al_reference"]
    failed = {
        "T": taps.status == FAILED,
        "L": lossless.status == FAILED,
        "B": evidence["blocks"]["different"] + evidence["blocks"]["missing"] > 0,
        "A": abs(al - al_reference) > judge.AL_TOLERANCE * al_reference,
    }
    return tuple(name for name, caught in failed.items() if caught)


def right(row: Mutation) -> bool:
    """Whether a fault was seen, and nothing where there is none."""
    return row.caught is None or bool(row.caught) == (row.fault != NONE)


def words(row: Mutation) -> str:
    """A cell of the table."""
    if row.caught is None:
        return "–"
    if not row.caught:
        return PASSED if row.fault == NONE else "survives"
    return " ".join(row.caught)


def save(name: str, rows: Sequence[Mutation]) -> None:
    """Put a pair's rows into the recorded table, fault by fault."""
    kept = {(row.replica, row.fault): row for row in saved()}
    kept |= {(name, row.fault): row for row in rows}
    order = [
        kept[pair, fault]
        for pair in replica_specs.load().pairs
        for fault in (NONE, *FAULTS)
        if (pair, fault) in kept
    ]
    save_json(PATH, [asdict(row) for row in order])


def saved() -> list[Mutation]:
    """The recorded table."""
    if not PATH.exists():
        return []
    rows = load_json(PATH)
    return [
        Mutation(**{**row, "caught": None if row["caught"] is None else tuple(row["caught"])})
        for row in rows
    ]


def page() -> list[str]:
    """``docs/mutations.md``."""
    rows = {(row.replica, row.fault): row for row in saved()}
    pairs = list(dict.fromkeys(pair for pair, _ in rows))
    missing = [name for name in replica_specs.load().pairs if name not in pairs]
    shared = sum(text.kind == local_runs.PREFIX for text in local_runs.texts(COUNT))
    lines = [
        "# Mutations: which check sees which mistake",
        "",
        "Written by `python -m ci report --readme` from `docs/results/local/mutations.json`, which",
        "`python -m ci mutate --save` makes. The Transformers back-end plays the engine and makes",
        "one mistake at a time; what it generates is judged as every engine's is: "
        f"{COUNT} prompts of",
        f"the replicas, and {shared} texts in one prompt cache, most of which begin as the one "
        "before",
        "them did.",
        "",
        *(f"- `{name}`: {what}" for name, what in FAULTS.items()),
        "",
        "Checks:",
        "",
        *(f"- **{key}** {what}" for key, what in CHECKS.items()),
        "",
        "“–”: the pair cannot have the fault; “not run”: not recorded.",
        "",
        "| replica | no fault | " + " | ".join(FAULTS) + " |",
        "|---|---|" + "---|" * len(FAULTS),
    ]
    for pair in pairs:
        cells = [
            words(rows[pair, fault]) if (pair, fault) in rows else "not run"
            for fault in (NONE, *FAULTS)
        ]
        lines.append(f"| `{pair}` | " + " | ".join(cells) + " |")
    if missing:
        lines += ["", f"Not run: {', '.join(f'`{name}`' for name in missing)}."]
    survivors = [row for row in rows.values() if not right(row)]
    lines += ["", f"Of those recorded {len(survivors) or 'none'} survives."]
    return [
        *lines,
        "",
        "Not in the table: a soft cap that is left out. It keeps the order of the logits, so a",
        "greedy draft is the same with and without it; it changes what is drawn at a temperature.",
    ]
