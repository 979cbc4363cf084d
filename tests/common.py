"""The inputs, the shapes, the plain torch formulas and the one tolerance rule of all tests."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd.divergence import Divergence

INF = math.inf
# -inf as the limit of a very negative logit; a sum that contains it is infinite
ALMOST_MINUS_INF = -1e60
INFINITE = 1e20


class Backend(NamedTuple):
    """A backend in force and the device of its tensors."""

    name: str
    device: torch.device


def require(name: str) -> None:
    """Skips the test where the backend cannot run; fails it where the run promised the backend."""
    if name == "gpu":
        pytest.importorskip("triton")
    if name == "cpu":
        try:
            importlib.import_module("fastkd._C")
        except ImportError:
            if os.environ.get("FASTKD_REQUIRE_CPU") == "1":
                raise
            pytest.skip("the C++ extension is not built")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter that imports the package under test."""
    root = str(Path(fastkd.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": root, **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


@contextmanager
def unreadable() -> Iterator[None]:
    """Tensors made within have no values: to read one, for which a GPU would wait, is an error."""
    with FakeTensorMode(), fastkd.use_backend("reference"):
        yield


# ---- dtypes, divergences, shapes, inputs: the axes of the tests

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
PAIRS = {
    **{name: (dtype, dtype) for name, dtype in DTYPES.items()},
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp16-bf16": (torch.float16, torch.bfloat16),
    "fp64-fp32": (torch.float64, torch.float32),
    "fp16-fp64": (torch.float16, torch.float64),
}


def label_of(divergence: Divergence) -> str:
    """Its id in a test: "kl", "js(0.5)"."""
    return f"{divergence.name}({divergence.param:g})" if divergence.parameter else divergence.name


TABLE = [fastkd.divergences[name] for name in fastkd.divergences]
# every entry with its default, and a second parameter on the other side of 1/2
DIVERGENCES = TABLE + [entry(**{entry.parameter: 0.8}) for entry in TABLE if entry.parameter]

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=label_of)
each_name = pytest.mark.parametrize("divergence", TABLE, ids=lambda entry: entry.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())


class Shape(NamedTuple):
    """Rows, columns, and why this shape is in the table."""

    rows: int
    vocab: int
    reason: str


SHAPES = [
    Shape(3, 1, "one-column"),
    Shape(4, 5, "less-than-a-vector"),
    Shape(3, 17, "one-over-a-vector"),
    Shape(5, 1000, "many-vectors-and-a-tail"),
    Shape(2, 2047, "block-minus-one"),
    Shape(2, 2048, "one-block"),
    Shape(2, 2049, "block-plus-one"),
    Shape(33, 257, "more-rows-than-threads"),
    Shape(2, 32_000, "a-real-vocabulary"),
]
INTERPRETED = {"less-than-a-vector", "one-over-a-vector", "block-plus-one"}

each_shape = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            shape,
            id=f"{shape.rows}x{shape.vocab}-{shape.reason}",
            marks=() if shape.reason in INTERPRETED else pytest.mark.not_interpreted,
        )
        for shape in SHAPES
    ],
)


