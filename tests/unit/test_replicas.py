"""``python -m ci replicas``: found, built, shared, waited for, and never half there.

A script stands in for the interpreter with torch; it writes folders without meaning.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ci_fake import wait_for

from ci import __main__ as ci_main
from ci import environment, pipeline, plan, replica_specs, replicas
from ci.environment import Environment
from dflash_plugin import matrix
from dflash_plugin.errors import CheckpointError, TrainingError, UnknownCellError

ROOT = Path(__file__).resolve().parents[2]
PAIR, SISTER = "tiny-qwen3", "tiny-qwen3-swa"
BUILDER = """#!{python}
import json, os, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from pairs import write_config, write_weights
from dflash_plugin.pair import DraftConfig
control = Path({control!r})
part, folder = sys.argv[3], Path(sys.argv[4])
assert sys.argv[1:3] == ["-m", "ci.replica_builder"]
assert os.environ["HF_HUB_OFFLINE"] == "1"
spec = json.load(sys.stdin)
with (control / "calls").open("a") as calls:
    print(part, (spec.get("pair") or spec["target"])["id"], file=calls)
if part == "target":
    write_config(folder, spec["target"]["config"])
    write_weights(folder / "model.safetensors", {{"model.norm.weight": (4,)}})
else:
    assert (folder / "target" / "config.json").exists()
    write_config(folder / "draft", spec["pair"]["draft"])
(control / "started").touch()
while (control / "hold").exists():
    time.sleep(0.02)
if (control / "fail").exists():
    sys.exit("first line\\nout of luck")
if part == "draft":
    shapes = DraftConfig.from_dir(folder / "draft").tensor_shapes()
    if (control / "wrong").exists():
        shapes.pop("fc.weight")
    write_weights(folder / "draft" / "model.safetensors", shapes)
    record = {{"al": {{"replica-short": 2.5, "replica-long": 2.0}}}}
    (folder / "replica.json").write_text(json.dumps(record))
"""


class Control:
    """What the builder is told, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions = {"torch": "2.0", "transformers": "5.0"}
        self.python = folder / "python"
        self.python.write_text(
            BUILDER.format(
                python=sys.executable,
                root=str(ROOT),
                tests=str(ROOT / "tests" / "unit"),
                control=str(folder),
            )
        )
        self.python.chmod(0o755)

    @property
    def reference(self) -> Environment:
        return Environment("venv", self.python, "reference", False, self.versions, self.folder)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def tell(self, word: str) -> Path:
        path = self.folder / word
        path.touch()
        return path

    @property
    def command(self) -> list[str]:
        """``python -m ci replicas`` with the same builder."""
        program = (
            "import sys\nfrom pathlib import Path\nfrom ci import __main__, environment, replicas\n"
            "from ci.environment import Environment\n"
            f"found = Environment('venv', Path({str(self.python)!r}), 'reference', False, "
            f"{self.versions!r}, Path({str(self.folder)!r}))\n"
            "environment.ensure_reference = lambda: found\n"
            "replicas.COMMAND = (sys.executable, '-c', sys.orig_argv[2])\n"
            "sys.exit(__main__.main(['replicas', *sys.argv[1:]]))"
        )
        return [sys.executable, "-c", program]

    def process(self, *args: str) -> subprocess.Popen[str]:
        """The command in a process of its own."""
        return subprocess.Popen(
            [*self.command, *args],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Control:
    folder = tmp_path / "control"
    folder.mkdir()
    made = Control(folder)
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "ensure_reference", lambda: made.reference)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)


def folders(tmp_path: Path) -> list[str]:
    root = tmp_path / "cache" / "replicas"
    names = sorted(path.name for path in root.iterdir()) if root.exists() else []
    return [name.rpartition("-")[0] if not name.startswith(".") else name for name in names]


def test_a_pair_is_built_once(control, tmp_path):
    assert replicas.find(PAIR) is None
    built = replicas.ensure(PAIR)
    assert replicas.ensure(PAIR) == built == replicas.find(PAIR)
    assert control.calls == ["target qwen3", "draft tiny-qwen3"]
    assert folders(tmp_path) == ["target-qwen3", "tiny-qwen3"]
    assert (built.target / "config.json").exists()
    assert built.record["al"]["replica-long"] == 2.0


