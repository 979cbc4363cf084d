"""What the trainer adds to the bare loop that it replaces.

Both train one student beside one teacher on the same batches, from the same weights: the loop
written out (teacher without gradient, loss, backward, AdamW, the loss as a number), and
`fastkd.distill.train`. They are timed in turns, a run of four epochs each, the one that goes first
changing from pair to pair; a pair's overhead is the ratio of its two times, and its median over
pairs is what counts. The two must end in the same weights, bit by bit.

    python -m bench.trainer --seconds 20 --json trainer.json

Exit status: 0, or 1 where the overhead is above --limit in a case that counts.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastkd
from bench.timing import no_collection, percentile, summarise
from fastkd import distill

LIMIT = 0.03  # of the bare loop's time
LR = 1e-3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
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


CASES = [
    Case("digits", (64, 1200, 1200, 10), (64, 16, 10), 100, 10, True, "the recipe's own sizes"),
    Case("tutorial", (784, 1200, 1200, 10), (784, 400, 10), 128, 10, True, "the classic example's"),
    Case("tiny", (64, 16, 10), (64, 16, 10), 8, 50, False, "nothing but overhead: for the record"),
]


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


def measure(case: Case, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Median milliseconds of a run both ways, and the overhead's median and percentiles."""
    torch.manual_seed(0)
    classes = case.student[-1]
    loader = [
        (torch.randn(case.rows, case.student[0]), torch.randint(0, classes, (case.rows,)))
        for _ in range(case.batches)
    ]
    teacher, first = mlp(case.teacher), mlp(case.student)
    sides: list[tuple[Callable[[], list[float]], nn.Module]] = []
    for run in (bare, ours):
        student = copy.deepcopy(first)
        optimizer = torch.optim.AdamW(student.parameters(), lr=LR)

        def epochs(
            run: Any = run, student: Any = student, optimizer: Any = optimizer
        ) -> list[float]:
            return run(student, teacher, loader, optimizer)

        sides.append((epochs, student))

    times: list[list[float]] = [[], []]
    ends = time.perf_counter() + seconds
    with no_collection():
        for pair in range(1_000_000):
            if pair >= 12 and time.perf_counter() > ends:
                break
            losses: list[list[float]] = [[], []]
            for side in (0, 1) if pair % 2 else (1, 0):
                start = clock()
                losses[side] = sides[side][0]()
                times[side].append((clock() - start) * 1e3)
            if losses[0] != losses[1]:
                raise SystemExit(f"{case.name}: the losses differ: {losses}")
    for a, b in zip(sides[0][1].parameters(), sides[1][1].parameters(), strict=True):
        if not torch.equal(a, b):
            raise SystemExit(f"{case.name}: the two loops end in different weights")
    times = [side[2:] for side in times]  # the first pairs warm up
    ratios = [b / a - 1 for a, b in zip(*times, strict=True)]
    return {
        "case": case.name,
        "why": case.reason,
        "counts": case.counts,
        "steps": EPOCHS * case.batches,
        "bare_ms": summarise(times[0]).median,
        "trainer_ms": summarise(times[1]).median,
        "overhead": percentile(ratios, 0.5),
        "overhead_p20": percentile(ratios, 0.2),
        "overhead_p80": percentile(ratios, 0.8),
        "pairs": len(ratios),
    }


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal: milliseconds of a run, overhead of its median pair."""
    head = f"{'case':10}{'bare ms':>10}{'trainer ms':>12}{'overhead':>10}{'p20 .. p80':>20}"
    lines = [head + f"{'us a step':>11}{'pairs':>7}"]
    for row in rows:
        line = f"{row['case']:10}{row['bare_ms']:10.2f}{row['trainer_ms']:12.2f}"
        line += f"{row['overhead']:10.1%}{row['overhead_p20']:10.1%} .. {row['overhead_p80']:6.1%}"
        added = row["overhead"] * row["bare_ms"] / row["steps"] * 1e3
        lines.append(line + f"{added:11.1f}{row['pairs']:7}  {row['why']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it as JSON where asked."""
    parser = argparse.ArgumentParser("python -m bench.trainer", description=__doc__.split("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("--cases", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case (default 10)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: of this process, where others want the cores (default wall)",
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"default {LIMIT}")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(argv)
    wanted = options.cases.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"--cases: got {sorted(unknown)}, expected some of {names}")
    torch.set_num_threads(options.threads)
    rows = [
        measure(case, options.seconds, CLOCKS[options.clock])
        for case in CASES
        if case.name in wanted
    ]
    print(as_text(rows))
    if options.json is not None:
        text = json.dumps(
            {
                "torch": torch.__version__,
                "limit": options.limit,
                "clock": options.clock,
                "cases": rows,
            }
        )
        options.json.write_text(text + "\n", encoding="utf-8")
    over = [row for row in rows if row["counts"] and row["overhead"] > options.limit]
    for row in over:
        print(f"{row['case']}: {row['overhead']:.1%} is above the limit of {options.limit:.0%}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
