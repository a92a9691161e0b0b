"""Prompts of a benchmark: a public data set from the hub, a JSONL file, or our own.

Data sets of the hub are kept as JSONL below the cache with a manifest (source, revision,
sha256): a file that does not match its manifest is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cache import atomic_write_text, cache_dir, locked
from ..errors import DownloadError, MissingDependencyError, UsageError, near_names

PACKAGED = Path(__file__).parent / "data" / "prompts.jsonl"
OWN = "packaged"


@dataclass(frozen=True)
class Item:
    """A prompt: one user message a turn, the answers fed back between them."""

    id: str
    kind: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Prompts, where they come from, and a short hash over their ids and texts."""

    name: str
    source: str
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """Names exactly these prompts in results."""
        lines = "\n".join(json.dumps([item.id, *item.turns]) for item in self.items)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Published:
    """Where a public data set is on the hub, and what a row's turns are."""

    repo: str
    config: str | None
    split: str
    turns: Callable[[Mapping[str, Any]], Sequence[str]]
    id: str | None


def _complete(code: str) -> str:
    return f"Complete this Python function.\n\n```python\n{code.rstrip()}\n```"


_MT_BENCH = "HuggingFaceH4/mt_bench_prompts"
PUBLISHED: Mapping[str, _Published] = {
    "gsm8k": _Published("openai/gsm8k", "main", "test", lambda r: [r["question"]], None),
    "math500": _Published(
        "HuggingFaceH4/MATH-500", None, "test", lambda r: [r["problem"]], "unique_id"
    ),
    "humaneval": _Published(
        "openai/openai_humaneval", None, "test", lambda r: [_complete(r["prompt"])], "task_id"
    ),
    "mbpp": _Published(
        *("google-research-datasets/mbpp", "sanitized", "test"),
        lambda r: [r["prompt"]],
        "task_id",
    ),
    "mt-bench": _Published(_MT_BENCH, None, "train", lambda r: r["prompt"], "prompt_id"),
}


def load(spec: str, count: int | None = None) -> Dataset:
    """The first ``count`` prompts (None: all) of a data set.

    Args:
        spec: a name of :data:`PUBLISHED`; ``packaged`` or ``packaged/NAME`` for our own
            prompts of all kinds or of one; a JSONL file, or ``NAME=FILE`` to report it
            under a name. A line of a file is an object with ``turns`` (list of strings),
            ``prompt`` or ``question`` (GSM8K's), and optionally ``id`` or ``task_id`` and
            ``kind``; one with ``entry_point`` (HumanEval's) asks to complete its function.

    Raises:
        UsageError: no such data set, or a line that cannot be used; names file and line.
        DownloadError: the hub cannot be reached, or the cached file is damaged.
        MissingDependencyError: ``datasets`` is not installed.
    """
    head, equals, file = spec.partition("=")
    if spec in PUBLISHED:
        name, source, items = spec, *_published(spec)
    elif spec == OWN or spec.startswith(OWN + "/"):
        kind = spec.partition("/")[2]
        name, source = spec, "packaged with dflash-plugin"
        items = [item for item in read(PACKAGED) if kind in ("", item.kind)]
        if not items:
            raise UsageError(f"no packaged prompts {kind!r}", hint=near_names(kind, PUBLISHED))
    elif (equals and Path(file).is_file()) or Path(spec).is_file():
        path = Path(file if equals and Path(file).is_file() else spec)
        name = head if path == Path(file) and equals else path.name.partition(".")[0]
        source = path.name
        items = [Item(item.id, name, item.turns) for item in read(path)]
    else:
        known = [*PUBLISHED, OWN]
        raise UsageError(
            f"--dataset {spec}: neither a known data set nor a file",
            hint=f"one of {', '.join(known)}, a JSONL file, or NAME=FILE.jsonl",
        )
    chosen = tuple(items[:count])
    if count is not None and len(chosen) < count:
        raise UsageError(
            f"{spec}: {len(chosen)} prompts, {count} asked for", hint="lower --num-prompts"
        )
    return Dataset(name, source, chosen)


