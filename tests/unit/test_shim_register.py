"""dflash on releases without it: configuration, lookahead, proposer and CPU runner, on fakes."""

from __future__ import annotations

import contextlib
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Literal, get_args

import pytest
from pairs import draft_json, make_draft

from dflash_plugin.errors import PairMismatchError, UnsupportedEngineError, UsageError
from dflash_plugin.pair import DraftConfig, TargetConfig
from dflash_plugin.shims import (
    vllm_register_arguments as arguments,
)
from dflash_plugin.shims import (
    vllm_register_async as asynchronous,
)
from dflash_plugin.shims import (
    vllm_register_config as config,
)
from dflash_plugin.shims import (
    vllm_register_cpu_runner as cpu_runner,
)
from dflash_plugin.shims import (
    vllm_register_lookahead as lookahead,
)
from dflash_plugin.shims import (
    vllm_register_proposer as proposer,
)

OTHERS = [None, "eagle3", "ngram", "draft_model"]


def speculative(method, tokens=4):
    return None if method is None else SimpleNamespace(method=method, num_speculative_tokens=tokens)


# --- EngineArgs -----------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """The parts of the ``vllm`` package that building a configuration asks for."""
    pytest.importorskip("torch")
    made = {name: ModuleType(name) for name in (
        "vllm", "vllm.envs", "vllm.platforms", "vllm.transformers_utils",
        "vllm.transformers_utils.repo_utils",
    )}  # fmt: skip
    archs = {}
    made["vllm"].ModelRegistry = SimpleNamespace(
        get_supported_archs=archs.keys, register_model=archs.__setitem__
    )
    made["vllm"].envs = made["vllm.envs"]
    made["vllm.envs"].VLLM_USE_V2_MODEL_RUNNER = False
    made["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: False)
    made["vllm.transformers_utils.repo_utils"].get_hf_file_to_dict = lambda name, model, revision: (
        json.loads((tmp_path / model / name).read_text()) if (tmp_path / model).exists() else None
    )
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(archs=archs, envs=made["vllm.envs"])


def engine_args(given):
    """``EngineArgs`` as 0.19 has it: the settings are validated where they are used."""

    class EngineArgs:
        def __init__(self):
            self.speculative_config, self.seen = given, []

        def create_speculative_config(self, target_model_config, target_parallel_config):
            if self.speculative_config is None:
                return None
            method = self.speculative_config["method"]
            self.seen.append(method)
            if method not in ("eagle3", "ngram"):
                raise ValueError(f"Unsupported speculative method: '{method}'")
            self.speculative_config.update(target_model_config=target_model_config)
            own = SimpleNamespace(architectures=["DFlashDraftModel"], vocab_size=128)
            wrapped = SimpleNamespace(model=own, architectures=["Eagle3DFlashDraftModel"])
            made = SimpleNamespace(
                method=method,
                num_speculative_tokens=self.speculative_config["num_speculative_tokens"],
                draft_model_config=SimpleNamespace(hf_config=wrapped, max_model_len=512),
                updated=[],
            )
            made.update_arch_ = lambda: made.updated.append(made.draft_model_config.hf_config)
            return made

    module = ModuleType("arg_utils")
    module.EngineArgs = EngineArgs
    arguments.apply(module)
    return EngineArgs()


def target_model(**changes):
    draft = DraftConfig.from_dict(draft_json(), arguments.Path("d"))
    facts = {
        "model_type": "llama",
        "hidden_size": draft.hidden_size,
        "num_hidden_layers": draft.num_target_layers or 1 + max(draft.target_layer_ids),
        "vocab_size": draft.vocab_size,
    }
    text = SimpleNamespace(**{**facts, **changes})
    return SimpleNamespace(model="target", hf_text_config=text, max_model_len=1024)


def parallel(**changes):
    usual = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
    }
    return SimpleNamespace(**{**usual, **changes})


def given(tmp_path, **changes):
    draft = make_draft(tmp_path / "draft")
    return {"method": "dflash", "model": str(draft), "num_speculative_tokens": 2, **changes}


