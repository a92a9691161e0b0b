"""Stage 3: the target's hidden states along its answers, in shards or made as they are needed.

A shard holds the texts one after the other: ``taps`` [tokens, taps * hidden] and, where a
teacher is asked for, ``last`` [tokens, hidden], which the target's head makes its logits of.
Token ids stay in ``answers.jsonl``. A shard knows which texts it is made of,
so what is there is kept, and what is damaged or outdated is made again.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from array import array
from collections.abc import Callable, Sequence
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
from .answers import FEWEST_TOKENS
from .clock import Clock
from .config import Config

_SCALE = "scale.safetensors"
_SCALE_TEXTS = 64
_SPARE = 1 << 28  # bytes left free on the disk


@dataclass(frozen=True)
class Features:
    """A batch of texts.

    Attributes:
        taps: [texts, length, taps * hidden].
        last: [texts, length, hidden], what the target's head is applied to; for a teacher.
    """

    batch: Batch
    taps: Tensor
    last: Tensor | None


class Texts:
    """The answers a draft can be trained on, cut to the longest length; all of them in memory.

    Attributes:
        kinds: of every text.
        training, heldout: their indices; the same answer is held out in every run.

    Raises:
        TrainingError: none is long enough, or a token id is beyond the head.
    """

    def __init__(self, config: Config, path: Path, vocab_size: int) -> None:
        most = config.features.max_length
        flat, ranks = array("i"), []
        self.kinds: list[str] = []
        self._starts, self._ends = array("q"), array("q", [0])
        self.too_short = 0
        for row in answers.read(path):
            answers.check_ids(row, vocab_size, str(path))
            kept = row.answer[: max(0, most - len(row.prompt))]
            if len(kept) < FEWEST_TOKENS or not row.prompt:
                self.too_short += 1
                continue
            flat.extend(row.prompt)
            flat.extend(kept)
            self.kinds.append(row.kind)
            self._starts.append(len(row.prompt))
            self._ends.append(len(flat))
            ranks.append(row.heldout_rank)
        if len(ranks) < 2:
            raise TrainingError(
                f"{path}: {len(ranks)} of {len(ranks) + self.too_short} answers have "
                f"{FEWEST_TOKENS} tokens or more within {most}, expected at least 2",
                hint="more prompts, more max_tokens, or a larger features.max_length",
            )
        self._flat = torch.tensor(flat, dtype=torch.int32)
        share = config.prompts.heldout
        ranked = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
        below = sum(rank < share for rank in ranks)
        self.heldout = ranked[: min(max(below, 1), len(ranks) - 1)] if share else []
        self.training = sorted(set(ranked) - set(self.heldout))

    def __len__(self) -> int:
        return len(self.kinds)

    def length(self, index: int) -> int:
        """Tokens of a text, prompt included."""
        return self._ends[index + 1] - self._ends[index]

    def prompt(self, index: int) -> list[int]:
        """Token ids before the answer."""
        return self._ids(index)[: self._starts[index]].tolist()

    def answer(self, index: int) -> list[int]:
        """Token ids of the answer."""
        return self._ids(index)[self._starts[index] :].tolist()

    def digest(self, first: int = 0, last: int | None = None) -> str:
        """A hash of all the texts, or of some: another set is another training run."""
        last = len(self) if last is None else last
        digest = hashlib.sha256(self._flat[self._ends[first] : self._ends[last]].numpy().tobytes())
        digest.update(self._starts[first:last].tobytes())
        digest.update(repr([self.length(i) for i in range(first, last)]).encode())
        return digest.hexdigest()[:12]

    def counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs in the answers trained on: [vocab]."""
        found = torch.zeros(vocab_size, dtype=torch.long)
        for index in self.training:
            ids = self._ids(index)[self._starts[index] :]
            found += torch.bincount(ids, minlength=vocab_size)
        return found

    def batch(self, indices: Sequence[int]) -> Batch:
        """Ids, padded on the right, and where anchors may be."""
        ends = torch.tensor([self.length(i) for i in indices])
        ids = torch.zeros(len(indices), int(ends.max()), dtype=torch.long)
        for place, index in enumerate(indices):
            ids[place, : int(ends[place])] = self._ids(index)
        return Batch(ids, torch.tensor([self._starts[i] for i in indices]), ends)

    def _ids(self, index: int) -> Tensor:
        return self._flat[self._ends[index] : self._ends[index + 1]]


