"""The loss with the language model's head in it: `LinearLogits` against logits in full.

From hidden states to the gradients of the student's hidden states and weight: the bare matrix
products (the floor), the logits in full and a loss on them, and logits that are never built.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench.families.loss_cases import DENSE, Case
from bench.families.loss_providers import PROVIDERS as DENSE_PROVIDERS
from bench.families.loss_providers import Call
from bench.harness import gate, table
from bench.harness.family import DTYPES, Family, Input, spelled
from bench.harness.gate import Unavailable, first_line
from bench.harness.measure import Comparison, Provider, Ready
from bench.harness.plot import draw_lines
from bench.harness.result import Group, Result
from bench.harness.timing import Clock

SPREAD = 3.0  # standard deviation of the logits, as in the cases of dense logits
PRODUCTS = "products"


class Shape(NamedTuple):
    """Rows, vocabulary, the hidden sizes of student and teacher."""

    rows: int
    vocab: int
    student: int
    teacher: int

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.vocab}:{self.student}x{self.teacher}"

    @property
    def flop(self) -> int:
        """Of the four products: both sides' logits, gradients of hidden states and weight."""
        return 2 * self.rows * self.vocab * (3 * self.student + self.teacher)


_SWEEP = [*((rows, 64_000) for rows in (128, 256, 512, 1024)), (512, 16_000), (512, 128_256)]
SHAPES: dict[str, tuple[Shape, ...]] = {
    "toy": (Shape(5, 37, 8, 12),),
    "cpu": (Shape(512, 64_000, 512, 768),),
    # for the picture: time and memory against rows, and against the vocabulary
    "cpu-sweep": tuple(Shape(*size, 512, 768) for size in _SWEEP),
    "gpu": (Shape(1024, 128_256, 4096, 4096), Shape(8192, 128_256, 4096, 4096)),
    "gpu-sweep": tuple(
        Shape(rows, vocab, 4096, 4096)
        for rows, vocab in (
            *((rows, 128_256) for rows in (1024, 2048, 4096, 8192, 16_384)),
            *((8192, vocab) for vocab in (32_000, 50_257, 151_936, 256_000)),
        )
    ),
}


class Inputs(NamedTuple):
    """hidden and weight of the student, then of the teacher."""

    hidden_s: Tensor
    weight_s: Tensor
    hidden_t: Tensor
    weight_t: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Normal hidden states, and weights that make the logits' standard deviation SPREAD."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, spread: float) -> Tensor:
        x = torch.randn((rows, columns), generator=generator, dtype=dtype, device=device)
        return x.mul_(spread)

    made = []
    for size in (shape.student, shape.teacher):
        made += [normal(shape.rows, size, 1.0), normal(shape.vocab, size, SPREAD / math.sqrt(size))]
    made[0].requires_grad_()
    made[1].requires_grad_()
    return Inputs(*made)


# ---- providers: from the inputs to (loss, gradient of hidden, gradient of weight)

Step = Callable[[Inputs], "tuple[Tensor, Tensor, Tensor]"]


