"""Stored teachers: what a TopK of a few columns and a tail costs, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    FLOORS,
    INF,
    TABLE,
    Backend,
    Result,
    assert_gradients,
    assert_values,
    each_divergence,
    each_dtype,
    each_name,
    formula,
    label_of,
    oracle,
)
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence
from fastkd.operands import TAILS

each_tail = pytest.mark.parametrize("tail", TAILS)
# rows, columns, named columns
SIZES = [(3, 5, 2), (4, 10, 10), (3, 100, 8), (2, 2049, 40), (2, 20_000, 64)]
each_size = pytest.mark.parametrize(
    "size",
    [
        pytest.param(
            size,
            id="x".join(map(str, size)),
            marks=pytest.mark.not_interpreted if size[1] > 2048 else (),
        )
        for size in SIZES
    ],
)


def stored(
    logits: Tensor, k: int, tail: str = "bucket", temperature: float = 1.0, **options: Any
) -> fastkd.TopK:
    """A teacher whose columns come in no order, a few of its places empty."""
    top = fastkd.topk_from_logits(logits.double(), k, temperature=temperature)
    order = torch.rand(top.shape, device=logits.device).argsort(-1)
    values, at = (x.gather(-1, order) for x in (top.logprobs, top.indices))
    pad = F.pad(at, (1, 2), value=-1)
    return fastkd.TopK(
        F.pad(values, (1, 2), value=7.0).to(torch.float32),
        pad.to(options.pop("index", torch.int32)),
        tail_logprob=None if top.tail_logprob is None else top.tail_logprob.float(),
        temperature=temperature,
        tail=tail,
        **options,
    )


def plain(
    student: Tensor,
    teacher: fastkd.TopK,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definitions, one row after the other, in the student's dtype: the mean over rows."""
    loss_of = formula(divergence)
    losses = []
    for row in range(student.size(0)):
        if labels is not None and labels[row] == -100:
            continue
        x = student[row]
        logq = F.log_softmax(x / temperature, -1)
        named = teacher.indices[row] >= 0
        at = teacher.indices[row][named].long()
        logp = teacher.logprobs[row][named].to(x.dtype)
        off = torch.ones_like(x, dtype=torch.bool)
        off[at] = False
        if teacher.tail in ("renormalize", "restrict"):
            logp = F.log_softmax(logp * (teacher.temperature / temperature), -1)
        if teacher.tail == "restrict":
            p, q = logp, F.log_softmax(x[at] / temperature, -1)
        elif teacher.tail == "drop":
            p, q = logp, logq[at]
        elif teacher.tail == "renormalize":
            p = torch.full_like(logq, -1e30).index_put((at,), logp)
            q = logq
        else:
            p, q = logp, logq[at]
            if bool(off.any()):
                tail = teacher.tail_logprob
                rest = torch.log1p(-logp.exp().sum()) if tail is None else tail[row].to(x.dtype)
                p = torch.cat((logp, rest[None].clamp(min=-1e30)))
                q = torch.cat((q, logq[off].logsumexp(-1, keepdim=True)))
        loss = loss_of(p[None], q[None], divergence.param)[0]
        if alpha and labels is not None:
            hard = F.cross_entropy(x, labels[row], label_smoothing=label_smoothing)
            loss = (1 - alpha) * loss + alpha * hard
        losses.append(loss)
    return torch.stack(losses).mean()


def differentiated(
    function: Callable[..., Tensor],
    student: Tensor,
    teacher: fastkd.TopK,
    *args: Any,
    **options: Any,
) -> Result:
    s = student.detach().requires_grad_(True)
    value = function(s, teacher, *args, **options)
    (grad,) = torch.autograd.grad(value, s)
    return Result(value.detach(), grad, None)


def fused(student: Tensor, teacher: fastkd.TopK, *args: Any, **options: Any) -> Tensor:
    return fastkd.distillation_loss(
        student, teacher, *args, **{"alpha": 0.0, "temperature": 1.0, "t_squared": False, **options}
    )


