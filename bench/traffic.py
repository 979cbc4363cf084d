"""A model of the memory traffic of the row kernels. Nothing it prints is a measurement.

python -m bench.traffic [--json FILE]: bytes per element, milliseconds and the share of the floor
that are predicted for N = 8192 rows on cards known by their data sheets (`bench.cards`; the copy's
bandwidth is an estimate), from registers and instruction counts of ahead-of-time compilation.

A kernel is a list of sweeps over its row. What a sweep reads for the first time comes from memory.
A sweep that follows another runs in the opposite order and finds what was read last, as much as
the cache holds of it: `KEPT` of the cache, shared among the rows in flight (one for each resident
program, or for each team of them: backends/gpu/cooperative.py). The gradient is written once. Time
is the longer of these bytes at the copy's bandwidth and the arithmetic at the card's rates; a last,
partial wave of rows is not modelled, nor is waiting: "waits" says what share of a program's time
the others must fill while it merges what its lanes or its team have found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bench.cards import CARDS, Card

ROWS = 8192
VOCABS = (32_000, 50_257, 128_256, 151_936, 256_000)
ALIGNED = 16  # columns: what makes every row start where a wide load may
_OF_EACH = {True: 128_256, False: 50_257}
ITEMSIZE = {"bf16": 2, "fp32": 4}
# Share of the cache that holds the rows in flight: the gradient's stores pass through it, too, and
# a Hopper's two halves each keep a copy of what the other half's multiprocessors read. A guess, and
# `fastkd.backends.gpu.cooperative` has the same, by which it divides rows.
KEPT = 0.75
# Seconds that a program spends between two sweeps of its own: sums across its lanes, and where it
# is one of a team a number's way through the cache and back. Guesses.
MERGE, EXCHANGE = 0.5e-6, 1.5e-6


class Scheme(NamedTuple):
    """A way to compute a loss and its gradient.

    sweeps: matrices read by each sweep over a row, a tuple for each launch: what one launch has
        read is not in the cache any more when the next comes back to its first row.
    writes: matrices written.
    floor: matrices that must be moved whatever the way.
    """

    sweeps: tuple[tuple[int, ...], ...]
    writes: int
    floor: int


SCHEMES = {
    # student and teacher; the gradient's sweep reads both again
    "kl": Scheme(((2, 2),), 1, 3),
    # a sweep more: the slopes' sum needs both log-sum-exps
    "js": Scheme(((2, 2, 2),), 1, 3),
    # the backward pass computes the gradient anew, and nothing N x V is kept
    "kl, recomputed": Scheme(((2,), (2,)), 1, 3),
    # a chunk of rows whose logits two matmuls write and two read; those matmuls' time is not here
    "kl, linear": Scheme(((2, 2), (1,), (1,)), 3, 7),
    # the student alone, against k named columns
    "top-k": Scheme(((1, 1),), 1, 2),
}


class Program(NamedTuple):
    """What ahead-of-time compilation says of a kernel, summed over an ordinary row's sweeps."""

    registers: int
    threads: int
    special: float  # operations per column
    instructions: float  # per column
    ctas: int = 1
    parts: int = 1  # of a row, each a program's


@dataclass
class Prediction:
    """One kernel on one card and vocabulary: the model's figures, none of them measured."""

    card: str
    scheme: str
    dtype: str
    vocab: int
    rows_in_flight: int
    hits: float  # share of a later sweep's reads that the cache serves
    bytes: float  # per element
    floor_bytes: float
    ms: float
    bound: str  # "memory", "special functions" or "instructions"
    share: float  # of the floor
    parts: int
    waits: float  # share of a program's time
    measured: bool = False


def hits(card: Card, rows_in_flight: int, row_bytes: int) -> float:
    """The share of a row that is still in the cache when the next sweep turns back."""
    return min(1.0, KEPT * card.cache / (rows_in_flight * row_bytes))


def traffic(scheme: Scheme, found: float, itemsize: int) -> float:
    """Bytes of memory per element; found: the share of later sweeps that the cache serves."""
    read = sum(launch[0] + (1.0 - found) * sum(launch[1:]) for launch in scheme.sweeps)
    return itemsize * (read + scheme.writes)


