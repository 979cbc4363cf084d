"""Timing: a clock for one call, turns of many, and the arithmetic of what was timed.

Providers are interleaved (A B C A B C ...), so that a drifting clock or a busy neighbour meets all
of them alike.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 1000
# Written before each timed run on a GPU; larger than any L2 cache (50 MiB on an H100).
FLUSH_BYTES = 256 * 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Say = Callable[[str], None]
Sample = Callable[[], float]  # takes one measurement: milliseconds


class Summary(NamedTuple):
    """Milliseconds: median, 20th and 80th percentile, number of runs."""

    median: float
    p20: float
    p80: float
    runs: int


def percentile(samples: Sequence[float], share: float) -> float:
    """The share-quantile (0 to 1), linear between neighbours."""
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summarise(samples: Sequence[float]) -> Summary:
    """Median and 20/80 percentiles of the samples."""
    middle, low, high = (percentile(samples, share) for share in (0.5, 0.2, 0.8))
    return Summary(middle, low, high, len(samples))


def gb_per_s(count: int, summary: Summary | None) -> float | None:
    """Bytes per second of the median, in 1e9."""
    if summary is None or summary.median <= 0:
        return None
    return count / (summary.median * 1e-3) / 1e9


class Clock:
    """Milliseconds of a call, the mean of those given: by the wall, on a GPU between two events."""

    def __init__(self, device: torch.device) -> None:
        self._runtime = None if device.type == "cpu" else torch.get_device_module(device)
        if self._runtime is not None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
            self._start = self._runtime.Event(enable_timing=True)
            self._end = self._runtime.Event(enable_timing=True)

    def __call__(self, *runs: Callable[[], object]) -> float:
        if self._runtime is None:
            start = time.perf_counter()
            kept = [run() for run in runs]
            elapsed = (time.perf_counter() - start) * 1e3
        else:
            # no synchronisation in between: while the flush runs, the launches queue up
            self._flush.zero_()
            self._start.record()
            kept = [run() for run in runs]
            self._end.record()
            self._end.synchronize()
            elapsed = self._start.elapsed_time(self._end)
        # here the gradient is freed, as by the layer before in a training step: not part of a loss
        del kept
        return elapsed / len(runs)


class TimingPlan(NamedTuple):
    """How long one input is timed.

    Args:
        seconds: time budget of all rounds.
        rounds: (least, most) number of rounds.
        warm_up: rounds before that are not counted.
    """

    seconds: float = 6.0
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS)
    warm_up: int = 1


class Turn(NamedTuple):
    """What is sampled in every round, or in every n-th one."""

    sample: Sample
    every: int = 1


def take_turns(
    entries: Sequence[Turn], plan: TimingPlan, say: Say, alternate: bool = False
) -> list[list[float]]:
    """The samples of each entry, taken in turns.

    Args:
        alternate: reverse the order in every other round.
    """
    samples: list[list[float]] = [[] for _ in entries]
    least, most = plan.rounds
    with no_collection():
        start = time.perf_counter()
        for number in range(-plan.warm_up, most):
            if number == 0:
                start = time.perf_counter()
            spent = time.perf_counter() - start
            if number >= least and spent > plan.seconds:
                break
            say(f"timing, round {max(number, 0) + 1}, {spent:.0f} of {plan.seconds:g} s")
            order = list(zip(entries, samples, strict=True))
            for entry, kept in order[::-1] if alternate and number % 2 == 0 else order:
                if number > 0 and number % entry.every:
                    continue
                elapsed = entry.sample()
                if number >= 0:
                    kept.append(elapsed)
    return samples


def cores() -> set[int]:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


class Neighbours:
    """How many of our cores others kept busy in a `with` block: `cores`, None if unknown.

    The load average would not do: it lags by a minute, and counts this process too.
    """

    # user, nice, system, irq, softirq and steal (the host's other guests) in a line of /proc/stat
    BUSY_COLUMNS = (1, 2, 3, 6, 7, 8)
    LEAST_SECONDS = 0.5  # below, the system's clock ticks (10 ms) are too coarse

    def __init__(self, device: torch.device) -> None:
        self.cores: float | None = None
        self._of_interest = device.type == "cpu"

    def __enter__(self) -> Neighbours:
        self._before = self._seconds() if self._of_interest else None
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        elapsed = time.perf_counter() - self._start
        after = self._seconds() if self._of_interest else None
        if self._before is not None and after is not None and elapsed >= self.LEAST_SECONDS:
            self.cores = max(0.0, (after - self._before) / elapsed)

    def _seconds(self) -> float | None:
        """CPU time on our cores so far, without our own; None where Linux is not."""
        names = {f"cpu{core}" for core in cores()}
        ticks = 0
        try:
            with open("/proc/stat") as file:
                for line in file:
                    fields = line.split()
                    if fields and fields[0] in names:
                        ticks += sum(int(fields[at]) for at in self.BUSY_COLUMNS)
        except (OSError, IndexError, ValueError):
            return None
        own = os.times()  # of this process and of its children that have ended
        used = own.user + own.system + own.children_user + own.children_system
        return ticks / os.sysconf("SC_CLK_TCK") - used


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps Python's garbage collector out of the timed runs."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
