"""A few of the mutation table's faults on the replicas that are there anyway: none survives.

The whole table: ``python -m ci mutate``.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ci import mutations, replicas


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("tiny-qwen3-mixed", ["taps-plus-one", "windows-ignored", "stale-prefix-block"]),
        ("tiny-gemma4", ["no-embedding-scale", "target-windows-ignored", "stale-draft-block"]),
    ],
)
def test_seeded_faults_are_caught_and_nothing_else(name: str, faults: list[str]) -> None:
    found = mutations.of_replica(replicas.ensure(name), faults, count=3, max_tokens=24)
    assert [row.fault for row in found] == [mutations.NONE, *faults]
    assert not [f"{row.fault}: {mutations.words(row)}" for row in found if not mutations.right(row)]
    assert not [row for row in found[1:] if row.caught is None]
    if name == "tiny-qwen3-mixed":
        assert "T" in (found[1].caught or ())  # of the taps themselves, not of what they do
