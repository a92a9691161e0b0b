"""The report: what it says, and how it looks and works in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from bench_server import plan, stub

from dflash_plugin import matrix
from dflash_plugin.bench import analysis, grid, published, report, run
from dflash_plugin.bench.records import Store
from dflash_plugin.bench.sides import ServerSide
from dflash_plugin.errors import UsageError

FACTS = {
    "engine": "vllm 0.32.0",
    "engine_args": ["--dtype", "<b>"],
    "hardware": "1x H200",
    "system": "Linux",
    "dflash_plugin": "0",
    "began": "2026-01-01",
    "not_run": {"suffix": "no arctic_inference"},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Settings and summary of a small run against stub servers."""
    what = plan(4, levels=("c1", "c2", "c4"), rounds=2)
    settings = what.settings(FACTS)
    folder = tmp_path_factory.mktemp("run")
    with (
        stub(tokens=9, delay=0.002) as base,
        stub(tokens=9, per_event=4, delay=0.002) as fast,
        Store(folder, settings) as store,
    ):
        sides = {
            name: ServerSide(url, "stub", timeout=20, stall=5)
            for name, url in (("base", base), ("dflash", fast))
        }
        run.measure(what, sides, store)
    return settings, analysis.summarise(settings, store.lines)


@pytest.fixture
def page(measured, tmp_path):
    """A written report."""
    (tmp_path / "advice.json").write_text(json.dumps(ADVICE))
    report.write(tmp_path, *measured)
    return tmp_path


ADVICE = {
    "levels": [
        {"concurrency": 1, "k": 4, "speedup": 1.5, "pays": True, "measured": 90.0,
         "predicted": 88.0, "base": 60.0},
        {"concurrency": 4, "k": 1, "speedup": 0.9, "pays": False, "measured": 110.0,
         "predicted": 112.0, "base": 120.0},
    ],
    "loses_from": 4,
    "predictions": {"1": {"1": 70.0, "4": 88.0}, "4": {"1": 112.0, "4": 80.0}},
    "checks": [{"concurrency": 1, "k": 4, "ratio": 1.5}],
}  # fmt: skip


class Links(HTMLParser):
    """Everything a page would load, its ids and what points at them."""

    def __init__(self):
        super().__init__()
        self.loads, self.ids, self.targets = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "iframe", "link", "source"):
            self.loads.append(values.get("src") or values.get("href") or "inline")
        if values.get("id"):
            self.ids.append(values["id"])
        if tag == "a":
            self.targets.append(values["href"].removeprefix("#"))
        if "popovertarget" in values:
            self.targets.append(values["popovertarget"])


def test_the_page_stands_alone_and_its_links_lead_somewhere(page):
    text = (page / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert links.loads == ["data:,"]
    assert "@import" not in text and "url(http" not in text
    assert set(links.targets) <= set(links.ids)
    own = [name for name in links.ids if not re.fullmatch(r"[mp][0-9a-f]{10}", name)]
    assert len(own) == len(set(own))
    assert "&lt;b&gt;" in text and "--dtype <b>" not in text


def test_every_chart_and_verdict_is_there(page):
    text = (page / "report.html").read_text()
    for title in (
        *("Speed-up against concurrency", "Latency of a request", "Throughput against latency"),
        *("Tokens per step", "Acceptance by position", "Acceptance length by context length"),
        "Which K",
    ):
        assert f'aria-label="{"set: " if title != "Which K" else ""}{title}' in text
    for words in ("loses from concurrency 4", "suffix: not run", "no arctic_inference"):
        assert words in text
    assert (page / "report.md").read_text().count("| concurrency") == 6
    summary = json.loads((page / "summary.json").read_text())
    assert summary["settings"]["engine"] == "vllm 0.32.0"


def test_the_same_run_gives_the_same_page(page, measured):
    before = (page / "report.html").read_text()
    report.write(page, *measured)
    assert (page / "report.html").read_text() == before


def test_a_run_without_anything_measured_is_reported_too(tmp_path):
    settings = plan().settings(FACTS)
    report.write(tmp_path, settings, analysis.summarise(settings, []))
    assert "0 of 0" in (tmp_path / "report.html").read_text()


def test_damaged_advice_is_named(tmp_path):
    (tmp_path / "advice.json").write_text("{}")
    with pytest.raises(UsageError, match=r"advice\.json"):
        report.write(tmp_path, plan().settings(FACTS), analysis.summarise({}, []))


# --- the matrix as a grid ----------------------------------------------------


def result(folder, cell_id, **values):
    engine, rest = cell_id.split("/", 1)
    path = folder / engine / (rest.replace("/", ".") + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"id": cell_id, "status": "passed", "reason": "", **values}))
    return path


def square(folder, cell_id):
    found = grid.build(matrix.load(), folder).squares
    return next(s for s in found if s.id == cell_id)