def read(path: Path) -> list[Item]:
    """Every prompt of a JSONL file, as :func:`load` describes it."""
    try:
        # Not splitlines(): text inside a JSON string may hold U+2028 and the like.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        reason = getattr(err, "strerror", None) or err
        raise UsageError(f"{path}: cannot be read ({reason})", hint="check the path") from err
    items: dict[str, Item] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = _item(json.loads(line), path.name.partition(".")[0], number)
        except (ValueError, KeyError, TypeError) as err:
            raise UsageError(
                f"{path}:{number}: expected an object with `turns`, `prompt` or `question` "
                f"({type(err).__name__}: {err})",
                hint="one JSON object a line",
            ) from err
        if item.id in items:
            raise UsageError(f"{path}:{number}: id {item.id!r} occurs twice", hint="rename one")
        items[item.id] = item
    if not items:
        raise UsageError(f"{path}: no prompts", hint="one JSON object a line")
    return list(items.values())


def _item(row: Mapping[str, Any], stem: str, number: int) -> Item:
    given = row["turns"] if "turns" in row else [row["prompt" if "prompt" in row else "question"]]
    if not isinstance(given, list) or not given:
        raise ValueError("no turns")
    if not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError("a turn is no text")
    turns = tuple(_complete(text) if "entry_point" in row else text for text in given)
    name = next((row[key] for key in ("id", "task_id") if row.get(key) is not None), None)
    return Item(
        str(f"{stem}-{number}" if name is None else name), str(row.get("kind") or stem), turns
    )


def _published(name: str) -> tuple[str, list[Item]]:
    """Source and prompts of a public data set, downloaded once."""
    path = cache_dir() / "datasets" / f"{name}.jsonl"
    manifest = path.with_suffix(".json")
    with locked(f"dataset-{name}", sweep=path):
        if not (path.exists() and manifest.exists()):
            source, items = _download(name)
            text = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
            facts = {"source": source, "rows": len(items), "sha256": _sha256(text.encode())}
            atomic_write_text(path, text)
            atomic_write_text(manifest, json.dumps(facts, indent=1) + "\n")
        try:
            facts = json.loads(manifest.read_text(encoding="utf-8"))
            expected, source = facts["sha256"], str(facts["source"])
        except (ValueError, KeyError, TypeError) as err:
            raise DownloadError(
                f"{manifest}: not a manifest ({err})", hint="delete it and run again"
            ) from err
        found = _sha256(path.read_bytes())
    if found != expected:
        raise DownloadError(
            f"{path}: sha256 is {found[:16]}…, its manifest says {str(expected)[:16]}…",
            hint="delete both files and run again",
        )
    return source, read(path)


def _download(name: str) -> tuple[str, list[Item]]:
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
    except ImportError as err:
        raise MissingDependencyError(
            f"{err.name} is needed to download {name}",
            hint="pip install 'dflash-plugin[bench]', or use "
            f"--dataset {OWN}/{name} or a JSONL file of your own",
        ) from err
    row = PUBLISHED[name]
    try:
        revision = HfApi().dataset_info(row.repo).sha
        rows: Iterable[Mapping[str, Any]] = load_dataset(
            row.repo, row.config, split=row.split, revision=revision
        )
        items = [
            Item(str(r[row.id]) if row.id else f"{name}-{i}", name, tuple(row.turns(r)))
            for i, r in enumerate(rows, 1)
        ]
    except Exception as err:  # the libraries raise a dozen unrelated types here
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise DownloadError(
            f"{row.repo}: not to be had from the hub: {reason}",
            hint=f"check the network, or use --dataset {OWN}/{name} (a few prompts of our own) "
            f"or {name}=FILE.jsonl",
        ) from err
    return f"{row.repo}@{revision}", items


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
