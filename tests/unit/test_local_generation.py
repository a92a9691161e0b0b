"""Ends of texts, streaming, sampling, prompt caches and misuse, on the Transformers back-end."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: `make setup` links it")
pytest.importorskip("transformers")

import local_replicas as replicas  # noqa: E402
from local_drafts import TAPS, random_draft  # noqa: E402

import dflash_plugin  # noqa: E402
from dflash_plugin.backends.draft_length import AdaptiveLength  # noqa: E402
from dflash_plugin.backends.transformers_draft import DFlashDraftModel  # noqa: E402
from dflash_plugin.backends.transformers_model import load  # noqa: E402
from dflash_plugin.errors import PairMismatchError, UsageError  # noqa: E402
from dflash_plugin.reference.sampling import Sampler  # noqa: E402

pytestmark = pytest.mark.torch
IDS = replicas.prompt(9)


@pytest.fixture(scope="module")
def model() -> Any:
    return replicas.make_target("llama")


@pytest.fixture(scope="module")
def text(model: Any) -> list[int]:
    return replicas.plain(model, IDS, 40)


def draft(**changes: Any) -> DFlashDraftModel:
    return DFlashDraftModel(*random_draft(**changes))


class Letters:
    """A tokenizer of one character per token; 40 and 41 are two halves of one character."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 62 for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        letters = "".join(chr(token + 62) for token in tokens)
        return letters.replace(chr(102) + chr(103), "é").replace(chr(102), "\ufffd")


def oracle(text: list[int], chance: float = 0.85) -> Any:
    return replicas.OracleDraft([IDS + text], chance, TAPS)


# --- ends ---


@pytest.mark.parametrize("count", [0, 1, 2, 5, 17])
@pytest.mark.parametrize("block_size", [1, 2, 6])
def test_max_tokens_is_exact(model, text, count, block_size):
    result = load(model, oracle(text)).generate(
        IDS, max_tokens=count, block_size=block_size, ignore_eos=True
    )
    assert result.token_ids == text[:count]
    assert result.finish_reason == "length"
    assert (result.al is None) == (block_size == 1 or count < 2)


@pytest.mark.parametrize("chance", [0.0, 0.85, 1.0])
def test_the_first_end_of_text_token_ends_it(model, text, chance):
    ends = {text[13], text[20]}
    first = min(text.index(token) for token in ends)
    pair = load(model, oracle(text, chance), tokenizer=Letters())
    result = pair.generate(IDS, max_tokens=40, eos_token_ids=ends)
    assert result.token_ids == text[: first + 1]
    assert result.finish_reason == "stop"
    assert result.text == Letters().decode(text[:first])


def test_the_targets_own_end_of_text_tokens_are_used(model, text):
    model.generation_config.eos_token_id = [text[7], 1]
    try:
        result = load(model, oracle(text)).generate(IDS, max_tokens=40)
    finally:
        model.generation_config.eos_token_id = 2
    assert result.token_ids == text[: text.index(text[7]) + 1]


def test_a_stop_string_ends_the_text_before_it(model, text):
    tokenizer = Letters()
    whole = tokenizer.decode(text)
    stop = whole[9:12]
    pair = load(model, oracle(text, 1.0), tokenizer=tokenizer)
    for stops in (stop, ["~never~", stop]):
        steps = list(pair.stream_generate(IDS, max_tokens=40, ignore_eos=True, stop=stops))
        end = whole.index(stop)
        assert steps[-1].result.text == whole[:end] == "".join(step.text for step in steps)
        assert steps[-1].finish_reason == "stop"
        assert steps[-1].result.token_ids == text[: end + 3]


def test_a_stop_string_that_only_begins_is_shown_in_the_end(model, text):
    whole = Letters().decode(text[:12])
    pair = load(model, oracle(text), tokenizer=Letters())
    steps = list(pair.stream_generate(IDS, max_tokens=12, ignore_eos=True, stop=whole[-2:] + "~"))
    assert "".join(step.text for step in steps) == whole
    assert steps[-1].finish_reason == "length"


