"""`dflash-plugin train`: the stages together and alone, resumed, changed, and refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from recipe_helpers import make_config, save_target, write_answers, write_prompts  # noqa: E402

from dflash_plugin import cli  # noqa: E402
from dflash_plugin.acceptance import AcceptanceStats  # noqa: E402
from dflash_plugin.errors import DownloadError  # noqa: E402
from dflash_plugin.pair import DraftConfig, preflight  # noqa: E402
from dflash_plugin.training.recipe import evaluate, publish  # noqa: E402
from dflash_plugin.training.recipe import run as run_module  # noqa: E402
from dflash_plugin.training.recipe.config import STAGES  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))


def train(told, *arguments: str) -> int:
    return cli.main(["train", "--config", str(told.path), *arguments])


def test_from_prompts_to_a_draft_that_passes_the_preflight(tmp_path, target, capsys):
    told = make_config(tmp_path, target)
    assert train(told) == 0
    draft = told.out / "draft"
    assert {check.status for check in preflight(target, draft)} == {"ok"}
    shape = DraftConfig.from_dir(draft)
    assert (shape.num_layers, shape.block_size, shape.target_layer_ids) == (2, 5, (0, 2))
    card = (draft / "README.md").read_text()
    results = json.loads((told.out / "evaluation.json").read_text())
    measured = results["heldout"]["words"]
    assert f"| words ({measured['texts']}) | {measured['al']:.2f} |" in card
    assert "| an engine's own counters | | not run | |" in card
    assert "12 steps" in card and "![learning curve]" in card
    capsys.readouterr()
    before = (draft / "model.safetensors").stat().st_mtime_ns
    assert train(told) == 0
    printed = capsys.readouterr().err
    assert printed.count(": done (") == len(STAGES) and "started" not in printed
    assert (draft / "model.safetensors").stat().st_mtime_ns == before


def test_stages_alone_give_the_same_draft(tmp_path, target):
    one, other = (make_config(tmp_path, target) for _ in range(2))
    assert train(one) == 0
    whole = (one.out / "draft" / "model.safetensors").read_bytes()
    shutil.rmtree(one.out)
    for stage in STAGES:
        assert train(other, "--stage", stage) == 0
    assert (other.out / "draft" / "model.safetensors").read_bytes() == whole


def test_features_on_the_fly(tmp_path, target):
    told = make_config(tmp_path, target, features='how = "on-the-fly"')
    assert train(told) == 0
    assert not (told.out / "features").exists() and (told.out / "draft").is_dir()


def test_a_stage_needs_the_ones_before(tmp_path, target, capsys):
    told = make_config(tmp_path, target)
    assert train(told, "--stage", "fit") == 2
    assert "fit needs prompts, which is not done" in capsys.readouterr().err


def test_other_settings_are_refused_and_name_the_way_out(tmp_path, target, capsys):
    assert train(make_config(tmp_path, target)) == 0
    capsys.readouterr()
    told = make_config(tmp_path, target, epochs=4)
    assert train(told) == 26
    printed = capsys.readouterr().err
    assert "features: done" in printed
    assert "fit was begun with other settings" in printed and "another --out" in printed
    assert train(told, "--out", str(tmp_path / "second")) == 0


def test_a_failure_in_a_stage_is_resumed(tmp_path, target, monkeypatch, capsys):
    told = make_config(tmp_path, target)
    real = run_module.Trainer.run

    def fails(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Trainer, "run", fails)
    assert train(told) == 130
    shard = sorted((told.out / "features").glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])  # and the disk was not spared either
    monkeypatch.setattr(run_module.Trainer, "run", real)
    capsys.readouterr()
    assert train(told, "--dry-run") == 0
    assert "features: done\nfit: begun\nevaluate: to do" in capsys.readouterr().out
    assert train(told) == 0


def test_a_dry_run_checks_and_does_nothing(tmp_path, target, capsys):
    told = make_config(tmp_path, target)
    assert train(told, "--dry-run", "--budget", "10m") == 0
    printed = capsys.readouterr().out
    assert '"parameters": ' in printed and "regenerate: to do, at most 240 s" in printed
    assert not told.out.exists()
    (tmp_path / "prompts.jsonl").unlink()
    assert train(told, "--dry-run") == 2
    assert "prompts.jsonl: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("taps = [0, 2]", "taps = [0, 9]"), (13, "expected indices")),
        (("mask_token_id = 63", "mask_token_id = 64"), (13, "mask_token_id is 64")),
        (("[prompts]", "[draft.config]\nvocab_size = 10\n[prompts]"), (13, "leave both out")),
        (('name = "tiny"', 'nam = "tiny"'), (2, "missing key 'name'")),
    ],
)
def test_a_draft_that_does_not_fit(tmp_path, target, capsys, change, expected):
    told = make_config(tmp_path, target)
    told.path.write_text(told.path.read_text().replace(*change))
    assert train(told, "--dry-run") == expected[0]
    assert expected[1] in capsys.readouterr().err


def test_answers_of_another_tokenizer(tmp_path, target, capsys):
    told = make_config(tmp_path, target)
    assert train(told, "--stage", "prompts", "--stage", "regenerate") == 0
    path = write_answers(told.out / "answers.jsonl")
    path.write_text(path.read_text().replace('"answer": [', '"answer": [999, '))
    assert train(told) == 26
    assert "token id 999" in capsys.readouterr().err


def test_a_target_that_is_not_there(tmp_path, target, capsys):
    told = make_config(tmp_path, tmp_path / "gone")
    assert train(told) == 12
    assert "no such model folder" in capsys.readouterr().err


def test_a_budget_ends_every_stage(tmp_path, target):
    told = make_config(tmp_path, target, epochs=100000)
    assert train(told, "--budget", "6s") == 0
    state = json.loads((told.out / "state.json").read_text())
    assert 12 < state["fit"]["steps"] < 20000
    assert all(state[stage]["done"] for stage in STAGES)


def test_upload_is_asked_for_and_refusals_are_told(tmp_path, target, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    seen = []

    class Api:
        def create_repo(self, repo, **options):
            seen.append((repo, options))

        def upload_folder(self, *, folder_path, repo_id):
            assert (Path(folder_path) / "config.json").exists()
            return f"address of {repo_id}"

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "HfApi", Api)
    assert publish.upload(tmp_path, "me/draft") == "address of me/draft"
    assert seen == [("me/draft", {"private": True, "exist_ok": True})]

    def refuse(*_args, **_options):
        raise ValueError("401\nmore")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(DownloadError, match="me/draft: not uploaded: 401"):
        publish.upload(tmp_path, "me/draft")


def test_a_server_of_the_pair_is_measured_by_its_own_counters(tmp_path, target, monkeypatch):
    told = make_config(tmp_path, target)
    told.path.write_text(told.path.read_text() + 'url = "http://127.0.0.1:9"\nmodel = "m"\n')
    steps = iter(range(100))

    class Client:
        def __init__(self, url, model):
            assert (url, model) == ("http://127.0.0.1:9", "m")

        def acceptance(self, k):
            drafts = 10 * next(steps)
            return AcceptanceStats(drafts, (drafts // 2, *[0] * (k - 1)))

        def answer(self, prompt, tokens):
            assert prompt and tokens == 128

    monkeypatch.setattr(evaluate, "ServerClient", Client)
    assert train(told) == 0
    served = json.loads((told.out / "evaluation.json").read_text())["server"]["all"]
    assert served["al"] == 1.5 and served["accepted_rate_per_position"] == [0.5, 0, 0, 0]
    assert (
        "| an engine's own counters | words (2) | 1.50 |"
        in (told.out / "draft" / "README.md").read_text()
    )


def test_prompts_of_the_evaluation_are_decoded_by_the_reference(tmp_path, target):
    told = make_config(tmp_path, target)
    tests = write_prompts(tmp_path / "tests.jsonl", 3)
    told.path.write_text(
        told.path.read_text() + "tokens = 6\n[[evaluate.source]]\n"
        f'kind = "jsonl"\nname = "tests"\npath = "{tests}"\n'
    )
    assert train(told) == 0
    generated = json.loads((told.out / "evaluation.json").read_text())["generated"]
    assert generated["tests"]["texts"] == 3 and generated["all"]["al"] >= 1.0


def test_torchrun_fits_in_two_processes_and_no_other_stage(tmp_path, target):
    told = make_config(tmp_path, target, epochs=1)
    assert train(told, "--stage", "prompts", "--stage", "regenerate", "--stage", "features") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "dflash_plugin.cli", "train", "--config", str(told.path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--stage", "fit"], env=env, check=False, timeout=240, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    state = json.loads((told.out / "state.json").read_text())["fit"]
    assert state["done"] and state["device"].startswith("2 x CPU")
    assert train(told) == 0 and (told.out / "draft").is_dir()


def test_several_processes_are_for_the_fit_alone(tmp_path, target, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "World", lambda _device: SimpleNamespace(size=2, first=True))
    assert train(make_config(tmp_path, target)) == 2
    assert "--stage fit" in capsys.readouterr().err
