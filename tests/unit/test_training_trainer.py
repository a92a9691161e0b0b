"""The loop: resumed runs end alike, numbers that are none end it, and AL is the reference's."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from local_replicas import VOCAB  # noqa: E402
from recipe_helpers import (  # noqa: E402
    make_config,
    make_trainer,
    save_target,
    source_of,
    write_answers,
)

from dflash_plugin.errors import (  # noqa: E402
    CheckpointError,
    MissingDependencyError,
    PairMismatchError,
    TrainingError,
)
from dflash_plugin.reference.model import DraftModel  # noqa: E402
from dflash_plugin.reference.replay import replay  # noqa: E402
from dflash_plugin.training.export import export  # noqa: E402
from dflash_plugin.training.fit import NO_LABEL, block_loss  # noqa: E402
from dflash_plugin.training.recipe import curve, models, objective, tensors  # noqa: E402
from dflash_plugin.training.recipe.clock import Clock  # noqa: E402
from dflash_plugin.training.recipe.simulate import simulate  # noqa: E402
from dflash_plugin.training.recipe.trainer import CHECKPOINT, batches  # noqa: E402

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target") / "model")


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.draft.published().items()}


def stop_after(trainer, step: int) -> None:
    """End the run as Ctrl-C would, after that step."""
    inner = trainer.step

    def counted():
        result = inner()
        if trainer.state.step == step:
            os.kill(os.getpid(), 2)
        return result

    trainer.step = counted


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")]
)
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, target, precision, optimizer):
    told = make_config(tmp_path, target, features="teacher = true", fit="distill = 0.3")
    told = replace(told, fit=replace(told.fit, precision=precision, optimizer=optimizer))
    whole = make_trainer(told, "whole")
    whole.run()
    for stop in (5, 11):
        part = make_trainer(told, "parts")
        stop_after(part, stop)
        with pytest.raises(KeyboardInterrupt):
            part.run()
    last = make_trainer(told, "parts")
    assert last.state.step == 11
    assert last.run().step == whole.state.step == 12
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(last)[name]), name
    one, other = (curve.read(told.out / name) for name in ("whole", "parts"))
    assert [row["step"] for row in other] == list(range(1, 13))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]
    assert [row.get("al") for row in one] == [row.get("al") for row in other]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, target):
    told = make_config(tmp_path, target)
    whole = make_trainer(told, "whole")
    whole.run()
    part = make_trainer(told, "parts")
    inner = part.step

    def dies():
        if part.state.step == 7:
            raise RuntimeError("killed")
        return inner()

    part.step = dies
    with pytest.raises(RuntimeError):
        part.run()
    last = make_trainer(told, "parts")
    assert last.state.step == 6 and len(curve.read(told.out / "parts")) == 6
    last.run()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(last)[name]), name


def test_not_a_number_ends_the_run_and_the_checkpoint_stands(tmp_path, target):
    trainer = make_trainer(make_config(tmp_path, target))
    inner = trainer.step

    def poisoned():
        if trainer.state.step == 4:
            with torch.no_grad():
                trainer.draft.norm.weight[0] = math.nan
        return inner()

    trainer.step = poisoned
    with pytest.raises(TrainingError, match=r"step 5 of 12: loss nan.*last checkpoint stands"):
        trainer.run()
    assert tensors.facts(trainer.folder / CHECKPOINT)["step"] == 3
    held = tensors.load(trainer.folder / CHECKPOINT)
    assert all(bool(value.isfinite().all()) for value in held.values())


def test_a_checkpoint_of_another_run_or_damaged(tmp_path, target):
    told = make_config(tmp_path, target)
    make_trainer(told).run()
    path = told.out / "fit" / CHECKPOINT
    facts, held = tensors.facts(path), tensors.load(path)
    tensors.save(path, held, {**facts, "key": "other"})
    with pytest.raises(TrainingError, match="other settings or texts"):
        make_trainer(told)
    tensors.save(path, {"tap_scale": held["tap_scale"]}, facts)
    with pytest.raises(CheckpointError, match="not a checkpoint of this draft"):
        make_trainer(told)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not readable"):
        make_trainer(told)


def test_a_budget_fixes_the_steps_once(tmp_path, target):
    told = make_config(tmp_path, target, epochs=200)
    trainer = make_trainer(told)
    planned = trainer.state.steps
    trainer.step()
    trainer.clock = Clock(allowed=1000.0)
    trainer._plan_for_budget(1e-6)
    assert trainer.state.steps == planned  # never more than the epochs
    trainer._plan_for_budget(10.0)
    assert trainer.state.steps == 90
    trainer.clock = Clock(allowed=0.0)
    again = make_trainer(told)
    assert again.state.steps == 90 and again.state.timed


def test_muon_takes_the_matrices_and_adamw_the_rest(tmp_path, target, monkeypatch):
    told = make_config(tmp_path, target, fit='optimizer = "muon"')
    trainer = make_trainer(told)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.step()
    trainer.save()
    held = tensors.load(trainer.folder / CHECKPOINT)
    for name, old, parameter in zip(trainer.names, before, trainer.parameters, strict=True):
        kind = "momentum_buffer" if parameter.ndim > 1 else "exp_avg"
        assert {key for key in held if key.endswith(f".{name}")} >= {f"optimizer.{kind}.{name}"}
        assert (f"optimizer.exp_avg.{name}" in held) == (parameter.ndim <= 1)
        assert not torch.equal(old, parameter), name
    with pytest.raises(CheckpointError, match="not a checkpoint of this draft"):
        less = {key: value for key, value in held.items() if "momentum" not in key}
        tensors.save(trainer.folder / CHECKPOINT, less, vars(trainer.state))
        make_trainer(told)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(MissingDependencyError, match="has no Muon"):
        make_trainer(told, "other")


def test_muons_steps_are_as_large_as_adamws(tmp_path, target):
    sizes = {}
    for optimizer in ("adamw", "muon"):
        told = make_config(tmp_path, target, fit=f'optimizer = "{optimizer}"\nweight_decay = 0.0')
        trainer = make_trainer(told, optimizer)
        before = [parameter.detach().clone() for parameter in trainer.parameters]
        trainer.step()
        sizes[optimizer] = [
            float((after.detach() - old).square().mean().sqrt())
            for old, after in zip(before, trainer.parameters, strict=True)
            if old.ndim > 1
        ]
    for one, other in zip(*sizes.values(), strict=True):
        assert 0.05 < other / one < 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls_and_al_rises(tmp_path, target, optimizer):
    told = make_config(tmp_path, target, epochs=60, fit=f'optimizer = "{optimizer}"')
    write_answers(told.out / "answers.jsonl", 8)
    trainer = make_trainer(told)
    trainer.run()
    rows = curve.read(trainer.folder)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[-1]["labels"] > rows[0]["labels"]
    pytest.importorskip("matplotlib")
    plot = curve.plot(trainer.folder)
    assert plot is not None and plot.read_bytes().startswith(b"\x89PNG")


def test_simulated_al_is_the_replays(tmp_path, target):
    told = make_config(tmp_path, target, epochs=30)
    source, loaded = source_of(told)
    source.texts.training = source.texts.training[:4]  # few enough to be learned by heart
    shape = models.draft_config(told, target)
    draft = models.new_draft(told, shape, loaded, source.scale())
    from dflash_plugin.training.recipe.trainer import Trainer

    trainer = Trainer(told, draft, source, told.out / "fit", "key", clock=Clock())
    trainer.run()
    indices = [*source.texts.training, *source.texts.heldout]
    found = simulate(trainer.draft, source, indices, trainer.head, CPU)
    export(trainer.draft, tmp_path / "draft", dtype=torch.float32)
    model = DraftModel.load(tmp_path / "draft", loaded.embedding, loaded.head)
    steps = [
        replay(loaded, model, source.texts.prompt(i), source.texts.answer(i), extend=False).stats
        for i in indices
    ]
    assert found == sum(steps[1:], steps[0])
    assert found.accepted > 0


@pytest.mark.parametrize("option", ["gradient_checkpointing = true", "head_rows"])
def test_cheaper_ways_train_the_same(tmp_path, target, option):
    """Recomputed layers; and all of the vocabulary as chosen rows against no choice."""
    plain, other = {"head_rows": 0}, {"head_rows": 0, "fit": option}
    if option == "head_rows":
        # Every token: those that are common, and random ones for the rest.
        other = {"head_rows": VOCAB}
    results = []
    for name, changes in (("plain", plain), ("other", other)):
        told = make_config(tmp_path, target, **changes)
        trainer = make_trainer(told, name)
        if option == "head_rows" and name == "other":
            trainer.common = torch.arange(VOCAB)
        trainer.run()
        results.append(weights(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one_with_twice_the_texts(tmp_path, target):
    script = tmp_path / "one.py"
    tests = Path(__file__).parent
    script.write_text(
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parents[1])!r}]\n"
        "from pathlib import Path\nfrom dataclasses import replace\n"
        "from recipe_helpers import *\n"
        "from dflash_plugin.training.recipe.parallel import World\n"
        "from dflash_plugin.training.recipe import trainer as module\n"
        "import torch\n"
        # The same anchors whoever draws them.
        "module.spread_anchors = lambda b, n, g: "
        "b.starts[:, None] + torch.arange(n) % (b.ends - b.starts - 1)[:, None]\n"
        f"told = make_config(Path({str(tmp_path)!r}), Path({str(target)!r}), head_rows=0)\n"
        "world = World('cpu')\n"
        "told = replace(told, fit=replace(told.fit, batch=4 // world.size))\n"
        "t = make_trainer(told, f'world{world.size}', world=world)\n"
        "t.run(); world.close()\n"
    )
    write_answers(tmp_path / "out" / "answers.jsonl")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    subprocess.run([sys.executable, str(script)], env=env, check=True, timeout=120)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script)],
        env=env, check=True, timeout=180,
    )  # fmt: skip
    one, two = (tensors.load(tmp_path / "out" / name / CHECKPOINT) for name in ("world1", "world2"))
    for name, value in one.items():
        if name.startswith("draft."):
            torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4)
    rows = [curve.read(tmp_path / "out" / name) for name in ("world1", "world2")]
    assert [row["labels"] for row in rows[0]] == [row["labels"] for row in rows[1]]


def test_it_starts_from_the_targets_last_layers(tmp_path, target):
    told = make_config(tmp_path, target, init="target")
    trainer = make_trainer(told)
    _, loaded = source_of(told)
    layer = loaded.model.get_decoder().layers[-2]
    own = trainer.draft.layers[0]
    assert torch.equal(own.self_attn.q_proj.weight, layer.self_attn.q_proj.weight)
    assert torch.equal(own.self_attn.q_norm.weight, layer.self_attn.q_norm.weight)
    assert torch.equal(trainer.draft.norm.weight, loaded.model.get_decoder().norm.weight)


def test_layers_of_another_shape_cannot_be_copied(tmp_path, target):
    told = make_config(tmp_path, target, init="target")
    narrow = replace(told, draft=replace(told.draft, config={"intermediate_size": 24}))
    with pytest.raises(PairMismatchError, match=r"mlp\.gate_proj\.weight \[48, 32\]"):
        make_trainer(narrow)


def test_it_starts_from_an_existing_draft(tmp_path, target):
    told = make_config(tmp_path, target)
    first = make_trainer(told)
    first.run()
    export(first.draft, tmp_path / "draft", dtype=torch.float32)
    again = make_trainer(
        replace(told, draft=replace(told.draft, init=str(tmp_path / "draft"))), "b"
    )
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(again)[name], value)
    deeper = replace(told.draft, init=str(tmp_path / "draft"), layers=3)
    with pytest.raises(PairMismatchError, match=r"layers\.2\..* is None"):
        make_trainer(replace(told, draft=deeper), "c")


def test_an_epoch_has_every_text_but_a_rest_once(tmp_path, target):
    source, _ = source_of(make_config(tmp_path, target))
    found = batches(source.texts, 4, 0, 0)
    seen = [index for batch in found for index in batch]
    assert len(seen) == len(set(seen)) > len(source.texts.training) - 4
    assert set(seen) <= set(source.texts.training)
    assert found == batches(source.texts, 4, 0, 0) != batches(source.texts, 4, 0, 1)
    assert [len(batch) for batch in batches(source.texts, 100, 0, 0)] == [100]


def test_chosen_rows_stand_for_the_whole_vocabulary():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.tensor([[3, 7], [NO_LABEL, 9]])
    sums = []
    logits = torch.randn(500, generator=generator)
    for _ in range(300):
        rows = objective.choose_rows(wanted, torch.tensor([1, 7]), 40, 500, generator)
        assert set(rows.ids.tolist()) >= {1, 3, 7, 9}
        assert rows.ids[rows.places(wanted)[wanted != NO_LABEL]].tolist() == [3, 7, 9]
        sums.append((logits[rows.ids] + rows.correction).exp().sum())
    assert float(torch.stack(sums).mean()) == pytest.approx(float(logits.exp().sum()), rel=0.03)


def test_the_loss_is_the_cores_and_the_teachers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 11, generator=generator)
    wanted = torch.randint(0, 11, (2, 3, 4), generator=generator)
    wanted[0, 1, 2:] = NO_LABEL
    total, weight = objective.weighted_loss(logits, wanted, 4.0, None, 0.0)
    torch.testing.assert_close(total / weight, block_loss(logits, wanted, 4.0))
    sure = torch.nn.functional.one_hot(wanted.clamp_min(0), 11) * 80.0
    soft, same = objective.weighted_loss(logits, wanted, 4.0, sure, 0.7)
    torch.testing.assert_close((soft, same), (total, weight))
    itself, _ = objective.weighted_loss(logits, wanted, 4.0, logits, 1.0)
    chances = logits.softmax(-1)
    entropy = -(chances * chances.log()).sum(-1) * (wanted != NO_LABEL)
    weights = torch.exp(-torch.arange(4) / 4.0)
    torch.testing.assert_close(itself, (entropy * weights).sum())


def test_a_capped_target_teaches_capped_logits():
    logits = torch.tensor([-90.0, 0.0, 90.0])
    assert objective.capped(logits, None) is logits
    torch.testing.assert_close(objective.capped(logits, 30.0), 30.0 * torch.tanh(logits / 30.0))


def test_anchors_are_spread_over_the_answer():
    from dflash_plugin.training.fit import Batch

    batch = Batch(torch.zeros(2, 30), torch.tensor([4, 10]), torch.tensor([30, 13]))
    for seed in range(20):
        found = objective.spread_anchors(batch, 5, torch.Generator().manual_seed(seed))
        assert found[0].tolist() == sorted(found[0].tolist())
        assert len(set(found[0].tolist())) == 5
        assert int(found[0].min()) >= 4 and int(found[0].max()) <= 28
        assert set(found[1].tolist()) <= {10, 11}
