"""Prompts from Python's library and from the target itself."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from http_stub import Stub, server_fixture  # noqa: F401
from recipe_helpers import make_config, save_target

from dflash_plugin.errors import RequestError, TrainingError, UsageError
from dflash_plugin.training.recipe import (
    checks,
    library,
    models,
    selfmade,
    sources,
)
from dflash_plugin.training.recipe.config import Source

pytestmark = pytest.mark.torch

TEMPLATE = (
    "{% for m in messages %}w40 {{ m['content'] }} w41 {% endfor %}"
    "{% if add_generation_prompt %}w42{% endif %}"
)
CODE = '''
def kept(first, *, second=2):
    """Add the second one to the first one, and return it.

    Nothing else is done.
    """
    return first + second


def short(x):
    """Too short."""


class Thing:
    def method(self, value: int = 3) -> int:
        """Multiply the value by three and give it back."""

    def __hidden__(self):
        """Special methods say little about what they do."""

    def odd(self=None):
        """The one default belongs to the argument that is taken away."""
'''


def code_folder(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    (root / "a.py").write_text(CODE)
    (root / "broken.py").write_text("def (")
    (root / "binary.py").write_bytes(b"\xff\xfe\x00")
    (root / "test" / "b.py").write_text(CODE.replace("kept", "not_this_one"))
    return root


def test_stubs_are_signatures_with_their_docstrings(tmp_path):
    found = list(library.stubs(code_folder(tmp_path)))
    assert found == [
        'def kept(first, *, second=2):\n    """Add the second one to the first one, and return '
        'it.\n    \n    Nothing else is done.\n    """',
        'def method(value: int=3):\n    """Multiply the value by three and give it back.\n    """',
    ]
    for stub in found:
        ast.parse(stub)


def test_code_prompts_are_the_same_for_the_same_seed(tmp_path):
    made = list(library.prompts(500, seed=1))
    assert len(set(made)) == 500
    assert made == list(library.prompts(500, seed=1))
    assert made != list(library.prompts(500, seed=2))
    with pytest.raises(UsageError, match="has 2 functions with a docstring, asked for 3"):
        next(library.prompts(3, 0, code_folder(tmp_path)))


def test_code_prompts_in_a_run(tmp_path):
    told = make_config(tmp_path, save_target(tmp_path / "target"))
    told = replace(told, prompts=replace(told.prompts, source=(Source("python", "code", 20),)))
    found, counts = sources.collect(told)
    assert counts["code"] == 20 - counts["excluded"] == len(found)
    assert {one.kind for one in found} == {"code"}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    folder = save_target(tmp_path_factory.mktemp("target") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def asked_of(tmp_path, target, server, count=6):
    told = make_config(tmp_path, target)
    settings = replace(told.regenerate, how="server", url=server.url, model="m", batch=1)
    source = replace(told.prompts, source=(Source("target", "chat", count),))
    return replace(told, regenerate=settings, prompts=source)


def completion(text: str, reason: str = "stop") -> bytes:
    choice = {"text": text, "token_ids": [1], "finish_reason": reason}
    return json.dumps({"choices": [choice]}).encode()


def answering(server: Stub, monkeypatch, texts):
    """The stub's server says these one after the other."""
    calls = iter(texts)

    def answer(self, ids, max_tokens, *, temperature=0.0):
        asked.append((tuple(ids), max_tokens, temperature))
        text, reason = next(calls)
        if reason == "broken":
            raise RequestError("broken", hint="")
        return text, None, reason

    asked: list = []
    monkeypatch.setattr(selfmade.ServerClient, "answer", answer)
    return asked


def sentence(number: int) -> str:
    return f"w5 w6 w7 w{10 + number}"


def test_the_target_makes_up_prompts(tmp_path, target, server: Stub):
    server.parts = [completion(sentence(0))]
    found, counts = sources.collect(asked_of(tmp_path, target, server, count=1))
    assert [one.messages for one in found] == [({"role": "user", "content": sentence(0)},)]
    assert counts["chat"] == 1
    body = server.asked[-1][1]
    assert body is not None and body["prompt"] == [40] and body["temperature"] > 0.5


def test_what_is_no_prompt_is_left_out(tmp_path, target, server, monkeypatch):
    good = [(sentence(i), "stop") for i in range(6)]
    bad = [(sentence(9), "length"), ("w5 w6", "stop"), (f"  {sentence(1)}\n", "stop"), ("", "stop")]
    asked = answering(server, monkeypatch, [*good[:3], *bad, *good[3:]])
    told = asked_of(tmp_path, target, server)
    found = list(selfmade.prompts(told, 6))
    assert sorted(found) == sorted(text for text, _ in good)
    assert len(asked) == 10 and {ids for ids, _, _ in asked} == {(40,)}


def test_an_interrupted_stage_goes_on(tmp_path, target, server, monkeypatch):
    told = asked_of(tmp_path, target, server)
    answering(server, monkeypatch, [(sentence(0), "stop"), (sentence(1), "stop"), ("", "broken")])
    with pytest.raises(RequestError):
        list(selfmade.prompts(told, 6))
    path = told.out / selfmade.FILE
    path.write_text(path.read_text() + '{"half')
    asked = answering(server, monkeypatch, [(sentence(i), "stop") for i in range(2, 6)])
    first = list(selfmade.prompts(told, 6))
    assert len(asked) == 4 and sorted(first) == [sentence(i) for i in range(6)]
    assert list(selfmade.prompts(told, 6)) == first and len(asked) == 4
    assert list(selfmade.prompts(told, 2)) == first[:2]


def test_a_target_with_little_to_ask(tmp_path, target, server: Stub):
    server.parts = [completion(sentence(0))]
    with pytest.raises(TrainingError, match=r"1 different messages .* after 12 requests"):
        list(selfmade.prompts(asked_of(tmp_path, target, server), 3))


@pytest.mark.parametrize("written", ["", "no message in it", "MESSAGE-OF-THE-USER and no more"])
def test_a_target_without_a_usable_chat_template(written):
    class Tokenizer:
        chat_template = written

        def apply_chat_template(self, messages, tokenize):
            return written

    with pytest.raises(TrainingError, match="no chat template"):
        selfmade.opening(Tokenizer())


def test_it_needs_a_server(tmp_path, target, server):
    told = asked_of(tmp_path, target, server)
    assert not list(checks.problems(told))
    told = replace(told, regenerate=replace(told.regenerate, how="transformers"))
    assert [table for table, text in checks.problems(told) if "server" in text] == ["prompts"]


def test_the_opening_is_what_stands_before_the_message(target):
    from dflash_plugin.training.recipe.config import Target

    assert selfmade.opening(models.tokenizer(Target(str(target)))) == [40]
