"""SGLang's own arguments under DFlash: what is refused before anything is loaded, and how."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from pairs import make_draft, make_target, write_config

from dflash_plugin import cli, engines, launch, sglang_args
from dflash_plugin.errors import UsageError
from dflash_plugin.support import Level, Support


def check(line: str, platform: str = "cuda", k: int = 7, **facts: Any) -> None:
    sglang_args.check(shlex.split(line), platform, k, **facts)


GPTQ = {"quantization_config": {"quant_method": "gptq", "lm_head": True}}
COMPRESSED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"]}},
        "ignore": ["re:.*gate$"],
    }
}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--pp-size 1 --tp-size 4 --page-size 16",
        "--enable-dp-attention --dp-size 2 --enable-dp-lm-head",
        "--attn-dp-size 1",
        "--speculative-draft-attention-backend=fa4 --attention-backend trtllm_mha",
        "--speculative-draft-window-size 8",
        "--port 1 --json-model-override-args {}",
    ],
)
def test_what_dflash_runs_with(line):
    check(line)


@pytest.mark.parametrize(
    ("line", "platform", "message", "remedy"),
    [
        ("--pp-size 2", "cuda", "--pp-size 2: .*one pipeline stage", "--tp-size 2"),
        ("--pipeline-parallel-size=4", "cuda", "one pipeline stage", "--tp-size 4"),
        ("--enable-dp-attention", "cuda", "needs the head spread", "add --enable-dp-lm-head"),
        ("--attn-dp-size 2", "cuda", "--attn-dp-size 2: ", "add --enable-dp-lm-head"),
        ("--enable-dp-attention --enable-dp-lm-head", "cpu", "CUDA and NPU", "drop it"),
        (
            "--speculative-draft-attention-backend torch_native",
            "cuda",
            "on cuda with flashinfer or fa3",
            "drop it",
        ),
        ("--speculative-draft-attention-backend", "cuda", r"\(no value\)", "choose one"),
        ("--speculative-draft-attention-backend fa3", "cpu", "with torch_native", "drop it"),
        ("--attention-backend triton", "cpu", "on the CPU with torch_native", "drop it"),
        ("--speculative-draft-window-size 4", "cuda", "one block, which is 8", "8 or more"),
        ("--page-size 0", "cuda", "--page-size: expected a whole number", "correct it"),
        ("--page-size big", "cuda", "found big", "correct it"),
        ("--tp-size --port 1", "cuda", "--tp-size: .*found nothing", "correct it"),
    ],
)
def test_what_it_does_not_run_with(line, platform, message, remedy):
    with pytest.raises(UsageError, match=message) as caught:
        check(line, platform)
    assert caught.value.exit_code == 2
    assert remedy in caught.value.hint


@pytest.mark.parametrize("config", [GPTQ, COMPRESSED, {"text_config": COMPRESSED}])
def test_a_quantised_head_needs_one_rank(config):
    with pytest.raises(UsageError, match="lm_head is quantised") as caught:
        check("--tp-size 2", target=lambda: config)
    assert "--tp-size 1" in caught.value.hint
    check("--tp-size 1", target=lambda: config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {**COMPRESSED["quantization_config"], "ignore": ["lm_head"]}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": None}},
        {"quantization_config": "fp8"},
    ],
)
def test_a_head_that_is_not(config):
    check("--tp-size 2", target=lambda: config)


def test_a_draft_backend_that_would_be_replaced_silently():
    line = "--speculative-draft-attention-backend trtllm_mha"
    with pytest.raises(UsageError, match="takes another without asking") as caught:
        check(line, all_sliding_or_causal=lambda: False)
    assert "flashinfer" in caught.value.hint
    check(line, all_sliding_or_causal=lambda: True)
    check(line)  # not known


# --- through `serve` -------------------------------------------------------------------------


@pytest.fixture(name="pair")
def pair_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of ``serve`` that name a good pair; SGLang on a GPU is there, and supported."""
    found = engines.Installed("sglang", "sglang", "0.5.23", "cuda", None, str(tmp_path))
    decision = Support("sglang", "0.5.23", "cuda", Level.NATIVE, "its own dflash")
    monkeypatch.setattr(launch, "require_engine", lambda *_: (found, decision))
    target, draft = make_target(tmp_path / "target"), make_draft(tmp_path / "draft")
    return ["serve", str(target), "--draft", str(draft), "--engine", "sglang", "--dry-run"]


def test_the_command(pair, capsys):
    assert cli.main([*pair, "--", "--port", "1"]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[1:5] == ["-m", "sglang.launch_server", "--model-path", pair[1]]
    assert command[5:] == [
        *("--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", pair[3]),
        *("--speculative-num-draft-tokens", "8", "--port", "1"),
    ]


def test_the_known_token_is_one_of_the_block(pair, capsys):
    assert cli.main([*pair, "--k", "3"]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[command.index("--speculative-num-draft-tokens") + 1] == "4"


@pytest.mark.parametrize(
    "given",
    [
        ["--speculative-algorithm", "EAGLE"],
        ["--speculative-algo=DFLASH"],
        ["--speculative-draft-model-path", "x"],
        ["--speculative-num-draft-tokens", "8"],
        ["--speculative-dflash-block-size", "8"],
        ["--model-path", "x"],
    ],
)
def test_what_serve_writes_is_not_set_twice(pair, capsys, given):
    assert cli.main([*pair, "--", *given]) == 2
    assert "is written by `serve`" in capsys.readouterr().err


def test_limits_end_with_2(pair, capsys):
    assert cli.main([*pair, "--", "--pp-size", "2"]) == 2
    assert "next step: " in capsys.readouterr().err
    path = Path(pair[1])
    assert cli.main([*pair, "--", "--speculative-draft-attention-backend", "trtllm_mha"]) == 2
    assert "takes another without asking" in capsys.readouterr().err
    write_config(path, json.loads((path / "config.json").read_text()) | GPTQ)
    assert cli.main([*pair, "--", "--tp-size", "2"]) == 2
    assert "lm_head is quantised" in capsys.readouterr().err


def test_on_the_cpu_the_device_is_said():
    cpu = engines.Installed("sglang", "sglang", "0.5.23", "cpu", None)
    assert engines.serve_command("python", cpu, "t", ["--port", "1"])[0][5:] == [
        *("--device", "cpu", "--port", "1"),
    ]
    assert engines.serve_command("python", cpu, "t", ["--device", "xpu"])[0][5:] == [
        *("--device", "xpu"),
    ]


def test_a_draft_of_the_hub_is_pinned():
    assert engines.speculation("sglang", "org/draft", 15, "abc")[4:] == [
        *("--speculative-draft-model-revision", "abc", "--speculative-num-draft-tokens", "16"),
    ]