def test_dflash_is_built_as_the_nearest_method_and_renamed(vllm, tmp_path):
    asked = given(tmp_path)
    before = dict(asked)
    args = engine_args(asked)
    made = args.create_speculative_config(target_model(), parallel())
    assert args.seen == ["eagle3"]
    assert args.speculative_config is asked
    assert asked == before
    assert made.method == "dflash"
    hf_config = made.draft_model_config.hf_config
    assert made.updated == [hf_config]
    assert hf_config.architectures == ["DFlashDraftModel"]
    assert hf_config.vocab_size == 128  # the draft's own configuration, not the wrapper
    taps = DraftConfig.from_dir(tmp_path / "draft").target_layer_ids
    assert hf_config.eagle_aux_hidden_state_layer_ids == [tap + 1 for tap in taps]
    assert made.draft_model_config.max_model_len == 1024 + 2


def test_the_model_is_registered_by_name_where_there_may_be_a_device(vllm, tmp_path):
    engine_args(given(tmp_path)).create_speculative_config(target_model(), parallel())
    where = "dflash_plugin.shims.vllm_draft_model:DFlashDraftModel"
    assert vllm.archs == {"DFlashDraftModel": where, "Eagle3DFlashDraftModel": where}


def test_without_dflash_everything_is_as_published(vllm):
    assert engine_args(None).create_speculative_config(None, None) is None
    asked = {"method": "ngram", "num_speculative_tokens": 2}
    made = engine_args(asked).create_speculative_config("target", "parallel")
    assert made.method == "ngram"
    assert made.updated == []
    assert asked["target_model_config"] == "target"
    with pytest.raises(ValueError, match="Unsupported speculative method: 'other'"):
        engine_args({"method": "other"}).create_speculative_config("target", "parallel")
    assert vllm.archs == {}


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"model": None}, UsageError, "needs a draft"),
        ({"model": "nowhere"}, PairMismatchError, "not found"),
        ({"num_speculative_tokens": None}, UsageError, "num_speculative_tokens"),
        ({"num_speculative_tokens": 99}, PairMismatchError, "num_speculative_tokens is 99"),
        ({"disable_padded_drafter_batch": True}, UsageError, "disable_padded_drafter_batch"),
        ({"speculative_token_tree": "[(0,)]"}, UsageError, "speculative_token_tree"),
        ({"max_model_len": 64}, UsageError, "max_model_len"),
        ({"quantization": "fp8"}, UsageError, "quantization"),
        ({"draft_tensor_parallel_size": 2}, UsageError, "draft_tensor_parallel_size is 2"),
    ],
)
def test_settings_that_would_run_wrongly_are_refused(vllm, tmp_path, changes, error, names):
    args = engine_args(given(tmp_path, **changes))
    with pytest.raises(error, match=names):
        args.create_speculative_config(target_model(), parallel())
    assert args.seen == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_size": 4096}, "hidden_size"),
        ({"vocab_size": 7}, "vocab_size"),
        ({"num_hidden_layers": 2}, "layers|target_layer_ids"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(vllm, tmp_path, changes, names):
    with pytest.raises(PairMismatchError, match=names):
        engine_args(given(tmp_path)).create_speculative_config(target_model(**changes), parallel())


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "decode_context_parallel_size"])
def test_ways_of_running_that_are_not_covered_are_refused(vllm, tmp_path, name):
    with pytest.raises(UnsupportedEngineError, match=f"{name} is 2"):
        engine_args(given(tmp_path)).create_speculative_config(
            target_model(), parallel(**{name: 2})
        )


def test_the_v2_runner_is_refused(vllm, tmp_path):
    vllm.envs.VLLM_USE_V2_MODEL_RUNNER = True
    with pytest.raises(UnsupportedEngineError, match="V1 runner"):
        engine_args(given(tmp_path)).create_speculative_config(target_model(), parallel())


@pytest.mark.parametrize("taps", [[1, 0], [0, 0]])
def test_taps_out_of_order_are_refused(taps):
    pytest.importorskip("torch")
    raw = draft_json()
    raw["dflash_config"]["target_layer_ids"] = taps
    draft = DraftConfig.from_dict(raw, arguments.Path("d"))
    text = target_model().hf_text_config
    target = TargetConfig(
        arguments.Path("t"), "llama", text.hidden_size, text.num_hidden_layers, text.vocab_size
    )
    with pytest.raises(PairMismatchError, match="ascending"):
        arguments.check(draft, target, 2)


# --- SpeculativeConfig, VllmConfig, Scheduler -----------------------------------


