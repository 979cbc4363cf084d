"""What ranks tell each other: all-gathers of small tensors, at once or while work goes on."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 has a new name for it
_all_gather = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def size(group: Any) -> int:
    """How many ranks there are."""
    return dist.get_world_size(group)


def rank(group: Any) -> int:
    """Which of them this is."""
    return dist.get_rank(group)


def gathered(x: Tensor, group: Any) -> Tensor:
    """[R, ...]: what every rank has, in the order of the ranks."""
    return _Gathering(x, group).result()


class _Gathering:
    """A `gathered` under way."""

    def __init__(self, x: Tensor, group: Any, aside: bool = False) -> None:
        ranks = dist.get_world_size(group)
        self.out, self.work = x.unsqueeze(0), None
        if ranks == 1:
            return
        flat = x.new_empty(ranks * x.numel())
        assert _all_gather is not None
        self.work = _all_gather(flat, x.reshape(-1), group=group, async_op=aside)
        self.out = flat.view(ranks, *x.shape)

    def result(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.out


def pipelined(trips: Iterable[Generator[Tensor, Tensor, None]], most: int, group: Any) -> None:
    """Runs trips that stop for exchanges, each at its next stage while the others' are under way.

    A trip yields what is to be gathered and is sent what came of it. `most` are under way at a
    time, one more than a trip has exchanges: what a round waits for was sent off a round ago. The
    order of the exchanges follows from the number of trips alone, as it must on every rank.
    """
    waiting, begun = iter(trips), list[tuple[Generator[Tensor, Tensor, None], _Gathering]]()
    fresh = 0  # begun in the last round
    while True:
        old = begun[: len(begun) - fresh]
        for at in reversed(range(len(old))):
            trip, exchange = old[at]
            try:
                begun[at] = trip, _Gathering(trip.send(exchange.result()), group, aside=True)
            except StopIteration:
                del begun[at]  # the oldest
        new = next(waiting, None) if len(begun) < most else None
        fresh = int(new is not None)
        if new is not None:
            begun.append((new, _Gathering(next(new), group, aside=True)))
        elif not begun:
            return
