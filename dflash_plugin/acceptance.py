"""Accepted prefix, rejection sampling and acceptance statistics; pure Python.

A *step* (one draft, one verify) drafts K tokens, accepts a prefix of them and
adds one token of the target's own. Acceptance length (AL) is the mean number
of tokens a step yields, the target's own included: between 1 and K + 1.

Rejection sampling: Leviathan et al., arXiv 2211.17192, section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


def accepted_prefix(draft: Sequence[int], verified: Sequence[int]) -> int:
    """How many leading drafted tokens equal the tokens the target chose at their places."""
    count = 0
    for drafted, chosen in zip(draft, verified):  # noqa: B905 - either may be longer
        if drafted != chosen:
            break
        count += 1
    return count


def accepts(p: float, q: float, uniform: float) -> bool:
    """Whether a token drafted with probability ``q`` stays, the target giving it ``p``.

    True with probability min(1, p/q) for ``uniform`` drawn evenly from [0, 1).
    """
    return uniform * q < p


def residual(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """The distribution to draw from after a rejection: max(p - q, 0), normalised.

    ``p`` and ``q`` are the target's and the draft's probabilities of every
    token. Where p equals q nothing can be rejected but by rounding; p then.
    """
    excess = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    total = sum(excess)
    if total <= 0.0:
        return list(p)
    return [value / total for value in excess]


@dataclass(frozen=True)
class AcceptanceStats:
    """What the drafts of one or more requests were worth.

    Attributes:
        drafts: steps, each one draft and one verify.
        accepted_per_position: in how many steps the 1st, 2nd, … K-th drafted
            token was accepted. Never increasing, since a prefix is accepted.
    """

    drafts: int
    accepted_per_position: tuple[int, ...]

    def __post_init__(self) -> None:
        bounds = (self.drafts, *self.accepted_per_position, 0)
        if any(low > high for high, low in pairwise(bounds)):
            raise ValueError(
                f"accepted_per_position {list(self.accepted_per_position)} must fall from "
                f"drafts {self.drafts} towards 0"
            )

    @classmethod
    def from_steps(cls, accepted: Iterable[int], num_speculative_tokens: int) -> AcceptanceStats:
        """Statistics of steps that accepted these numbers of tokens, 0..K each."""
        lengths = list(accepted)
        wrong = [n for n in lengths if not 0 <= n <= num_speculative_tokens]
        if wrong:
            raise ValueError(f"{wrong[0]} accepted tokens, expected 0..{num_speculative_tokens}")
        return cls(
            len(lengths),
            tuple(sum(n > i for n in lengths) for i in range(num_speculative_tokens)),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AcceptanceStats:
        """The inverse of :meth:`to_dict`; derived entries are not read."""
        return cls(int(data["drafts"]), tuple(int(n) for n in data["accepted_per_position"]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the derived numbers that a reader wants to see."""
        return {
            "num_speculative_tokens": self.num_speculative_tokens,
            "drafts": self.drafts,
            "accepted": self.accepted,
            "accepted_per_position": list(self.accepted_per_position),
            "al": self.al,
        }

    def __add__(self, other: AcceptanceStats) -> AcceptanceStats:
        if self.num_speculative_tokens != other.num_speculative_tokens:
            raise ValueError(
                f"cannot add statistics of K {self.num_speculative_tokens} and "
                f"K {other.num_speculative_tokens}"
            )
        pairs = zip(self.accepted_per_position, other.accepted_per_position, strict=True)
        return AcceptanceStats(self.drafts + other.drafts, tuple(a + b for a, b in pairs))

    def __sub__(self, other: AcceptanceStats) -> AcceptanceStats:
        """What came after ``other``, for counters that only grow."""
        pairs = zip(self.accepted_per_position, other.accepted_per_position, strict=True)
        return AcceptanceStats(self.drafts - other.drafts, tuple(a - b for a, b in pairs))

    @property
    def num_speculative_tokens(self) -> int:
        """K."""
        return len(self.accepted_per_position)

    @property
    def accepted(self) -> int:
        """Drafted tokens accepted in all steps together."""
        return sum(self.accepted_per_position)

    @property
    def al(self) -> float | None:
        """Mean tokens per step, the target's own included; None without steps."""
        return 1.0 + self.accepted / self.drafts if self.drafts else None

    @property
    def rate_per_position(self) -> tuple[float, ...] | None:
        """Share of steps that accepted the 1st, 2nd, … K-th token; None without steps."""
        if not self.drafts:
            return None
        return tuple(n / self.drafts for n in self.accepted_per_position)

    @property
    def histogram(self) -> tuple[int, ...]:
        """Number of steps that accepted exactly 0, 1, … K tokens."""
        at_least = (self.drafts, *self.accepted_per_position, 0)
        return tuple(a - b for a, b in pairwise(at_least))


def total(stats: Iterable[AcceptanceStats], num_speculative_tokens: int) -> AcceptanceStats:
    """The sum of ``stats``, all of this K; every step weighs the same."""
    return sum(stats, AcceptanceStats(0, (0,) * num_speculative_tokens))
