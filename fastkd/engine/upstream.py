"""The factor that is known too late: what a gradient is multiplied by before it is rounded.

Forward has the operands in the cache; only backward knows what was made of the loss (`* T * T`,
`/ steps`, a loss scaler). So each loss remembers the upstream gradient of its last backward, and
forward computes the gradient with it. Where that was right, which in a training loop is at every
step but the first, backward hands the gradient out. Where it was wrong, backward computes the
gradient again. Nothing rounded is multiplied, so the bits never depend on the guess.

A loss is known again by its kind (divergence, dtype, device, operands), by the line that calls it
and those that call that line, and by its place among the losses of that kind and line whose
backward is still to come: two losses of a step have two places.

On a GPU nothing is read on the host: a place holds a 0-d tensor on the device, at one address for
as long as it exists, so that a CUDA graph that is replayed reads and leaves what it should.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

MOST_PLACES = 64  # losses of a line that wait for their backward; further ones are not remembered
MOST_LINES = 4096  # that are known
MOST_FACTORS = 64  # whose successors are known
MOST_MISSES = 2  # in a row, after which forward leaves the gradient to backward
FRAMES = 8  # of the stack: the engine's own, the caller's, a module's, some that called it


class _Place:
    """What is remembered of one loss of a step: its upstream gradients.

    The next one is expected to be the last one, or what followed the last one before, whichever of
    the two was right when they differed: factors that take turns are known, too.
    """

    __slots__ = ("after", "busy", "last", "misses", "on_device", "repeated", "turns")

    def __init__(self) -> None:
        self.busy = False
        self.last = 1.0
        self.after: dict[float, float] = {}
        self.turns = False  # factors take turns
        self.misses = 0
        self.repeated = False  # the last guess was right
        self.on_device: Tensor | None = None

    def expected(self) -> float:
        return self.after.get(self.last, self.last) if self.turns else self.last

    def learn(self, factor: float) -> None:
        self.repeated = _same(factor, self.expected())
        self.misses = 0 if self.repeated else self.misses + 1
        again = _same(factor, self.last)
        if self.turns or not again:  # else nothing changes
            known = self.after.get(self.last)
            followed = known is not None and _same(factor, known)
            if again != followed:
                self.turns = followed
            if len(self.after) >= MOST_FACTORS:
                self.after.clear()
            self.after[self.last] = factor
        self.last = factor


class _Places(threading.local):
    """Of each thread: two of them may run the same losses at once."""

    def __init__(self) -> None:
        self.of: dict[Hashable, list[_Place]] = {}


_places = _Places()


class OnHost:
    """A place while its loss waits for a backward, where values can be read."""

    __slots__ = ("expected", "place")

    expected: float | None

    def __init__(self, kind: Hashable, inplace: bool) -> None:
        """In place, the operands are gone after a wrong guess: only what has repeated is one."""
        place = _taken(kind)
        self.place: _Place | None = place
        self.expected = place.expected() if place.misses < MOST_MISSES else None
        if inplace and not (place.repeated and place.last and math.isfinite(place.last)):
            self.expected = None

    def settle(self, factor: float) -> bool:
        """Whether the guess was right. Remembers the factor and gives the place back."""
        place = self.place
        if place is not None:  # else a second backward
            place.busy, self.place = False, None
            if factor == place.last != 0.0 and not place.turns:  # as in most steps
                place.misses, place.repeated = 0, True
            else:
                place.learn(factor)
        return self.expected is not None and _same(factor, self.expected)

    def __del__(self) -> None:
        if self.place is not None:
            self.place.busy = False


class OnDevice:
    """The same where values stay on a device."""

    __slots__ = ("expected", "place")

    expected: Tensor

    def __init__(self, kind: Hashable, device: torch.device, dtype: torch.dtype) -> None:
        place = _taken(kind)
        self.place: _Place | None = place
        if place.on_device is None:
            place.on_device = torch.ones((), dtype=dtype, device=device)
        self.expected = place.on_device.clone()

    def settle(self, factor: Tensor) -> Tensor:
        """As `OnHost.settle`; a 0-d bool tensor."""
        place = self.place
        if place is not None:
            assert place.on_device is not None
            # a gradient in place must be divided by it if it was wrong
            usable = factor.isfinite() & (factor != 0.0)
            place.on_device.copy_(torch.where(usable, factor, place.on_device))
            place.busy, self.place = False, None
        a, b = factor, self.expected
        return ((a == b) & ((a != 0.0) | (a.signbit() == b.signbit()))) | (a.isnan() & b.isnan())

    def __del__(self) -> None:
        if self.place is not None:
            self.place.busy = False


def _line() -> int:
    """The lines that lead to this call, as a number."""
    frame: Any = sys._getframe(4)
    lines: list[int] = []
    for _ in range(FRAMES):
        if frame is None:
            break
        lines += (id(frame.f_code), frame.f_lasti)
        frame = frame.f_back
    return hash(tuple(lines))


def _taken(kind: Hashable) -> _Place:
    key = kind, _line()
    places = _places.of.get(key)
    if places is None:
        if len(_places.of) >= MOST_LINES:
            _places.of.clear()
        places = _places.of[key] = []
    for place in places:
        if not place.busy:
            break
    else:
        place = _Place()
        if len(places) < MOST_PLACES:
            places.append(place)
    place.busy = True
    return place


def _same(a: float, b: float) -> bool:
    """Whether two factors give the same gradients, bit by bit."""
    if a == b:
        return a != 0.0 or math.copysign(1.0, a) == math.copysign(1.0, b)
    return a != a and b != b
