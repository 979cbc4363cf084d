"""Schedules: functions of the step alone, so that a resumed run needs no state; and their use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

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


class Rates:
    """The learning rates of some optimizers' groups: the schedule's, or else nobody's here.

        rate of a group at a step = its rate at the start * schedule(step)

    Without a schedule no rate is ever written: torch's schedulers, and whoever else sets one, have
    them to themselves. As a context it gives the rates back that a schedule has changed.

    Args:
        optimizers: whose groups they are; read at each step, as loading a state replaces groups.
        schedule: step (from 0) -> factor, or None.
    """

    def __init__(
        self, optimizers: Sequence[Any], schedule: Callable[[int], float] | None = None
    ) -> None:
        self.optimizers, self.schedule = optimizers, schedule
        self._start = self._now()
        self._written: list[float] | None = None

    def at(self, step: int) -> None:
        """Set the rates of a step; ValueError where somebody else has changed them in between."""
        if self.schedule is None:
            return
        if changed := self._changed():
            raise ValueError(f"optimizer: {changed}; use either of the two")
        factor = self.schedule(step)
        self._write([rate * factor for rate in self._start])
        self._written = self._now()  # a tensor rounds

    def base(self) -> list[float]:
        """The rates without the schedule's factor."""
        return self._now() if self.schedule is None else self._start

    def restore(self, rates: Sequence[float]) -> None:
        """Restore the rates that `base` of another run gave."""
        self._start, self._written = list(rates), None
        self._write(self._start)

    def __enter__(self) -> Rates:
        return self

    def __exit__(self, error_type: Any, *_: object) -> None:
        if self.schedule is None:
            return
        if error_type is None and (changed := self._changed()):
            warnings.warn(f"optimizer: {changed}, which is lost", stacklevel=3)
        self._write(self._start)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for own in self.optimizers for group in own.param_groups]

    def _now(self) -> list[float]:
        return [float(group["lr"]) for group in self._groups()]

    def _write(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self._groups(), rates, strict=True):
            if isinstance(group["lr"], Tensor):  # a captured step reads this very tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _changed(self) -> str:
        pairs = zip(self._now(), self._written or (), strict=False)
        for at, (now, written) in enumerate(pairs):
            if now != written:
                return (
                    f"got a learning rate of {now:.6g} in group {at}, which schedule= had set to "
                    f"{written:.6g}: something else changes it (a torch scheduler?)"
                )
        return ""


def applied(optimizer: Any) -> Any:
    """The first group's rate as it is now; a tensor stays one, which is nobody's to wait for."""
    rate = optimizer.param_groups[0]["lr"]
    return rate.clone() if isinstance(rate, Tensor) else rate
