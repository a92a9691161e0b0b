"""Prompts that the target itself makes up: what it was tuned on is what it is asked.

A chat model that is given its template up to the user's turn writes a user's message
(Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ...backends.server import ServerClient
from ...errors import TrainingError
from . import answers, models
from .answers import Answer, AnswerFile
from .clock import Clock
from .config import Config
from .regenerate import ask_steadily

TEMPERATURE = 0.85
LONGEST = 100  # tokens
FEWEST_WORDS = 4
FILE = "messages.jsonl"
_MARK = "MESSAGE-OF-THE-USER"
_ASKED_PER_PROMPT = 4  # requests, before the target is said to have nothing more to ask


def prompts(config: Config, count: int) -> Iterator[str]:
    """``count`` different messages, sampled from the server of ``regenerate``; never twice alike.

    They are kept in the run's folder, so that an interrupted stage goes on with them.

    Raises:
        TrainingError: the target has no chat template, or its messages are too alike,
            too short or have no end.
        RequestError: the server failed.
        CacheError: disk full.
    """
    settings, path = config.regenerate, config.out / FILE
    tokenizer = models.tokenizer(config.target)
    given = opening(tokenizer)
    client = ServerClient(settings.url, settings.model)

    def ask(_number: int) -> str:
        text, _, reason = client.answer(given, LONGEST, temperature=TEMPERATURE)
        whole = reason == "stop" and len(text.split()) >= FEWEST_WORDS
        return text.strip() if whole else ""

    with AnswerFile(path) as file:
        missing = count - len(file.known)
        with Clock().progress("message", count, len(file.known)) as told:
            for start in range(0, max(0, missing) * _ASKED_PER_PROMPT, settings.batch):
                if len(file.known) >= count:
                    break
                numbers = range(start, start + settings.batch)
                texts = ask_steadily(ask, numbers, settings.batch, Clock())
                made = sorted({text for text in texts if text})
                file.add([_kept(text, given, tokenizer) for text in made])
                told(len(file.known))
        if len(file.known) < count:
            raise TrainingError(
                f"{settings.url}: {len(file.known)} different messages of {FEWEST_WORDS} words or "
                f"more after {missing * _ASKED_PER_PROMPT} requests, asked for {count}",
                hint="ask for fewer, or use a source of another kind",
            )
    for row in islice(answers.read(path), count):
        yield tokenizer.decode(row.answer)


def opening(tokenizer: Any) -> list[int]:
    """Token ids of the target's chat template up to where the user's message begins.

    Raises:
        TrainingError: there is no template, or it does not keep the message as it is.
    """
    text = ""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    before, mark, _ = text.partition(_MARK)
    if not mark or not before:
        raise TrainingError(
            "the target has no chat template that says where a user's message begins, so it "
            "cannot make up prompts",
            hint='a source of another kind than "target"',
        )
    ids: list[int] = tokenizer.encode(before, add_special_tokens=False)
    return ids


def _kept(text: str, given: list[int], tokenizer: Any) -> Answer:
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Answer(name, "message", tuple(given), tuple(ids))
