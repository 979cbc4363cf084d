"""Measuring one case on one input: check, count memory, then time all providers in turn.

Providers are interleaved (A B C A B C ...) so that a drifting clock or a busy neighbour meets all
of them alike. A copy of the student's logits is one of them: the others' share of the bandwidth
refers to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench import gate
from bench.cases import Case, Shape, logits_bytes
from bench.providers import PROVIDERS, Call, Provider, Unavailable, eager, first_line
from bench.result import COPY, Result
from bench.timing import Clock, Neighbours, Summary, no_collection, summarise
from fastkd.demo.memory import peak_extra

MIN_ROUNDS, MAX_ROUNDS = 5, 1000
# Small calls are timed many at once: to one of 10 us the clock adds its own cost, and the others'
# turns that of what the processor has to fetch anew. The logits of all fit the caches together.
MOST_AT_ONCE = 100
AT_ONCE_BYTES = 2**18
WARM_UP_ROUNDS = 1  # on top of the gate and the memory count, which ran everything twice

Say = Callable[[str], None]
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
        self,
        case: Case,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        calls: int = 1,
    ) -> None:
        self.case, self.shape, self.dtype, self.device = case, shape, dtype, device
        self.inputs = case.make_inputs(shape, dtype, device, seed)
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

    def training(
        self, call: Call, at: int = 0, upstream: float = 1.0
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Loss and gradient, ready to run."""
        student = self.fresh(gradient=True, at=at)
        given = self.grad_output(upstream)

        def run() -> tuple[Tensor, Tensor]:
            loss = call(student, self.inputs.teacher, self.inputs.labels)
            (grad,) = torch.autograd.grad(loss, student, given)
            return loss.detach(), grad

        return run

    def grad_output(self, upstream: float) -> Tensor | None:
        """As a tensor, which autograd casts to the loss's dtype; None for torch's own, 1."""
        if upstream == 1.0:
            return None
        return torch.full((), upstream, device=self.device)

    def copy(self, at: int = 0) -> Callable[[], Tensor]:
        """The yardstick, ready to run: one read and one write of the student's logits."""
        return lambda: self._students[at].copy_(self.inputs.student)

    def overwritten(self) -> bool:
        """Whether the last run changed the student's logits."""
        return not torch.equal(self._students[0], self.inputs.student)

    def result(self, provider: str) -> Result:
        """An empty result."""
        case, shape, dtype = self.case, self.shape, self.dtype
        return Result(
            case=case.name,
            call=case.call,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            provider=provider,
            logits_bytes=logits_bytes(shape, dtype),
            forward_floor=case.floor_bytes(shape, dtype, gradient=False),
            training_floor=case.floor_bytes(shape, dtype, gradient=True),
        )


@dataclass
class Plan:
    """How long and what to time.

    Args:
        providers: names, in the order of the table.
        seconds: time budget of the timed rounds of one case on one input.
        rounds: (least, most) number of rounds.
        with_forward: also time the loss without a gradient.
        at_once: time small calls many at once.
    """

    providers: Sequence[str]
    seconds: float = 5.0
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS)
    with_forward: bool = True
    warm_up: int = WARM_UP_ROUNDS
    seed: int = 0
    at_once: bool = True


def measure(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, plan: Plan, say: Say
) -> list[Result]:
    """All providers of the plan on one input, and the copy as the last result.

    Raises:
        torch.OutOfMemoryError, RuntimeError: where not even the inputs and the truth find room.
    """
    torch.compiler.reset()  # one compiled shape at a time: its limit of versions is per function
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()  # leftovers of another shape's sizes
    calls = calls_at_once(shape, dtype, device) if plan.at_once else 1
    bench = Bench(case, shape, dtype, device, plan.seed, calls)
    checked = list(_check(bench, plan, say))
    runnable = [(result, call) for result, call in checked if call is not None]
    for result, call in runnable:
        say(f"memory of {result.provider}")
        result.peak_bytes = _peak(bench, call, PROVIDERS[result.provider].upstream)
    copy = bench.result(COPY)
    with Neighbours(device) as neighbours:
        copy.training = _time(bench, runnable, plan, say)
    results = [*(result for result, _ in checked), copy]
    for result in results:
        result.copy_gb_s, result.others_cores = copy.gb_s, neighbours.cores
    return results


