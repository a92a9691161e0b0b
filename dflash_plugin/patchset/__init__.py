"""Patch sets: an engine's source changed once, exactly and reversibly.

``patches/<engine>/<version>/<variant>`` is data; :func:`load` reads a set, :func:`apply_text`
applies one of its file patches to a text, and :func:`apply` and :func:`revert` the whole set to
the files of an engine.
"""

from .actions import Status, apply, check, revert, status
from .format import FIELDS, FilePatch, Hunk, Patch, parse, reverse
from .series import PatchSet, available, load, patches_dir
from .text import apply_text, blob_id
from .tree import Tree, git_tree, site_tree

__all__ = [
    "FIELDS",
    "FilePatch",
    "Hunk",
    "Patch",
    "PatchSet",
    "Status",
    "Tree",
    "apply",
    "apply_text",
    "available",
    "blob_id",
    "check",
    "git_tree",
    "load",
    "parse",
    "patches_dir",
    "reverse",
    "revert",
    "site_tree",
    "status",
]
