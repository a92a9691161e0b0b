"""What the plugin costs an engine process that does not use it."""

from __future__ import annotations

import json
import statistics
import subprocess

from behaviour import RELEASE

from ci import environment
from dflash_plugin import matrix

ROUNDS = 3
LIMIT = 0.05
"""Seconds of processor time."""
MODULES = (
    "vllm.config",
    "vllm.engine.arg_utils",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.spec_decode.eagle",
    "vllm.model_executor.models.qwen3",
)
"""What a CPU worker imports, and with it what shims hook into."""
SCRIPT = f"""
import importlib, json, sys, time
spent = [0.0]
def timed(function):
    def call(*args, **kwargs):
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - start
    return call
import vllm.plugins  # what calls the entry point, and has imported the engine's configuration
def load():
    from dflash_plugin import vllm_entry
    vllm_entry.register()
if sys.argv[1] == "dflash":
    timed(load)()
    from dflash_plugin import shims
    shims._apply = timed(shims._apply)  # what happens as the engine's modules are imported
vllm.plugins.load_general_plugins()
for name in {MODULES!r}:
    importlib.import_module(name)
for line in open("/proc/self/status"):
    if line.startswith("VmRSS:"):
        mib = int(line.split()[1]) / 1024
print(json.dumps({{"seconds": spent[0], "mib": mib}}))
"""


def test_idle_costs_next_to_nothing() -> None:
    """Milliseconds of processor time and below 10 MB a process, against the plugin switched off.

    The time is that of the plugin's own calls: two runs of the whole differ by more.
    """
    engine = matrix.load().engines[RELEASE]
    env = environment.ensure_engine(engine, "cpu", plugin=True)

    def once(plugins: str) -> dict[str, float]:
        variables = {"VLLM_PLUGINS": plugins, "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
        variables |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        command = [str(env.python), "-c", SCRIPT, plugins]
        done = subprocess.run(
            command, cwd="/", env=variables, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    once("dflash")  # byte code and file cache
    pairs = [(once("dflash"), once("")) for _ in range(ROUNDS)]
    seconds = min(a["seconds"] for a, _ in pairs)
    mib = statistics.median(a["mib"] - b["mib"] for a, b in pairs)
    print(f"{RELEASE}: {1000 * seconds:.1f} ms, {mib:.2f} MiB")
    assert 0 < seconds < LIMIT
    assert mib < 10
