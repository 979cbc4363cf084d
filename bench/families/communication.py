"""What a vocabulary-parallel loss moves between ranks: counted, and worked out for 1 to 64 ranks.

Each loss is run forward and backward on --ranks processes of this machine (gloo), and every tensor
that is handed to torch.distributed is counted. The formula must give the same number; from it
follows what a rank receives of R ranks, for one row of logits:

    parallel  (R - 1) * floats * 4          an all-gather of a few sums, whatever the vocabulary
    logits    (R - 1) / R * V * 2 sides     an all-gather of both sides' columns, in --dtype
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import queue
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from bench.harness import table
from bench.harness.cli import positive
from bench.harness.family import DTYPES, Family, Input, Shape, spelled
from bench.harness.result import Group, Result
from bench.harness.timing import Say

LIMIT = 64.0  # bytes a row that a rank hands over
FLOAT = 4  # bytes
# bytes of every call, whatever its rows: the sizes that ranks tell each other, and whether the
# factor that each expected was right
CALL = 6 * 8 + 1
SIZES = (1, 2, 4, 8, 16, 32, 64)
ROWS, K, HIDDEN = 64, 16, 32  # of the counted run


class Loss(NamedTuple):
    """floats: numbers per row that a rank hands over; hidden: whether gradients of [N, H] too.

    A float64 counts as two.
    """

    floats: int
    labels: bool = False
    topk: bool = False
    hidden: bool = False
    divergence: str = "kl"


# The C++ backend's exchanges, labels or not: 4 float64 and 6 float32 for kl, and for a divergence
# that is no expectation 3 and 6, then 1 and 2 in a second exchange. The general passes send 6 of
# float32, 10 with labels: (max, sum) of both sides, then the sums of values and slopes.
FUSED = 4 * 2 + 6
RATED = 3 * 2 + 6 + 2 + 2
LABEL = 4  # its logit; sum, drift and width at T = 1
LOSSES = {
    "dense": Loss(FUSED),
    "dense, labels": Loss(FUSED, labels=True),
    "js, labels": Loss(RATED, labels=True, divergence="js"),
    f"top-{K}": Loss(2 + K + 2, topk=True),  # its own (max, sum), the points, the rest's
    f"top-{K}, labels": Loss(2 + LABEL + K + 2, labels=True, topk=True),
    "linear, labels": Loss(FUSED, labels=True, hidden=True),
}


class Count(TorchDispatchMode):
    """Collectives, and bytes of the tensors that this process hands to them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self.calls += 1
            name = op._schema.name.removeprefix("c10d::")
            if name == "_allgather_base_":
                self.bytes += args[1].nbytes
            elif name == "allreduce_":
                self.bytes += sum(x.nbytes for x in args[0])
            else:
                raise NotImplementedError(f"{name}: a collective that is not counted here")
        return op(*args, **(kwargs or {}))


def expected(loss: Loss) -> int:
    """Bytes of a call of ROWS rows, by the formula."""
    return CALL + ROWS * FLOAT * (loss.floats + (HIDDEN if loss.hidden else 0))


def counted(loss: Loss, vocab: int) -> int:
    """The same of a call on this rank's `vocab` columns."""
    torch.manual_seed(0)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    teacher: Any = torch.randn(ROWS, vocab)
    if loss.topk:
        teacher = fastkd.topk_from_logits(teacher, K, temperature=2.0)
    student: Any = torch.randn(ROWS, vocab, requires_grad=True)
    if loss.hidden:
        weight = torch.randn(vocab, HIDDEN, requires_grad=True)
        student = fastkd.LinearLogits(torch.randn(ROWS, HIDDEN, requires_grad=True), weight)
    hard = {"labels": labels, "alpha": 0.5} if loss.labels else {"alpha": 0.0}
    with Count() as count:
        fastkd.distillation_loss(
            *(student, teacher), **hard, divergence=loss.divergence, group=dist.group.WORLD
        ).backward()
    return count.bytes