@pytest.fixture
def spec_config():
    class SpeculativeConfig:
        def __init__(self, method, layers=()):
            self.method = method
            hf_config = SimpleNamespace(eagle_aux_hidden_state_layer_ids=list(layers))
            self.draft_model_config = SimpleNamespace(hf_config=hf_config)

        def use_eagle(self):
            return self.method == "eagle3"

        def compute_hash(self):
            return f"published {self.method}"

    module = ModuleType("speculative")
    module.SpeculativeConfig = SpeculativeConfig
    config.apply(module)
    return SpeculativeConfig


def test_a_dflash_configuration_answers_as_a_draft_model_with_taps(spec_config):
    made = spec_config("dflash", [2, 5])
    assert made.use_eagle() is True
    assert made.use_dflash() is True
    assert made.compute_hash() == spec_config("dflash", [2, 5]).compute_hash()
    assert made.compute_hash() != spec_config("dflash", [2, 6]).compute_hash()


@pytest.mark.parametrize("method", ["eagle3", "ngram"])
def test_other_configurations_answer_as_published(spec_config, method):
    made = spec_config(method)
    assert made.use_eagle() is (method == "eagle3")
    assert made.use_dflash() is False
    assert made.compute_hash() == f"published {method}"


@pytest.mark.parametrize("cpu", [True, False])
def test_asynchronous_scheduling_where_there_is_a_device(monkeypatch, cpu):
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: cpu)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    module = ModuleType("config")
    module.EagleModelTypes = Literal["eagle", "eagle3"]
    asynchronous.apply(module)
    assert ("dflash" in get_args(module.EagleModelTypes)) is not cpu
    assert {"eagle", "eagle3"} <= set(get_args(module.EagleModelTypes))


@pytest.mark.parametrize(("method", "expected"), [*((m, 7) for m in OTHERS), ("dflash", 5)])
def test_a_block_gets_a_slot_for_every_row(method, expected):
    class Scheduler:
        def __init__(self, vllm_config, kv_cache_config, *, log_stats=False):
            self.vllm_config, self.num_spec_tokens = vllm_config, 4
            self.num_lookahead_tokens, self.given = 7, (kv_cache_config, log_stats)
            self.kv_cache_manager = SimpleNamespace(allocate_slots=None)

    module = ModuleType("scheduler")
    module.Scheduler = Scheduler
    lookahead.apply(module)
    config = SimpleNamespace(speculative_config=speculative(method))
    made = Scheduler(config, "kv", log_stats=True)
    assert made.num_lookahead_tokens == expected
    assert made.given == ("kv", True)


# --- proposer and CPU runner ----------------------------------------------------


@pytest.fixture
def eagle(monkeypatch):
    class EagleProposer:
        def __init__(self, vllm_config, device, runner=None):
            self.made_with = (vllm_config, device, runner)

    class DFlashProposer(EagleProposer):
        pass

    own = ModuleType("dflash_plugin.shims.vllm_proposer")
    own.DFlashProposer = DFlashProposer
    monkeypatch.setitem(sys.modules, own.__name__, own)
    registered = []
    monkeypatch.setattr(arguments, "register_model", lambda: registered.append(True))
    module = ModuleType("eagle")
    module.EagleProposer = EagleProposer
    proposer.apply(module)
    return SimpleNamespace(base=EagleProposer, own=DFlashProposer, registered=registered)


def test_eagles_proposer_is_dflashs_where_that_is_the_method(eagle):
    config = SimpleNamespace(speculative_config=speculative("dflash"))
    made = eagle.base(config, "cpu", "runner")
    assert type(made) is eagle.own
    assert made.made_with == (config, "cpu", "runner")
    assert eagle.registered == [True]


def test_otherwise_it_is_eagles(eagle):
    config = SimpleNamespace(speculative_config=speculative("eagle3"))
    assert type(eagle.base(config, "cpu", runner=None)) is eagle.base
    assert eagle.registered == []


