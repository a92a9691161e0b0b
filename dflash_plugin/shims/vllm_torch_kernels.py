"""vLLM's speculative-decoding kernels in torch, for builds without Triton.

Each has the name and the arguments of the engine's kernel in 0.18 and 0.19, so that it can
be put in its place. Requests are rows; ``ends`` is the inclusive cumulative sum of their
drafted tokens. Only proposals without probabilities (``draft_probs`` None: one-hot) occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

REJECTION = (
    "rejection_greedy_sample_kernel",
    "rejection_random_sample_kernel",
    "expand_kernel",
    "sample_recovered_tokens_kernel",
)
PROPOSER = ("eagle_prepare_inputs_padded_kernel", "eagle_prepare_next_token_padded_kernel")


class Launched:
    """A function called as kernels are: ``kernel[grid](...)``."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.function


def _requests(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, first drafted token, one past the last) per request."""
    start = 0
    for row, end in enumerate(ends.tolist()):
        yield row, start, end
        start = end


def _accept(out: Tensor, drafted: Tensor, replacement: Tensor, ok: Tensor, bonus: Any) -> None:
    """Write the accepted tokens to ``out``, then the first replacement, or else the bonus."""
    accepted = int(ok.int().cumprod(0).sum())
    out[:accepted] = drafted[:accepted]
    out[accepted] = bonus if accepted == len(drafted) else replacement[accepted]


def rejection_greedy_sample_kernel(  # noqa: PLR0917
    output_token_ids: Tensor,
    ends: Tensor,
    draft_token_ids: Tensor,
    target_argmax: Tensor,
    bonus_token_ids: Tensor,
    is_greedy: Tensor | None,
    max_spec_len: int,
) -> None:
    """Accept drafted tokens as long as they are the target's likeliest."""
    for row, start, end in _requests(ends):
        if is_greedy is not None and not is_greedy[row]:
            continue
        drafted, best = draft_token_ids[start:end], target_argmax[start:end]
        _accept(output_token_ids[row], drafted, best, drafted == best, bonus_token_ids[row, 0])


def rejection_random_sample_kernel(  # noqa: PLR0917
    output_token_ids: Tensor,
    ends: Tensor,
    draft_token_ids: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    bonus_token_ids: Tensor,
    recovered_token_ids: Tensor,
    uniform_probs: Tensor,
    is_greedy: Tensor | None,
    max_spec_len: int,
    vocab_size: int,
    NO_DRAFT_PROBS: bool = True,  # noqa: N803 (the engine's name)
) -> None:
    """Accept a drafted token with the target's probability of it (the draft's is 1)."""
    _one_hot(draft_probs)
    chance = target_probs.gather(1, draft_token_ids.long()[:, None])[:, 0]
    kept = chance >= uniform_probs
    for row, start, end in _requests(ends):
        if is_greedy is not None and is_greedy[row]:
            continue
        _accept(
            output_token_ids[row],
            draft_token_ids[start:end],
            recovered_token_ids[start:end],
            kept[start:end],
            bonus_token_ids[row, 0],
        )


def sample_recovered_tokens_kernel(  # noqa: PLR0917
    output_token_ids: Tensor,
    ends: Tensor,
    draft_token_ids: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    inverse_exponential: Tensor,
    vocab_size: int,
    block_size: int,
    NO_DRAFT_PROBS: bool = True,  # noqa: N803 (the engine's name)
) -> None:
    """Sample, for every drafted token, the one that follows if it is rejected.

    From the target's distribution without the drafted token: the likeliest after division
    by exponential noise, one draw of noise a request.
    """
    _one_hot(draft_probs)
    for row, start, end in _requests(ends):
        drafted = draft_token_ids[start:end].long()[:, None]
        scores = target_probs[start:end].scatter(1, drafted, 0) * inverse_exponential[row]
        output_token_ids[start:end] = scores.argmax(-1).to(output_token_ids.dtype)


def expand_kernel(  # noqa: PLR0917
    output: Tensor,
    values: Tensor,
    ends: Tensor,
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int = 0,  # noqa: N803 (the engine's name)
) -> None:
    """Repeat each request's value once per drafted token."""
    value = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    for row, start, end in _requests(ends):
        output[start:end] = value[row]


def eagle_prepare_inputs_padded_kernel(  # noqa: PLR0917
    ends: Tensor,
    valid_count: Tensor,
    query_start_loc: Tensor,
    token_indices_to_sample: Tensor,
    num_rejected: Tensor,
    num_reqs: int,
) -> None:
    """Per request: how many drafted tokens were rejected, and its last accepted row."""
    drafted = ends[:num_reqs].diff(prepend=ends.new_zeros(1))
    rejected = torch.where(drafted > 0, drafted + 1 - valid_count[:num_reqs], 0)
    num_rejected.copy_(rejected)
    token_indices_to_sample.copy_(query_start_loc[1 : num_reqs + 1] - 1 - rejected)


def eagle_prepare_next_token_padded_kernel(  # noqa: PLR0917
    sampled_token_ids: Tensor,
    discard: Tensor,
    backup_next_token_ids: Tensor,
    next_token_ids: Tensor,
    valid_count: Tensor,
    vocab_size: int,
    num_sampled: int,
    num_reqs: int,
    stride: int,
    BLOCK_SIZE_TOKENS: int = 0,  # noqa: N803 (the engine's name)
) -> None:
    """Per request: how many tokens were sampled, and the last of them.

    A request in the middle of its prompt (``discard``) has none: the prompt's next token
    takes the place.
    """
    valid = (sampled_token_ids >= 0) & (sampled_token_ids < vocab_size)
    count = valid.sum(1).masked_fill(discard[:num_reqs], 0)
    order = torch.arange(1, num_sampled + 1) * valid
    last = sampled_token_ids.gather(1, order.argmax(1, keepdim=True))[:, 0]
    next_token_ids.copy_(torch.where(count > 0, last, backup_next_token_ids[:num_reqs]))
    valid_count.copy_(count)


def _one_hot(draft_probs: Tensor | None) -> None:
    if draft_probs is not None:
        raise NotImplementedError("drafts with probabilities do not occur on this platform")
