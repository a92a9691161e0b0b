"""Choosing tokens of several rows, and verifying drafted ones so that nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .api import Options


class Sampler:
    """Draws tokens, from draft and target alike, as :class:`Options` say.

    Rejection sampling: Leviathan et al., arXiv 2211.17192, section 2.3.
    """

    def __init__(self, options: Options, device: torch.device) -> None:
        self._options = options
        self._generator: torch.Generator | None = None
        if options.seed is not None:
            self._generator = torch.Generator(device).manual_seed(options.seed)

    def choose(self, logits: Tensor) -> list[int]:
        """One token id per row of logits [rows, vocab]."""
        if self._options.greedy:
            chosen: list[int] = logits.argmax(-1).tolist()
            return chosen
        return self._draw(self.probabilities(logits)).tolist()

    def draft(self, logits: Tensor) -> tuple[list[list[int]], Tensor | None]:
        """Token ids of the draft's logits [rows, k, vocab], and what they were drawn from."""
        if self._options.greedy:
            return logits.argmax(-1).tolist(), None
        probabilities = self.probabilities(logits)
        return self._draw(probabilities).tolist(), probabilities

    def verify(
        self, drafted: list[list[int]], drawn_from: Tensor | None, logits: Tensor
    ) -> tuple[list[int], list[int]]:
        """Per row how many drafted tokens stay, and the token that follows them.

        The tokens that result are distributed as if the target alone had drawn
        them, whatever the draft is like.

        Args:
            drafted, drawn_from: from :meth:`draft`.
            logits: of the target, [rows, k + 1, vocab]; row i is for the token at draft place i.
        """
        tokens = torch.tensor(drafted, device=logits.device)
        if drawn_from is None:
            chosen = logits.argmax(-1)
            accepted = _prefix(tokens == chosen[:, :-1])
            following = chosen.gather(1, accepted[:, None])[:, 0]
        else:
            p, q = self.probabilities(logits), drawn_from
            uniform = torch.rand(
                tokens.shape, dtype=p.dtype, device=p.device, generator=self._generator
            )
            at = tokens[..., None]
            stays = uniform * q.gather(-1, at)[..., 0] < p[:, :-1].gather(-1, at)[..., 0]
            accepted = _prefix(stays)
            # The residual max(p - q, 0); past the last drafted token q is nothing.
            place = accepted[:, None, None].expand(-1, 1, p.shape[-1])
            q = torch.cat([q, torch.zeros_like(q[:, :1])], dim=1)
            wanted, offered = p.gather(1, place)[:, 0], q.gather(1, place)[:, 0]
            left = (wanted - offered).clamp(min=0)
            nothing = left.sum(-1, keepdim=True) <= 0  # p equals q but for rounding
            following = self._draw(torch.where(nothing, wanted, left))
        both = torch.stack([accepted, following]).tolist()
        return both[0], both[1]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [..., vocab] as float32 probabilities, cut to top_k, top_p, min_p."""
        options = self._options
        scaled = logits.to(torch.float32) / options.temperature
        if 0 < options.top_k < scaled.shape[-1]:
            least = scaled.topk(options.top_k).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if options.top_p < 1:
            ordered, order = scaled.sort(descending=True, stable=True)
            shares = ordered.softmax(-1)
            cut = torch.empty_like(order, dtype=torch.bool)
            cut.scatter_(-1, order, shares.cumsum(-1) - shares >= options.top_p)
            scaled = scaled.masked_fill(cut, -torch.inf)
        probabilities = scaled.softmax(-1)
        if options.min_p > 0:
            least = probabilities.amax(-1, keepdim=True) * options.min_p
            probabilities = probabilities.masked_fill(probabilities < least, 0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def processed(self, logits: Tensor, texts: Sequence[Sequence[int]], drafted: int) -> Tensor:
        """Apply the logits processors to [rows, drafted + 1, vocab].

        Args:
            texts: of each row, known tokens and then the drafted ones.
            drafted: how many of them are.
        """
        if not self._options.logits_processors:
            return logits
        changed = logits.clone()
        for row, text in enumerate(texts):
            ids = torch.tensor([list(text)], device=logits.device)
            for place in range(drafted + 1):
                scores = changed[row, place][None]
                seen = ids[:, : ids.shape[1] - drafted + place]
                for process in self._options.logits_processors:
                    scores = process(seen, scores)
                changed[row, place] = scores[0]
        return changed

    def _draw(self, weights: Tensor) -> Tensor:
        """One index per row of weights [..., vocab], which need not add up to 1."""
        flat = weights.reshape(-1, weights.shape[-1])
        drawn = torch.multinomial(flat, 1, generator=self._generator)
        return drawn.view(weights.shape[:-1])


def _prefix(stays: Tensor) -> Tensor:
    """How many of each row's first entries are true."""
    return stays.long().cumprod(dim=1).sum(dim=1)
