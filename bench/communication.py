"""What a split vocabulary moves between ranks: counted in a run, and worked out for 1 to 64 ranks.

Each loss is run forward and backward on --ranks processes of this machine (gloo), and every tensor
that is handed to torch.distributed is counted. The formula must give the same number; from it
follows what a rank receives of R ranks, for one row of logits:

    split   (R - 1) * floats * 4          an all-gather of a few sums, whatever the vocabulary
    logits  (R - 1) / R * V * 2 sides     an all-gather of both sides' columns, in --dtype

    python -m bench.communication --json communication.json

Exit status: 0, or 1 where the count is not what the formula says, or above --limit bytes a row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from bench.cli import output, positive

LIMIT = 64  # bytes a row that a rank hands over
FLOAT = 4  # bytes
CALL = 6 * 8  # bytes of every call, whatever its rows: the sizes that ranks tell each other
SIZES = (1, 2, 4, 8, 16, 32, 64)
ROWS, K, HIDDEN = 64, 16, 32  # of the counted run


class Loss(NamedTuple):
    """floats: numbers per row that a rank hands over; hidden: whether gradients of [N, H] too.

    A float64 counts as two.
    """

    floats: int
    labels: bool = False
    stored: bool = False
    hidden: bool = False
    divergence: str = "kl"


# Of the C++ backend's stages, labels or not: 4 float64 and 6 float32 for kl, and for a divergence
# that is no expectation 3 and 6, then 1 and 2 in a second exchange. The general passes send 6 of
# float32, 10 with labels: (max, sum) of both sides, then the sums of values and slopes.
STAGE = 4 * 2 + 6
RATED = 3 * 2 + 6 + 2 + 2
LABEL = 4  # its logit; sum, drift and width at T = 1
LOSSES = {
    "dense": Loss(STAGE),
    "dense, labels": Loss(STAGE, labels=True),
    "js, labels": Loss(RATED, labels=True, divergence="js"),
    f"top-{K}": Loss(2 + K + 2, stored=True),  # its own (max, sum), the points, the rest's
    f"top-{K}, labels": Loss(2 + LABEL + K + 2, labels=True, stored=True),
    "linear, labels": Loss(STAGE, labels=True, hidden=True),
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


def handed(loss: Loss) -> int:
    """Bytes of a call of ROWS rows, by the formula."""
    return CALL + ROWS * FLOAT * (loss.floats + (HIDDEN if loss.hidden else 0))


def counted(loss: Loss, vocab: int) -> int:
    """The same of a call on this rank's `vocab` columns."""
    torch.manual_seed(0)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    teacher: Any = torch.randn(ROWS, vocab)
    if loss.stored:
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


def _rank(rank: int, world: int, store: str, vocab: int, results: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results.put({name: counted(loss, vocab) for name, loss in LOSSES.items()})
    dist.barrier()
    dist.destroy_process_group()


def count(world: int, vocab: int) -> list[dict[str, int]]:
    """What each of `world` ranks hands over, by loss."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        given = (world, store, vocab // world, results)
        processes = [spawn.Process(target=_rank, args=(rank, *given)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise RuntimeError(f"ranks: got exit codes {failed}, expected 0 of all {world}")
    return [results.get() for _ in processes]


def table(vocab: int, width: int) -> list[dict[str, Any]]:
    """Bytes that a rank receives for one row of R ranks, split and as whole logits."""
    rows = []
    for size in SIZES:
        whole = (size - 1) * vocab * 2 * width // size
        split = {name: (size - 1) * loss.floats * FLOAT for name, loss in LOSSES.items()}
        rows.append({"ranks": size, "split": split, "logits": whole})
    return rows


def as_text(rows: Sequence[dict[str, Any]], tokens: int, vocab: int, dtype: str) -> str:
    """The table for a terminal, of steps of `tokens` rows."""
    names = [name for name in LOSSES if not name.startswith("linear")]
    lines = [
        f"{tokens} rows a step, vocabulary {vocab}, logits in {dtype}: MB received by a rank",
        "ranks" + "".join(f"{name:>16}" for name in names) + f"{'logits':>16}{'ratio':>9}",
    ]
    for row in rows:
        moved = [row["split"][name] for name in names]
        cells = "".join(f"{x * tokens / 1e6:16.3f}" for x in (*moved, row["logits"]))
        ratio = f"{row['logits'] / moved[1]:9.0f}" if moved[1] else f"{'-':>9}"
        lines.append(f"{row['ranks']:5d}{cells}{ratio}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, compare with the formula, print the table, write it as JSON where asked."""
    whole = positive(int, "size")
    parser = argparse.ArgumentParser(
        "python -m bench.communication", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--ranks", type=whole, default=2, help="of the counted run (default 2)")
    parser.add_argument("--vocab", type=whole, default=128256, help="(default 128256)")
    parser.add_argument("--rows", type=whole, default=8192, help="of a step (default 8192)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--limit", type=positive(float, "limit"), default=LIMIT)
    parser.add_argument("--json", type=output, help="write the figures there")
    options = parser.parse_args(argv)
    if options.vocab < K * options.ranks:
        parser.error(f"--vocab: got {options.vocab}, expected at least {K * options.ranks}")
    found = count(options.ranks, min(options.vocab, 64 * K * options.ranks))
    width = getattr(torch, options.dtype).itemsize
    rows = table(options.vocab, width)
    wrong = 0
    print(f"bytes a row that a rank hands over, counted on {options.ranks} ranks")
    counts = {}
    for name, loss in LOSSES.items():
        said = handed(loss)
        seen = {of_rank[name] for of_rank in found}
        good = seen == {said} and (loss.stored or loss.floats * FLOAT <= options.limit)
        wrong += not good
        counts[name] = {"bytes_per_row": loss.floats * FLOAT, "formula": said, "counted": [*seen]}
        more = " and a gradient of its hidden state" if loss.hidden else ""
        print(f"{name:>16}{loss.floats * FLOAT:5d}{more}{'' if good else f': WRONG, {seen}'}")
    print(as_text(rows, options.rows, options.vocab, options.dtype))
    if options.json is not None:
        document = {"handed": counts, "received_per_row": rows, "ranks": options.ranks}
        document |= {"vocab": options.vocab, "dtype": options.dtype, "torch": torch.__version__}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
