"""python -m bench.linear [CASE ...]: the loss with the language model's head in it.

From hidden states to the gradients of the student's hidden states and weight: the bare matrix
products (the floor), the logits in full and a loss on them, and logits that are never built.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench import cli, gate, report
from bench.cases import DENSE, DTYPES, Case
from bench.measure import MAX_ROUNDS, MIN_ROUNDS, out_of_memory
from bench.providers import Unavailable, first_line
from bench.providers import eager as dense_eager
from bench.timing import Clock, Summary, no_collection, summarise
from fastkd.demo.memory import peak_extra

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


def _plain(case: Case, device: torch.device) -> Callable[[Inputs], Tensor]:
    of_logits = dense_eager(case, device)

    def loss(inputs: Inputs) -> Tensor:
        # no name for either: they are freed as soon as nobody needs them
        return of_logits(
            F.linear(inputs.hidden_s, inputs.weight_s),
            F.linear(inputs.hidden_t, inputs.weight_t),
            None,
        )

    return loss


def eager(case: Case, device: torch.device) -> Step:
    return _trained(_plain(case, device))


def compiled(case: Case, device: torch.device) -> Step:
    loss = torch.compile(_plain(case, device), dynamic=False)
    return _trained(loss)


def dense(case: Case, device: torch.device) -> Step:
    """The logits in full, and fastkd's loss of them."""
    function, options = case.function, {**case.options, "inplace": True}

    def loss(inputs: Inputs) -> Tensor:
        student = F.linear(inputs.hidden_s, inputs.weight_s)
        return function(student, F.linear(inputs.hidden_t, inputs.weight_t), **options)

    return _trained(loss)


def linear(case: Case, device: torch.device) -> Step:
    function, options = case.function, case.options

    def loss(inputs: Inputs) -> Tensor:
        student = fastkd.LinearLogits(inputs.hidden_s, inputs.weight_s)
        teacher = fastkd.LinearLogits(inputs.hidden_t, inputs.weight_t)
        return function(student, teacher, **options)

    return _trained(loss)


def liger(case: Case, device: torch.device) -> Step:
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
        loss = case.divergence.value(logp, logq, case.divergence.param).sum() / rows
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


# ---- measuring


@dataclass
class Result:
    """One provider on one case and input; status as in `bench.result.Result`."""

    case: str
    shape: Shape
    dtype: str
    provider: str
    status: str = "ok"
    note: str = ""
    time: Summary | None = None
    peak_bytes: int | None = None
    errors: gate.Errors | None = None
    bound: gate.Errors | None = None

    @property
    def tflops(self) -> float | None:
        """Those of the four products per second, whatever else was computed."""
        return None if self.time is None else self.shape.flop / self.time.median / 1e9

    @property
    def ours(self) -> bool:
        return self.provider in OURS


Say = Callable[[str], None]


def measure(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    seconds: float,
    rounds: tuple[int, int],
    say: Say,
) -> list[Result]:
    """All providers on one input, checked, then timed in turn; the bare products come first."""
    torch.compiler.reset()
    inputs = make_inputs(shape, dtype, device)
    spelled = str(dtype).removeprefix("torch.")
    say("float64 truth")
    true = truth(case, inputs)
    bound = gate.bound(errors(eager(case, device)(inputs), true), dtype)
    results = [Result(case.name, shape, spelled, PRODUCTS)]
    runs: list[Callable[[], object]] = []
    timed = [results[0]]
    for name in names:
        say(f"checking {name}")
        result = Result(case.name, shape, spelled, name, bound=bound)
        results.append(result)
        try:
            step = PROVIDERS[name](case, device)
            result.errors = errors(step(inputs), true)
            if not result.errors.within(bound):
                result.status, result.note = "wrong", f"{result.errors} above {bound}"
                continue
            block = shape.rows * shape.vocab * dtype.itemsize
            result.peak_bytes = peak_extra(lambda step=step: step(inputs), device, block)  # type: ignore[misc]
        except Unavailable as reason:
            result.status, result.note = "skipped", str(reason)
            continue
        except Exception as error:  # whatever a provider raises is its result, not ours
            told = result.ours and not out_of_memory(error)
            result.status, result.note = ("failed" if told else "skipped"), first_line(error)
            continue
        runs.append(lambda step=step: step(inputs))  # type: ignore[misc]
        timed.append(result)
    runs.insert(0, bare_products(inputs))  # not before: it holds memory of its own
    samples = _time(runs, device, seconds, rounds, say)
    for result, sample in zip(timed, samples, strict=True):
        result.time = summarise(sample)
    return results


def _time(
    runs: list[Callable[[], object]],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
    say: Say,
) -> list[list[float]]:
    clock = Clock(device)
    samples: list[list[float]] = [[] for _ in runs]
    with no_collection():
        start = time.perf_counter()
        for number in range(rounds[1]):
            spent = time.perf_counter() - start
            if number >= rounds[0] and spent > seconds:
                break
            say(f"timing, round {number + 1}, {spent:.0f} of {seconds:g} s")
            for run, sample in zip(runs, samples, strict=True):
                sample.append(clock(run))
    return samples


# ---- the table, the JSON, the command line