def assert_as_good_as_torch(
    student: Tensor, teacher: fastkd.TopK, labels: Tensor | None = None, **options: Any
) -> Result:
    """The one rule, against the definitions in float64."""
    ours = differentiated(fused, student, teacher, labels, **options)
    torchs = differentiated(plain, student.float(), teacher, labels, **options)
    exact = differentiated(plain, oracle(student), teacher, labels, **options)
    if exact.value > 1e20:  # reverse_kl against a column that the teacher excludes
        assert ours.value == INF
        return ours
    assert_values(ours.value, torchs.value, exact.value)
    assert ours.student is not None and exact.student is not None and torchs.student is not None
    assert ours.student.dtype == student.dtype
    steepness = 1.0 / options.get("temperature", 1.0)
    rounding = FLOORS[ours.value.dtype] * steepness * (1.0 + float(exact.value.abs()))
    assert_gradients(ours.student, torchs.student, exact.student, rounding)
    return ours


def random(backend: Backend, n: int, v: int, dtype: torch.dtype = torch.float32) -> Any:
    student, teacher = 3 * torch.randn(n, v), 3 * torch.randn(n, v)
    return student.to(backend.device, dtype), teacher.to(backend.device)


@each_size
@each_tail
@each_divergence
def test_definitions(
    backend: Backend, divergence: Divergence, tail: str, size: tuple[int, int, int]
) -> None:
    n, v, k = size
    student, teacher = random(backend, n, v)
    assert_as_good_as_torch(student, stored(teacher, k, tail), divergence=divergence)


@each_dtype
@each_tail
@each_name
def test_dtypes(backend: Backend, divergence: Divergence, tail: str, dtype: torch.dtype) -> None:
    student, teacher = random(backend, 4, 300, dtype)
    assert_as_good_as_torch(student, stored(teacher, 12, tail), divergence=divergence)


@each_tail
@each_name
@pytest.mark.parametrize("temperature", [0.05, 2.0, 100.0])
def test_temperatures(
    backend: Backend, divergence: Divergence, tail: str, temperature: float
) -> None:
    student, teacher = random(backend, 3, 50)
    kept = stored(teacher, 6, tail, temperature)
    assert_as_good_as_torch(student, kept, divergence=divergence, temperature=temperature)


@each_tail
@each_name
def test_hard_labels_beside_it(backend: Backend, divergence: Divergence, tail: str) -> None:
    student, teacher = random(backend, 5, 3000)
    kept = stored(teacher, 9, tail)
    labels = torch.randint(0, 3000, (5,), device=backend.device)
    labels[0], labels[1] = kept.indices[0].max(), -100  # a named column, and an ignored row
    options: dict[str, Any] = {"alpha": 0.3, "label_smoothing": 0.1, "divergence": divergence}
    ours = assert_as_good_as_torch(student, kept, labels, **options)
    assert ours.student is not None and not ours.student[1].any()


@each_tail
def test_all_columns_named_is_the_dense_loss(backend: Backend, tail: str) -> None:
    student, teacher = random(backend, 4, 40)
    kept = stored(teacher, 40, tail)
    for name in fastkd.divergences:
        dense = differentiated(fused, student, teacher, divergence=name)
        ours = differentiated(fused, student, kept, divergence=name)
        torch.testing.assert_close(ours.value, dense.value, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(ours.student, dense.student, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("k", [3, 40])
def test_a_tail_that_was_not_measured(backend: Backend, k: int) -> None:
    """It is worked out of the others; a row that names every column has none."""
    student, teacher = random(backend, 6, 40)
    kept = stored(teacher, k, "bucket")
    bare = fastkd.TopK(kept.logprobs, kept.indices, temperature=kept.temperature)
    for name in fastkd.divergences:
        measured = fused(student, kept, divergence=name, reduction="none")
        worked_out = fused(student, bare, divergence=name, reduction="none")
        torch.testing.assert_close(worked_out, measured, rtol=1e-4, atol=1e-5)


@each_divergence
def test_bucket_is_at_most_the_full_divergence_and_zero_where_equal(
    backend: Backend, divergence: Divergence
) -> None:
    student, teacher = random(backend, 6, 200)
    kept = fastkd.topk_from_logits(teacher, 10)
    full = fused(student, teacher, divergence=divergence, reduction="none")
    bucket = fused(student, kept, divergence=divergence, reduction="none")
    assert bool((bucket <= full * (1 + 1e-5)).all()) and bool((bucket > 0).all())
    same = differentiated(fused, teacher, kept, divergence=divergence)
    assert abs(float(same.value)) < 1e-6
    assert same.student is not None
    if divergence.name != "tv":  # whose gradient is of size q however small the difference
        assert float(same.student.abs().max()) < 1e-6


def test_drop_may_fall_below_zero(backend: Backend) -> None:
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0]], device=backend.device)
    student = torch.tensor([[9.0, 0.0, 0.0, 0.0]], device=backend.device)
    kept = fastkd.topk_from_logits(teacher, 1, tail="drop")
    assert float(fastkd.kl_div(student, kept)) < 0 < float(fastkd.kl_div(student, teacher))


