"""What the kernels' PTX does on a row, counted: instructions, sectors, bytes. No GPU is needed.

`python -m bench.ptx` executes kernels on two rows, as `tests/ptx` does, and prints per column

    instructions   PTX instructions of a thread; ptxas may fuse some and add others
    special        of them exponentials, logarithms and reciprocals
    read, write    sectors of 32 bytes that a request of a warp takes: 16 where every lane moves 16
                   bytes, 4 for 4 bytes of neighbouring lanes, up to 32 where lanes lie apart
    bytes          moved between the processor and the L2 cache, as sectors
    floor          the bytes of the sectors that are touched at all: what memory must deliver once
    loops          the bytes that the first loop over a row reads, the second, ...: without a cache,
                   memory delivers all of them
    least          bytes over the fewest that these loops can move
    share          of the H200's memory floor, what the issue of instructions leaves at most
    by special     and the special-function units: see `bench.aot.budget`

`--table` counts the loss with its gradient, every divergence, bf16 and fp32, rows on and off a
16-byte boundary, with labels and T = 2 and without, and writes ptx.md and ptx.json there. Counted
by executing PTX, not measured on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECTOR, WARP, ROWS = 32, 32, 2
SPECIAL = ("ex2", "lg2", "rcp")
PASSES = ("fused", "split", "cooperative", "topk", "apart", "multiply")
VOCABS = {"aligned": 128256, "odd": 50257}
UNCOUNTED = ("acceptance",)  # as tv, but for the value
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
COUNTED = "Counted by executing PTX, not measured on a GPU."
NUMBERS = ("instructions", "special", "read", "write", "bytes", "floor", "loops", "least")
SHOWN = ("kernel", "divergence", "labels", "dtype", "rows", *NUMBERS, "share", "by special")
SIZES = (14, 15, 6, 8, 7, 12, 7, 6, 6, 6, 6, 12, 6, 6, 10)


class Row(NamedTuple):
    kernel: str
    divergence: str
    labels: bool
    dtype: str
    rows: str  # how they lie
    columns: int  # of all rows of the launch
    instructions: float
    special: float
    read: float
    write: float
    bytes: float
    floor: float
    loops: list[float]
    least: float | None  # None: a kernel that is not a loss with its gradient
    share: float | None
    by_special: float | None


def counted(run: Any, columns: int, dtype: str, expectation: bool) -> dict[str, Any]:
    """The figures of one launch on so many columns."""
    from bench.aot.budget import H200, STREAMS
    from bench.aot.cases import WHOLE

    memory, per = run.memory, WARP / columns
    moved, floor, requests = {"read": 0, "write": 0}, 0, {"read": 0, "write": 0}
    loops: list[float] = []
    for (name, kind), sectors in memory.sectors.items():
        moved[kind] += sectors
        requests[kind] += memory.requests[name, kind]
        times = memory.loops(name, kind)
        floor += times[0]
        if kind == "read":
            loops = [a + b for a, b in zip_longest(loops, times, fillvalue=0)]
    special = sum(n for op, n in run.counts.items() if op.split(".")[0] in SPECIAL) * per
    instructions = sum(run.counts.values()) * per
    # reads of both sides in every loop, and the gradient
    fewest = BYTES[dtype] * ((4 if expectation else 6) + 1)
    bytes_ = sum(moved.values()) * SECTOR / columns
    found = {
        "columns": columns,
        "instructions": round(instructions, 1),
        "special": round(special, 2),
        **{kind: round(moved[kind] / max(requests[kind], 1), 1) for kind in moved},
        "bytes": round(bytes_, 1),
        "floor": round(floor * SECTOR / columns, 1),
        # single numbers of a row are read more often, and are less than a hundredth
        "loops": [x for of in loops if (x := round(of * SECTOR / columns, 1)) >= 0.1],
        **dict(least=None, share=None, by_special=None),
    }
    if run.kernel.removesuffix("_kernel") in WHOLE:
        a_column = STREAMS * BYTES[dtype] / H200.copy * H200.processors * H200.clock
        found["least"] = round(bytes_ / fewest, 3)
        found["share"] = round(min(1.0, a_column * H200.lanes / instructions), 2)
        found["by_special"] = round(min(1.0, a_column * H200.special / special), 2)
    return found


def launches(
    divergence: str, labels: bool, dtype: str, vocab: int, arch: str, only: Iterable[str]
) -> list[Any]:
    """What every pass of PASSES in `only` launches on ROWS rows, of which none is left out."""
    import torch
    from ptx.launcher import on_host

    from fastkd.backends.base import LossSpec, Rows, Stats, TopKRows
    from fastkd.backends.gpu import BACKEND, cooperative, launch
    from fastkd.divergence import divergences

    torch.manual_seed(0)
    x, t = (torch.randn(1, ROWS, vocab).to(getattr(torch, dtype)) for _ in range(2))
    hard = 0.5 if labels else 0.0
    param = divergences[divergence].param
    spec = LossSpec(divergence, param, 2.0, 0.5, hard, 0.0, vocab, vocab)
    rows = Rows(None, torch.arange(ROWS), torch.ones(ROWS))
    grad = torch.empty_like(x)
    top = t[0].float().log_softmax(-1).topk(64)
    stored = TopKRows(top.values, top.indices, torch.full((ROWS,), -1.0), False)

    def apart() -> None:
        stats = Stats(
            *(BACKEND.stats(y, at, vocab, None) for y, at in ((x, 2.0), (t, 2.0), (x, 1.0)))
        )
        sums = BACKEND.loss(x, t, stats, spec, rows)
        BACKEND.grad(x, t, stats, sums, spec, rows, grad)

    def shared(module: Any) -> Callable[[], None]:
        def run() -> None:
            real, module.programs_per_row = module.programs_per_row, lambda *of: 4
            try:
                BACKEND.fused(x, t, spec, rows, grad)
            finally:
                module.programs_per_row = real

        return run

    split_rows = getattr(launch, "split_rows")  # noqa: B009  # not exported
    passes: dict[str, Callable[[], Any]] = {
        "fused": lambda: BACKEND.fused(x, t, spec, rows, grad),
        "split": shared(split_rows),
        "cooperative": shared(cooperative),
        "topk": lambda: BACKEND.topk(x, stored, spec, rows, grad),
        "apart": apart,
        "multiply": lambda: BACKEND.multiply(grad, torch.tensor(2.0)),
    }
    with on_host(arch) as driver:
        for name in only:
            passes[name]()
        return list({one.kernel: one for one in driver.runs}.values())


def table(
    names: list[str], dtypes: list[str], kinds: list[str], passes: list[str], arch: str
) -> Iterable[Row]:
    from fastkd.divergence import divergences

    for kind in kinds:
        for dtype in dtypes:
            for labels in (False, True):
                for name in names:
                    vocab = VOCABS[kind]
                    for run in launches(name, labels, dtype, vocab, arch, passes):
                        kernel = run.kernel.removesuffix("_kernel")
                        expectation = divergences[name].expectation is not None
                        figures = counted(run, ROWS * vocab, dtype, expectation)
                        yield Row(kernel, name, labels, dtype, kind, **figures)


def cells(row: Row) -> list[str]:
    def text(value: Any) -> str:
        parts = value if isinstance(value, list) else [value]
        return ", ".join("-" if part is None else str(part) for part in parts)

    return [text(getattr(row, name.replace(" ", "_"))) for name in SHOWN]


def line(values: Iterable[str]) -> str:
    return " ".join(f"{value:<{size}}" for value, size in zip(values, SIZES, strict=True))


def markdown(rows: list[Row], arch: str) -> str:
    """The table as a document; what the columns are stands in this file's docstring."""
    from bench.aot.budget import H200

    widths = sorted({row.columns // ROWS for row in rows})
    about = (
        f"{COUNTED} {arch}, rows of {' and '.join(map(str, widths))} columns, forward with "
        f"gradient, labels: hard labels and T = 2. The H200 by its data sheet: {H200.processors} "
        f"processors of {H200.lanes // WARP} instructions of a warp and {H200.special} special "
        f"functions a clock, {H200.clock / 1e9:g} GHz, {H200.copy / 1e12:g} TB/s. Written by "
        "`python -m bench.ptx --table`, whose help says what the columns are."
    )
    lines = [
        " | ".join(SHOWN),
        " | ".join("---" for _ in SHOWN),
        *map(" | ".join, map(cells, rows)),
    ]
    return about + "\n\n" + "".join(f"| {text} |\n" for text in lines)


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.ptx: TRITON_INTERPRET=1 is set, under which nothing compiles; unset it")
        return 2
    sys.path.insert(0, str(ROOT / "tests"))
    from fastkd.distill.serialization import in_lines
    from fastkd.divergence import divergences

    parser = argparse.ArgumentParser(
        prog="python -m bench.ptx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--divergences", default="kl,js")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--rows", default="aligned,odd", help="how rows lie: aligned, odd")
    parser.add_argument("--passes", default=",".join(PASSES), help="of " + ", ".join(PASSES))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", metavar="FOLDER", type=Path)
    given = parser.parse_args()
    if given.table:
        given.divergences = ",".join(name for name in divergences if name not in UNCOUNTED)
        given.dtypes = "bfloat16,float32"
        given.passes, given.json = "fused", given.table / "ptx.json"
    print(line(SHOWN))
    rows = []
    lists = (given.divergences, given.dtypes, given.rows, given.passes)
    names, dtypes, kinds, passes = (words.split(",") for words in lists)
    for row in table(names, dtypes, kinds, passes, given.arch):
        rows.append(row)
        print(line(cells(row)), flush=True)
        if given.json:  # after each row: what is known is kept if the run is not
            about = {"about": COUNTED, "arch": given.arch}
            document = {**about, "rows": [row._asdict() for row in rows]}
            Path(given.json).write_text(in_lines(document) + "\n")
        if given.table:
            (given.table / "ptx.md").write_text(markdown(rows, given.arch))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
