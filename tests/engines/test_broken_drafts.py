"""Broken drafts on the real engine: the text stays right, and they are caught."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ci import check, judge, plan, prompts, replay
from ci.environment import Environment
from ci.pipeline import CellRun
from ci.serve import serve_all
from dflash_plugin import demo, matrix
from dflash_plugin.checkpoint import read_header
from dflash_plugin.errors import CheckpointError
from dflash_plugin.pair import preflight, require

K = 4
PROMPTS = 6
CELL = "vllm-0.32.0/plugin/cpu/smollm2-135m"


def rewrite_tensor(path: Path, name: str, change) -> None:
    """Replace one tensor's bytes in a safetensors file; ``change`` keeps their number."""
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    base = 8 + int.from_bytes(data[:8], "little")
    start, end = (base + offset for offset in header[name]["data_offsets"])
    data[start:end] = change(bytes(data[start:end]), header[name]["shape"])
    path.write_bytes(data)


def reverse_rows(raw: bytes, shape: list[int]) -> bytes:
    row = len(raw) // shape[0]
    return b"".join(raw[i : i + row] for i in range(len(raw) - row, -1, -row))


def drop_tensor(path: Path, name: str) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    body = raw[8 + length :]
    kept, data = {}, b""
    for key, entry in header.items():
        if key in (name, "__metadata__"):
            continue
        start, end = entry["data_offsets"]
        kept[key] = {**entry, "data_offsets": [len(data), len(data) + end - start]}
        data += body[start:end]
    text = json.dumps(kept).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture(scope="module")
def drafts(pair: demo.DemoPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drafts")
    made = {}
    for name in ("permuted", "shifted", "missing"):
        made[name] = root / name
        made[name].mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(pair.draft / file, made[name] / file)
    rewrite_tensor(made["permuted"] / "model.safetensors", "fc.weight", reverse_rows)
    config = json.loads((made["shifted"] / "config.json").read_text(encoding="utf-8"))
    taps = config["dflash_config"]["target_layer_ids"]
    config["dflash_config"]["target_layer_ids"] = [tap + 1 for tap in taps]
    (made["shifted"] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    drop_tensor(made["missing"] / "model.safetensors", "layers.1.self_attn.k_norm.weight")
    return made


@pytest.fixture(scope="module")
def exact(
    drafts: dict[str, Path],
    pair: demo.DemoPair,
    plugin_env: Environment,
    reference_env: Environment,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict]:
    """The same prompts on a plain server and on one server per broken draft."""
    made = plan.make(matrix.load(), [CELL], "ci")
    chosen = prompts.spread(made.prompts.prompts, PROMPTS)
    folder = tmp_path_factory.mktemp("servers")
    specs, records = [], {}
    for name in ("plain", "permuted", "shifted"):
        run = CellRun(
            cell=made.cells[0],
            plan=made,
            folder=folder / name,
            shared=folder / "shared",
            target=pair.target,
            draft=drafts.get(name, pair.draft),
            reference_draft=pair.draft,
            num_speculative_tokens=K,
            environment=plugin_env,
            reference=reference_env,
        )
        records[name] = folder / f"{name}.jsonl"
        draft = name != "plain"
        specs.append(run.server(draft, "float32", record=records[name] if draft else None))
    with serve_all(specs) as (plain, permuted, shifted):
        return {
            name: check.run_exact(
                plain,
                client,
                chosen,
                max_tokens=48,
                num_speculative_tokens=K,
                record=records[name],
            )
            for name, client in (("permuted", permuted), ("shifted", shifted))
        }


def replayed(exact: dict, draft: Path, pair: demo.DemoPair, env: Environment) -> dict:
    sequences = [{k: s[k] for k in ("id", "prompt", "generated")} for s in exact["sequences"]]
    return replay.replay(env, pair.target, draft, K, sequences)


@pytest.mark.parametrize("name", ["permuted", "shifted"])
def test_text_is_right_all_the_same(exact: dict[str, dict], name: str) -> None:
    sequences = exact[name]["sequences"]
    assert all(s["base"] == s["generated"] for s in sequences)
    assert len(sequences) == PROMPTS


@pytest.mark.parametrize("name", ["permuted", "shifted"])
def test_blocks_are_not_those_of_the_good_draft(
    name: str, exact: dict[str, dict], pair: demo.DemoPair, reference_env: Environment
) -> None:
    """An engine that runs a good draft wrongly."""
    verdict = judge.judge_faithful(
        exact[name], replayed(exact[name], pair.draft, pair, reference_env)
    )
    assert verdict.status == "failed"
    assert verdict.evidence["blocks"]["different"] > 0


def test_engine_and_reference_agree_and_it_is_still_caught(
    exact: dict[str, dict],
    drafts: dict[str, Path],
    pair: demo.DemoPair,
    reference_env: Environment,
) -> None:
    """A draft that is broken itself: every block equal, but AL is not what the pair has."""
    ours = replayed(exact["permuted"], drafts["permuted"], pair, reference_env)
    expected = matrix.load().pair("smollm2-135m").expected
    assert judge.judge_faithful(exact["permuted"], ours).status == "passed"
    verdict = judge.judge_faithful(exact["permuted"], ours, expected)
    assert verdict.status == "failed"
    assert "the draft itself" in verdict.reason


@pytest.mark.parametrize(
    ("name", "file"), [("permuted", "model.safetensors"), ("shifted", "config.json")]
)
def test_neither_passes_for_the_packaged_draft(
    name: str, file: str, drafts: dict[str, Path], pair: demo.DemoPair
) -> None:
    """Taps off by one cost too little acceptance to show there; the files' hashes do."""
    with pytest.raises(CheckpointError, match=file):
        require(
            preflight(pair.target, drafts[name], K, draft_sha256=demo.manifest.hashes(pair.draft))
        )


def test_missing_tensor_is_refused_before_anything_starts(
    drafts: dict[str, Path], pair: demo.DemoPair
) -> None:
    assert "layers.1.self_attn.k_norm.weight" not in read_header(
        drafts["missing"] / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_norm\.weight"):
        require(preflight(pair.target, drafts["missing"], K))
