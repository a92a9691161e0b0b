"""``ci/data/replicas.toml`` and the language that its pairs speak."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from pairs import write_config, write_weights

from ci import prompts, replica_specs, replica_traits
from ci.replica_builder import tokenizer
from ci.replica_builder.language import Language
from ci.replica_builder.prompts import LENGTHS, LONG, SHORT
from dflash_plugin import matrix
from dflash_plugin.errors import MatrixError, UnknownCellError
from dflash_plugin.pair import DraftConfig, preflight

SPECS = replica_specs.load()
GOOD = """
[language]
seed = 1
words = 8
topics = 2
[[target]]
id = "small"
seed = 1
steps = 10
learning_rate = 1e-3
config = { model_type = "qwen3" }
[[pair]]
id = "tiny"
target = "small"
seed = 1
steps = 5
learning_rate = 1e-3
[pair.draft]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 1
num_attention_heads = 2
vocab_size = 64
block_size = 8
dflash_config = { mask_token_id = 5, target_layer_ids = [1] }
"""


def load(folder: Path, old: str = "", new: str = "") -> replica_specs.Specs:
    assert old in GOOD
    path = folder / "replicas.toml"
    path.write_text(GOOD.replace(old, new, 1) if old else GOOD, encoding="utf-8")
    return replica_specs.load(path)


# --- the file ---


def test_a_good_file(tmp_path):
    specs = load(tmp_path)
    assert specs.pair("tiny").target is specs.targets["small"]
    assert json.dumps(specs.for_pair(specs.pair("tiny")))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("words = 8", "wrods = 8", "missing key 'words'"),
        ("topics = 2", "topics = 2\ncolour = 1", "unknown key 'colour'"),
        ("topics = 2", "topics = 0", "topics is 0, expected at least 1"),
        ('target = "small"', 'target = "smal"', "names 'smal', which is not defined"),
        ("steps = 10", "steps = 0", "steps is 0, expected at least 1"),
        ("learning_rate = 1e-3", 'learning_rate = "high"', "learning_rate is 'high'"),
        ("block_size = 8", "", "draft: .*block_size"),
        ("block_size = 8", "block_size = 1", "draft: .*block_size is 1"),
        ('id = "tiny"', 'id = "Tiny"', "expected lower case"),
        ('config = { model_type = "qwen3" }', "", "missing key 'config'"),
        ("[language]", "colour = 1\n[language]", "top level: unknown key 'colour'"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_field(tmp_path, old, new, words):
    with pytest.raises(MatrixError, match=words) as caught:
        load(tmp_path, old, new)
    assert str(tmp_path / "replicas.toml") in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(MatrixError, match="No such file"):
        replica_specs.load(tmp_path / "none.toml")


def test_an_unknown_replica_suggests_the_near_ones():
    with pytest.raises(UnknownCellError, match="tiny-qwen3"):
        SPECS.pair("tiny-qwen")


def test_the_matrix_and_the_specs_name_the_same_replicas():
    named = {pair.replica for pair in matrix.load().pairs.values() if pair.replica}
    assert named == set(SPECS.pairs)


@pytest.mark.parametrize("name", SPECS.pairs)
def test_every_pair_passes_the_preflight(tmp_path, name):
    spec = SPECS.pair(name)
    target = write_config(tmp_path / "target", dict(spec.target.config))
    write_weights(target / "model.safetensors", {"model.norm.weight": (8,)})
    draft = write_config(tmp_path / "draft", dict(spec.draft))
    write_weights(draft / "model.safetensors", DraftConfig.from_dir(draft).tensor_shapes())
    row = next(pair for pair in matrix.load().pairs.values() if pair.replica == name)
    checks = preflight(target, draft, row.num_speculative_tokens)
    assert {check.status for check in checks} == {"ok"}, checks
    # Every prompt and a long text fit, and sliding layers see less than the longest prompts.
    config = DraftConfig.from_dir(draft)
    assert config.max_position_embeddings >= 8192
    windows = [layer.window for layer in config.layers if layer.window]
    assert all(window < LENGTHS[-1] / 4 for window in windows)


def test_traits_that_replicas_are_there_for():
    drafts = {n: DraftConfig.from_dict(p.draft, SPECS.path) for n, p in SPECS.pairs.items()}
    kinds = {n: {layer.window is None for layer in d.layers} for n, d in drafts.items()}
    assert kinds["tiny-qwen3"] == {True}
    assert kinds["tiny-qwen3-swa"] == {False}
    assert (
        kinds["tiny-qwen3-mixed"] == kinds["tiny-gemma4"] == kinds["tiny-qwen35"] == {True, False}
    )
    for name, draft in drafts.items():
        target = SPECS.pair(name).target.config
        sizes = {target["head_dim"], target.get("global_head_dim")}
        # One size of head in both is a trait too: of the first Qwen3 drafts and of gpt-oss.
        same = name in ("tiny-qwen3-tied", "tiny-gpt-oss-20b", "tiny-gpt-oss-120b")
        assert (draft.head_dim in sizes) == same, name
        if target["model_type"].startswith("qwen"):
            assert tokenizer.SIZE <= draft.mask_token_id < draft.vocab_size
    gemma = drafts["tiny-gemma4"]
    assert gemma.input_embedding_scale == pytest.approx(gemma.hidden_size**0.5)
    assert gemma.final_logit_softcapping == 30.0
    assert gemma.mask_token_id == tokenizer.SPECIAL.index("<mask>")


# --- which published pair a replica stands for ---

ROWS = [row for row in matrix.load().pairs.values() if row.status == matrix.PUBLISHED]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_every_published_pair_has_a_replica_of_its_family_with_its_traits(row):
    spec = replica_traits.stand_in(row)
    assert set(replica_traits.of_pair(row)) <= set(replica_traits.of_replica(spec))
    family = spec.target.config["model_type"].removesuffix("_text")
    assert family == {"kimi_k25": "deepseek_v3"}.get(
        row.target_shape.model_type, row.target_shape.model_type
    )


def test_traits_of_replicas_are_those_they_are_there_for():
    kept = {name: set(replica_traits.of_replica(spec)) for name, spec in SPECS.pairs.items()}
    for name, trait in {
        "tiny-qwen3-tied": "tied-head", "tiny-gpt-oss-20b": "taps-mixed",
        "tiny-gpt-oss-120b": "taps-full-only", "tiny-kimi-k2": "mla",
        "tiny-minimax-m2": "partial-rotary", "tiny-gemma4": "three-head-sizes",
        "tiny-gemma4-moe": "moe", "tiny-qwen35": "taps-mixed",
        "tiny-qwen35-linear": "taps-linear-only", "tiny-qwen3-next": "taps-full-only",
        "tiny-llama": "llama3-rope",
    }.items():  # fmt: skip
        assert trait in kept[name], name
    assert "moe" not in kept["tiny-gemma4"]
    # A shifted tap is another layer's output in every pair, and there is such a layer.
    for spec in SPECS.pairs.values():
        assert (
            max(spec.draft["dflash_config"]["target_layer_ids"]) + 1
            < (spec.target.config["num_hidden_layers"])
        )


def test_a_trait_that_no_replica_keeps_is_an_error():
    row = matrix.load().pair("kimi-k2.5")
    few = replace(SPECS, pairs={name: SPECS.pairs[name] for name in ("tiny-qwen3", "tiny-llama")})
    with pytest.raises(UnknownCellError, match="deepseek_v3 keeps mla, moe, yarn, which kimi"):
        replica_traits.stand_in(row, few)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3.8-27b-dflash2", "glm-5.1"])
def test_pairs_that_are_to_have_no_replica(name):
    assert replica_traits.stand_in(matrix.load().pair(name)) is None


# --- like ---


def test_like_takes_an_earlier_rows_config_but_for_its_own(tmp_path):
    path = tmp_path / "replicas.toml"
    path.write_text(
        GOOD
        + """
