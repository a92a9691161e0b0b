"""The verdicts on what was run: pure, so that every rule can be tested on made-up data.

An empty run is never "passed": each judge says what it had nothing of.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dflash_plugin.acceptance import AcceptanceStats
from dflash_plugin.matrix import Expected

from .records import FAILED, NOT_RUN, PASSED, Verdict

AL_TOLERANCE = 0.01
"""Relative difference of the engine's and the reference's AL that still passes."""

TIE_GAP = 2.5e-4
"""Two logits closer than this are a tie in float32: ten times the largest change of a
top-two gap seen between correct float32 and float64 programs on the demo pair (2.5e-5)."""

TAP_TOLERANCE = 1e-3
"""Distance of a tapped state from what it should be, as a share of its root mean square; the
outputs of two layers are hundreds of times as far apart."""

OTHER = 1e9
"""The distance of states that are not finite, or of another shape."""

CONTROL_P = 0.05
"""bfloat16 diverges too often when chance would give its count less often than this."""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first difference of two token sequences; None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b)):  # noqa: B905 - either may be longer
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def judge_lossless(
    exact: Mapping[str, Any],
    control: Mapping[str, Any] | None,
    *,
    float32_only: bool = False,
) -> Verdict:
    """Float32: every token of every prompt equal. bfloat16: no worse than the control.

    ``float32_only``: the profile leaves bfloat16 out, and the evidence says so.
    """
    different = []
    tokens = 0
    for seq in exact["sequences"]:
        at = first_difference(seq["base"], seq["generated"])
        tokens += len(seq["generated"])
        if at is not None:
            different.append({"id": seq["id"], "index": at})
    count = len(exact["sequences"])
    silent = [seq["id"] for seq in exact["sequences"] if not seq["base"] and not seq["generated"]]
    evidence: dict[str, Any] = {
        "float32": {
            "prompts": count,
            "equal": count - len(different),
            "tokens": tokens,
            "different": different,
        }
    }
    if different:
        first = different[0]
        return Verdict(
            FAILED,
            f"float32: {len(different)} of {count} prompts differ, first {first['id']} "
            f"at token {first['index']}",
            evidence,
        )
    if silent or not count:
        names = f": {', '.join(silent)}" if silent else ""
        return Verdict(NOT_RUN, f"no tokens were compared{names}", evidence)
    if control is None:
        reason = "" if float32_only else "bfloat16 was not compared with its control"
        evidence["bfloat16"] = None
        return Verdict(PASSED if float32_only else NOT_RUN, reason, evidence)
    n, ours, theirs = control["prompts"], len(control["dflash"]), len(control["control"])
    p = fisher_one_sided(ours, theirs, n)
    evidence["bfloat16"] = {
        "prompts": n,
        "diverged": ours,
        "control_diverged": theirs,
        "control_width": control["control_width"],
        "p": round(p, 4),
        "gaps": _gaps(control["dflash"]),
        "control_gaps": _gaps(control["control"]),
    }
    if p < CONTROL_P:
        return Verdict(
            FAILED,
            f"bfloat16: {ours} of {n} prompts diverge, the control only {theirs} (p = {p:.3f})",
            evidence,
        )
    if not control["tokens"] or fisher_one_sided(n, 0, n) >= CONTROL_P:
        reason = f"bfloat16: {n} prompts, {control['tokens']} tokens are too few to fail"
        return Verdict(NOT_RUN, reason, evidence)
    return Verdict(PASSED, "", evidence)


def judge_faithful(
    exact: Mapping[str, Any],
    replayed: Mapping[str, Any],
    expected: Sequence[Expected] = (),
) -> Verdict:
    """Blocks and AL against the reference's replay, and AL against what the pair is known for.

    The last point catches a draft that is broken in itself: engine and reference then
    agree, on nothing.
    """
    engine = AcceptanceStats.from_dict(exact["stats"])
    al, al_reference = engine.al, replayed["al"]
    blocks = compare_blocks(exact, replayed)
    by_kind = {
        kind: al_of_chunks([s for s in exact["sequences"] if s["kind"] == kind])
        for kind in dict.fromkeys(s["kind"] for s in exact["sequences"])
    }
    floors = []
    for row in expected:
        if row.num_speculative_tokens == engine.num_speculative_tokens and row.prompts in by_kind:
            measured = by_kind[row.prompts]
            floors.append(
                {
                    "prompts": row.prompts,
                    "al": measured,
                    "expected": row.al,
                    "ok": measured is not None and measured >= row.al * (1 - row.tolerance),
                }
            )
    taps = judge_taps(tap_distances(exact, replayed))
    evidence = {
        "al": al,
        "al_reference": al_reference,
        "drafts": engine.drafts,
        "drafts_reference": replayed["stats"]["drafts"],
        "accepted_per_position": list(engine.accepted_per_position),
        "accepted_per_position_reference": replayed["stats"]["accepted_per_position"],
        "al_by_kind": by_kind,
        "blocks": blocks,
        "taps": taps.evidence["taps"],
        "expected": floors,
    }
    if al is None or al_reference is None:
        return Verdict(NOT_RUN, "no drafts were made", evidence)
    if not blocks["recorded"]:
        return Verdict(NOT_RUN, "no drafted block was recorded", evidence)
    problems = [taps.reason] if taps.status == FAILED else []
    if abs(al - al_reference) > AL_TOLERANCE * al_reference:
        problems.append(f"AL is {al:.3f}, the reference's replay gives {al_reference:.3f}")
    wrong = blocks["different"] + blocks["missing"]
    if wrong:
        problems.append(
            f"{wrong} of {blocks['steps']} drafted blocks are not the reference's "
            f"({blocks['different']} different, {blocks['missing']} not found)"
        )
    for floor in floors:
        if not floor["ok"]:
            problems.append(
                f"AL on {floor['prompts']} is {floor['al']}, expected {floor['expected']}: "
                "the draft itself is not the one that is known"
            )
    return Verdict(FAILED if problems else PASSED, "; ".join(problems), evidence)


def judge_taps(found: Sequence[Mapping[str, Any]]) -> Verdict:
    """Every tap is the output of its own layer, and nearer to it than to any other's.

    Args:
        found: :class:`dflash_plugin.reference.taps.TapDistance` of each, as dicts, or without
            ``nearest``, as :func:`tap_distances` gives them.
    """
    wrong = [
        f"tap {row['tap']} is {row['distance']:.2g} away from the output of layer {row['tap']}"
        + (f", and nearest to layer {row['nearest']}'s" if "nearest" in row else "")
        for row in found
        if not row["distance"] <= TAP_TOLERANCE or row.get("nearest", row["tap"]) != row["tap"]
    ]
    evidence = {"taps": list(found)}
    if not found:
        return Verdict(NOT_RUN, "no tap was compared", evidence)
    return Verdict(FAILED if wrong else PASSED, "; ".join(wrong), evidence)


def tap_distances(exact: Mapping[str, Any], replayed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far an engine's recorded taps of the first prompt are from the reference's.

    Empty where none were recorded, by the engine or by the reference.
    """
    mine, theirs = exact.get("taps"), replayed.get("taps")
    if not mine or not theirs:
        return []
    found = []
    for at, tap in enumerate(theirs["layers"]):
        rows = []
        for values in (mine["values"], theirs["values"][: len(mine["ids"])]):
            width = len(values[0]) // len(theirs["layers"])
            rows.append([x for row in values for x in row[at * width : (at + 1) * width]])
        ours, expected = rows
        distance = OTHER
        if len(ours) == len(expected) and all(map(math.isfinite, ours)):
            scale = math.sqrt(statistics.fmean(x * x for x in expected))
            distance = max(abs(a - b) for a, b in zip(ours, expected, strict=True)) / scale
        found.append({"tap": tap, "distance": distance})
    return found


