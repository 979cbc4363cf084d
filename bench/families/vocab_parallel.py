"""What a vocabulary split over processes of this machine costs: the loss forward and backward.

For each divergence, interleaved in the same processes, one thread each:

    whole     one process, all columns; the others wait
    floor     every process the whole loss of its own columns, at the same time and with no group:
              what a split reaches whose exchanges and whose memory cost nothing
    parallel  every process its own columns, with the group (gloo)

and the time over an equal share of the whole one ("ratio"). There is no figure for a parallel loss
whose value or gradient is not the whole one's.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from bench.families.communication import CALL, LIMIT, Count, run_ranks
from bench.families.loss_cases import KINKED
from bench.harness import table
from bench.harness.cli import positive
from bench.harness.family import DTYPES, Family, Input, Shape, spelled
from bench.harness.gate import FLOORS
from bench.harness.result import Group, Result
from bench.harness.timing import Neighbours, Say, TimingPlan, Turn, summarise, take_turns

T = 2.0
CLOSE = 1e-4  # logarithms of probabilities of which nobody knows which is larger
VARIANTS = ("whole", "floor", "parallel")


class Sizes(NamedTuple):
    """Of one run; repeats of each variant, after one that is not timed."""

    ranks: int
    rows: int
    vocab: int
    repeats: int
    dtype: str
    divergences: tuple[str, ...]


def _step(student: Tensor, teacher: Tensor, divergence: str, **more: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the student)."""
    x = student.detach().requires_grad_()
    loss = fastkd.distillation_loss(
        x, teacher, alpha=0.0, temperature=T, divergence=divergence, **more
    )
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def _error(got: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor], ties: Tensor | None) -> float:
    """Of the loss relative to max(1, |loss|), or of the gradient relative to its largest."""
    loss = (got[0].double() - true[0].double()).abs() / true[0].double().abs().clamp_min(1.0)
    top = true[1].abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    apart = (got[1].double() - true[1].double()).abs()
    if ties is not None:
        apart.masked_fill_(ties, 0.0)
    return float(torch.maximum(loss, apart.max() / top if apart.numel() else loss))


def _ties(student: Tensor, teacher: Tensor, mine: slice) -> Tensor:
    """Where the probabilities are so close that their difference may round to either sign.

    The gradient of a KINKED divergence jumps there, by as much as it is: not a matter of precision.
    """
    found = []
    for s, t in zip(student.split(32), teacher.split(32), strict=True):
        logq, logp = (torch.log_softmax(x.double() / T, -1)[:, mine] for x in (s, t))
        found.append((logp - logq).abs() < CLOSE)
    return torch.cat(found)


