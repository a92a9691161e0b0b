"""The real demo target: its tokenizer and weights against answers stored beforehand.

The answers were generated greedily in bf16 by another engine. Each of their tokens is
compared with the likeliest one after the stored tokens before it: that is greedy decoding
without letting one rounding tie spoil the rest of its answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dflash_plugin import demo
from dflash_plugin.errors import DownloadError
from dflash_plugin.pair import preflight, require
from tests.shared import shared_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.engine

ANSWERS, LENGTH = 4, 20  # of each kind: how many, and how many tokens of each
AGREEING = 0.95  # measured: 789 of 800, Transformers 5.19 in float32
LARGEST_GAP = 0.25  # logits; measured 0.10 where the two disagree


def lines(name: str) -> list[dict[str, Any]]:
    text = shared_file(f"data/{name}").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def target() -> Path:
    try:
        return demo.demo_target(verify=True)
    except DownloadError as err:
        pytest.skip(f"the demo target is not in the cache and cannot be fetched: {err.message}")


@pytest.fixture(scope="module")
def tokenizer(target):
    return transformers.AutoTokenizer.from_pretrained(target)


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return lines("smollm2-answers.jsonl")


@pytest.fixture(scope="module")
def stored(answers) -> list[dict[str, Any]]:
    return [line for line in answers if line["k"] == "gsm"]


def test_pair_fits(target):
    require(preflight(target, demo.packaged_draft(verify=True)))


def test_chat_template_gives_every_stored_prompt(tokenizer, stored):
    prompts = {
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": line["question"]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        )
        for line in lines("gsm8k-train.jsonl")
    }
    unknown = [line["p"] for line in stored if tuple(line["p"]) not in prompts]
    assert len(stored) > 1000
    assert unknown == []


def test_stored_answers_survive_the_tokenizer(tokenizer, stored):
    for line in stored[:200]:
        text = tokenizer.decode(line["p"], skip_special_tokens=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == line["p"]
        answer = tokenizer.decode(line["g"], skip_special_tokens=False)
        again = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(again, skip_special_tokens=False) == answer


def test_stored_answers_are_the_models_greedy_ones(target, answers):
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in answers:
        kinds.setdefault(line["k"], []).append(line)
    agree, gaps = [], []
    for line in (line for kind in kinds.values() for line in kind[:ANSWERS]):
        tokens = torch.tensor(line["g"][:LENGTH])
        ids = torch.tensor([line["p"] + tokens.tolist()])
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=len(tokens) + 1).logits[0, :-1]
        stored_logits = logits.gather(1, tokens[:, None])[:, 0]
        gaps += (logits.max(1).values - stored_logits).tolist()
        agree += (logits.argmax(1) == tokens).tolist()
    assert len(kinds) == 5
    assert sum(agree) >= AGREEING * len(agree)
    assert max(gaps) <= LARGEST_GAP
