"""What ranks tell each other: all-gathers of small tensors, at once or while work goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any

import torch
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


Pass = Generator[Tensor, Tensor, None]


def _together(parts: list[Tensor], group: Any) -> _Gathering:
    """What several passes have to say, as one exchange: one costs more than what it moves."""
    x = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
    return _Gathering(x, group, aside=True)


def _apart(got: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """[R, ...] of each part, contiguous."""
    if len(parts) == 1:
        return [got]
    split = got.split([part.numel() for part in parts], dim=1)
    return [x.contiguous().view(-1, *part.shape) for x, part in zip(split, parts, strict=True)]


def pipelined(passes: Iterable[Pass], most: int, group: Any) -> None:
    """Runs passes that stop for exchanges, some of them at work while an exchange is under way.

    A pass yields what is to be gathered and is sent what came of it, most - 1 times; at most `most`
    are begun and not over. A round sends off, as one exchange, what the passes in their middle and
    the one begun last have to say, and goes on with the oldest one's last step and a new one's
    first. The order of the exchanges follows from the number of passes alone, as it must on every
    rank.
    """
    waiting = iter(passes)
    begun: list[tuple[Pass, int, Tensor]] = []  # with the exchanges to come and what is to be sent
    under_way: list[tuple[Pass, int, Tensor]] = []
    exchange: _Gathering | None = None
    while True:
        going_on, ending = list[tuple[Pass, int, Tensor]](), list[tuple[Pass, Tensor]]()
        if exchange is not None:
            got = _apart(exchange.result(), [sent for _, _, sent in under_way])
            for (one, left, _), part in zip(under_way, got, strict=True):
                if left:
                    going_on.append((one, left - 1, one.send(part)))
                else:
                    ending.append((one, part))
        under_way = going_on + begun
        exchange = _together([sent for _, _, sent in under_way], group) if under_way else None
        for one, part in ending:
            with contextlib.suppress(StopIteration):
                one.send(part)
        new = next(waiting, None)
        begun = [] if new is None else [(new, most - 2, next(new))]
        if not (under_way or begun):
            return
