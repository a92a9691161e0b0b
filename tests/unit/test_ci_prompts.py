"""Prompt files: the forms that are read, and what is said of the others."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ci import prompts
from ci.prompts import Prompt
from dflash_plugin.errors import UsageError


def _file(path: Path, *rows: object) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_packaged_prompts() -> None:
    loaded = prompts.load()
    assert len({prompt.id for prompt in loaded}) == len(loaded) >= 24
    assert all(count >= 4 for count in Counter(p.kind for p in loaded).values())


def test_plain_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "id": "x", "kind": "k"}, "", {"prompt": "b"}]
    assert prompts.load([_file(tmp_path / "set.v1.jsonl", *rows)]) == [
        Prompt("x", "k", "a"),
        Prompt("set-3", "set", "b"),  # named by file and line
    ]


def test_gsm8k_and_humaneval_rows(tmp_path: Path) -> None:
    gsm8k = _file(tmp_path / "gsm8k.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": ""}
    human = _file(tmp_path / "humaneval.jsonl", row)
    first, second = prompts.load([gsm8k, human])
    assert first == Prompt("gsm8k-1", "gsm8k", "1 + 1?")
    assert (second.id, second.kind) == ("HumanEval/0", "humaneval")
    assert second.text == "Complete this Python function.\n\n```python\ndef f():\n```"


def test_line_separators_inside_a_string(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    assert prompts.load([_file(tmp_path / "a.jsonl", {"prompt": text})])[0].text == text


def test_count(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2"}, "broken")
    assert [p.text for p in prompts.load([f"{name}:2"])] == ["1", "2"]
    with pytest.raises(UsageError, match=r"a\.jsonl:3: expected an object"):
        prompts.load([f"{name}:3"])
    short = _file(tmp_path / "b.jsonl", {"prompt": "1"})
    with pytest.raises(UsageError, match="1 prompts, expected 2"):
        prompts.load([f"{short}:2"])
    with pytest.raises(UsageError, match="0 prompts"):
        prompts.load([f"{short}:0"])


@pytest.mark.parametrize(
    "row", ["{", "[]", '"prompt"', "1", "{}", '{"prompt": 1}', '{"prompt": " "}', '{"text": "a"}']
)
def test_malformed_lines_are_named(tmp_path: Path, row: str) -> None:
    name = _file(tmp_path / "a.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(UsageError, match=rf"^{name}:2: expected an object"):
        prompts.load([name])


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (
        ("absent.jsonl", "No such file"),
        ("latin.jsonl", "can't decode byte"),
        ("empty.jsonl", "0 prompts"),
        ("", "Is a directory"),
    ):
        with pytest.raises(UsageError, match=message):
            prompts.load([str(tmp_path / name)])


def test_double_ids(tmp_path: Path) -> None:
    one, two = (_file(tmp_path / name, {"prompt": "a", "id": "x"}) for name in ("a", "b"))
    with pytest.raises(UsageError, match="'x' occurs twice"):
        prompts.load([one, two])


def test_digest_changes_with_text_id_and_order() -> None:
    a, b = Prompt("a", "k", "1"), Prompt("b", "k", "2")
    sets = ([a, b], [b, a], [a], [a, Prompt("b", "k", "3")], [a, Prompt("c", "k", "2")])
    assert len({prompts.digest(rows) for rows in sets}) == len(sets)
    assert prompts.digest([a]) == prompts.digest([Prompt("a", "other kind", "1")])


@pytest.mark.parametrize(("count", "shares"), [(3, (2, 1)), (6, (4, 2)), (9, (6, 3)), (99, (8, 4))])
def test_spread_keeps_the_shares(count: int, shares: tuple[int, int]) -> None:
    rows = [Prompt(f"m{i}", "maths", "") for i in range(8)]
    rows += [Prompt(f"c{i}", "chat", "") for i in range(4)]
    chosen = prompts.spread(rows, count)
    kinds = Counter(p.kind for p in chosen)
    assert (kinds["maths"], kinds["chat"]) == shares
    assert chosen == prompts.spread(rows, count)
    assert chosen == prompts.spread(rows, 99)[:count]  # a longer run contains the shorter one
