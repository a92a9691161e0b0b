"""``python -m ci local`` and ``mutate``: a scripted worker stands in for the one with torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ci import __main__ as ci_main
from ci import environment, judge, local_runs, mutations, replay, replicas, verdicts_page
from ci.environment import Environment
from ci.local_runs import LocalResult
from ci.mutations import NONE, Mutation
from ci.records import FAILED, NOT_RUN, PASSED, UNTESTED, Verdict
from ci.replicas import Replica
from dflash_plugin import matrix
from dflash_plugin.errors import UnknownCellError

PAIR = "tiny-qwen3"
K = 7
# Greedy: each token is the one before it plus 1; a block is right for its first two.
WORKER = """
import json, sys
fault, size = None, 7
print(json.dumps({"versions": {"torch": "2"}}), flush=True)
def draft(known):
    block = [known + 1, known + 2] + [0] * (size - 2)
    return block[:1] + [9] + block[2:] if fault == "wrong-mask-id" else block
for line in sys.stdin:
    given = json.loads(line)
    op, ids = given["op"], given.get("ids")
    if op == "load":
        lost = given["backend"] == "mlx"
        answer = {"error": "ValueError: not this model" if lost else None}
    elif op == "chat":
        size, answer = 4, {"ids": [[len(text)] * 3 for text in given["texts"]]}
    elif op == "plain":
        answer = {"tokens": [ids[-1] + 1 + i for i in range(given["max_tokens"])]}
    elif op == "generate":
        text, steps = [ids[-1] + 1], []
        while len(text) < given["max_tokens"]:
            block = draft(text[-1])
            accepted = next(i for i, t in enumerate(block) if t != text[-1] + 1 + i)
            steps.append({"position": len(ids) + len(text) - 1, "known": text[-1],
                          "draft": block, "accepted": accepted, "size": accepted + 1})
            text += [text[-1] + 1 + i for i in range(accepted + 1)]
        if fault == "stale-prefix-block" and given["keep"]:
            text[0] = 0
        answer = {"tokens": text[: given["max_tokens"]], "steps": steps, "reused": 0}
    elif op == "taps":
        answer = {"values": [[1.0 * (fault == "taps-plus-one")]]}
    elif op == "compare":
        shift = int(given["values"][0][0])
        answer = {"taps": [{"tap": 1, "distance": 3.0 * shift, "nearest": 1 + shift}]}
    elif op == "fault":
        fault = given["name"]
        answer = {"applies": fault != "state-not-rewound"}
    else:
        answer = {}
    print(json.dumps(answer), flush=True)
