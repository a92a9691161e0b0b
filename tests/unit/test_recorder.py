"""The recorder around a proposer: which block it writes, and that it changes nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ci.serve import RECORDER

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

BLOCK = [[1, 2, 3], [4, 5, 6]]


@pytest.fixture(name="recorder")
def recorder_fixture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recorder", RECORDER / "dflash_recorder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _proposer() -> Any:
    class Proposer:
        """Like the engine's: it rewrites its input buffers."""

        calls = 0

        def propose(self, *_: object, **kwargs: Any) -> Any:
            Proposer.calls += 1
            kwargs["target_positions"].zero_()
            kwargs["next_token_ids"].zero_()
            self.result = torch.tensor(BLOCK[: kwargs["common_attn_metadata"].num_reqs])
            return self.result

    return Proposer


def _arguments(positions: Any, starts: list[int], known: list[int], **more: Any) -> dict[str, Any]:
    metadata = SimpleNamespace(
        # The engine's buffer is longer than the batch.
        query_start_loc=torch.tensor([*starts, starts[-1], starts[-1]], dtype=torch.int32),
        num_reqs=len(starts) - 1,
    )
    return {
        "target_positions": torch.tensor(positions),
        "next_token_ids": torch.tensor(known, dtype=torch.int32),
        "common_attn_metadata": metadata,
        **more,
    }


