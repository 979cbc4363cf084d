"""The losses of responses against their definitions in plain torch: forward and backward.

Both sides run on the same logits, in turns, the one that goes first changing from round to round; a
loss must agree with its definition before it is timed. Memory is what a call adds at its peak, its
gradient included. The first line is the yardstick: `kl_div`, one trip in the kernels.

    python -m bench.responses --shape 256x32000 --json responses.json

Exit status: 0, or 1 where a loss is not what its definition says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench.cli import Progress, device, listed, output, positive
from bench.timing import Clock, no_collection, summarise
from fastkd import distill
from fastkd.demo.memory import peak_extra

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
T = 4.0
RANKS = 64
WARM_UP = 1
ROUNDS = 1000
LEAST = 5
AGREE = 1e-3  # relative, of the loss and of the gradient's norm; float32 on either side


class Case(NamedTuple):
    """A loss and its definition, mean over the rows."""

    name: str
    ours: Call
    plain: Call


def _others(x: Tensor, y: Tensor) -> Tensor:
    return x.scatter(-1, y.unsqueeze(-1), -torch.inf)


def _kl(s: Tensor, t: Tensor, temperature: float = T) -> Tensor:
    logq = F.log_softmax(s / temperature, -1)
    return F.kl_div(logq, F.softmax(t / temperature, -1), reduction="batchmean")


def _dkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    at = y.unsqueeze(-1)
    p, q = F.softmax(t / T, -1).gather(-1, at), F.softmax(s / T, -1).gather(-1, at)
    binary = torch.cat((q, 1 - q), -1).log()
    target = F.kl_div(binary, torch.cat((p, 1 - p), -1), reduction="batchmean")
    logq = F.log_softmax(_others(s, y) / T, -1).scatter(-1, at, 0.0)  # 0 * -inf
    rest = F.kl_div(logq, F.softmax(_others(t, y) / T, -1), reduction="batchmean")
    return T * T * (target + 8.0 * rest)


def _nkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    at = y.unsqueeze(-1)
    target = F.softmax(t, -1).gather(-1, at) * F.log_softmax(s, -1).gather(-1, at)
    logq = F.log_softmax(_others(s, y) / T, -1).scatter(-1, at, 0.0)
    rest = (F.softmax(_others(t, y) / T, -1) * logq).sum(-1)
    return -target.mean() - 1.5 * T * T * rest.mean()


def _pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    return F.cosine_similarity(x, y, dim, eps=0.0).mean()


def _dist(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    q, p = F.softmax(s / T, -1), F.softmax(t / T, -1)
    return 2 - _pearson(q, p, -1) - _pearson(q, p, 0)


def _mse(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    return 0.5 * F.mse_loss(s, t)


def _zscore(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s, t = ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) for x in (s, t))
    return T * T * _kl(s, t)


def _uld(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    q, p = (x.softmax(-1).sort(-1, descending=True).values for x in (s, t))
    return (q - p).abs().sum(-1).mean()


def _uld_64(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The paper's sum, its ranks from 64 on as one."""
    q, p = (x.softmax(-1).sort(-1, descending=True).values for x in (s, t))
    rest = (q[:, RANKS:].sum(-1) - p[:, RANKS:].sum(-1)).abs()
    return ((q[:, :RANKS] - p[:, :RANKS]).abs().sum(-1) + rest).mean()


CASES = [
    Case("kl", lambda s, t, y: fastkd.kl_div(s, t, temperature=T), lambda s, t, y: _kl(s, t)),
    Case("logit_mse", distill.logit_mse, _mse),
    Case("dkd", lambda s, t, y: distill.dkd(s, t, y, temperature=T), _dkd),
    Case("nkd", lambda s, t, y: distill.nkd(s, t, y, temperature=T), _nkd),
    Case("dist", lambda s, t, y: distill.dist(s, t, temperature=T), _dist),
    Case("zscore", lambda s, t, y: distill.zscore(s, t, temperature=T), _zscore),
    Case("uld", distill.uld_loss, _uld),
    Case("uld top 64", lambda s, t, y: distill.uld_loss(s, t, top=RANKS), _uld_64),
    Case("cosine", distill.cosine, lambda s, t, y: (1 - F.cosine_similarity(s, t, -1)).mean()),
]


