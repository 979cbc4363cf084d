"""Learning rates of a run: whose they are, and what a schedule makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


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
        """Take `base` of another run."""
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
