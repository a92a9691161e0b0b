"""Patch sets: an engine's source changed once, exactly and reversibly.

``patches/<engine>/<version>/<variant>`` is data; :func:`load` reads a set, :func:`apply_text`
applies one of its file patches to a text, and :func:`apply` and :func:`revert` the whole set to
the files of an engine.
"""

from .actions import Status, apply, check, revert, status
from .exchange import Imported, export_set, import_set
from .format import FIELDS, FilePatch, Hunk, Patch, parse, reverse
from .series import PatchSet, available, load, patches_dir
from .text import apply_text, blob_id
from .transaction import Files, interrupted
from .tree import GitTree, Tree, git_tree, site_tree

__all__ = [
    "FIELDS",
    "FilePatch",
    "Files",
    "GitTree",
    "Hunk",
    "Imported",
    "Patch",
    "PatchSet",
    "Status",
    "Tree",
    "apply",
    "apply_text",
    "available",
    "blob_id",
    "check",
    "export_set",
    "git_tree",
    "import_set",
    "interrupted",
    "load",
    "parse",
    "patches_dir",
    "reverse",
    "revert",
    "site_tree",
    "status",
]
