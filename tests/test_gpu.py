"""The Triton passes against the reference in float64: through the interpreter, or on a GPU.

What every backend owes is in the other files, whose `backend` fixture includes this one; here is
what only the passes show: layouts, masks, the split form, memory that is shared or out of bounds.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

from common import DTYPES, FLOORS, PAIRS

import fastkd
from fastkd.backends import reference
from fastkd.backends.base import LossSpec, acc_dtype, rows

pytest.importorskip("triton")
from fastkd.backends import gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = math.inf, math.nan
NAMES = list(fastkd.divergences)
# 1: one column; 7, 33: less than a tile; 129, 1000: a tile with a tail; 4099: full tiles and a tail
VOCABS = (1, 7, 33, 129, 1000, 4099)

each_name = pytest.mark.parametrize("name", NAMES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# numpy's warnings about inf - inf under the interpreter; on a GPU nothing warns
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Rows(NamedTuple):
    """Operands [A, B, V] and what goes with each row."""

    student: Tensor
    teacher: Tensor
    keep: Tensor | None
    label: Tensor | None
    scale: Tensor | None


def plan_of(name: str, vocab: int, **changes: Any) -> LossSpec:
    param = 0.3 if fastkd.divergences[name].parameter else 0.0
    return LossSpec(name, param, 2.0, 0.7, 0.0, 0.0, vocab, vocab)._replace(**changes)


def make(a: int, b: int, vocab: int, pair: Any = (torch.float32,) * 2, spread: float = 3.0) -> Rows:
    student, teacher = ((spread * torch.randn(a, b, vocab)).to(DEVICE, dtype) for dtype in pair)
    n, acc = a * b, acc_dtype(student, teacher)
    keep = torch.arange(n, device=DEVICE) % 3 != 1
    label = torch.randint(0, vocab, (n,)).to(DEVICE)
    scale = torch.rand(n).to(DEVICE, acc)
    return Rows(student, teacher, keep, label, scale)


def fused(passes: Any, x: Rows, spec: LossSpec, grad: Tensor, factor: float = 0.5) -> Tensor:
    label = x.label if spec.hard else None
    return passes.fused(x.student, x.teacher, spec, x.keep, label, x.scale, factor, grad)


def assert_like_reference(
    x: Rows, spec: LossSpec, grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rule of `common`: at most twice the error of plain torch, plus the floor."""
    grad = torch.full_like(x.student, NAN) if grad is None else grad
    exact = x._replace(student=x.student.double(), teacher=x.teacher.double())
    shape = (*grad.shape[:2], x.student.size(2))
    true_grad = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    torchs_grad = torch.zeros(shape, dtype=x.student.dtype, device=DEVICE)
    torchs, true = fused(reference, x, spec, torchs_grad), fused(reference, exact, spec, true_grad)
    ours = fused(gpu, x, spec, grad)
    assert ours.dtype == acc_dtype(x.student, x.teacher)
    floor = FLOORS[ours.dtype]
    bound = 2 * (torchs - true).abs() + floor * true.abs().clamp_min(1.0)
    assert ((ours - true).abs() <= bound).all(), (ours - true).abs() / bound
    wide, width = grad[..., : spec.vocab].double(), spec.vocab
    largest = true_grad.abs().max()
    error = (torchs_grad[..., :width].double() - true_grad[..., :width]).abs().max()
    # the accumulator's floor is relative to the slopes, whose sum it is that cancels (`common`)
    terms = (true.abs() * x.scale).max() + x.scale.max()
    stored = 2 * error + FLOORS[grad.dtype] * largest + floor * terms
    assert ((wide - true_grad[..., :width]).abs() <= stored).all()
    assert not grad[..., spec.vocab :].any(), "columns past vocab are written 0"
    return ours, grad


# ---- every divergence, dtype and shape


