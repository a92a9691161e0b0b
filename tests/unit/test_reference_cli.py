"""``python -m dflash_plugin.reference``: JSON in, JSON out, exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from reference_helpers import VOCAB, make_model, prompt, save_draft  # noqa: E402

from dflash_plugin.acceptance import AcceptanceStats  # noqa: E402
from dflash_plugin.errors import (  # noqa: E402
    CacheError,
    CheckpointError,
    ModelNotFoundError,
    PairMismatchError,
    UsageError,
    run_cli,
)
from dflash_plugin.reference.__main__ import main  # noqa: E402
from dflash_plugin.reference.loop import generate  # noqa: E402
from dflash_plugin.reference.model import DraftModel  # noqa: E402
from dflash_plugin.reference.target import HFTarget  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``target`` (its tokenizer knows ``t0`` .. ``t49``) and ``draft``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pair")
    make_model("llama").save_pretrained(folder / "target")
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2", unk_token="t0")
    fast.chat_template = "{% for m in messages %}t1 {{ m['content'] }} t3{% endfor %}"
    fast.save_pretrained(folder / "target")
    save_draft(folder / "draft")
    return folder


@pytest.fixture(scope="module")
def generations(pair: Path) -> dict[str, Any]:
    """Three texts that the reference itself generated."""
    target = HFTarget.load(pair / "target", [0, 2], dtype=torch.float64)
    draft = DraftModel.load(pair / "draft", target.embedding, target.head, dtype=torch.float64)
    return {
        str(length): generate(
            target, draft, prompt(length), max_new_tokens=30, num_speculative_tokens=3
        )
        for length in (3, 5, 9)
    }


def document(generations: dict[str, Any]) -> dict[str, Any]:
    return {
        "sequences": [
            {"id": name, "prompt": prompt(int(name)), "generated": generation.token_ids}
            for name, generation in generations.items()
        ]
    }


def arguments(pair: Path, *more: object) -> list[str]:
    common = ["replay", "--target", pair / "target", "--draft", pair / "draft", "--k", 3]
    return [str(word) for word in (*common, "--dtype", "float64", "--threads", 1, *more)]


def check(output: dict[str, Any], generations: dict[str, Any]) -> None:
    assert output["k"] == 3
    assert output["dtype"] == "float64"
    assert output["versions"].keys() == {"torch", "transformers"}
    assert [entry["id"] for entry in output["sequences"]] == list(generations)
    steps: list[int] = []
    for entry in output["sequences"]:
        generation = generations[entry["id"]]
        assert entry["target_agrees"] is True
        assert entry["first_disagreement"] is None
        assert entry["al"] == generation.stats.al
        assert [(s["position"], s["known"], s["draft"], s["accepted"]) for s in entry["steps"]] == [
            (s.position, s.known, list(s.draft), s.accepted) for s in generation.steps
        ]
        assert all(len(step["gaps"]) == 3 for step in entry["steps"])
        steps += [step["accepted"] for step in entry["steps"]]
    assert AcceptanceStats.from_dict(output["stats"]) == AcceptanceStats.from_steps(steps, 3)
    assert output["al"] == output["stats"]["al"]


def test_program_reads_and_writes_the_standard_streams(
    pair: Path, generations: dict[str, Any]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dflash_plugin.reference", *arguments(pair)],
        input=json.dumps(document(generations)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), generations)
    assert "%|" not in done.stderr, "a progress bar without a terminal"


def test_files(pair: Path, generations: dict[str, Any], tmp_path: Path) -> None:
    source, destination = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps(document(generations)))
    destination.write_text("former")
    assert main(arguments(pair, "--input", source, "--output", destination)) == 0
    check(json.loads(destination.read_text()), generations)
    assert {path.name for path in tmp_path.iterdir()} == {"in.json", "out.json"}


def test_disagreement_and_texts_without_a_step(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [
        {"id": 1, "prompt": [5], "generated": []},
        {"id": 2, "prompt": [5], "generated": [6, 6, 6, 6]},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"sequences": sequences})))
    assert main(arguments(pair)) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["sequences"][0]["al"] is None
    assert output["sequences"][0]["target_agrees"] is True
    found = output["sequences"][1]
    assert found["target_agrees"] is False
    assert found["first_disagreement"].keys() == {"index", "given", "choice", "gap"}
    assert found["first_disagreement"]["given"] == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "sequences is missing"),
        ('{"sequences": {}}', "sequences is missing"),
        ('{"sequences": [3]}', r"sequences[0] is 3"),
        ('{"sequences": [{"prompt": [], "generated": []}]}', "sequences[0].id is null"),
        ('{"sequences": [{"id": 1, "generated": []}]}', "sequences[0].prompt is null"),
        ('{"sequences": [{"id": 1, "prompt": [], "generated": []}]}', "prompt has 0 tokens"),
        ('{"sequences": [{"id": 1, "prompt": "a", "generated": []}]}', 'prompt is "a"'),
        ('{"sequences": [{"id": 1, "prompt": [1], "generated": [50]}]}', "generated has 50"),
        ('{"sequences": [{"id": 1, "prompt": [1.5], "generated": []}]}', "prompt has 1.5"),
    ],
)
def test_bad_input(
    text: str, message: str, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, destination = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(text)
    words = arguments(pair, "--input", source, "--output", destination)
    assert run_cli(lambda: main(words)) == UsageError.exit_code
    assert message in capsys.readouterr().err
    assert not destination.exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--input", "nowhere.json"], UsageError.exit_code, "nowhere.json"),
        (["--output", "nowhere/out.json"], UsageError.exit_code, "nowhere is no folder"),
        (["--threads", "0"], UsageError.exit_code, "--threads is 0"),
        (["--k", "9"], PairMismatchError.exit_code, "num_speculative_tokens is 9"),
        (["--target", "nowhere"], ModelNotFoundError.exit_code, "nowhere"),
    ],
)
def test_bad_arguments(
    words: list[str], code: int, message: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch("sys.stdin", io.StringIO('{"sequences": []}')):
        assert run_cli(lambda: main(arguments(pair, *words))) == code
    assert message in capsys.readouterr().err


def test_broken_draft(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = save_draft(tmp_path / "draft") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    monkeypatch.setattr("sys.stdin", io.StringIO('{"sequences": []}'))
    words = arguments(pair, "--draft", tmp_path / "draft")
    assert run_cli(lambda: main(words)) == CheckpointError.exit_code
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), CacheError.exit_code)],
)
def test_interrupted_or_failed_write_leaves_the_former_file(
    raised: BaseException,
    code: int,
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    destination = tmp_path / "out.json"
    destination.write_text("former")
    monkeypatch.setattr("sys.stdin", io.StringIO('{"sequences": []}'))

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(Path, "replace", fail)
    assert run_cli(lambda: main(arguments(pair, "--output", destination))) == code
    assert destination.read_text() == "former"
    assert list(tmp_path.iterdir()) == [destination]


def test_generate(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--target", str(pair / "target"), "--draft", str(pair / "draft")]
    assert main([*words, "--prompt", "t7 t8", "--max-new-tokens", "12", "--k", "2"]) == 0
    printed = capsys.readouterr().out
    assert "AL " in printed
    assert "accepted" in printed
    assert "12 tokens, K 2, ended by length" in printed or "ended by stop" in printed
    assert " 4  't" in printed, "the prompt is t1 t7 t8 t3: the first known token is at 4"
