"""The trainable draft against the reference: what is trained is what is decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from reference_helpers import HIDDEN, TAPS, VOCAB, draft_json, make_target  # noqa: E402

from dflash_plugin.errors import CheckpointError, PairMismatchError  # noqa: E402
from dflash_plugin.pair import DraftConfig, LayerAttention, preflight  # noqa: E402
from dflash_plugin.reference.model import DraftModel, visible  # noqa: E402
from dflash_plugin.training.draft import TrainableDraft, visible_rows  # noqa: E402
from dflash_plugin.training.export import export  # noqa: E402
from dflash_plugin.training.features import channel_scale, tapped  # noqa: E402

pytestmark = pytest.mark.torch

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED = {"use_sliding_window": True, "sliding_window": 5}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "all sliding, causal": {"layer_types": [SLIDING] * 2, **WINDOWED},
    "window below the block": {"layer_types": [SLIDING] * 2, **WINDOWED, "sliding_window": 3},
    "mixed": {
        "layer_types": [SLIDING, SLIDING, FULL],
        "num_hidden_layers": 3,
        **WINDOWED,
    },
    "sliding, not causal": {"layer_types": [SLIDING] * 2, **WINDOWED, "is_causal": False},
    "full, causal": {"is_causal": True},
    "scaled and capped": {"input_embedding_scale": 8.0, "final_logit_softcapping": 3.0},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    },
    "biases": {"attention_bias": True},
}


def trainable(seed: int = 0, **changes: Any) -> TrainableDraft:
    """A float64 draft with norms and biases that are not their initial ones and zeros."""
    generator = torch.Generator().manual_seed(seed)

    def table() -> Any:
        return torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)

    config = DraftConfig.from_dict(draft_json(**changes), Path("config.json"))
    draft = TrainableDraft(config, table(), table(), seed=seed).double()
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise)
        draft.tap_scale.copy_(0.5 + torch.rand(draft.tap_scale.shape, generator=generator))
    return draft


def reference_of(draft: TrainableDraft) -> DraftModel:
    return DraftModel(draft.config, draft.published(), draft._embedding, draft._head)


@pytest.mark.parametrize("kind", KINDS)
def test_every_anchor_gets_what_the_reference_decodes_there(kind):
    draft = trainable(**KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    texts, length, size = 2, 24, draft.config.block_size
    ids = torch.randint(0, VOCAB, (texts, length), generator=generator)
    taps = torch.randn(texts, length, len(TAPS) * HIDDEN, generator=generator, dtype=torch.float64)
    anchors = torch.tensor([[1, 4, 5, 19, 23], [23, 7, 1, 12, 12]])
    logits = draft(taps, ids, anchors)
    reference = reference_of(draft)
    for text in range(texts):
        for number, anchor in enumerate(anchors[text].tolist()):
            cache = reference.new_cache()
            reference.append(cache, taps[text, :anchor])
            expected = reference.draft_logits(cache, int(ids[text, anchor]), size - 1)
            torch.testing.assert_close(logits[text, number], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", [
    LayerAttention(None, False), LayerAttention(None, True),
    LayerAttention(4, False), LayerAttention(4, True), LayerAttention(9, True),
])  # fmt: skip
def test_rows_see_what_visible_says_of_context_and_own_block(attention):
    anchors, length, size = torch.tensor([[3, 9, 6]]), 11, 5
    mask = visible_rows(anchors, length, size, attention)[0]
    for number, anchor in enumerate(anchors[0].tolist()):
        block = torch.arange(anchor, anchor + size)
        rows = slice(number * size, (number + 1) * size)
        own = slice(length + rows.start, length + rows.stop)
        context = torch.arange(length)
        expected = visible(block, context, attention) & (context < anchor)
        assert torch.equal(mask[rows, :length], expected)
        assert torch.equal(mask[rows, own], visible(block, block, attention))
        others = mask[rows, length:].clone()
        others[:, rows] = False
        assert not others.any(), "blocks of one text must not see each other"


def test_nothing_at_or_after_the_anchor_reaches_its_block():
    draft = trainable()
    taps = torch.randn(1, 12, len(TAPS) * HIDDEN, dtype=torch.float64)
    ids = torch.arange(12)[None]
    before = draft(taps, ids, torch.tensor([[6]]))
    taps[:, 6:] += 100.0
    ids[:, 7:] = 3
    assert torch.equal(draft(taps, ids, torch.tensor([[6]])), before)


def test_batched_features_are_the_sessions_taps():
    target = make_target()
    ids = torch.randint(3, 48, (3, 17), generator=torch.Generator().manual_seed(0))
    batched = tapped(target, ids)
    for row, found in zip(ids.tolist(), batched, strict=True):
        torch.testing.assert_close(found, target.session().forward(row).taps)
    assert not batched.requires_grad
    assert not batched.is_inference()


def test_channel_scale_leaves_the_first_position_out():
    taps = torch.ones(2, 5, 3) * torch.tensor([2.0, 1.0, 0.0])
    taps[:, 0] = 1e6
    torch.testing.assert_close(channel_scale(taps), torch.tensor([2.0, 1.0, 1e-3]))


def test_same_seed_same_weights():
    one, same, other = (trainable(seed).published() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


def test_a_config_that_the_reference_refuses_is_refused():
    with pytest.raises(PairMismatchError, match="hidden_act"):
        trainable(hidden_act="relu")


@pytest.mark.parametrize("kind", KINDS)
def test_exported_folder_is_the_published_format(tmp_path, kind):
    draft = trainable(**KINDS[kind])
    target = tmp_path / "target"
    make_target().model.to(torch.float32).save_pretrained(target)
    export(draft, tmp_path / "draft", dtype=torch.float64)
    checks = preflight(target, tmp_path / "draft")
    assert {check.status for check in checks} == {"ok"}, checks
    loaded = DraftModel.load(tmp_path / "draft", draft._embedding, draft._head, dtype=torch.float64)
    assert loaded.config.layers == draft.config.layers
    taps = torch.randn(7, len(TAPS) * HIDDEN, dtype=torch.float64)
    caches = [model.new_cache() for model in (loaded, reference_of(draft))]
    for model, cache in zip((loaded, reference_of(draft)), caches, strict=True):
        model.append(cache, taps)
    expected = reference_of(draft).draft_logits(caches[1], 7, 5)
    torch.testing.assert_close(loaded.draft_logits(caches[0], 7, 5), expected)


def test_export_is_bfloat16_and_says_so(tmp_path):
    export(trainable(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"


def test_export_refuses_weights_that_are_not_finite(tmp_path):
    draft = trainable()
    with torch.no_grad():
        draft.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"norm\.weight is not finite"):
        export(draft, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
