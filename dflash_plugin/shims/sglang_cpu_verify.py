"""SGLang's ``torch_native`` attention cannot verify a block, nor draft one.

It takes the lengths of a prefill, which a verify does not have, and its ``seq_lens`` leave
the block out. It also pads the queries to the whole sequence, so that a block of 8 after
4000 tokens would cost as much as a prefill of 4000; and it ignores the window of layers
whose block is not causal.
"""

from __future__ import annotations

from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Give blocks a way of their own; prefill and decode stay as published."""
    backend = module.TorchNativeAttnBackend
    published = backend.forward_extend

    def forward_extend(  # noqa: PLR0917 (the engine's)
        self: Any,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> Any:
        if not forward_batch.forward_mode.is_target_verify():
            return published(self, q, k, v, layer, forward_batch, save_kv_cache, **options)
        from . import sglang_torch_kernels as kernels

        # As published; slots of a pool with windows are other than those of the whole.
        if save_kv_cache and k is not None and v is not None:
            slots = module.KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, slots, k, v)
        n = int(forward_batch.spec_info.draft_token_num)
        query = q.view(-1, n, layer.tp_q_head_num, layer.qk_head_dim)
        output = q.new_empty(*query.shape[:3], layer.v_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        table = self.req_to_token_pool.req_to_token
        window = layer.sliding_window_size
        for i, (request, prefix) in enumerate(
            zip(forward_batch.req_pool_indices, forward_batch.seq_lens.tolist(), strict=True)
        ):
            output[i] = kernels.block_attention(
                query[i],
                keys,
                values,
                table[request, : prefix + n],
                causal=layer.attn_type != module.AttentionType.ENCODER_ONLY,
                window=-1 if window is None else window,
                scale=layer.scaling,
            )
        return output.view(q.shape[0], -1)

    backend.forward_extend = forward_extend
    return "torch_native attends to blocks"


SHIM = Shim(
    name="sglang-cpu-verify",
    symptom="the first draft crashes in torch_native: extend_prefix_lens is None",
    mechanism="the back-end has no way to verify; a block's queries attend to its context and "
    "itself, with the window and the causality of its layer, and nothing is padded",
    removal="when torch_native verifies by itself, at the cost of a block, which "
    "test_each_cpu_repair_is_still_needed shows by failing",
    module="sglang.srt.layers.attention.torch_native_backend",
    fingerprints={
        "TorchNativeAttnBackend.forward_extend": frozenset({"50aea2260d572200"}),
        # 0.5.18 - 0.5.23
    },
    apply=apply,
)
