"""What a vocabulary split over processes of this machine costs: the loss forward and backward.

For each divergence, interleaved in the same processes, one thread each:

    unsplit   one process, all columns; the others wait
    floor     every process the unsplit loss of its own columns, at the same time and with no group:
              what a split reaches whose exchanges and whose memory cost nothing
    split     every process its own columns, with the group (gloo)

and the split's time over an equal share of the unsplit one. No figure is given for a split whose
loss or gradient is not the unsplit one's.

    python -m bench.split --json split.json --markdown split.md

Exit status: 0, or 1 where a result is wrong, more than 64 bytes a row are handed over, or a ratio
is above --limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from bench import report
from bench.cli import listed, output, positive
from bench.communication import CALL, LIMIT, Count
from bench.gate import FLOORS

T = 2.0
CLOSE = 1e-4  # logarithms of probabilities of which nobody knows which is larger
WAYS = ("unsplit", "floor", "split")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Sizes(NamedTuple):
    """Of one run; repeats of every way, after one that is not timed."""

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


def _error(got: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor], ties: Tensor | None) -> float:
    """Of the loss relative to max(1, |loss|), or of the gradient relative to its largest."""
    loss = (got[0].double() - whole[0].double()).abs() / whole[0].double().abs().clamp_min(1.0)
    top = whole[1].abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    apart = (got[1].double() - whole[1].double()).abs()
    if ties is not None:
        apart.masked_fill_(ties, 0.0)
    return float(torch.maximum(loss, apart.max() / top if apart.numel() else loss))


def _allowed(name: str, dtype: str) -> float:
    """An error; tv's row takes another mean where a column's sign falls the other way."""
    return CLOSE if name == "tv" else FLOORS[DTYPES[dtype]]


def _ties(student: Tensor, teacher: Tensor, mine: slice) -> Tensor:
    """Where the probabilities are so close that their difference may round to either sign.

    The gradient of tv jumps there, by as much as it is: not a matter of precision.
    """
    found = []
    for s, t in zip(student.split(32), teacher.split(32), strict=True):
        logq, logp = (torch.log_softmax(x.double() / T, -1)[:, mine] for x in (s, t))
        found.append((logp - logq).abs() < CLOSE)
    return torch.cat(found)


def _measured(
    rank: int, mine: slice, student: Tensor, teacher: Tensor, name: str, repeats: int
) -> dict[str, Any]:
    """Of one divergence on this rank: seconds of each way, error, bytes and collectives."""
    group = dist.group.WORLD
    own_s, own_t = student[:, mine].contiguous(), teacher[:, mine].contiguous()
    loss, grad = _step(student, teacher, name)
    with Count() as count:
        got = _step(own_s, own_t, name, group=group)
    ties = _ties(student, teacher, mine) if name == "tv" else None
    error = _error(got, (loss, grad[:, mine]), ties)
    del loss, grad, got, ties
    runs: dict[str, Callable[[], object]] = {
        "unsplit": lambda: _step(student, teacher, name) if rank == 0 else None,
        "floor": lambda: _step(own_s, own_t, name),
        "split": lambda: _step(own_s, own_t, name, group=group),
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for at in range(repeats + 1):
        for way, run in runs.items():
            dist.barrier()
            begin = time.perf_counter()
            run()
            if at:
                seconds[way].append(time.perf_counter() - begin)
    return {"seconds": seconds, "error": error, "bytes": count.bytes, "calls": count.calls}


def _rank(rank: int, sizes: Sizes, store: str, results: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=sizes.ranks
    )
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.rows, sizes.vocab)
    student, teacher = (
        torch.randn(shape, generator=generator).to(DTYPES[sizes.dtype]) for _ in range(2)
    )
    mine = slice(sizes.vocab * rank // sizes.ranks, sizes.vocab * (rank + 1) // sizes.ranks)
    found = {
        name: _measured(rank, mine, student, teacher, name, sizes.repeats)
        for name in sizes.divergences
    }
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def run(sizes: Sizes) -> list[dict[str, Any]]:
    """A row for each divergence: milliseconds, ratio, error, bytes a row and collectives."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            spawn.Process(target=_rank, args=(rank, sizes, store, results), daemon=True)
            for rank in range(sizes.ranks)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        while len(found) < sizes.ranks:
            if not results.empty():
                found.update([results.get()])
                continue
            failed = [process.exitcode for process in processes if process.exitcode]
            if failed:
                raise RuntimeError(f"ranks: got exit codes {failed}, expected 0 of all")
            time.sleep(0.01)
        for process in processes:
            process.join()
    return [_row(name, [found[rank][name] for rank in sorted(found)], sizes) for name in found[0]]