def _measured(rank: int, world: int, sizes: Sizes) -> dict[str, Any]:
    """Of each divergence on this rank: milliseconds of each variant, error, bytes, collectives."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.rows, sizes.vocab)
    student, teacher = (
        torch.randn(shape, generator=generator).to(DTYPES[sizes.dtype]) for _ in range(2)
    )
    mine = slice(sizes.vocab * rank // world, sizes.vocab * (rank + 1) // world)
    own_s, own_t = student[:, mine].contiguous(), teacher[:, mine].contiguous()
    found = {}
    group = dist.group.WORLD
    for name in sizes.divergences:
        loss, grad = _step(student, teacher, name)
        with Count() as count:
            got = _step(own_s, own_t, name, group=group)
        ties = _ties(student, teacher, mine) if name in KINKED else None
        error = _error(got, (loss, grad[:, mine]), ties)
        del loss, grad, got, ties
        whole = partial(_step, student, teacher, name) if rank == 0 else lambda: None
        own = partial(_step, own_s, own_t, name)
        runs: list[Callable[[], object]] = [whole, own, partial(own, group=group)]
        plan = TimingPlan(0.0, (sizes.repeats, sizes.repeats), warm_up=1)
        times = take_turns([Turn(partial(_sample, run)) for run in runs], plan, lambda text: None)
        found[name] = {"ms": times, "error": error, "bytes": count.bytes, "calls": count.calls}
    return found


def _sample(run: Callable[[], object]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


@functools.cache
def measured(sizes: Sizes) -> tuple[list[dict[str, Any]], float | None]:
    """What each rank has found, and how many cores others used meanwhile."""
    # read by the processes that are about to start: with a new gradient of this size for every call
    # the time would be that of the system's new pages
    os.environ.setdefault("FASTKD_POOL_MB", "2048")
    with Neighbours(torch.device("cpu")) as neighbours:
        found = run_ranks(_measured, sizes.ranks, sizes)
    return found, neighbours.cores


def to_results(
    name: str, ranks: Sequence[dict[str, Any]], sizes: Sizes, others: float | None = None
) -> list[Result]:
    """What the ranks have found of a divergence as results."""
    shape, results = f"{sizes.rows}x{sizes.vocab}", []
    figures = {"ranks": sizes.ranks, "rows": sizes.rows, "vocab": sizes.vocab}
    for at, variant in enumerate(VARIANTS):
        result = Result(name, "", shape, sizes.dtype, variant, ours=variant == "parallel")
        result.figures, result.others_cores = {**figures}, others
        results.append(result)
        # the slowest rank's, repeat by repeat; the whole loss runs on the first one only
        each = [rank["ms"][at] for rank in (ranks[:1] if at == 0 else ranks)]
        samples = [max(of) for of in zip(*each, strict=True)]
        result.samples, result.times = {"step": samples}, {"step": summarise(samples)}
        share = results[0].times["step"].median / sizes.ranks
        result.figures["ratio"] = result.times["step"].median / share if at else None
    parallel = results[-1]
    error = max((rank["error"] for rank in ranks), key=lambda x: (x != x, x))  # NaN is the largest
    parallel.figures |= {
        "largest_error": error,
        "bytes_per_row": max((rank["bytes"] - CALL) / sizes.rows for rank in ranks),
        "collectives": max(rank["calls"] for rank in ranks),
    }
    # such a row takes another mean where a column's sign falls the other way
    if not error <= (CLOSE if name in KINKED else FLOORS[DTYPES[sizes.dtype]]):
        parallel.status, parallel.note = "wrong", f"{error:.1e} off the whole loss's result"
        parallel.times, parallel.samples, parallel.figures["ratio"] = {}, {}, None
    return results


class VocabParallel(Family):
    name = "vocab-parallel"
    about = "vocab-parallel: a vocabulary split over processes beside the whole loss."
    cases = {name: f"divergence={name!r}" for name in fastkd.divergences}
    shapes = {
        "cpu": (Shape(512, 128_256, "the vocabulary of Llama 3"),),
        "toy": (Shape(5, 300, "does it run"),),
    }
    dtypes = DTYPES
    bases = ("whole",)
    key = "divergence"
    legend = """\
Time is the median of interleaved runs of forward and backward, one thread a process, the slowest
rank's; "ratio" is to an equal share of the whole loss's time; "bytes a row" are those that a rank
hands over, and "exchanges" the collectives of a call."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        ranks, repeats = "processes (default: 2)", "runs of each variant (default: 9)"
        parser.add_argument("--ranks", type=positive(int, "ranks"), default=2, help=ranks)
        parser.add_argument("--repeats", type=positive(int, "repeats"), default=9, help=repeats)
        told = "the run fails above this ratio (default: none)"
        parser.add_argument("--limit", type=positive(float, "limit"), help=told)

    def settle(self, parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
        a.repeats = 2 if a.toy else a.repeats
        a.threads = 1

    def heading(self, case: str, dtype: torch.dtype, shape: Any, a: argparse.Namespace) -> str:
        return f"{shape.label} {spelled(dtype)} split over {a.ranks} processes"

    def inputs(self, a: argparse.Namespace) -> Iterator[Input]:
        yield from sorted(super().inputs(a), key=lambda one: one.heading)  # a table of all cases

    def measure(self, one: Input, a: argparse.Namespace, say: Say) -> list[Result]:
        say("all divergences")
        sizes = Sizes(
            *(a.ranks, one.shape.rows, one.shape.vocab, a.repeats),
            *(spelled(one.dtype), tuple(a.cases)),
        )
        ranks, others = measured(sizes)
        return to_results(one.case, [rank[one.case] for rank in ranks], sizes, others)

    def counted(self, result: Result) -> dict[str, str]:
        at = result.figures
        row = {"ratio": table.number(at["ratio"])}
        if "bytes_per_row" in at:
            row["bytes a row"] = f"{at['bytes_per_row']:.0f}"
            row["exchanges"] = str(at["collectives"])
        return row

    def complaints(self, groups: Sequence[Group], a: argparse.Namespace) -> list[str]:
        found = []
        for one in (one for group in groups for one in group):
            moved, ratio = one.figures.get("bytes_per_row", 0), one.figures["ratio"]
            if moved > LIMIT:
                found.append(f"{one.case}: {moved:.0f} bytes a row, above {LIMIT:g}")
            slow = one.ours and ratio is not None and a.limit is not None
            if slow and ratio > a.limit:
                found.append(f"{one.case}: ratio {ratio:.2f}, above {a.limit:g}")
        return found


FAMILY = VocabParallel()
