"""Taps, rewinding and the EOS of Transformers targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from reference_helpers import HIDDEN, VOCAB, make_model, make_target, prompt  # noqa: E402

from dflash_plugin.errors import (  # noqa: E402
    ModelNotFoundError,
    PairMismatchError,
    UsageError,
)
from dflash_plugin.reference.taps import compare_taps  # noqa: E402
from dflash_plugin.reference.target import HFTarget, prefill  # noqa: E402

pytestmark = pytest.mark.torch

SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def hybrid_model() -> Any:
    """A tiny model with recurrent layers."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        max_position_embeddings=256,
    )
    return Qwen3NextForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_taps_are_the_outputs_of_the_layers(kind: str) -> None:
    model, ids = make_model(kind), prompt(9)
    inputs = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    target = HFTarget(model, [2, 0, 3])
    taps = target.session().forward(ids).taps
    assert taps.shape == (9, 3 * HIDDEN)
    first, second, last = taps.split(HIDDEN, dim=1)
    torch.testing.assert_close(first, states[3][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(second, states[1][0], rtol=0, atol=1e-12)
    # The last layer's: before the final norm, unlike Transformers' last hidden state.
    torch.testing.assert_close(last, inputs[0][0], rtol=0, atol=1e-12)
    assert (last - states[4][0]).abs().max() > 0.1


def test_hooks_are_always_removed() -> None:
    target = make_target()
    session, other = target.session(), target.session()
    session.forward(prompt(4))
    other.forward(prompt(3, seed=1))
    with pytest.raises(IndexError):
        session.forward([VOCAB + 5])
    assert not any(module._forward_hooks for module in target.model.modules())


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen3", {}), ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen3", SLIDING)],
    ids=["qwen3", "llama", "tied", "sliding"],
)
def test_incremental_and_rewound_equal_one_pass(
    kind: str, changes: dict[str, Any], use_cache: bool | None
) -> None:
    target = HFTarget(make_model(kind, **changes), [1, 3], use_cache=use_cache)
    assert target.use_cache is (use_cache is None)
    ids, wrong = prompt(24), prompt(8, seed=5)
    whole = HFTarget(target.model, [1, 3], use_cache=False).session().forward(ids)
    session = target.session()
    session.forward(wrong)
    session.rewind(0)
    session.forward(ids[:3])
    session.rewind(3)
    session.forward(ids[3:13])
    session.forward(wrong)
    session.rewind(11)
    assert session.length == 11
    parts = [session.forward(ids[11:12]), session.forward(ids[12:])]
    # Transformers computes norms in float32 whatever the dtype.
    near = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(torch.cat([p.logits for p in parts]), whole.logits[11:], **near)
    torch.testing.assert_close(torch.cat([p.taps for p in parts]), whole.taps[11:], **near)


def test_sessions_do_not_disturb_each_other() -> None:
    target = make_target()
    alone = [target.session().forward(prompt(6, seed=s)).logits[-1] for s in (0, 1)]
    sessions = [target.session(), target.session()]
    for part in (slice(0, 4), slice(4, 6)):
        outputs = [s.forward(prompt(6, seed=i)[part]) for i, s in enumerate(sessions)]
    for output, expected in zip(outputs, alone, strict=True):
        torch.testing.assert_close(output.logits[-1], expected, rtol=0, atol=1e-4)


def test_rows_limit_the_logits_but_not_the_taps() -> None:
    output = make_target().session().forward(prompt(7), rows=2)
    assert output.logits.shape == (2, VOCAB)
    assert output.taps.shape == (7, 2 * HIDDEN)


@pytest.mark.parametrize("chunk", [1, 4, 7, 50])
def test_prefill_in_chunks(chunk: int) -> None:
    target, ids = make_target(), prompt(14)
    whole = target.session().forward(ids)
    outputs = list(prefill(target.session(), ids, chunk=chunk))
    assert [start for start, _ in outputs] == list(range(0, 14, chunk))
    joined = torch.cat([output.logits for _, output in outputs])
    torch.testing.assert_close(joined, whole.logits, rtol=0, atol=1e-4)


def test_recurrent_target_is_recomputed_not_silently_wrong() -> None:
    model, ids = hybrid_model(), prompt(12)
    target = HFTarget(model, [0, 3])
    assert not target.use_cache
    whole = target.session().forward(ids)
    session = target.session()
    session.forward([*ids[:6], 9, 9, 9])
    session.rewind(6)
    rest = session.forward(ids[6:])
    torch.testing.assert_close(rest.logits, whole.logits[6:], rtol=0, atol=1e-4)
    torch.testing.assert_close(rest.taps, whole.taps[6:], rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="linear_attention"):
        HFTarget(model, [0], use_cache=True)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, 2, {2}), ([7, 8], 2, {7, 8}), (5, [2], {5}), (None, [3, 4], {3, 4}), (None, None, {})],
)
def test_eos_tokens(generation: Any, config: Any, expected: Any) -> None:
    target = make_target()
    target.model.generation_config.eos_token_id = generation
    target.config.eos_token_id = config
    assert target.eos_token_ids == frozenset(expected)


def test_tap_beyond_the_last_layer() -> None:
    with pytest.raises(PairMismatchError, match="4 decoder layers"):
        make_target(taps=[1, 4])


def test_head_with_a_bias() -> None:
    model = make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB, dtype=torch.float64))
    with pytest.raises(PairMismatchError, match="bias"):
        HFTarget(model, [1])


def test_load(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "target")
    target = HFTarget.load(tmp_path / "target", [1], dtype=torch.float64)
    assert target.embedding.dtype == torch.float64
    assert target.vocab_size == VOCAB
    expected = make_target(taps=[1]).session().forward(prompt(5))
    found = target.session().forward(prompt(5))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        HFTarget.load(tmp_path / "nowhere", [1])


def test_taps_are_compared_with_hidden_states() -> None:
    """Of the right layers, of those after them, and of other text."""
    target = HFTarget(make_model(), [0, 2])
    ids = [3, 4, 5, 6, 7]
    given = target.session().forward(ids).taps
    for row, tap in zip(compare_taps(target, ids, given), (0, 2), strict=True):
        assert (row.tap, row.nearest) == (tap, tap)
        assert row.distance < 1e-5
    width = given.shape[-1] // 2
    shifted = HFTarget(target.model, [1, 2]).session().forward(ids).taps
    first, second = compare_taps(target, ids, shifted)
    assert (first.tap, first.nearest) == (0, 1)
    assert first.distance > 0.05
    assert second.nearest == 2
    with pytest.raises(PairMismatchError, match="expected"):
        compare_taps(target, ids, given[:, :width])