@each_name
def test_far_tail_of_a_certain_student(backend: Backend, divergence: Divergence) -> None:
    """The student's tail mass is e^-150 of its row: no difference of sums has a digit of it."""
    student, teacher = random(backend, 3, 5000)
    student = student.sub(150).index_fill(-1, torch.arange(4, device=backend.device), 10.0)
    kept = stored(teacher.index_fill(-1, torch.arange(4, device=backend.device), 9.0), 4)
    assert_as_good_as_torch(student, kept, divergence=divergence)


@pytest.mark.parametrize("offset", [-1e4, 1e4, 3e37])
def test_logits_far_from_zero(backend: Backend, offset: float) -> None:
    student, teacher = random(backend, 3, 300)
    if abs(offset) > 1e30:
        student = student * 1e37
    else:
        student = student + offset
    assert_as_good_as_torch(student, stored(teacher, 7), divergence=fastkd.divergences.tv)


def test_measured_tail_is_used(backend: Backend) -> None:
    """1 - sum of p, of float16 probabilities, is off; the tail measured at capture is not."""
    teacher = torch.full((1, 1000), -20.0, device=backend.device)
    teacher[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    student = teacher.clone()
    student[0, 3:] += 5
    kept = fastkd.topk_from_logits(teacher, 3)
    assert kept.tail_logprob is not None
    assert float(kept.tail_logprob) == pytest.approx(-16.5, abs=0.2)
    coarse = fastkd.TopK(kept.logprobs, kept.indices)
    exact = fastkd.reverse_kl_div(student.double(), teacher.double())
    measured = fastkd.reverse_kl_div(student, kept)
    assert float(measured) == pytest.approx(float(exact), rel=5e-3)
    assert float(fastkd.reverse_kl_div(student, coarse)) != pytest.approx(float(exact), rel=5e-3)


@each_tail
@each_name
@pytest.mark.parametrize("bias", [False, True])
def test_linear_student(backend: Backend, divergence: Divergence, tail: str, bias: bool) -> None:
    n, v, h = 7, 90, 12
    hidden = torch.randn(n, h, device=backend.device, requires_grad=True)
    weight = torch.randn(v, h, device=backend.device, requires_grad=True)
    b = torch.randn(v, device=backend.device, requires_grad=True) if bias else None
    kept = stored(3 * torch.randn(n, v, device=backend.device), 6, tail)
    labels = torch.randint(0, v, (n,), device=backend.device)
    labels[2] = -100
    inputs = [x for x in (hidden, weight, b) if x is not None]
    losses, grads = [], []
    for student in (
        fastkd.LinearLogits(hidden, weight, b, softcap=20.0, chunk_size=3),
        torch.tanh(F.linear(hidden, weight, b) / 20.0) * 20.0,
    ):
        loss = fastkd.distillation_loss(
            student, kept, labels, alpha=0.2, temperature=1.0, divergence=divergence
        )
        losses.append(loss.detach())
        if bool(loss.isfinite()):
            grads.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for ours, dense in zip(*grads, strict=True) if grads else ():
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@each_tail
def test_reductions_weights_and_ignored_rows(backend: Backend, tail: str, reduction: str) -> None:
    student, teacher = random(backend, 6, 70)
    kept = stored(teacher, 5, tail)
    labels = torch.tensor([1, -100, 2, 3, -100, 4], device=backend.device)
    weight = torch.rand(6, device=backend.device) + 0.5
    student[1] = kept.logprobs[4] = torch.nan  # rows that nobody may read
    kept.indices[1] = 10**6
    rows = fastkd.kl_div(student, kept, labels=labels, reduction="none")
    assert rows.shape == (6,) and rows[1] == 0 == rows[4]
    whole = fastkd.kl_div(student, kept, labels=labels, weight=weight, reduction=reduction)
    scaled = rows * weight
    by = {"mean": weight[labels >= 0].sum(), "batchmean": 6.0, "sum": 1.0, "none": 1.0}[reduction]
    expected = (scaled if reduction == "none" else scaled.sum()) / by
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tail", ["bucket", "restrict"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_inplace(kernels: Backend, tail: str, alpha: float) -> None:
    student, teacher = random(kernels, 5, 9000)
    kept = stored(teacher, 20, tail)
    labels = torch.randint(0, 9000, (5,), device=kernels.device)
    grads = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_(True)
        logits = leaf * 1.0
        loss = fused(logits, kept, labels, alpha=alpha, inplace=inplace)
        (grad,) = torch.autograd.grad(loss, leaf)
        grads.append(grad)
        if inplace:
            torch.testing.assert_close(logits.detach(), grad)
    assert torch.equal(*grads)


def test_memory_of_one_gradient_and_leading_dimensions(backend: Backend) -> None:
    student, teacher = random(backend, 6, 30)
    kept = stored(teacher, 4)
    flat = differentiated(fused, student, kept)
    assert flat.student is not None
    shaped = fastkd.TopK(
        kept.logprobs.view(2, 3, -1),
        kept.indices.view(2, 3, -1),
        tail_logprob=None if kept.tail_logprob is None else kept.tail_logprob.view(2, 3),
    )
    whole = differentiated(fused, student.view(2, 3, 30), shaped)
    assert whole.student is not None
    assert torch.equal(whole.student.view(6, 30), flat.student)
    assert torch.equal(whole.value, flat.value)


def test_rows_share_threads_and_bits(kernels: Backend) -> None:
    student, teacher = random(kernels, 3, 70_000)
    kept = stored(teacher, 64)
    threads, grads = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            grads.append(differentiated(fused, student, kept).student)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_second_backward_and_upstream(backend: Backend) -> None:
    student, teacher = random(backend, 3, 60)
    student.requires_grad_(True)
    for reduction in ("mean", "none"):
        loss = fused(student, stored(teacher, 5), reduction=reduction).sum() * 3.0
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        (second,) = torch.autograd.grad(loss, student)
        assert torch.equal(first, second)


@pytest.mark.not_interpreted
@each_tail
@each_name
def test_gradcheck(backend: Backend, divergence: Divergence, tail: str) -> None:
    if divergence.name == "reverse_kl" and tail == "renormalize":
        pytest.skip("infinite by definition")
    student = torch.randn(2, 6, dtype=torch.float64, device=backend.device, requires_grad=True)
    kept = stored(torch.randn(2, 6, device=backend.device), 3, tail)
    for reduction in ("sum", "none"):
        run = lambda x: fused(x, kept, divergence=divergence, reduction=reduction)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, student)
    assert torch.autograd.gradgradcheck(run, student)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_gradient_of_logprobs(backend: Backend, tail: str) -> None:
    student, teacher = random(backend, 3, 30)
    kept = stored(teacher, 4, tail)
    logprobs = kept.logprobs.masked_fill(kept.indices < 0, -1.0).requires_grad_(True)
    wanted = fastkd.TopK(logprobs, kept.indices, tail=tail)
    (grad,) = torch.autograd.grad(fused(student, wanted), logprobs)
    exact = logprobs.detach().double().requires_grad_(True)
    again = fastkd.TopK(exact, kept.indices, tail=tail)
    loss = plain(student.double(), again, divergence=fastkd.divergences.kl)
    (expected,) = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_only_labels_count(backend: Backend, hard: float) -> None:
    """alpha = 1: the teacher is not read, whatever it holds."""
    student, teacher = random(backend, 3, 20)
    labels = torch.tensor([1, 2, 3], device=backend.device)
    broken = stored(teacher, 4)
    broken.logprobs.fill_(torch.nan)
    loss = fastkd.distillation_loss(student, broken, labels, alpha=1.0, temperature=1.0)
    torch.testing.assert_close(loss, F.cross_entropy(student, labels))