@pytest.fixture
def runner(monkeypatch):
    class CpuGpuBuffer:
        cpu, gpu = "host", "device"

    class GPUModelRunner:
        def __init__(self, vllm_config, device):
            self.speculative_config = vllm_config.speculative_config
            self.device = device
            self.drafter = SimpleNamespace(ids=CpuGpuBuffer(), other=1, loaded=[])
            self.drafter.load_model = self.drafter.loaded.append
            self.done = []

        def _copy_draft_token_ids_to_cpu(self, scheduler_output, zeros_only=False):
            self.done.append(("published copy", scheduler_output, zeros_only))

        def _get_eagle3_aux_layers_from_config(self):
            return (2, 5)

    class CPUModelRunner(GPUModelRunner):
        def __init__(self, vllm_config, device):
            super().__init__(vllm_config, device)
            assert self.speculative_config is None, "spec decode is not supported."
            self.done.append("published init")

        def _postprocess_tensors(self):
            self.done.append("tensors")

        def _postprocess_triton(self):
            self.done.append("triton")

        def load_model(self, load_dummy_weights=False):
            self.model = SimpleNamespace(set_aux_hidden_state_layers=self.done.append)

    module = ModuleType("cpu_model_runner")
    module.CPUModelRunner, module.GPUModelRunner = CPUModelRunner, GPUModelRunner
    module.CpuGpuBuffer = CpuGpuBuffer
    module._torch_cuda_wrapper = contextlib.nullcontext
    interfaces = ModuleType("vllm.model_executor.models.interfaces")
    interfaces.supports_eagle3 = lambda model: CPUModelRunner.taps
    CPUModelRunner.taps = True
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    monkeypatch.setattr(cpu_runner, "install_kernels", lambda: CPUModelRunner.kernels.append(1))
    CPUModelRunner.kernels = []
    cpu_runner.apply(module)
    return CPUModelRunner


def test_the_cpu_runs_dflash(runner):
    made = runner(SimpleNamespace(speculative_config=speculative("dflash")), "cpu")
    assert made.done == ["tensors", "triton"]
    assert made.drafter.ids.gpu == "host"
    assert runner.kernels == [1]
    made.load_model()
    assert made.drafter.loaded == [made.model]
    assert made.done[-1] == (2, 5)


def test_a_target_that_hands_out_no_taps_is_refused(runner):
    made = runner(SimpleNamespace(speculative_config=speculative("dflash")), "cpu")
    runner.taps = False
    with pytest.raises(UnsupportedEngineError, match="layers' outputs"):
        made.load_model()


def test_drafts_are_copied_without_a_stream(runner):
    torch = pytest.importorskip("torch")
    made = runner(SimpleNamespace(speculative_config=speculative("dflash", 2)), "cpu")
    made.input_batch = SimpleNamespace(req_ids=["a", "b"])
    made.draft_token_ids_cpu = torch.full((4, 2), 9)
    made._draft_token_ids = torch.tensor([[1, 2], [3, 4]])
    made._copy_draft_token_ids_to_cpu(None)
    assert made.draft_token_ids_cpu.tolist() == [[1, 2], [3, 4], [9, 9], [9, 9]]
    assert made._draft_token_req_ids == ["a", "b"]
    made._copy_draft_token_ids_to_cpu(None, zeros_only=True)
    assert made.draft_token_ids_cpu.tolist() == [[0, 0], [0, 0], [9, 9], [9, 9]]


def test_without_dflash_the_cpu_runner_is_the_published_one(runner):
    made = runner(SimpleNamespace(speculative_config=None), "cpu")
    assert made.done == ["published init"]
    made.load_model()
    made._copy_draft_token_ids_to_cpu("output", zeros_only=True)
    assert made.done == ["published init", ("published copy", "output", True)]
    assert made.drafter.loaded == []
    assert runner.kernels == []
    with pytest.raises(AssertionError, match="not supported"):
        runner(SimpleNamespace(speculative_config=speculative("eagle3")), "cpu")


def test_torch_kernels_go_where_triton_ones_are_looked_for(monkeypatch):
    pytest.importorskip("torch")
    from dflash_plugin.shims import vllm_torch_kernels as kernels

    sampler = ModuleType("vllm.v1.sample.rejection_sampler")
    proposers = ModuleType("vllm.v1.spec_decode.eagle")
    proposers.triton = None
    parents = ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.spec_decode")
    for name in parents:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (sampler, proposers):
        parent, _, name = module.__name__.rpartition(".")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules[parent], name, module, raising=False)
    for parent in parents[1:]:
        above, _, name = parent.rpartition(".")
        monkeypatch.setattr(sys.modules[above], name, sys.modules[parent], raising=False)
    cpu_runner.install_kernels()
    for module, names in ((sampler, kernels.REJECTION), (proposers, kernels.PROPOSER)):
        for name in names:
            assert getattr(module, name)[(1,)] is getattr(kernels, name)
    powers = [proposers.triton.next_power_of_2(n) for n in (1, 2, 3, 5, 8, 9)]
    assert powers == [1, 2, 4, 8, 8, 16]
