"""The Transformers back-end against plain greedy decoding and against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: `make setup` links it")
pytest.importorskip("transformers")

import local_replicas as replicas  # noqa: E402
from local_drafts import DRAFTS, TAPS, random_draft  # noqa: E402

from dflash_plugin.backends.transformers_draft import DFlashDraftModel  # noqa: E402
from dflash_plugin.backends.transformers_model import load  # noqa: E402
from dflash_plugin.backends.transformers_target import Target  # noqa: E402
from dflash_plugin.reference.loop import generate  # noqa: E402
from dflash_plugin.reference.model import DraftModel  # noqa: E402
from dflash_plugin.reference.target import HFTarget  # noqa: E402

pytestmark = pytest.mark.torch
LENGTH = 20
LENGTHS = (5, 31, 13, 31)  # shorter and longer than every window


def architectures() -> Any:
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    not replicas.available(name), reason="this Transformers lacks it"
                ),
            )
            for name in replicas.ARCHITECTURES
        ],
    )


@architectures()
def test_text_is_the_plain_greedy_one_whatever_is_accepted(name):
    model = replicas.make_target(name)
    prompts = [replicas.prompt(length, i) for i, length in enumerate(LENGTHS)]
    plain = [replicas.plain(model, ids, LENGTH) for ids in prompts]
    tokens = {token for text in plain for token in text}
    assert len(tokens) > 12, "a text that stands still proves nothing"
    texts = [ids + text for ids, text in zip(prompts, plain, strict=True)]
    reached = []
    for chance in (0.0, 0.5, 0.85, 1.0):
        pair = load(model, replicas.OracleDraft(texts, chance, TAPS))
        results = pair.generate(prompts, max_tokens=LENGTH, ignore_eos=True)
        assert [result.token_ids for result in results] == plain
        reached.append(sum(result.al for result in results) / len(results))
        # Alone, the longest prompt, in chunks that no window and no convolution divides.
        pair = load(model, replicas.OracleDraft(texts[1:2], chance, TAPS))
        alone = pair.generate(prompts[1], max_tokens=LENGTH, ignore_eos=True, prefill_chunk=7)
        assert alone.token_ids == plain[1]
    assert reached[0] == 1 < reached[1] < reached[2] < reached[3]
    assert reached[3] > 4.5


@architectures()
def test_text_is_the_plain_greedy_one_whatever_is_drafted(name):
    model = replicas.make_target(name)
    prompts = [replicas.prompt(length, i) for i, length in enumerate(LENGTHS)]
    plain = [replicas.plain(model, ids, LENGTH) for ids in prompts]
    texts = [ids + text for ids, text in zip(prompts, plain, strict=True)]
    chances = itertools.cycle((0.5, 0.0, 1.0, 0.85))
    for schedule in replicas.SCHEDULES:
        pair = load(model, replicas.OracleDraft(texts, next(chances), TAPS))
        pair.adaptive = replicas.Schedule(*schedule)
        results = pair.generate(prompts, max_tokens=LENGTH, ignore_eos=True, block_size="auto")
        assert [result.token_ids for result in results] == plain
        pair = load(model, replicas.OracleDraft(texts[1:2], next(chances), TAPS))
        pair.adaptive = replicas.Schedule(*schedule)
        alone = pair.generate(prompts[1], max_tokens=LENGTH, ignore_eos=True, block_size="auto")
        assert alone.token_ids == plain[1]
        lengths = [len(step.drafted) for step in alone.steps[1:]]
        assert lengths == [k for _, k in zip(lengths, itertools.cycle(schedule), strict=False)]
        assert alone.mean_drafted == sum(lengths) / len(lengths)


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_a_draft_after_plain_steps_is_the_one_of_a_fresh_start(name):
    if not replicas.available(name):
        pytest.skip("this Transformers lacks it")
    pair = load(replicas.make_target(name), DFlashDraftModel(*random_draft()))
    prompts = [replicas.prompt(length, i) for i, length in enumerate(LENGTHS)]
    replicas.check_drafts_after_plain_steps(pair, prompts)


@architectures()
def test_blocks_are_the_references(name):
    model = replicas.make_target(name)
    config, weights = random_draft()
    target = HFTarget(model, TAPS)
    suited = config.for_target(target.config.model_type)
    oracle = DraftModel(suited, weights, target.embedding, target.head)
    pair = load(model, DFlashDraftModel(config, weights))
    for length in LENGTHS[:2]:
        ids = replicas.prompt(length, length)
        expected = generate(target, oracle, ids, max_new_tokens=12, ignore_eos=True)
        found = pair.generate(ids, max_tokens=12, ignore_eos=True)
        assert found.token_ids == expected.token_ids
        assert [s.drafted for s in found.steps[1:]] == [s.draft for s in expected.steps]
        assert [s.accepted for s in found.steps[1:]] == [s.accepted for s in expected.steps]


@pytest.mark.parametrize("kind", DRAFTS)
def test_draft_logits_are_the_references_for_ragged_rows(kind):
    config, weights = random_draft(**DRAFTS[kind])
    mine = DFlashDraftModel(config, weights)
    generator = torch.Generator().manual_seed(3)
    embedding, head = torch.randn(2, replicas.VOCAB, replicas.HIDDEN, generator=generator)
    oracle = DraftModel(config, weights, embedding, head)
    cache, known = mine.new_cache(3), [7, 8, 9]
    with torch.inference_mode():
        lengths, contexts = (3, 30, 14), []
        for row, length in enumerate(lengths):
            taps = torch.randn(length, 2 * replicas.HIDDEN, generator=generator)
            contexts.append(oracle.new_cache())
            oracle.append(contexts[-1], taps)
            mine.append(cache, [row], taps[None])
            cache.lengths[row] += length
        for taken in (0, 2, 4):  # a block, and then a longer context than what counts of it
            found = mine.logits(cache, known, 5, embedding, lambda x: x @ head.T)
            for row, context in enumerate(contexts):
                expected = oracle.draft_logits(context, known[row], 5)
                torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
            taps = torch.randn(3, 5, 2 * replicas.HIDDEN, generator=generator)
            mine.append(cache, [0, 1, 2], taps)
            for row, context in enumerate(contexts):
                count = 1 + (taken + row) % 5
                oracle.append(context, taps[row, :count])
                cache.lengths[row] += count


@architectures()
def test_taps_are_the_outputs_of_their_layers(name):
    model = replicas.make_target(name)
    target = Target(model, (2, 0))
    ids = replicas.prompt(9)
    with torch.inference_mode():
        output, _undo = target.forward(target.cache(1), [0], [ids], keep=1)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[3], states[1]], dim=-1)
    torch.testing.assert_close(output.taps, expected, rtol=1e-4, atol=1e-5)
    # The layers before and after are far off: taps shifted by one would be seen.
    for shifted in (torch.cat([states[2], states[0]], -1), torch.cat([states[4], states[2]], -1)):
        assert (output.taps - shifted).abs().max() > 0.1
