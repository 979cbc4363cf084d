"""A recipe: one demonstration of a method beside its control."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Figures = dict[str, float]


class Gain(NamedTuple):
    """A claim: figure of `method` minus figure of `control`, over seeds.

    Args:
        method, control: names among the recipe's figures; a control of "" claims the figure itself.
        threshold: the least mean gain, in the recipe's unit; None where it is reported only.
        seeds_improved: least share of seeds, in [0, 1], on which the gain is above 0.
    """

    method: str
    control: str
    threshold: float | None
    seeds_improved: float = 0.0


class Recipe(NamedTuple):
    """One row of the table that `python -m fastkd recipes` prints.

    Args:
        name: as given on the command line.
        about: one line.
        paper: author, year, arXiv id; "" where there is none.
        run: (seed, size) -> figure of each variant; size in (0, 1] scales the number of steps (a
            smoke test runs at 0.05, the claims hold at 1). Deterministic for a seed on one machine.
        gains: what is claimed.
        seeds: how many seeds the claims are made over.
        unit: of the figures.
    """

    name: str
    about: str
    paper: str
    run: Callable[[int, float], Figures]
    gains: tuple[Gain, ...]
    seeds: int = 8
    unit: str = "points"
