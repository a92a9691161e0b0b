"""Stage 2: the target's own answers. A draft learns what this target says, not what is true."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...backends.server import ServerClient
from ...errors import DFlashError, PairMismatchError, TrainingError
from ...pair import TargetConfig
from ...reference.target import eos_token_ids
from . import models, prompts
from .answers import FEWEST_TOKENS, Answer, AnswerFile, check_ids, parse
from .clock import Clock
from .config import Config
from .prompts import Exclusions, Prompt

A = TypeVar("A")
B = TypeVar("B")
_AHEAD = 4  # times the requests under way: answers that wait for an earlier, longer one
_WINDOW = 8  # batches of prompts that are sorted by length together


def regenerate(
    config: Config, asked: Sequence[Prompt], path: Path, clock: Clock, device: torch.device
) -> dict[str, Any]:
    """Append the answers that ``path`` lacks, until all are there or the time is up.

    Raises:
        PairMismatchError: the server's tokenizer is not the target's.
        TrainingError: token ids beyond the target's head; no answer long enough.
        RequestError: the server failed; what was answered is kept.
        CacheError: disk full; likewise.
    """
    tokenizer = models.tokenizer(config.target)
    vocab = TargetConfig.from_dir(models.target_folder(config.target)).vocab_size
    with AnswerFile(path) as file:
        skipped = _reuse(config, file, tokenizer, vocab)
        todo = [prompt for prompt in asked if prompt.id not in file.known]
        total = len(file.known) + len(todo)
        with clock.progress("answers", total, len(file.known)) as told:
            if todo:
                first = Answer("first", "", prompt_ids(tokenizer, todo[0], config), ())
                check_ids(first, vocab, str(path))
            make = _server if config.regenerate.how == "server" else _transformers
            short = 0
            for answers in make(config, todo, tokenizer, clock, device) if todo else ():
                for answer in answers:
                    check_ids(answer, vocab, str(path))
                short += sum(len(answer.answer) < FEWEST_TOKENS for answer in answers)
                file.add(answers)
                told(len(file.known), tokens=file.tokens)
        if not file.tokens:
            raise TrainingError(
                f"{path}: no answer in the time given", hint="give more of it (--budget)"
            )
        return {
            "answers": len(file.known),
            "tokens": file.tokens,
            "asked": total,
            "too_short": short,
            "reused_but_excluded": skipped,
        }


def _reuse(config: Config, file: AnswerFile, tokenizer: Any, vocab: int) -> int:
    """Take over earlier answers; how many were left out as test prompts."""
    exclusions = Exclusions.load(config.prompts.exclude)
    skipped = 0
    for name in config.regenerate.reuse:
        taken = []
        for where, record in prompts.records(Path(name)):
            answer = parse(record, where)
            check_ids(answer, vocab, where)
            if answer.id in file.known:
                continue
            if exclusions.hit(tokenizer.decode(answer.prompt, skip_special_tokens=True)):
                skipped += 1
            else:
                taken.append(answer)
        file.add(taken)
    return skipped


def prompt_ids(tokenizer: Any, prompt: Prompt, config: Config) -> tuple[int, ...]:
    """Token ids of a prompt as the target's chat template writes it, up to the answer."""
    if getattr(tokenizer, "chat_template", None):
        found = tokenizer.apply_chat_template(
            list(prompt.messages),
            add_generation_prompt=True,
            return_dict=False,
            **config.regenerate.template,
        )
    else:
        found = tokenizer.encode(prompt.text)
    return tuple(found)


@torch.inference_mode()
def _transformers(
    config: Config, todo: Sequence[Prompt], tokenizer: Any, clock: Clock, device: torch.device
) -> Iterator[list[Answer]]:
    settings = config.regenerate
    target = models.load_target(config, (0,), device)
    ends = eos_token_ids(target.model, target.config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    sampling = {"do_sample": settings.temperature > 0}
    if settings.temperature > 0:
        sampling["temperature"] = settings.temperature  # type: ignore[assignment]
    for batch in _batches([(p, prompt_ids(tokenizer, p, config)) for p in todo], settings.batch):
        if clock.over():
            return
        width = max(len(ids) for _, ids in batch)
        given = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(given)
        for row, (_, ids) in enumerate(batch):
            given[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        output = target.model.generate(
            given.to(device), attention_mask=mask.to(device), max_new_tokens=settings.max_tokens,
            pad_token_id=pad, **sampling,
        )  # fmt: skip
        made = output[:, width:].tolist()
        yield [
            Answer(prompt.id, prompt.kind, ids, _until_end(tokens, ends))
            for (prompt, ids), tokens in zip(batch, made, strict=True)
        ]


def _server(
    config: Config, todo: Sequence[Prompt], tokenizer: Any, clock: Clock, _device: torch.device
) -> Iterator[list[Answer]]:
    settings = config.regenerate
    client = ServerClient(settings.url, settings.model)
    end = tokenizer.eos_token_id

    def ask(prompt: Prompt) -> Answer:
        ids = prompt_ids(tokenizer, prompt, config)
        text, tokens, reason = client.answer(
            ids, settings.max_tokens, temperature=settings.temperature
        )
        if tokens is None:  # as near as text allows; the draft is trained on any text alike
            told = tuple(tokenizer.encode(text, add_special_tokens=False))
            tokens = (*told, end) if reason == "stop" and end is not None else told
        elif _whole(tokenizer.decode(tokens, skip_special_tokens=True)) != _whole(text):
            raise PairMismatchError(
                f"{settings.url}: the tokens of {text[:40]!r} read "
                f"{tokenizer.decode(tokens)[:40]!r} with the target's tokenizer",
                hint="the server runs another model than target.model",
            )
        return Answer(prompt.id, prompt.kind, ids, tokens)

    ask(todo[0])  # a wrong server is told after one request
    told: list[Answer] = []
    try:
        for answer in ask_steadily(ask, todo, settings.batch, clock):
            told.append(answer)
            if len(told) == settings.batch:
                yield told
                told = []
    except (DFlashError, KeyboardInterrupt):
        yield told
        raise
    yield told


def ask_steadily(
    ask: Callable[[A], B], asked: Sequence[A], workers: int, clock: Clock
) -> Iterator[B]:
    """Answers in order; ``workers`` requests are under way until all are, or the time is up.

    After an error none is begun, and it is raised once those under way are told.
    """
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for number, prompt in enumerate(asked):
                if number % workers == 0 and clock.over():
                    break
                waiting.append(pool.submit(ask, prompt))
                if len(waiting) == workers * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except (DFlashError, KeyboardInterrupt):
            for future in [future for future in waiting if not future.cancel()]:
                if future.exception() is None:
                    yield future.result()
            raise
        finally:
            for future in waiting:
                future.cancel()


def _whole(text: str) -> str:
    """Without the character that an answer broke off in: a server leaves it out."""
    return text.strip().rstrip("\ufffd").rstrip()


def _batches(
    rows: Sequence[tuple[Prompt, tuple[int, ...]]], size: int
) -> Iterator[list[tuple[Prompt, tuple[int, ...]]]]:
    """Batches of about one length, in an order that stays mixed."""
    for start in range(0, len(rows), size * _WINDOW):
        near = sorted(rows[start : start + size * _WINDOW], key=lambda row: len(row[1]))
        yield from (near[i : i + size] for i in range(0, len(near), size))


def _until_end(tokens: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tuple(tokens[: index + 1])
    return tuple(tokens)
