"""Patch sets: an engine's source changed once, exactly and reversibly.

``patches/<engine>/<version>/<variant>`` is data; this reads it (:func:`load`), applies a file
patch to a text (:func:`apply_text`), and a whole set to an engine's files.
"""

from .format import FIELDS, FilePatch, Hunk, Patch, parse, reverse
from .series import PatchSet, available, load, patches_dir
from .text import apply_text, blob_id

__all__ = [
    "FIELDS",
    "FilePatch",
    "Hunk",
    "Patch",
    "PatchSet",
    "apply_text",
    "available",
    "blob_id",
    "load",
    "parse",
    "patches_dir",
    "reverse",
]
