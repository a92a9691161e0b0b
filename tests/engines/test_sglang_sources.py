"""The repairs of SGLang on the releases' own source text; nothing here runs.

``DFLASH_WHEEL_SOURCES`` names a folder of more unpacked wheels (``<release>/sglang/...``).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ci import engine_sources, wheel_sources
from dflash_plugin import matrix, shims, support, support_sglang
from dflash_plugin.errors import DownloadError
from dflash_plugin.shims import sources

FOLDER = Path(os.environ.get("DFLASH_WHEEL_SOURCES") or "/nonexistent")
UNPACKED = {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/sglang"))}
ENGINES = {row.version: row for row in matrix.load().engines.values() if row.name == "sglang"}
RELEASES = [
    pytest.param(
        version,
        marks=pytest.mark.skipif(
            version not in {*UNPACKED, *ENGINES},
            reason="neither in the matrix nor in DFLASH_WHEEL_SOURCES",
        ),
    )
    for version in ("0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
]
TARGETS = [
    f"sglang.srt.models.{name}"
    for name in ("qwen3", "llama", "gemma4_causal", "gpt_oss", "minimax_m2")
]
FILES = engine_sources.files("sglang") | {f"{name.replace('.', '/')}.py" for name in TARGETS}

# Per repair: text of the first symbol it knows, or of its module, that shows the difference,
# and text that would show it is gone.
SHOWS = {
    "sglang-cpu-arguments": ('.device.startswith("cuda")', "supports_speculative_algorithm"),
    "sglang-cpu-cache-locs": ("assign_extend_cache_locs[(batch_size,)]", "platform_fn"),
    "sglang-cpu-streams": ("batch.seq_lens.record_stream(", None),
    "sglang-cpu-draft-backend": ("attention_backend_override or", "supports_speculative_draft"),
    "sglang-cpu-req-to-token": ("assign_req_to_token_pool[(batch_size,)]", "supports_triton"),
    "sglang-cpu-kv-copy": ("copy_all_layer_kv_cache", "supports_triton"),
    "sglang-cpu-norm-rope": ("self.use_table_qk_norm_rope = (", "supports_triton"),
    "sglang-cpu-verify": ("forward_batch.extend_prefix_lens", "is_target_verify"),
    "sglang-cpu-sampling": ("_DFLASH_SAMPLING_VERIFY_AVAILABLE", None),
    "sglang-draft-dtype": ("input_embeds.bfloat16()", None),
    "sglang-draft-tensors": ("if resolved_name is None:", "missing_params"),
    "sglang-draft-attention": ("get_dflash_attention_sliding_window_size", "use_swa"),
}


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> tuple[str, sources.Read]:
    version = request.param
    site = UNPACKED.get(version)
    if site is None:
        try:
            site = wheel_sources.fetch("sglang", version, FILES)
        except DownloadError as err:
            pytest.skip(f"not run: {err.message}")
    return version, sources.installed(site)


def text_of(read: sources.Read, shim: shims.Shim) -> str:
    """The source of the first symbol that a repair knows."""
    text = read(shim.module)
    assert text is not None
    return sources.source_in(text, next(iter(shim.fingerprints))) or ""


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_every_repair_knows_the_release(release: tuple[str, sources.Read], platform: str) -> None:
    version, read = release
    names = support.decide("sglang", version, platform).shims
    assert len(names) >= 4
    wrong = {name: sources.differences(shims.load(name), read) for name in names}
    assert not any(wrong.values()), wrong


def still_needed(release: tuple[str, sources.Read], *, cpu: bool) -> None:
    version, read = release
    for name in support.decide("sglang", version, "cpu").shims:
        if name not in SHOWS or ("-cpu-" in name) is not cpu:
            continue
        shown, gone = SHOWS[name]
        text = text_of(read, shims.load(name))
        assert shown in text, f"{name} is not needed in {version}: remove it, or move its range"
        assert gone is None or gone not in text, name


def test_each_cpu_repair_is_still_needed(release: tuple[str, sources.Read]) -> None:
    still_needed(release, cpu=True)


def test_each_repair_is_still_needed(release: tuple[str, sources.Read]) -> None:
    still_needed(release, cpu=False)
    text = release[1]("sglang.srt.models.minimax_m2") or ""
    assert "def set_eagle3_layers_to_capture" in text
    assert "def set_dflash_layers_to_capture" not in text


def test_taps_are_counted_as_the_pair_does(release: tuple[str, sources.Read]) -> None:
    """Tap i is what layer i gives: such models hand out what enters layer i + 1."""
    for model in TARGETS:
        text = release[1](model) or ""
        assert "[val + 1 for val in layer_ids]" in text, model


def test_the_guard_asks_for_what_support_names() -> None:
    versions = {d.last for d in support_sglang.DIFFERENCES}
    assert support_sglang.newest() in versions
    assert {d.shim for d in support_sglang.DIFFERENCES} == set(shims.SGLANG_NAMES)
