"""``python -m ci.replica_builder target|draft FOLDER < SPEC.json``: see ``ci.replicas``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from . import draft, target
from .language import Language

THREADS = 2
"""Always: another number adds in another order, and so trains other weights."""


def main(part: str, folder: Path) -> None:
    """Build one part into ``folder``, as the JSON on standard input says."""
    spec = json.load(sys.stdin)
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    language = Language(**spec["language"])
    with tqdm(desc=part, unit="step", disable=None) as bar:
        if part == "target":
            target.build(spec["target"], language, folder, _report(bar))
            return
        draft.build(spec["pair"], language, folder, _report(bar))
    record = {
        "al": draft.measure(folder, language),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "replica.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _report(bar: tqdm[Any]) -> Callable[[int, int, float], None]:
    def progress(step: int, steps: int, loss: float) -> None:
        bar.total = steps
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(step - bar.n)

    return progress


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
