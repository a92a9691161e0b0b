"""Cell results -> report.json, report.md, docs/results/ and the README's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dflash_plugin import demo
from dflash_plugin.cache import atomic_write_text, make_dir
from dflash_plugin.demo import manifest
from dflash_plugin.errors import UsageError
from dflash_plugin.matrix import SERVES, Known, Matrix

from . import mutations, pairs_page
from . import summary as releases
from .records import FAILED, NOT_RUN, PASSED, CellResult, Verdict, load_json, result_path, save_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
_EARLIER = "†"
_EARLIER_NOTE = (
    f"{_EARLIER} With an earlier packaged draft. The verdicts are of the engine; AL and speed-up "
    "are that draft's."
)
BEGIN, END = "<!-- support:begin (python -m ci report --readme) -->", "<!-- support:end -->"


def write(out: Path, results: Sequence[CellResult]) -> None:
    """``report.json`` (full, with raw data) and ``report.md`` in ``out``."""
    save_json(out / "report.json", [result.to_json() for result in results])
    atomic_write_text(out / "report.md", markdown(results))


def read(out: Path) -> list[CellResult]:
    """The results of an earlier run in ``out``."""
    path = out / "report.json"
    data = load_json(path)
    if not isinstance(data, list):
        raise UsageError(f"{path}: expected a list of cell results")
    return [CellResult.from_json(row, str(path)) for row in data]


def merge(folders: Sequence[Path], matrix: Matrix) -> list[CellResult]:
    """The results of runs that shared a matrix, one per cell of it, in its order.

    A cell that no folder has is "not run": a shard that died is seen in the report.

    Raises:
        UsageError: a folder has no report, or two have different results of a cell.
    """
    found: dict[str, tuple[CellResult, Path]] = {}
    for folder in folders:
        for result in read(folder):
            if found.setdefault(result.id, (result, folder))[0] != result:
                raise UsageError(
                    f"{folder}: {result.id} has another result than in {found[result.id][1]}",
                    hint="name the folders of one run, each once",
                )
    missing = {
        cell.id: CellResult(cell.id, NOT_RUN, cell.not_run or "no merged run has it")
        for cell in matrix.cells
        if cell.id not in found
    }
    order = {cell.id: at for at, cell in enumerate(matrix.cells)}
    results = [*(result for result, _ in found.values()), *missing.values()]
    return sorted(results, key=lambda result: order.get(result.id, len(order)))


def save(results: Sequence[CellResult], root: Path = RESULTS) -> list[Path]:
    """Keep results for the repository: verdicts and numbers, no tokens, no logs."""
    paths = []
    for result in results:
        image = result.environment.get("kind") == "image"
        path = result_path(root, result.id, image=image)
        save_json(path, replace(result, raw=_slim(result.raw)).to_json())
        paths.append(path)
    return paths


def saved(matrix: Matrix, root: Path = RESULTS) -> list[CellResult]:
    """One result per cell of the matrix; a cell without a file is "not run"."""
    results = []
    for cell in matrix.cells:
        path = result_path(root, cell.id)
        if path.exists():
            results.append(CellResult.from_json(load_json(path), str(path)))
        else:
            results.append(CellResult(cell.id, NOT_RUN, cell.not_run or "no recorded run"))
    return results


def markdown(results: Sequence[CellResult]) -> str:
    """A report for people: one table, then each cell's evidence in sentences."""
    lines = ["# dflash-plugin: results", "", *table(results), ""]
    for result in results:
        lines += [f"## {result.id}", "", f"**{_words(result.status)}**"]
        if result.reason:
            lines[-1] += f": {result.reason}"
        lines.append("")
        lines += [f"- {line}" for line in _details(result)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def table(
    results: Sequence[CellResult],
    known: Callable[[str], Mapping[str, Known]] = lambda _: {},
    earlier: Callable[[CellResult], bool] = lambda _: False,
) -> list[str]:
    """The Markdown table of verdicts; failures that the matrix knows are marked.

    Args:
        earlier: whether a result is of a draft that was replaced since; its AL is marked.
    """
    lines = [
        "| cell | status | serves | lossless | faithful | AL (reference) | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        al = "–" if r.al is None else f"{r.al:.2f} ({_number(r.al_reference)})"
        al += f" {_EARLIER}" * earlier(r)
        rows = known(r.id)
        lines.append(
            f"| `{r.id}` | {_words(r.status)} | {_verdict(r, SERVES, rows)} "
            f"| {_verdict(r, 'lossless', rows)} | {_verdict(r, 'faithful', rows)} "
            f"| {al} | {_speedup(r)} |"
        )
    return lines


def surprises(
    result: CellResult,
    verdicts: Sequence[str],
    known: Callable[[str], Mapping[str, Known]],
) -> list[str]:
    """Verdicts that did not come out as they should: the reasons a run fails.

    A verdict has to pass, or has to fail where the matrix knows that it does. An engine
    that does not serve has no verdicts; a cell that the matrix says not to run has nothing.
    """
    lines = []
    rows = known(result.id)
    if result.status == NOT_RUN and not result.settings:
        return []
    if result.serves.status == FAILED or SERVES in rows:
        verdicts = (SERVES,)
    for name in verdicts:
        verdict: Verdict = getattr(result, name)
        if name in rows:
            if verdict.status != FAILED:
                lines.append(
                    f"{result.id}: {name} is {_words(verdict.status)}, but the matrix says it "
                    f"fails until {rows[name].until}"
                )
        elif verdict.status != PASSED:
            does_not = "does not serve" if name == SERVES else f"not {name}"
            lines.append(f"{result.id}: {does_not} ({verdict.reason})")
    return lines


def summary(result: CellResult) -> str:
    """What `make demo` prints: three verdicts and the speed-up."""
    lines = [f"{result.id}: {_words(result.status)}"]
    if result.reason:
        lines.append(f"  {result.reason}")
    for name in ("lossless", "faithful", "faster"):
        verdict: Verdict = getattr(result, name)
        lines.append(f"  {name:<9} {_words(verdict.status)}")
    if result.al is not None:
        lines.append(
            f"  AL        {result.al:.3f} (reference's replay: {_number(result.al_reference, 3)})"
        )
    for level in result.faster.evidence.get("levels", []):
        low, high = level["spread"]
        lines.append(
            f"  speed-up  {level['speedup']:.2f}x at concurrency {level['concurrency']} "
            f"({low:.2f}–{high:.2f} over {level['rounds']} interleaved rounds{_kinds(level)})"
        )
    return "\n".join(lines)


def readme(matrix: Matrix, *, check: bool, path: Path = README, root: Path = RESULTS) -> bool:
    """Rewrite the README's support block and the pages made from data in ``docs/``.

    Returns:
        Whether all were up to date. With ``check`` nothing is written.
    """
    text = path.read_text(encoding="utf-8")
    try:
        head, rest = text.split(BEGIN, 1)
        _, tail = rest.split(END, 1)
    except ValueError as err:
        raise UsageError(
            f"{path}: no {BEGIN} … {END} block", hint="put the two lines back"
        ) from err
    results = saved(matrix, root)
    earlier = _of_earlier_draft(matrix)
    block = "\n".join([*releases.by_release(results, matrix), "", *_provenance(results)])
    detail = [
        "# Recorded results, cell by cell",
        "",
        "Written by `python -m ci report --readme` from the files beside it.",
        "",
        *table(results, matrix.known_failures, earlier),
        "",
        *([_EARLIER_NOTE, ""] if any(map(earlier, results)) else []),
        *_known(results, matrix),
        *_provenance(results),
    ]
    wanted = {
        path: f"{head}{BEGIN}\n\n{block}\n{END}{tail}",
        root / "README.md": "\n".join(detail) + "\n",
        root.parent / "vllm-repairs.md": "\n".join(releases.differences()),
        root.parent / "mutations.md": "\n".join(mutations.page()) + "\n",
        root.parent / "pairs.md": "\n".join(pairs_page.lines(matrix, results)) + "\n",
    }
    fresh = True
    for file, content in wanted.items():
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            fresh = False
            if not check:
                make_dir(file.parent)
                atomic_write_text(file, content)
    return fresh


def _of_earlier_draft(matrix: Matrix) -> Callable[[CellResult], bool]:
    """Whether a result was recorded with a packaged draft that is not today's."""
    embedded = {pair.id for pair in matrix.pairs.values() if pair.embedded}
    today = manifest.hashes(demo.DRAFT)["model.safetensors"]

    def earlier(result: CellResult) -> bool:
        is_demo = result.id.rpartition("/")[2] in embedded
        return is_demo and result.settings.get("draft_sha256", today) != today

    return earlier


def _details(result: CellResult) -> list[str]:
    lines = []
    exact = result.lossless.evidence.get("float32")
    if exact:
        lines.append(
            f"lossless: float32, {exact['equal']} of {exact['prompts']} prompts "
            f"({exact['tokens']} tokens) equal to the same engine without speculation"
        )
    control = result.lossless.evidence.get("bfloat16")
    if exact and control is None:
        lines.append("bfloat16: not run")
    if control:
        lines.append(
            f"bfloat16: {control['diverged']} of {control['prompts']} answers part from plain "
            f"decoding somewhere (largest gap {_number(control['gaps']['max'], 3)} nats); plain "
            f"decoding at batch {control['control_width']} parts from itself in "
            f"{control['control_diverged']} (largest gap "
            f"{_number(control['control_gaps']['max'], 3)})"
        )
    evidence = result.faithful.evidence
    if evidence:
        blocks = evidence["blocks"]
        kinds = ", ".join(f"{k} {_number(v)}" for k, v in evidence["al_by_kind"].items())
        lines.append(
            f"faithful: {blocks['equal']} of {blocks['steps']} drafted blocks equal to the "
            f"reference's ({blocks['tie']} ties, {blocks['different']} different, "
            f"{blocks['missing']} missing); AL {_number(evidence['al'], 3)} against "
            f"{_number(evidence['al_reference'], 3)}; by kind, from streamed steps: {kinds}"
        )
        if taps := evidence.get("taps"):
            farthest = max(row["distance"] for row in taps)
            lines.append(
                f"taps of the first prompt: {len(taps)} layers, at most {farthest:.1e} of their "
                "size from the reference's"
            )
    for level in result.faster.evidence.get("levels", []):
        base, fast = level["base"], level["dflash"]
        lines.append(
            f"concurrency {level['concurrency']}: {level['speedup']:.2f}x "
            f"({level['spread'][0]:.2f}–{level['spread'][1]:.2f}, {level['rounds']} rounds); "
            f"{base['tokens_per_second']:.1f} -> {fast['tokens_per_second']:.1f} tokens/s, "
            f"time to first token {base['ttft_ms']:.0f} -> {fast['ttft_ms']:.0f} ms, "
            f"inter-token latency {_number(base['itl_ms'], 1)} -> {_number(fast['itl_ms'], 1)} ms"
            f"{_kinds(level)}"
        )
    settings, env = result.settings, result.environment
    if "num_speculative_tokens" in settings:
        mode = "compiled" if settings["compiled"] else "eager"
        packages = ", ".join(f"{k} {v}" for k, v in env["packages"].items())
        lines.append(
            f"settings: K {settings['num_speculative_tokens']}, {settings['template']}, greedy, "
            f"{settings['profile']['max_tokens']} new tokens, {mode}, "
            f"prompts {settings['prompt_set']}; {packages}; {env['cpu']}, {env['cores']} cores"
        )
    return lines


def _known(results: Sequence[CellResult], matrix: Matrix) -> list[str]:
    """The known failures among ``results``, each with its reason and its end."""
    rows = [
        row
        for result in results
        for row in matrix.known_failures(result.id).values()
        if getattr(result, row.verdict).status == FAILED
    ]
    lines = []
    for row in dict.fromkeys(rows):
        what = "does not serve" if row.verdict == SERVES else f"is not {row.verdict}"
        lines.append(f"- `{row.cell}` {what}: {row.reason}. Until {row.until}.")
    return [*lines, ""] if lines else []


def _provenance(results: Sequence[CellResult]) -> list[str]:
    run = [r for r in results if "num_speculative_tokens" in r.settings]
    if not run:
        return ["No run is recorded yet."]
    cpus = dict.fromkeys(f"{r.environment['cpu']}, {r.environment['cores']} cores" for r in run)
    sets = dict.fromkeys(r.settings["prompt_set"] for r in run)
    return [
        f"Last recorded run: {'; '.join(cpus)}; prompts {'; '.join(sets)}; greedy, chat template. "
        "Each cell and its numbers: `docs/results/`. A cell without a recorded run is “not run”."
    ]


def _slim(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is large and derivable: tokens, blocks, replayed steps."""
    slim: dict[str, Any] = {}
    if "exact" in raw:
        slim["exact"] = {
            "stats": raw["exact"]["stats"],
            "sequences": [
                {"id": s["id"], "kind": s["kind"], "tokens": len(s["generated"])}
                for s in raw["exact"]["sequences"]
            ],
        }
    if "replay" in raw:
        slim["replay"] = {"stats": raw["replay"]["stats"], "versions": raw["replay"]["versions"]}
    for name in ("control", "speed"):
        if name in raw:
            slim[name] = raw[name]
    return slim


def _speedup(result: CellResult) -> str:
    """Median ratios and, for batch 1, its spread; a loss is shown like a gain."""
    cells = []
    for level in result.faster.evidence.get("levels", []):
        text = f"{level['concurrency']}: {level['speedup']:.2f}x"
        if level["concurrency"] == 1:
            low, high = level["spread"]
            text += f" ({low:.2f}–{high:.2f})"
        cells.append(text)
    return ", ".join(cells) or "–"


def _kinds(level: Mapping[str, Any]) -> str:
    """Ratios by kind of prompt, where one request at a time makes them comparable."""
    if level["concurrency"] != 1:
        return ""
    return "; " + ", ".join(f"{kind} {ratio:.2f}x" for kind, ratio in level["by_kind"].items())


def _verdict(result: CellResult, name: str, known: Mapping[str, Known]) -> str:
    status: str = getattr(result, name).status
    return _words(status) + (" (known)" if name in known and status == FAILED else "")


def _words(status: str) -> str:
    return status.replace("_", " ")


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