PLUGIN, STOCK = (f"vllm-0.32.0/{variant}/cpu/smollm2-135m" for variant in ("plugin", "stock"))
GOOD, BAD = {"status": "passed"}, {"status": "failed", "reason": "24 blocks differ"}


def test_every_cell_is_a_square_and_most_were_not_run(tmp_path):
    found = grid.build(matrix.load(), tmp_path)
    assert {s.id for s in found.squares} == {c.id for c in matrix.load().cells}
    assert {s.kind for s in found.squares} == {grid.NOT_RUN}
    assert all(s.lines for s in found.squares)


def test_a_failure_says_why_and_a_known_one_until_when(tmp_path):
    result(tmp_path, PLUGIN, status="failed", lossless=GOOD, faithful=BAD)
    result(tmp_path, STOCK, status="failed", lossless=GOOD, faithful=BAD)
    assert square(tmp_path, PLUGIN).kind == grid.FAILED
    assert "faithful: failed: 24 blocks differ" in square(tmp_path, PLUGIN).lines
    known = square(tmp_path, STOCK)
    assert known.kind == grid.KNOWN
    assert any("until" in line for line in known.lines)


def test_correct_is_a_pass_also_where_speed_was_not_measured(tmp_path):
    result(tmp_path, PLUGIN, status="not_run", lossless=GOOD, faithful=GOOD)
    assert square(tmp_path, PLUGIN).kind == grid.PASSED


def test_a_damaged_result_is_named(tmp_path):
    result(tmp_path, PLUGIN).write_text("[]")
    with pytest.raises(UsageError, match=r"smollm2-135m\.json"):
        grid.build(matrix.load(), tmp_path)


# --- published numbers -------------------------------------------------------

ROW = matrix.Published(
    target="stub", draft="d", revision="", engine="vllm", hardware="1x NVIDIA H200",
    template="chat, thinking off", temperature=0.0, num_speculative_tokens=15, max_tokens=8,
    concurrency=2, al={"set": 4.0}, speedup={"set": 3.0, "other": 1.0}, source="s", grade="paper",
)  # fmt: skip


def comparable(settings):
    same = {**settings, "model": "stub", "draft": "d"}
    same["arms"] = [{"name": "dflash", "num_speculative_tokens": 15}]
    same["datasets"] = [{"name": "set", "source": "org/set@abc"}]
    return same


def test_the_same_settings_are_compared(measured):
    settings, summary = measured
    found = published.compare(comparable(settings), summary, [ROW])
    assert [(c.metric, c.published, c.differ) for c in found] == [
        ("AL", 4.0, ()), ("speed-up", 3.0, ()),
    ]  # fmt: skip
    assert found[0].measured == 4.0
    assert found[1].measured is not None


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("hardware", "CPU", "hardware: CPU (published: 1x NVIDIA H200)"),
        ("template", "raw", "template"),
        ("engine", "sglang 1", "engine"),
        ("draft", "another", "draft"),
        ("arms", [{"name": "dflash", "num_speculative_tokens": 7}], "K: 7 (published: 15)"),
        ("datasets", [{"name": "set", "source": "mine.jsonl"}], "mine.jsonl"),
    ],
)
def test_what_differs_is_said(measured, key, value, word):
    settings, summary = measured
    found = published.compare({**comparable(settings), key: value}, summary, [ROW])
    assert any(word in text for text in found[0].differ)


def test_another_pair_has_nothing_published(measured):
    assert published.compare({**measured[0], "model": "x"}, measured[1], [ROW]) == []


def test_the_matrix_states_the_settings_of_every_published_number():
    rows = matrix.load().published
    assert len(rows) > 50
    for row in rows:
        assert row.source and row.grade and row.template and row.hardware
        assert all(1 <= value < 20 for value in (*row.al.values(), *row.speedup.values()))
        assert all(value <= row.num_speculative_tokens + 1 for value in row.al.values())


# --- in a browser ------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, or the reason why there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine (apt install chromium)")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser, page, width):
    tab = browser.new_page(viewport={"width": width, "height": 850})
    wrong = []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: wrong.append(r.url) if r.url.startswith("http") else None)
    tab.goto((page / "report.html").as_uri())
    shown = tab.screenshot(full_page=True)
    assert len(shown) > 50_000  # charts are drawn
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for chart in tab.locator("figure svg").all():
        box = chart.bounding_box()
        assert box["width"] > 250 and box["height"] > 150
    # By keyboard: to a square, its reason, and back.
    square = tab.locator("button.square").first
    square.focus()
    tab.keyboard.press("Enter")
    reason = tab.locator("[popover]:popover-open")
    assert reason.count() == 1
    assert reason.locator("li").first.inner_text()
    tab.keyboard.press("Escape")
    assert reason.count() == 0
    assert wrong == []
    tab.close()
