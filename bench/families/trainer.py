"""What the trainer adds to the bare loop that it replaces.

Both train one student beside one teacher on the same batches, from the same weights: the loop
written out (teacher without gradient, loss, backward, AdamW, the loss as a number), and
`fastkd.distill.train`. A run is four epochs; a pair's overhead is the ratio of its two times, and
the median over pairs is what counts. The two must end in the same weights, bit by bit.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastkd
from bench.harness import table
from bench.harness.family import Family, Input
from bench.harness.gate import Wrong
from bench.harness.measure import Comparison, Provider, Ready
from bench.harness.result import Group, Result, overhead
from bench.harness.timing import CLOCKS
from fastkd import distill

LIMIT = 0.03  # of the bare loop's time
LR = 1e-3
EPOCHS = 4  # of a run; a call of the trainer costs a quarter of a millisecond itself


class Case(NamedTuple):
    """Sizes of the two MLPs and the batches; `counts` where the limit holds."""

    name: str
    teacher: tuple[int, ...]
    student: tuple[int, ...]
    rows: int
    batches: int
    counts: bool
    reason: str


CASES = {
    case.name: case
    for case in (
        Case("digits", (64, 1200, 1200, 10), (64, 16, 10), 100, 10, True, "the recipe's own sizes"),
        Case(
            "tutorial",
            (784, 1200, 1200, 10),
            (784, 400, 10),
            128,
            10,
            True,
            "the classic example's",
        ),
        Case(
            "tiny", (64, 16, 10), (64, 16, 10), 8, 50, False, "nothing but overhead: for the record"
        ),
    )
}


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return fastkd.distillation_loss(student, teacher, labels, temperature=4.0)


def bare(
    student: nn.Module,
    teacher: nn.Module,
    loader: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """The epochs written out."""
    losses = []
    for _ in range(EPOCHS):
        student.train()
        teacher.eval()
        for inputs, labels in loader:
            with torch.no_grad():
                soft = teacher(inputs)
            value = loss(student(inputs), soft, labels)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return losses


def ours(
    student: nn.Module,
    teacher: nn.Module,
    loader: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """The same epochs by the trainer."""
    options: dict[str, Any] = {"epochs": EPOCHS, "progress": False}
    steps = distill.train(student, loader, loss, teacher=teacher, optimizer=optimizer, **options)
    return [step.loss for step in steps]


def comparison(case: Case, clock: Callable[[], float]) -> Comparison:
    """The bare loop and the trainer on the same data."""
    torch.manual_seed(0)
    classes = case.student[-1]
    loader = [
        (torch.randn(case.rows, case.student[0]), torch.randint(0, classes, (case.rows,)))
        for _ in range(case.batches)
    ]
    teacher, first = mlp(case.teacher), mlp(case.student)
    losses: dict[str, list[list[float]]] = {"bare": [], "trainer": []}
    students: dict[str, nn.Module] = {}

    def ready(name: str, run: Callable[..., list[float]], verify: Any = None) -> Ready:
        student = students[name] = copy.deepcopy(first)
        optimizer = torch.optim.AdamW(student.parameters(), lr=LR)

        def sample() -> float:
            start = clock()
            found = run(student, teacher, loader, optimizer)
            elapsed = (clock() - start) * 1e3
            losses[name].append(found)
            return elapsed

        return Ready({"run": sample}, verify=verify)

    def verify() -> None:
        if losses["bare"] != losses["trainer"]:
            at = next(a for a in zip(*losses.values(), strict=True) if a[0] != a[1])
            raise Wrong(f"the losses differ: {at}")
        weights = (student.parameters() for student in students.values())
        if not all(torch.equal(a, b) for a, b in zip(*weights, strict=True)):
            raise Wrong("the two loops end in different weights")

    providers = [
        Provider("bare", lambda: ready("bare", bare)),
        Provider("trainer", lambda: ready("trainer", ours, verify), ours=True),
    ]
    figures = {"counts": case.counts, "steps": EPOCHS * case.batches}
    device, about = torch.device("cpu"), case.reason
    return Comparison(
        *(case.name, about, case.name, "float32", device),
        providers,
        alternate=True,
        figures=figures,
    )


def add_overhead(results: list[Result], what: str) -> None:
    """Adds the overhead of the second provider over the first, where both have run."""
    base, ours = results[:2]
    if what in base.samples and what in ours.samples:
        ours.figures |= overhead(ours, base, what)


def overhead_cells(result: Result) -> dict[str, str]:
    """The overhead's columns."""
    at, name = result.figures, "overhead"
    if name not in at:
        return {}
    low, high = (table.percent(at[f"{name}_{end}"], 1) for end in ("p20", "p80"))
    return {name: table.percent(at[name], 1), "p20 .. p80": f"{low} .. {high}"} | {
        "pairs": str(at["pairs"])
    }


def too_slow(groups: Sequence[Group], limit: float) -> list[str]:
    """The cases that count and whose overhead is above the limit."""
    return [
        f"{one.case}: {one.figures['overhead']:.1%} is above the limit of {limit:.0%}"
        for group in groups
        for one in group
        if one.figures["counts"] and one.figures.get("overhead", limit) > limit
    ]


class Trainer(Family):
    name = "trainer"
    about = "trainer: what `distill.train` adds to the bare loop that it replaces."
    cases = {case.name: case.reason for case in CASES.values()}
    toy_cases = ("tiny",)
    clocks = True
    limit = LIMIT
    threads = 1
    rounds = (10, 1_000_000)
    warm_up = 2
    times = ("run",)
    legend = f"""\
Time is the median of interleaved runs of {EPOCHS} epochs; the overhead is the median over pairs of
runs. The losses and the final weights of the two loops are equal, bit by bit."""

    def comparison(self, one: Input, a: argparse.Namespace) -> Comparison:
        return comparison(CASES[one.case], CLOCKS[a.clock])

    def finish(self, results: list[Result]) -> None:
        add_overhead(results, "run")

    def counted(self, result: Result) -> dict[str, str]:
        cells = overhead_cells(result)
        if cells and "run" in result.times:
            whole = result.times["run"].median
            share = result.figures["overhead"] / (1 + result.figures["overhead"])
            cells["us a step"] = table.number(1e3 * whole * share / result.figures["steps"])
        return cells

    def complaints(self, groups: Sequence[Group], a: argparse.Namespace) -> list[str]:
        return too_slow(groups, a.limit)


FAMILY = Trainer()