@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
@pytest.mark.parametrize("tail", ["bucket", "restrict"])
def test_compiled(tail: str, linear: bool) -> None:
    n, v, k, h = 6, 64, 5, 8
    hidden, weight = torch.randn(n, h), torch.randn(v, h)
    kept = stored(torch.randn(n, v), k, tail)

    def step(hidden: Tensor, weight: Tensor, logprobs: Tensor, indices: Tensor) -> Tensor:
        teacher = fastkd.TopK(logprobs, indices, tail=tail)
        student = fastkd.LinearLogits(hidden, weight) if linear else hidden @ weight.t()
        return fastkd.kl_div(student, teacher)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (step, compiled):
        leaves = [hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)]
        loss = run(*leaves, kept.logprobs, kept.indices)
        grads.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


def test_opcheck() -> None:
    kept = stored(torch.randn(3, 20), 4)
    rows = fastkd.topk.topk(
        kept, 1.0, 20, None, torch.float32, fastkd.backends.base.pick(kept.device)
    )
    plan = ("kl", 0.0, 1.0, 1.0, 0.0, 0.0, 20, 20)
    student = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.fastkd.topk_loss, (student, *rows, None, None, *plan))
    scale = torch.rand(3)
    torch.library.opcheck(
        torch.ops.fastkd.topk_grad, (student.detach(), *rows, None, None, scale, *plan)
    )