def _row(name: str, ranks: Sequence[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    times = {"unsplit": ranks[0]["seconds"]["unsplit"]}
    for way in WAYS[1:]:  # the slowest rank's, repeat by repeat
        times[way] = [max(at) for at in zip(*(x["seconds"][way] for x in ranks), strict=True)]
    ms = {way: 1e3 * statistics.median(seconds) for way, seconds in times.items()}
    share = ms["unsplit"] / sizes.ranks
    return {
        "divergence": name,
        "ms": ms,
        "least_ms": {way: 1e3 * min(seconds) for way, seconds in times.items()},
        "ratio": ms["split"] / share,
        "floor_ratio": ms["floor"] / share,
        "error": max(x["error"] for x in ranks),
        "bytes_per_row": max((x["bytes"] - CALL) / sizes.rows for x in ranks),
        "collectives": max(x["calls"] for x in ranks),
    }


def as_text(rows: Sequence[dict[str, Any]], sizes: Sizes, facts: dict[str, Any]) -> str:
    """The rows as Markdown."""
    head = ("divergence", "unsplit", "floor", "split", "floor ratio", "ratio", "bytes", "exchanges")
    lines = [
        f"### {sizes.rows} x {sizes.vocab} {sizes.dtype} split over {sizes.ranks} processes",
        "",
        f"{report.machine_line(facts)}  ",
        f"Load before the run {facts['load']:.2f}. Milliseconds of forward and backward, one "
        f"thread a process, median of {sizes.repeats} interleaved runs; ratios to "
        f"1/{sizes.ranks} of the unsplit time; bytes that a rank hands over for a row.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- " + "| ---: " * (len(head) - 1) + "|",
    ]
    for row in rows:
        times = " | ".join(f"{row['ms'][way]:.1f}" for way in WAYS)
        lines.append(
            f"| {row['divergence']} | {times} | {row['floor_ratio']:.2f} | {row['ratio']:.2f} | "
            f"{row['bytes_per_row']:.0f} | {row['collectives']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, check, print the table, write it where asked."""
    whole = positive(int, "size")
    parser = argparse.ArgumentParser("python -m bench.split", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=whole, default=2, help="processes (default 2)")
    parser.add_argument("--rows", type=whole, default=512, help="(default 512)")
    parser.add_argument("--vocab", type=whole, default=128256, help="(default 128256)")
    parser.add_argument("--repeats", type=whole, default=9, help="of each way (default 9)")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    names = {name: name for name in fastkd.divergences}
    parser.add_argument("--divergences", type=listed(names, "divergences"), default=list(names))
    parser.add_argument("--limit", type=positive(float, "limit"), help="fail above this ratio")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the figures there")
    parser.add_argument("--markdown", type=output, metavar="FILE", help="and the table there")
    options = parser.parse_args(argv)
    sizes = Sizes(
        *(options.ranks, options.rows, options.vocab, options.repeats, options.dtype),
        tuple(options.divergences),
    )
    # read by the processes that are about to start: with a new gradient of this size for every call
    # the time would be that of the system's new pages
    os.environ.setdefault("FASTKD_POOL_MB", "2048")
    facts = report.machine(torch.device("cpu")) | {"threads": 1, "load": os.getloadavg()[0]}
    rows = run(sizes)
    status = 0
    for row in rows:
        name = row["divergence"]
        if not row["error"] <= _allowed(name, sizes.dtype):
            print(f"{name}: WRONG, {row['error']:.1e} off the unsplit result", file=sys.stderr)
            status = 1
        if row["bytes_per_row"] > LIMIT:
            print(f"{name}: {row['bytes_per_row']:.0f} bytes a row, above {LIMIT}", file=sys.stderr)
            status = 1
        if options.limit is not None and row["ratio"] > options.limit:
            print(f"{name}: ratio {row['ratio']:.2f}, above {options.limit:g}", file=sys.stderr)
            status = 1
    right = [row for row in rows if row["error"] <= _allowed(row["divergence"], sizes.dtype)]
    text = as_text(right, sizes, facts)
    print(text, end="")
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json is not None:
        document = {"sizes": sizes._asdict(), "machine": facts, "rows": right}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
