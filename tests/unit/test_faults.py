"""The faults of the mutation table: each does something, to those pairs that can have it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: `make setup` links it")
pytest.importorskip("transformers")

import local_replicas as replicas  # noqa: E402
from local_drafts import DRAFTS, random_draft  # noqa: E402

from ci import mutations  # noqa: E402
from ci.workers.faults import FAULTS  # noqa: E402
from dflash_plugin.backends.transformers_draft import DFlashDraftModel  # noqa: E402
from dflash_plugin.backends.transformers_model import load  # noqa: E402

pytestmark = pytest.mark.torch
# A pair that can have the fault, and what of it changes: the text, or the drafts alone.
CASES = {
    "taps-plus-one": ("qwen3", "full", False),
    "wrong-mask-id": ("qwen3", "full", False),
    "wrong-rope": ("qwen3", "yarn", False),
    "windows-ignored": ("qwen3", "sliding, causal", False),
    "target-windows-ignored": ("gemma4", "full", True),
    "no-embedding-scale": ("gemma4", "full", False),
    "state-not-rewound": ("qwen3.5", "full", True),
    "stale-prefix-block": ("qwen3", "full", True),
    "stale-draft-block": ("qwen3", "full", False),
}
FIRST = replicas.prompt(40)
SECOND = [*FIRST[:35], *replicas.prompt(30, seed=1)]


def make(architecture: str, kind: str) -> Any:
    if not replicas.available(architecture):
        pytest.skip("this Transformers lacks it")
    config, weights = random_draft(**DRAFTS[kind])
    return load(replicas.make_target(architecture), DFlashDraftModel(config, weights))


def texts(pair: Any, fault: Any = None) -> tuple[list[int], list[tuple[int, ...]]]:
    """Tokens and drafts of a prompt and of one that begins alike, in one prompt cache."""
    cache, tokens, drafts = pair.prompt_cache(), [], []
    for ids in (FIRST, SECOND):
        if cache.token_ids and fault is not None and fault.touch is not None:
            fault.touch(cache, ids, pair.backend)
        made = pair.generate(ids, max_tokens=16, ignore_eos=True, prompt_cache=cache)
        tokens += made.token_ids
        drafts += [step.drafted for step in made.steps]
    return tokens, drafts


def test_the_table_and_the_faults_name_the_same() -> None:
    assert set(FAULTS) == set(mutations.FAULTS) == set(CASES)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_what_it_says_and_goes_again(name: str) -> None:
    architecture, kind, text_changes = CASES[name]
    pair, fault = make(architecture, kind), FAULTS[name]
    assert fault.applies(pair.backend)
    before = texts(pair)
    with fault.change(pair.backend):
        wrong = texts(pair, fault)
    assert (wrong[0] != before[0]) == text_changes
    assert wrong != before
    assert texts(pair) == before


@pytest.mark.parametrize(
    "name",
    ["windows-ignored", "target-windows-ignored", "no-embedding-scale", "state-not-rewound"],
)
def test_a_pair_that_cannot_have_it(name: str) -> None:
    assert not FAULTS[name].applies(make("qwen3", "full").backend)
