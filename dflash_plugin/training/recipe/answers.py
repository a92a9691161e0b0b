"""The target's answers as a file: one JSON object a line, only ever appended to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import TrainingError, from_os_error
from .prompts import records

FEWEST_TOKENS = 3
"""Of an answer: an anchor, and something after it."""


@dataclass(frozen=True)
class Answer:
    """Token ids of a prompt (template included) and of what the target said to it."""

    id: str
    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def heldout_rank(self) -> float:
        """0..1, from the id alone: the lowest are held out, in every run alike."""
        return int(self.id[:8], 16) / 0x100000000

    def to_json(self) -> str:
        """One line."""
        told = {"id": self.id, "kind": self.kind}
        return json.dumps({**told, "prompt": list(self.prompt), "answer": list(self.answer)})


def read(path: Path) -> Iterator[Answer]:
    """Every answer of a file.

    Raises:
        TrainingError: a line is not an answer.
    """
    for where, record in records(path):
        yield parse(record, where)


def parse(record: Mapping[str, Any], where: str) -> Answer:
    """An answer from its JSON object; without ``id`` it has one of its prompt."""
    ids = {}
    for name in ("prompt", "answer"):
        value = record.get(name)
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            raise TrainingError(
                f"{where}: {name} is {str(value)[:60]}, expected a list of token ids",
                hint='a line is {"kind", "prompt": [ids], "answer": [ids]}',
            )
        ids[name] = tuple(value)
    name = record.get("id") or _id_of(ids["prompt"])
    return Answer(str(name), str(record.get("kind", "reused")), ids["prompt"], ids["answer"])


class AnswerFile:
    """Appends answers; after a crash the line that was being written is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: set[str] = set()
        self.tokens = 0
        if path.exists():
            _drop_half_line(path)
            for answer in read(path):
                self.known.add(answer.id)
                self.tokens += len(answer.answer)

    def __enter__(self) -> AnswerFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what a full disk refused must not be tried again on closing.
            self._file = self.path.open("ab", buffering=0)
        except OSError as err:
            raise from_os_error(err, str(self.path)) from err
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, answers: Sequence[Answer]) -> None:
        """Write those that are new; on a full disk the file is whole up to the last line.

        Raises:
            CacheError: the disk is full.
        """
        new = [answer for answer in answers if answer.id not in self.known]
        try:
            data = "".join(answer.to_json() + "\n" for answer in new).encode()
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as err:
            raise from_os_error(err, str(self.path)) from err
        self.known.update(answer.id for answer in new)
        self.tokens += sum(len(answer.answer) for answer in new)


def check_ids(answer: Answer, vocab_size: int, where: str) -> None:
    """Token ids have to be rows of the target's embedding and head.

    Raises:
        TrainingError: one is beyond; the tokenizer is another model's.
    """
    top = max(max(answer.prompt, default=0), max(answer.answer, default=0))
    if top >= vocab_size:
        raise TrainingError(
            f"{where}: token id {top} in {answer.id}, but the target's head has {vocab_size} rows",
            hint="the answers were made with another model's tokenizer; make them again",
        )


def _id_of(prompt: Sequence[int]) -> str:
    from hashlib import sha256

    return sha256(json.dumps(list(prompt)).encode()).hexdigest()[:16]


def _drop_half_line(path: Path) -> None:
    with path.open("rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)