def _recorded(recorder: ModuleType, path: Path, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    proposer = _proposer()
    recorder.wrap(proposer, str(path))
    instance = proposer()
    result = instance.propose(**arguments)
    assert result is instance.result  # the engine's own object
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_request(recorder: ModuleType, tmp_path: Path) -> None:
    """A prefill of four tokens, and a request whose fifth token is verified."""
    arguments = _arguments([0, 1, 2, 3, 4], [0, 4, 5], [70, 80])
    assert _recorded(recorder, tmp_path / "b", arguments) == [
        {"position": 4, "known": 70, "draft": BLOCK[0]},
        {"position": 5, "known": 80, "draft": BLOCK[1]},
    ]


def test_rejected_tokens_do_not_count(recorder: ModuleType, tmp_path: Path) -> None:
    """Four verified each (one known, three drafted), of which 2 and 0 were rejected."""
    arguments = _arguments(
        [10, 11, 12, 13, 20, 21, 22, 23], [0, 4, 8], [70, 80],
        num_rejected_tokens_gpu=torch.tensor([2, 0, 9], dtype=torch.int32),
    )  # fmt: skip
    rows = _recorded(recorder, tmp_path / "b", arguments)
    assert [(row["position"], row["known"]) for row in rows] == [(12, 70), (24, 80)]


def test_positions_in_three_rows(recorder: ModuleType, tmp_path: Path) -> None:
    """M-RoPE."""
    arguments = _arguments([[5, 6, 7], [1, 1, 1], [1, 1, 1]], [0, 3], [70])
    (row,) = _recorded(recorder, tmp_path / "b", arguments)
    assert row == {"position": 8, "known": 70, "draft": BLOCK[0]}


def test_wrapped_once(recorder: ModuleType, tmp_path: Path) -> None:
    """Plugins are loaded in every engine process, and twice in some."""
    proposer, path = _proposer(), tmp_path / "b"
    recorder.wrap(proposer, str(path))
    recorder.wrap(proposer, str(path))
    proposer().propose(**_arguments([0], [0, 1], [70]))
    assert len(path.read_text().splitlines()) == 1
    assert proposer.calls == 1


def test_without_a_file_nothing_is_imported(
    recorder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DFLASH_RECORD", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import would fail
    recorder.register()


def test_registers_on_the_engine(
    recorder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer = _proposer()
    module = SimpleNamespace(SpecDecodeBaseProposer=proposer)
    names = ("vllm", "vllm.v1", "vllm.v1.spec_decode")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "llm_base_proposer", module, raising=False)
    monkeypatch.setenv("DFLASH_RECORD", str(tmp_path / "b"))
    recorder.register()
    assert proposer.propose.records_blocks


def test_sglang(recorder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the worker's step: a prefill is let through, a block is written per request."""
    hooks: list[tuple[str, Any, str]] = []
    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookRegistry = SimpleNamespace(register=lambda *args: hooks.append(args))  # type: ignore[attr-defined]
    module.HookType = SimpleNamespace(AROUND="around")  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "b"
    monkeypatch.setenv("DFLASH_RECORD", str(path))
    recorder.register_sglang()
    ((target, step, kind),) = hooks
    assert target.endswith(".DFlashWorkerV2.forward_batch_generation") and kind == "around"
    worker = SimpleNamespace(
        _draft_block_tokens_buf=torch.tensor([[70, 1, 2], [80, 3, 4], [0] * 3])
    )

    def batch(extend: bool) -> Any:
        mode = SimpleNamespace(is_extend=lambda: extend)
        lengths = torch.tensor([12, 24])
        return SimpleNamespace(forward_mode=mode, is_extend_in_batch=False, seq_lens=lengths)

    def original(self: object, given: Any, **_: object) -> str:
        given.seq_lens += 3  # the engine's own may move on
        return "result"

    assert step(original, worker, batch(True)) == "result"
    assert not path.exists()
    assert step(original, worker, batch(False), on_publish=None) == "result"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"position": 12, "known": 70, "draft": [1, 2]},
        {"position": 24, "known": 80, "draft": [3, 4]},
    ]
    monkeypatch.delenv("DFLASH_RECORD")
    recorder.register_sglang()
    assert len(hooks) == 1


def test_before_there_is_a_proposer_of_the_engines_own(
    recorder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.18 and 0.19: the class comes from a plugin, after the recorder."""
    base, path = _proposer(), tmp_path / "b"
    module = SimpleNamespace(SpecDecodeBaseProposer=base)
    names = ("vllm", "vllm.v1", "vllm.v1.spec_decode")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "eagle", module, raising=False)
    monkeypatch.setenv("DFLASH_RECORD", str(path))
    recorder.register()

    class Bystander(base):  # type: ignore[misc, valid-type]
        """Like EAGLE's."""

    class Own(Bystander):
        def propose(self, **kwargs: Any) -> Any:
            return torch.tensor(BLOCK[:1])

    assert not hasattr(base.propose, "records_blocks")
    assert not hasattr(Bystander.propose, "records_blocks")
    assert Own().propose(**_arguments([0, 1], [0, 2], [70])).tolist() == BLOCK[:1]
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row == {"position": 2, "known": 70, "draft": BLOCK[0]}


def test_the_first_prompts_taps_are_written(recorder: ModuleType, tmp_path: Path) -> None:
    path, taps = tmp_path / "blocks.jsonl", tmp_path / "blocks.jsonl.taps"
    kind = _proposer()
    recorder.wrap(kind, str(path))
    proposer = kind()

    def propose(first: int, value: float, **more: Any) -> None:
        count = recorder.TAPPED + 4
        given = _arguments([*range(first, first + count)], [0, count], [7])
        given["target_token_ids"] = torch.arange(count)
        given["target_hidden_states"] = torch.full((count, 6), value)
        proposer.propose(**{**given, **more})

    propose(3, 1.0)  # not the beginning of a text
    propose(0, 1.0, target_hidden_states=None)
    assert not taps.exists()
    for value in range(5):
        propose(0, float(value))
    written = [json.loads(line) for line in taps.read_text().splitlines()]
    assert [row["values"][0][0] for row in written] == [0.0, 1.0, 2.0]
    assert written[0]["ids"] == list(range(recorder.TAPPED))
    assert written[2]["values"] == [[2.0] * 6] * recorder.TAPPED
    assert len(path.read_text().splitlines()) == 7
