"""Successive halving: who goes on, how often each is asked, and what is refused."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from fastkd import distill


def test_the_better_half_goes_on() -> None:
    asked: list[tuple[int, int]] = []

    def reward(candidate: int, at: int) -> float:
        asked.append((candidate, at))
        return candidate + 10 * at

    found = distill.successive_halving([3, 0, 6, 1, 5, 2, 7, 4], reward, progress=False)
    assert found.best == 7 and found.value == 37
    assert [[c for c, _ in scored] for scored in found.rounds] == [
        [7, 6, 5, 4, 3, 2, 1, 0],
        [7, 6, 5, 4],
        [7, 6],
        [7],
    ]
    assert Counter(at for _, at in asked) == {0: 8, 1: 4, 2: 2, 3: 1}
    assert [c for c, at in asked if at == 0] == [3, 0, 6, 1, 5, 2, 7, 4]


def test_a_late_winner_needs_its_early_round() -> None:
    """A candidate dropped in a round is not asked again, however good it would have been."""
    rewards = {"early": (2.0, 0.0), "late": (1.0, 9.0), "steady": (3.0, 1.0), "none": (0.0, 0.0)}
    found = distill.successive_halving(
        list(rewards), lambda name, at: rewards[name][min(at, 1)], rounds=2, progress=False
    )
    assert found.best == "steady" and found.value == 1.0
    assert [len(scored) for scored in found.rounds] == [4, 2]


@pytest.mark.parametrize(("keep", "sizes"), [(0.34, [9, 4, 2, 1]), (0.99, [3, 2, 1])])
def test_share(keep: float, sizes: list[int]) -> None:
    found = distill.successive_halving(
        range(sizes[0]), lambda candidate, _: -candidate, keep=keep, progress=False
    )
    assert [len(scored) for scored in found.rounds] == sizes and found.best == 0


def test_what_diverges_is_worst_and_the_first_of_equals_wins() -> None:
    def reward(candidate: str, _: int) -> float:
        if candidate == "raises":
            raise FloatingPointError
        return math.nan if candidate == "nan" else -5.0

    found = distill.successive_halving(["nan", "raises", "a", "b"], reward, progress=False)
    assert found.best == "a" and [c for c, _ in found.rounds[1]] == ["a", "b"]
    with pytest.raises(ValueError, match="reward: got no number"):
        distill.successive_halving(["nan", "raises"], reward, progress=False)


@pytest.mark.parametrize(
    ("candidates", "options", "match"),
    [
        ([], {}, "candidates: got none"),
        ([1], {"keep": 1.0}, "keep: got 1.0"),
        ([1], {"keep": 0.0}, "keep: got 0.0"),
        ([1], {"rounds": 0}, "rounds: got 0"),
    ],
)
def test_errors(candidates: list[int], options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        distill.successive_halving(candidates, lambda c, _: c, progress=False, **options)
