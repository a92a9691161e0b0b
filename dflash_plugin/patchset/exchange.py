"""A patch set as commits of a git checkout of the engine, one a patch, and back.

What the files have and a commit has no place for (the patch's file name, the comments of the
series) goes into two more lines of the commit's message. So the same bytes come back, whatever
the user's git is configured to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import cache
from ..errors import PatchConflictError, PatchError, PatchStateError, UsageError
from .format import FROM_LINE, SUBJECT, FilePatch, Patch, parse
from .series import NAME, SERIES, PatchSet, series_text
from .text import apply_text
from .tree import GitTree, git

_OWN = ("Patch-Name: ", "Series-Comment: ")
# Every choice that a user's configuration could make otherwise.
_DIFF = (
    *("diff-tree", "-r", "--patch-with-stat", "--summary", "--stat=72", "--full-index", "-U3"),
    *("--no-renames", "--no-ext-diff", "--no-textconv", "--no-color", "--inter-hunk-context=0"),
    *("--diff-algorithm=myers", "--indent-heuristic", "--src-prefix=a/", "--dst-prefix=b/"),
)


@dataclass(frozen=True)
class Imported:
    """The commits of a patch set, oldest first, and the patches that export would write anew."""

    branch: str
    commits: tuple[str, ...]
    rewritten: tuple[str, ...]


def import_set(tree: GitTree, patch_set: PatchSet) -> Imported:
    """Commit every patch of a set onto HEAD, on a new branch, and check that out.

    Same base, same set: same commits. Nothing is changed unless every patch applies.

    Raises:
        PatchStateError: the checkout is not clean, or the branch exists.
        PatchConflictError: a hunk does not apply; names file, hunk and line.
    """
    name = patch_set.id.replace("/", "-")
    branch = f"dflash/{name}"
    if tree.state() is not None:
        raise PatchStateError(
            f"{tree.root}: patched already", hint="dflash-plugin patch revert --git"
        )
    changed = git(tree.root, "status", "--porcelain", "--untracked-files=no").decode()
    if changed:
        raise PatchStateError(
            f"{tree.root}: not as in HEAD: {', '.join(line[3:] for line in changed.splitlines())}",
            hint="commit or stash the changes",
        )
    if git(tree.root, "for-each-ref", f"refs/heads/{branch}"):
        raise PatchStateError(
            f"{tree.root}: there is a branch {branch}", hint=f"git branch -D {branch}"
        )
    base = _line(tree, "rev-parse", "HEAD")
    commits: list[str] = []
    above = patch_set.comments or ((),) * len(patch_set.patches)
    index = tree.root / Path(tree.state_path).with_name("dflash-plugin-index")
    try:
        env = {"GIT_INDEX_FILE": str(index)}
        git(tree.root, "read-tree", base, env=env)
        for patch, comments in zip(patch_set.patches, above, strict=True):
            for file in patch.files:
                _stage(tree, file, env)
            made = git(tree.root, "write-tree", env=env).decode().strip()
            parent = commits[-1] if commits else base
            commits.append(_commit(tree, patch, comments, made, parent))
    finally:
        index.unlink(missing_ok=True)
    texts = [_format(tree, commit)[1] for commit in commits]
    again = zip(patch_set.patches, texts, strict=True)
    git(tree.root, "update-ref", f"refs/dflash-plugin/{name}", base)
    git(tree.root, "checkout", "--quiet", "-b", branch, commits[-1])
    return Imported(branch, tuple(commits), tuple(p.name for p, text in again if p.text != text))


def export_set(tree: GitTree, folder: Path, base: str | None = None) -> list[str]:
    """Write the commits since ``base`` as a patch set into ``folder``, which is replaced whole.

    Args:
        base: a revision; None: the one that the current branch was imported onto.

    Returns:
        The names of the patches.

    Raises:
        UsageError: no base is known, or ``folder`` has other files.
        PatchError: a commit cannot be a patch (a merge, no fields, a binary file …).
    """
    if base is None:
        branch = _line(tree, "rev-parse", "--abbrev-ref", "HEAD")
        ref = f"refs/dflash-plugin/{branch.removeprefix('dflash/')}"
        base = git(tree.root, "for-each-ref", "--format=%(objectname)", ref).decode().strip()
        if not base:
            raise UsageError(
                f"{tree.root}: {branch} was not made by `patch import`",
                hint="name the release's own revision with --base",
            )
    commits = _line(tree, "rev-list", "--reverse", f"{base}..HEAD", "--").split()
    if not commits:
        raise UsageError(f"{tree.root}: no commit since {base}", hint="name another --base")
    other = [p.name for p in folder.glob("*") if p.name != SERIES and p.suffix != ".patch"]
    if other:
        raise UsageError(f"{folder}: has files that are no patches: {', '.join(sorted(other))}")
    written: dict[str, str] = {}
    comments: list[list[str]] = []
    for commit in commits:
        name, text, above = _format(tree, commit)
        parse(text, name)
        if name in written:
            raise PatchError(f"{commit[:12]}: there is a {name} already", hint="reword its subject")
        written[name] = text
        comments.append(above)
    with cache.staged_dir(folder) as staging:
        for name, text in written.items():
            (staging / name).write_bytes(text.encode())
        (staging / SERIES).write_bytes(series_text(list(written), comments).encode())
    return list(written)


def _line(tree: GitTree, *args: str) -> str:
    return git(tree.root, *args).decode().strip()


def _stage(tree: GitTree, file: FilePatch, env: Mapping[str, str]) -> None:
    """One file of a patch, in the index."""
    path = tree.prefix + file.path
    listed = git(tree.root, "ls-files", "-s", "-z", "--", f":(literal){path}", env=env).decode()
    mode, old = "100644", None
    if listed:
        mode, blob = listed.split()[:2]
        if mode not in ("100644", "100755"):
            raise PatchConflictError(f"{file.patch}: {path} is not a plain file", path=file.path)
        if blob != file.old_blob:
            old = _text(git(tree.root, "cat-file", "blob", blob), file)
            apply_text(file, old)  # names the hunk, if there is one
            raise PatchConflictError(
                f"{file.patch}: {path}: its hunks apply, but the file is not the one the patch is "
                f"for: git id {blob}, expected {file.old_blob}",
                path=file.path,
            )
        old = _text(git(tree.root, "cat-file", "blob", blob), file)
    new = apply_text(file, old)
    if new is None:
        git(tree.root, "update-index", "--force-remove", "--", path, env=env)
        return
    blob = git(tree.root, "hash-object", "-w", "--stdin", data=new.encode()).decode().strip()
    if blob != file.new_blob:
        raise PatchConflictError(
            f"{file.patch}: {path}: the patch does not lead to the file it promises",
            path=file.path,
            hint="the patch was edited by hand: make the change in git, and export it",
        )
    git(tree.root, "update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}", env=env)


def _text(data: bytes, file: FilePatch) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise PatchConflictError(
            f"{file.patch}: {file.path}: is not UTF-8 text", path=file.path
        ) from err


def _commit(tree: GitTree, patch: Patch, comments: Sequence[str], made: str, parent: str) -> str:
    own = [_OWN[0] + patch.name, *(_OWN[1] + line for line in comments)]
    message = patch.message + "".join(f"{line}\n" for line in own)
    person, _, mail = patch.author[:-1].partition(" <")
    env = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", person), ("EMAIL", mail), ("DATE", patch.date))
    }
    command = ["-c", "i18n.commitEncoding=UTF-8", "-c", "commit.gpgSign=false", "commit-tree"]
    made = git(tree.root, *command, made, "-p", parent, data=message.encode(), env=env).decode()
    return made.strip()


def _format(tree: GitTree, commit: str) -> tuple[str, str, list[str]]:
    """A commit's patch: file name, text, and the comments above it in the series."""
    raw = git(
        tree.root, "show", "-s", "--no-show-signature", "--format=%P%n%an <%ae>%n%aD%n%B", commit
    )
    parents, author, when, message = raw.decode().split("\n", 3)
    if len(parents.split()) != 1:
        raise PatchError(f"{commit[:12]}: is a merge, or has no parent", hint="rebase the branch")
    lines = message.strip("\n").split("\n")
    comments = [line[len(_OWN[1]) :] for line in lines if line.startswith(_OWN[1])]
    named = [line[len(_OWN[0]) :] for line in lines if line.startswith(_OWN[0])]
    lines = [line for line in lines if not line.startswith(_OWN)]
    name = named[-1] if named else _slug(lines[0])
    if not NAME.fullmatch(name):
        raise PatchError(
            f"{commit[:12]}: {name!r} is no name of a patch", hint="such as fix-it.patch"
        )
    touched = git(tree.root, "diff-tree", "-r", "-z", "--name-only", parents, commit).decode()
    outside = [path for path in touched.split("\0") if path and not path.startswith(tree.prefix)]
    if outside:
        raise PatchError(f"{commit[:12]}: changes files that no wheel has: {', '.join(outside)}")
    relative = (f"--relative={tree.prefix}",) if tree.prefix else ()
    # Attributes of the checkout and the user's own settings would change headings and colours.
    inside = tree.root / Path(tree.state_path).parent
    alone = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_DIR": str(inside),
        "GIT_INDEX_FILE": str(inside / "no-index"),
        "GIT_WORK_TREE": str(inside / "objects"),
    }
    settings = ["-c", f"safe.directory={tree.root}", "-c", "core.attributesFile=/dev/null"]
    settings += ["-c", "diff.suppressBlankEmpty=false", "-c", "core.quotePath=true"]
    diff = git(tree.root, *settings, *_DIFF, *relative, parents, commit, env=alone)
    try:
        changes = diff.decode()
    except UnicodeDecodeError as err:
        raise PatchError(f"{commit[:12]}: a file in it is not UTF-8 text") from err
    head = [FROM_LINE, f"From: {author}", f"Date: {when}", SUBJECT + lines[0]]
    return name, "\n".join([*head, *lines[1:]]) + f"\n---\n{changes}", comments


def _slug(subject: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")[:60].strip("-") + ".patch"