@each_name
@pytest.mark.parametrize(
    "pair",
    [*PAIRS.values(), (torch.bfloat16, torch.float64)],
    ids=[*PAIRS.keys(), "bf16-fp64"],
)
def test_dtypes(name: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    assert_like_reference(make(1, 3, 33, pair), plan_of(name, 33, hard=0.3, smoothing=0.1))


@each_name
@pytest.mark.parametrize("vocab", VOCABS)
def test_shapes(name: str, vocab: int) -> None:
    assert_like_reference(make(1, 3, vocab), plan_of(name, vocab))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0, 1000.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hard_labels(temperature: float, smoothing: float) -> None:
    x = make(1, 3, 300)._replace(keep=None)
    spec = plan_of("kl", 300, temperature=temperature, hard=0.4, smoothing=smoothing)
    assert_like_reference(x, spec)
    far = x._replace(student=x.student + 1e4, teacher=x.teacher - 1e4)
    assert_like_reference(far, spec)


@each_name
def test_logits_far_from_zero(name: str) -> None:
    x = make(1, 3, 1500, spread=3000.0)
    assert_like_reference(x, plan_of(name, 1500, temperature=1.0))


@pytest.mark.parametrize("name", ["kl", "js"])
def test_strided_rows_and_padded_columns(name: str) -> None:
    """Each operand lies in its own way; what is between the rows and past vocab is never used."""
    vocab = 300
    wide_s = torch.full((2, 3, 320), NAN, device=DEVICE)
    wide_t = torch.full((5, 2, 304), NAN, device=DEVICE)
    student, teacher = wide_s[:, :2], wide_t[::3].transpose(0, 1)
    student[..., :vocab], teacher[..., :vocab] = torch.randn(2, 2, 2, vocab).to(DEVICE).unbind()
    x = make(2, 2, vocab)._replace(student=student, teacher=teacher)
    spec = plan_of(name, vocab, hard=0.3, smoothing=0.1)
    grad = torch.full((2, 3, 4, 320), NAN, device=DEVICE)[:, 1:, 1][:, :2]
    loss, _ = assert_like_reference(x, spec, grad)
    dense = x._replace(student=student[..., :vocab].contiguous())
    dense = dense._replace(teacher=teacher[..., :vocab].contiguous())
    again = torch.empty_like(dense.student)
    assert torch.equal(loss, fused(gpu, dense, spec, again))
    assert torch.equal(grad[..., :vocab], again)


def test_no_rows() -> None:
    x = make(1, 0, 9)
    assert fused(gpu, x, plan_of("kl", 9), torch.empty_like(x.student)).shape == (0,)
    assert gpu.stats(x.student, 1.0, 9, None).shape == (0, 3)
    assert gpu.total(torch.empty(0, device=DEVICE), None, 1.0) == 0


@each_name
def test_in_place(name: str) -> None:
    for vocab in (7, 600, 4500):
        x = make(1, 3, vocab)
        spec = plan_of(name, vocab, hard=0.3)
        apart = torch.empty_like(x.student)
        loss = fused(gpu, x, spec, apart)
        assert torch.equal(loss, fused(gpu, x, spec, x.student))
        assert torch.equal(x.student, apart)


def test_label_outside_is_no_column() -> None:
    """Nothing is read or written past the row, which has a neighbour on either side."""
    for label in (-1, -5, 40, 2**40, -(2**40)):
        x = make(1, 3, 40)._replace(keep=None)
        x = x._replace(label=torch.full((3,), label, device=DEVICE))
        assert_like_reference(x, plan_of("kl", 40, hard=0.5, smoothing=0.1))


def test_rows_left_out_are_not_read() -> None:
    x = make(1, 4, 50)
    assert x.keep is not None
    x.student[0, ~x.keep], x.teacher[0, ~x.keep] = NAN, INF
    grad = torch.full((1, 4, 60), NAN, device=DEVICE)
    for name in NAMES:
        loss = fused(gpu, x, plan_of(name, 50), grad)
        assert loss.isfinite().all() and not loss[~x.keep].any()
        assert grad.isfinite().all() and not grad[0, ~x.keep].any()


# ---- the split form


def _split(x: Rows, spec: LossSpec, parts: list[slice]) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the split passes, each part standing for a rank; merged by hand."""

    def merged(operand: Tensor, temperature: float) -> Tensor:
        each = torch.stack(
            [gpu.stats(operand[..., p], temperature, p.stop - p.start, x.keep) for p in parts]
        )
        top = each[..., 0].amax(0)
        shift = torch.where(top == -INF, 0.0, each[..., 0] - top)
        columns = torch.tensor([[p.stop - p.start] for p in parts], device=shift.device)
        total = (each[..., 1] * (shift / temperature).exp()).sum(0)
        return torch.stack((top, total, (each[..., 2] + columns * shift).sum(0)), -1)

    stats_s, stats_t = merged(x.student, spec.temperature), merged(x.teacher, spec.temperature)
    unit = merged(x.student, 1.0)
    local = [spec._replace(vocab=p.stop - p.start) for p in parts]
    sums = sum(
        gpu.loss(x.student[..., p], x.teacher[..., p], stats_s, stats_t, one, x.keep)
        for p, one in zip(parts, local, strict=True)
    )
    assert isinstance(sums, Tensor)
    grad = torch.full_like(x.student, NAN)
    for p, one in zip(parts, local, strict=True):
        label = None if x.label is None else x.label - p.start
        operands = (x.student[..., p], x.teacher[..., p], stats_s, stats_t, unit, sums[:, 1])
        gpu.grad(*operands, one, x.keep, label, x.scale, 0.5, grad[..., p])
    return sums[:, 0], grad


@each_name
@pytest.mark.parametrize("vocab", [33, 1300])
def test_split_passes_compose_to_the_fused(name: str, vocab: int) -> None:
    x = make(1, 3, vocab)
    assert x.label is not None
    x.label[0], cut = 0, vocab // 3
    spec = plan_of(name, vocab, hard=0.4, smoothing=0.1)
    grad = torch.empty_like(x.student)
    loss = fused(gpu, x, spec._replace(soft=1.0, hard=0.0, smoothing=0.0), grad)
    fused(gpu, x, spec, grad)
    for parts in ([slice(0, vocab)], [slice(0, cut), slice(cut, vocab)]):
        value, split = _split(x, spec, parts)
        torch.testing.assert_close(value, loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(split, grad, rtol=0, atol=float(2e-6 * grad.abs().max()))


@each_name
def test_split_passes_are_the_references(name: str) -> None:
    x = make(2, 2, 200, (torch.float64, torch.bfloat16))
    stats = [
        [passes.stats(side, 2.0, 200, x.keep) for side in x[:2]] for passes in (gpu, reference)
    ]
    for ours, true in zip(*stats, strict=True):
        assert ours.dtype == true.dtype
        torch.testing.assert_close(ours, true, rtol=1e-5 if ours.dtype == torch.float32 else 1e-12,
                                   atol=1e-4 if ours.dtype == torch.float32 else 1e-12)  # fmt: skip
    spec = plan_of(name, 200)
    ours, true = (p.loss(*x[:2], *stats[1], spec, x.keep) for p in (gpu, reference))
    torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


def test_stats_of_nothing() -> None:
    x = torch.full((1, 2, 70), -INF, device=DEVICE)
    x[0, 1, 3] = 2.0
    stats = gpu.stats(x, 2.0, 70, None)
    assert stats.tolist() == [[-INF, 0.0, -INF], [2.0, 1.0, -INF]]


# ---- exact zeros and edges


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_identical_logits_give_exactly_nothing(name: str, dtype: torch.dtype) -> None:
    for vocab, temperature, spread in ((1, 1.0, 1.0), (33, 0.3, 5.0), (4200, 7.0, 1e4)):
        x = make(1, 2, vocab, (dtype, dtype), min(spread, 1e3))._replace(keep=None)
        x = x._replace(teacher=x.student.clone())
        grad = torch.full_like(x.student, NAN)
        loss = fused(gpu, x, plan_of(name, vocab, temperature=temperature), grad)
        # the mixtures owe only rounding, but their formulas happen to keep this too
        assert not loss.any() and not grad.any()


@each_name
def test_edges(name: str) -> None:
    """One row per rule; NaN stays in its row."""
    vocab = 600
    x = make(1, 7, vocab)._replace(keep=None)
    s, t = x.student[0], x.teacher[0]
    s[0, 5:300], t[0, 5:300] = -INF, -INF  # impossible on both sides
    s[1], t[1] = -INF, -INF  # nothing possible at all
    s[2] = -INF  # one side impossible
    s[3, 7] = NAN
    t[4, 8] = INF
    s[5, 300:], t[5, :300] = -INF, -INF  # disjoint
    grad = torch.full_like(x.student, NAN)
    loss = fused(gpu, x, plan_of(name, vocab), grad)
    true_grad = torch.zeros_like(x.student)
    true = fused(reference, x, plan_of(name, vocab), true_grad)
    whole = [0, 1, 6]
    torch.testing.assert_close(loss[whole], true[whole], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[0, whole], true_grad[0, whole], rtol=1e-4, atol=1e-7)
    assert not grad[0, 0, 5:300].any() and not grad[0, 1].any() and loss[1] == 0
    assert loss[2:5].isnan().all() and grad[0, 3:5].isnan().all()
    if name in ("kl", "reverse_kl"):
        assert loss[5] == INF and grad[0, 5].isfinite().all() == (name == "kl")
    else:
        torch.testing.assert_close(loss[5], true[5], rtol=1e-5, atol=1e-6)
        assert grad[0, 5].isfinite().all()


def test_kl_of_a_probability_that_underflows_is_nothing() -> None:
    """An impossible student under a lane's early maximum that the row's then buries."""
    # the lane's sum becomes NaN, or stays infinite: a small weight times a small factor is not 0
    for above, below in ((300.0, 0.0), (40.0, 70.0)):
        x = make(1, 1, 9000)._replace(keep=None, scale=None)
        x.teacher[0, 0, :8192] -= above
        x.teacher[0, 0, 17] -= below
        x.student[0, 0, 17] = -INF
        assert not (x.teacher[0, 0, 17] - x.teacher.amax()).exp()
        spec = plan_of("kl", 9000, temperature=1.0)
        assert fused(gpu, x, spec, x.student.clone()).isfinite().all()


# ---- the small kernels


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_multiply(dtype: torch.dtype) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((3, 40), (2, 2, 1030)):
        grad = torch.randn(shape).to(DEVICE, dtype)
        for by in (1.0, -2.5, 0.0, NAN):
            ours = grad.clone()
            gpu.multiply(ours, torch.tensor(by, dtype=acc, device=DEVICE))
            torch.testing.assert_close(ours, grad * by, rtol=0, atol=0, equal_nan=True)
    # three strides that do not merge, and rows with room between them
    loose = torch.ones(3, 3, 3, 8, device=DEVICE, dtype=dtype)[::2, ::2, ::2]
    gpu.multiply(loose, torch.tensor(2.0, dtype=acc, device=DEVICE))
    assert (loose == 2).all()
    padded = torch.ones(4, 16, device=DEVICE, dtype=dtype)
    gpu.multiply(padded[:, :9], torch.tensor(2.0, dtype=acc, device=DEVICE))
    assert (padded[:, :9] == 2).all() and (padded[:, 9:] == 1).all()


def test_total() -> None:
    loss, scale = torch.rand(2500).to(DEVICE), torch.rand(2500).to(DEVICE)
    for by in (scale, None):
        torch.testing.assert_close(gpu.total(loss, by, 0.25), reference.total(loss, by, 0.25))


def test_a_divergence_without_a_kernel_is_named() -> None:
    x = make(1, 2, 9)
    with pytest.raises(NotImplementedError, match="'no_such'"):
        gpu.loss(x.student, x.teacher, *[torch.ones(2, 3)] * 2, plan_of("kl", 9)._replace(
            divergence="no_such"), None)  # fmt: skip


def test_a_failed_launch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(1, 2, 9)
    monkeypatch.setattr("fastkd.backends.gpu.launch._ACC", {torch.float32: None})
    with pytest.raises(RuntimeError, match="fused_kernel could not be compiled or launched"):
        fused(gpu, x, plan_of("kl", 9), torch.empty_like(x.student))


# ---- only on a GPU


@needs_gpu
@pytest.mark.parametrize("team", ["", "0"])
def test_offsets_past_two_to_the_31(team: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_GPU_TEAM", team)
    n, vocab = 16_500, 131_072
    student = torch.empty(n, vocab, dtype=torch.bfloat16, device=DEVICE)
    teacher = torch.randn(1, vocab, device=DEVICE).bfloat16().expand(n, vocab)
    student[-1] = torch.randn(vocab, device=DEVICE)
    keep = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    keep[-1] = True
    last = student[-1:].clone()
    spec = plan_of("kl", vocab)
    loss = gpu.fused(rows(student), rows(teacher), spec, keep, None, None, 1.0, rows(student))
    small = torch.empty_like(last)
    alone = gpu.fused(rows(last), rows(teacher[:1]), spec, None, None, None, 1.0, rows(small))
    # one row alone is shared by more programs than each of many
    torch.testing.assert_close(loss[-1:], alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(student[-1:], small, rtol=1e-2, atol=1e-9)
    assert not loss[:-1].any() and not student[: n // 2].any()


@needs_gpu
@each_name
@pytest.mark.parametrize(("n", "vocab"), [(64, 5000), (3, 128_256)])
def test_capture_in_a_graph(name: str, n: int, vocab: int) -> None:
    x, spec = make(1, n, vocab, (torch.bfloat16,) * 2), plan_of(name, vocab, hard=0.3)
    grad = torch.empty_like(x.student)
    fused(gpu, x, spec, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused(gpu, x, spec, grad)
    x.student.copy_(torch.randn_like(x.student))
    graph.replay()
    again = torch.empty_like(grad)
    assert torch.equal(loss, fused(gpu, x, spec, again)) and torch.equal(grad, again)


@needs_gpu
@each_name
@pytest.mark.parametrize("n", [1, 64, 500])
@pytest.mark.parametrize("vocab", [50_257, 128_256])
def test_real_vocabularies(name: str, n: int, vocab: int) -> None:
    """From many programs to a row to one; rows on a 16-byte boundary, and odd ones."""
    spec = plan_of(name, vocab, hard=0.3, smoothing=0.1)
    for pair in ((torch.bfloat16,) * 2, (torch.float32,) * 2):
        x = make(1, n, vocab, pair)
        loss, grad = assert_like_reference(x, spec)
        again = torch.empty_like(grad)
        assert torch.equal(loss, fused(gpu, x, spec, again)) and torch.equal(grad, again)
        fused(gpu, x, spec, x.student)
        assert torch.equal(x.student, grad)


@needs_gpu
@pytest.mark.parametrize("n", [64, 600])
def test_second_stream(n: int) -> None:
    x, spec = make(1, n, 50_000), plan_of("js", 50_000)
    grads = [torch.empty_like(x.student) for _ in range(2)]
    loss = fused(gpu, x, spec, grads[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = fused(gpu, x, spec, grads[1])
    stream.synchronize()
    torch.cuda.synchronize()
    assert torch.equal(loss, other) and torch.equal(*grads)


@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    student = torch.randn(64, 5000, device=DEVICE, requires_grad=True)
    teacher, labels = torch.randn_like(student), torch.randint(0, 5000, (64,), device=DEVICE)

    def step() -> None:
        fastkd.distillation_loss(student, teacher, labels).backward()
        loss = fastkd.js_div(student, teacher, labels=labels, reduction="none")
        (3.0 * loss.sum()).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
