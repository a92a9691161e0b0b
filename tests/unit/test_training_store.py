"""Features: stored as they are computed, whole or made again, never of other texts."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from local_replicas import VOCAB  # noqa: E402
from recipe_helpers import (  # noqa: E402
    make_config,
    save_target,
    source_of,
    texts_of,
    write_answers,
)

from dflash_plugin.errors import CacheError, CheckpointError, TrainingError  # noqa: E402
from dflash_plugin.training.recipe import objective, store, tensors  # noqa: E402
from dflash_plugin.training.recipe.clock import Clock  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target") / "model")


def build(told, key: str = "key"):
    source, loaded = source_of(told)
    folder = told.out / "features"
    facts = store.build(told, source.texts, lambda: loaded, folder, key=key, clock=Clock())
    return source, folder, facts


def test_stored_is_computed(tmp_path, target):
    told = make_config(tmp_path, target, features="teacher = true")
    computed, folder, facts = build(told)
    texts = computed.texts
    assert facts["texts"] == 24 and facts["shards"] == 5
    stored = store.Stored(told, texts, folder, "key")
    for indices in ([0], [7, 3, 20], texts.heldout):
        one, other = stored.get(indices), computed.get(indices)
        assert torch.equal(one.batch.ids, other.batch.ids)
        assert one.last is not None and other.last is not None
        for row, end in enumerate(one.batch.ends.tolist()):
            exact = other.taps[row, :end]
            torch.testing.assert_close(one.taps[row, :end].float(), exact, rtol=1e-2, atol=1e-2)
            exact = other.last[row, :end]
            torch.testing.assert_close(one.last[row, :end].float(), exact, rtol=1e-2, atol=1e-2)
            assert not one.taps[row, end:].any()
    torch.testing.assert_close(stored.scale().shape, computed.scale().shape)


def test_the_teacher_says_what_the_target_says(tmp_path, target):
    told = make_config(tmp_path, target, features="teacher = true")
    source, loaded = source_of(told)
    found = source.get([2])
    with torch.no_grad():
        logits = loaded.model(input_ids=found.batch.ids).logits[0]
    assert found.last is not None
    anchors = torch.tensor([[3, 6]])
    said = objective.teacher_at(found.last, anchors, 4) @ loaded.head.T
    for block, anchor in enumerate([3, 6]):  # a label is said by the token before it
        torch.testing.assert_close(said[0, block], logits[anchor : anchor + 3])


def test_what_is_there_is_kept_and_what_is_damaged_is_made_again(tmp_path, target, capsys):
    told = make_config(tmp_path, target)
    source, folder, _ = build(told)
    shards = sorted(folder.glob("shard-*"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    shards[1].write_bytes(before[shards[1]][0][:-100])
    shards[3].unlink()
    with pytest.raises(CheckpointError, match=r"shard-00001.*not readable"):
        store.Stored(told, source.texts, folder, "key")
    build(told)
    assert "shard-00001" in capsys.readouterr().err
    for path, (data, time) in before.items():
        assert path.read_bytes() == data
        assert (path.stat().st_mtime_ns == time) == (path not in (shards[1], shards[3]))


def test_shards_of_other_texts_are_not_taken(tmp_path, target):
    told = make_config(tmp_path, target)
    source, folder, _ = build(told)
    with pytest.raises(CheckpointError, match="other texts or settings"):
        store.Stored(told, source.texts, folder, "another key")
    write_answers(told.out / "answers.jsonl", seed=1)
    with pytest.raises(CheckpointError, match="other texts or settings"):
        store.Stored(told, texts_of(told), folder, "key")
    other, _, _ = build(told)
    store.Stored(told, other.texts, folder, "key")


def test_a_disk_that_is_too_small_is_told_before(tmp_path, target, monkeypatch):
    told = make_config(tmp_path, target)
    monkeypatch.setattr(store, "_SPARE", 1 << 60)
    with pytest.raises(CacheError, match=r"features take .* GB"):
        build(told)


def test_a_disk_that_becomes_full_leaves_no_half_shard(tmp_path, target, monkeypatch):
    told = make_config(tmp_path, target)
    real, calls = tensors.save_file, []

    def full(held, path, metadata):
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half")
            raise tensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        real(held, path, metadata=metadata)

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(CacheError, match="No space left"):
        build(told)
    folder = told.out / "features"
    assert len(list(folder.glob("shard-*"))) == 2 and not list(folder.glob(".*"))
    source, _, _ = build(told)
    store.Stored(told, source.texts, folder, "key")
    assert errno.ENOSPC == 28


def test_texts_are_cut_and_split_alike_in_every_run(tmp_path, target):
    told = make_config(tmp_path, target)
    texts = texts_of(told)
    assert set(texts.heldout).isdisjoint(texts.training)
    assert len(texts.heldout) + len(texts.training) == 24
    assert 3 <= len(texts.heldout) <= 6
    short = replace(told, features=replace(told.features, max_length=7))
    cut = texts_of(short)
    assert {cut.length(i) for i in range(len(cut))} == {7}
    assert cut.heldout == texts.heldout and cut.prompt(3) == texts.prompt(3)
    assert cut.answer(3) == texts.answer(3)[: 7 - len(cut.prompt(3))]
    assert cut.digest() != texts.digest() == texts_of(told).digest() != texts.digest(1)


def test_empty_short_and_foreign_data(tmp_path, target):
    told = make_config(tmp_path, target)
    path = told.out / "answers.jsonl"
    path.parent.mkdir()
    path.write_text("")
    with pytest.raises(TrainingError, match="0 of 0 answers have 3 tokens"):
        texts_of(told)
    write_answers(path)
    none = replace(told, features=replace(told.features, max_length=5))
    with pytest.raises(TrainingError, match="0 of 24 answers have 3 tokens or more within 5"):
        texts_of(none)
    with pytest.raises(TrainingError, match="the target's head has 20 rows"):
        store.Texts(told, path, 20)
    assert store.Texts(told, path, VOCAB).too_short == 0
