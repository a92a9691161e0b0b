"""Sampling with a draft has exactly the distribution of sampling without one."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from reference_helpers import StubDraft, TableTarget, make_draft, make_target, prompt  # noqa: E402

from dflash_plugin.reference import sampling  # noqa: E402
from dflash_plugin.reference.loop import generate  # noqa: E402
from dflash_plugin.reference.sampling import Sampler  # noqa: E402

pytestmark = pytest.mark.torch

VOCAB, PROMPT, RUNS = 8, 3, 2500


def table(seed: int) -> Any:
    """Logits of the next token by the last one."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)


def draft(k: int) -> StubDraft:
    """Drafts by a table of its own; the i-th token of a block only by the known one."""
    tables = [table(100 + i) for i in range(k)]
    return StubDraft(k, lambda _, known, n: torch.stack([tables[i][known] for i in range(n)]))


def chi_square(temperature: float, k: int = 2, **cuts: Any) -> tuple[float, int]:
    """Statistic and degrees of freedom of (2nd, 3rd token) against exact enumeration.

    The first token comes from the prefill; these two from drafts, residuals
    and the token after a fully accepted block.
    """
    target, stub = TableTarget(table(0)), draft(k)
    generator = torch.Generator().manual_seed(7)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(RUNS):
        result = generate(
            target,
            stub,
            [PROMPT],
            max_new_tokens=3,
            temperature=temperature,
            generator=generator,
            **cuts,
        )
        counts[tuple(result.token_ids[1:])] += 1
    p = Sampler(temperature, **cuts).probabilities(target.table)
    exact = {
        pair: RUNS
        * float(sum(p[PROMPT, t] * p[t, pair[0]] * p[pair[0], pair[1]] for t in range(8)))
        for pair in product(range(VOCAB), repeat=2)
    }
    assert all(exact[pair] > 0 for pair in counts), "a token of probability 0 was drawn"
    common = [pair for pair in exact if exact[pair] >= 5]
    cells = [(counts[pair], exact[pair]) for pair in common]
    rare = RUNS - sum(e for _, e in cells)
    if rare >= 5:
        cells.append((RUNS - sum(c for c, _ in cells), rare))
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


def limit(freedom: int) -> float:
    """What chi-square exceeds about once in 30,000 (four standard deviations)."""
    scale = 2 / (9 * freedom)
    return freedom * (1 - scale + 4 * scale**0.5) ** 3


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_joint_distribution_is_the_targets(temperature: float) -> None:
    statistic, freedom = chi_square(temperature)
    assert freedom > 10
    assert statistic < limit(freedom)


def test_one_drafted_token_and_cuts() -> None:
    statistic, freedom = chi_square(1.0, k=1, top_k=5, top_p=0.9)
    assert statistic < limit(freedom)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("residual", lambda p, q: p),
        ("residual", lambda p, q: q),
        ("accepts", lambda p, q, uniform: True),
        ("accepts", lambda p, q, uniform: uniform < p),
    ],
    ids=["residual is p", "residual is q", "always accept", "accept with p"],
)
def test_the_test_notices_wrong_sampling(
    name: str, replacement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, name, replacement)
    statistic, freedom = chi_square(1.0)
    assert statistic > 2 * limit(freedom)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.8), (99, 0.01)])
def test_cuts_are_those_of_transformers(top_k: int, top_p: float) -> None:
    pytest.importorskip("transformers")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = table(3)
    scores = TemperatureLogitsWarper(0.8)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    found = Sampler(0.8, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(found, scores.softmax(-1), rtol=1e-12, atol=0)


def test_same_seed_same_text_on_a_real_pair() -> None:
    pytest.importorskip("transformers")
    target = make_target()
    pair = target, make_draft(target.embedding, target.head)
    texts = [
        generate(
            *pair,
            prompt(5),
            max_new_tokens=20,
            temperature=1.2,
            top_k=20,
            generator=torch.Generator().manual_seed(seed),
            ignore_eos=True,
        ).token_ids
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 20