# --- streams and batches ---


def test_a_stream_is_the_result_piece_by_piece(model, text):
    pair = load(model, oracle(text, 0.5), tokenizer=Letters())
    result = pair.generate(IDS, max_tokens=30, ignore_eos=True)
    pair = load(model, oracle(text, 0.5), tokenizer=Letters())
    steps = list(pair.stream_generate(IDS, max_tokens=30, ignore_eos=True))
    assert [token for step in steps for token in step.token_ids] == text[:30]
    assert "".join(step.text for step in steps) == result.text
    assert [step.result is None for step in steps] == [True] * (len(steps) - 1) + [False]
    assert steps[-1].result.stats == result.stats
    assert result.al == 1 + sum(s.accepted for s in steps[1:]) / (len(steps) - 1)
    assert [s.seconds for s in steps] == sorted(s.seconds for s in steps)


def test_an_empty_stream_still_has_its_result(model, text):
    (step,) = load(model, oracle(text)).stream_generate(IDS, max_tokens=0)
    assert (step.result.token_ids, step.finish_reason) == ([], "length")


def test_interleaved_streams_do_not_disturb_each_other(model):
    pair = load(model, draft())
    one, other = replicas.prompt(7, 1), replicas.prompt(15, 2)
    alone = [pair.generate(ids, max_tokens=20, ignore_eos=True) for ids in (one, other)]
    streams = [pair.stream_generate(ids, max_tokens=20, ignore_eos=True) for ids in (one, other)]
    found = [[], []]
    for steps in itertools.zip_longest(*streams):
        for tokens, step in zip(found, steps, strict=True):
            tokens.extend(step.token_ids if step else ())
    assert found == [result.token_ids for result in alone]


def test_rows_end_at_their_own_place(model):
    prompts = [replicas.prompt(n, n) for n in (4, 11, 23)]
    plain = [replicas.plain(model, ids, 25) for ids in prompts]
    ends = {plain[0][2], plain[1][15]}
    results = load(model, draft()).generate(prompts, max_tokens=25, eos_token_ids=ends)
    for result, tokens in zip(results, plain, strict=True):
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        assert result.token_ids == tokens[: stop + 1]
    assert len({len(result.token_ids) for result in results}) > 1


def test_a_batch_padded_on_the_left_is_read_by_its_mask(model):
    prompts = [replicas.prompt(n, n) for n in (4, 11)]
    pair = load(model, draft())
    batch = {
        "input_ids": torch.tensor([[0] * 7 + prompts[0], prompts[1]]),
        "attention_mask": torch.tensor([[0] * 7 + [1] * 4, [1] * 11]),
    }
    expected = [pair.generate(ids, max_tokens=9).token_ids for ids in prompts]
    assert [r.token_ids for r in pair.generate(batch, max_tokens=9)] == expected


def test_spec_generate_takes_the_published_arguments(model, text):
    found = draft().spec_generate(
        target=model, input_ids=torch.tensor([IDS]), max_new_tokens=12, stop_token_ids=None,
        temperature=0.0, mask_token_id=63,
    )  # fmt: skip
    assert found.tolist() == [IDS + text[:12]]
    with pytest.raises(UsageError, match="mask_token_id is 5, but the draft was trained with 63"):
        draft().spec_generate(model, torch.tensor([IDS]), mask_token_id=5)


# --- logits processors and sampling ---


def test_logits_processors_see_the_text_before_each_token(model):
    seen = set()

    def no_repetition(ids: Any, scores: Any) -> Any:
        assert ids.shape[0] == 1
        seen.add(ids.shape[1])
        return scores.scatter(1, ids[:, len(IDS) :], -math.inf)

    plain: list[int] = []
    with torch.inference_mode():
        for _ in range(20):
            logits = model(torch.tensor([IDS + plain])).logits[:, -1]
            logits[:, plain] = -math.inf
            plain.append(int(logits.argmax()))
    for made in (replicas.OracleDraft([IDS + plain], 0.85, TAPS), draft()):
        result = load(model, made).generate(
            IDS, max_tokens=20, ignore_eos=True, logits_processors=[no_repetition]
        )
        assert result.token_ids == plain
    assert seen >= set(range(len(IDS), len(IDS) + 20))


