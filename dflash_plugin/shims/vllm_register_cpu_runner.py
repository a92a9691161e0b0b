"""vLLM 0.18 and 0.19 refuse speculative decoding on the CPU: supply what is missing there.

Missing: the kernels in torch, the draft's loading, and a copy of the drafted tokens that
does not ask for a CUDA stream.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

from ..errors import UnsupportedEngineError
from . import Shim


def install_kernels() -> None:
    """Put the torch kernels where the engine looks for Triton's."""
    import vllm.v1.sample.rejection_sampler as sampler
    from vllm.v1.spec_decode import eagle

    from . import vllm_torch_kernels as kernels

    for module, names in ((sampler, kernels.REJECTION), (eagle, kernels.PROPOSER)):
        for name in names:
            setattr(module, name, kernels.Launched(getattr(kernels, name)))
    # All that this module uses of Triton apart from kernels; its placeholder lacks it.
    eagle.triton = SimpleNamespace(next_power_of_2=lambda n: 1 << max(0, n - 1).bit_length())


def apply(module: ModuleType) -> str:
    """Let ``CPUModelRunner`` run dflash; without it every method is the published one."""
    runner = module.CPUModelRunner
    init, load_model, copy_drafts = (
        runner.__init__,
        runner.load_model,
        runner._copy_draft_token_ids_to_cpu,
    )

    def is_dflash(config: Any) -> bool:
        return config is not None and config.method == "dflash"

    def init_with_drafter(self, vllm_config, device) -> None:  # type: ignore[no-untyped-def]
        if not is_dflash(vllm_config.speculative_config):
            init(self, vllm_config, device)
            return
        # As published, but for the assertion that there is no speculative decoding.
        with module._torch_cuda_wrapper():
            module.GPUModelRunner.__init__(self, vllm_config, device)
        self.use_cuda_graph = self.cascade_attn_enabled = False
        self._postprocess_tensors()
        if hasattr(self, "_postprocess_triton"):
            self._postprocess_triton()
        for buffer in vars(self.drafter).values():
            if isinstance(buffer, module.CpuGpuBuffer):
                buffer.gpu = buffer.cpu
        install_kernels()

    def load_both(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        load_model(self, *args, **kwargs)
        if not is_dflash(self.speculative_config):
            return
        from vllm.model_executor.models.interfaces import supports_eagle3

        if not supports_eagle3(self.model):
            raise UnsupportedEngineError(
                f"{type(self.model).__name__} of this vLLM cannot hand out its layers' outputs",
                hint="use a newer vLLM for this target",
            )
        self.drafter.load_model(self.model)
        self.model.set_aux_hidden_state_layers(self._get_eagle3_aux_layers_from_config())

    def copy_without_stream(self, scheduler_output, zeros_only=False) -> None:  # type: ignore[no-untyped-def]
        if not is_dflash(self.speculative_config):
            copy_drafts(self, scheduler_output, zeros_only)
            return
        drafts = self._draft_token_ids
        self._draft_token_req_ids = self.input_batch.req_ids.copy()
        self.draft_token_ids_cpu[: len(drafts)] = 0 if zeros_only else drafts

    runner.__init__ = init_with_drafter
    runner.load_model = load_both
    runner._copy_draft_token_ids_to_cpu = copy_without_stream
    return "the CPU runs dflash"


SHIM = Shim(
    name="register-cpu-runner",
    symptom="AssertionError on the CPU: spec decode is not supported",
    mechanism="the CPU runner lacks the kernels, the draft's loading and a copy of the drafts",
    removal="with register-arguments; test_registration_is_still_needed",
    module="vllm.v1.worker.cpu_model_runner",
    fingerprints={
        "CPUModelRunner.__init__": frozenset(
            {
                "1fa350c7da0c8f93",  # 0.18.0 to 0.18.1
                "06c090590191c74b",  # 0.19.0 to 0.19.1
            }
        ),
        "CPUModelRunner.load_model": frozenset(
            {
                "12eadf0c7a50de95",  # 0.18.0 to 0.19.1
            }
        ),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._copy_draft_token_ids_to_cpu": frozenset(
            {
                "70fd276b9a74cf51",  # 0.18.0 to 0.19.1
            }
        ),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids": frozenset(
            {
                "d84f587d39ca666d",  # 0.18.0 to 0.18.1
                "397164564150377d",  # 0.19.0 to 0.19.1
            }
        ),
        "vllm.v1.sample.rejection_sampler:rejection_sample": frozenset(
            {
                "6d4ea4e676dc15a2",  # 0.18.0 to 0.19.1
            }
        ),
        "vllm.v1.sample.rejection_sampler:sample_recovered_tokens": frozenset(
            {
                "917028fdfc61f72d",  # 0.18.0 to 0.19.1
            }
        ),
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens": frozenset(
            {
                "4a72e2584485d3ec",  # 0.18.0 to 0.19.1
            }
        ),
    },
    apply=apply,
)
