"""The reference's view of an engine's tokens, computed in an environment with torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dflash_plugin
from dflash_plugin.errors import ReplayError

from .environment import Environment

_THREADS = str(max(1, os.cpu_count() or 1))


def replay(
    reference: Environment,
    target: Path,
    draft: Path,
    num_speculative_tokens: int,
    sequences: Sequence[Mapping[str, Any]],
    *,
    dtype: str = "float32",
) -> dict[str, Any]:
    """``python -m dflash_plugin.reference replay`` over ``sequences``.

    Args:
        sequences: dicts with ``id``, ``prompt`` and ``generated`` (token ids).

    Returns:
        Its JSON document: per sequence the steps with ``position``, ``known``, ``draft``,
        ``gaps`` and ``accepted``; over all of them ``al`` and ``stats``.

    Raises:
        ReplayError: the process failed; the message has its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="dflash-replay-") as folder:
        given, found = Path(folder) / "in.json", Path(folder) / "out.json"
        given.write_text(json.dumps({"sequences": list(sequences)}), encoding="utf-8")
        command = [
            *(str(reference.python), "-m", "dflash_plugin.reference", "replay"),
            *("--target", str(target), "--draft", str(draft)),
            *("--k", str(num_speculative_tokens), "--dtype", dtype, "--threads", _THREADS),
            *("--input", str(given), "--output", str(found)),
        ]
        root = str(Path(dflash_plugin.__file__).parents[1])
        env = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
        # On a terminal its progress bar is shown; elsewhere its last lines are kept.
        stderr = None if sys.stderr.isatty() else subprocess.PIPE
        answer = subprocess.run(command, env=env, stderr=stderr, text=True, check=False)
        if answer.returncode != 0:
            lines = (answer.stderr or "see above").splitlines()[-8:]
            tail = "\n".join(f"    | {line}" for line in lines)
            raise ReplayError(
                f"the reference's replay ended with exit code {answer.returncode}\n{tail}",
                hint="run it by hand: " + " ".join(command[:8]),
            )
        try:
            document: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
            ids = [seq["id"] for seq in document["sequences"]]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ReplayError(f"the reference's replay wrote no readable result ({err})") from err
        if ids != [seq["id"] for seq in sequences]:
            raise ReplayError(f"the reference replayed {ids[:5]} …, not the sequences it was given")
        return document
