"""Run by an engine environment's own python: is registering dflash still needed and possible?

Prints one JSON object: what the published engine does with the method, and whether every
registering shim knows the sources it meets.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from vllm.config.speculative import SpeculativeConfig

from dflash_plugin import shims

report: dict = {"methods": str(SpeculativeConfig.__annotations__["method"]), "unknown": []}
try:
    SpeculativeConfig(method="dflash", model="draft", num_speculative_tokens=1)
    report["refused"] = ""
except Exception as err:
    report["refused"] = f"{type(err).__name__}: {err}"
for name in sorted(shims.NAMES):
    if name.startswith("register-"):
        shim = shims.load(name)
        module = importlib.import_module(shim.module)
        for symbol, known in shim.fingerprints.items():
            found = shims.fingerprint(shims.resolve(module, symbol))
            if found not in known:
                report["unknown"].append(f"{name}: {symbol} is {found}")
print(json.dumps(report))
