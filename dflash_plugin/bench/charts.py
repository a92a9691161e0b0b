"""The report's charts as SVG text, drawn by Matplotlib.

Matplotlib and not an interactive library: static SVG with text as text is some 20 kB a
chart, needs no script and scales to any screen; Plotly's script alone is 4 MB a page.
Colours are Okabe and Ito's, which the colour-blind can tell apart; every line has a marker
and a dash pattern of its own as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .records import Level

_STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#56B4E9", "v", "-"),
    ("#E69F00", "P", "--"),
    ("#000000", "X", "-."),
)
_RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}
Summary = Mapping[str, Any]


def of_dataset(summary: Summary, dataset: str) -> list[tuple[str, str]]:
    """(title, SVG) of every chart that there are numbers for."""
    charts = (
        ("Speed-up against concurrency", _speedup),
        ("Latency of a request", _latency),
        ("Throughput against latency", _trade),
        ("Tokens per step", _histogram),
        ("Acceptance by position", _positions),
        ("Acceptance length by context length", _context),
    )
    made = ((title, draw(summary, dataset, f"{dataset}: {title}")) for title, draw in charts)
    return [(title, svg) for title, svg in made if svg is not None]


def of_advice(advice: Mapping[str, Any]) -> tuple[str, str]:
    """Predicted speed by K for each concurrency, relative to base, and what was checked."""
    with mpl.rc_context(_RC):
        figure, axes = _axes("K (drafted tokens)", "speed-up (predicted)")
        base = {row["concurrency"]: row["base"] for row in advice["levels"]}
        for i, (width, rates) in enumerate(advice["predictions"].items()):
            colour, marker, dash = _STYLES[i % len(_STYLES)]
            own = base[int(width)]
            ks = [int(k) for k in rates]
            axes.plot(ks, [rate / own for rate in rates.values()], dash, color=colour,
                      label=f"concurrency {width}")  # fmt: skip
            points = [row for row in advice["checks"] if row["concurrency"] == int(width)]
            axes.plot([row["k"] for row in points], [row["ratio"] for row in points], marker,
                      color=colour)  # fmt: skip
        _one(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        title = "Which K: predicted (lines) and checked (points)"
        return title, _svg(figure, title)


def _speedup(summary: Summary, dataset: str, title: str) -> str | None:
    levels = _closed(summary, dataset)
    arms = _names(levels, "speedup")
    if not arms:
        return None
    with mpl.rc_context(_RC):
        figure, axes = _axes("concurrency", "speed-up over no speculation")
        for arm in arms:
            points = [(c, row["speedup"][arm]) for c, row in levels if arm in row["speedup"]]
            middle = [p["median"] for _, p in points]
            spread = [
                [m - p["min"] for m, (_, p) in zip(middle, points, strict=True)],
                [p["max"] - m for m, (_, p) in zip(middle, points, strict=True)],
            ]
            colour, marker, dash = _style(summary, arm)
            axes.errorbar([c for c, _ in points], middle, yerr=spread, color=colour,
                          marker=marker, linestyle=dash, capsize=3, label=arm)  # fmt: skip
        _one(axes)
        _widths(axes, [c for c, _ in levels])
        axes.set_ylim(bottom=0)
        axes.legend()
        return _svg(figure, title)


def _latency(summary: Summary, dataset: str, title: str) -> str | None:
    levels = summary["datasets"][dataset]
    if not levels:
        return None
    level = next(iter(levels))
    with mpl.rc_context(_RC):
        figure, axes = _axes(f"seconds, at {words(level)}", "share of requests")
        drawn = False
        for arm, row in levels[level]["arms"].items():
            values = row["latencies"]
            colour, _, dash = _style(summary, arm)
            if values:
                shares = [n / len(values) for n in range(len(values) + 1)]
                axes.step([values[0], *values], shares, where="post", color=colour,
                          linestyle=dash, label=arm)  # fmt: skip
                drawn = True
        axes.set_ylim(0, 1.02)
        axes.set_xlim(left=0)
        axes.legend(loc="lower right")
        return _svg(figure, title) if drawn else None


def _trade(summary: Summary, dataset: str, title: str) -> str | None:
    levels = summary["datasets"][dataset]
    with mpl.rc_context(_RC):
        figure, axes = _axes("median inter-token latency, ms", "tokens per second")
        drawn = False
        for arm in _names(list(levels.items()), "arms"):
            rows = [(name, row["arms"][arm]) for name, row in levels.items() if arm in row["arms"]]
            rows = [(n, r) for n, r in rows if r["itl_ms"] and r["tokens_per_second"]]
            if not rows:
                continue
            drawn = True
            colour, marker, dash = _style(summary, arm)
            x, y = [r["itl_ms"]["p50"] for _, r in rows], [r["tokens_per_second"] for _, r in rows]
            axes.plot(x, y, color=colour, marker=marker, linestyle=dash, label=arm)
            for (name, _), at, up in zip(rows, x, y, strict=True):
                axes.annotate(name, (at, up), textcoords="offset points", xytext=(5, 4), fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.margins(x=0.12)
        axes.legend()
        return _svg(figure, title) if drawn else None


def _histogram(summary: Summary, dataset: str, title: str) -> str | None:
    arms = summary["acceptance"].get(dataset, {})
    if not arms:
        return None
    with mpl.rc_context(_RC):
        figure, axes = _axes("tokens that a step yields", "share of steps")
        width = 0.8 / len(arms)
        for i, (arm, row) in enumerate(arms.items()):
            shares = [count / row["drafts"] for count in row["histogram"]]
            at = [n + 1 + (i - (len(arms) - 1) / 2) * width for n in range(len(shares))]
            axes.bar(at, shares, width, color=_style(summary, arm)[0], label=arm,
                     hatch=("", "//", "..", "xx")[i % 4], edgecolor="white")  # fmt: skip
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", visible=False)
        axes.legend()
        return _svg(figure, title)


def _positions(summary: Summary, dataset: str, title: str) -> str | None:
    arms = summary["acceptance"].get(dataset, {})
    if not arms:
        return None
    with mpl.rc_context(_RC):
        figure, axes = _axes("drafted position", "share of steps that accept it")
        for arm, row in arms.items():
            colour, marker, dash = _style(summary, arm)
            shares = row["rate_per_position"]
            axes.plot(range(1, len(shares) + 1), shares, color=colour, marker=marker,
                      linestyle=dash, label=arm)  # fmt: skip
        axes.set_ylim(0, 1.05)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        return _svg(figure, title)


def _context(summary: Summary, dataset: str, title: str) -> str | None:
    arms = {
        arm: row["by_context"]
        for arm, row in summary["acceptance"].get(dataset, {}).items()
        if row["by_context"]
    }
    if not arms:
        return None
    with mpl.rc_context(_RC):
        figure, axes = _axes("context length, tokens", "tokens per step")
        for arm, rows in arms.items():
            colour, marker, dash = _style(summary, arm)
            axes.plot([f"{row['from']}–{row['to']}" for row in rows], [row["al"] for row in rows],
                      color=colour, marker=marker, linestyle=dash, label=arm)  # fmt: skip
        axes.set_ylim(bottom=1)
        axes.legend()
        return _svg(figure, title)


def _style(summary: Summary, arm: str) -> tuple[str, str, str]:
    """Colour, marker and dashes of an arm, the same in every chart."""
    names = summary["arms"]
    return _STYLES[(names.index(arm) if arm in names else len(names)) % len(_STYLES)]


def words(level: str) -> str:
    """A level for people."""
    found = Level.parse(level)
    if found.concurrency is not None:
        return f"concurrency {found.concurrency}"
    return f"{found.rate:g} requests/s"


def _closed(summary: Summary, dataset: str) -> list[tuple[int, Mapping[str, Any]]]:
    parsed = [(Level.parse(n), row) for n, row in summary["datasets"][dataset].items()]
    return [(level.concurrency, row) for level, row in parsed if level.concurrency is not None]


def _names(levels: Sequence[tuple[Any, Mapping[str, Any]]], field: str) -> list[str]:
    return list(dict.fromkeys(name for _, row in levels for name in row[field]))


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.4, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _one(axes: Any) -> None:
    axes.axhline(1, color="#555555", linewidth=1)


def _widths(axes: Any, values: Sequence[int]) -> None:
    if len(values) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page: no size of its own, and a name."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": title}):  # ids of one chart only, the same each time
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[\w.]+">', "<g>", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
