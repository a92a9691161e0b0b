"""Stage 3: the target's hidden states along its answers, in shards or made as they are needed.

A shard holds the texts one after the other: ``taps`` [tokens, taps * hidden] and, where a
teacher is asked for, the target's likeliest tokens AT each position with their log
probabilities. Token ids stay in ``answers.jsonl``. A shard knows which texts it is made of,
so what is there is kept, and what is damaged or outdated is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CacheError, CheckpointError, DFlashError, TrainingError
from ...reference.target import HFTarget
from ..features import channel_scale
from ..fit import Batch
from . import answers, tensors
from .answers import FEWEST_TOKENS, Answer
from .clock import Clock
from .config import Config

_SCALE = "scale.safetensors"
_SCALE_TEXTS = 64
_SPARE = 1 << 28  # bytes left free on the disk


@dataclass(frozen=True)
class Teacher:
    """The target's likeliest tokens at each position [texts, length, n], in nats."""

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Features:
    """A batch of texts with their taps [texts, length, taps * hidden]."""

    batch: Batch
    taps: Tensor
    teacher: Teacher | None


class Texts:
    """The answers a draft can be trained on, cut to the longest length.

    Raises:
        TrainingError: none is long enough, or a token id is beyond the head.
    """

    def __init__(self, config: Config, path: Path, vocab_size: int) -> None:
        most = config.features.max_length
        self.rows: list[Answer] = []
        self.too_short = 0
        for row in answers.read(path):
            answers.check_ids(row, vocab_size, str(path))
            kept = row.answer[: max(0, most - len(row.prompt))]
            if len(kept) < FEWEST_TOKENS or not row.prompt:
                self.too_short += 1
            else:
                self.rows.append(Answer(row.id, row.kind, row.prompt, kept))
        if len(self.rows) < 2:
            raise TrainingError(
                f"{path}: {len(self.rows)} of {len(self.rows) + self.too_short} answers have "
                f"{FEWEST_TOKENS} tokens or more within {most}, expected at least 2",
                hint="more prompts, more max_tokens, or a larger features.max_length",
            )
        share = config.prompts.heldout
        ranked = sorted(range(len(self.rows)), key=lambda i: (self.rows[i].heldout_rank, i))
        held = [i for i in ranked if self.rows[i].heldout_rank < share]
        if share and not held:
            held = ranked[:1]
        if len(held) == len(self.rows):
            held = held[:1]
        self.heldout = held
        self.training = sorted(set(range(len(self.rows))) - set(held))

    @property
    def digest(self) -> str:
        """Of all the texts: another set of answers is another training run."""
        return _digest(self.rows)

    def counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs in the answers trained on: [vocab]."""
        ids = [token for i in self.training for token in self.rows[i].answer]
        return torch.bincount(torch.tensor(ids), minlength=vocab_size)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Ids, padded on the right, and where anchors may be."""
        rows = [self.rows[i] for i in indices]
        ends = torch.tensor([len(row.prompt) + len(row.answer) for row in rows])
        ids = torch.zeros(len(rows), int(ends.max()), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : int(ends[place])] = torch.tensor(row.prompt + row.answer)
        return Batch(ids, torch.tensor([len(row.prompt) for row in rows]), ends)


class Computed:
    """Features made as they are needed."""

    def __init__(self, texts: Texts, target: HFTarget, teacher: int) -> None:
        self.texts, self._target, self._teacher = texts, target, teacher

    def get(self, indices: Sequence[int]) -> Features:
        """Of these texts."""
        batch = self.texts.batch(indices)
        return Features(batch, *compute(self._target, batch.ids, self._teacher))

    def scale(self) -> Tensor:
        """The size of each channel, from the first texts."""
        found = self.get(self.texts.training[:_SCALE_TEXTS])
        return _scale([found.taps[i, : int(n)] for i, n in enumerate(found.batch.ends)])


class Stored:
    """Features read from shards, mapped into memory.

    Raises:
        CheckpointError: a shard is missing, damaged, or of other texts.
    """

    def __init__(self, config: Config, texts: Texts, folder: Path, key: str) -> None:
        self.texts, self._folder = texts, folder
        self._files = []
        self._places: list[tuple[int, int]] = []
        for number, rows in enumerate(_shards(texts, config.features.shard)):
            path = _shard_path(folder, number)
            if tensors.facts(path).get("key") != _shard_key(rows, key):
                raise CheckpointError(
                    f"{path}: of other texts or settings", hint="run --stage features again"
                )
            self._files.append(tensors.opened(path))
            start = 0
            for row in rows:
                self._places.append((number, start))
                start += len(row.prompt) + len(row.answer)
        self._with_teacher = config.features.teacher > 0

    def get(self, indices: Sequence[int]) -> Features:
        """Of these texts."""
        batch = self.texts.batch(indices)
        teacher = None
        if self._with_teacher:
            teacher = Teacher(
                self._read("teacher_ids", indices, batch).long(),
                self._read("teacher_logprobs", indices, batch).float(),
            )
        return Features(batch, self._read("taps", indices, batch), teacher)

    def scale(self) -> Tensor:
        """The size of each channel, as measured when the shards were made."""
        return tensors.load(self._folder / _SCALE)["scale"]

    def _read(self, name: str, indices: Sequence[int], batch: Batch) -> Tensor:
        parts = []
        for index, end in zip(indices, batch.ends.tolist(), strict=True):
            number, start = self._places[index]
            parts.append(self._files[number].get_slice(name)[start : start + end])
        padded = parts[0].new_zeros(len(parts), batch.ids.shape[1], parts[0].shape[1])
        for place, part in enumerate(parts):
            padded[place, : len(part)] = part
        return padded


