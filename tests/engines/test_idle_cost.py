"""What the plugin costs an engine process that does not use it."""

from __future__ import annotations

import json
import statistics
import subprocess

from behaviour import RELEASE

from ci import environment
from dflash_plugin import matrix

ROUNDS = 7
MODULES = (
    "vllm.config",
    "vllm.engine.arg_utils",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.spec_decode.eagle",
    "vllm.model_executor.models.qwen3",
)
"""What a CPU worker imports, and with it what shims hook into."""
SCRIPT = f"""
import json, os, resource, time
from vllm.plugins import load_general_plugins
import vllm.envs
def now():
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime
def rss():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
start = now()
load_general_plugins()
import importlib
for name in {MODULES!r}:
    importlib.import_module(name)
print(json.dumps({{"seconds": now() - start, "mib": rss()}}))
"""


def test_idle_costs_next_to_nothing() -> None:
    """Below 50 ms of processor time and 10 MB a process, against the plugin switched off."""
    engine = matrix.load().engines[RELEASE]
    env = environment.ensure_engine(engine, "cpu", plugin=True)

    def once(plugins: str) -> dict[str, float]:
        variables = {"VLLM_PLUGINS": plugins, "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
        variables |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        command = [str(env.python), "-c", SCRIPT]
        done = subprocess.run(
            command, cwd="/", env=variables, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    once("dflash")  # byte code and file cache
    pairs = [(once("dflash"), once("")) for _ in range(ROUNDS)]
    seconds = statistics.median(a["seconds"] - b["seconds"] for a, b in pairs)
    mib = statistics.median(a["mib"] - b["mib"] for a, b in pairs)
    print(f"{RELEASE}: {1000 * seconds:.1f} ms, {mib:.2f} MiB")
    assert seconds < 0.050
    assert mib < 10
