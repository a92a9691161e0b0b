"""Keep the pages of freed tensors, on machines whose C library gives them back each time."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_pages() -> bool:
    """Tell glibc to keep what is freed for this process's next tensors; whether it will.

    By itself it maps every large tensor anew, and the kernel fills the pages with zeros: an
    eighth of a small draft's step on a CPU was that. Of no use elsewhere, and no harm.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
    done = [mallopt(name, value) for name, value in settings]  # each of them, whatever one says
    return done == [1, 1, 1]