def _trained(loss: Callable[[Inputs], Tensor]) -> Step:
    def step(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        value = loss(inputs)
        of_hidden, of_weight = torch.autograd.grad(value, (inputs.hidden_s, inputs.weight_s))
        return value.detach(), of_hidden, of_weight

    return step


def _on_logits(call: Call) -> Callable[[Inputs], Tensor]:
    def loss(x: Inputs) -> Tensor:
        # no name for either side's logits: they are freed as soon as nobody needs them
        return call(F.linear(x.hidden_s, x.weight_s), F.linear(x.hidden_t, x.weight_t), None)

    return loss


def eager(case: Case, device: torch.device) -> Step:
    """plain torch, both logits in full"""
    return _trained(_on_logits(DENSE_PROVIDERS["eager"].build(case, device)))


def compiled(case: Case, device: torch.device) -> Step:
    """torch.compile of the same"""
    loss = _on_logits(DENSE_PROVIDERS["eager"].build(case, device))
    return _trained(torch.compile(loss, dynamic=False))


def dense(case: Case, device: torch.device) -> Step:
    """the logits in full, and fastkd's loss of them"""
    return _trained(_on_logits(DENSE_PROVIDERS["fastkd-inplace"].build(case, device)))


def linear(case: Case, device: torch.device) -> Step:
    """fastkd, logits that are never built"""

    def loss(x: Inputs) -> Tensor:
        student = fastkd.LinearLogits(x.hidden_s, x.weight_s)
        teacher = fastkd.LinearLogits(x.hidden_t, x.weight_t)
        return case.function(student, teacher, **case.options)

    return _trained(loss)


def liger(case: Case, device: torch.device) -> Step:
    """Liger-Kernel's fused linear JSD (GPU)"""
    if device.type == "cpu":
        raise Unavailable("Liger-Kernel needs a GPU, this run is on the CPU")
    betas = {"kl": 0.0, "reverse_kl": 1.0, "js": case.divergence.param}  # 0 and 1: its convention
    name = case.divergence.name
    if case.alpha is not None or name not in betas:
        raise Unavailable(f"Liger-Kernel has no fused linear {case.name}")
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except Exception as error:  # its import runs device code of its own, which may raise anything
        raise Unavailable(f"Liger-Kernel does not import ({first_line(error)})") from None
    loss = LigerFusedLinearJSD(jsd_beta=betas[name], temperature=case.temperature)
    return _trained(lambda x: loss(x.hidden_s, x.weight_s, x.hidden_t, x.weight_t))


PROVIDERS: dict[str, Callable[[Case, torch.device], Step]] = {
    "eager": eager,
    "compile": compiled,
    "liger": liger,
    "fastkd-dense": dense,
    "fastkd": linear,
}
OURS = ("fastkd-dense", "fastkd")


def bare_products(inputs: Inputs) -> Callable[[], object]:
    """The four products alone, into memory that is there: no way of computing can do with less."""
    hidden_s, weight_s, hidden_t, weight_t = (x.detach() for x in inputs)
    student, teacher = (hidden_s.new_empty(len(hidden_s), len(weight_s)) for _ in range(2))
    grad_h, grad_w = torch.empty_like(hidden_s), torch.empty_like(weight_s)

    def run() -> object:
        torch.mm(hidden_s, weight_s.t(), out=student)
        torch.mm(hidden_t, weight_t.t(), out=teacher)
        torch.mm(student, weight_s, out=grad_h)
        return torch.mm(student.t(), hidden_s, out=grad_w)

    return run


# ---- the gate


class Truth(NamedTuple):
    loss: float
    hidden: gate.Truth
    weight: gate.Truth


def truth(case: Case, inputs: Inputs) -> Truth:
    """In float64, a chunk of rows at a time."""
    hidden, weight, hidden_t, weight_t = (x.detach().double() for x in inputs)
    rows, vocab = len(hidden), len(weight)
    of_hidden, of_weight, total = torch.empty_like(hidden), torch.zeros_like(weight), 0.0
    step = max(1, gate.CHUNK // vocab)
    for start in range(0, rows, step):
        at = slice(start, start + step)
        student = (hidden[at] @ weight.t()).requires_grad_()
        logq = F.log_softmax(student / case.temperature, -1)
        logp = F.log_softmax(hidden_t[at] @ weight_t.t() / case.temperature, -1)
        values = case.divergence.value(logp, logq, case.divergence.param).sum(-1)
        loss = case.divergence.row_loss(values).sum() / rows
        (grad,) = torch.autograd.grad(loss, student)
        of_hidden[at] = grad @ weight
        of_weight += grad.t() @ hidden[at]
        total += loss.item()
    return Truth(total, gate.Truth(total, of_hidden), gate.Truth(total, of_weight))


def errors(result: tuple[Tensor, Tensor, Tensor], true: Truth) -> gate.Errors:
    """Of the loss, and of the worse of the two gradients."""
    loss, hidden, weight = result
    each = gate.errors(loss, hidden, true.hidden), gate.errors(loss, weight, true.weight)
    worse = math.nan if any(math.isnan(e.grad) for e in each) else max(e.grad for e in each)
    return gate.Errors(each[0].loss, worse)


SOFT = {name: case for name, case in DENSE.items() if case.alpha is None}


class Linear(Family):
    name = "linear"
    about = "linear: the loss with the head in it, from hidden states to their gradients."
    cases = {name: f"{case.call}, operands LinearLogits" for name, case in SOFT.items()}
    default_cases = ("kl_div",)
    providers = {name: made.__doc__ or "" for name, made in PROVIDERS.items()}
    toy_providers = tuple(name for name in PROVIDERS if name != "compile")
    shapes = SHAPES
    shape = Shape
    shape_form = "ROWSxVOCAB:STUDENTxTEACHER such as 512x64000:512x768"
    shape_sizes = r"([1-9]\d*)x([1-9]\d*):([1-9]\d*)x([1-9]\d*)"
    devices = True
    dtypes = DTYPES
    default_dtype = gpu_dtype = "bfloat16"
    seconds = 6.0
    warm_up = 0
    bases = (PRODUCTS, "eager")
    key = "shape"
    legend = """\
Time is the median of interleaved runs of loss and both gradients, 20-80 % the percentiles; TFLOP/s
counts the four products. "peak extra" is the peak memory above the inputs, the gradients included.
Loss and gradients were checked against float64 on the same input before they were timed."""

    def comparison(self, one: Input, a: argparse.Namespace) -> Comparison:
        case, shape, device = SOFT[one.case], one.shape, a.device
        inputs = make_inputs(shape, one.dtype, device)
        true = [truth(case, inputs)]
        bound = gate.bound(errors(eager(case, device)(inputs), true[0]), one.dtype)
        clock = Clock(device)

        def ready(name: str) -> Ready:
            step = PROVIDERS[name](case, device)
            found = errors(step(inputs), true[0])
            gate.check(found, bound)
            run = partial(step, inputs)
            return Ready({"step": lambda: clock(run)}, lambda: run, found, bound)

        def products() -> Ready:
            run = bare_products(inputs)
            return Ready({"step": lambda: clock(run)})

        every = [Provider(name, partial(ready, name), name in OURS) for name in a.providers]
        return Comparison(
            *(case.name, self.cases[case.name], shape.label, spelled(one.dtype), device),
            [Provider(PRODUCTS, products, yardstick=True), *every],
            shape.rows * shape.vocab * one.dtype.itemsize,
            checked=true.clear,
            figures={**shape._asdict(), "flop": shape.flop},
        )

    def finish(self, results: list[Result]) -> None:
        for result in results:
            time = result.times.get("step")
            result.figures["tflop_s"] = time and result.figures["flop"] / time.median / 1e9

    def counted(self, result: Result) -> dict[str, str]:
        return {"TFLOP/s": table.number(result.figures["tflop_s"])}

    def draw(self, groups: Sequence[Group], facts: dict[str, Any], path: Path) -> None:
        draw_lines(groups, facts, path, "step", ("rows", "vocab"))


FAMILY = Linear()
