"""The benchmark on local back-ends: tiny random pairs, and the processes of torchrun."""

from __future__ import annotations

import importlib.util
import json

import pytest
from bench_server import plan

from dflash_plugin import benchmark
from dflash_plugin.bench.local_run import Ranks
from dflash_plugin.errors import UsageError

pytestmark = pytest.mark.torch


@pytest.fixture(params=["transformers", "mlx"])
def pair(request, tmp_path):
    """Back-end and arguments that name a tiny pair."""
    pytest.importorskip("torch", reason="needs torch: `make setup` links it")
    import local_replicas as replicas
    from local_drafts import save_draft

    folder = tmp_path / "target"
    if request.param == "mlx":
        if importlib.util.find_spec("mlx_lm") is None:
            pytest.skip("needs mlx-lm")
        import mlx_replicas

        mlx_replicas.make_pair("qwen3", folder)
    else:
        replicas.make_target("qwen3").save_pretrained(folder)
    replicas.save_tokenizer(folder)
    prompts = tmp_path / "words.jsonl"
    prompts.write_text(
        '{"turns": ["w5 w6", "w7"]}\n{"prompt": "w7 w9 w11"}\n{"prompt": "w20 w21"}\n'
    )
    return request.param, [
        *("--backend", request.param, "--model", folder, "--draft-model"),
        *(save_draft(tmp_path / "draft"), "--dataset", prompts, "--max-samples", 3),
        *("--max-new-tokens", 8, "--rounds", 1, "--out", tmp_path / "out"),
    ]


def test_every_arm_of_a_local_pair(pair, tmp_path):
    name, arguments = pair
    peers = ["--peer", "ngram"] if name == "transformers" else []
    assert benchmark.main([*map(str, arguments), *peers]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    level = summary["datasets"]["words"]["c1"]
    arms = ["base", "dflash", *(["ngram"] if peers else [])]
    assert list(level["arms"]) == arms
    # The second turn is asked only after an answer, and all greedy answers are the same.
    assert level["arms"]["dflash"]["same_tokens"] == {"equal": 4, "compared": 4}
    if peers:
        assert level["arms"]["ngram"]["ok"] == 4
    assert summary["acceptance"]["words"]["dflash"]["al"] >= 1
    assert summary["settings"]["engine"].startswith(("transformers ", "mlx "))


def test_a_peer_that_the_back_end_lacks(pair, capsys):
    assert benchmark.main([*map(str, pair[1]), "--peer", "suffix"]) == 2
    assert "ngram alone" in capsys.readouterr().err


def test_ranks_come_from_torchruns_environment():
    assert Ranks.from_environment({}) == Ranks(0, 1, 0)
    found = Ranks.from_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert found == Ranks(3, 8, 1)
    shares = [Ranks(n, 3).share(plan(7)).datasets[0].items for n in range(3)]
    assert sorted(item.id for share in shares for item in share) == [f"p{i}" for i in range(7)]
    with pytest.raises(UsageError, match="2 prompts for 3 processes"):
        Ranks(2, 3).share(plan(2))