def run_ranks(target: Any, world: int, *rest: Any) -> list[Any]:
    """What `target(rank, world, *rest)` returns on each rank of a gloo group, in their order.

    Raises:
        RuntimeError: a rank failed.
    """
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (target, world, str(Path(folder) / "store"), results, rest)
        processes = [
            spawn.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(world)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        while len(found) < world:
            try:
                found.update([results.get(timeout=0.1)])
            except queue.Empty:
                failed = [process.exitcode for process in processes if process.exitcode]
                if failed:
                    raise RuntimeError(f"ranks: got exit codes {failed}, expected 0") from None
        for process in processes:
            process.join()
    return [found[rank] for rank in range(world)]


def _rank(rank: int, target: Any, world: int, store: str, results: Any, rest: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results.put((rank, target(rank, world, *rest)))
    dist.barrier()
    dist.destroy_process_group()


def _counted(rank: int, world: int, vocab: int) -> dict[str, int]:
    return {name: counted(loss, vocab) for name, loss in LOSSES.items()}


@functools.cache
def count(world: int, vocab: int) -> list[dict[str, int]]:
    """What each of `world` ranks hands over, by loss."""
    return run_ranks(_counted, world, vocab // world)


def received(vocab: int, width: int) -> list[dict[str, Any]]:
    """Bytes that a rank receives for one row of R ranks, by parallel losses and as whole logits."""
    rows = []
    for size in SIZES:
        whole = (size - 1) * vocab * 2 * width // size
        parallel = {name: (size - 1) * loss.floats * FLOAT for name, loss in LOSSES.items()}
        rows.append({"ranks": size, **parallel, "logits": whole})
    return rows


class Communication(Family):
    name = "communication"
    about = "communication: the bytes that a vocabulary-parallel loss moves between ranks."
    cases = {
        name: f"{loss.floats} floats a row" + (", and a gradient of hidden states" * loss.hidden)
        for name, loss in LOSSES.items()
    }
    shapes = dict.fromkeys(("cpu", "toy"), (Shape(8192, 128_256, "a training batch"),))
    dtypes = DTYPES
    limit = LIMIT
    times = ()
    key = "loss"
    default_dtype = "bfloat16"
    legend = """\
"bytes a row" is what a rank hands over for a row; formula and counted are of a whole call, by the
formula and as counted. The second table is what a rank receives for a step."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        told = "of the counted run (default: 2)"
        parser.add_argument("--ranks", type=positive(int, "ranks"), default=2, help=told)

    def settle(self, parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
        self.fill(a)
        a.shapes, a.dtype = a.shapes[:1], a.dtype[:1]
        if a.shapes[0].vocab < K * a.ranks:
            vocab = f"a vocabulary of {a.shapes[0].vocab}"
            parser.error(f"--shapes: got {vocab}, expected at least {K * a.ranks}")

    def measure(self, one: Input, a: argparse.Namespace, say: Say) -> list[Result]:
        say("counting")
        name, loss, vocab = one.case, LOSSES[one.case], one.shape.vocab
        found = count(a.ranks, min(vocab, 64 * K * a.ranks))
        seen, formula = sorted({of_rank[name] for of_rank in found}), expected(loss)
        result = Result(name, "", name, "float32", "fastkd", ours=True)
        each = received(vocab, one.dtype.itemsize)
        result.figures = {
            **{"bytes_per_row": loss.floats * FLOAT, "formula": formula, "counted": seen},
            **{"topk": loss.topk, "ranks": a.ranks},
            "received_per_row": {str(of["ranks"]): of[name] for of in each},
            "logits_per_row": {str(of["ranks"]): of["logits"] for of in each},
        }
        if seen != [formula]:
            result.status, result.note = "wrong", f"counted {seen}, by the formula {formula}"
        return [result]

    def row(self, result: Result, group: Group, times: Sequence[str]) -> dict[str, str]:
        row = {"loss": result.case, "bytes a row": str(result.figures["bytes_per_row"])}
        told = ", ".join(map(str, result.figures["counted"]))
        row |= {"formula": str(result.figures["formula"]), "counted": told}
        return row if result.status == "ok" else row | {"bytes a row": result.status.upper()}

    def extra(self, groups: Sequence[Group], a: argparse.Namespace) -> str:
        shape, dtype = a.shapes[0], a.dtype[0]
        rows = []
        for of in received(shape.vocab, dtype.itemsize):
            moved = {name: of[name] for name in LOSSES if not LOSSES[name].hidden}
            row = {"ranks": str(of["ranks"])}
            row |= {name: f"{x * shape.rows / 1e6:.3f}" for name, x in moved.items()}
            row["logits"] = f"{of['logits'] * shape.rows / 1e6:.3f}"
            labelled = of["dense, labels"]
            row["ratio"] = f"{of['logits'] / labelled:.0f}" if labelled else "-"
            rows.append(row)
        heading = f"### MB received by a rank, {shape.label}, logits in {spelled(dtype)}"
        return "\n".join([heading, "", *table.table(rows, ()), ""])

    def complaints(self, groups: Sequence[Group], a: argparse.Namespace) -> list[str]:
        every = [one for group in groups for one in group if not one.figures["topk"]]
        many = [one for one in every if one.figures["bytes_per_row"] > a.limit]
        told = "{}: {} bytes a row are above the limit of {:g}"
        return [told.format(x.case, x.figures["bytes_per_row"], a.limit) for x in many]


FAMILY = Communication()
