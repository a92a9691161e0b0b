"""The support decision: every release that was looked at, and everything else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin import shims, support
from dflash_plugin.support import Level, decide

NATIVE, REGISTERED, SHIM, REFUSED = Level.NATIVE, Level.REGISTERED, Level.SHIM, Level.REFUSED
TESTS = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
NAMED = sorted({row.shim for row in support._VLLM_DIFFERENCES})


@pytest.mark.parametrize(
    ("version", "platform", "level"),
    [
        ("0.31.0", "cpu", SHIM),
        ("0.32.0", "cpu", SHIM),
        ("0.32.0+cpu", "cpu", SHIM),
        ("0.32.0.post1", "cpu", SHIM),
        ("0.33.0", "cpu", SHIM),
        ("0.31.0", "cuda", SHIM),
        ("0.32.0+cu130", "cuda", SHIM),
        ("0.33.0", "rocm", SHIM),
        ("0.33.0", "unknown", SHIM),
        ("0.30.0", "cpu", SHIM),
        ("0.30.0", "cuda", SHIM),
        ("0.25.0", "cpu", SHIM),
        ("0.25.1", "cuda", SHIM),
        ("0.25.2", "cuda", SHIM),
        ("0.19.1", "cuda", REGISTERED),
        ("0.19.1+cu129", "cuda", REGISTERED),
        ("0.19.0", "cpu", REGISTERED),
        ("0.18.1", "cpu", REGISTERED),
        ("0.18.0", "unknown", REGISTERED),
        ("0.17.1", "cpu", REFUSED),
        ("0.17.1", "cuda", REFUSED),
        ("0.19.1", "rocm", REFUSED),
        ("0.18.1", "xpu", REFUSED),
        ("0.24.0", "cpu", SHIM),
        ("0.24.0", "cuda", SHIM),
        ("0.22.0", "cuda", SHIM),
        ("0.20.0", "cpu", SHIM),
        ("0.20.2", "cuda", SHIM),
        ("0.21.0", "unknown", SHIM),
        ("0.1", "cpu", REFUSED),
        ("0.34.0", "cpu", REFUSED),
        ("0.34.0", "cuda", REFUSED),
        ("0.34.0.dev1", "cpu", REFUSED),
        ("0.33.0.post1", "cpu", REFUSED),
        ("0.32.0rc1", "cpu", REFUSED),
        ("0.32.0.dev5+gabcdef", "cuda", REFUSED),
        ("1!0.32.0", "cuda", REFUSED),
        ("1.0", "cuda", REFUSED),
        ("", "cpu", REFUSED),
        ("nightly", "cpu", REFUSED),
        ("0.32.0-", "cpu", REFUSED),
        ("9" * 5000, "cpu", REFUSED),
    ],
)
def test_vllm(version, platform, level):
    found = decide("vllm", version, platform)
    assert found.level is level
    assert found.usable is (level is not REFUSED)
    assert (found.engine, found.version, found.platform) == ("vllm", version, platform)
    assert bool(found.next_step) is (level is REFUSED)


CPU = {"context-k-norm", "cpu-expand"}
GPU = {"mm-prefix", "triton-geometry"}
ALL = {"draft-scale", "draft-lora", "mixed-swa", "mixed-swa-model"}
NEW = ("0.25.0", "0.25.1", "0.26.0", "0.27.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0",
       "0.32.0", "0.33.0")  # fmt: skip


@pytest.mark.parametrize("version", NEW)
def test_releases_with_a_dflash_of_their_own_are_repaired(version):
    expected = set(ALL)
    if version.startswith("0.25."):
        expected |= {"swa-causal", "swa-causal-v2"}
    else:
        expected.add("mixed-swa-config")
    if support.Version(version) >= support.Version("0.28.0"):
        expected.add("draft-sampling")
    cpu = decide("vllm", version, "cpu")
    assert set(cpu.shims) == expected | CPU | ({"cpu-kernels"} if version == "0.30.0" else set())
    assert cpu.limits == (support._CPU_RUNS,)
    for platform in ("cuda", "rocm", "unknown"):
        assert set(decide("vllm", version, platform).shims) == expected | GPU


def test_a_shim_that_knows_the_published_proposer_comes_before_those_that_change_it():
    found = decide("vllm", "0.25.1", "cpu").shims
    assert found.index("swa-causal") < found.index("mixed-swa")


OLD = {"draft-windows", "draft-scaling", "draft-lora"}
OLD_CPU = {"cpu-expand", "cpu-packed-qkv", "cpu-dflash-inputs"}
TAPS, EARLY, SAMPLER = (
    {"tap-offset"},
    {"draft-lookahead", "draft-context-end"},
    {"cpu-sampler-arguments"},
)
ATTENTION = {"cpu-kv-update", "cpu-stale-kv"}


@pytest.mark.parametrize(
    ("version", "everywhere", "on_the_cpu"),
    [
        ("0.20.0", OLD | TAPS | EARLY, OLD_CPU | ATTENTION | SAMPLER | {"cpu-taps"}),
        ("0.20.2", OLD | TAPS | EARLY, OLD_CPU | ATTENTION | SAMPLER | {"cpu-taps"}),
        ("0.21.0", OLD | TAPS | EARLY, OLD_CPU | ATTENTION | {"cpu-taps"}),
        ("0.22.1", OLD | EARLY, OLD_CPU | ATTENTION),
        ("0.23.0", OLD, OLD_CPU | ATTENTION | SAMPLER),
        ("0.24.0", OLD | {"draft-windows-v2"}, OLD_CPU | SAMPLER),
    ],
)
def test_the_releases_that_lack_most(version, everywhere, on_the_cpu):
    assert set(decide("vllm", version, "cuda").shims) == everywhere
    assert set(decide("vllm", version, "cpu").shims) == everywhere | on_the_cpu


@pytest.mark.parametrize("engine", ["sglang", "transformers", ""])
def test_other_engines_run_as_published(engine):
    found = decide(engine, "0.32.0", "cuda")
    assert found.level is REFUSED
    assert "runs as published" in found.reason
    assert found.next_step


def test_a_newer_release_is_told_what_the_newest_known_one_is():
    assert "newest known release: 0.33.0" in decide("vllm", "0.34.0", "cuda").reason


def test_one_line_says_it_all():
    line = decide("vllm", "0.32.0", "cuda").line()
    assert line.startswith(
        "DFlash on vllm 0.32.0 on cuda: shim (the release's own dflash, repaired"
    )
    assert "\n" not in line
    assert len(line) < 700


def test_rows_are_complete():
    ends = [support.Version(end) for row in support._VLLM for end in (row.first, row.last)]
    assert ends == sorted(ends)
    for row in support._VLLM:
        assert row.reason
        assert row.level is not SHIM
    for difference in support._VLLM_DIFFERENCES:
        assert difference.what
        first, last = support.Version(difference.first), support.Version(difference.last)
        assert ends[0] <= first <= last <= ends[-1]


@pytest.mark.parametrize("name", NAMED)
def test_every_shim_named_is_there_and_says_what_it_is_for(name):
    shim = shims.load(name)
    assert shim.name == name
    for text in (shim.symptom, shim.mechanism, shim.removal, shim.module):
        assert text
    named = re.findall(r"\btest_\w+", shim.removal)
    assert named, "the removal condition names the test that shows it"
    assert all(test in TESTS for test in named)
    assert shim.fingerprints
    for known in shim.fingerprints.values():
        assert known
        assert all(len(value) == 16 and int(value, 16) >= 0 for value in known)


def test_every_shim_there_is_used():
    assert sorted(shims.NAMES) == NAMED


VERSIONS = st.text() | st.from_regex(r"\d{1,3}(\.\d{1,3}){0,3}(rc|\.dev|\.post|\+)?\w{0,3}")


@settings(max_examples=200)
@given(
    engine=st.just("vllm") | st.text(),
    version=VERSIONS,
    platform=st.sampled_from(["cpu", "cuda", "unknown"]) | st.text(),
)
def test_decide_never_raises(engine, version, platform):
    found = decide(engine, version, platform)
    assert found.reason
    assert found.usable or found.next_step


def test_swa_causal_is_still_needed():
    """Fails once no release is supported that takes causality from one field alone."""
    supported = [row for row in support._VLLM if row.level is not REFUSED]
    assert any(
        support.Version(row.first) <= support.Version("0.25.1") <= support.Version(row.last)
        for row in supported
    )