# ---- bad input


def test_refused_operands() -> None:
    p, i = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    for what, error, build in (
        ("logprobs: got list", TypeError, lambda: fastkd.TopK([0.0], i)),
        ("logprobs: got a tensor", TypeError, lambda: fastkd.TopK(i, i)),
        ("logprobs: got shape", ValueError, lambda: fastkd.TopK(p[:, :0], i[:, :0])),
        ("indices: got a tensor", TypeError, lambda: fastkd.TopK(p, i.float())),
        ("indices: got a tensor", TypeError, lambda: fastkd.TopK(p, i.to(torch.int16))),
        ("indices: got shape", ValueError, lambda: fastkd.TopK(p, i[:1])),
        ("tail_logprob: got shape", ValueError, lambda: fastkd.TopK(p, i, tail_logprob=p)),
        ("tail: got 'rest'", ValueError, lambda: fastkd.TopK(p, i, tail="rest")),
        ("temperature: got 0", ValueError, lambda: fastkd.TopK(p, i, temperature=0)),
        ("temperature: got str", TypeError, lambda: fastkd.TopK(p, i, temperature="1")),
    ):
        with pytest.raises(error, match=what):
            build()


def _kept(**changes: Any) -> fastkd.TopK:
    given = {"logprobs": [[-1.0, -2.0], [-1.0, -2.0]], "indices": [[0, 3], [4, 1]], **changes}
    tensors = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    return fastkd.TopK(tensors.pop("logprobs"), tensors.pop("indices"), **tensors)


