"""Stage 1: prompts from templates, files, hub data sets, Python's library and the target."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import DownloadError, MissingDependencyError, TrainingError, UsageError
from . import library, selfmade, templates
from .config import Config, Source
from .prompts import Exclusions, Message, Prompt, records
from .vary import variations


def collect(config: Config) -> tuple[list[Prompt], dict[str, int]]:
    """Every prompt once, in a mixed order, and counts: per kind, duplicates, excluded.

    Raises:
        UsageError, DownloadError, MissingDependencyError: a source is not to be had.
        TrainingError: nothing is left.
    """
    exclusions = Exclusions.load(config.prompts.exclude)
    found: dict[str, Prompt] = {}
    counts = {"duplicates": 0, "excluded": 0}
    for source in config.prompts.source:
        for messages in read_source(source, config):
            for prompt in _with_variations(source, messages, config.seed):
                if prompt.id in found:
                    counts["duplicates"] += 1
                elif exclusions.hit(prompt.text):
                    counts["excluded"] += 1
                else:
                    found[prompt.id] = prompt
                    counts[source.name] = counts.get(source.name, 0) + 1
    if not found and not config.regenerate.reuse:
        raise TrainingError(
            f"no prompt is left: {counts['excluded']} are test prompts",
            hint="name another source in [[prompts.source]]",
        )
    mixed = sorted(found.values(), key=lambda prompt: prompt.id)
    random.Random(config.seed).shuffle(mixed)
    return mixed, counts


def _with_variations(source: Source, messages: list[Message], seed: int) -> Iterator[Prompt]:
    first = Prompt.of(source.name, messages)
    yield first
    *before, asked = messages
    for text in variations(asked["content"], source.vary, str(seed)):
        made = Prompt.of(source.name, [*before, {**asked, "content": text}])
        # An id's first half decides what is held out: all of them, or none.
        yield replace(made, id=first.id[:8] + made.id[8:])


def read_source(source: Source, config: Config, seed: int | None = None) -> Iterator[list[Message]]:
    """Conversations of one source, each ending with the user's message.

    Args:
        seed: of what is drawn (None: the run's).
    """
    seed = config.seed if seed is None else seed
    texts: Iterator[str] | None = None
    if source.kind == "templates":
        texts = templates.prompts(source.name, source.count, seed)
    elif source.kind == "python":
        texts = library.prompts(source.count, seed)
    elif source.kind == "target":
        texts = selfmade.prompts(config, source.count)
    if texts is not None:
        for text in texts:
            yield [{"role": "user", "content": text}]
        return
    rows = records(Path(source.path)) if source.kind == "jsonl" else _hub(source)
    for number, (where, record) in enumerate(rows):
        if source.count and number >= source.count:
            return
        yield _conversation(record, source.prompt, where)


def _conversation(record: Mapping[str, Any], name: str, where: str) -> list[Message]:
    messages: list[Message]
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and value:
        try:
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in value]
        except (TypeError, KeyError):
            messages = []
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        if last >= 0:
            return messages[: last + 1]
    raise UsageError(
        f"{where}: field {name!r} is {str(value)[:60]!r}, expected a text or a list of messages "
        "with role and content",
        hint="say in the source's `prompt` which field it is; there are " + ", ".join(record),
    )


def _hub(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as err:
        raise MissingDependencyError(
            f"the package datasets is needed for {source.dataset}",
            hint="pip install datasets, or give the prompts as JSONL",
        ) from err
    try:
        rows = load_dataset(
            source.dataset, source.subset or None, split=source.split, streaming=True
        )
        for number, record in enumerate(rows, 1):
            yield f"{source.dataset} row {number}", record
    except Exception as err:  # the library raises many unrelated types
        raise DownloadError(
            f"{source.dataset}: {str(err).splitlines()[0] if str(err) else type(err).__name__}",
            hint="check name, subset, split and network, or give the prompts as JSONL",
        ) from err
