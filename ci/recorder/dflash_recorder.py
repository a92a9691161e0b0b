"""Writes every block an engine drafts to a file; runs inside the engine's process.

An instrument of the harness, the same for stock and plugin cells, put on the
engine's path (see ``ci/serve.py``) and found through its entry point. It only
looks: the proposal it returns is the engine's own object.

One JSON line per request and proposal: ``position`` (absolute index of the last
known token), ``known`` (its id), ``draft`` (the proposed ids). Of the first prompts also the
target's tapped states, in a file of their own beside it (``….taps``), a line each: ``ids`` and
``values`` [token][taps * hidden] of its first tokens.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

TAPPED, PROMPTS = 16, 3
"""Tokens whose tapped states are written, and of how many prompts."""


def register() -> None:
    """Entry point ``vllm.general_plugins``; does nothing unless ``DFLASH_RECORD`` is set."""
    path = os.environ.get("DFLASH_RECORD")
    if not path:
        return
    try:
        from vllm.v1.spec_decode import llm_base_proposer
    except ImportError:  # before 0.20, where a dflash proposer is somebody else's
        from vllm.v1.spec_decode import eagle

        wrap_derived(eagle.SpecDecodeBaseProposer, path)
    else:
        wrap(llm_base_proposer.SpecDecodeBaseProposer, path)


def register_sglang() -> None:
    """Entry point ``sglang.srt.plugins``; does nothing unless ``DFLASH_RECORD`` is set."""
    path = os.environ.get("DFLASH_RECORD")
    if not path:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    worker = "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"

    def step(original, self, batch, *args, **kwargs):  # type: ignore[no-untyped-def]
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:  # a prefill drafts nothing
            return original(self, batch, *args, **kwargs)
        # Before the call, which moves them on: the prefix ends where the known token goes.
        positions = batch.seq_lens.tolist()
        result = original(self, batch, *args, **kwargs)
        if positions:
            blocks = self._draft_block_tokens_buf[: len(positions)].tolist()
            write(path, positions, [b[0] for b in blocks], [b[1:] for b in blocks])
        return result

    HookRegistry.register(f"{worker}.forward_batch_generation", step, HookType.AROUND)


def wrap_derived(base, path):  # type: ignore[no-untyped-def]
    """Record every class that is derived from ``base`` later and proposes in its own way."""

    def derived(cls, **kwargs):  # type: ignore[no-untyped-def]
        super(base, cls).__init_subclass__(**kwargs)
        if "propose" in vars(cls):
            wrap(cls, path)

    base.__init_subclass__ = classmethod(derived)


def wrap(proposer, path):  # type: ignore[no-untyped-def]
    """Replace ``proposer.propose`` (class) by one that also records; idempotent."""
    original = proposer.propose
    if getattr(original, "records_blocks", False):
        return

    # wraps: who looks at the source of `propose` is to see the engine's.
    @functools.wraps(original)
    def propose(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        # Before the call: it rewrites its input buffers.
        positions = kwargs["target_positions"]
        if positions.dim() > 1:  # M-RoPE repeats text positions in three rows
            positions = positions[0]
        metadata = kwargs["common_attn_metadata"]
        ends = metadata.query_start_loc[1 : metadata.num_reqs + 1].long() - 1
        rejected = kwargs.get("num_rejected_tokens_gpu")
        if rejected is not None:
            ends = ends - rejected[: metadata.num_reqs].long()
        last = positions[ends].tolist()
        known = kwargs["next_token_ids"].tolist()
        write_taps(self, path + ".taps", kwargs)
        result = original(self, *args, **kwargs)
        write(path, [position + 1 for position in last], known, result.tolist())
        return result

    propose.records_blocks = True
    proposer.propose = propose


def write(path, positions, known, drafts):  # type: ignore[no-untyped-def]
    """One line per request."""
    with Path(path).open("a", encoding="utf-8") as file:
        for position, token, draft in zip(positions, known, drafts, strict=True):
            line = {"position": position, "known": token, "draft": draft}
            file.write(json.dumps(line) + "\n")


def write_taps(proposer, path, kwargs):  # type: ignore[no-untyped-def]
    """Write the tapped states of the first tokens of a prompt that is read from its beginning."""
    written = getattr(proposer, "prompts_with_taps", 0)
    ids, states = kwargs.get("target_token_ids"), kwargs.get("target_hidden_states")
    if written >= PROMPTS or getattr(states, "ndim", 0) != 2 or ids is None:
        return
    if kwargs["target_positions"].reshape(-1)[:1].tolist() != [0]:
        return
    proposer.prompts_with_taps = written + 1
    line = {"ids": ids[:TAPPED].tolist(), "values": states[:TAPPED].double().tolist()}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