LEGEND = """\
Time is the median of interleaved runs of loss and both gradients, 20-80 % the percentiles; TFLOP/s
counts the four products. "peak extra" is the peak memory above the inputs, the gradients included.
Loss and gradients were checked against float64 on the same input before they were timed."""


def markdown(results: Sequence[Result]) -> str:
    """One input's table, and a line for who is missing from it."""
    first = results[0]
    times = {result.provider: result.time for result in results}
    rows = []
    for result in results:
        if result.time is None:
            continue
        row = {"provider": result.provider, "ms": f"{result.time.median:.1f}"}
        row["20-80 %"] = f"{result.time.p20:.1f} - {result.time.p80:.1f}"
        for name in (PRODUCTS, "eager"):
            base = times.get(name)
            row[f"of {name}"] = "-" if base is None else f"{result.time.median / base.median:.2f}"
        row["TFLOP/s"] = f"{result.tflops:.2f}"
        peak = result.peak_bytes
        row["peak extra"] = "-" if peak is None else f"{peak / 1e6:.1f} MB"
        rows.append(row)
    lines = [f"### {first.case}, {first.shape.label}, {first.dtype}", "", *report.table(rows)]
    missing = [result for result in results if result.status != "ok"]
    notes = [f"- {x.provider} {x.status.upper()}: {x.note}" for x in missing]
    return "\n".join([*lines, "", *notes, *([""] if notes else [])])


def as_json(results: Sequence[Result], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, JSON-ready; a number that JSON does not have is a word."""
    records = []
    for result in results:
        record = {**asdict(result), "shape": result.shape._asdict(), "flop": result.shape.flop}
        record["tflop_s"] = result.tflops
        record["time"] = result.time and result.time._asdict()
        for name in ("errors", "bound"):
            pair = getattr(result, name)
            record[name] = pair and {
                key: value if math.isfinite(value) else str(value)
                for key, value in pair._asdict().items()
            }
        records.append(record)
    return {"machine": facts, "results": records}


def _shapes(text: str) -> list[Shape]:
    shapes: list[Shape] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*):([1-9]\d*)x([1-9]\d*)", part)
        if part in SHAPES:
            shapes += SHAPES[part]
        elif sizes:
            shapes.append(Shape(*map(int, sizes.groups())))
        else:
            raise argparse.ArgumentTypeError(
                f"shapes: got {part!r}, expected ROWSxVOCAB:STUDENTxTEACHER such as "
                f"512x64000:512x768, or one of the sets {', '.join(SHAPES)}"
            )
    if not shapes:
        raise argparse.ArgumentTypeError(f"shapes: got {text!r}, expected at least one shape")
    return shapes


SOFT = {name: case for name, case in DENSE.items() if case.alpha is None}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__)
    p.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(SOFT)} (kl_div)")
    sets = ", ".join(SHAPES)
    p.add_argument("--shapes", type=_shapes, help=f"ROWSxVOCAB:STUDENTxTEACHER,... or {sets}")
    p.add_argument("--dtype", type=cli.listed(DTYPES, "dtype"), help=",".join(DTYPES))
    p.add_argument("--device", type=cli.device, help="cpu, cuda, ... (a GPU if there is one)")
    named = {name: name for name in PROVIDERS}
    p.add_argument("--providers", type=cli.listed(named, "providers"), help=",".join(PROVIDERS))
    p.add_argument("--threads", type=cli.positive(int, "threads"), help="CPU threads")
    p.add_argument("--seconds", type=cli.positive(float, "seconds"), default=6.0, help="per input")
    p.add_argument("--toy", action="store_true", help="once at a tiny size: it runs")
    p.add_argument("--json", type=cli.output, metavar="FILE", help="write everything as JSON")
    p.add_argument(
        "--plot", type=cli.output, metavar="FILE", help="time and memory against N and V"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if fastkd was wrong or failed."""
    p = parser()
    a = p.parse_args(argv)
    for name in a.cases:
        if name not in SOFT:
            p.error(f"CASE: got {name!r}, expected one of {', '.join(SOFT)}")
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    device = a.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type != "cpu"
    shapes = a.shapes or SHAPES["toy" if a.toy else "gpu" if on_gpu else "cpu"]
    names = a.providers or [name for name in PROVIDERS if not (a.toy and name == "compile")]
    rounds = (1, 1) if a.toy else (MIN_ROUNDS, MAX_ROUNDS)
    facts, say = report.machine(device), cli.Progress()
    results: list[Result] = []
    for name in a.cases or ["kl_div"]:
        for dtype in a.dtype or [torch.bfloat16]:
            for shape in shapes:
                say.prefix = f"{name} {shape.label} {str(dtype).removeprefix('torch.')}"
                try:
                    table = measure(SOFT[name], shape, dtype, device, names, a.seconds, rounds, say)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    say.clear()
                    print(f"{say.prefix} skipped: out of memory\n")
                    continue
                say.clear()
                print(markdown(table), flush=True)
                results += table
                if a.json is not None:
                    text = json.dumps(as_json(results, facts), indent=2, allow_nan=False)
                    a.json.write_text(text + "\n")
    print(report.machine_line(facts) + "\n" + LEGEND)
    if a.plot is not None:
        from bench.linear_plot import draw

        draw(results, facts, a.plot)
    return int(any(result.ours and result.status in ("wrong", "failed") for result in results))


if __name__ == "__main__":
    sys.exit(main())
