"""Preflight of a pair: each mismatch is found, named, and has its exit code."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import DRAFT, TARGET, make_draft, make_target, write_config, write_weights

from dflash_plugin import pair
from dflash_plugin.checkpoint import sha256_file
from dflash_plugin.errors import CheckpointError, ModelNotFoundError, PairMismatchError
from dflash_plugin.pair import Check, preflight, require

NAMES = ["target config", "target weights", "draft config", "draft tensors", "hidden size"]
NAMES += ["vocabulary", "taps", "mask token", "block size"]


@pytest.fixture
def folders(tmp_path):
    return make_target(tmp_path / "target"), make_draft(tmp_path / "draft")


@pytest.fixture
def target(folders):
    return folders[0]


@pytest.fixture
def draft(folders):
    return folders[1]


def failed(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks if check.status == "failed"}


def only_failure(checks: list[Check], name: str, code: int) -> Check:
    """The one failed check, after looking at what every failed one must have."""
    assert list(failed(checks)) == [name]
    found = failed(checks)[name]
    assert found.exit_code == code
    assert found.remedy
    return found


# --- good pairs ---


def test_a_good_pair_passes_every_check(target, draft):
    checks = preflight(target, draft)
    assert [check.name for check in checks] == NAMES
    assert {(check.status, check.exit_code) for check in checks} == {("ok", 0)}
    assert all(check.detail for check in checks)


def hashes(draft):
    return {name: sha256_file(draft / name) for name in ("config.json", "model.safetensors")}


def test_files_may_be_asked_for_by_their_hashes(target, draft):
    checks = preflight(target, draft, draft_sha256=hashes(draft))
    assert (checks[-1].name, checks[-1].status) == ("revision", "ok")


@pytest.mark.parametrize("k", [None, 1, 7])
def test_k_up_to_the_block_less_one_is_right(target, draft, k):
    assert not failed(preflight(target, draft, k))


def test_target_weights_that_are_still_to_come_are_skipped(target, draft):
    (target / "model.safetensors").unlink()
    checks = preflight(target, draft, target_weights=False)
    assert [check.name for check in checks if check.status == "skipped"] == ["target weights"]
    assert not failed(checks)


def test_a_draft_that_names_no_depth_is_checked_by_its_taps(target, draft):
    shutil.rmtree(draft)
    make_draft(draft, num_target_layers=...)
    assert not failed(preflight(target, draft))


# --- pairs that do not fit ---


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"hidden_size": 32}, "hidden size", "hidden_size is 16, but the target's"),
        ({"vocab_size": 65}, "vocabulary", "vocab_size is 64, but the target's is 65"),
        ({"num_hidden_layers": 5}, "taps", "num_target_layers is 4, but the target has 5"),
    ],
)
def test_another_target_is_found(target, draft, changes, check, words):
    write_config(target, {**TARGET, **changes})
    found = only_failure(preflight(target, draft), check, 13)
    assert words in found.detail
    assert str(draft) in found.detail


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"target_hidden_size": 8}, "hidden size", "target_hidden_size is 8"),
        (
            {"num_target_layers": ..., "dflash": {"target_layer_ids": [1, 4]}},
            "taps",
            "target_layer_ids has [4], expected indices 0..3",
        ),
        ({"dflash": {"mask_token_id": 64}}, "mask token", "mask_token_id is 64, expected less"),
    ],
)
def test_another_draft_is_found(target, tmp_path, changes, check, words):
    found = only_failure(preflight(target, make_draft(tmp_path / "other", **changes)), check, 13)
    assert words in found.detail


@pytest.mark.parametrize("k", [0, 8, 100])
def test_k_beyond_the_block_is_found(target, draft, k):
    found = only_failure(preflight(target, draft, k), "block size", 13)
    assert f"num_speculative_tokens is {k}, expected 1..7" in found.detail


# --- folders that are not what they should be ---


def test_a_missing_draft_skips_what_needs_it(target, tmp_path):
    checks = preflight(target, tmp_path / "missing")
    only_failure(checks, "draft config", 12)
    skipped = {check.name for check in checks if check.status == "skipped"}
    assert skipped == set(NAMES) - {"target config", "target weights", "draft config"}


def test_a_missing_target_still_checks_the_draft(tmp_path, draft):
    checks = preflight(tmp_path / "missing", draft)
    only_failure(checks, "target config", 12)
    status = {check.name: check.status for check in checks}
    assert status["draft tensors"] == status["block size"] == "ok"


@pytest.mark.parametrize("which", ["target", "draft"])
def test_missing_weights_are_found(folders, which):
    folder = dict(zip(["target", "draft"], folders, strict=True))[which]
    (folder / "model.safetensors").unlink()
    name = "target weights" if which == "target" else "draft tensors"
    only_failure(preflight(*folders), name, 12)


@pytest.mark.parametrize("which", ["target", "draft"])
def test_corrupted_weights_are_found(folders, which):
    path = dict(zip(["target", "draft"], folders, strict=True))[which] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    name = "target weights" if which == "target" else "draft tensors"
    assert str(path) in only_failure(preflight(*folders), name, 14).detail


def test_weights_of_another_revision_are_found(target, draft):
    write_weights(draft / "model.safetensors", {"fc.weight": (16, 48)})
    found = only_failure(preflight(target, draft), "draft tensors", 14)
    assert "fc.weight is [16, 48], expected [16, 32]" in found.detail
    assert "hidden_norm.weight" in found.detail


def test_a_wrong_hash_is_found(target, draft):
    checks = preflight(target, draft, draft_sha256={"model.safetensors": "0" * 64})
    assert "0000" in only_failure(checks, "revision", 14).detail


def test_shifted_taps_are_another_revision(target, draft):
    expected = hashes(draft)
    path = draft / "config.json"
    raw = json.loads(path.read_text())
    raw["dflash_config"]["target_layer_ids"][0] += 1
    path.write_text(json.dumps(raw))
    found = only_failure(preflight(target, draft, draft_sha256=expected), "revision", 14)
    assert str(path) in found.detail


def test_a_file_that_belongs_to_the_revision_is_missing(target, draft):
    expected = hashes(draft) | {"extra.json": "0" * 64}
    assert only_failure(preflight(target, draft, draft_sha256=expected), "revision", 12)


def test_target_given_as_draft_says_so(target):
    found = only_failure(preflight(target, target), "draft config", 13)
    assert "--draft names the draft, not the target" in found.remedy


def test_an_unreadable_file_is_a_failed_check(target, draft, monkeypatch):
    def denied(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pair, "sha256_file", denied)
    checks = preflight(target, draft, draft_sha256={"model.safetensors": "0" * 64})
    assert "Permission denied" in only_failure(checks, "revision", 14).detail


# --- require ---


def test_require_lets_good_pairs_pass(target, draft):
    require(preflight(target, draft))


@pytest.mark.parametrize("kind", [ModelNotFoundError, PairMismatchError, CheckpointError])
def test_require_raises_the_first_failure_as_what_it_was(kind):
    checks = [
        Check("one", "ok", "fine"),
        Check("two", "failed", "broken", "mend it", kind.exit_code),
        Check("three", "failed", "too", "", 1),
    ]
    with pytest.raises(kind, match="two: broken") as caught:
        require(checks)
    assert caught.value.hint == "mend it"


# --- anything ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)
KEYS = sorted({*DRAFT, "rope_scaling", "rope_parameters", "rope_theta", "layer_types"})
KEYS += ["sliding_window", "is_causal", "rms_norm_eps", "text_config", "final_logit_softcapping"]
NESTED = ["mask_token_id", "target_layer_ids", "block_size", "use_swa", "causal"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
    nested=st.dictionaries(st.sampled_from(NESTED), JSON, max_size=2),
    k=st.none() | st.integers(),
)
def test_preflight_never_raises(folders, changes, nested, k):
    target, draft = folders
    raw = json.loads(json.dumps(DRAFT))
    raw["dflash_config"] |= nested
    write_config(draft, raw | changes)
    write_config(target, TARGET | changes)
    for check in preflight(target, draft, k):
        assert check.status in ("ok", "failed", "skipped")
        assert (check.exit_code in (12, 13, 14)) == (check.status == "failed")


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=JSON)
def test_preflight_of_any_json_never_raises(folders, config):
    for folder in folders:
        write_config(folder, config)
    assert failed(preflight(*folders))
