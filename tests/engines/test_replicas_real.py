"""The tiny pairs themselves: built, good drafts, and worse in every way an engine can be wrong."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ci import prompts, replica_specs, replicas  # noqa: E402
from ci.replica_builder import tokenizer  # noqa: E402
from ci.replica_builder.prompts import LONG  # noqa: E402
from dflash_plugin import matrix  # noqa: E402
from dflash_plugin.acceptance import total  # noqa: E402
from dflash_plugin.checkpoint import read_tensors  # noqa: E402
from dflash_plugin.pair import DraftConfig, preflight  # noqa: E402
from dflash_plugin.reference.loop import generate, generate_plain  # noqa: E402
from dflash_plugin.reference.model import DraftModel  # noqa: E402
from dflash_plugin.reference.replay import replay  # noqa: E402
from dflash_plugin.reference.target import HFTarget  # noqa: E402

NEW_TOKENS = 48
_ALL = list(replica_specs.load().pairs)
# Those that cells are run with on every change; the others take minutes each to build, the
# hybrids most, and are asked for with DFLASH_TEST_REPLICAS=all or by name.
_ASKED = os.environ.get("DFLASH_TEST_REPLICAS", "")
NAMES = (
    _ALL
    if _ASKED == "all"
    else _ASKED.split()
    or ["tiny-qwen3", "tiny-qwen3-swa", "tiny-qwen3-mixed", "tiny-llama", "tiny-gemma4"]
)
WINDOWED = [n for n in NAMES if "sliding_window" in replica_specs.load().pair(n).draft]
SCALED = [n for n in NAMES if "input_embedding_scale" in replica_specs.load().pair(n).draft]


@dataclass
class Loaded:
    """A pair in memory, and the target's own answers to the long prompts."""

    replica: replicas.Replica
    target: HFTarget
    raw: dict[str, Any]
    weights: dict[str, Any]
    texts: list[tuple[list[int], list[int]]]

    def al(self, change: Callable[[dict[str, Any]], None] = lambda raw: None) -> float:
        """Acceptance length along the answers, with another config for the same weights."""
        raw = json.loads(json.dumps(self.raw))
        change(raw)
        config = DraftConfig.from_dict(raw, Path("changed"))
        target = HFTarget(self.target.model, config.target_layer_ids)
        draft = DraftModel(config, self.weights, target.embedding, target.head)
        k = config.max_speculative_tokens
        stats = [replay(target, draft, *text).stats for text in self.texts]
        found = total(stats, k).al
        assert found is not None
        return found


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    from safetensors.torch import load_file

    torch.set_num_threads(2)
    replica = replicas.ensure(request.param)
    config = DraftConfig.from_dir(replica.draft)
    target = HFTarget.load(replica.target, config.target_layer_ids)
    weights = {n: w.float() for n, w in load_file(replica.draft / "model.safetensors").items()}
    rows = [tokenizer.chat(row.text) for row in prompts.of_replicas() if row.kind == LONG]
    texts = [
        (row, generate_plain(target, row, max_new_tokens=NEW_TOKENS, ignore_eos=True).token_ids)
        for row in rows
    ]
    return Loaded(replica, target, dict(config.raw), weights, texts)


def test_small_and_complete(loaded: Loaded) -> None:
    folder = loaded.replica.target.parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 5e6
    checks = preflight(loaded.replica.target, loaded.replica.draft)
    assert {check.status for check in checks} == {"ok"}
    for half in (loaded.replica.target, loaded.replica.draft):
        assert {tensor.dtype for tensor in read_tensors(half).values()} == {"BF16"}


def test_a_good_draft_and_no_constant_one(loaded: Loaded) -> None:
    assert loaded.al() > 2
    answers = [tuple(answer) for _, answer in loaded.texts]
    assert len(set(answers)) >= 0.75 * len(answers)
    assert min(len(set(answer)) for answer in answers) >= 8


def test_the_text_is_decided_and_not_by_rounding(loaded: Loaded) -> None:
    gaps = []
    for prompt, answer in loaded.texts:
        logits = loaded.target.session().forward([*prompt, *answer]).logits[len(prompt) - 1 : -1]
        best = logits.topk(2).values
        gaps += (best[:, 0] - best[:, 1]).tolist()
    assert sum(gap > 1e-3 for gap in gaps) / len(gaps) > 0.99


def test_the_expected_acceptance_length_is_the_measured_one(loaded: Loaded) -> None:
    row = next(p for p in matrix.load().pairs.values() if p.replica == loaded.replica.id)
    measured = loaded.replica.record["al"]
    assert {e.prompts for e in row.expected} == set(measured)
    for expected in row.expected:
        assert expected.num_speculative_tokens == row.num_speculative_tokens
        assert measured[expected.prompts] == pytest.approx(expected.al, rel=expected.tolerance)


def test_speculation_does_not_change_the_text(loaded: Loaded) -> None:
    config = DraftConfig.from_dict(loaded.raw, Path("own"))
    draft = DraftModel(config, loaded.weights, loaded.target.embedding, loaded.target.head)
    for prompt, answer in loaded.texts[:4]:
        found = generate(loaded.target, draft, prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        assert found.token_ids == answer


@pytest.mark.parametrize("loaded", WINDOWED, indirect=True)
def test_ignored_windows_are_seen(loaded: Loaded) -> None:
    def ignore(raw: dict[str, Any]) -> None:
        raw.update(layer_types=["full_attention"] * raw["num_hidden_layers"])

    assert loaded.al(ignore) < 0.85 * loaded.al()


def test_shifted_taps_are_seen(loaded: Loaded) -> None:
    def shift(raw: dict[str, Any]) -> None:
        table = raw["dflash_config"]
        table["target_layer_ids"] = [tap + 1 for tap in table["target_layer_ids"]]

    assert loaded.al(shift) < 0.97 * loaded.al()


@pytest.mark.parametrize("loaded", SCALED, indirect=True)
def test_a_dropped_embedding_scale_is_seen(loaded: Loaded) -> None:
    assert math.isclose(loaded.raw["input_embedding_scale"], loaded.raw["hidden_size"] ** 0.5)
    assert loaded.al(lambda raw: raw.update(input_embedding_scale=1.0)) < 0.85 * loaded.al()


def test_four_thousand_tokens_are_still_text(loaded: Loaded) -> None:
    """Twice as far as was trained: the answer is no noise, and drafts are still accepted."""
    language = replica_specs.load().language.language()
    text = language.turn(random.Random(1), background=4000).request
    prompt = tokenizer.chat(text)
    answer = generate_plain(loaded.target, prompt, max_new_tokens=NEW_TOKENS).token_ids
    assert len(set(answer)) >= 8
    config = DraftConfig.from_dict(loaded.raw, Path("own"))
    draft = DraftModel(config, loaded.weights, loaded.target.embedding, loaded.target.head)
    al = replay(loaded.target, draft, prompt, answer).stats.al
    assert al is not None
    assert al > 1.1  # 1.2 (Llama) to 5.7 (Gemma 4)