"""


def replayed(_env, _target, _draft, k, sequences):
    """The reference's view of the scripted worker's texts."""
    entries = []
    for seq in sequences:
        text, position, steps = [*seq["prompt"], *seq["generated"]], len(seq["prompt"]), []
        while position < len(text) - 1:
            known = text[position]
            block = [known + 1, known + 2] + [0] * (k - 2)
            steps.append({"position": position, "known": known, "draft": block,
                          "gaps": [1.0] * k, "accepted": 2})  # fmt: skip
            position += 3
        entries.append({"id": seq["id"], "steps": steps})
    return {"sequences": entries}


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    made = Environment("venv", Path(sys.executable), "reference", False, {}, tmp_path)
    monkeypatch.setattr(local_runs, "_WORKER", worker)
    monkeypatch.setattr(local_runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(mutations, "PATH", tmp_path / "results" / "mutations.json")
    monkeypatch.setattr(environment, "ensure_reference", lambda: made)
    monkeypatch.setattr(replay, "replay", replayed)
    replica = Replica(PAIR, tmp_path / "target", tmp_path / "draft", {})
    monkeypatch.setattr(replicas, "ensure", lambda _name: replica)
    return tmp_path


# --- local ---


def test_verdicts_are_given_and_kept(scripted, capsys):
    assert ci_main.main(["local", PAIR, "--count", "3", "--max-tokens", "9", "--save"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "reference tiny-qwen3: passed, AL 3.00"
    assert printed[2] == "mlx tiny-qwen3: not run ValueError: not this model"
    [kept] = local_runs.saved("transformers")
    assert (kept.status, kept.al, kept.al_reference) == (PASSED, 3.0, 3.0)
    assert kept.lossless.evidence["float32"]["prompts"] == len(local_runs.texts(3))
    document = json.loads((scripted / "results" / "transformers.json").read_text())
    assert document["results"][0]["settings"]["max_tokens"] == 9
    assert local_runs.saved("mlx")[0].status == NOT_RUN


def test_the_demo_pair_is_asked_the_packaged_prompts(scripted, monkeypatch):
    known = []
    pair = Replica(local_runs.DEMO, scripted / "target", scripted / "draft", {})
    monkeypatch.setattr(local_runs, "demo_pair", lambda: pair)
    monkeypatch.setattr(local_runs, "expected", lambda *given: known.append(given) or ())
    assert ci_main.main(["local", PAIR, "--count", "3", "--max-tokens", "9", "--save"]) == 0
    words = ["local", local_runs.DEMO, "--count", "2", "--max-tokens", "9", "--save"]
    assert ci_main.main([*words, "--backend", "transformers"]) == 0
    before, kept = local_runs.saved("transformers")
    assert (before.replica, kept.replica) == (PAIR, local_runs.DEMO)
    assert before.settings["prompt_set"] != kept.settings["prompt_set"]
    assert kept.settings["prompts"] == kept.lossless.evidence["float32"]["prompts"] == 2
    assert kept.faithful.evidence["blocks"]["equal"] > 0
    assert known[-1] == (local_runs.DEMO, 2)


def test_what_a_pair_is_known_for():
    rows = local_runs.expected(local_runs.DEMO, 1)
    assert {row.prompts for row in rows} >= {"maths", "gsm8k-test-200"}
    assert local_runs.expected(PAIR, 1) == ()


def test_an_unknown_replica_or_backend(scripted, capsys):
    assert ci_main.main(["local", "tiny-none"]) != 0
    assert "no replica" in capsys.readouterr().err
    with pytest.raises(UnknownCellError, match="no back-end 'torch'"):
        local_runs.saved("torch")


def test_texts_share_prefixes_at_a_block_and_in_the_middle_of_one():
    found = {text.id: text for text in local_runs.texts(4)}
    first = found["prefix-none"].ids
    assert not found["prefix-none"].keep
    for shared, whole_blocks in ((64, True), (75, False)):
        text = found[f"prefix-{shared}"]
        assert text.keep
        assert (shared % 16 == 0) == whole_blocks
        assert text.ids[:shared] == first[:shared]
        assert text.ids[shared] != first[shared]
    request = found["prefix-request"].ids
    assert request[: len(first) - 24] == first[:-24]
    assert request != first
    assert len([t for t in found.values() if t.kind != local_runs.PREFIX]) == 4


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"tap": 3, "distance": 1e-6, "nearest": 3}, PASSED),
        ({"tap": 3, "distance": 2.0, "nearest": 4}, FAILED),
        ({"tap": 3, "distance": 0.1, "nearest": 3}, FAILED),
    ],
)
def test_a_tap_is_its_layers_output(row, status):
    verdict = judge.judge_taps([{"tap": 1, "distance": 0.0, "nearest": 1}, row])
    assert verdict.status == status
    assert ("layer 4" in verdict.reason) == (row["nearest"] == 4)


def test_no_tap_is_no_verdict():
    assert judge.judge_taps([]).status == NOT_RUN


def test_texts_that_are_alike_are_replayed_once(monkeypatch, tmp_path):
    given = []

    def count(*args):
        given.extend(args[-1])
        return replayed(*args)

    monkeypatch.setattr(replay, "replay", count)
    one = {"id": "a", "prompt": [1, 2], "generated": [3, 4, 5]}
    runs = [{"sequences": [one]}, {"sequences": [{**one, "id": "b"}, {**one, "prompt": [2]}]}]
    env = Environment("venv", tmp_path, "reference", False, {}, tmp_path)
    found = local_runs.replay_all(env, Replica(PAIR, tmp_path, tmp_path, {}), runs)
    assert len(given) == 2
    assert [[s["id"] for s in document["sequences"]] for document in found] == [["a"], ["b", "a"]]
    assert found[0]["stats"]["num_speculative_tokens"] == K


# --- mutate ---


def test_a_table_says_which_check_saw_what(scripted, capsys):
    faults = ["taps-plus-one", "wrong-mask-id", "stale-prefix-block", "state-not-rewound"]
    chosen = [word for name in faults for word in ("--fault", name)]
    assert ci_main.main(["mutate", PAIR, *chosen, "--save"]) == 0
    found = {row.fault: row.caught for row in mutations.saved()}
    assert found == {
        NONE: (), "taps-plus-one": ("T",), "wrong-mask-id": ("B", "A"),
        "stale-prefix-block": ("L", "B"), "state-not-rewound": None,
    }  # fmt: skip
    page = "\n".join(mutations.page())
    assert "| `tiny-qwen3` | passed | T | B A | not run |" in page
    assert "Of those recorded none survives." in page
    assert "Not run: `tiny-qwen3-swa`" in page


def test_a_fault_that_survives_is_an_error(scripted, capsys):
    assert ci_main.main(["mutate", PAIR, "--fault", "wrong-rope"]) != 0
    assert "tiny-qwen3: wrong-rope survives" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "caught", "right", "words"),
    [
        (NONE, (), True, "passed"),
        (NONE, ("B",), False, "B"),
        ("wrong-rope", (), False, "survives"),
        ("wrong-rope", ("B", "A"), True, "B A"),
        ("wrong-rope", None, True, "–"),
    ],
)
def test_right_and_words(fault, caught, right, words):
    row = Mutation(PAIR, fault, caught, 2.0)
    assert (mutations.right(row), mutations.words(row)) == (right, words)


def test_recorded_tables_have_no_survivor():
    assert all(mutations.right(row) for row in mutations.saved())
    for backend in ("reference", "transformers"):
        assert not [r for r in local_runs.saved(backend) if r.status != PASSED]


# --- the page ---


def test_the_page_has_a_row_for_every_replica_and_a_reason_for_every_non_run(monkeypatch):
    verdict = Verdict(PASSED)
    good = LocalResult(PAIR, PASSED, "", verdict, verdict, verdict, al=3.1)
    lost = LocalResult(PAIR, NOT_RUN, "no such class", UNTESTED, UNTESTED, UNTESTED)
    rows = {"reference": [], "transformers": [good], "mlx": [lost]}
    monkeypatch.setattr(local_runs, "saved", rows.__getitem__)
    lines = verdicts_page.lines(matrix.load(), [])
    [row] = [line for line in lines if line.startswith(f"| `{PAIR}` ")]
    assert "`qwen3-8b`" in row
    assert "| not run [1] | passed, 3.10 | not run [2] | not run [3] |" in row
    assert "- [2] no such class" in lines
    assert sum(line.startswith("| `tiny-") for line in lines) == len(
        {pair.replica for pair in matrix.load().pairs.values() if pair.replica}
    )
