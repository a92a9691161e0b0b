"""The MLX back-end against mlx_lm's plain decoding and against the reference; on any CPU."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: `make setup` links it")
pytest.importorskip("transformers")
mx = pytest.importorskip(
    "mlx.core", reason="needs MLX: pip install 'mlx[cpu]' mlx-lm (Linux) or mlx-lm (Mac)"
)
pytest.importorskip("mlx_lm")

import local_replicas as replicas  # noqa: E402
import mlx_replicas  # noqa: E402
from local_drafts import DRAFTS, TAPS, random_draft, save_draft  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

import dflash_plugin  # noqa: E402
from dflash_plugin import model_mlx  # noqa: E402
from dflash_plugin.backends.mlx_draft import DraftModel  # noqa: E402
from dflash_plugin.backends.mlx_model import load  # noqa: E402
from dflash_plugin.backends.mlx_target import Target  # noqa: E402
from dflash_plugin.errors import PairMismatchError, UsageError  # noqa: E402
from dflash_plugin.reference import model as reference  # noqa: E402
from dflash_plugin.reference.loop import generate  # noqa: E402
from dflash_plugin.reference.sampling import Sampler  # noqa: E402
from dflash_plugin.reference.target import HFTarget  # noqa: E402

pytestmark = pytest.mark.torch
LENGTH = 20
LENGTHS = (5, 8, 13, 31)  # shorter and longer than every window
IDS = replicas.prompt(9)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Transformers and the MLX model of an architecture, made once."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if not replicas.available(name):
            pytest.skip("this Transformers lacks it")
        if name not in made:
            made[name] = mlx_replicas.make_pair(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def target(pairs: Any) -> Any:
    return pairs("qwen3")[1]


def draft(**changes: Any) -> DraftModel:
    config, weights = random_draft(**changes)
    model = DraftModel(config)
    model.load_weights([(name, mx.array(weight.numpy())) for name, weight in weights.items()])
    return model


class OracleDraft:
    """Knows the text, and gets each token right with a given chance."""

    class Config:
        block_size = 6
        target_layer_ids = TAPS
        vocab_size, hidden_size = replicas.VOCAB, replicas.HIDDEN

    config = Config()

    def __init__(self, texts: list[list[int]], chance: float) -> None:
        self.texts, self.chance = texts, chance
        self._random = torch.Generator().manual_seed(int(chance * 100))

    def new_cache(self) -> Any:
        class Cache:
            length = 0

            def arrays(self) -> list[Any]:
                return []

        return Cache()

    def append(self, cache: Any, taps: Any) -> None:
        assert taps.shape[-1] == len(TAPS) * replicas.HIDDEN

    def logits(self, cache: Any, known: int, k: int, _embed: Any, _head: Any, **_: Any) -> Any:
        (text,) = {tuple(t) for t in self.texts if t[cache.length : cache.length + 1] == [known]}
        rows = torch.zeros(k, replicas.VOCAB)
        for place in range(k):
            after = cache.length + 1 + place
            right = text[after] if after < len(text) else 5
            lucky = float(torch.rand((), generator=self._random)) < self.chance
            rows[place, right if lucky else (right + 1) % replicas.VOCAB] = 9.0
        return mx.array(rows.numpy())


def unpatched(model: Any) -> bool:
    names = {type(m).__name__ for _, m in model.named_modules()}
    return "_Watched" not in names and len(tree_flatten(model.parameters())) > 20


@pytest.mark.parametrize("name", mlx_replicas.ARCHITECTURES)
def test_text_is_the_plain_greedy_one_whatever_is_accepted(pairs, name):
    _torch_model, model = pairs(name)
    parameters = len(tree_flatten(model.parameters()))
    reached = {}
    seen = set()
    for length in LENGTHS[::3]:
        ids = replicas.prompt(length, length)
        plain = mlx_replicas.plain(model, ids, LENGTH)
        seen |= set(plain)
        for chance in (0.0, 0.5, 0.85, 1.0):
            pair = load(model, OracleDraft([ids + plain], chance))
            result = pair.generate(ids, max_tokens=LENGTH, ignore_eos=True, prefill_chunk=7)
            assert result.token_ids == plain
            reached[chance] = result.al
    assert len(seen) > 6, "a text that stands still proves nothing"
    assert reached[0.0] == 1 < reached[0.5] < reached[1.0]
    assert unpatched(model) and len(tree_flatten(model.parameters())) == parameters


@pytest.mark.parametrize("name", mlx_replicas.ARCHITECTURES)
def test_text_is_the_plain_greedy_one_whatever_is_drafted(pairs, name):
    model = pairs(name)[1]
    chances = itertools.cycle((0.5, 0.0, 1.0, 0.85))
    for length in LENGTHS[::3]:
        ids = replicas.prompt(length, length)
        plain = mlx_replicas.plain(model, ids, LENGTH)
        for schedule in replicas.SCHEDULES:
            pair = load(model, OracleDraft([ids + plain], next(chances)))
            pair.adaptive = replicas.Schedule(*schedule)
            result = pair.generate(ids, max_tokens=LENGTH, ignore_eos=True, block_size="auto")
            assert result.token_ids == plain
            lengths = [len(step.drafted) for step in result.steps[1:]]
            assert lengths == [k for _, k in zip(lengths, itertools.cycle(schedule), strict=False)]


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "gemma4"])
def test_a_draft_after_plain_steps_is_the_one_of_a_fresh_start(pairs, name):
    pair = load(pairs(name)[1], draft())
    prompts = [replicas.prompt(length, length) for length in LENGTHS[::3]]
    replicas.check_drafts_after_plain_steps(pair, prompts)


def test_auto_measures_by_itself(target):
    text = mlx_replicas.plain(target, IDS, LENGTH)
    pair = load(target, OracleDraft([IDS + text], 0.85))
    result = pair.generate(IDS, max_tokens=LENGTH, ignore_eos=True, block_size="auto")
    assert result.token_ids == text
    assert [len(step.drafted) for step in result.steps[1:5]] == [5, 5, 0, 0]
    assert min(pair.adaptive.costs[1].estimates(5)) > 0


@pytest.mark.parametrize("name", mlx_replicas.ARCHITECTURES)
def test_blocks_are_the_references(pairs, name):
    torch_model, model = pairs(name)
    config, weights = random_draft()
    hf = HFTarget(torch_model, TAPS)
    suited = config.for_target(hf.config.model_type)
    oracle = reference.DraftModel(suited, weights, hf.embedding, hf.head)
    pair = load(model, draft())
    for length in (5, 31):
        ids = replicas.prompt(length, length)
        expected = generate(hf, oracle, ids, max_new_tokens=12, ignore_eos=True)
        found = pair.generate(ids, max_tokens=12, ignore_eos=True)
        assert found.token_ids == expected.token_ids
        assert [s.drafted for s in found.steps[1:]] == [s.draft for s in expected.steps]


@pytest.mark.parametrize("name", mlx_replicas.ARCHITECTURES)
def test_taps_are_transformers_hidden_states(pairs, name):
    torch_model, model = pairs(name)
    found = Target(model, (2, 0))
    _logits, taps, _calls = found.forward(found.cache(), IDS)
    with torch.inference_mode():
        states = torch_model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    mine = torch.tensor(taps.tolist())
    expected = torch.cat([states[3], states[1]], dim=-1)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    for shifted in (torch.cat([states[2], states[0]], -1), torch.cat([states[4], states[2]], -1)):
        assert (mine - shifted).abs().max() > 0.1


@pytest.mark.parametrize("kind", DRAFTS)
def test_draft_logits_are_the_references(kind):
    config, weights = random_draft(**DRAFTS[kind])
    generator = torch.Generator().manual_seed(3)
    embedding, head = torch.randn(2, replicas.VOCAB, replicas.HIDDEN, generator=generator)
    oracle = reference.DraftModel(config, weights, embedding, head)
    context, mine = oracle.new_cache(), draft(**DRAFTS[kind])
    cache = mine.new_cache()
    table, matrix = mx.array(embedding.numpy()), mx.array(head.numpy())
    for count in (1, 4, 22, 3):
        taps = torch.randn(count, 2 * replicas.HIDDEN, generator=generator)
        oracle.append(context, taps)
        mine.append(cache, mx.array(taps.numpy())[None])
        cache.length += count
        found = mine.logits(cache, 7, 5, lambda ids: table[ids], lambda x: x @ matrix.T)
        expected = oracle.draft_logits(context, 7, 5)
        torch.testing.assert_close(torch.tensor(found.tolist()), expected, rtol=1e-3, atol=1e-3)


def test_a_ragged_batch_takes_turns(target):
    prompts = [replicas.prompt(length, length) for length in LENGTHS]
    plain = [mlx_replicas.plain(target, ids, LENGTH) for ids in prompts]
    results = load(target, draft()).generate(prompts, max_tokens=LENGTH, ignore_eos=True)
    assert [result.token_ids for result in results] == plain


# --- one model, several users ---


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5"])
def test_two_drafts_on_one_target_see_their_own_taps(pairs, name):
    model = pairs(name)[1]
    drafts = [draft(), draft(dflash={"mask_token_id": 63, "target_layer_ids": [3, 1]})]
    alone = [load(model, d).generate(IDS, max_tokens=LENGTH, ignore_eos=True) for d in drafts]
    pair_of = [load(model, d) for d in drafts]
    streams = [p.stream_generate(IDS, max_tokens=LENGTH, ignore_eos=True) for p in pair_of]
    steps = list(itertools.zip_longest(*streams))
    for number, result in enumerate(alone):
        mine = [pair[number] for pair in steps if pair[number] is not None]
        assert [s.drafted for s in mine] == [s.drafted for s in result.steps]
        assert mine[-1].result.token_ids == result.token_ids
    assert unpatched(model)


def test_a_second_thread_is_not_disturbed_by_an_open_stream(pairs):
    model = pairs("qwen3.5")[1]
    expected = load(model, draft()).generate(IDS, max_tokens=LENGTH, ignore_eos=True)
    stream = load(model, draft()).stream_generate(IDS, max_tokens=LENGTH, ignore_eos=True)
    begun = [next(stream), next(stream)]
    found: list[Any] = []

    def work() -> None:
        try:
            pair = load(model, draft())
            found.append(pair.generate(IDS, max_tokens=LENGTH, ignore_eos=True).token_ids)
        except BaseException as err:  # shown by the assertion below
            found.append(err)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected.token_ids] * 2
    tokens = [token for step in [*begun, *stream] for token in step.token_ids]
    assert tokens == expected.token_ids


# --- ends ---


@pytest.mark.parametrize("count", [0, 1, 2, 9])
@pytest.mark.parametrize("block_size", [1, 2, 6])
def test_max_tokens_and_block_size_are_exact(target, count, block_size):
    text = mlx_replicas.plain(target, IDS, 9)
    pair = load(target, OracleDraft([IDS + text], 0.85))
    result = pair.generate(IDS, max_tokens=count, block_size=block_size, ignore_eos=True)
    assert (result.token_ids, result.finish_reason) == (text[:count], "length")


def test_buffers_of_earlier_texts_and_of_the_prompt_are_given_back(target, monkeypatch):
    pair = load(target, draft())
    pair.generate(replicas.prompt(31), max_tokens=LENGTH)
    given_back, clear = [], mx.clear_cache

    def clear_cache() -> None:
        given_back.append(mx.get_cache_memory())
        clear()

    monkeypatch.setattr(mx, "clear_cache", clear_cache)
    next(pair.stream_generate(IDS, max_tokens=LENGTH, prefill_chunk=len(IDS)))
    assert len(given_back) == 2
    assert min(given_back) > 0


def test_the_first_end_of_text_token_ends_it(target):
    text = mlx_replicas.plain(target, IDS, 20)
    end = text[12]
    pair = load(target, OracleDraft([IDS + text], 1.0))
    result = pair.generate(IDS, max_tokens=20, eos_token_ids=[end])
    assert result.token_ids == text[: text.index(end) + 1]
    assert result.finish_reason == "stop"


# --- quantised ---


def test_quantised_targets_and_drafts(tmp_path):
    torch_model, model = mlx_replicas.make_pair(
        "qwen3", tmp_path / "model", hidden_size=64, intermediate_size=64
    )
    del torch_model
    nn.quantize(model, group_size=32, bits=4)
    plain = mlx_replicas.plain(model, IDS, LENGTH)
    small = draft(hidden_size=64, intermediate_size=128)
    whole = load(model, small).generate(IDS, max_tokens=LENGTH, ignore_eos=True)
    assert whole.token_ids == plain
    small.quantize(4)
    assert isinstance(small.layers[0].mlp.up_proj, nn.QuantizedLinear)
    result = load(model, small).generate(IDS, max_tokens=LENGTH, ignore_eos=True)
    assert result.token_ids == plain
    assert [s.drafted for s in result.steps] != [s.drafted for s in whole.steps]
    with pytest.raises(UsageError, match="draft_bits is 7"):
        small.quantize(7)


# --- prompt cache ---


@pytest.mark.parametrize("schedule", [None, (5, 0, 0)])
@pytest.mark.parametrize("name", ["qwen3", "gemma4", "qwen3.5"])
def test_a_prompt_cache_saves_reading_and_changes_nothing(pairs, name, schedule):
    pair = load(pairs(name)[1], draft())
    cache, size = pair.prompt_cache(), None
    if schedule is not None:  # what plain steps left for the draft to read is in the cache too
        pair.adaptive, size = replicas.Schedule(*schedule), "auto"
    first = pair.generate(IDS, max_tokens=10, ignore_eos=True, prompt_cache=cache, block_size=size)
    longer = [*IDS, *first.token_ids, *replicas.prompt(40, 5)]
    again = pair.generate(longer, max_tokens=10, ignore_eos=True, prompt_cache=cache)
    fresh = pair.generate(longer, max_tokens=10, ignore_eos=True)
    assert again.token_ids == fresh.token_ids
    assert [s.drafted for s in again.steps] == [s.drafted for s in fresh.steps]
    assert again.reused_tokens == len(IDS) + 9
    for kept in (len(longer) - 2, 6):  # parts from what is held near the end, and long before
        other = [*longer[:kept], *replicas.prompt(6, 6)]
        parted = pair.generate(other, max_tokens=10, ignore_eos=True, prompt_cache=cache)
        assert parted.token_ids == pair.generate(other, max_tokens=10, ignore_eos=True).token_ids
        if name == "qwen3":
            assert parted.reused_tokens == kept
        if name == "qwen3.5":
            assert parted.reused_tokens == 0


# --- sampling ---

SETTINGS = [
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 0.7, "top_p": 0.6, "top_k": 5},
    {"temperature": 1.5, "min_p": 0.4, "top_k": 5},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_samples_are_distributed_as_the_target_alone_draws(pairs, setting):
    """Joint distribution of two tokens by chi-square, against their exact enumeration."""
    torch_model, model = pairs("llama")
    ids = replicas.prompt(4, 3)

    def logits(text: list[int]) -> Any:
        with torch.inference_mode():
            return torch_model(torch.tensor([text])).logits[:, -1]

    def distribution(text: list[int]) -> dict[int, float]:
        known = {k: v for k, v in setting.items() if k != "min_p"}
        shares = Sampler(**known).probabilities(logits(text))[0]
        shares[shares < shares.max() * setting.get("min_p", 0)] = 0
        return {i: float(p / shares.sum()) for i, p in enumerate(shares) if p > 0}

    likely = max(distribution(ids), key=distribution(ids).__getitem__)
    near = mx.array(logits([*ids, likely])[0].numpy())

    class Tilted(OracleDraft):
        def logits(self, cache, known, k, _embed, _head, **_):
            return mx.broadcast_to(near, (k, replicas.VOCAB))

    expected = {
        (a, b): p * q
        for a, p in distribution(ids).items()
        for b, q in distribution([*ids, a]).items()
    }
    pair = load(model, Tilted([], 0))
    count, found, accepted = 400, Counter(), 0
    cache = pair.prompt_cache()
    for seed in range(count):
        result = pair.generate(
            ids, max_tokens=2, ignore_eos=True, block_size=2, seed=seed, prompt_cache=cache,
            **setting,
        )  # fmt: skip
        found[tuple(result.token_ids)] += 1
        accepted += result.stats.accepted
    assert not set(found) - set(expected), "a token that the settings cut away"
    assert 0 < accepted < count, "both acceptance and rejection must happen"
    small = [key for key, p in expected.items() if p * count < 5]
    cells = [(found[k], p * count) for k, p in expected.items() if p * count >= 5]
    cells.append((sum(found[k] for k in small), sum(expected[k] for k in small) * count))
    chi = sum((seen - mean) ** 2 / mean for seen, mean in cells if mean > 0)
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < limit, f"chi-square {chi:.1f} of {freedom} degrees of freedom, limit {limit:.1f}"


def test_logits_processors_see_the_text_before_each_token(target):
    def no_repetition(ids: Any, scores: Any) -> Any:
        new = ids.tolist()[len(IDS) :]
        return (
            mx.put_along_axis(scores, mx.array([new]), mx.array(-mx.inf), axis=1) if new else scores
        )

    plain: list[int] = []
    for _ in range(12):
        plain.append(int(no_repetition(
            mx.array([*IDS, *plain]), target(mx.array([[*IDS, *plain]]))[:, -1]
        ).argmax().item()))  # fmt: skip
    pair = load(target, OracleDraft([IDS + plain], 0.85))
    result = pair.generate(IDS, max_tokens=12, ignore_eos=True, logits_processors=[no_repetition])
    assert result.token_ids == plain


# --- the published calls, loading, misuse ---


def test_the_published_calls(pairs, tmp_path):
    model = pairs("qwen3")[1]
    folder = save_draft(tmp_path / "draft")
    made = model_mlx.load_draft(str(folder))
    text = mlx_replicas.plain(model, IDS, 12)
    for size in ("auto", None):
        answers = model_mlx.stream_generate(
            model, made, None, mx.array(IDS), block_size=size, max_tokens=12
        )
        responses = list(answers)
        assert [token for r in responses for token in r.tokens] == text
    last = responses[-1]
    assert (last.finish_reason, last.generation_tokens, last.prompt_tokens) == ("length", 12, 9)
    assert responses[0].accepted is None
    assert all(r.accepted == len(r.tokens) for r in responses[1:])


def test_load_takes_local_paths(tmp_path):
    folder = tmp_path / "target"
    _torch_model, model = mlx_replicas.make_pair("qwen3", folder)
    replicas.save_tokenizer(folder)
    pair = dflash_plugin.load(folder, save_draft(tmp_path / "draft"), backend="mlx")
    expected = load(model, draft()).generate(IDS, max_tokens=8, ignore_eos=True)
    found = pair.generate(IDS, max_tokens=8, ignore_eos=True)
    assert found.token_ids == expected.token_ids
    assert found.text == " ".join(f"w{token}" for token in found.token_ids)
    assert pair.backend.eos_token_ids == {2}
    model, tokenizer = model_mlx.load(str(folder))
    texts = model_mlx.stream_generate(model, draft(), tokenizer, "w5 w6", max_tokens=4)
    expected = load(model, draft()).generate([5, 6], max_tokens=4)
    assert [token for r in texts for token in r.tokens] == expected.token_ids


def test_halves_that_do_not_fit_are_refused(target):
    with pytest.raises(PairMismatchError, match=r"embedding is \[64, 32\], expected .* \[64, 48\]"):
        load(target, draft(hidden_size=48))
    with pytest.raises(PairMismatchError, match=r"has 4 decoder layers, expected layers \[9\]"):
        load(target, draft(dflash={"mask_token_id": 63, "target_layer_ids": [9]}))
    with pytest.raises(PairMismatchError, match="block_size is 7"):
        load(target, draft()).generate(IDS, block_size=7, max_tokens=4)
    with pytest.raises(UsageError, match="has token 64"):
        load(target, draft()).generate([64], max_tokens=4)
    with pytest.raises(UsageError, match="dtype is 'float33'"):
        load(target, draft(), dtype="float33")


def test_a_cache_that_cannot_be_rewound_is_refused(target, monkeypatch):
    from mlx_lm.models.cache import QuantizedKVCache

    monkeypatch.setattr(
        "dflash_plugin.backends.mlx_cache.make_prompt_cache", lambda model: [QuantizedKVCache()]
    )
    with pytest.raises(PairMismatchError, match="keeps its state in QuantizedKVCache"):
        load(target, draft())


def test_windows_that_mlx_lm_ignores_are_refused(tmp_path):
    folder = tmp_path / "model"
    mlx_replicas.make_pair("qwen3-sliding", folder)
    replicas.save_tokenizer(folder)
    with pytest.raises(PairMismatchError, match="which mlx_lm's qwen3 ignores"):
        load(folder, draft())
