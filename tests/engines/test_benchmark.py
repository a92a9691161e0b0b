"""The benchmark over several processes, and what its load generator can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ci import load_bench
from dflash_plugin import benchmark
from dflash_plugin.bench.records import read

pytestmark = pytest.mark.engine


def test_torchrun_shares_the_prompts_and_one_process_reports(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="needs torch: `make setup` links it")
    monkeypatch.syspath_prepend("tests/unit")
    import local_replicas as replicas
    from local_drafts import save_draft

    folder = tmp_path / "target"
    replicas.make_target("qwen3").save_pretrained(folder)
    replicas.save_tokenizer(folder)
    prompts = tmp_path / "words.jsonl"
    prompts.write_text(
        '{"turns": ["w5 w6", "w7"]}\n{"prompt": "w7 w9 w11"}\n{"prompt": "w20 w21"}\n'
    )
    arguments = [
        *("--backend", "transformers", "--model", folder, "--draft-model"),
        *(save_draft(tmp_path / "draft"), "--dataset", prompts, "--max-samples", 3),
        *("--max-new-tokens", 8, "--rounds", 1, "--out", tmp_path / "out", "--device", "cpu"),
    ]
    arguments = [str(argument) for argument in arguments]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29719"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dflash_plugin.benchmark", *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "dflash" in told[0][0] and not told[1][0]
    ids = [
        {line["id"] for line in read(tmp_path / "out" / f"rank-{n}" / "records.jsonl")
         if line["type"] == "request"}
        for n in range(2)
    ]  # fmt: skip
    assert (len(ids[0]), len(ids[1]), ids[0] & ids[1]) == (2, 1, set())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["datasets"]["words"]["c1"]["arms"]["dflash"]["ok"] == 4
    assert benchmark.main(["--report-only", "--out", str(tmp_path / "out")]) == 0


def test_the_generator_is_not_the_bottleneck(tmp_path):
    """By the processor time it needs: what else runs on the machine does not count."""
    out = tmp_path / "load.json"
    assert load_bench.main(["--seconds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    requests = max(row["requests_per_cpu_second"] for row in rows if row["tokens"] == 1)
    tokens = max(row["tokens_per_cpu_second"] for row in rows if row["per_event"] == 1)
    assert requests >= 2_000
    assert tokens >= 100_000
