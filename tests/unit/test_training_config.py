"""A run's file: read strictly, and what it says is possible."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from dflash_plugin.errors import UsageError
from dflash_plugin.training.recipe import config
from dflash_plugin.training.recipe.clock import Clock, seconds

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
MINIMAL = """
name = "x"
out = "out/x"
[target]
model = "demo"
[draft]
layers = 1
block_size = 4
mask_token_id = 1
[[prompts.source]]
kind = "templates"
name = "maths"
count = 5
"""


def read(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return config.load(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path):
    found = config.load(path)
    assert found.prompts.source or found.regenerate.reuse


def test_defaults_and_the_output_folder(tmp_path):
    found = read(tmp_path, MINIMAL)
    assert (found.fit, found.evaluate) == (config.Fit(), config.Evaluate())
    assert found.prompts.source[0].count == 5
    assert config.load(found.path, tmp_path / "other").out == tmp_path / "other"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers = 1", "layer = 1", "layers"),
        ("layers = 1", "layers = 1\nlayerz = 2", "unknown key 'layerz'"),
        ("layers = 1", 'layers = "one"', "expected int"),
        ("layers = 1", "layers = 0", "layers is 0, expected at least 1"),
        ("layers = 1", "layers = 1\ntaps = [3, 1]", "ascending"),
        ("layers = 1", "layers = 1\ntaps = [-1]", "indices from 0"),
        ("layers = 1", "layers = 1\nfull_layers = [1]", "full_layers has 1, expected below 1"),
        ('kind = "templates"', 'kind = "csv"', "kind is 'csv', expected templates"),
        ("count = 5", "", "has no count"),
        ("count = 5", "count = 5\nvary = 2", "vary is 2 for templates, expected 0"),
        ("count = 5", "count = 5\nvary = -1", "vary is -1, expected at least 0"),
        ("[draft]", "[fit]\nema = 1.5\n[draft]", "ema is 1.5"),
        ("[draft]", "[fit]\ndecay = 0\n[draft]", "decay is 0"),
        ("[draft]", "[fit]\ndistill = 0.5\n[draft]", "features.teacher"),
        ("[draft]", '[features]\nhow = "magic"\n[draft]', "expected stored or on-the-fly"),
        ("[draft]", '[regenerate]\nhow = "server"\n[draft]', "model is missing"),
        ("[draft]", '[evaluate]\nurl = "http://x"\n[draft]', "belong together"),
        ("[draft]", "[budget]\nfit = -1\n[draft]", "fit is -1"),
        ("[draft]", "[evaluatee]\n[draft]", "unknown key 'evaluatee'"),
        ("[target]", "[target", "not valid TOML"),
        ("[[prompts.source]]", "[[prompts.sources]]", "unknown key 'sources'"),
    ],
)
def test_errors_name_table_and_key(tmp_path, old, new, message):
    assert old in MINIMAL
    with pytest.raises(UsageError) as caught:
        read(tmp_path, MINIMAL.replace(old, new))
    assert message in str(caught.value) and "run.toml" in str(caught.value)


def test_no_prompts_at_all(tmp_path):
    with pytest.raises(UsageError, match="nothing to train on"):
        read(tmp_path, MINIMAL.partition("[[prompts")[0])


def test_a_key_is_of_what_is_made_not_of_how(tmp_path):
    one = read(tmp_path, MINIMAL)
    how = read(tmp_path, MINIMAL.replace("[draft]", "[fit]\nevaluate_every = 7\n[draft]"))
    what = read(tmp_path, MINIMAL.replace("[draft]", "[fit]\nepochs = 7\n[draft]"))
    assert one.key("fit") == how.key("fit") != what.key("fit")
    assert one.key("draft") == what.key("draft")


def test_budgets_are_times():
    assert [seconds(text) for text in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    for wrong in ("10", "m", "-1m", "0s", "1d"):
        with pytest.raises(UsageError, match="--budget"):
            seconds(wrong)


def test_a_clock_counts_earlier_tries():
    saved: list[float] = []
    clock = Clock(allowed=10.0, spent=20.0, save=saved.append)
    assert clock.over() and saved[0] >= 20.0
    assert not Clock(allowed=100.0, spent=20.0).over()
    assert not Clock().over() and Clock().left is None


def test_the_draft_for_qwen3_8b_is_the_published_one(tmp_path):
    """All of `--dry-run` on that example but the download of the target's config."""
    pytest.importorskip("torch")
    from dflash_plugin.pair import DraftConfig
    from dflash_plugin.training.recipe import models

    target = {
        "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
        "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None,
        "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(target))
    told = config.load(next(path for path in EXAMPLES if path.name == "qwen3-8b.toml"))
    ours = models.draft_config(told, tmp_path)
    path = Path(__file__).parents[1] / "data" / "published_configs.json"
    published = DraftConfig.from_dict(json.loads(path.read_text())["qwen3-8b-dflash"], path)
    for one in fields(DraftConfig):
        if one.name not in ("source", "raw", "rope"):
            assert getattr(ours, one.name) == getattr(published, one.name), one.name
    assert ours.rope["rope_theta"] == published.rope["rope_theta"]
    assert models.describe(ours)["parameters"] == 1_048_626_432
    taps = [models.describe(ours, teacher)["feature_bytes_per_token"] for teacher in (False, True)]
    assert taps == [2 * 5 * 4096, 2 * 6 * 4096]
    assert ours.target_layer_ids == models.default_taps(36)
