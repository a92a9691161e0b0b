"""The report of a run: one HTML page without network, Markdown, JSON, and a few lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import matrix
from ..cache import atomic_write_text
from ..errors import UsageError
from . import advice as k_advice
from . import charts, grid, published
from .plan import BASE, DFLASH

_DATA = Path(__file__).parent / "data"
FILES = ("report.html", "report.md", "summary.json")


def write(
    out: Path,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    *,
    results: Path | None = None,
) -> None:
    """``report.html``, ``report.md`` and ``summary.json`` in ``out``.

    Args:
        settings, summary: of ``run.json`` and :func:`.analysis.summarise`.
        results: recorded results of the matrix; None: those of this checkout, if it is one.

    Raises:
        UsageError: ``results`` or ``advice.json`` cannot be read.
        CacheError: a file cannot be written.
    """
    context = _context(out, settings, summary, results)
    made = {
        "report.html": _template("report.html.j2").render(context),
        "report.md": _template("report.md.j2").render(context),
        "summary.json": json.dumps(
            {"settings": dict(settings), **summary}, indent=1, ensure_ascii=False
        ),
    }
    for name, text in made.items():
        atomic_write_text(out / name, text.rstrip() + "\n")


def terminal(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The rates and ratios, for the terminal."""
    lines = []
    for dataset, levels in summary["datasets"].items():
        for level, row in levels.items():
            parts = []
            for arm, numbers in row["arms"].items():
                ratio = row["speedup"].get(arm)
                times = f" ({ratio['median']:.2f}x)" if ratio else ""
                parts.append(f"{arm} {_number(numbers['tokens_per_second'], 1)} tokens/s{times}")
            lines.append(f"{dataset}, {charts.words(level)}: " + ", ".join(parts))
        for arm, stats in summary["acceptance"].get(dataset, {}).items():
            lines.append(f"{dataset}: AL of {arm} {_number(stats['al'], 2)}")
    for name, reason in (settings.get("not_run") or {}).items():
        lines.append(f"arm {name} not run: {reason}")
    return "\n".join(lines)


def _context(
    out: Path, settings: Mapping[str, Any], summary: Mapping[str, Any], results: Path | None
) -> dict[str, Any]:
    data = matrix.load()
    advice = _advice(out)
    folder = results or grid.default_results()
    return {
        "settings": settings,
        "summary": summary,
        "cards": _cards(settings, summary, advice),
        "charts": {
            name: [(title, Markup(svg)) for title, svg in charts.of_dataset(summary, name)]
            for name in summary["datasets"]
        },
        "advice": advice,
        "advice_text": k_advice.text(advice) if advice else [],
        "advice_chart": Markup(charts.of_advice(advice)[1]) if advice else None,
        "published": published.compare(settings, summary, data.published),
        "grid": grid.build(data, folder) if folder else None,
        "kinds": list(grid.WORDS),
        "signs": grid.SIGNS,
        "words": grid.WORDS,
        "level_words": charts.words,
        "number": _number,
        "base": BASE,
    }


def _advice(out: Path) -> dict[str, Any] | None:
    path = out / "advice.json"
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        k_advice.text(found)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UsageError(
            f"{path}: not advice on K ({type(err).__name__})", hint="delete it and sweep again"
        ) from err
    return found


def _cards(
    settings: Mapping[str, Any], summary: Mapping[str, Any], advice: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    """Verdicts: what, how good (``good``, ``bad``, ``plain``), the number, and a sentence."""
    cards = []
    # Events tell how many tokens were accepted at most, not how many are drafted.
    asked = {arm["name"]: arm["num_speculative_tokens"] for arm in settings.get("arms", ())}
    for dataset, levels in summary["datasets"].items():
        ratios = {
            level: row["speedup"][DFLASH]["median"]
            for level, row in levels.items()
            if DFLASH in row["speedup"]
        }
        if ratios:
            first, last = next(iter(ratios)), list(ratios)[-1]
            losing = [level for level, ratio in ratios.items() if ratio <= 1]
            note = f"at {charts.words(first)}"
            if last != first:
                note += f"; {ratios[last]:.2f}x at {charts.words(last)}"
            note += f". It loses at {', '.join(map(charts.words, losing))}." if losing else "."
            cards.append(_card(f"speed-up, {dataset}", f"{ratios[first]:.2f}x", note,
                               ratios[first] > 1))  # fmt: skip
        stats = summary["acceptance"].get(dataset, {}).get(DFLASH)
        if stats:
            k = asked.get(DFLASH) or stats["num_speculative_tokens"]
            cards.append(_card(f"acceptance length, {dataset}", _number(stats["al"], 2),
                               f"tokens a step with K {k}; 1: a useless draft."))  # fmt: skip
        same = [row["arms"].get(DFLASH, {}).get("same_tokens") for row in levels.values()]
        compared = sum(s["compared"] for s in same if s)
        if compared:
            equal = sum(s["equal"] for s in same if s)
            cards.append(_card(f"same tokens, {dataset}", f"{equal} of {compared}",
                               "answers equal to those without speculation. In 16 bit, ties "
                               "at other batch shapes break some of them."))  # fmt: skip
    if advice:
        row = advice["levels"][0]
        loses = advice["loses_from"]
        note = f"at concurrency {row['concurrency']} ({row['speedup']:.2f}x). "
        note += f"DFlash loses from concurrency {loses} on." if loses else "It pays throughout."
        cards.append(_card("K to use", str(row["k"]), note, row["pays"]))
    errors = sum(summary["errors"].values())
    told = ", ".join(f"{n} {kind}" for kind, n in summary["errors"].items()) or "No error."
    cards.append(_card("failed requests", f"{errors} of {summary['requests']}", told, not errors))
    for name, reason in (settings.get("not_run") or {}).items():
        cards.append(_card(f"{name}: not run", "–", reason))
    return cards


def _card(title: str, value: str, note: str, good: bool | None = None) -> dict[str, str]:
    kind = "plain" if good is None else "good" if good else "bad"
    return {"title": title, "value": value, "note": note, "kind": kind}


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_DATA), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, autoescape=name.endswith(".html.j2"),
    )  # fmt: skip
    return environment.get_template(name)