def build(
    config: Config, texts: Texts, target: HFTarget, folder: Path, *, key: str, clock: Clock
) -> dict[str, Any]:
    """Make every shard that is not there; until the time is up.

    Raises:
        CacheError: the disk is full, or will be.
        TrainingError: not one shard in the time given.
    """
    shards = _shards(texts, config.features.shard)
    tokens = sum(len(row.prompt) + len(row.answer) for row in texts.rows)
    missing = [i for i, rows in enumerate(shards) if not _is_there(folder, i, rows, key)]
    width = len(target.taps) * target.embedding.shape[1]
    share = len(missing) / len(shards)
    _check_space(folder, int(share * tokens * (2 * width + 6 * config.features.teacher)))
    with clock.progress("shard", len(shards), len(shards) - len(missing)) as told:
        for done, number in enumerate(missing, 1):
            made = _make(config, texts, shards[number], target)
            if number == 0:
                tensors.save(folder / _SCALE, {"scale": made.pop("scale")}, {})
            made.pop("scale", None)
            path = _shard_path(folder, number)
            tensors.save(path, made, {"key": _shard_key(shards[number], key)})
            told(len(shards) - len(missing) + done)
            clock.over()  # recorded, not obeyed: a shard that is missing cannot be trained on
    return {"texts": len(texts.rows), "tokens": tokens, "shards": len(shards)}


@torch.no_grad()
def compute(target: HFTarget, ids: Tensor, teacher: int) -> tuple[Tensor, Teacher | None]:
    """Taps of a batch [texts, length, taps * hidden], and the teacher where asked for.

    Texts are padded on the right, if at all: a causal target computes a token from those
    before it. The head is applied only for the teacher.
    """
    ids = ids.to(target.embedding.device)
    with target.captured() as captured:
        output = target.model.get_decoder()(input_ids=ids, use_cache=False)
    taps = torch.cat([captured[tap] for tap in target.taps], dim=-1)
    if not teacher:
        return taps, None
    cap = getattr(target.config, "final_logit_softcapping", None)
    kept_ids, kept = [], []
    for row in output.last_hidden_state:  # one text at a time: [length, vocab] is large
        logits = (row @ target.head.T).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        values, places = logits.log_softmax(-1).topk(teacher)
        # What the logits after a token say is about the next position.
        kept.append(torch.cat([values[:1], values[:-1]]))
        kept_ids.append(torch.cat([places[:1], places[:-1]]))
    return taps, Teacher(torch.stack(kept_ids), torch.stack(kept))


def _make(
    config: Config, texts: Texts, rows: Sequence[Answer], target: HFTarget
) -> dict[str, Tensor]:
    place = {id(row): i for i, row in enumerate(texts.rows)}
    by_length = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))
    parts: dict[int, dict[str, Tensor]] = {}
    for start in range(0, len(rows), config.features.batch):
        some = by_length[start : start + config.features.batch]
        batch = texts.batch([place[id(row)] for row in some])
        taps, teacher = compute(target, batch.ids, config.features.teacher)
        for i, (row, end) in enumerate(zip(some, batch.ends.tolist(), strict=True)):
            part = {"taps": taps[i, :end].to("cpu", torch.bfloat16)}
            if teacher is not None:
                part["teacher_ids"] = teacher.ids[i, :end].to("cpu", torch.int32)
                part["teacher_logprobs"] = teacher.logprobs[i, :end].to("cpu", torch.bfloat16)
            parts[id(row)] = part
    ordered = [parts[id(row)] for row in rows]
    made = {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]}
    return {**made, "scale": _scale([part["taps"] for part in ordered[:_SCALE_TEXTS]])}


def _scale(parts: Sequence[Tensor]) -> Tensor:
    # The core leaves the first position of a text out; here there is one long text.
    inner = torch.cat([part[:1].mul(0) for part in parts[:1]] + [part[1:] for part in parts])
    return channel_scale(inner[None].float()).cpu()


def _shards(texts: Texts, size: int) -> list[list[Answer]]:
    return [texts.rows[i : i + size] for i in range(0, len(texts.rows), size)]


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def _shard_key(rows: Sequence[Answer], key: str) -> str:
    return f"{key}-{_digest(rows)}"


def _is_there(folder: Path, number: int, rows: Sequence[Answer], key: str) -> bool:
    path = _shard_path(folder, number)
    if not path.exists() or (number == 0 and not (folder / _SCALE).exists()):
        return False
    try:
        return bool(tensors.facts(path).get("key") == _shard_key(rows, key))
    except DFlashError as err:
        print(f"{err.message}; made again")
        return False


def _digest(rows: Sequence[Answer]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.prompt, row.answer]).encode())
    return digest.hexdigest()[:12]


def _check_space(folder: Path, needed: int) -> None:
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free - _SPARE
    if needed > free:
        raise CacheError(
            f"{folder}: the features take {needed / 1e9:.1f} GB, {max(0, free) / 1e9:.1f} are free",
            hint='another --out, fewer prompts, or features.how = "on-the-fly"',
        )
