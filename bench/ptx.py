"""What the kernels' PTX does on a row, counted: instructions, sectors, bytes. No GPU is needed.

`python -m bench.ptx` executes each kernel on two rows, as `tests/ptx` does, and prints per column

    instructions   PTX instructions of a thread; ptxas may fuse some and add others
    special        of them exponentials, logarithms and reciprocals
    read, write    sectors of 32 bytes that a request of a warp takes: 16 where every lane moves 16
                   bytes, 4 for 4 bytes of neighbouring lanes, up to 32 where lanes lie apart
    bytes          moved between the processor and the L2 cache, as sectors
    floor          the bytes of the sectors that are touched at all: what memory must deliver once

Counted by executing PTX, not measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECTOR, WARP, ROWS = 32, 32, 2
SPECIAL = ("ex2", "lg2", "rcp")
PASSES = ("fused", "split", "cooperative", "topk", "apart", "multiply")
VOCABS = {"aligned": 50304, "odd": 50257}
SHOWN = ("kernel", "divergence", "labels", "dtype", "rows", *(
    "instructions", "special", "read", "write", "bytes", "floor"))  # fmt: skip
SIZES = (14, 15, 6, 8, 7, 12, 7, 6, 6, 6, 6)


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


def counted(run: Any, columns: int) -> dict[str, float]:
    """The figures of one launch on so many columns."""
    memory, per = run.memory, WARP / columns
    moved, floor, requests = {"read": 0, "write": 0}, 0, {"read": 0, "write": 0}
    for (name, kind), sectors in memory.sectors.items():
        moved[kind] += sectors
        requests[kind] += memory.requests[name, kind]
        floor += memory.distinct(name, kind)
    special = sum(n for op, n in run.counts.items() if op.split(".")[0] in SPECIAL)
    return {
        "columns": columns,
        "instructions": round(sum(run.counts.values()) * per, 1),
        "special": round(special * per, 2),
        **{kind: round(moved[kind] / max(requests[kind], 1), 1) for kind in moved},
        "bytes": round(sum(moved.values()) * SECTOR / columns, 1),
        "floor": round(floor * SECTOR / columns, 1),
    }


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
    divergences: list[str], dtypes: list[str], kinds: list[str], passes: list[str], arch: str
) -> Iterable[Row]:
    for dtype in dtypes:
        for kind in kinds:
            for labels in (False, True):
                for name in divergences:
                    vocab = VOCABS[kind]
                    for run in launches(name, labels, dtype, vocab, arch, passes):
                        kernel = run.kernel.removesuffix("_kernel")
                        figures = counted(run, ROWS * vocab)
                        yield Row(kernel, name, labels, dtype, kind, **figures)  # type: ignore[arg-type]


def line(values: Iterable[Any]) -> str:
    return " ".join(f"{value!s:<{size}}" for value, size in zip(values, SIZES, strict=True))


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.ptx: TRITON_INTERPRET=1 is set, under which nothing compiles; unset it")
        return 2
    sys.path.insert(0, str(ROOT / "tests"))
    parser = argparse.ArgumentParser(prog="python -m bench.ptx", description=__doc__)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--divergences", default="kl,js")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--rows", default="aligned,odd", help="how rows lie: aligned, odd")
    parser.add_argument("--passes", default=",".join(PASSES), help="of " + ", ".join(PASSES))
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    print(line(SHOWN))
    rows = []
    for row in table(
        given.divergences.split(","),
        given.dtypes.split(","),
        given.rows.split(","),
        given.passes.split(","),
        given.arch,
    ):
        rows.append(row)
        print(line(getattr(row, name) for name in SHOWN), flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
