"""The calls that published MLX snippets make: change ``dflash`` to ``dflash_plugin``.

from dflash_plugin.model_mlx import load, load_draft, stream_generate
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .backends.rows import Step


@dataclass(frozen=True)
class GenerationResponse:
    """One step of a text.

    Attributes:
        text, tokens: what the step added; the end-of-text token has no text.
        accepted: how many tokens the verify yielded; None for the prefill's.
        prompt_tokens, prompt_tps: of the prompt, and its tokens per second.
        generation_tokens, generation_tps: so far, and their tokens per second.
        peak_memory: of MLX, in GB.
        finish_reason: ``stop`` or ``length`` in the last response.
    """

    text: str
    tokens: list[int]
    accepted: int | None
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None


def load(model_id: str) -> tuple[Any, Any]:
    """Model and tokenizer of a hub id or local folder."""
    from .backends import mlx_model

    backend: Any = mlx_model.load(model_id, None).backend
    return backend.target.model, backend.wrapper


def load_draft(draft_id: str, bits: int | None = None) -> Any:
    """The draft of a hub id or local folder, quantised where ``bits`` are given."""
    from .backends.mlx_draft import DraftModel

    return DraftModel.load(draft_id, bits=bits)


def stream_generate(  # noqa: PLR0917 - the published signature
    model: Any,
    draft: Any,
    tokenizer: Any,
    prompt: Any,
    block_size: int | Literal["auto"] | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    prefill_step_size: int = 2048,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Stream a text; ``prompt`` is formatted text or token ids.

    ``options`` are further fields of :class:`dflash_plugin.Options`. Nothing stays patched
    on ``model``, and several streams may be open at once.
    """
    from .backends import mlx_model

    if isinstance(prompt, str):
        begin = getattr(tokenizer, "bos_token", None)
        special = begin is None or not prompt.startswith(begin)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    pair = mlx_model.load(model, draft, tokenizer=tokenizer)
    steps = pair.stream_generate(
        prompt, block_size=block_size, max_tokens=max_tokens, temperature=temperature,
        top_p=top_p, top_k=top_k, prefill_chunk=prefill_step_size, **options,
    )  # fmt: skip
    return _responses(steps, len(prompt))


def _responses(steps: Iterator[Step], prompt_tokens: int) -> Iterator[GenerationResponse]:
    from .backends.mlx_model import peak_memory

    count, first = 0, 0.0
    for step in steps:
        if not count:
            first = step.seconds
        begun, count = count > 0, count + len(step.token_ids)
        yield GenerationResponse(
            text=step.text,
            tokens=list(step.token_ids),
            accepted=len(step.token_ids) if begun else None,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / first if first else 0.0,
            generation_tokens=count,
            generation_tps=(count - 1) / (step.seconds - first) if begun else 0.0,
            peak_memory=peak_memory(),
            finish_reason=step.finish_reason,
        )