REFUSED: dict[str, tuple[str, Callable[[], fastkd.TopK]]] = {
    "index": (
        "indices: got 5 in row 1, place 0",
        lambda: _kept(indices=torch.tensor([[0, 3], [5, 1]])),
    ),
    "negative": ("indices: got -2", lambda: _kept(indices=torch.tensor([[0, 3], [4, -2]]))),
    "twice": ("for the second time", lambda: _kept(indices=torch.tensor([[0, 3], [4, 4]]))),
    "positive": (
        "got 0.5 in row 1, place 1, expected a log-probability",
        lambda: _kept(logprobs=torch.tensor([[-1.0, -2.0], [-9.0, 0.5]])),
    ),
    "nan": (
        "got nan in row 0",
        lambda: _kept(logprobs=torch.tensor([[-1.0, torch.nan], [-1.0, -2.0]])),
    ),
    "mass": ("a mass of 1.2", lambda: _kept(logprobs=torch.tensor([[-1.0, -2.0], [-0.1, -1.1]]))),
    "tail": (
        "tail_logprob: got 0.5 in row 0",
        lambda: _kept(tail_logprob=torch.tensor([0.5, -1.0])),
    ),
    "empty": (
        "no column with a probability above 0 in row 1",
        lambda: _kept(indices=torch.tensor([[0, 3], [-1, -1]]), tail="restrict"),
    ),
    "rows": ("teacher: got shape", lambda: _kept()[:1]),
    "temperature": (
        "temperature: got 1 with a teacher stored at 2",
        lambda: _kept(temperature=2.0),
    ),
}


@pytest.mark.interpreted(len(REFUSED))
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_loss(backend: Backend, name: str) -> None:
    message, make = REFUSED[name]
    student = torch.randn(2, 5, device=backend.device)
    before = student.clone()
    with fastkd.checked(), pytest.raises(ValueError, match=message):
        fastkd.kl_div(student, make().to(backend.device), inplace=True)
    assert torch.equal(student, before)


