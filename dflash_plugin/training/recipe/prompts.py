"""A prompt, and what may never be one: the prompts that drafts are measured on."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...errors import UsageError

PACKAGED_EXCLUSIONS = Path(__file__).with_name("test_prompts.sha256")
"""Fingerprints of the data sets that drafts are measured on (GSM8K test, HumanEval, our own)."""
WINDOW = 13
"""So many words in a row that are also in a test prompt make a prompt one of them."""
_WORD = re.compile(r"\w+")

Message = Mapping[str, str]


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the answer; ``id`` is a hash of it, ``kind`` groups results.

    The first half of a variation's id is that of the prompt it was made from.
    """

    id: str
    kind: str
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, kind: str, messages: Sequence[Message]) -> Prompt:
        """With the id that its messages have."""
        text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
        return cls(hashlib.sha256(text.encode()).hexdigest()[:16], kind, tuple(messages))

    @property
    def text(self) -> str:
        """What all its messages say."""
        return "\n".join(message["content"] for message in self.messages)

    def to_json(self) -> str:
        """One line."""
        told = {"id": self.id, "kind": self.kind, "messages": list(self.messages)}
        return json.dumps(told, ensure_ascii=False)


class Exclusions:
    """Texts that are never trained on, known by hashes of their windows of words."""

    def __init__(self, hashes: Iterable[str] = ()) -> None:
        self.hashes = set(hashes)

    @classmethod
    def load(cls, paths: Sequence[str]) -> Exclusions:
        """The packaged list and the user's: ``.sha256`` lists, or JSONL with any text fields.

        Raises:
            UsageError: a file cannot be read.
        """
        found = cls(_lines(PACKAGED_EXCLUSIONS))
        for name in paths:
            path = Path(name)
            if path.suffix == ".sha256":
                found.hashes.update(_lines(path))
                continue
            for _, record in records(path):
                for text in _texts(record):
                    found.hashes |= windows(text)
        return found

    def hit(self, text: str) -> bool:
        """Whether it has a window of words in common with an excluded text."""
        return not self.hashes.isdisjoint(windows(text))


def windows(text: str, step: int = 1) -> set[str]:
    """Hashes of :data:`WINDOW` words in a row, from every ``step``-th word on.

    Of all words where there are fewer.
    """
    words = _WORD.findall(text.lower())
    starts = range(0, max(1, len(words) - WINDOW + 1), step)
    spans = (" ".join(words[i : i + WINDOW]) for i in starts)
    return {hashlib.sha256(span.encode()).hexdigest()[:12] for span in spans if span}


def read(path: Path) -> list[Prompt]:
    """What :func:`.sources.collect` found, as the stage wrote it."""
    return [Prompt(r["id"], r["kind"], tuple(r["messages"])) for _, r in records(path)]


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects of a JSONL file (``.gz``: compressed), each with ``file:line``.

    Raises:
        UsageError: it cannot be read, or a line is not a JSON object.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
                yield f"{path}:{number}", record
    except (OSError, EOFError, zlib.error) as err:  # the last two: a damaged .gz
        reason = getattr(err, "strerror", None) or err
        raise UsageError(
            f"{path}: cannot be read ({reason})", hint="check the path in the run's file"
        ) from err
    except ValueError as err:
        raise UsageError(
            f"{path}:{number}: not a JSON object ({err})", hint="one object per line, in UTF-8"
        ) from err


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise UsageError(
            f"{path}: cannot be read ({err.strerror})", hint="check prompts.exclude"
        ) from err
    return [line for line in text.split("\n") if line and not line.startswith("#")]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