class Computed:
    """Features made as they are needed."""

    def __init__(self, texts: Texts, target: HFTarget, teacher: bool) -> None:
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
        for number, shard in enumerate(_shards(texts, config.features.shard)):
            path = _shard_path(folder, number)
            if tensors.facts(path).get("key") != _shard_key(texts, shard, key):
                raise CheckpointError(
                    f"{path}: of other texts or settings", hint="run --stage features again"
                )
            self._files.append(tensors.opened(path))
            start = 0
            for index in shard:
                self._places.append((number, start))
                start += texts.length(index)
        self._teacher = config.features.teacher

    def get(self, indices: Sequence[int]) -> Features:
        """Of these texts."""
        batch = self.texts.batch(indices)
        last = self._read("last", indices, batch) if self._teacher else None
        return Features(batch, self._read("taps", indices, batch), last)

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
    config: Config,
    texts: Texts,
    load: Callable[[], HFTarget],
    folder: Path,
    *,
    key: str,
    clock: Clock,
) -> dict[str, Any]:
    """Make every shard that is not there.

    Args:
        load: loads the target; called only if a shard is missing.

    Raises:
        CacheError: the disk is full, or will be.
    """
    shards = _shards(texts, config.features.shard)
    tokens = sum(texts.length(i) for i in range(len(texts)))
    wanted = [_shard_key(texts, shard, key) for shard in shards]
    missing = [i for i, shard in enumerate(wanted) if not _is_there(folder, i, shard)]
    facts = {"texts": len(texts), "tokens": tokens, "shards": len(shards)}
    if not missing:
        return facts
    target = load()
    width = (len(target.taps) + config.features.teacher) * target.embedding.shape[1]
    share = len(missing) / len(shards)
    _check_space(folder, int(share * tokens * 2 * width))
    with clock.progress("shard", len(shards), len(shards) - len(missing)) as told:
        for done, number in enumerate(missing, 1):
            made = _make(config, texts, shards[number], target)
            if number == 0:
                tensors.save(folder / _SCALE, {"scale": made.pop("scale")}, {})
            made.pop("scale", None)
            path = _shard_path(folder, number)
            tensors.save(path, made, {"key": wanted[number]})
            told(len(shards) - len(missing) + done)
            clock.over()  # recorded, not obeyed: a shard that is missing cannot be trained on
    return facts


@torch.no_grad()
def compute(target: HFTarget, ids: Tensor, teacher: bool) -> tuple[Tensor, Tensor | None]:
    """Taps of a batch [texts, length, taps * hidden]; ``last`` where a teacher is asked for.

    Texts are padded on the right, if at all: a causal target computes a token from those
    before it. The head is not applied.
    """
    ids = ids.to(target.embedding.device)
    with target.captured() as captured:
        output = target.model.get_decoder()(input_ids=ids, use_cache=False)
    taps = torch.cat([captured[tap] for tap in target.taps], dim=-1)
    return taps, output.last_hidden_state if teacher else None


def _make(config: Config, texts: Texts, shard: range, target: HFTarget) -> dict[str, Tensor]:
    by_length = sorted(shard, key=texts.length)
    parts: dict[int, dict[str, Tensor]] = {}
    for start in range(0, len(shard), config.features.batch):
        some = by_length[start : start + config.features.batch]
        batch = texts.batch(some)
        taps, last = compute(target, batch.ids, config.features.teacher)
        for i, (index, end) in enumerate(zip(some, batch.ends.tolist(), strict=True)):
            part = {"taps": taps[i, :end].to("cpu", torch.bfloat16)}
            if last is not None:
                part["last"] = last[i, :end].to("cpu", torch.bfloat16)
            parts[index] = part
    ordered = [parts[index] for index in shard]
    made = {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]}
    return {**made, "scale": _scale([part["taps"] for part in ordered[:_SCALE_TEXTS]])}


def _scale(parts: Sequence[Tensor]) -> Tensor:
    # The core leaves the first position of a text out; here there is one long text.
    inner = torch.cat([part[:1].mul(0) for part in parts[:1]] + [part[1:] for part in parts])
    return channel_scale(inner[None].float()).cpu()


def _shards(texts: Texts, size: int) -> list[range]:
    return [range(i, min(i + size, len(texts))) for i in range(0, len(texts), size)]


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def _shard_key(texts: Texts, shard: range, key: str) -> str:
    return f"{key}-{texts.digest(shard.start, shard.stop)}"


def _is_there(folder: Path, number: int, wanted: str) -> bool:
    path = _shard_path(folder, number)
    if not path.exists() or (number == 0 and not (folder / _SCALE).exists()):
        return False
    try:
        return bool(tensors.facts(path).get("key") == wanted)
    except DFlashError as err:
        print(f"{err.message}; made again", file=sys.stderr)
        return False


def _check_space(folder: Path, needed: int) -> None:
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free - _SPARE
    if needed > free:
        raise CacheError(
            f"{folder}: the features take {needed / 1e9:.1f} GB, {max(0, free) / 1e9:.1f} are free",
            hint='another --out, fewer prompts, or features.how = "on-the-fly"',
        )
