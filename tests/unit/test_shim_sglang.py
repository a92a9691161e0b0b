"""SGLang's repairs on small stand-ins of what they change."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from installations import install, site_fixture  # noqa: F401  # fixture

from dflash_plugin import shims, support, support_sglang
from dflash_plugin.errors import CheckpointError, UnsupportedEngineError
from dflash_plugin.shims import (
    replacing,
    sglang_cpu_arguments,
    sglang_cpu_draft_backend,
    sglang_cpu_guard,
    sglang_cpu_kv_copy,
    sglang_cpu_norm_rope,
    sglang_cpu_streams,
    sglang_draft_attention,
    sglang_draft_dtype,
    sglang_draft_tensors,
    sglang_minimax_taps,
)


@pytest.mark.parametrize("name", shims.SGLANG_NAMES)
def test_each_says_what_it_is_for(name):
    shim = shims.load(name)
    assert shim.name == name
    assert shim.module.startswith("sglang.")
    assert shim.fingerprints
    assert all([shim.symptom, shim.mechanism, shim.removal])


def test_a_function_is_replaced_wherever_it_was_imported(monkeypatch):
    def old():
        return "old"

    owner, importer = ModuleType("fake_owner"), ModuleType("fake_importer")
    owner.work = importer.renamed = old
    importer.other = test_a_function_is_replaced_wherever_it_was_imported
    monkeypatch.setitem(sys.modules, "fake_owner", owner)
    monkeypatch.setitem(sys.modules, "fake_importer", importer)
    replacing.replace(owner, "work", lambda: "new")
    assert owner.work() == importer.renamed() == "new"
    assert importer.other is test_a_function_is_replaced_wherever_it_was_imported
    assert owner.work.__wrapped__ is old


# --- arguments before 0.5.21 ---


def handle(args, view):
    if not view.device.startswith("cuda"):
        raise ValueError("DFLASH only supports CUDA")
    args.handled = view.pp_size


@pytest.mark.parametrize("resolving", [True, False], ids=["0.5.19", "0.5.18"])
def test_the_cpu_is_let_through_and_stays_what_it_is(resolving):
    args = SimpleNamespace(device="cpu", pp_size=1, handled=None)
    module = SimpleNamespace()
    if resolving:
        module.resolving_view = lambda args: args
        module.declare_resolution = lambda args, source, **said: vars(args).update(said)
        module._handle_dflash = lambda args: handle(args, module.resolving_view(args))
    else:
        module._handle_dflash = lambda args: handle(args, args)
    module._resolve_dflash_draft_attention_backend = None
    view = getattr(module, "resolving_view", None)
    sglang_cpu_arguments.apply(module)
    module._handle_dflash(args)
    module._resolve_dflash_draft_attention_backend(args)
    assert args.device == "cpu"
    assert args.handled == 1
    assert args.speculative_draft_attention_backend == "torch_native"
    assert getattr(module, "resolving_view", None) is view


def test_what_else_dflash_refuses_is_still_refused():
    def refuse(args):
        raise ValueError("pp_size")

    args = SimpleNamespace(device="cpu")
    module = SimpleNamespace(_handle_dflash=refuse)
    sglang_cpu_arguments.apply(module)
    with pytest.raises(ValueError, match="pp_size"):
        module._handle_dflash(args)
    assert args.device == "cpu"


# --- the draft worker and its model ---


@pytest.mark.parametrize(
    ("label", "asked", "given"),
    [("DFLASH", None, "torch_native"), ("DFLASH", "own", "own"), ("DSPARK", None, None)],
)
def test_dflash_drafts_are_given_torch_native(label, asked, given):
    module = ModuleType("fake_worker")
    module.build_draft_tp_worker = lambda **options: options
    sglang_cpu_draft_backend.apply(module)
    found = module.build_draft_tp_worker(algo_label=label, attention_backend_override=asked)
    assert found["attention_backend_override"] == given


def test_the_kernel_for_norm_and_rotation_is_left_out():
    class DFlashAttention:
        def __init__(self, config):
            self.config, self.use_table_qk_norm_rope = config, True

    sglang_cpu_norm_rope.apply(SimpleNamespace(DFlashAttention=DFlashAttention))
    made = DFlashAttention("config")
    assert (made.config, made.use_table_qk_norm_rope) == ("config", False)


def test_keys_are_moved_by_torch():
    class MHATokenToKVPool:
        use_native_move_kv_cache = False

    sglang_cpu_kv_copy.apply(SimpleNamespace(MHATokenToKVPool=MHATokenToKVPool))
    pool = MHATokenToKVPool()
    pool._init_kv_copy_and_warmup()
    assert pool.use_native_move_kv_cache
    assert pool._kv_copy_config is None


def test_streams_are_for_devices(monkeypatch):
    class Tensor:
        def __init__(self, device):
            self.device = SimpleNamespace(type=device)

        def record_stream(self, stream):
            raise RuntimeError(f"recorded {stream}")

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=Tensor))
    sglang_cpu_streams.apply(None)
    Tensor("cpu").record_stream("s")
    with pytest.raises(RuntimeError, match="recorded s"):
        Tensor("cuda").record_stream("s")


def test_minimax_counts_layers_as_for_eagle():
    class MiniMaxM2ForCausalLM:
        def set_eagle3_layers_to_capture(self, layer_ids):
            self.captured = [layer + 1 for layer in layer_ids]

    sglang_minimax_taps.apply(SimpleNamespace(MiniMaxM2ForCausalLM=MiniMaxM2ForCausalLM))
    model = MiniMaxM2ForCausalLM()
    model.set_dflash_layers_to_capture((1, 16))
    assert model.captured == [2, 17]


class Embeds:
    def __init__(self, dtype):
        self.dtype = dtype

    def to(self, dtype):
        return Embeds(dtype)

    def bfloat16(self):
        return Embeds("bfloat16")


@pytest.mark.parametrize(
    ("draft", "dflash", "expected"),
    [(True, True, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")],
)
def test_dflash_drafts_get_their_own_type(draft, dflash, expected):
    class ModelRunner:
        is_draft_worker, dtype = draft, "float32"

        def _extend_forward_kwargs(self, batch, pp_proxy_tensors):
            return {"input_embeds": batch.input_embeds.bfloat16(), "other": 1}

    sglang_draft_dtype.apply(SimpleNamespace(ModelRunner=ModelRunner))
    batch = SimpleNamespace(
        input_embeds=Embeds("float32"), spec_algorithm=SimpleNamespace(is_dflash=lambda: dflash)
    )
    found = ModelRunner()._extend_forward_kwargs(batch, None)
    assert found["input_embeds"].dtype == expected
    assert found["other"] == 1


# --- the draft's attention ---

TYPES = SimpleNamespace(DECODER="causal", ENCODER_ONLY="both ways")


class Config(SimpleNamespace):
    def to_dict(self):
        return vars(self)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"use_swa": True, "swa_window_size": 64}, (63, "both ways")),
        ({"use_swa": True, "swa_window_size": 64, "causal": True}, (63, "causal")),
        ({"causal": True}, (-1, "causal")),
        ({"mask_token_id": 3}, "published"),
        ({"causal": False}, (-1, "both ways")),
    ],
)
def test_windows_and_causality_are_as_stated(stated, expected):
    module = SimpleNamespace(
        _get_dflash_layer_attention_params=lambda config, layer: "published", AttentionType=TYPES
    )
    sglang_draft_attention.apply(module)
    config = Config(num_hidden_layers=2, dflash_config=stated)
    assert module._get_dflash_layer_attention_params(config, 1) == expected


# --- the draft's tensors ---


class Parameter:
    def __init__(self, loader=None):
        self.got = []
        if loader:
            self.weight_loader = loader


def in_parts(parameter, tensor, part):
    parameter.got.append(part)


class Draft:
    """As the engine loads one: fused parameters, unknown names skipped."""

    parts = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"))

    def __init__(self, **config):
        self.config = SimpleNamespace(**config)
        self.parameters = {
            "layers.0.qkv_proj.weight": Parameter(in_parts),
            "fc.weight": Parameter(),
        }

    def named_parameters(self):
        return self.parameters.items()

    def load_weights(self, weights):
        for name, tensor in weights:
            for own, part in self.parts:
                if own in name:
                    fused = self.parameters[name.replace(own, "qkv_proj")]
                    fused.weight_loader(fused, tensor, part)
                    break
            else:
                parameter = self.parameters.get(name)
                if parameter is not None:
                    getattr(parameter, "weight_loader", default_loader)(parameter, tensor)


def default_loader(parameter, tensor):
    parameter.got.append(tensor)


WHOLE = [f"layers.0.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")] + ["fc.weight"]


@pytest.fixture
def draft(monkeypatch):
    class Checked(Draft):
        load_weights = Draft.load_weights

    module = SimpleNamespace(DFlashDraftModel=Checked, default_weight_loader=default_loader)
    sglang_draft_tensors.apply(module)
    return Checked


def test_a_whole_draft_is_loaded_and_left_as_it_was(draft):
    model = draft()
    model.load_weights((name, 1) for name in [*WHOLE, "layers.0.rotary_emb.inv_freq"])
    assert [p.got for p in model.parameters.values()] == [["q", "k", "v"], [1]]
    fused, single = model.parameters.values()
    assert fused.weight_loader is in_parts
    assert not hasattr(single, "weight_loader")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (WHOLE[:-1], "not in the checkpoint: fc.weight"),
        ([*WHOLE[:2], "fc.weight"], "not in the checkpoint: layers.0.qkv_proj.weight"),
        ([*WHOLE, "eh_proj.weight"], "not known to SGLang: eh_proj.weight"),
        ([*WHOLE[:-1], "model.fc.w"], "fc.weight; not known to SGLang: model.fc.w"),
        ([*WHOLE, *(f"x.{i}" for i in range(20))], "and 12 more"),
    ],
)
def test_tensors_that_are_missing_or_unknown_are_an_error(draft, names, said):
    with pytest.raises(CheckpointError, match="tensors are not those of its config") as raised:
        draft().load_weights((name, 1) for name in names)
    assert said in raised.value.message
    assert "doctor" in raised.value.hint


def test_a_quantised_draft_is_left_to_its_quantisation(draft):
    draft(quantization_config={"quant_method": "fp8"}).load_weights([("fc.weight", 1)])


def test_an_error_of_the_loader_leaves_the_parameters_alone(draft):
    def broken():
        raise OSError("truncated")
        yield

    model = draft()
    with pytest.raises(OSError, match="truncated"):
        model.load_weights(broken())
    assert not hasattr(model.parameters["fc.weight"], "weight_loader")


# --- the guard ---


@pytest.fixture
def worker(site, monkeypatch):
    """A module with a draft worker that the guard stands before."""
    install(site, "sglang", support_sglang.newest())

    class DFlashWorkerV2:
        def __init__(self, name):
            self.name = name

    module = SimpleNamespace(DFlashWorkerV2=DFlashWorkerV2)
    sglang_cpu_guard.apply(module)
    needed = support.decide("sglang", support_sglang.newest(), "cpu").shims
    for name in needed:
        shim = shims.load(name)
        fake = ModuleType(shim.module)
        monkeypatch.setitem(sys.modules, shim.module, sys.modules.get(shim.module, fake))
        setattr(sys.modules[shim.module], shims._marker(shim), True)
    return DFlashWorkerV2


def test_the_worker_starts_with_every_repair(worker):
    assert worker("w").name == "w"


def test_the_worker_does_not_start_with_one_missing(worker, monkeypatch):
    shim = shims.load("sglang-cpu-verify")
    monkeypatch.setattr(sys.modules[shim.module], shims._marker(shim), False)
    with pytest.raises(UnsupportedEngineError, match="sglang-cpu-verify") as raised:
        worker("w")
    assert "update dflash-plugin" in raised.value.hint


def test_sources_that_are_not_there_are_not_known(site):
    assert sglang_cpu_guard.unknown() == ["no sglang distribution found"]
    install(site, "sglang", support_sglang.newest())
    assert any("is gone" in line for line in sglang_cpu_guard.unknown())


# --- support ---


@pytest.mark.parametrize(
    ("version", "usable", "said"),
    [
        ("0.5.10.post1", False, "loads no plugins"),
        ("0.5.12.post1", False, "worker"),
        ("0.5.16", False, "nobody has held"),
        ("0.5.18", True, "MiniMax"),
        ("0.5.23", True, "greedily"),
        ("0.5.24", False, "not a release"),
        ("0.5.23rc1", False, "not a release"),
        ("0.5.23+local", False, "not a release"),
        ("nonsense", False, "not a version number"),
    ],
)
def test_each_release_has_its_reason(version, usable, said):
    decision = support.decide("sglang", version, "cpu")
    assert decision.usable is usable
    assert said in decision.line()
    assert usable or decision.next_step
    assert support.decide("sglang", version, "cuda").usable is usable


def test_on_other_platforms_there_are_the_repairs_for_all_alone():
    for platform in ("cuda", "rocm", "xpu", "unknown"):
        names = support.decide("sglang", "0.5.23", platform).shims
        assert names
        assert not [name for name in names if name.startswith("sglang-cpu-")]
