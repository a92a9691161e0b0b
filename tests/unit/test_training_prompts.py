"""Prompts: distinct, deterministic, from several sources, and never a test prompt."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from hypothesis import given
from hypothesis import strategies as st
from test_training_config import MINIMAL, read

from dflash_plugin.errors import TrainingError, UsageError
from dflash_plugin.training.recipe import prompts, sources, templates, vary
from dflash_plugin.training.recipe.config import Source
from dflash_plugin.training.recipe.prompts import Exclusions, Prompt, windows

OURS = Path(__file__).parents[2] / "ci" / "data" / "prompts.jsonl"
TEST_PROMPT = (
    "A bakery makes 48 rolls each morning. It sells 29 of them before noon and gives 5 to a "
    "shelter. How many rolls are left for the afternoon?"
)


def user(text: str) -> list[prompts.Message]:
    return [{"role": "user", "content": text}]


def with_sources(tmp_path, *sources, **changes):
    told = read(tmp_path, MINIMAL)
    return replace(told, prompts=replace(told.prompts, source=sources, **changes))


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", templates.names())
def test_templates_give_thousands_of_different_prompts(name):
    made = list(templates.prompts(name, 2500, seed=3))
    assert len(set(made)) == 2500
    assert made[:50] == list(templates.prompts(name, 50, seed=3))
    assert made[:50] != list(templates.prompts(name, 50, seed=4))
    assert not [text for text in made if "{" in text.replace("{'a'", "")]


def test_no_template_makes_a_test_prompt():
    exclusions = Exclusions.load([])
    made = [text for name in templates.names() for text in templates.prompts(name, 1000, seed=5)]
    assert not [text for text in made if exclusions.hit(text)]


def test_draws_from_one_list_differ():
    import random

    lists = {"x": ["one", "two"]}
    for seed in range(20):
        text = templates.fill("{x} {x#2} {x} {n:3-3}", lists, random.Random(seed))
        assert text in ("One two one 3", "Two one two 3")


def test_unknown_and_exhausted_templates():
    with pytest.raises(UsageError, match="no templates are named 'mathz'"):
        next(templates.prompts("mathz", 1, 0))


def test_this_projects_own_prompts_are_on_the_packaged_list():
    exclusions = Exclusions.load([])
    texts = [json.loads(line)["prompt"] for line in OURS.read_text().splitlines()]
    assert all(exclusions.hit(text) for text in texts)
    assert exclusions.hit(f"Question: {TEST_PROMPT} Explain your reasoning.")
    assert exclusions.hit(TEST_PROMPT.upper().replace(" ", "\n"))
    assert not exclusions.hit("How many rolls does a bakery make?")


@given(st.lists(st.sampled_from("abcdefgh"), min_size=13, max_size=40), st.integers(1, 6))
def test_a_text_that_contains_an_excluded_one_is_found(words, step):
    exclusions = Exclusions(windows(" ".join(words), step))
    assert exclusions.hit("x y " + " ".join(words) + " z")


def test_excluded_by_file_and_by_hash(tmp_path):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    tests = jsonl(tmp_path / "test.jsonl", {"nested": [{"q": text}], "n": 1})
    hashes = tmp_path / "list.sha256"
    hashes.write_text("# comment\n" + "\n".join(windows(text)) + "\n")
    data = jsonl(tmp_path / "data.jsonl", {"prompt": text}, {"prompt": "mine"}, {"prompt": "mine"})
    source = Source("jsonl", "data", path=str(data))
    for excluded in (tests, hashes):
        told = with_sources(tmp_path, source, exclude=(str(excluded),))
        found, counts = sources.collect(told)
        assert [prompt.text for prompt in found] == ["mine"]
        assert counts == {"duplicates": 1, "excluded": 1, "data": 1}
    jsonl(data, {"prompt": text})
    with pytest.raises(TrainingError, match="no prompt is left"):
        sources.collect(with_sources(tmp_path, source, exclude=(str(tests),)))


def test_conversations_end_with_the_user(tmp_path):
    turns = [*user("hi"), {"role": "assistant", "content": "hello"}, *user("and now?")]
    path = jsonl(
        tmp_path / "data.jsonl", {"m": [*turns, {"role": "assistant", "content": "no"}]}, {"m": "x"}
    )
    source = Source("jsonl", "data", path=str(path), prompt="m")
    assert list(sources.read_source(source, read(tmp_path, MINIMAL))) == [turns, user("x")]
    assert list(sources.read_source(replace(source, count=1), read(tmp_path, MINIMAL))) == [turns]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x"}', "field 'prompt' is 'None'"),
        ('{"prompt": ""}', "expected a text or a list of messages"),
        ('{"prompt": [{"role": "system", "content": "x"}]}', "expected a text"),
        ('{"prompt": [1]}', "expected a text"),
        ("[1]", "data.jsonl:1: not a JSON object"),
        ("{", "data.jsonl:1: not a JSON object"),
    ],
)
def test_bad_records_are_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=message):
        list(sources.read_source(Source("jsonl", "d", path=str(path)), read(tmp_path, MINIMAL)))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.jsonl: cannot be read"):
        list(
            sources.read_source(
                Source("jsonl", "d", path=str(tmp_path / "gone.jsonl")), read(tmp_path, MINIMAL)
            )
        )
    with pytest.raises(UsageError, match=r"gone\.sha256"):
        Exclusions.load([str(tmp_path / "gone.sha256")])


def test_what_is_written_is_read_back(tmp_path):
    found, _ = sources.collect(with_sources(tmp_path, Source("templates", "chat", 30)))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(prompt.to_json() + "\n" for prompt in found))
    assert prompts.read(path) == found
    assert found != sorted(found, key=lambda prompt: prompt.id)
    assert Prompt.of("other", found[0].messages).id == found[0].id


def test_variations_have_other_numbers_and_names_and_are_held_out_together(tmp_path):
    text = "Mary has 12 eggs and 3 hens; Mary sells 12 eggs. The year is 2021."
    path = jsonl(tmp_path / "data.jsonl", {"prompt": text}, {"prompt": "Nothing to vary, Mary?"})
    source = Source("jsonl", "data", path=str(path), vary=4)
    told = with_sources(tmp_path, source)
    found, counts = sources.collect(told)
    assert counts["data"] == len(found) == 6
    texts = {prompt.text: prompt.id for prompt in found}
    assert len(set(texts.values())) == 6
    for made in set(texts) - {text, "Nothing to vary, Mary?"}:
        parts = re.fullmatch(
            r"(\w+) has (\d\d) eggs and (\d) hens; (\w+) sells (\d\d) eggs\. "
            r"The year is (\d{4})\.",
            made,
        )
        assert parts is not None, made
        assert parts[1] == parts[4] != "Mary"
        assert parts[2] == parts[5]
        assert texts[made][:8] == texts[text][:8]
    assert [p.text for p in sources.collect(told)[0]] == [p.text for p in found]


def test_names_in_a_text_stay_different():
    for seed in range(30):
        (made,) = vary.variations("Ann and Bob and Tom have 5 hats.", 1, str(seed))
        assert len(set(re.findall(r"[A-Z]\w+", made))) == 3


def test_compressed_records_and_damaged_ones(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "one"}\n{"prompt": "two"}\n'))
    assert [record["prompt"] for _, record in prompts.records(path)] == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UsageError, match=r"data\.jsonl\.gz: cannot be read"):
        list(prompts.records(path))
    path.write_text('{"prompt": "one"}\n')
    with pytest.raises(UsageError, match=r"data\.jsonl\.gz: cannot be read"):
        list(prompts.records(path))
