"""Learning-rate schedules: functions of the step alone, so that a resumed run needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

from fastkd.arguments.messages import shown

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
}


def lr_schedule(
    steps: int, shape: str = "cosine", *, warmup: int = 0, floor: float = 0.0
) -> Callable[[int], float]:
    """step -> factor: (step + 1) / warmup during warm-up, then from 1 down to `floor`.

        floor + (1 - floor) * shape((step - warmup) / (steps - warmup))

    Args:
        steps: of the whole run; beyond, the factor stays at `floor` (1 for "constant").
        shape: "cosine", "linear" or "constant".
        warmup: steps of linear warm-up, less than `steps`.
        floor: in [0, 1].

    Paper: Loshchilov and Hutter 2017, arXiv 1608.03983 (cosine).
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: got {shown(shape)}, expected one of {sorted(SHAPES)}")
    if not 0 <= warmup < steps:
        raise ValueError(
            f"warmup: got {shown(warmup)} of {shown(steps)} steps, expected 0 <= warmup < steps"
        )
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: got {shown(floor)}, expected a number in [0, 1]")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min((step - warmup) / (steps - warmup), 1.0)
        return floor + (1 - floor) * SHAPES[shape](share)

    return factor


def curriculum(
    start: float, stop: float, steps: int, shape: str = "cosine", *, warmup: int = 0
) -> Callable[[int], float]:
    """step -> temperature, for `soft(temperature=...)`: `start` in warm-up, then towards `stop`.

        T = stop + (start - stop) * shape((step - warmup) / (steps - warmup))

    Args:
        start, stop: T, above 0; softer first: start > stop.
        steps: of the whole run; beyond, T stays at `stop` (at `start` for "constant").
        shape: "cosine", "linear" or "constant".
        warmup: steps at `start`, less than `steps`.

    Paper: Jafari et al. 2021, annealing, arXiv 2104.07163 (Li et al. 2023 learn T, 2211.16231).
    """
    for name, T in (("start", start), ("stop", stop)):
        if not T > 0:
            raise ValueError(f"{name}: got {shown(T)}, expected a temperature > 0")
    if not 0 <= warmup < steps:
        raise ValueError(
            f"warmup: got {shown(warmup)} of {shown(steps)} steps, expected 0 <= warmup < steps"
        )
    share = lr_schedule(steps - warmup, shape)

    def temperature(step: int) -> float:
        return stop + (start - stop) * share(max(step - warmup, 0))

    return temperature
