"""Pages of freed tensors are kept, where the C library can be told to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from dflash_plugin.training.recipe.memory import keep_pages
kept = keep_pages() if sys.argv[1] == "keep" else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(1 << 23)
before = faults()
for _ in range(50):
    bytearray(1 << 23)
print(kept, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_pages_are_used_again():
    found = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True
        )
        found[how] = done.stdout.split()
    assert found["keep"][0] == "True"
    assert int(found["keep"][1]) * 20 < int(found["leave"][1])


def test_elsewhere_nothing_is_done(monkeypatch):
    from dflash_plugin.training.recipe import memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_pages()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_pages()
