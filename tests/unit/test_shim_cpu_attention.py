"""The two repairs of vLLM's CPU attention, on a back-end in plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dflash_plugin.shims import vllm_cpu_kv_update as kv_update
from dflash_plugin.shims import vllm_cpu_stale_kv as stale_kv

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
torch.set_num_threads(1)

import attention_helpers as helpers  # noqa: E402

BATCHES = [([40, 17, 5], [5, 5, 5]), ([33], [1]), ([40, 9, 21], [3, 8, 1])]


@pytest.mark.parametrize("wrong", [True, False])
def test_the_kernel_is_asked_not_assumed(wrong):
    module = helpers.back_end(reads_past_the_end=wrong)
    assert stale_kv.kernel_is_wrong(module) is wrong


def test_a_right_kernel_is_left_alone():
    module = helpers.back_end(reads_past_the_end=False)
    stale_kv.apply(module)
    made = helpers.batch(module, *BATCHES[0])
    out = helpers.run(module.CPUAttentionBackendImpl(8), made)
    assert torch.allclose(out, helpers.expected(made, 8), atol=1e-5)
    assert "_dflash_plugin_plans" not in vars(made.metadata)  # nothing was split


@pytest.mark.parametrize(("lengths", "rows"), BATCHES)
@pytest.mark.parametrize("window", [None, 30, 8, 3, 1])
def test_rows_see_both_ways_and_nothing_stale(lengths, rows, window):
    module = helpers.back_end(reads_past_the_end=True)
    impl = module.CPUAttentionBackendImpl(window)
    made = helpers.batch(module, lengths, rows)
    want = helpers.expected(made, window)
    assert not torch.allclose(helpers.run(impl, made), want, atol=1e-4)
    stale_kv.apply(module)
    made = helpers.batch(module, lengths, rows)
    assert torch.allclose(helpers.run(impl, made), want, atol=1e-5)
    # The token that asked the kernel; then the batch, once, however many calls its rows took.
    assert module.stored == [1, sum(rows)]
    assert made.metadata.causal is False  # what was asked for still says so


@pytest.mark.parametrize("window", [None, 8])
def test_causal_attention_runs_as_published(window):
    module = helpers.back_end(reads_past_the_end=True)
    calls = []
    published = module.CPUAttentionBackendImpl.forward
    module.CPUAttentionBackendImpl.forward = lambda self, *args, **kwargs: (
        calls.append(args[5]) or published(self, *args, **kwargs)
    )
    stale_kv.apply(module)
    made = helpers.batch(module, [40, 17], [4, 2], causal=True)
    out = helpers.run(module.CPUAttentionBackendImpl(window), made)
    assert torch.allclose(out, helpers.expected(made, window, causal=True), atol=1e-5)
    assert calls == [made.metadata]  # the caller's own object, untouched


def test_profiling_and_cross_attention_run_as_published():
    module = helpers.back_end(reads_past_the_end=True)
    seen = []
    module.CPUAttentionBackendImpl.forward = lambda self, *args: seen.append(args[5])
    stale_kv.apply(module)
    cross = SimpleNamespace(causal=False)
    module.CPUAttentionBackendImpl().forward(None, 1, 2, 3, 4, None, 5)
    module.CPUAttentionBackendImpl(attn_type="encoder_decoder").forward(None, 1, 2, 3, 4, cross, 5)
    assert seen == [None, cross]


def test_layers_of_one_shape_share_the_plan():
    module = helpers.back_end(reads_past_the_end=True)
    stale_kv.apply(module)
    made = helpers.batch(module, [40, 17], [4, 4])
    counted = []
    schedule = module.ops.cpu_attn_get_scheduler_metadata
    module.ops.cpu_attn_get_scheduler_metadata = lambda **given: (
        counted.append(given["sliding_window_size"]) or schedule(**given)
    )
    for window in (None, None, 8, 8):
        helpers.run(module.CPUAttentionBackendImpl(window), made)
    assert counted == [-1, -1, 8, 9, 10, 11]  # the first asks the kernel


@pytest.mark.parametrize("blocks_first", [False, True])
def test_keys_and_values_are_stored_where_they_belong(blocks_first):
    module = helpers.back_end(reads_past_the_end=False)
    assert not hasattr(module.CPUAttentionBackendImpl, "do_kv_cache_update")
    kv_update.apply(module)
    shape = (4, helpers.KV_HEADS, helpers.BLOCK, helpers.DIM)
    cache = torch.zeros(*shape[:3], 2 * shape[3]) if blocks_first else torch.zeros(2, *shape)
    keys, values = torch.randn(2, 3, helpers.KV_HEADS, helpers.DIM)
    slots = torch.tensor([17, -1, 63])
    module.CPUAttentionBackendImpl().do_kv_cache_update(None, keys, values, cache, slots)
    stored = kv_update.halves(cache)
    for half, given in zip(stored, (keys, values), strict=True):
        assert half.shape == shape
        assert torch.equal(half[1, :, 1], given[0])
        assert torch.equal(half[3, :, 15], given[2])
        assert int((half != 0).any(-1).sum()) == 2 * helpers.KV_HEADS


def test_without_a_cache_nothing_is_stored():
    module = helpers.back_end(reads_past_the_end=False)
    kv_update.apply(module)
    rows = torch.ones(1, helpers.KV_HEADS, helpers.DIM)
    empty, slots = torch.tensor([]), torch.zeros(1, dtype=torch.int64)
    module.CPUAttentionBackendImpl().do_kv_cache_update(None, rows, rows, empty, slots)
    assert module.stored == []


def test_quantised_caches_are_stored_with_their_scales():
    module = helpers.back_end(reads_past_the_end=False)
    given = {}

    def store(*tensors_and_isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=""):
        given.update(
            isa=tensors_and_isa[-1], k_scale=k_scale, v_scale=v_scale, dtype=kv_cache_dtype
        )

    module.ops.cpu_attn_reshape_and_cache = store
    module._get_attn_isa = lambda dtype, block, head=None, kv_cache_dtype=None: kv_cache_dtype
    kv_update.apply(module)
    impl = module.CPUAttentionBackendImpl()
    impl.kv_cache_dtype = "fp8"
    layer = SimpleNamespace(_k_scale_float=2.0, _v_scale_float=3.0)
    rows = torch.ones(1, helpers.KV_HEADS, helpers.DIM)
    cache = torch.zeros(2, 1, helpers.KV_HEADS, helpers.BLOCK, helpers.DIM)
    impl.do_kv_cache_update(layer, rows, rows, cache, torch.zeros(1, dtype=torch.int64))
    assert given == {"isa": "fp8", "k_scale": 2.0, "v_scale": 3.0, "dtype": "fp8"}


def test_a_back_end_that_has_the_method_keeps_it():
    module = helpers.back_end(reads_past_the_end=False)
    module.CPUAttentionBackendImpl.do_kv_cache_update = own = object()
    assert "not needed" in kv_update.apply(module)
    assert module.CPUAttentionBackendImpl.do_kv_cache_update is own
