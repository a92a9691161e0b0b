"""Matrices packed for the CPU: the same numbers, and the same text."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: `make setup` links it")
pytest.importorskip("transformers")

import local_replicas as replicas  # noqa: E402
from local_drafts import TAPS, random_draft, save_draft  # noqa: E402
from torch import nn  # noqa: E402

from dflash_plugin.backends import transformers_packing as packing  # noqa: E402
from dflash_plugin.backends.transformers_draft import DFlashDraftModel  # noqa: E402
from dflash_plugin.backends.transformers_model import load  # noqa: E402
from dflash_plugin.backends.transformers_packing import PackedLinear, pack  # noqa: E402
from dflash_plugin.reference.loop import generate  # noqa: E402
from dflash_plugin.reference.model import DraftModel  # noqa: E402
from dflash_plugin.reference.target import HFTarget  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not packing.pays(torch.ones(1, 1)), reason="this torch cannot pack"),
]
LENGTH = 16


def packed(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_layer_for_any_rows(dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 96, bias=bias)).to(dtype)
    shapes = ((), (1,), (0,), (1, 8), (2, 3, 5), (70,))
    xs = [torch.randn(*shape, 160).to(dtype) for shape in shapes]
    xs += [torch.randn(160, 9).to(dtype).t(), torch.randn(2, 9, 160).to(dtype)[:, 1:]]
    with torch.inference_mode():
        expected = [model(x) for x in xs]
        assert pack(model) == 1
        for x, wanted in zip(xs, expected, strict=True):
            found = model(x)
            assert (found.dtype, found.shape) == (dtype, wanted.shape)
            close = {"rtol": 0.02, "atol": 0.01} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(found, wanted, **close)


def test_only_plain_layers_that_nothing_else_refers_to_are_packed():
    class Other(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "other": Other(8, 8),
            "sixteen": nn.Linear(8, 8).half(),
            "embedding": nn.Embedding(8, 8),
            "head": nn.Linear(8, 8, bias=False),
        }
    )
    model["head"].weight = model["embedding"].weight
    before = model["embedding"].weight.clone()
    assert pack(model) == 1
    assert packed(model) == ["plain"]
    assert torch.equal(model["embedding"].weight, before)
    assert pack(model) == 0


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "qwen3.5", "gemma4"])
def test_text_is_the_plain_greedy_one(name):
    if not replicas.available(name):
        pytest.skip("this Transformers lacks it")
    model = replicas.make_target(name)
    prompts = [replicas.prompt(length, i) for i, length in enumerate((5, 31))]
    own = [replicas.plain(model, ids, LENGTH) for ids in prompts]
    embedding = model.get_input_embeddings().weight.clone()
    assert pack(model) > 10
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    plain = load(model, None).generate(prompts, max_tokens=LENGTH, ignore_eos=True)
    assert [result.token_ids for result in plain] == own
    texts = [ids + text for ids, text in zip(prompts, own, strict=True)]
    for chance in (0.5, 1.0):
        pair = load(model, replicas.OracleDraft(texts, chance, TAPS))
        results = pair.generate(prompts, max_tokens=LENGTH, ignore_eos=True)
        assert [result.token_ids for result in results] == own


def test_blocks_of_a_packed_draft_are_the_references():
    model = replicas.make_target("qwen3")
    config, weights = random_draft(attention_bias=True)
    target = HFTarget(model, TAPS)
    oracle = DraftModel(config, weights, target.embedding, target.head)
    ids = replicas.prompt(21)
    expected = generate(target, oracle, ids, max_new_tokens=LENGTH, ignore_eos=True)
    draft = DFlashDraftModel(config, weights)
    assert pack(draft) == 1 + 5 * config.num_layers
    found = load(model, draft).generate(ids, max_tokens=LENGTH, ignore_eos=True)
    assert found.token_ids == expected.token_ids
    assert [s.drafted for s in found.steps[1:]] == [s.draft for s in expected.steps]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's smaps")
def test_memory_of_an_embedding_is_given_back_only_where_its_file_has_it(tmp_path):
    path, count = tmp_path / "weights", 3 * mmap.PAGESIZE
    path.write_bytes(bytes([7]) * count)
    kinds = {
        "mapped": torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8),
        "written": torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8),
        "own": torch.full((count,), 7, dtype=torch.uint8),
    }
    kinds["written"][mmap.PAGESIZE] = 8
    expected = {name: tensor.clone() for name, tensor in kinds.items()}
    for name, tensor in kinds.items():
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        assert packing._is_of_a_file(start, start + count) == (name == "mapped")
        packing._release(tensor, read_again=True)
        assert torch.equal(tensor, expected[name])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    target = tmp_path / "target"
    replicas.make_target("qwen3").save_pretrained(target)
    replicas.save_tokenizer(target)
    return target, save_draft(tmp_path / "draft", num_target_layers=4)


def texts(pair: Any) -> list[list[int]]:
    prompts = [replicas.prompt(length, length) for length in (4, 17)]
    return [r.token_ids for r in pair.generate(prompts, max_tokens=LENGTH, ignore_eos=True)]


def test_load_packs_what_it_reads_and_nothing_else(folders):
    target, draft = folders
    pair = load(target, draft, device="cpu")
    assert "lm_head" in packed(pair.backend.target.model)
    assert packed(pair.backend.draft)
    plain = load(target, draft, device="cpu", pack=False)
    assert not packed(plain.backend.target.model) + packed(plain.backend.draft)
    assert texts(pair) == texts(plain)
    held = plain.backend.target.model
    load(held, plain.backend.draft)
    assert not packed(held) + packed(plain.backend.draft)


@pytest.mark.parametrize("failure", [RuntimeError("no oneDNN"), AttributeError("no such operator")])
def test_where_torch_cannot_pack_the_layers_stay(folders, monkeypatch, failure):
    def fail(*_: Any) -> None:
        raise failure

    expected = texts(load(*folders, device="cpu"))
    monkeypatch.setattr(packing, "PackedLinear", fail)
    pair = load(*folders, device="cpu")
    assert not packed(pair.backend.target.model)
    assert texts(pair) == expected
