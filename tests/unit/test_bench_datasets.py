"""Data sets: the hub (a stand-in), the cache and its checksum, files, our own prompts."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from dflash_plugin.bench import datasets
from dflash_plugin.errors import DownloadError, MissingDependencyError, UsageError

ROWS = {
    "openai/gsm8k": [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?"}],
    "HuggingFaceH4/MATH-500": [{"problem": "x?", "unique_id": "test/1.json"}],
    "openai/openai_humaneval": [{"prompt": "def f():\n", "task_id": "HumanEval/0"}],
    "google-research-datasets/mbpp": [{"prompt": "Write f.", "task_id": 7}],
    "HuggingFaceH4/mt_bench_prompts": [{"prompt": ["one", "two"], "prompt_id": 81}],
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stand-ins for both libraries that note what they are asked for."""
    stub = SimpleNamespace(calls=[], fails=None)

    def load_dataset(repo, config, *, split, revision):
        stub.calls.append((repo, config, split, revision))
        if stub.fails:
            raise stub.fails
        return ROWS[repo]

    libraries = {
        "datasets": {"load_dataset": load_dataset},
        "huggingface_hub": {
            "HfApi": lambda: SimpleNamespace(dataset_info=lambda repo: SimpleNamespace(sha="abc"))
        },
    }
    for name, values in libraries.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    return stub


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("gsm8k", datasets.Item("gsm8k-1", "gsm8k", ("1 + 1?",))),
        ("math500", datasets.Item("test/1.json", "math500", ("x?",))),
        ("mbpp", datasets.Item("7", "mbpp", ("Write f.",))),
        ("mt-bench", datasets.Item("81", "mt-bench", ("one", "two"))),
    ],
)
def test_a_public_data_set_is_downloaded_once_at_a_revision(hub, name, item):
    first = datasets.load(name)
    again = datasets.load(name)
    assert first == again
    assert first.items[0] == item
    assert first.source.endswith("@abc")
    assert len(hub.calls) == 1
    assert hub.calls[0][3] == "abc"


def test_humaneval_asks_to_complete_the_function(hub):
    (turn,) = datasets.load("humaneval").items[0].turns
    assert "```python\ndef f():\n```" in turn


def test_a_damaged_cache_is_not_used(hub, tmp_path):
    datasets.load("gsm8k")
    path = tmp_path / "cache" / "datasets" / "gsm8k.jsonl"
    path.write_text(path.read_text().replace("1 + 1", "1 + 3"))
    with pytest.raises(DownloadError, match="sha256"):
        datasets.load("gsm8k")


def test_an_unreachable_hub_names_the_way_out(hub):
    hub.fails = ConnectionError("no route")
    with pytest.raises(DownloadError, match="no route") as caught:
        datasets.load("gsm8k")
    assert "packaged/gsm8k" in caught.value.hint


def test_without_the_library(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="datasets"):
        datasets.load("mbpp")


def test_our_own_prompts_cover_every_kind():
    everything = datasets.load("packaged")
    assert {item.kind for item in everything.items} == set(datasets.PUBLISHED)
    for name in datasets.PUBLISHED:
        own = datasets.load(f"packaged/{name}").items
        assert len(own) >= 4
        assert all(len(item.turns) == (2 if name == "mt-bench" else 1) for item in own)


def test_a_file_under_its_own_name_or_another(tmp_path):
    path = tmp_path / "mine.test.jsonl"
    path.write_text('{"question": "a?"}\n\n{"prompt": "b", "id": 0}\n{"turns": ["c", "d"]}\n')
    mine = datasets.load(str(path))
    assert mine.name == "mine"
    assert [(i.id, i.kind, i.turns) for i in mine.items] == [
        ("mine-1", "mine", ("a?",)),
        ("0", "mine", ("b",)),
        ("mine-4", "mine", ("c", "d")),
    ]
    assert datasets.load(f"gsm8k={path}").name == "gsm8k"
    assert datasets.load(str(path), 2).digest != mine.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts"),
        ("not json\n", ":1:"),
        ('{"a": 1}\n', "question"),
        ('{"prompt": " "}\n', "no text"),
        ('{"turns": []}\n', "no turns"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "twice"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        datasets.load(str(path))


@pytest.mark.parametrize("spec", ["gsm9k", "a=b.jsonl", "packaged/nothing"])
def test_unknown_names(spec):
    with pytest.raises(UsageError):
        datasets.load(spec)


def test_more_prompts_than_there_are():
    with pytest.raises(UsageError, match="1000 asked for"):
        datasets.load("packaged", 1000)


def test_the_cache_is_plain_jsonl(hub, tmp_path):
    datasets.load("mt-bench")
    line = (tmp_path / "cache" / "datasets" / "mt-bench.jsonl").read_text().splitlines()[0]
    assert json.loads(line) == {"id": "81", "kind": "mt-bench", "turns": ["one", "two"]}
