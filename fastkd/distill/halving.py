"""Architecture search: many candidates trained a little, the better part of them longer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from fastkd.arguments.messages import shown

from .logging import progress_bar

Candidate = TypeVar("Candidate")


class Halving(NamedTuple, Generic[Candidate]):
    """The best candidate, its last reward, and each round as (candidate, reward), best first."""

    best: Candidate
    value: float
    rounds: list[list[tuple[Candidate, float]]]


def successive_halving(
    candidates: Sequence[Candidate],
    reward: Callable[[Candidate, int], float],
    *,
    keep: float = 0.5,
    rounds: int | None = None,
    progress: bool = True,
) -> Halving[Candidate]:
    """Let all candidates run, drop the worse, let the rest run on, until one is left.

        round r = 0, 1, ...: the ceil(keep * n) candidates of largest reward(candidate, r) go on

    One of two or more always goes. Where a candidate is trained as long in a round as in all
    before together, n = 2^R of them cost about (R + 1) / 2^(R + 1) of training all to the end.

    Args:
        candidates: students, or whatever `reward` knows how to train; at least one.
        reward: (candidate, round) -> value, the higher the better, on data kept for it (agreement
            with a teacher needs no labels). It trains the candidate further. NaN and
            FloatingPointError (a training that diverged) count as worst.
        keep: share that goes on, in (0, 1).
        rounds: at most so many, the best of the last one wins; None: until one is left.
        progress: show a tqdm bar.

    Raises:
        ValueError: no candidate, an argument out of range, no candidate left with a value.

    Paper: Li et al. 2016, Hyperband, arXiv 1603.06560.
    """
    if not candidates:
        raise ValueError("candidates: got none, expected one or more")
    if not 0 < keep < 1:
        raise ValueError(f"keep: got {shown(keep)}, expected a number in (0, 1)")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds: got {shown(rounds)}, expected an integer >= 1 or None")
    left, made = list(candidates), list[list[tuple[Candidate, float]]]()
    bar: Any = progress_bar(unit="candidate") if progress else None
    while True:
        scored = []
        for candidate in left:
            scored.append((candidate, _value(reward, candidate, len(made))))
            if bar is not None:
                bar.update()
        scored.sort(key=lambda pair: pair[1], reverse=True)  # stable: the first of equals wins
        made.append(scored)
        fewer = min(math.ceil(keep * len(left)), len(left) - 1)
        if not fewer or len(made) == rounds:
            break
        left = [candidate for candidate, _ in scored[:fewer]]
    if bar is not None:
        bar.close()
    best, value = made[-1][0]
    if value == -math.inf:
        raise ValueError("reward: got no number for any candidate left, expected one")
    return Halving(best, value, made)


def _value(reward: Callable[[Any, int], float], candidate: Any, at: int) -> float:
    try:
        value = float(reward(candidate, at))
    except FloatingPointError:
        return -math.inf
    return -math.inf if math.isnan(value) else value