def compare_blocks(exact: Mapping[str, Any], replayed: Mapping[str, Any]) -> dict[str, Any]:
    """Every step of the replay against the engine's recorded block at the same place.

    A block that parts from the reference's where the reference sees a tie is excused and
    listed; its later tokens do not depend on the earlier ones, so they are compared too.
    """
    recorded = exact["blocks"]
    sequences = exact["sequences"]
    starts = [seq["record_start"] for seq in sequences]
    ends = [*starts, len(recorded)][1:]
    counts = {"steps": 0, "equal": 0, "tie": 0, "different": 0, "missing": 0}
    exceptions: list[dict[str, Any]] = []
    for seq, end, ref in zip(sequences, ends, replayed["sequences"], strict=True):
        mine = {
            (b["position"], b["known"]): b["draft"] for b in recorded[seq["record_start"] : end]
        }
        for step in ref["steps"]:
            counts["steps"] += 1
            draft = mine.get((step["position"], step["known"]))
            if draft is None:
                outcome, gap = "missing", None
            elif len(draft) != len(step["draft"]):
                outcome, gap = "different", None
            else:
                gaps = [
                    g for a, b, g in zip(draft, step["draft"], step["gaps"], strict=True) if a != b
                ]
                gap = max(gaps, default=None)
                outcome = "equal" if gap is None else "tie" if gap <= TIE_GAP else "different"
            counts[outcome] += 1
            if outcome != "equal" and len(exceptions) < 50:
                exceptions.append(
                    {
                        "id": seq["id"],
                        "position": step["position"],
                        "outcome": outcome,
                        "draft": draft,
                        "reference": step["draft"],
                        "gap": gap,
                    }
                )
    return {**counts, "recorded": len(recorded), "exceptions": exceptions}


def al_of_chunks(sequences: Sequence[Mapping[str, Any]]) -> float | None:
    """AL from streamed chunk sizes: each chunk after the first is one verify step.

    Slightly below the counters' AL, since a last step cut by the length limit shows
    fewer tokens than it accepted.
    """
    steps = [size for seq in sequences for size in seq["chunk_sizes"][1:]]
    return round(statistics.fmean(steps), 4) if steps else None


def fisher_one_sided(a: int, b: int, n: int) -> float:
    """P(a or more of a + b events fall in the first of two groups of n each) by chance."""
    total = a + b
    ways = math.comb(2 * n, total)
    upper = sum(math.comb(n, i) * math.comb(n, total - i) for i in range(a, min(n, total) + 1))
    return upper / ways


def _gaps(divergences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    gaps = sorted(d["gap"] for d in divergences if d["gap"] is not None)
    return {
        "known": len(gaps),
        "median": statistics.median(gaps) if gaps else None,
        "max": gaps[-1] if gaps else None,
    }
