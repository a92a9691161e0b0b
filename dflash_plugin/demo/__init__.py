"""The default pair: SmolLM2-135M-Instruct and the DFlash draft packaged with this plugin.

It lets every command be tried without a model hub: the target comes as GGUF inside a
wheel on the package index and is converted once, the draft (24 MB) is part of this package.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..cache import cache_dir, locked, staged_dir
from ..errors import CheckpointError
from . import manifest
from .convert import CONVERTER_VERSION, FILES, convert_gguf
from .fetch import SMOLLM2, Source, extract, find

DRAFT = Path(__file__).parent / "draft"
DRAFT_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class DemoPair:
    """Two ordinary model folders: what ``--target`` and ``--draft`` take."""

    target: Path
    draft: Path


def demo_pair(
    *, progress: bool = True, wheel: Path | None = None, verify: bool = False
) -> DemoPair:
    """The default pair's folders; fetches and converts the target on first use.

    Args:
        progress: show progress bars if stderr is a terminal.
        wheel: the wheel (or the GGUF in it) where the package index cannot be reached.
        verify: compare every file's SHA-256, not only sizes.

    Raises:
        DownloadError: the wheel cannot be fetched or is not the pinned one.
        CheckpointError: the wheel's model or the packaged draft is damaged.
        CacheError: the cache cannot be written.
        MissingDependencyError: the extra ``demo`` is not installed.
    """
    draft = packaged_draft(verify=verify)
    return DemoPair(demo_target(progress=progress, wheel=wheel, verify=verify), draft)


def packaged_draft(*, verify: bool = False) -> Path:
    """The draft's folder inside this package, checked against its ``manifest.json``."""
    wrong = manifest.problem(DRAFT, DRAFT_FILES, full=verify)
    if wrong:
        raise CheckpointError(
            f"{DRAFT}: {wrong}",
            hint="reinstall: pip install --force-reinstall dflash-plugin "
            "(container images leave its weights out: use the package, or a pair of your own)",
        )
    return DRAFT


def target_dir() -> Path:
    """Where the converted target is kept; not necessarily there yet."""
    return cache_dir() / "models" / f"smollm2-135m-instruct-c{CONVERTER_VERSION}"


def demo_target(
    *,
    progress: bool = True,
    wheel: Path | None = None,
    verify: bool = False,
    source: Source = SMOLLM2,
) -> Path:
    """The converted target's folder; built if it is missing, rebuilt if it is damaged.

    Several processes may ask at once: one builds, the others wait. See
    :func:`demo_pair` for arguments and errors.
    """
    folder = target_dir()
    facts = {
        "converter": CONVERTER_VERSION,
        "source": {
            "wheel": source.wheel,
            "wheel_sha256": source.wheel_sha256,
            "gguf_sha256": source.gguf_sha256,
        },
    }
    if folder.exists() and not manifest.problem(folder, FILES, full=verify, **facts):
        return folder
    with locked("demo-target", sweep=folder):
        if folder.exists():
            wrong = manifest.problem(folder, FILES, full=verify, **facts)
            if not wrong:
                return folder  # another process built it while this one waited
            print(f"{folder}: {wrong}; converting it again", file=sys.stderr)
        found = find(source, wheel, progress=progress)
        with staged_dir(folder) as staging:
            gguf = found
            if found.suffix != ".gguf":
                gguf = staging / "source.gguf"
                extract(found, source, gguf)
            convert_gguf(gguf, staging, progress=progress)
            if gguf != found:
                gguf.unlink()
            manifest.write(staging, FILES, **facts)
    return folder