@pytest.mark.interpreted(24)
@pytest.mark.parametrize("divergence", TABLE, ids=label_of)
@pytest.mark.parametrize("tail", TAILS)
def test_unchecked_indices_make_their_row_nan(
    backend: Backend, divergence: Divergence, tail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: nothing is read out of bounds."""
    monkeypatch.setattr("fastkd.topk.reads_values", lambda device: False)
    student = torch.randn(2, 5, device=backend.device, requires_grad=True)
    # the good row names all that it may not exclude: reverse_kl has no +inf
    indices = [[0, 1, 2, 3, 4], [5, 1, 0, 2, 3]]
    logprobs = torch.full((2, 5), 0.15).log()
    bad = fastkd.TopK(logprobs, torch.tensor(indices), tail=tail).to(backend.device)
    loss = fastkd.distillation_loss(
        student, bad, alpha=0.0, temperature=1.0, divergence=divergence, reduction="none"
    )
    assert loss[0].isfinite() and loss[1].isnan()
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad[0].isfinite().all() and grad[1].isnan().all()


def test_unchecked_indices_make_their_row_nan_compiled() -> None:
    student = torch.randn(2, 5, requires_grad=True)
    bad = _kept(indices=[[0, 3], [5, 1]])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return fastkd.reverse_kl_div(x, bad, reduction="none")

    loss = step(student)
    assert loss[0].isfinite() and loss[1].isnan()
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad[0].isfinite().all() and grad[1].isnan().all()


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_another_temperature_is_refused(tail: str) -> None:
    kept = _kept(temperature=2.0, tail=tail)
    with pytest.raises(ValueError, match="stored at 2 and tail="):
        fastkd.kl_div(torch.randn(2, 5), kept, temperature=1.5)


def test_renormalized_at_another_temperature_is_exact(backend: Backend) -> None:
    teacher = 3 * torch.randn(4, 30, device=backend.device)
    student = torch.randn(4, 30, device=backend.device)
    kept = fastkd.topk_from_logits(teacher, 5, temperature=2.0, tail="renormalize")
    again = fastkd.topk_from_logits(teacher, 5, temperature=0.7, tail="renormalize")
    ours, expected = (fastkd.kl_div(student, x, temperature=0.7) for x in (kept, again))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_vocab_size_bounds_the_indices(backend: Backend) -> None:
    student = torch.randn(2, 9, device=backend.device, requires_grad=True)
    kept = _kept().to(backend.device)
    padded = fastkd.kl_div(student, kept, vocab_size=5)
    torch.testing.assert_close(padded, fastkd.kl_div(student[:, :5].contiguous(), kept))
    (grad,) = torch.autograd.grad(padded, student)
    assert not grad[:, 5:].any()
    with pytest.raises(ValueError, match="vocab_size: got 10"):
        fastkd.kl_div(student, kept, vocab_size=10)


# ---- from logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_topk_from_logits(backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    logits = (4 * torch.randn(2, 5, 700, device=backend.device)).to(dtype)
    kept = fastkd.topk_from_logits(logits, 11, temperature=temperature)
    full = F.log_softmax(logits.double() / temperature, -1)
    best = full.topk(11, -1)
    assert kept.shape == (2, 5, 11) and kept.indices.dtype == torch.int32
    torch.testing.assert_close(kept.logprobs.double(), best.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        full.gather(-1, kept.indices.long()), best.values, rtol=0.0, atol=1e-12
    )
    rest = full.scatter(-1, best.indices, -INF).logsumexp(-1)
    assert kept.tail_logprob is not None
    torch.testing.assert_close(kept.tail_logprob.double(), rest, rtol=1e-5, atol=1e-5)


def test_tail_is_measured_without_cancellation() -> None:
    logits = torch.full((1, 1000), -60.0)
    logits[0, 7] = 0.0
    kept = fastkd.topk_from_logits(logits, 1)
    assert kept.tail_logprob is not None
    assert float(kept.tail_logprob) == pytest.approx(-60 + math.log(999), rel=1e-6)
    everything = fastkd.topk_from_logits(logits, 1000)
    assert everything.tail_logprob is not None and float(everything.tail_logprob) == -INF


@pytest.mark.parametrize("method", ["top", "sample"])
def test_from_linear_logits(method: str) -> None:
    hidden, weight, bias = torch.randn(9, 6), torch.randn(50, 6), torch.randn(50)
    linear = fastkd.LinearLogits(hidden, weight, bias, scale=0.7, softcap=9.0)
    dense = torch.tanh(0.7 * F.linear(hidden, weight, bias) / 9.0) * 9.0
    made = [
        fastkd.topk_from_logits(x, 4, method=method, generator=torch.Generator().manual_seed(3))
        for x in (linear, dense)
    ]
    torch.testing.assert_close(made[0].logprobs, made[1].logprobs)
    assert torch.equal(made[0].indices, made[1].indices)


def test_samples_are_unbiased() -> None:
    """The mean of many draws' shares is p, and of kl_div's gradients (q - p)."""
    torch.manual_seed(11)
    p_logits, student = torch.randn(1, 12), torch.randn(1, 12).requires_grad_(True)
    many = p_logits.expand(20_000, 12)
    kept = fastkd.topk_from_logits(many, 6, method="sample")
    shares = torch.zeros(20_000, 13).scatter_add_(
        1, kept.indices.long().where(kept.indices >= 0, 12), kept.logprobs.exp()
    )[:, :12]
    torch.testing.assert_close(shares.sum(1), torch.ones(20_000))
    p = p_logits.softmax(-1)[0]
    error = (p * (1 - p) / 6 / 20_000).sqrt()
    assert bool(((shares.mean(0) - p).abs() < 5 * error).all())
    loss = fastkd.kl_div(student.expand(20_000, 12), kept)
    (grad,) = torch.autograd.grad(loss, student)
    exact = student.detach().softmax(-1)[0] - p
    assert bool(((grad[0] - exact).abs() < 5 * error + 1e-6).all())


@pytest.mark.parametrize(("vocab", "k"), [(7, 3), (64, 2), (101, 3), (1000, 4), (1000, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_draws_have_the_probabilities_of_the_columns(
    vocab: int, k: int, dtype: torch.dtype
) -> None:
    """chi^2 over the columns, in pieces of a row that do and do not divide it, and without them."""
    generator = torch.Generator().manual_seed(vocab + k)
    logits = (2 * torch.randn(vocab, generator=generator)).to(dtype)
    logits[::5] = -INF
    rows = 60_000 // k
    kept = fastkd.topk_from_logits(
        logits.expand(rows, vocab), k, method="sample", temperature=1.5, generator=generator
    )
    assert torch.equal(
        (kept.logprobs.double().exp() * k).round().sum(-1), torch.full((rows,), float(k)).double()
    )
    columns = kept.indices.long()
    counts = torch.zeros(vocab + 1, dtype=torch.float64)
    shares = kept.logprobs.double().exp() * k
    counts.index_add_(0, columns.where(columns >= 0, vocab).flatten(), shares.flatten())
    p = (logits.double() / 1.5).softmax(-1)
    assert not counts[:vocab][p == 0].any() and not counts[vocab]
    expected = p * rows * k
    often = expected > 5  # and what is rarer as one
    found, wanted = (
        torch.cat([x[often], x[~often].sum().view(1)]) for x in (counts[:vocab], expected)
    )
    degrees = int(often.sum()) - int(p[~often].sum() == 0)
    chi = float(((found - wanted).square() / wanted.clamp_min(1e-30)).sum())
    # Wilson and Hilferty's normal approximation; 4.5 of it is 3e-6
    normal = ((chi / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
    assert abs(normal) < 4.5, f"chi^2 {chi:.1f} of {degrees} degrees"


def test_draws_are_those_of_the_generator_alone() -> None:
    """Not of the threads, nor of the other rows; pieces or not, they invert one function."""
    x = torch.randn(40, 999, generator=torch.Generator().manual_seed(1))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        draw = torch.Generator().manual_seed(7)
        found.append(fastkd.topk_from_logits(x, 5, method="sample", generator=draw))
    torch.set_num_threads(threads)
    assert torch.equal(found[0].indices, found[1].indices)
    assert torch.equal(found[0].logprobs, found[1].logprobs)
    uniform = torch.rand(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    below = x.double().softmax(-1).cumsum(-1)
    for row, drawn in enumerate(torch.searchsorted(below, uniform, right=True)):
        assert found[0].indices[row][found[0].indices[row] >= 0].tolist() == sorted(
            {*drawn.tolist()}
        )


def test_a_row_without_probabilities_is_nan_when_sampled() -> None:
    for vocab in (5, 100):
        x = torch.zeros(3, vocab)
        x[0, 2], x[1] = math.nan, -INF
        kept = fastkd.topk_from_logits(x, 2, method="sample")
        assert kept.logprobs.isnan().all(-1).tolist() == [True, True, False]
        assert int(kept.indices.max()) < vocab


def test_samples_of_a_certain_teacher() -> None:
    logits = torch.full((2, 5), -INF)
    logits[:, 3] = 1.0
    kept = fastkd.topk_from_logits(logits, 4, method="sample")
    assert kept.indices.tolist() == [[3, -1, -1, -1]] * 2
    assert kept.logprobs[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("k: got 0", ValueError, {"k": 0}),
        ("k: got 6, expected 1 <= k <= 5", ValueError, {"k": 6}),
        ("k: got bool", TypeError, {"k": True}),
        ("method: got 'best'", ValueError, {"k": 2, "method": "best"}),
        ("temperature: got -1", ValueError, {"k": 2, "temperature": -1}),
        ("vocab_size: got 9", ValueError, {"k": 2, "vocab_size": 9}),
    ],
)
def test_topk_from_logits_refuses(
    message: str, error: type[Exception], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        fastkd.topk_from_logits(torch.randn(2, 5), **options)


def test_moves_slices_and_says_what_it_is() -> None:
    kept = _kept(tail_logprob=[-2.0, -3.0])
    row = kept[1]
    assert row.shape == (2,) and row.tail_logprob is not None and float(row.tail_logprob) == -3.0
    assert kept.to("cpu").tail == "bucket" and kept.detach().dtype == torch.float32
    assert repr(kept) == (
        "TopK([2, 2] of torch.float32, temperature=1, tail='bucket', tail_logprob)"
    )
    with pytest.raises(IndexError):
        kept[:, :1]