[[pair]]
id = "other"
target = "small"
like = "tiny"
seed = 2
steps = 5
learning_rate = 1e-3
draft = { block_size = 4 }
"""
    )
    specs = replica_specs.load(path)
    assert specs.pair("other").draft == {**specs.pair("tiny").draft, "block_size": 4}


def test_like_an_unknown_row_is_an_error(tmp_path):
    with pytest.raises(MatrixError, match="names 'tinny', which is not defined"):
        load(tmp_path, 'id = "tiny"', 'id = "tiny"\nlike = "tinny"')


# --- the language ---


def test_the_same_seed_speaks_the_same():
    def texts(seed: int, chance: int) -> list:
        language, drawn = Language(seed), random.Random(chance)
        return [language.turn(drawn, background=size) for size in (0, 50, 500)]

    assert texts(1, 1) == texts(1, 1)
    assert texts(1, 1) != texts(2, 1)
    assert texts(1, 1) != texts(1, 2)


def test_an_answer_follows_the_ring_of_its_topic():
    """One successor per word and topic, but for the few words that are drawn freely."""
    language, chance = Language(3, words=10, topics=2), random.Random(0)
    after: dict[tuple[str, str], dict[str, int]] = {}
    for topic in language.topics:
        sentences = language.sentences(chance, topic, language.words[0])
        for _ in range(300):
            name, _, text = next(sentences).partition(": ")
            words = text.rstrip(".").split()
            for word, follower in itertools.pairwise(words):
                counts = after.setdefault((name, word), {})
                counts[follower] = counts.get(follower, 0) + 1
    assert len(after) == 20
    usual = {key: max(counts, key=counts.get) for key, counts in after.items()}
    shares = [max(counts.values()) / sum(counts.values()) for counts in after.values()]
    assert min(shares) > 0.8
    assert max(shares) < 1 or len(set(shares)) > 1
    one, other = language.topics
    assert [usual[one, word] for word in language.words] != [
        usual[other, word] for word in language.words
    ]


def test_some_answers_are_json():
    chance, language = random.Random(0), Language(0)
    turns = [language.turn(chance) for _ in range(200)]
    records = [json.loads(t.answer) for t in turns if t.request.startswith("JSON")]
    assert 30 < len(records) < 100
    assert all(len(r["words"]) == r["count"] and r["topic"] in language.topics for r in records)


def test_prompts_have_the_lengths_they_say_and_ask_for_different_things():
    rows = prompts.of_replicas()
    assert [len(tokenizer.chat(row.text)) for row in rows] == list(LENGTHS)
    assert (min(LENGTHS), max(LENGTHS), len(rows)) == (8, 1000, 24)
    assert [row.kind for row in rows] == [SHORT] * 12 + [LONG] * 12
    asked = [" ".join(row.text.split()[-3:]) for row in rows]
    assert len(set(asked)) == len(rows)
    assert rows == prompts.of_replicas()
    assert all(row.text == row.text.strip() for row in rows)


def test_the_tokenizer_is_the_one_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(loaded) == tokenizer.SIZE
    text = 'kalo: {"a": [1, 2]}\n\tÄ€ 汉字'
    ids = tokenizer.encode(text)
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == text
    message = [{"role": "user", "content": text}]
    chat = loaded.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert list(chat) == tokenizer.chat(text)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.BOS, tokenizer.EOS, tokenizer.PAD,
    )  # fmt: skip
    assert loaded.convert_tokens_to_ids("<mask>") == 4
    answered = [*message, {"role": "assistant", "content": "x"}, *message]
    ids = loaded.apply_chat_template(answered, add_generation_prompt=True, return_dict=False)
    assert list(ids).count(tokenizer.EOS) == 1
