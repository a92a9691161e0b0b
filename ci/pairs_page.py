"""``docs/pairs.md``: every published pair, made from the matrix and the shapes of its halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dflash_plugin import known_pairs, traits
from dflash_plugin.architectures import GIB
from dflash_plugin.matrix import REPLICA, Matrix, Pair

from . import verdicts_page
from .records import CellResult

_TOKENS = 8192


def lines(matrix: Matrix, results: Sequence[CellResult]) -> list[str]:
    """The page, line by line."""
    pairs = [row for row in matrix.pairs.values() if row.status != REPLICA]
    shaped = [row for row in pairs if row.target_shape or row.draft_shape]
    return [
        "# Pairs",
        "",
        "Written by `python -m ci report --readme` from `compat_matrix.toml` and",
        "`dflash_plugin/data/architectures.toml`. What is not known is a “?”. The same on the",
        "command line, with filters: `dflash-plugin pairs`, and the command for one of them:",
        "`dflash-plugin serve TARGET --dry-run [--engine-version X]`, which asks no hub.",
        "",
        "Publishers replace drafts in place: a name with a date is the draft as it was then, by",
        "its revision. None of the pairs but the demo was run here in full size: what was run are",
        "replicas ([replicas.md](replicas.md)), with the verdicts below.",
        "",
        "| pair | target | draft | K | vLLM, with the plugin | status |",
        "|---|---|---|---|---|---|",
        *(_row(row) for row in pairs),
        "",
        "vLLM's first release is the oldest that `dflash_plugin/support.py` does not refuse for",
        "the pair, by its sources and by runs of replicas. SGLang's are those of",
        "[sglang.md](sglang.md), for every pair of them but DFlash 2.",
        "",
        *verdicts_page.lines(matrix, results),
        "## Memory",
        "",
        "GiB, computed from the shapes: the target as published, the draft in bf16, and the cache",
        f"of one sequence of {_TOKENS} tokens (16-bit keys and values; a window's worth on sliding",
        "layers; a recurrent state for every drafted token). Activations, CUDA graphs, vision",
        "towers and MTP heads come on top; vLLM 0.20 to 0.24 keep whole sequences for the draft's",
        "sliding layers.",
        "",
        "| pair | target | in | draft | cache | all | arguments on GPUs, as published |",
        "|---|---|---|---|---|---|---|",
        *(_memory(row) for row in shaped),
        "",
        "## Shapes",
        "",
        "| pair | target | taps on | draft | traits |",
        "|---|---|---|---|---|",
        *(_shape(row) for row in shaped),
        "",
        "A replica has to keep the traits:",
        "",
        *(f"- `{name}`: {meaning}" for name, meaning in traits.TRAITS.items()),
        "",
        "## Published acceptance lengths",
        "",
        "As stated by their source, each for its own settings; more, and speed-ups, in the matrix.",
        "A “ci floor” is a test's threshold, below the mean it guards.",
        "",
        "| pair | engine, hardware | prompts | T | K | concurrency | AL | source |",
        "|---|---|---|---|---|---|---|---|",
        *(line for row in pairs for line in _published(matrix, row)),
    ]


def _row(row: Pair) -> str:
    draft = "none yet"
    if row.draft:
        revision = f"`{row.draft_revision[:12]}`" if row.draft_revision else "revision ?"
        draft = "in this package" if row.embedded else f"{row.draft} ({revision})"
        draft += f", {row.generation}" if row.generation else ""
    first, last = known_pairs.vllm_releases(row)
    releases = f"{first} to {last}" if row.draft else "–"
    note = f"; {row.notes}" if row.notes else ""
    k = row.num_speculative_tokens or "?"
    return f"| `{row.id}` | {row.target} | {draft} | {k} | {releases} | {row.status}{note} |"


def _memory(row: Pair) -> str:
    shape, memory = row.target_shape, row.memory(_TOKENS)
    parts = ["?"] * 4
    if memory is not None:
        sizes = (memory.target, memory.draft, memory.cache, memory.total)
        parts = [f"{size / GIB:.1f}" for size in sizes]
    elif shape is not None and (weights := shape.weight_bytes()) is not None:
        parts[0] = f"{weights / GIB:.1f}"
    dtype = ", ".join(_dtypes(shape.weights)) if shape is not None else "?"
    args = "; ".join(f"{name}: `{' '.join(given)}`" for name, given in row.args.items())
    target, draft, cache, total = parts
    return f"| `{row.id}` | {target} | {dtype} | {draft} | {cache} | {total} | {args or '–'} |"


def _dtypes(weights: Mapping[str, str]) -> list[str]:
    experts = weights.get("experts")
    return [weights["dtype"], *([f"experts {experts}"] if experts else [])]


def _shape(row: Pair) -> str:
    target, draft = row.target_shape, row.draft_shape
    taps = "?"
    if target is not None and draft is not None and draft.target_layer_ids:
        kinds = traits.tap_kinds(target, draft)
        taps = ", ".join(
            f"{tap} {kind.removesuffix('_attention')}"
            for tap, kind in zip(draft.target_layer_ids, kinds, strict=True)
        )
    what = "?"
    if target is not None:
        counts = {kind: target.count(kind) for kind in dict.fromkeys(target.unit)}
        layers = ", ".join(f"{n} {k.removesuffix('_attention')}" for k, n in counts.items())
        what = f"{target.model_type}, {layers}, width {target.hidden_size}"
    has = "?"
    if draft is not None:
        windows = f", {draft.sliding_layers} at {draft.sliding_window}"
        has = (
            f"{draft.num_hidden_layers} layers{windows if draft.sliding_layers else ''}, "
            f"block {draft.block_size or '?'}, mask "
            f"{'?' if draft.mask_token_id is None else draft.mask_token_id}"
        )
    kept = ", ".join(traits.traits(target, draft)) or "–"
    return f"| `{row.id}` | {what} | {taps} | {has} | {kept} |"


def _published(matrix: Matrix, row: Pair) -> list[str]:
    found = []
    for said in matrix.published_for(row):
        if not said.al:
            continue
        al = ", ".join(f"{name} {value:g}" for name, value in said.al.items())
        temperature = "?" if said.temperature is None else f"{said.temperature:g}"
        found.append(
            f"| `{row.id}` | {said.engine}, {said.hardware} | {said.template} | {temperature} "
            f"| {said.num_speculative_tokens} | {said.concurrency} | {al} "
            f"| {said.source} ({said.grade}) |"
        )
    return found