def measure(case: Case, operands: Sequence[Tensor], seconds: float, say: Any) -> dict[str, Any]:
    """Median milliseconds and peak bytes of both sides, and how far they are from each other."""
    student, teacher, labels = operands

    def step(call: Call) -> Callable[[], tuple[Tensor, Tensor]]:
        s = student.detach().requires_grad_()

        def run() -> tuple[Tensor, Tensor]:
            loss = call(s, teacher, labels)
            return loss.detach(), torch.autograd.grad(loss, s)[0]

        return run

    (value, grad), (true, slope) = step(case.ours)(), step(case.plain)()
    apart = max(
        float((value - true).abs() / true.abs()), float((grad - slope).norm() / slope.norm())
    )
    del grad, slope
    clock, sides = Clock(student.device), (case.ours, case.plain)
    times: tuple[list[float], list[float]] = ([], [])
    spent = 0.0
    with no_collection():
        for number in range(-WARM_UP, ROUNDS):
            if number >= LEAST and spent > seconds * 1e3:
                break
            say(f"timing, round {max(number, 0) + 1}, {spent / 1e3:.0f} of {seconds:g} s")
            for side in (0, 1) if number % 2 else (1, 0):
                elapsed = clock(step(sides[side]))
                if number >= 0:
                    times[side].append(elapsed)
                    spent += elapsed
    ours, plain = (summarise(side) for side in times)
    say("measuring memory")
    block = student.numel() * student.element_size()
    peaks = [peak_extra(step(side), student.device, block) for side in sides]
    return {
        "loss": case.name,
        "ours_ms": ours.median,
        "plain_ms": plain.median,
        "speedup": plain.median / ours.median,
        "ours_peak": peaks[0],
        "plain_peak": peaks[1],
        "rounds": ours.runs,
        "apart": apart,
    }


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    head = f"{'loss':12}{'ours ms':>10}{'torch ms':>10}{'speedup':>10}"
    lines = [head + f"{'ours MiB':>10}{'torch MiB':>10}{'apart':>10}{'rounds':>8}"]
    for row in rows:
        line = f"{row['loss']:12}{row['ours_ms']:10.2f}{row['plain_ms']:10.2f}"
        line += f"{row['speedup']:9.1f}x"
        line += f"{row['ours_peak'] / 2**20:10.1f}{row['plain_peak'] / 2**20:10.1f}"
        lines.append(line + f"{row['apart']:10.1e}{row['rounds']:8}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        "python -m bench.responses", description=__doc__.split("\n")[0]
    )
    known = {case.name: case for case in CASES}
    parser.add_argument(
        "--losses", type=listed(known, "--losses"), default=CASES, help=f"some of {','.join(known)}"
    )
    parser.add_argument("--shape", default="256x32000", help="rows x classes (default 256x32000)")
    parser.add_argument("--seconds", type=positive(float, "--seconds"), default=10.0, help="a loss")
    parser.add_argument("--threads", type=positive(int, "--threads"), help="of torch")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--json", type=output, help="write the figures there")
    options = parser.parse_args(argv)
    try:
        rows, vocab = (positive(int, "--shape")(part) for part in options.shape.split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        parser.error(f"--shape: got {options.shape!r}, expected such as 256x32000")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    where = options.device
    operands = [3 * torch.randn(rows, vocab, device=where) for _ in range(2)]
    operands.append(torch.randint(0, vocab, (rows,), device=where))
    say, table = Progress(), []
    for case in options.losses:
        say.prefix = case.name
        table.append(measure(case, operands, options.seconds, say))
    say.clear()
    print(as_text(table))
    if options.json is not None:
        about = {"torch": torch.__version__, "shape": options.shape, "device": str(where)}
        about |= {"threads": torch.get_num_threads(), "losses": table}
        options.json.write_text(json.dumps(about) + "\n", encoding="utf-8")
    wrong = [row["loss"] for row in table if not row["apart"] <= AGREE]
    for name in wrong:
        print(f"{name}: not what its definition says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