SETTINGS = [
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 0.7, "top_p": 0.7, "top_k": 6},
    {"temperature": 1.5, "min_p": 0.3, "top_k": 6},
]


class TiltedDraft(replicas.OracleDraft):
    """Always offers one and the same distribution, near enough to the target's to be taken."""

    def __init__(self, logits: Any) -> None:
        super().__init__([], 0, TAPS)
        self._logits = logits

    def new_cache(self, rows: int = 1) -> Any:
        return replicas.OracleCache([()] * rows)

    def logits(self, cache, known, k, _embed, _head, **_):
        return self._logits.expand(len(known), k, -1)


@pytest.mark.parametrize(
    "setting, schedule", [*((setting, None) for setting in SETTINGS), (SETTINGS[0], (0, 1, 3, 0))],
    ids=str,
)  # fmt: skip
def test_samples_are_distributed_as_the_target_alone_draws(model, setting, schedule):
    """Joint distribution of three tokens by chi-square, against their exact enumeration."""

    def distribution(ids: list[int]) -> dict[int, float]:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[:, -1]
        known = {k: v for k, v in setting.items() if k != "min_p"}
        shares = Sampler(**known).probabilities(logits)[0]
        shares[shares < shares.max() * setting.get("min_p", 0)] = 0
        return {i: float(p / shares.sum()) for i, p in enumerate(shares) if p > 0}

    ids = replicas.prompt(4, 3)
    expected = {
        (a, b, c): p * q * r
        for a, p in distribution(ids).items()
        for b, q in distribution([*ids, a]).items()
        for c, r in distribution([*ids, a, b]).items()
    }
    with torch.inference_mode():
        near = model(torch.tensor([[*ids, max(distribution(ids))]])).logits[0, -1]
    pair = load(model, TiltedDraft(near))
    size = None
    if schedule is not None:
        pair.adaptive, size = replicas.Schedule(*schedule), "auto"
    count, found, accepted = 4000, Counter(), 0
    for seed in range(count // 1000):
        batch = pair.generate(
            [ids] * 1000, max_tokens=3, ignore_eos=True, seed=seed, block_size=size, **setting
        )
        found.update(tuple(result.token_ids) for result in batch)
        accepted += sum(step.accepted > 0 for r in batch for step in r.steps[1:])
    assert not set(found) - set(expected), "a token that the settings cut away"
    assert 0.05 * count < accepted < count, "both acceptance and rejection must happen"
    # Cells with fewer than 5 expected are one.
    small = [key for key, p in expected.items() if p * count < 5]
    cells = [(found[k], p * count) for k, p in expected.items() if p * count >= 5]
    cells.append((sum(found[k] for k in small), sum(expected[k] for k in small) * count))
    chi = sum((seen - mean) ** 2 / mean for seen, mean in cells if mean > 0)
    freedom = len(cells) - 1
    # Wilson-Hilferty: below the 99.99 % point.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < limit, f"chi-square {chi:.1f} of {freedom} degrees of freedom, limit {limit:.1f}"


def test_a_seed_makes_sampling_repeatable(model):
    pair = load(model, draft())
    settings = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    one, same, other = (pair.generate(IDS, seed=s, **settings).token_ids for s in (1, 1, 2))
    assert one == same != other


# --- prompt cache ---


@pytest.mark.parametrize("schedule", [None, (5, 0, 0)])
@pytest.mark.parametrize("name", ["qwen3-sliding", "qwen3.5"])
def test_a_prompt_cache_saves_reading_and_changes_nothing(name, schedule):
    if not replicas.available(name):
        pytest.skip("this Transformers lacks it")
    pair = load(replicas.make_target(name), draft())
    cache, size = pair.prompt_cache(), None
    if schedule is not None:  # what plain steps left for the draft to read is in the cache too
        pair.adaptive, size = replicas.Schedule(*schedule), "auto"
    first = pair.generate(IDS, max_tokens=10, ignore_eos=True, prompt_cache=cache, block_size=size)
    longer = [*IDS, *first.token_ids, *replicas.prompt(6, 5)]
    again = pair.generate(longer, max_tokens=10, ignore_eos=True, prompt_cache=cache)
    fresh = pair.generate(longer, max_tokens=10, ignore_eos=True)
    assert again.token_ids == fresh.token_ids
    assert [s.drafted for s in again.steps] == [s.drafted for s in fresh.steps]
    assert again.reused_tokens == len(IDS) + 9
    other = [*IDS[:6], *replicas.prompt(6, 6)]  # parts from what is held in the middle
    parted = pair.generate(other, max_tokens=10, ignore_eos=True, prompt_cache=cache)
    assert parted.token_ids == pair.generate(other, max_tokens=10, ignore_eos=True).token_ids
    assert parted.reused_tokens == (0 if name == "qwen3.5" else 6)


def test_a_stream_that_is_dropped_leaves_its_cache_usable(model, text):
    pair = load(model, draft())
    cache = pair.prompt_cache()
    stream = pair.stream_generate(IDS, max_tokens=30, ignore_eos=True, prompt_cache=cache)
    taken = [token for _ in range(4) for token in next(stream).token_ids]
    stream.close()
    ids = [*IDS, *taken]
    result = pair.generate(ids, max_tokens=8, ignore_eos=True, prompt_cache=cache)
    assert result.reused_tokens == len(ids) - 1
    assert result.token_ids == text[len(taken) : len(taken) + 8]


# --- misuse ---


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_tokens": -1}, "max_tokens is -1, expected >= 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": "all"}, "block_size is all, expected >= 1, or 'auto'"),
        ({"stop": [""]}, "stop is"),
        ({"stop": "x"}, "stop strings need a tokenizer"),
        (
            {"max_tokens": 300},
            "prompt has 9 tokens and max_tokens is 300, but the target takes 256",
        ),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(model, wrong, message):
    with pytest.raises(UsageError, match=message):
        load(model, draft()).stream_generate(IDS, **wrong)


def test_prompts_the_target_cannot_take_are_refused(model):
    pair = load(model, draft())
    for wrong, message in (
        ([], "prompt is empty"),
        ([64], "prompt has token 64, but the target has tokens 0..63"),
        ([[1], [70]], "prompt 1 has token 70"),
        ([{"role": "user", "content": "hi"}], "no chat template"),
        ({"ids": [1]}, "without input_ids"),
    ):
        with pytest.raises(UsageError, match=message):
            pair.generate(wrong, max_tokens=4)
    with pytest.raises(UsageError, match="prompt_cache holds one text"):
        pair.generate([[1], [2]], prompt_cache=pair.prompt_cache())


def test_halves_that_do_not_fit_are_refused(model):
    with pytest.raises(PairMismatchError, match="block_size is 7, but the draft's is 6"):
        load(model, draft()).generate(IDS, block_size=7, max_tokens=4)
    with pytest.raises(PairMismatchError, match=r"embedding is \[64, 32\], expected .* \[64, 48\]"):
        load(model, draft(hidden_size=48))
    with pytest.raises(PairMismatchError, match=r"has 4 decoder layers, expected layers \[9\]"):
        load(model, draft(dflash={"mask_token_id": 63, "target_layer_ids": [9]}))
    with pytest.raises(UsageError, match=r"draft is in torch.float64, but the target's"):
        load(model, draft().double())
    with pytest.raises(UsageError, match="draft is on meta, but the target's"):
        load(model, draft().to("meta"))


def test_states_that_are_not_known_are_refused():
    model = replicas.make_target("llama")
    model.config.layer_types = ["chunked_attention"] * 4
    with pytest.raises(PairMismatchError, match="LlamaForCausalLM has chunked_attention layers"):
        load(model, draft())
    model = replicas.make_target("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="attn_implementation 'flash_attention_2'"):
        load(model, draft())


def test_a_layer_that_forgets_its_state_is_refused():
    if not replicas.available("qwen3.5"):
        pytest.skip("this Transformers lacks it")
    model = replicas.make_target("qwen3.5")
    module = model.model.layers[0].linear_attn
    forward = module.forward
    load(model, draft())
    module.forward = lambda hidden_states, cache_params=None, **rest: forward(hidden_states)
    with pytest.raises(PairMismatchError, match=r"layer 0 .* does not go on from its state"):
        load(model, draft())


# --- lengths chosen step by step ---


class Timed(AdaptiveLength):
    """As if a step took as long as ``cost`` says."""

    def __init__(self, cost: Callable[[int], float]) -> None:
        super().__init__(5)
        self._cost = cost

    def request(self) -> Any:
        made = super().request()
        choose, took = made.choose, made.took
        chosen = 0

        def remember(rows: int) -> int:
            nonlocal chosen
            chosen = choose(rows)
            return chosen

        made.choose = remember
        made.took = lambda accepted, _seconds: took(accepted, self._cost(chosen))
        return made


@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_are_as_long_as_pays(model, rows):
    prompts = [replicas.prompt(n, n) for n in (9, 5, 20)[:rows]]
    texts = [replicas.plain(model, ids, 60) for ids in prompts]
    known = [ids + text for ids, text in zip(prompts, texts, strict=True)]
    pair = load(model, replicas.OracleDraft(known, 0.9, TAPS))
    for cost, fits in (
        (lambda k: 1 + 0.01 * k, lambda mean: mean > 3.5),  # rows are nearly free
        (lambda k: 1.3 * k + 1, lambda mean: mean < 1),  # each costs as much as the first
    ):
        pair.adaptive = Timed(cost)
        for _ in range(2):
            results = pair.generate(prompts, max_tokens=60, ignore_eos=True, block_size="auto")
        assert [result.token_ids for result in results] == texts
        assert fits(results[0].mean_drafted)


def test_auto_measures_by_itself(model, text):
    pair = load(model, oracle(text))
    steps = list(pair.stream_generate(IDS, max_tokens=40, ignore_eos=True, block_size="auto"))
    assert [token for step in steps for token in step.token_ids] == text
    assert [len(step.drafted) for step in steps[1:5]] == [5, 5, 0, 0]
    costs = pair.adaptive.costs[1].estimates(5)
    assert min(costs) > 0
    found = pair.generate(IDS, max_tokens=0, block_size="auto")
    assert math.isnan(found.mean_drafted)


def test_auto_does_not_draft_more_than_the_pair_does(model, text):
    pair = load(model, oracle(text))
    pair.block_size = 3
    result = pair.generate(IDS, max_tokens=40, ignore_eos=True, block_size="auto")
    assert max(len(step.drafted) for step in result.steps) == 2
    plain = load(model, None).generate(IDS, max_tokens=8, ignore_eos=True, block_size="auto")
    assert (plain.token_ids, plain.al, plain.mean_drafted) == (text[:8], None, 0)


# --- the one function ---


def test_load_takes_loaded_models_and_is_exported(model, text):
    pair = dflash_plugin.load(model, draft(), tokenizer=Letters())
    result = dflash_plugin.generate(pair, IDS, max_tokens=8, ignore_eos=True)
    assert result.token_ids == text[:8]
    steps = dflash_plugin.stream_generate(pair, IDS, max_tokens=8, ignore_eos=True)
    assert [token for step in steps for token in step.token_ids] == text[:8]
    with pytest.raises(UsageError, match="cannot be looked up"):
        dflash_plugin.load(model)
    with pytest.raises(UsageError, match="backend is 'jax'"):
        dflash_plugin.load("demo", backend="jax")
