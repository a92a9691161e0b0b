"""Prompts of a run: our own packaged ones, or JSONL files the user names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_plugin.errors import UsageError

from . import replica_specs
from .replica_builder.prompts import prompts as replica_prompts

PACKAGED = Path(__file__).parent / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One user message. ``kind`` groups results: maths, code, chat, a data set's name."""

    id: str
    kind: str
    text: str


def load(specs: Sequence[str] = ()) -> list[Prompt]:
    """Prompts of ``FILE[:COUNT]`` each; none: the packaged ones.

    A line is a JSON object with ``prompt`` (or GSM8K's ``question``), and optionally
    ``id`` (or HumanEval's ``task_id``) and ``kind`` (default: the file's name). A HumanEval
    line (one with ``entry_point``) becomes a request to complete the function.

    Raises:
        UsageError: names file, line and field.
    """
    if not specs:
        return _read(PACKAGED, None)
    prompts: list[Prompt] = []
    for spec in specs:
        name, _, count = spec.rpartition(":")
        if name and count.isdigit():
            prompts += _read(Path(name), int(count))
        else:
            prompts += _read(Path(spec), None)
    ids = [prompt.id for prompt in prompts]
    double = next((id_ for id_ in ids if ids.count(id_) > 1), None)
    if double:
        raise UsageError(f"prompt id {double!r} occurs twice", hint="give every line its own id")
    return prompts


def of_replicas() -> list[Prompt]:
    """The prompts that every replica is run with: they speak its language."""
    language = replica_specs.load().language.language()
    return [Prompt(row.id, row.kind, row.text) for row in replica_prompts(language)]


def digest(prompts: Sequence[Prompt]) -> str:
    """A short hash over ids and texts: names a prompt set in results."""
    lines = "\n".join(json.dumps([p.id, p.text]) for p in prompts)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts in a fixed order that keeps the shares of the kinds."""
    by_kind: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_kind.setdefault(prompt.kind, []).append(prompt)
    ranked = [
        ((i + 0.5) / len(rows), prompt.id, prompt)
        for rows in by_kind.values()
        for i, prompt in enumerate(rows)
    ]
    return [prompt for _, _, prompt in sorted(ranked, key=lambda r: r[:2])[:count]]


def _read(path: Path, count: int | None) -> list[Prompt]:
    try:
        # Not splitlines(): text inside a JSON string may hold U+2028 and the like.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        reason = getattr(err, "strerror", None) or err
        raise UsageError(
            f"{path}: cannot be read ({reason})", hint="--prompts takes FILE.jsonl[:COUNT]"
        ) from err
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if count is not None and len(prompts) == count:
            break
        try:
            prompts.append(_prompt(json.loads(line), path, number))
        except (ValueError, KeyError, TypeError) as err:
            raise UsageError(
                f"{path}:{number}: expected an object with a string `prompt` or `question` ({err})",
                hint="one JSON object a line",
            ) from err
    if not prompts or (count is not None and len(prompts) < count):
        raise UsageError(f"{path}: {len(prompts)} prompts, expected {count or 'at least one'}")
    return prompts


def _prompt(row: dict[str, Any], path: Path, number: int) -> Prompt:
    text = row["prompt"] if "prompt" in row else row["question"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("empty text")
    if "entry_point" in row:
        text = f"Complete this Python function.\n\n```python\n{text.rstrip()}\n```"
    stem = path.name.partition(".")[0]
    name = row.get("id") or row.get("task_id") or f"{stem}-{number}"
    return Prompt(str(name), str(row.get("kind") or stem), text)
