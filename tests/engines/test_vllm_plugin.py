"""The installed plugin in a real vLLM environment: entry point, doctor, serve, shim."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from ci.environment import Environment
from dflash_plugin import demo
from dflash_plugin.backends.server import ServerClient

ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
ENV.pop("PYTHONPATH", None)


def python(env: Environment, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(env.python), *args], env=ENV, capture_output=True, text=True, check=False
    )


def test_doctor_is_content(plugin_env: Environment, pair: demo.DemoPair) -> None:
    done = python(plugin_env, "-m", "dflash_plugin.cli", "doctor", "--target", "demo", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert found["vllm support"]["detail"].startswith("shim")
    assert found["vllm plugin"]["status"] == "ok"
    assert found["revision"]["status"] == "ok"


def test_idle_plugin_imports_neither_torch_nor_vllm(plugin_env: Environment) -> None:
    code = (
        "import sys, dflash_plugin.vllm_entry as e; e.register(); e.register();"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = python(plugin_env, "-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_context_k_norm_is_still_needed(stock_env: Environment) -> None:
    """Fails once the CPU kernel takes stacked weights: then the shim is to be removed."""
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "import vllm.model_executor.models.qwen3_dflash as m\n"
        "from dflash_plugin.shims.vllm_context_k_norm import SHIM, kernel_is_wrong\n"
        "from dflash_plugin.shims import fingerprint, resolve\n"
        "print(kernel_is_wrong(m.ops))\n"
        "print(all(fingerprint(resolve(m, s)) in k for s, k in SHIM.fingerprints.items()))\n"
    )
    done = python(stock_env, "-c", code)
    assert done.stdout.split()[-2:] == ["True", "True"], done.stdout + done.stderr


LORA = """
import sys
sys.path.insert(0, {root!r})
from types import SimpleNamespace
import torch
import vllm.v1.spec_decode.llm_base_proposer as m
from dflash_plugin.shims.vllm_draft_lora import SHIM

class Wrapped(torch.nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
    weight = property(lambda self: self.base_layer.weight)

def shared():
    # Which of the target's two a draft without its own embedding is given.
    own, target = (SimpleNamespace(embed_tokens=torch.nn.Embedding(4, 2)) for _ in range(2))
    target.embed_tokens = Wrapped(target.embed_tokens)
    draft = SimpleNamespace(has_own_embed_tokens=False, model=own)
    proposer = SimpleNamespace(method="dflash", model=draft)
    m.SpecDecodeBaseProposer._maybe_share_embeddings(proposer, SimpleNamespace(model=target))
    return "table" if own.embed_tokens is target.embed_tokens.base_layer else "wrapper"

m.get_pp_group = lambda: SimpleNamespace(world_size=1)
print(shared())
SHIM.apply(m)
print(shared())
"""


def test_lora_dies_without_the_repair(stock_env: Environment) -> None:
    """Fails once the engine shares the table without its wrapper: then the shim is to go."""
    done = python(stock_env, "-c", LORA.format(root=str(Path(__file__).parents[2])))
    assert done.stdout.split()[-2:] == ["wrapper", "table"], done.stdout + done.stderr


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_serve_command_serves(
    plugin_env: Environment, pair: demo.DemoPair, port: int, tmp_path: Path
) -> None:
    """`dflash-plugin serve demo`: one command, and the server drafts."""
    command = [
        *(str(plugin_env.python), "-m", "dflash_plugin.cli", "serve", "demo", "--"),
        *("--port", str(port), "--host", "127.0.0.1", "--enforce-eager"),
        *("--max-model-len", "1024", "--max-num-seqs", "4", "--served-model-name", "target"),
    ]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command,
            env={**ENV, "VLLM_LOGGING_LEVEL": "DEBUG"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        client = ServerClient(f"http://127.0.0.1:{port}", "target")
        deadline = time.monotonic() + 400
        while not client.ready():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        answer = client.complete(client.chat_prompt("What is 12 plus 30?"), 24)
        assert answer.token_ids
        stats = client.acceptance(4)
        assert stats.drafts > 0
        assert stats.accepted > 0
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
    text = log.read_text()
    assert "DFlash on vllm 0.32.0 on cpu: shim" in text
    assert "context-k-norm: context keys are normalised" in text