def predict(
    card: Card, name: str, program: Program, vocab: int, dtype: str, rows: int = ROWS
) -> Prediction:
    """The model's figures of one kernel."""
    scheme, itemsize = SCHEMES[name], ITEMSIZE[dtype]
    resident = card.resident(program.registers, program.threads)
    at_work = resident * card.multiprocessors // program.ctas
    in_flight = min(rows, max(1, at_work // program.parts))
    found = hits(card, in_flight, scheme.sweeps[0][0] * vocab * itemsize)
    moved, floor = traffic(scheme, found, itemsize), itemsize * scheme.floor
    seconds = {
        "memory": moved / card.copy,
        "special functions": program.special * card.per_special,
        "instructions": program.instructions * card.per_instruction,
    }
    bound = max(seconds, key=lambda limit: seconds[limit])
    merges = sum(len(launch) for launch in scheme.sweeps) - 1
    pause = merges * (MERGE + (EXCHANGE if program.parts > 1 else 0.0))
    return Prediction(
        card=card.name,
        scheme=name,
        dtype=dtype,
        vocab=vocab,
        rows_in_flight=in_flight,
        hits=found,
        bytes=moved,
        floor_bytes=floor,
        ms=1e3 * rows * vocab * seconds[bound],
        bound=bound,
        share=floor / card.copy / seconds[bound],
        parts=program.parts,
        waits=min(1.0, pause / (in_flight * vocab * seconds[bound])),
    )


def programs(card: Card, dtype: str, vocab: int) -> dict[str, Program]:
    """Each scheme's program by ahead-of-time compilation for the card and such rows."""
    from bench.aot.budget import total
    from bench.aot.cases import Case
    from bench.aot.read import compile_one

    def of(divergence: str, *kernels: str) -> Program:
        own = {"stats": "-"}
        reports = [
            compile_one(
                Case(kernel, own.get(kernel, divergence), dtype, card.arch, vocab, hard=False)
            )
            for kernel in kernels
        ]
        sums = [total(report) for report in reports]
        return Program(
            max(report.registers for report in reports),
            reports[0].threads,
            sum(spent.special for spent in sums),
            sum(spent.instructions for spent in sums),
            reports[0].ctas,
        )

    kl = of("kl", "fused")
    found = {
        "kl": kl,
        "kl, linear": kl,
        "js": of("js", "fused"),
        # without its gradient the main kernel sweeps as two stats kernels do
        "kl, recomputed": of("kl", "grad", "stats", "stats"),
        # the report sees the loop of its gradient only: the other one has loops inside
        "top-k": of("kl", "topk", "stats"),
    }
    if card.warp == 32:  # as `fastkd.backends.gpu.cooperative.capacity` has it
        found |= {"kl, team": of("kl", "cooperative"), "js, team": of("js", "cooperative")}
        found["kl, linear, team"] = found["kl, team"]
    return found


def shared(card: Card, vocab: int, dtype: str, rows: int = ROWS) -> int:
    """How many programs share a row where teams are to be had."""
    from fastkd.backends.gpu import cooperative
    from fastkd.backends.gpu.tune import OF_PROCESSOR, registers, tile

    size = tile(vocab, ITEMSIZE[dtype], card.arch)
    most = registers(card.arch, size.threads, vocab % ALIGNED == 0)
    assert most is not None, f"{card.arch} has no teams"
    resident = OF_PROCESSOR // (most * size.threads)
    holds = cooperative.Capacity(card.multiprocessors, card.cache)
    row_bytes = 2 * vocab * ITEMSIZE[dtype]
    return cooperative.programs_per_row(
        rows, vocab, row_bytes, size.lanes * size.group, resident, holds
    )


def predictions(cards: Sequence[str], dtypes: Sequence[str]) -> list[Prediction]:
    """Everything, compiled anew: once for aligned rows, once for those that are not."""
    out: list[Prediction] = []
    for card in (CARDS[name] for name in cards):
        for dtype in dtypes:
            compiled = {aligned: programs(card, dtype, v) for aligned, v in _OF_EACH.items()}
            for scheme in SCHEMES:
                for vocab in VOCABS:
                    found = compiled[vocab % ALIGNED == 0]
                    program = found[scheme]
                    if together := found.get(f"{scheme}, team"):
                        parts = shared(card, vocab, dtype)
                        program = together._replace(parts=parts) if parts > 1 else program
                    out.append(predict(card, scheme, program, vocab, dtype))
    return out


def markdown(found: Sequence[Prediction]) -> str:
    from bench.report import table

    lines = [
        "A MODEL, not a measurement: data-sheet figures, an estimated copy bandwidth, "
        f"{KEPT:.0%} of the cache for the rows in flight, N = {ROWS}.",
        "",
    ]
    rows = [
        {
            "card": p.card,
            "kernel": p.scheme,
            "dtype": p.dtype,
            "V": str(p.vocab),
            "programs a row": str(p.parts),
            "rows in flight": str(p.rows_in_flight),
            "cache hits": f"{100 * p.hits:.0f} %",
            "bytes/element": f"{p.bytes:.1f}",
            "floor": f"{p.floor_bytes:.0f}",
            "predicted ms": f"{p.ms:.2f}",
            "waits": f"{100 * p.waits:.0f} %",
            "bound by": p.bound,
            "predicted share of floor": f"{100 * p.share:.0f} %",
        }
        for p in found
    ]
    return "\n".join([*lines, *table(rows, left=("card", "kernel", "dtype", "bound by"))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("--cards", default="H200", help=",".join(CARDS))
    parser.add_argument("--dtypes", default="bf16", help=",".join(ITEMSIZE))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    given = parser.parse_args(argv)
    cards, dtypes = given.cards.split(","), given.dtypes.split(",")
    for names, known, what in ((cards, CARDS, "cards"), (dtypes, ITEMSIZE, "dtypes")):
        for name in names:
            if name not in known:
                parser.error(f"{what}: got {name!r}, expected one of {', '.join(known)}")
    found = predictions(cards, dtypes)
    print(markdown(found))
    if given.json is not None:
        document = {
            "model": True,
            "measured": False,
            "cards": {name: CARDS[name]._asdict() for name in cards},
            "predictions": [asdict(p) for p in found],
        }
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