def _random(n: int, v: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(n, v), 3 * torch.randn(n, v)


def _peaked(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Nearly all mass on one column: the same one on both sides in even rows, another in odd."""
    s, t = _random(n, v)
    row = torch.arange(n)
    s[row, row % v] += 40
    t[row, (row + row % 2) % v] += 40
    return s, t


def _equal(n: int, v: int) -> tuple[Tensor, Tensor]:
    s, _ = _random(n, v)
    return s, s.clone()


def _disjoint(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Each side's mass where the other's underflows to 0."""
    s, t = _random(n, v)
    s[:, : v // 2] -= 200
    t[:, v // 2 :] -= 200
    return s, t


def _large(n: int, v: int) -> tuple[Tensor, Tensor]:
    return 2e4 * torch.rand(n, v) - 1e4, 2e4 * torch.rand(n, v) - 1e4


def _offset(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Ordinary differences far from 0, on either side of it."""
    s, t = _random(n, v)
    return s + 1e4, t - 1e4


def _one_token(n: int, v: int) -> tuple[Tensor, Tensor]:
    """A one-hot teacher: -inf everywhere but in one column."""
    s, t = _random(n, v)
    hot = F.one_hot(torch.arange(n) % v, v).bool()
    return s, t.masked_fill(~hot, -INF)


def _ties(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Few different values, the largest one many times."""
    return torch.randint(-2, 3, (n, v)).float(), torch.randint(-2, 3, (n, v)).float()


def _minus_inf(n: int, v: int) -> tuple[Tensor, Tensor]:
    """A third of the columns impossible on both sides, as under a mask of the vocabulary."""
    s, t = _random(n, v)
    dead = torch.rand(n, v) < 1 / 3
    dead[:, 0] = False
    return s.masked_fill(dead, -INF), t.masked_fill(dead, -INF)


INPUTS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "random": _random,
    "peaked": _peaked,
    "equal": _equal,
    "disjoint": _disjoint,
    "large": _large,
    "offset": _offset,
    "one-token": _one_token,
    "ties": _ties,
    "minus-inf": _minus_inf,
}

# ---- operands: logits that are given, and logits that are never built

# The hidden states of a linear form are the logits and its weight is the identity: such a product
# is exact, and the gradient of the hidden states is that of the logits. So a test's body, its
# oracle and its tolerance hold as they are. Infinities do not go through a product (0 * inf).
FORMS = {
    "dense": (False, False),
    "linear-student": (True, False),
    "linear-teacher": (False, True),
    "linear": (True, True),
}
FORM_CHUNK = 2  # rows, so that a test's few rows are several chunks

each_form = pytest.mark.parametrize("form", FORMS)

# What a linear form adds does not depend on the rest, so it runs few of a test's cases. Infinities
# do not go through a product at all.
FORM_PAIRS = [PAIRS[name] for name in ("fp32", "bf16", "bf16-fp32")]
FORM_DTYPES = [DTYPES[name] for name in ("fp32", "bf16")]
FORM_INPUTS = [INPUTS[name] for name in ("random", "equal", "large")]
FORM_DIVERGENCES = [fastkd.divergences[name] for name in ("kl", "js")]


def runs_in_its_form(arguments: dict[str, Any], sampled: bool = True) -> bool:
    """Whether a case of a test, of these arguments, is run: all that are dense."""
    if arguments.get("form", "dense") == "dense":
        return True
    rest = {
        name: arguments[name]
        for name in ("pair", "make", "dtype", "divergence")
        if name in arguments
    }
    if rest.get("pair", FORM_PAIRS[0]) not in FORM_PAIRS:
        return False
    if rest.get("make") in INPUTS.values() and rest["make"] not in FORM_INPUTS:
        return False
    few = rest.get("dtype", torch.float32) in FORM_DTYPES
    return not sampled or (few and rest.get("divergence", FORM_DIVERGENCES[0]) in FORM_DIVERGENCES)


def in_form(student: Tensor, teacher: Tensor, form: str) -> tuple[Any, Any]:
    """The operands as the form has them."""
    pair = zip((student, teacher), FORMS[form], strict=True)
    return tuple(_linear(x) if linear else x for x, linear in pair)


def _linear(x: Tensor) -> fastkd.LinearLogits:
    weight = torch.eye(x.size(-1), dtype=x.dtype, device=x.device)
    return fastkd.LinearLogits(x, weight, chunk_size=FORM_CHUNK)


each_input = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())


def logits(
    backend: Backend,
    n: int,
    v: int,
    pair: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    make: Callable[[int, int], tuple[Tensor, Tensor]] = _random,
) -> tuple[Tensor, Tensor]:
    """Student and teacher [n, v] on the backend's device, rounded to their dtypes."""
    s, t = make(n, v)
    return s.to(backend.device, pair[0]), t.to(backend.device, pair[1])


# ---- plain torch: the formula that users write, and in float64 the oracle


def _log_target(logp: Tensor, logq: Tensor) -> Tensor:
    return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)


def _log_mixture(loga: Tensor, logb: Tensor, a: float) -> Tensor:
    return torch.logsumexp(torch.stack((loga + math.log(a), logb + math.log(1 - a))), 0)


def _plain_js(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    m = _log_mixture(logp, logq, beta)
    return beta * _log_target(logp, m) + (1 - beta) * _log_target(logq, m)


PLAIN: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": lambda logp, logq, _: _log_target(logp, logq),
    "reverse_kl": lambda logp, logq, _: _log_target(logq, logp),
    "js": _plain_js,
    "skew_kl": lambda logp, logq, a: _log_target(logp, _log_mixture(logp, logq, a)),
    "skew_reverse_kl": lambda logp, logq, a: _log_target(logq, _log_mixture(logq, logp, a)),
    "tv": lambda logp, logq, _: 0.5 * (logp.exp() - logq.exp()).abs().sum(-1),
}


def plain(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    t_squared: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """What `fastkd.distillation_loss` computes, in torch's own functions and the operands' dtype.

    A divergence without a formula here is taken from the table, so that adding one needs no edit.
    """
    keep, factor = row_factor(
        student, labels, ignore_index, weight, reduction=reduction, normalizer=normalizer
    )
    s, t = student[..., :vocab_size][keep], teacher[..., :vocab_size][keep]
    logq, logp = (F.log_softmax(x / temperature, -1) for x in (s, t))
    soft = (1 - alpha) * (temperature**2 if t_squared else 1.0)
    kept = soft * formula(divergence)(logp, logq, divergence.param)
    if alpha and labels is not None:
        at = labels[keep].long()
        hard = F.cross_entropy(s, at, reduction="none", label_smoothing=label_smoothing)
        kept = kept + alpha * hard
    rows = kept.new_zeros(keep.shape).masked_scatter(keep, kept) * factor.to(kept.dtype)
    return rows if reduction == "none" else rows.sum()


def row_factor(
    student: Tensor,
    labels: Tensor | None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    *,
    reduction: str,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(keep, factor) of each row: every reduction is a sum of factor * loss, or that product."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if labels is not None:
        keep = labels != ignore_index
    factor = keep.double() if weight is None else torch.where(keep, weight.double(), 0.0)
    if reduction == "batchmean":
        factor = factor / student.size(0)
    elif reduction == "mean":
        by = factor.sum() if normalizer is None else torch.as_tensor(normalizer)
        factor = factor / by.where(by != 0, INF)
    return keep, factor


def formula(divergence: Divergence) -> Callable[[Tensor, Tensor, float], Tensor]:
    """(log p, log q, parameter) to the loss of each row."""
    return PLAIN.get(divergence.name, lambda *at: divergence.value(*at).sum(-1))


# ---- the rule

# error(ours, oracle) <= 2 * error(plain torch, oracle) + floor. The floor is relative: for values
# to the larger of the value and one nat of what is summed; for gradients to the largest gradient,
# in the dtype it is stored in, and to the largest of the terms slope_j and q_j * (1 + sum of
# slopes) that it is the difference of (a slope is known up to a multiple of q), in the dtype it is
# computed in. That is float32, float64 where an operand is, and the dtype of every value.
FLOORS = {
    # the oracle is float64 too: this is its own rounding over a row of up to 1e5 columns
    torch.float64: 1e-12,
    # 16 units in the last place: exp2, log and the row's log-sum-exp, a few of them each
    torch.float32: 16 * 2.0**-23,
    # half a unit in the last place of 11 bits: the one rounding of a gradient that is stored
    torch.float16: 2.0**-11,
    # half a unit in the last place of 8 bits, likewise
    torch.bfloat16: 2.0**-8,
}


class Result(NamedTuple):
    """A loss and its gradients; None for an operand whose gradient was not asked for."""

    value: Tensor
    student: Tensor | None
    teacher: Tensor | None


def differentiate(
    function: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    *args: Any,
    form: str = "dense",
    wrt: str = "student",
    upstream: Tensor | None = None,
    **options: Any,
) -> Result:
    """Calls the loss on the operands where they lie (no copies) and differentiates it.

    wrt: "student", "teacher" or "both".
    """
    s = student.detach().requires_grad_(wrt != "teacher")
    t = teacher.detach().requires_grad_(wrt != "student")
    operands = in_form(s, t, form)
    value = function(*operands, *args, **options)
    inputs = [x for x in (s, t) if x.requires_grad]
    by = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    grads = list(torch.autograd.grad(value, inputs, by))
    grad_s = grads.pop(0) if s.requires_grad else None
    return Result(value.detach(), grad_s, grads.pop(0) if t.requires_grad else None)


def assert_as_good_as_torch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    form: str = "dense",
    wrt: str = "student",
    upstream: Tensor | None = None,
    **options: Any,
) -> Result:
    """THE tolerance rule, for the loss and the gradients of `fastkd.distillation_loss`.

    Options are those of `plain`, whose defaults (the bare divergence, T = 1) hold here too.
    """
    call: dict[str, Any] = {"alpha": 0.0, "temperature": 1.0, "t_squared": False, **options}
    call["divergence"] = divergence
    way: dict[str, Any] = {"wrt": wrt, "upstream": upstream}
    ours = differentiate(
        fastkd.distillation_loss, student, teacher, labels, form=form, **way, **call
    )
    torchs, exact = (
        differentiate(plain, s, t, labels, **way, **call)
        for s, t in ((student, teacher), (oracle(student), oracle(teacher)))
    )
    wide = torch.float64 in (student.dtype, teacher.dtype)
    assert ours.value.dtype == (torch.float64 if wide else torch.float32)
    alpha, temperature = call["alpha"], call["temperature"]
    soft = (1 - alpha) * (temperature**2 if call["t_squared"] else 1.0)
    assert_values(ours.value, torchs.value, exact.value, alpha + soft)
    finite = exact.value < INFINITE  # an infinite loss has no gradient to compare
    if not finite.dim() and not finite:
        return ours
    accumulation = FLOORS[ours.value.dtype]
    for operand, mine, its, true in (
        (student, ours.student, torchs.student, exact.student),
        (teacher, ours.teacher, torchs.teacher, exact.teacher),
    ):
        if mine is not None and its is not None and true is not None:
            assert mine.shape == operand.shape and mine.dtype == operand.dtype
            of = "student" if operand is student else "teacher"
            terms = _largest_term(student, teacher, labels, of, upstream, call)
            if finite.dim():
                mine, its, true = mine[finite], its[finite], true[finite]
            assert_gradients(mine, its, true, accumulation * terms)
    return ours


def _largest_term(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    of: str,
    upstream: Tensor | None,
    call: dict[str, Any],
) -> float:
    """max over rows and columns of what the gradient of one side is the difference of."""
    vocab, temperature = call.get("vocab_size"), call["temperature"]
    s, t = (oracle(x[..., :vocab].nan_to_num(0.0, INF, -INF)) for x in (student, teacher))
    logq, logp = ((x / temperature).log_softmax(-1).requires_grad_() for x in (s, t))
    at = logq if of == "student" else logp
    loss = formula(call["divergence"])(logp, logq, call["divergence"].param)
    (slope,) = torch.autograd.grad(loss.sum(), at)
    size = slope.abs() + at.detach().exp() * (1 + slope.abs().sum(-1, keepdim=True))
    size = torch.where((loss < INFINITE).unsqueeze(-1), size, 0.0).amax(-1)
    square = temperature**2 if call["t_squared"] else 1.0
    size = call["alpha"] + (1 - call["alpha"]) * square / temperature * size
    names = ("ignore_index", "weight", "normalizer")
    options = {name: call[name] for name in names if name in call}
    reduction = call.get("reduction", "mean")
    _, share = row_factor(student, labels, reduction=reduction, **options)
    if upstream is not None:
        share = share * upstream
    return float((size * share.abs()).max()) if size.numel() else 0.0


def oracle(x: Tensor) -> Tensor:
    """The same numbers in float64, -inf as the limit it stands for."""
    return x.detach().double().clamp(min=ALMOST_MINUS_INF)


def assert_values(ours: Tensor, torchs: Tensor, exact: Tensor, nat: float = 1.0) -> None:
    """The rule, element by element; where plain torch is not finite, it excuses nothing."""
    infinite = exact > INFINITE
    assert ((ours == INF) | ~infinite).all(), f"expected inf in {infinite}, got {ours}"
    mine, its, true = (x.double()[~infinite] for x in (ours, torchs, exact))
    excuse = 2 * (its - true).abs()
    allowed = torch.where(excuse.isfinite(), excuse, 0.0)
    allowed = allowed + FLOORS[ours.dtype] * true.abs().clamp(min=nat)
    error = (mine - true).abs()
    worst = int((error - allowed).argmax()) if error.numel() else 0
    assert bool((error <= allowed).all()), (
        f"value: error {error.view(-1)[worst]:.3e}, allowed {allowed.view(-1)[worst]:.3e} "
        f"(got {mine.view(-1)[worst]:.9g}, torch {its.view(-1)[worst]:.9g}, "
        f"exact {true.view(-1)[worst]:.9g})"
    )


def assert_gradients(ours: Tensor, torchs: Tensor, exact: Tensor, rounding: float = 0.0) -> None:
    """The rule, in the largest error, relative to the largest gradient.

    rounding: error of the terms that the gradient is the difference of.
    """
    if exact.numel() == 0:
        return
    mine, its, true = ours.double(), torchs.double(), exact.double()
    excuse = 2 * (its - true).abs()
    allowed = excuse.where(excuse.isfinite(), 0.0).max() + rounding
    allowed = allowed + FLOORS[ours.dtype] * true.abs().max()
    stored = torch.finfo(ours.dtype)  # half of the smallest number, where the gradient is subnormal
    allowed = allowed + stored.smallest_normal * stored.eps / 2
    error = (mine - true).abs().max()
    assert bool(error <= allowed), (
        f"gradient: error {error:.3e}, allowed {allowed:.3e}, largest gradient "
        f"{true.abs().max():.3e}"
    )
