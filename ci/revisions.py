"""The revisions of the matrix's pairs on the hub.

Publishers replace drafts in place: the same repository, other weights. So what is compared is
the commit, and which files differ between the pinned one and the newest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from dflash_plugin.errors import MissingDependencyError, SourceUnreachableError
from dflash_plugin.matrix import DFLASH2, PUBLISHED, Matrix

TIMEOUT = 30.0
"""Seconds for an answer."""

_DOCUMENTS = {".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".webp", ""}
"""Suffixes of files that change nothing a model does ("": LICENSE, .gitattributes)."""


@dataclass(frozen=True)
class Repository:
    """One repository of the matrix and what the hub says of it.

    ``newest``: the commit that its name stands for now. ``differs``: per pinned commit, the files
    other than documents that the newest has otherwise, sorted; None: the hub lost the commit.
    """

    repo: str
    newest: str
    differs: Mapping[str, tuple[str, ...] | None]

    def same_model(self, revision: str) -> bool:
        """Whether only documents differ from that pinned commit."""
        return self.differs.get(revision) == ()


def pinned(data: Matrix) -> dict[str, set[str]]:
    """Repository -> its pinned revisions (none: the newest is meant), of every published pair."""
    found: dict[str, set[str]] = {}
    for pair in data.pairs.values():
        if pair.status in (PUBLISHED, DFLASH2):
            for repo, revision in (
                (pair.target, pair.target_revision),
                (pair.draft, pair.draft_revision),
            ):
                found.setdefault(repo, set()).update({revision} if revision else set())
    return found


def look_up(
    repos: Mapping[str, Iterable[str]], unreachable: list[str], note: Callable[[str], None]
) -> dict[str, Repository]:
    """What the hub says of each; what it did not tell is added to ``unreachable``.

    Args:
        repos: repository -> pinned revisions.
        note: is called with each name before it is asked for.

    Raises:
        MissingDependencyError: no huggingface_hub.
    """
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as err:
        raise MissingDependencyError(
            "huggingface_hub is needed to look up revisions", hint="pip install huggingface_hub"
        ) from err
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    found = {}
    for number, (repo, revisions) in enumerate(repos.items()):
        note(repo)
        try:
            found[repo] = _look(api, repo, revisions)
        except SourceUnreachableError as err:
            unreachable.append(err.message)
        except Exception as err:  # which of its HTTP clients the library uses depends on its age
            left = ", ".join([*repos][number:])
            unreachable.append(f"the hub was not reached ({type(err).__name__}): {left}")
            break  # nor will it answer for the others, each after a time-out
    return found


def _look(api: Any, repo: str, revisions: Iterable[str]) -> Repository:
    newest, files = _files(api, repo, None)
    differs: dict[str, tuple[str, ...] | None] = {}
    for revision in sorted(set(revisions) - {newest}):
        try:
            _, old = _files(api, repo, revision)
        except LookupError:
            differs[revision] = None
            continue
        names = {n for n in {*old, *files} if old.get(n) != files.get(n)}
        differs[revision] = tuple(
            sorted(n for n in names if PurePosixPath(n).suffix.lower() not in _DOCUMENTS)
        )
    return Repository(repo, newest, differs)


def _files(api: Any, repo: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """(commit, path -> content id) of a revision; ``LookupError``: there is no such revision."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at {revision}" if revision else ""
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        commit = info.sha
        # Without an id nothing can be said to be the same.
        files = {s.rfilename: s.blob_id or f"{commit} {s.rfilename}" for s in info.siblings}
    except RevisionNotFoundError as err:
        raise LookupError(revision) from err
    except RepositoryNotFoundError as err:
        raise SourceUnreachableError(f"{repo}: not on the hub, or private") from err
    except HfHubHTTPError as err:
        status = getattr(err.response, "status_code", "an error")
        raise SourceUnreachableError(f"{repo}{at}: the hub answered {status}") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise SourceUnreachableError(
            f"{repo}{at}: the hub's answer cannot be read ({type(err).__name__})"
        ) from err
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise SourceUnreachableError(f"{repo}{at}: the hub's answer names no commit")
    return commit, files
