"""The target's own answers: as the target gives them, resumable, of its own tokenizer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from ci_fake import wait_for  # noqa: E402
from http_stub import Stub, server_fixture  # noqa: E402, F401
from local_replicas import VOCAB  # noqa: E402
from recipe_helpers import make_config, save_target  # noqa: E402

from dflash_plugin.errors import (  # noqa: E402
    CacheError,
    PairMismatchError,
    RequestError,
    TrainingError,
)
from dflash_plugin.training.recipe import answers, models, regenerate, sources  # noqa: E402
from dflash_plugin.training.recipe.answers import Answer, AnswerFile  # noqa: E402
from dflash_plugin.training.recipe.clock import Clock  # noqa: E402

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target") / "model")


def run(told, clock: Clock | None = None) -> list[Answer]:
    path = told.out / "answers.jsonl"
    asked, _ = sources.collect(told)
    regenerate.regenerate(told, asked, path, clock or Clock(), CPU)
    return list(answers.read(path))


def with_server(tmp_path, target, server, **changes):
    from dataclasses import replace

    told = make_config(tmp_path, target)
    settings = replace(told.regenerate, how="server", url=server.url, model="m", batch=2, **changes)
    return replace(told, regenerate=settings)


def completion(text: str, ids: list[int] | None, reason: str = "stop") -> bytes:
    choice = {"text": text, "token_ids": ids, "finish_reason": reason}
    return json.dumps({"choices": [choice]}).encode()


def test_answers_are_the_targets_greedy_texts(tmp_path, target):
    told = make_config(tmp_path, target)
    found = run(told)
    assert len(found) == len({row.id for row in found}) == 24
    model = models.load_target(told, (0,), CPU).model
    row = max(found, key=lambda one: len(one.answer))
    alone = model.generate(
        torch.tensor([row.prompt]), max_new_tokens=14, do_sample=False, pad_token_id=0
    )[0, len(row.prompt) :]
    assert row.answer == tuple(alone.tolist()[: len(row.answer)])
    assert all(len(one.answer) == 14 or one.answer[-1] == 2 for one in found)


def test_a_killed_run_goes_on_where_it_was(tmp_path, target, monkeypatch):
    told = make_config(tmp_path, target)
    whole = run(told)
    path = told.out / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:9]) + lines[9][:20])
    made = []
    add = AnswerFile.add

    def counted(self, rows):
        made.extend(rows)
        add(self, rows)

    monkeypatch.setattr(AnswerFile, "add", counted)
    again = run(told)
    assert len(made) == 15
    assert sorted(row.id for row in again) == sorted(row.id for row in whole)
    assert {row.id: row.answer for row in again} == {row.id: row.answer for row in whole}


def test_the_time_given_is_kept(tmp_path, target):
    told = make_config(tmp_path, target)
    with pytest.raises(TrainingError, match="no answer in the time given"):
        run(told, Clock(allowed=0.0))
    clock = Clock(allowed=3600.0)
    clock.over = iter([False, True]).__next__
    assert len(run(told, clock)) == 4  # one batch


def test_a_full_disk_keeps_whole_lines(tmp_path):
    row = Answer("a", "k", (1,), (2, 3, 4))
    with AnswerFile(tmp_path / "answers.jsonl") as file:
        file.add([row])
    # The device that is always full can be written to, but reading it never ends.
    full = AnswerFile(tmp_path / "none.jsonl")
    full.path = Path("/dev/full")
    with full, pytest.raises(CacheError, match="No space left"):
        full.add([row])
    with AnswerFile(tmp_path / "answers.jsonl") as file:
        file.add([row])
    assert list(answers.read(tmp_path / "answers.jsonl")) == [row]


@pytest.mark.parametrize(
    "line",
    ['{"prompt": [1]}', '{"prompt": [1], "answer": ["x"]}', '{"prompt": [-1], "answer": []}'],
)
def test_a_line_that_is_no_answer(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TrainingError, match=r"a\.jsonl:1: (answer|prompt) is"):
        list(answers.read(path))


def test_earlier_answers_are_reused_but_no_test_prompts(tmp_path, target):
    from dataclasses import replace

    words = [f"w{i}" for i in range(20, 34)]
    ids = list(range(20, 34))
    reused = tmp_path / "old.jsonl"
    rows = [{"kind": "old", "prompt": ids, "answer": [4, 5, 6]}]
    rows += [{"kind": "old", "prompt": [9, 9], "answer": [4, 5, 6]}]
    reused.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tests = tmp_path / "tests.jsonl"
    tests.write_text(json.dumps({"q": " ".join(words)}) + "\n")
    told = make_config(tmp_path, target)
    told = replace(
        told,
        regenerate=replace(told.regenerate, reuse=(str(reused),)),
        prompts=replace(told.prompts, source=(), exclude=(str(tests),)),
    )
    path = told.out / "answers.jsonl"
    facts = regenerate.regenerate(told, [], path, Clock(), CPU)
    assert facts["reused_but_excluded"] == 1
    assert [row.prompt for row in answers.read(path)] == [(9, 9)]


def test_token_ids_beyond_the_head(tmp_path, target):
    from dataclasses import replace

    reused = tmp_path / "old.jsonl"
    reused.write_text(json.dumps({"prompt": [1, VOCAB], "answer": [4, 5, 6]}) + "\n")
    told = make_config(tmp_path, target)
    told = replace(told, regenerate=replace(told.regenerate, reuse=(str(reused),)))
    with pytest.raises(TrainingError, match=f"token id {VOCAB}.*head has {VOCAB} rows"):
        run(told)


def test_a_server_that_tells_token_ids(tmp_path, target, server: Stub):
    server.parts = [completion("w5 w6 w7", [5, 6, 7, 2])]
    found = run(with_server(tmp_path, target, server))
    assert len(found) == 24
    assert {row.answer for row in found} == {(5, 6, 7, 2)}
    asked = server.asked[-1][1]
    assert asked is not None and asked["temperature"] == 0.0 and asked["max_tokens"] == 14


def test_a_server_that_tells_text_alone(tmp_path, target, server: Stub):
    server.parts = [completion("w5 w6 w7", None)]
    assert {row.answer for row in run(with_server(tmp_path, target, server))} == {(5, 6, 7, 2)}


def test_an_answer_that_breaks_off_within_a_character(tmp_path, target, server: Stub, monkeypatch):
    told = with_server(tmp_path, target, server)
    words = models.tokenizer(told.target)
    monkeypatch.setattr(models, "tokenizer", lambda _: words)
    monkeypatch.setattr(type(words), "decode", lambda *_, **__: "w5 w6 \ufffd")
    server.parts = [completion("w5 w6 ", [5, 6, 7])]
    assert {row.answer for row in run(told)} == {(5, 6, 7)}


def test_a_server_of_another_model(tmp_path, target, server: Stub):
    server.parts = [completion("hello there", [5, 6, 7])]
    with pytest.raises(PairMismatchError, match="another model"):
        run(with_server(tmp_path, target, server))
    server.parts = [completion("w5", [VOCAB + 5])]
    with pytest.raises((PairMismatchError, TrainingError)):
        run(with_server(tmp_path, target, server))


def test_a_server_that_fails_later_keeps_what_it_said(tmp_path, target, server: Stub):
    told = with_server(tmp_path, target, server)
    server.parts = [completion("w5 w6 w7", [5, 6, 7])]
    asked, _ = sources.collect(told)
    clock = Clock()
    told_so_far = []

    def over() -> bool:
        told_so_far.append(len(server.asked))
        if len(told_so_far) == 5:  # eight are asked, beside the first
            wait_for(lambda: len(server.asked) == 9, "the eighth request")
            time.sleep(0.2)
            server.status = 500
        return False

    clock.over = over
    with pytest.raises(RequestError, match="500"):
        regenerate.regenerate(told, asked, told.out / "answers.jsonl", clock, CPU)
    assert len(list(answers.read(told.out / "answers.jsonl"))) == 8
