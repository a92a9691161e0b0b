"""Safetensors headers: what is read from good files, and what is said about bad ones."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import header_of, write_raw, write_weights

from dflash_plugin import checkpoint
from dflash_plugin.errors import CheckpointError, ModelNotFoundError

SHAPES = {"a.weight": (2, 3), "b.weight": (4,), "empty": (0, 5), "scalar": ()}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def file(tmp_path):
    return write_weights(tmp_path / "model.safetensors", SHAPES)


def sharded(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


# --- one file ---


def test_names_dtypes_and_shapes_are_read(file):
    found = checkpoint.read_header(file)
    assert {name: info.shape for name, info in found.items()} == SHAPES
    assert {info.dtype for info in found.values()} == {"BF16"}
    assert {info.file for info in found.values()} == {file}


def test_metadata_is_not_a_tensor(tmp_path):
    header = {"__metadata__": {"format": "pt"}, **header_of({"a": (1,)})}
    assert set(checkpoint.read_header(write_raw(tmp_path / "x", header, 2))) == {"a"}


def test_padding_of_the_header_is_allowed(tmp_path):
    text = json.dumps(header_of({"a": (1,)})).encode() + b"     "
    assert set(checkpoint.read_header(write_raw(tmp_path / "x", text, 2))) == {"a"}


def test_dtypes_of_unknown_width_are_taken_by_their_offsets(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}
    assert checkpoint.read_header(write_raw(tmp_path / "x", header, 2))["a"].shape == (3,)


def test_no_tensor_data_is_read(tmp_path):
    size = 1 << 36  # sparse: takes no room, but reading it would take minutes
    path = write_raw(tmp_path / "x", header_of({"a": (size,)}, "U8"))
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + size)
    assert checkpoint.read_header(path)["a"].shape == (size,)


def test_it_agrees_with_the_safetensors_package(tmp_path):
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {"w": numpy.zeros((2, 3), "float16"), "v": numpy.ones(4, "int64")}
    safetensors.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    found = checkpoint.read_header(tmp_path / "x.safetensors")
    assert {n: (i.dtype, i.shape) for n, i in found.items()} == {
        "w": ("F16", (2, 3)),
        "v": ("I64", (4,)),
    }


@pytest.mark.parametrize("name", ["missing.safetensors", ".", "file/x.safetensors"])
def test_what_is_not_a_file_is_not_found(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFoundError, match="no such file"):
        checkpoint.read_header(tmp_path / name)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 40, -1])
def test_truncated_files_are_named(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete"):
        checkpoint.read_header(file)


def test_trailing_bytes_are_refused(file):
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=f"{size + 1} bytes, expected {size}"):
        checkpoint.read_header(file)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 10_000])
def test_a_huge_header_length_is_refused_without_reading_it(file, length):
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        checkpoint.read_header(file)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 50_000, b'{"a": ' + b"1" * 5000 + b"}"]
)
def test_a_header_that_is_not_json_is_refused(tmp_path, text):
    with pytest.raises(CheckpointError):
        checkpoint.read_header(write_raw(tmp_path / "x", text))


@pytest.mark.parametrize("header", [[], "text", 5, None])
def test_a_header_that_is_not_an_object_is_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match="not a JSON object"):
        checkpoint.read_header(write_raw(tmp_path / "x", header))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": 16},
        {"dtype": None},
        {"shape": "1"},
        {"shape": [1.0]},
        {"shape": [True]},
        {"shape": [-1]},
        {"shape": None},
        {"shape": [float("inf")]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 2, 2]},
        {"data_offsets": ["0", "2"]},
        {"data_offsets": [0, float("inf")]},
        {"data_offsets": {"0": 2}},
        {"data_offsets": [-2, 0]},
    ],
)
def test_a_malformed_entry_is_named(tmp_path, change):
    entry = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2], **change}
    with pytest.raises(CheckpointError, match="'weight' is malformed"):
        checkpoint.read_header(write_raw(tmp_path / "x", {"weight": entry}, 2))


@pytest.mark.parametrize("entry", [None, [], "text", 5, {}])
def test_an_entry_that_is_not_a_description_is_named(tmp_path, entry):
    with pytest.raises(CheckpointError, match="'weight' is malformed"):
        checkpoint.read_header(write_raw(tmp_path / "x", {"weight": entry}))


@pytest.mark.parametrize("offsets", [[0, 4], [2, 0], [0, 0]])
def test_offsets_that_do_not_fit_the_shape_are_refused(tmp_path, offsets):
    header = {"weight": {"dtype": "BF16", "shape": [1], "data_offsets": offsets}}
    with pytest.raises(CheckpointError, match="weight: offsets"):
        checkpoint.read_header(write_raw(tmp_path / "x", header, 4))


@pytest.mark.parametrize("start", [0, 1, 3, 100])
def test_overlaps_and_holes_are_refused(tmp_path, start):
    header = header_of({"a": (1,), "b": (1,)})
    header["b"]["data_offsets"] = [start, start + 2]
    with pytest.raises(CheckpointError, match="data starts at"):
        checkpoint.read_header(write_raw(tmp_path / "x", header, start + 2))


def test_a_file_that_cannot_be_read_is_no_traceback(file, monkeypatch):
    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "open", denied)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        checkpoint.read_header(file)


# --- a folder ---


def test_files_are_listed_in_order(tmp_path):
    for name in ("b.safetensors", "a.safetensors", "a.bin"):
        write_weights(tmp_path / name, {})
    found = [path.name for path in checkpoint.weight_files(tmp_path)]
    assert found == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("name", [".", "missing"])
def test_a_folder_without_weights_is_named(tmp_path, name):
    with pytest.raises(ModelNotFoundError, match=str(tmp_path / name)):
        checkpoint.weight_files(tmp_path / name)


def test_shards_are_those_of_the_index(tmp_path):
    write_weights(tmp_path / "1.safetensors", {"a": (1,)})
    write_weights(tmp_path / "2.safetensors", {"b": (2,)})
    write_weights(tmp_path / "stale.safetensors", {"a": (1,)})
    sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    found = checkpoint.read_tensors(tmp_path)
    assert {name: info.file.name for name, info in found.items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }


def test_missing_shards_are_named(tmp_path):
    write_weights(tmp_path / "1.safetensors", {"a": (1,)})
    sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"})
    with pytest.raises(ModelNotFoundError, match=r"2\.safetensors, 3\.safetensors"):
        checkpoint.weight_files(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "5",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": []}}',
        '{"weight_map": {"a": null}}',
        "[" * 50_000,
    ],
)
def test_a_bad_index_is_named(tmp_path, text):
    write_weights(tmp_path / "model.safetensors", {"a": (1,)})
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="no readable weight_map"):
        checkpoint.weight_files(tmp_path)


def test_an_index_that_is_a_folder_is_named(tmp_path):
    (tmp_path / INDEX).mkdir()
    with pytest.raises(CheckpointError, match="no readable weight_map"):
        checkpoint.weight_files(tmp_path)


def test_a_tensor_in_two_files_is_named_with_both(tmp_path):
    write_weights(tmp_path / "new.safetensors", {"a": (1,)})
    write_weights(tmp_path / "old.safetensors", {"a": (1,)})
    with pytest.raises(CheckpointError, match=r"tensor a is in new\.saf.* and old\.saf"):
        checkpoint.read_tensors(tmp_path)


# --- names and shapes ---


def test_tensors_as_expected_are_returned(file):
    assert set(checkpoint.check_tensors(file.parent, SHAPES)) == set(SHAPES)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({**SHAPES, "more": (1,)}, "missing: more"),
        ({k: v for k, v in SHAPES.items() if k != "scalar"}, "not expected: scalar"),
        ({**SHAPES, "b.weight": (5,)}, r"misshapen: b\.weight is \[4\], expected \[5\]"),
        ({**SHAPES, **{f"x{i}": () for i in range(6)}}, "missing: x0, x1, x2, x3 and 2 more"),
    ],
)
def test_differences_are_named(file, expected, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_tensors(file.parent, expected)


def test_all_kinds_of_difference_are_in_one_message(file):
    with pytest.raises(CheckpointError, match=r"missing: .*; not expected: .*; misshapen: "):
        checkpoint.check_tensors(file.parent, {"a.weight": (3, 2), "b.weight": (4,), "c": ()})


# --- checksums ---


def test_sha256_and_progress(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    sizes: list[int] = []
    assert checkpoint.sha256_file(tmp_path / "x", sizes.append) == hashlib.sha256(data).hexdigest()
    assert sum(sizes) == len(data)


# --- anything ---

MUTATION = st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 400), st.binary())


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4))
def test_damaged_files_raise_our_errors_alone(file, mutations):
    write_weights(file, SHAPES)
    data = bytearray(file.read_bytes())
    for kind, place, extra in mutations:
        at = place % (len(data) or 1)
        if kind == "flip":
            data[at : at + len(extra)] = extra
        elif kind == "cut":
            del data[at : at + max(1, len(extra))]
        else:
            data[at:at] = extra
    file.write_bytes(data)
    try:
        found = checkpoint.read_tensors(file.parent)
    except (CheckpointError, ModelNotFoundError) as err:
        assert str(file.parent) in err.message
    else:
        assert all(isinstance(name, str) for name in found)
