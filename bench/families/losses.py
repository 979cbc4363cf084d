"""Every loss of fastkd against eager torch, torch.compile and, on a GPU, Liger-Kernel.

A copy of the student's logits is timed beside them: the others' share of the bandwidth refers to
it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.families.loss_cases import (
    CASES,
    SHAPE_SETS,
    TRAINING_STREAMS,
    Case,
    WrittenCase,
    logits_bytes,
)
from bench.families.loss_providers import (
    DEFAULT_PROVIDERS,
    DEMO_PROVIDERS,
    PROVIDERS,
    TOY_PROVIDERS,
    Call,
    eager,
)
from bench.families.loss_providers import Provider as LossProvider
from bench.harness import gate, table
from bench.harness.family import DTYPES, Family, Input, Shape, spelled
from bench.harness.measure import Comparison, Provider, Ready
from bench.harness.result import Result, speedup
from bench.harness.timing import Clock, gb_per_s

COPY = "copy"  # the yardstick of bandwidth
BARE = "bare"  # fastkd's loss with nothing behind it
TRAINING = "forward_backward"
# Small calls are timed many at once: to one of 10 us the clock adds its own cost, and the others'
# turns that of what the processor has to fetch anew. The logits of all fit the caches together.
MOST_AT_ONCE = 100
AT_ONCE_BYTES = 2**18
# Logits below this stay in a core's caches and the call's own cost is what is seen: a bandwidth
# would be a number without a meaning.
SMALL_BYTES = 2**20
GPU_SECONDS, DEMO_SECONDS = 2.0, 8.0  # on a GPU runs take milliseconds

T = TypeVar("T")


class _Model(torch.autograd.Function):
    """Stands for the model: its output is no leaf, shares the given memory, and needs a gradient.

    The tensor comes in a list, so that autograd takes the output for a new one and not for a view
    of something that must not be overwritten.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: list[Tensor]) -> Tensor:
        return logits[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None  # never asked for: the step's gradient ends at the logits


def calls_at_once(shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """How many calls are timed as one; on a GPU one, whose launches wait for the flush."""
    if device.type != "cpu":
        return 1
    return max(1, min(MOST_AT_ONCE, AT_ONCE_BYTES // logits_bytes(shape, dtype)))


class Bench:
    """One case on one input: the tensors that all providers share.

    Args:
        calls: how many calls are made at once, each on student's logits of its own.
    """

    def __init__(
        self, case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, calls: int = 1
    ) -> None:
        self.case, self.shape, self.dtype, self.device = case, shape, dtype, device
        self.inputs = case.make_inputs(shape, dtype, device, seed=0)
        self._students = [torch.empty_like(self.inputs.student) for _ in range(calls)]

    def each(self, make: Callable[[int], T]) -> list[T]:
        """What `make` makes of each call's number."""
        return [make(at) for at in range(len(self._students))]

    def fresh(self, gradient: bool, at: int = 0) -> Tensor:
        """The student's logits, written anew as a model would, before each run of each provider.

        An in-place provider has overwritten them. Its gradients are logits too and could be run
        on, but then it alone would be timed on other data (nearly equal logits, in float16 close
        to the smallest numbers). So all get the same logits, equally warm in cache, and the copy
        is outside the timed region.
        """
        self._students[at].copy_(self.inputs.student)
        if not gradient:
            return self._students[at]
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        return _Model.apply(anchor, [self._students[at]])

    def forward(self, call: Call, at: int = 0) -> Callable[[], Tensor]:
        """The loss without a gradient, ready to run."""
        student = self.fresh(gradient=False, at=at)

        def run() -> Tensor:
            with torch.no_grad():
                return call(student, self.inputs.teacher, self.inputs.labels)

        return run

    def training(self, call: Call, at: int = 0) -> Callable[[], tuple[Tensor, Tensor]]:
        """Loss and gradient, ready to run; in place, a second run finds its own gradient."""
        student = self.fresh(gradient=True, at=at)

        def run() -> tuple[Tensor, Tensor]:
            loss = call(student, self.inputs.teacher, self.inputs.labels)
            (grad,) = torch.autograd.grad(loss, student)
            return loss.detach(), grad

        return run

    def copy(self, at: int = 0) -> Callable[[], Tensor]:
        """The yardstick, ready to run: one read and one write of the student's logits."""
        return lambda: self._students[at].copy_(self.inputs.student)

    def overwritten(self) -> bool:
        """Whether the last run changed the student's logits."""
        return not torch.equal(self._students[0], self.inputs.student)


class Judge:
    """The gate on one input: the truth, and what plain torch's own error allows."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.true = bench, gate.truth(bench.case, bench.inputs)
        torchs: gate.Errors | None = None
        try:
            torchs = gate.errors(*bench.training(eager(bench.case, bench.device))(), self.true)
        except (RuntimeError, MemoryError) as error:
            if not gate.out_of_memory(error):
                raise
        self.allowed = gate.bound(torchs, bench.dtype)

    def check(self, provider: LossProvider, call: Call) -> gate.Errors:
        """The provider's errors on this input.

        Raises:
            gate.Wrong: they are too large, or it did what it was not to do.
        """
        loss, grad = self.bench.training(call)()
        if grad.dtype != self.bench.dtype:
            raise gate.Wrong(f"gradient in {grad.dtype}, expected {self.bench.dtype}")
        found = gate.errors(loss, grad, self.true)
        gate.check(found, self.allowed)
        if not provider.inplace and self.bench.overwritten():
            raise gate.Wrong("it changed the student's logits", found, self.allowed)
        return found


def comparison(bench: Bench, names: Sequence[str], with_forward: bool = True) -> Comparison:
    """All providers on one input, and the copy as the last of them."""
    case, shape, dtype, device = bench.case, bench.shape, bench.dtype, bench.device
    clock, judge = Clock(device), [Judge(bench)]

    def ready(provider: LossProvider) -> Ready:
        call = provider.build(case, device)
        found = judge[0].check(provider, call)
        training = partial(bench.training, call)
        samples = {TRAINING: lambda: clock(*bench.each(training))}
        # without a gradient there is nothing to overwrite: the same as new
        if with_forward and not provider.inplace:
            bench.forward(call)()
            forward = partial(bench.forward, call)
            samples = {"forward": lambda: clock(*bench.each(forward)), **samples}
        return Ready(samples, training, found, judge[0].allowed)

    def alone() -> Ready:
        assert isinstance(case, WrittenCase)
        options = {"temperature": case.temperature}
        training = partial(bench.training, lambda s, t, _: case.bare(s, t, **options))
        return Ready({TRAINING: lambda: clock(*bench.each(training))})

    def copied() -> Ready:
        return Ready({TRAINING: lambda: clock(*bench.each(bench.copy))})

    every = [
        Provider(name, partial(ready, PROVIDERS[name]), PROVIDERS[name].ours) for name in names
    ]
    floor = {
        name: case.floor_bytes(shape, dtype, gradient)
        for name, gradient in (("forward", False), ("training", True))
    }
    block = logits_bytes(shape, dtype)
    figures = {"rows": shape.rows, "vocab": shape.vocab, "logits_bytes": block}
    return Comparison(
        *(case.name, case.call, shape.label, spelled(dtype), device),
        [
            *every,
            *([Provider(BARE, alone, ours=True)] if isinstance(case, WrittenCase) else []),
            Provider(COPY, copied, yardstick=True),
        ],
        block,
        checked=judge.clear,
        figures=figures | {"floor_bytes": floor},
    )


def count_bandwidth(results: list[Result]) -> None:
    """Adds what each moves in a second, and its share of what the copy moves."""
    for result in reversed(results):  # the copy is the last one
        moved = result.figures["floor_bytes"]["training"]
        if result.provider == COPY:
            moved = 2 * result.figures["logits_bytes"]
        rate = gb_per_s(moved, result.times.get(TRAINING))
        copied = rate if result.provider == COPY else results[-1].figures["gb_s"]
        share = rate / copied if rate and copied else None
        result.figures |= {"gb_s": rate, "copy_gb_s": copied, "copy_share": share}


class Losses(Family):
    name = "losses"
    about = "losses: every loss against eager torch, torch.compile and Liger-Kernel."
    cases = {case.name: case.call for case in CASES.values()}
    providers = {provider.name: provider.about for provider in PROVIDERS.values()}
    default_providers, toy_providers = DEFAULT_PROVIDERS, TOY_PROVIDERS
    shapes = SHAPE_SETS
    devices = True
    dtypes = DTYPES
    gpu_dtype = "bfloat16"
    seconds = 6.0
    times = ("forward", TRAINING)
    bases = ("eager", "compile", BARE)
    key = "shape"
    legend = f"""\
Each time is the median of interleaved runs, 20-80 % the percentiles of forward_backward; "forward"
is the loss without a gradient. On the CPU a run of small logits is the mean of up to {MOST_AT_ONCE}
calls made one after the other. GB/s counts what no way of computing can avoid,
{len(TRAINING_STREAMS)} streams of logits ({", ".join(TRAINING_STREAMS)}),
over the time of forward_backward; "of copy" is its share of the bandwidth of `dst.copy_(src)` of
the student's logits in the same rounds (read and write counted). "peak extra" is the peak memory
above the inputs. Every provider's loss and gradient were checked against float64 on the same input
before it was timed."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        told = "kl_div on two vocabularies, in a minute"
        parser.add_argument("--demo", action="store_true", help=told)

    def settle(self, parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
        on_gpu = a.device.type != "cpu"
        if a.toy and a.demo:
            parser.error("--demo: not allowed with --toy")
        if a.demo:
            a.cases = a.cases or ["kl_div"]
            a.shapes, a.dtype = a.shapes or list(SHAPE_SETS["cpu"]), a.dtype or [torch.float32]
            a.providers = a.providers or list(DEMO_PROVIDERS)
        if a.seconds is None:
            a.seconds = DEMO_SECONDS if a.demo else GPU_SECONDS if on_gpu else self.seconds

    def comparison(self, one: Input, a: argparse.Namespace) -> Comparison:
        calls = 1 if a.toy else calls_at_once(one.shape, one.dtype, a.device)
        bench = Bench(CASES[one.case], one.shape, one.dtype, a.device, calls)
        return comparison(bench, a.providers, with_forward=not a.demo)

    def finish(self, results: list[Result]) -> None:
        count_bandwidth(results)

    def speedup(self, result: Result, base: Result) -> float | None:
        return None if result.provider == COPY else speedup(result, base, TRAINING)

    def counted(self, result: Result) -> dict[str, str]:
        size, peak = result.figures["logits_bytes"], result.peak_bytes
        row = {"x logits": "-" if peak is None or not size else f"{peak / size:.2f}"}
        if size >= SMALL_BYTES:
            row["GB/s"] = table.number(result.figures["gb_s"])
            row["of copy"] = table.percent(result.figures["copy_share"])
        return row


FAMILY = Losses()