def _check(bench: Bench, plan: Plan, say: Say) -> Iterator[tuple[Result, Call | None]]:
    """Each provider's result, with its callable if it runs here and is right on this input."""
    say("float64 truth")
    true = gate.truth(bench.case, bench.inputs)
    torchs: gate.Errors | None = None
    try:
        torchs = gate.errors(*bench.training(eager(bench.case, bench.device))(), true)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    allowed = gate.bound(torchs, bench.dtype)
    for name in plan.providers:
        say(f"checking {name}")
        provider = PROVIDERS[name]
        result = bench.result(name)
        result.ours = provider.ours
        call: Call | None = None
        try:
            call = provider.build(bench.case, bench.device)
            _judge(bench, provider, call, true, allowed, result)
            if plan.with_forward and result.status == "ok":
                bench.forward(call)()
        except Unavailable as reason:
            result.status, result.note = "skipped", str(reason)
        except Exception as error:  # whatever a provider raises is its result, not ours
            told = provider.ours and not out_of_memory(error)
            result.status, result.note = ("failed" if told else "skipped"), first_line(error)
        yield result, call if result.status == "ok" else None


def _judge(
    bench: Bench,
    provider: Provider,
    call: Call,
    true: gate.Truth,
    allowed: gate.Errors,
    result: Result,
) -> None:
    """Runs the provider on this input and sets its errors, and its status if it is wrong."""
    loss, grad = bench.training(call, upstream=provider.upstream)()
    if grad.dtype != bench.dtype:
        result.status = "wrong"
        result.note = f"gradient in {grad.dtype}, expected {bench.dtype}"
        return
    grad = grad if provider.upstream == 1.0 else grad / provider.upstream
    result.errors, result.bound = gate.errors(loss, grad, true), allowed
    if not result.errors.within(allowed):
        result.status = "wrong"
        result.note = (
            f"error of the loss {result.errors.loss:.2e} (allowed {allowed.loss:.2e}), "
            f"of the gradient {result.errors.grad:.2e} (allowed {allowed.grad:.2e})"
        )
    elif not provider.inplace and bench.overwritten():
        result.status, result.note = "wrong", "it changed the student's logits"


def _peak(bench: Bench, call: Call, upstream: float) -> int:
    """Peak extra memory of a training step, its fresh logits made outside of what is counted."""
    student, given = bench.fresh(gradient=True), bench.grad_output(upstream)

    def step() -> object:
        # an in-place second run finds its own gradient: the same work, and no value is looked at
        loss = call(student, bench.inputs.teacher, bench.inputs.labels)
        return torch.autograd.grad(loss, student, given)

    return peak_extra(step, bench.device, logits_bytes(bench.shape, bench.dtype))


def _time(bench: Bench, runnable: list[tuple[Result, Call]], plan: Plan, say: Say) -> Summary:
    """Times everyone in turn, fills the results, returns the copy's summary."""
    clock = Clock(bench.device)
    forward: dict[str, list[float]] = {result.provider: [] for result, _ in runnable}
    training: dict[str, list[float]] = {result.provider: [] for result, _ in runnable}
    copies: list[float] = []
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
            copied = clock(*bench.each(bench.copy))
            if number >= 0:
                copies.append(copied)
            for result, call in runnable:
                provider = PROVIDERS[result.provider]
                # without a gradient there is nothing to overwrite or scale: the same as new
                plain = not provider.inplace and provider.upstream == 1.0
                if plan.with_forward and plain:
                    elapsed = clock(*bench.each(partial(bench.forward, call)))
                    if number >= 0:
                        forward[result.provider].append(elapsed)
                training_run = partial(bench.training, call, upstream=provider.upstream)
                elapsed = clock(*bench.each(training_run))
                if number >= 0:
                    training[result.provider].append(elapsed)
    for result, _ in runnable:
        result.training = summarise(training[result.provider])
        if forward[result.provider]:
            result.forward = summarise(forward[result.provider])
    return summarise(copies)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
