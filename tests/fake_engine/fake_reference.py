"""A stand-in for ``python -m dflash_plugin.reference replay``, over the fake model.

Faults (mode ``replay``): ``hang`` (touches ``replay-hangs`` in the target's folder first),
``crash``, ``other`` (answers for other sequences), ``garbage`` (writes no JSON).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import fake_model


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="module", required=True)
    parser.add_argument("command")
    for name in ("--target", "--draft", "--input", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", required=True)
    args = parser.parse_args()
    assert (args.module, args.command) == ("dflash_plugin.reference", "replay")
    faults = fake_model.faults(args.target, "replay", args.dtype)
    if "crash" in faults:
        print(*(f"frame {i}" for i in range(20)), "MemoryError", sep="\n", file=sys.stderr)
        sys.exit(1)
    if "hang" in faults:
        (args.target / "replay-hangs").touch()
        time.sleep(600)
    sequences, lengths = [], []
    for seq in json.loads(args.input.read_text(encoding="utf-8"))["sequences"]:
        steps = fake_model.replay(seq["prompt"], seq["generated"], args.k)
        lengths += [step["accepted"] for step in steps]
        name = "other" if "other" in faults else seq["id"]
        sequences.append({"id": name, "steps": steps})
    document = {
        "al": 1 + sum(lengths) / len(lengths) if lengths else None,
        "stats": {
            "drafts": len(lengths),
            "accepted_per_position": [sum(n > i for n in lengths) for i in range(args.k)],
        },
        "versions": {"torch": "none", "transformers": "none"},
        "sequences": sequences,
    }
    text = "garbage" if "garbage" in faults else json.dumps(document)
    args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
