"""The losses of responses against their definitions in plain torch: forward and backward.

Both sides run on the same logits; a loss must agree with its definition before it is timed. The
first line is a measure for the rest: `kl_div`, one pass in the kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench.harness import gate
from bench.harness.family import Family, Input, Shape
from bench.harness.gate import Errors
from bench.harness.measure import Comparison, Provider, Ready
from bench.harness.result import Result
from bench.harness.timing import Clock
from fastkd import distill

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
T = 4.0
RANKS = 64
AGREE = Errors(1e-3, 1e-3)  # of the loss and of the gradient's norm; float32 on either side


class Case(NamedTuple):
    """A loss and its definition, mean over the rows."""

    name: str
    about: str
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


def _cosine(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(s, t, -1)).mean()


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


def _binary_kl(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    p = (t / T).sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(x / T, p) for x in (s, t))
    return cross - own


CASES = {
    case.name: case
    for case in (
        Case(
            *("kl", "fastkd.kl_div"),
            *(lambda s, t, y: fastkd.kl_div(s, t, temperature=T), lambda s, t, y: _kl(s, t)),
        ),
        Case(
            *("binary_kl", "of each logit, fastkd.binary_kl_div"),
            *(lambda s, t, y: fastkd.binary_kl_div(s, t, temperature=T), _binary_kl),
        ),
        Case("logit_mse", "centred logits, Ba and Caruana", distill.logit_mse, _mse),
        Case("dkd", "decoupled", lambda s, t, y: distill.dkd(s, t, y, temperature=T), _dkd),
        Case("nkd", "normalised", lambda s, t, y: distill.nkd(s, t, y, temperature=T), _nkd),
        Case("dist", "correlations", lambda s, t, y: distill.dist(s, t, temperature=T), _dist),
        Case("zscore", "z-scores", lambda s, t, y: distill.zscore(s, t, temperature=T), _zscore),
        Case("uld", "sorted probabilities", distill.uld_loss, _uld),
        Case(
            *("uld-top64", "the 64 largest of them"),
            *(lambda s, t, y: distill.uld_loss(s, t, top=RANKS), _uld_64),
        ),
        Case("cosine", "cosine of the logits", distill.cosine, _cosine),
    )
}


class Responses(Family):
    name = "responses"
    about = "responses: the losses of responses against their definitions in plain torch."
    cases = {case.name: case.about for case in CASES.values()}
    shapes = {
        "cpu": (Shape(256, 32_000, "a language model's batch"),),
        "toy": (Shape(5, 50, "does it run"),),
    }
    devices = True
    bases = ("torch",)
    key = "loss"
    legend = """\
Time is the median of interleaved runs of loss and gradient; "peak extra" is what a call adds at its
peak, its gradient included. "apart" is how far loss and gradient are from the definition's."""

    def heading(self, case: str, dtype: torch.dtype, shape: Any, a: argparse.Namespace) -> str:
        return f"responses, {shape.label}, float32"

    def comparison(self, one: Input, a: argparse.Namespace) -> Comparison:
        case, shape, device = CASES[one.case], one.shape, a.device
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.rows, shape.vocab)
        student, teacher = (3 * torch.randn(size, generator=generator, device=device) for _ in "st")
        labels = torch.randint(0, shape.vocab, size[:1], generator=generator, device=device)
        clock = Clock(device)

        def step(call: Call) -> Callable[[], tuple[Tensor, Tensor]]:
            s = student.detach().requires_grad_()

            def run() -> tuple[Tensor, Tensor]:
                loss = call(s, teacher, labels)
                return loss.detach(), torch.autograd.grad(loss, s)[0]

            return run

        def ready(call: Call) -> Ready:
            (value, grad), (true, slope) = step(call)(), step(case.plain)()
            of_grad = float((grad - slope).norm() / slope.norm())
            apart = Errors(float((value - true).abs() / true.abs()), of_grad)
            gate.check(apart, AGREE)
            return Ready({"step": lambda: clock(step(call))}, lambda: step(call), apart, AGREE)

        return Comparison(
            *(case.name, "", f"{case.name} {shape.label}", "float32", device),
            [
                Provider("torch", partial(ready, case.plain)),
                Provider("fastkd", partial(ready, case.ours), ours=True),
            ],
            student.nbytes,
            alternate=True,
            figures={"rows": shape.rows, "vocab": shape.vocab},
        )

    def counted(self, result: Result) -> dict[str, str]:
        return {"apart": f"{max(result.errors):.1e}" if result.errors else "-"}


FAMILY = Responses()
