"""A model name -> a local folder: as given, the embedded pair, or the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import DownloadError, MissingDependencyError, ModelNotFoundError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG_FILES = ("config.json", "generation_config.json", "*.safetensors.index.json")


def local_folder(name: str) -> Path | None:
    """``name`` as a folder on this machine, or None if it looks like a hub id.

    Raises:
        ModelNotFoundError: it is neither a folder nor a hub id.
    """
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            return path.resolve()
        if _REPO_ID.fullmatch(name) and not path.exists():
            return None
    except (OSError, RuntimeError, ValueError):
        pass  # too long, no such user, not to be looked into: not a folder to be had
    raise ModelNotFoundError(
        f"{name}: no such model folder",
        hint="give a local folder that holds config.json, or a hub id such as Qwen/Qwen3-8B",
    )


def fetch(repo: str, revision: str | None, *, weights: bool) -> Path:
    """A hub repository's snapshot folder: configs only, or with its safetensors.

    Files come from the local hub cache where they are there already.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        DownloadError: the hub cannot be reached, or has no such repository.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as err:
        raise MissingDependencyError(
            f"huggingface_hub is needed to look up {repo}",
            hint="pip install huggingface_hub, or give a local model folder",
        ) from err
    patterns = [*CONFIG_FILES, "*.safetensors"] if weights else list(CONFIG_FILES)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as err:  # the library raises a dozen unrelated types here
        at = f" at revision {revision}" if revision else ""
        raise DownloadError(
            f"{repo}{at}: not in the local hub cache and not to be fetched: "
            f"{str(err).splitlines()[0] if str(err) else type(err).__name__}",
            hint="check the name, the network and your hub token, or give a local folder",
        ) from err
