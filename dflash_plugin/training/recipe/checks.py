"""What a run's file can say but cannot mean."""

from __future__ import annotations

from collections.abc import Iterator

from .config import Config, Draft, Source

SOURCE_KINDS = {
    "templates": "count",
    "jsonl": "path",
    "hub": "dataset",
    "python": "count",
    "target": "count",
}
"""What each kind of source needs."""
_DTYPES = ("bfloat16", "float32")
_CHOICES = (
    ("target", "dtype", _DTYPES),
    ("regenerate", "how", ("transformers", "server")),
    ("features", "how", ("stored", "on-the-fly")),
    ("fit", "optimizer", ("adamw", "muon")),
    ("fit", "precision", _DTYPES),
)
_AT_LEAST = (
    ("draft", "layers", 1),
    ("draft", "block_size", 2),
    ("draft", "mask_token_id", 0),
    ("draft", "sliding_window", 0),
    ("regenerate", "batch", 1),
    ("regenerate", "max_tokens", 3),
    ("features", "shard", 1),
    ("features", "batch", 1),
    ("features", "max_length", 4),
    ("fit", "batch", 1),
    ("fit", "anchors", 1),
    ("fit", "head_rows", 0),
    ("fit", "negatives", 0),
    ("fit", "warmup", 0),
    ("fit", "checkpoint_every", 1),
    ("fit", "evaluate_every", 1),
    ("fit", "evaluate_texts", 0),
    ("evaluate", "texts", 0),
    ("evaluate", "tokens", 1),
    ("evaluate", "k", 0),
)
_BETWEEN = (
    ("prompts", "heldout", 0.0, 0.5),
    ("regenerate", "temperature", 0.0, 2.0),
    ("fit", "floor", 0.0, 1.0),
    ("fit", "distill", 0.0, 1.0),
    ("fit", "ema", 0.0, 0.99999),
)
_ABOVE_ZERO = ("epochs", "learning_rate", "clip", "decay")


def problems(config: Config) -> Iterator[tuple[str, str]]:
    """Each as (table, message)."""
    for table, name, least in _AT_LEAST:
        found = getattr(getattr(config, table), name)
        if found < least:
            yield table, f"{name} is {found}, expected at least {least}"
    for table, name, low, high in _BETWEEN:
        found = getattr(getattr(config, table), name)
        if not low <= found <= high:
            yield table, f"{name} is {found}, expected {low} to {high}"
    for name in _ABOVE_ZERO:
        found = getattr(config.fit, name)
        if found <= 0:
            yield "fit", f"{name} is {found}, expected more than 0"
    for name, share in vars(config.budget).items():
        if share < 0:
            yield "budget", f"{name} is {share}, expected at least 0"
    for table, name, known in _CHOICES:
        found = getattr(getattr(config, table), name)
        if found not in known:
            yield table, f"{name} is {found!r}, expected " + " or ".join(known)
    yield from _draft(config.draft)
    yield from _together(config)
    for source in (*config.prompts.source, *config.evaluate.source):
        yield from _source(source)
    if any(source.vary for source in config.evaluate.source):
        yield "evaluate", "vary is for prompts to train on, expected 0"


def _draft(draft: Draft) -> Iterator[tuple[str, str]]:
    beyond = [layer for layer in draft.full_layers if layer >= draft.layers]
    if beyond:
        yield "draft", f"full_layers has {beyond[0]}, expected below {draft.layers}"
    if list(draft.taps) != sorted(set(draft.taps)):
        yield "draft", f"taps is {list(draft.taps)}, expected each once, in ascending order"


def _together(config: Config) -> Iterator[tuple[str, str]]:
    if config.fit.distill and not config.features.teacher:
        yield "fit", "distill needs features.teacher = true"
    if config.regenerate.how == "server" and not config.regenerate.model:
        yield "regenerate", "model is missing: the name the server has the target by"
    if bool(config.evaluate.url) != bool(config.evaluate.model):
        yield "evaluate", "url and model belong together; one is missing"
    makes_up = any(source.kind == "target" for source in config.prompts.source)
    if makes_up and config.regenerate.how != "server":
        yield "prompts", 'a source of kind "target" needs regenerate.how = "server"'
    if not config.prompts.source and not config.regenerate.reuse:
        yield "prompts", "no [[prompts.source]], so there is nothing to train on"


def _source(source: Source) -> Iterator[tuple[str, str]]:
    if source.kind not in SOURCE_KINDS:
        yield "source", f"kind is {source.kind!r}, expected " + " or ".join(SOURCE_KINDS)
    elif not getattr(source, SOURCE_KINDS[source.kind]):
        needed = SOURCE_KINDS[source.kind]
        yield "source", f"{source.name!r} of kind {source.kind} has no {needed}"
    if source.vary < 0:
        yield "source", f"vary is {source.vary}, expected at least 0"
    elif source.vary and source.kind not in ("jsonl", "hub"):
        yield "source", f"vary is {source.vary} for {source.kind}, expected 0: it is for records"
