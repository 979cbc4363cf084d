"""What a kernel may cost in arithmetic, per column in all its tile loops; what is a problem.

At the floor an H200 moves 0.8e12 columns of bfloat16 a second (3 streams at the data sheet's
bandwidth), and has time for 5.2 special-function operations and 41.8 instructions of each. float32
has twice the bytes, hence twice the time. A kernel within both is bound by memory; one beyond
reaches at most the share of the floor that `share` says, however well its reads hit.

The budgets are ceilings against growth, of bfloat16. Only the KL pair without labels is within the
GPU's own. Hard labels at T != 1 cost two exponentials more, of the student at T = 1; js and the
skew pair a logarithm or a reciprocal and two exponentials of each column in each of two tile loops;
tv both sides' exponentials in all three.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.aot.cases import DTYPES, ODD, WHOLE
from bench.aot.read import Report, TileLoop

STREAMS = 3
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


class GPU(NamedTuple):
    """A GPU: the H200 by its data sheet; of others clock and `copy` are estimates of what lasts."""

    processors: int
    clock: float  # Hz
    copy: float  # bytes/s of memory
    special: int  # exp2, log2 or reciprocals a clock of one processor
    lanes: int  # instructions of one thread a clock of one processor


# the clock is that of 67 TFLOPS of float32: two operations of each of 132 x 128 lanes
H200 = GPU(132, 1.98e9, 4.8e12, 16, 128)
GPUS = {
    "sm_90": H200,
    "sm_80": GPU(108, 1.41e9, 1.75e12, 16, 128),  # A100
    "sm_100": GPU(148, 1.85e9, 7.0e12, 16, 128),  # B200
    "gfx942": GPU(304, 2.1e9, 4.2e12, 16, 64),  # MI300X
}


class Budget(NamedTuple):
    special: float
    instructions: float


# of a divergence alone, by the kernels of a whole row
BUDGETS = {
    "kl": Budget(5.2, 41),
    "reverse_kl": Budget(5.2, 41),
    "js": Budget(8.4, 65),
    "skew_kl": Budget(9.4, 65),
    "skew_reverse_kl": Budget(10.4, 64),
    "tv": Budget(6.5, 57),
    "acceptance": Budget(6.5, 55),
}
# what hard labels at T != 1 add, and smoothing on top of it
HARD, SMOOTH = Budget(2.3, 14), Budget(0, 6)

# kernels that merge the partials of a row: numbers, one by one; columns only where a row's loss has
# overflowed
MERGES = frozenset({"split_finish"})


def budget(report: Report) -> Budget | None:
    """The budget of a report; None where nothing is promised."""
    known = BUDGETS.get(report.divergence)
    cuda = report.target.startswith("sm_")
    if report.kernel not in WHOLE or known is None or report.dtype not in DTYPES or not cuda:
        return None
    if report.vocab == ODD:
        return None  # narrow loads are counted, too
    parts = [known, *([HARD] if report.hard else []), *([SMOOTH] if report.smooth else [])]
    factor = ITEMSIZE[report.dtype] / 2
    special, instructions = (sum(part[i] for part in parts) * factor for i in (0, 1))
    return Budget(special, instructions)


def usual(report: Report) -> list[TileLoop]:
    """The tile loops of an ordinary row.

    Between the loop of the sums and that of the gradient a divergence that is an expectation has
    one more, for rows whose loss is infinite or NaN after the first.
    """
    from fastkd.divergence import divergences

    entry = divergences[report.divergence] if report.divergence != "-" else None
    if report.kernel not in WHOLE or entry is None or not entry.expectation:
        return report.loops
    return report.loops[:1] + [loop for loop in report.loops[1:] if loop.writes]


def total(report: Report) -> Budget:
    """Special-function operations and instructions of an ordinary row's column."""
    loops = usual(report)
    special = sum(loop.special for loop in loops)
    return Budget(round(special, 2), round(sum(loop.instructions for loop in loops), 1))


def share(report: Report) -> float | None:
    """The most of the floor's speed that the counts allow the main kernel on its target's GPU."""
    gpu, itemsize = GPUS.get(report.target), ITEMSIZE[report.dtype]
    if report.kernel not in WHOLE or gpu is None or itemsize > 4:
        return None
    spent, a_second = total(report), gpu.processors * gpu.clock
    worst = max(spent.special / gpu.special, spent.instructions / gpu.lanes) / a_second
    floor = STREAMS * itemsize / gpu.copy
    return round(min(1.0, floor / worst), 2) if worst else None


def judge(report: Report) -> None:
    """Fills in the share and the problems."""
    say = report.problems.append
    report.share = share(report)
    if report.spills:
        say(f"spills: {report.spills}")
    if report.calls:
        say(f"calls: {report.calls}")
    merges = report.kernel in MERGES
    if report.rows and not (merges and not report.loops):
        if report.bytes < 16 and report.vocab != ODD:
            say(f"an access of {report.bytes} bytes in a loop over an aligned row")
        if not report.loops:
            say("no loop that reads a row was found")
    if report.narrow > 2 * report.pointers and report.vocab != ODD and not merges:
        say(f"{report.narrow} narrow accesses for {report.pointers} pointers")
    allowed, spent = budget(report), total(report)
    if allowed is not None:
        for what, limit, found in zip(Budget._fields, allowed, spent, strict=True):
            if found > limit:
                say(f"{what}: {found:g} a column, over the budget of {limit:g}")
