"""Measuring one input: check each provider, count its memory, then time all of them in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.harness.gate import Errors, Unavailable, Wrong, first_line, out_of_memory
from bench.harness.result import Result
from bench.harness.timing import Neighbours, Sample, Say, TimingPlan, Turn, summarise, take_turns
from fastkd.demo.memory import peak_extra


@dataclass
class Ready:
    """A provider that has passed the gate on this input.

    Args:
        samples: what is timed -> takes one measurement of it, in milliseconds.
        memory: makes a step ready, whose peak memory is then counted; None counts nothing.
        errors, bound: of the gate.
        every: rounds from one turn to the next.
        verify: called after the rounds; raises `Wrong` where the timed runs went wrong.
    """

    samples: dict[str, Sample]
    memory: Callable[[], Callable[[], object]] | None = None
    errors: Errors | None = None
    bound: Errors | None = None
    every: int = 1
    verify: Callable[[], None] | None = None


@dataclass
class Provider:
    """Who computes a case on one input.

    Args:
        build: makes it ready and checks it; raises `Unavailable`, `Wrong` or what it raises.
        ours: its failure fails the run.
        yardstick: it is no competitor: built last, sampled first in each round.
    """

    name: str
    build: Callable[[], Ready]
    ours: bool = False
    yardstick: bool = False


@dataclass
class Comparison:
    """One case on one input, and all who compute it; names as in `Result`.

    Args:
        block: bytes of the tensors that a step works with; tells how its memory is counted.
        alternate: reverse the order in every other round.
        checked: called when all are checked, to free what the gate alone needs.
        figures: of every result.
    """

    case: str
    call: str
    input: str
    dtype: str
    device: torch.device
    providers: Sequence[Provider]
    block: int = 0
    alternate: bool = False
    checked: Callable[[], None] = lambda: None
    figures: dict[str, Any] = field(default_factory=dict)


def measure(of: Comparison, plan: TimingPlan, say: Say) -> list[Result]:
    """The result of every provider, in their order."""
    results = {
        one.name: Result(
            *(of.case, of.call, of.input, of.dtype, one.name, one.ours), figures={**of.figures}
        )
        for one in of.providers
    }
    ready: dict[str, Ready] = {}
    for one in of.providers:
        if not one.yardstick:
            say(f"checking {one.name}")
            _build(one, results[one.name], ready)
    of.checked()
    for name, found in ready.items():
        if found.memory is not None:
            say(f"memory of {name}")
            results[name].peak_bytes = peak_extra(found.memory(), of.device, of.block)
    for one in of.providers:
        if one.yardstick:  # not before: it may hold memory of its own
            _build(one, results[one.name], ready)
    first = [one.name for one in of.providers if one.yardstick and one.name in ready]
    order = [*first, *(name for name in ready if name not in first)]
    whats = [(name, what) for name in order for what in ready[name].samples]
    turns = [Turn(ready[name].samples[what], ready[name].every) for name, what in whats]
    with Neighbours(of.device) as neighbours:
        samples = take_turns(turns, plan, say, of.alternate)
    for (name, what), taken in zip(whats, samples, strict=True):
        results[name].times[what] = summarise(taken)
        results[name].samples[what] = taken
    for name, found in ready.items():
        _verify(found, results[name])
    for result in results.values():
        result.others_cores = neighbours.cores
    return list(results.values())


def _build(one: Provider, result: Result, ready: dict[str, Ready]) -> None:
    """Adds the provider, if it runs here and is right on this input; else its result says why."""
    try:
        found = one.build()
    except Unavailable as reason:
        result.status, result.note = "skipped", str(reason)
    except Wrong as wrong:
        result.status, result.note = "wrong", str(wrong)
        result.errors, result.bound = wrong.errors, wrong.bound
    except Exception as error:  # whatever a provider raises is its result, not ours
        told = one.ours and not out_of_memory(error)
        result.status, result.note = ("failed" if told else "skipped"), first_line(error)
    else:
        result.errors, result.bound = found.errors, found.bound
        ready[one.name] = found


def _verify(found: Ready, result: Result) -> None:
    try:
        if found.verify is not None:
            found.verify()
    except Wrong as wrong:
        result.status, result.note = "wrong", str(wrong)
        result.times, result.samples, result.peak_bytes = {}, {}, None


def start_afresh(device: torch.device) -> None:
    """Before another shape: forget compiled functions, whose versions are limited, and memory."""
    torch.compiler.reset()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