def test_pairs_of_one_target_share_its_training(control):
    replicas.ensure(PAIR)
    replicas.ensure(SISTER)
    assert control.calls == ["target qwen3", "draft tiny-qwen3", "draft tiny-qwen3-swa"]


def test_force_builds_the_draft_anew_and_keeps_the_target(control, tmp_path):
    replicas.ensure(PAIR)
    replicas.ensure(PAIR, force=True)
    assert control.calls[2:] == ["draft tiny-qwen3"]
    assert folders(tmp_path) == ["target-qwen3", "tiny-qwen3"]


def test_other_versions_are_other_pairs(control, tmp_path):
    one = replicas.ensure(PAIR)
    control.versions = {**control.versions, "torch": "2.1"}
    assert replicas.ensure(PAIR).target != one.target
    assert folders(tmp_path) == ["target-qwen3", "target-qwen3", "tiny-qwen3", "tiny-qwen3"]


def test_the_key_is_of_the_spec_and_of_the_code(control, tmp_path, monkeypatch):
    specs = replica_specs.load()
    spec = specs.pair(PAIR)

    def key() -> str:
        return replicas._pair_folder(specs, spec, control.reference).name

    before = key()
    assert replicas._pair_folder(specs, specs.pair(SISTER), control.reference).name != before
    changed = replace(spec, steps=spec.steps + 1)
    assert replicas._pair_folder(specs, changed, control.reference).name != before
    builder = tmp_path / "builder"
    builder.mkdir()
    for path in (ROOT / "ci" / "replica_builder").glob("*.py"):
        (builder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(replicas, "_BUILDER", builder)
    assert key() == before
    (builder / "draft.py").write_text("# other code\n")
    assert key() != before


def test_a_failed_builder_leaves_nothing_and_is_quoted(control, tmp_path):
    control.tell("fail")
    with pytest.raises(TrainingError, match=r"(?s)target qwen3: .* exit code 1\n.*\| out of luck"):
        replicas.ensure(PAIR)
    assert folders(tmp_path) == []
    (control.folder / "fail").unlink()
    replicas.ensure(PAIR)


def test_a_pair_that_does_not_pass_the_preflight_is_not_kept(control, tmp_path):
    control.tell("wrong")
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        replicas.ensure(PAIR)
    assert folders(tmp_path) == ["target-qwen3"]


def test_an_unknown_replica(control):
    with pytest.raises(UnknownCellError, match="tiny-qwen3"):
        replicas.ensure("tiny-qwen4")
    assert control.calls == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_middle_nothing_is_usable_and_the_next_run_builds(control, tmp_path, number):
    hold = control.tell("hold")
    process = control.process(PAIR)
    wait_for((control.folder / "started").exists, "the builder's start")
    process.send_signal(number)
    process.wait(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert replicas.find(PAIR) is None
    hold.unlink()
    replicas.ensure(PAIR)
    assert folders(tmp_path) == ["target-qwen3", "tiny-qwen3"]


def test_a_second_process_waits_and_uses_what_the_first_built(control):
    hold = control.tell("hold")
    first = control.process(PAIR)
    wait_for((control.folder / "started").exists, "the builder's start")
    second = control.process(PAIR)
    assert "waiting for another process" in second.stderr.readline()
    hold.unlink()
    outputs = [process.communicate(timeout=30)[0] for process in (first, second)]
    assert outputs[0] == outputs[1] != ""
    assert control.calls == ["target qwen3", "draft tiny-qwen3"]


# --- the command ---


def test_the_command_prints_id_target_and_draft(control, capsys):
    assert ci_main.main(["replicas", PAIR, PAIR]) == 0
    printed = capsys.readouterr()
    [line] = printed.out.splitlines()
    name, target, draft = line.split()
    assert name == PAIR
    assert Path(target, "config.json").exists()
    assert Path(draft, "config.json").exists()
    assert "replica-short 2.500, replica-long 2.000" in printed.err


def test_jobs_build_side_by_side_and_share_a_target(control, capsys, monkeypatch):
    monkeypatch.setattr(replicas, "COMMAND", control.command)
    assert ci_main.main(["replicas", PAIR, SISTER, "tiny-llama", "--jobs", "2"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [PAIR, SISTER, "tiny-llama"]
    assert sorted(control.calls) == [
        "draft tiny-llama", "draft tiny-qwen3", "draft tiny-qwen3-swa",
        "target llama", "target qwen3",
    ]  # fmt: skip


def test_a_pair_whose_target_is_being_made_lets_another_go_first(control):
    hold = control.tell("hold")
    process = control.process(PAIR, SISTER, "tiny-llama", "--jobs", "2")
    wait_for(lambda: len(control.calls) == 2, "both builders' start")
    assert sorted(control.calls) == ["target llama", "target qwen3"]
    hold.unlink()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert replicas.find(SISTER) is not None


def test_each_job_has_its_own_cores(monkeypatch):
    given = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 5}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", given.__setitem__, raising=False)
    for place in range(4):
        replicas._keep_to_cores(place, place, 2 if place < 2 else 4)
    assert given == {0: [1, 5], 1: [2], 2: [5], 3: [1, 2, 5]}


def test_a_job_that_fails_is_named_and_the_others_are_built(control, capfd, monkeypatch):
    monkeypatch.setattr(replicas, "COMMAND", control.command)
    replicas.ensure(PAIR)
    control.tell("fail")
    assert ci_main.main(["replicas", PAIR, "tiny-llama", "--jobs", "2"]) != 0
    said = capfd.readouterr().err
    assert "replicas: tiny-llama not built" in said
    assert "| out of luck" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_killed_with_jobs_none_goes_on(control, number):
    hold = control.tell("hold")
    process = control.process(PAIR, "tiny-llama", "--jobs", "2")
    wait_for(lambda: len(control.calls) == 2, "both builders' start")
    process.send_signal(number)
    process.wait(timeout=30)
    assert process.returncode == 130
    hold.unlink()
    assert replicas.find(PAIR) is None
    assert replicas.find("tiny-llama") is None


def test_list_builds_nothing(control, capsys):
    replicas.ensure(PAIR)
    capsys.readouterr()
    assert ci_main.main(["replicas", "--list"]) == 0
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == list(replica_specs.load().pairs)
    assert lines[SISTER] == "not built"
    assert Path(lines[PAIR]).is_dir()
    assert len(control.calls) == 2


@pytest.mark.parametrize(("args", "words"), [
    ([], "nothing to build"), (["--all", PAIR], "ids and --all"), (["tiny"], "no replica 'tiny'"),
    (["--jobs", "0", PAIR], "--jobs is 0"),
])  # fmt: skip
def test_wrong_arguments(control, capsys, args, words):
    assert ci_main.main(["replicas", *args]) in (2, 11)
    assert words in capsys.readouterr().err


# --- in the harness ---


def test_a_cell_of_a_replica_gets_its_folders_and_its_prompts(control, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "engine_environment", lambda *_: control.reference)
    name = "vllm-0.32.0/plugin/cpu/tiny-qwen3"
    made = plan.make(matrix.load(), [name, "vllm-0.32.0/plugin/cpu/smollm2-135m"], "tiny")
    tiny, demo = made.cells
    run = pipeline.prepare(tiny, made, tmp_path / "out")
    assert run.target == replicas.ensure(PAIR).target
    assert run.draft == replicas.ensure(PAIR).draft
    assert run.settings()["prompt_set"] == made.prompts_of(tiny).name
    assert made.prompts_of(tiny).name.startswith("replica@")
    assert made.prompts_of(demo).name.startswith("packaged@")
    assert len(made.prompts_of(tiny).prompts) == made.profile.lossless_prompts
    assert json.loads((run.target / "config.json").read_text())["model_type"] == "qwen3"


def test_prompt_files_are_for_replicas_too(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    made = plan.make(matrix.load(), ["*/tiny-qwen3"], "tiny", [str(path)])
    assert [p.text for p in made.prompts_of(made.cells[0]).prompts] == ["hello"]
    assert os.sep not in made.prompts_of(made.cells[0]).name
