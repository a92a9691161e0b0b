"""Choosing tokens from logits, and verifying drafted ones so that nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..acceptance import accepted_prefix, accepts, residual
from ..errors import UsageError


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn, from draft and target alike.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: keep so many most likely tokens; 0 keeps all.
        top_p: of those, keep the fewest that reach this probability; 1 keeps all.
        generator: source of randomness; None is torch's global one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not ok:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def greedy(self) -> bool:
        """Whether there is nothing random."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Rows [n, vocab] of logits as float64 probabilities, cut to top_k, then top_p."""
        scaled = logits.to(torch.float64) / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scaled.sort(descending=True, stable=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            cut = torch.empty_like(before, dtype=torch.bool)
            cut.scatter_(-1, order, before >= self.top_p)
            scaled = scaled.masked_fill(cut, -torch.inf)
        return scaled.softmax(-1)

    def draw(self, probabilities: Tensor) -> int:
        """One token id from probabilities [vocab]."""
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self.generator))

    def choose(self, logits: Tensor) -> int:
        """One token id from logits [vocab]."""
        if self.greedy:
            return int(logits.argmax())
        return self.draw(self.probabilities(logits))

    def draft(self, logits: Tensor) -> list[int]:
        """One token id per row of the draft's logits [k, vocab]."""
        return [self.choose(row) for row in logits]

    def verify(
        self, draft: Sequence[int], draft_logits: Tensor, target_logits: Tensor
    ) -> tuple[int, int]:
        """How many of the drafted tokens stay, and the token that follows them.

        The tokens that result are distributed as if the target alone had drawn
        them, whatever the draft is like.

        Args:
            draft: k token ids, drawn by :meth:`draft`.
            draft_logits: [k, vocab].
            target_logits: [k + 1, vocab], row i for the token at draft place i.
        """
        if self.greedy:
            verified = target_logits.argmax(-1).tolist()
            accepted = accepted_prefix(draft, verified)
            return accepted, verified[accepted]
        p, q = self.probabilities(target_logits), self.probabilities(draft_logits)
        for i, token in enumerate(draft):
            uniform = float(torch.rand((), dtype=torch.float64, generator=self.generator))
            if not accepts(float(p[i, token]), float(q[i, token]), uniform):
                left = residual(p[i].tolist(), q[i].tolist())
                return i, self.draw(torch.tensor(left, dtype=torch.float64))
        return len(draft), self.draw(p[len(draft)])
