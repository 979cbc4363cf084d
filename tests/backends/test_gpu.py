"""The Triton passes against the reference in float64: through the interpreter, or on a GPU.

What every backend owes is in the other files, whose `backend` fixture includes this one; here is
what only the passes show: layouts, masks, the split form, memory that is shared or out of bounds.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

from common import DTYPES, PAIRS

from fastkd.backends import base
from fastkd.backends.base import LossSpec, Stats
from fastkd.backends.reference import BACKEND as reference

pytest.importorskip("triton")
from gpu_rows import DEVICE, NAMES, Rows, assert_like_reference, each_name, fused, make, spec_of

from fastkd.backends.gpu import BACKEND as gpu

INF, NAN = math.inf, math.nan
# 1: one column; 7, 33: less than a tile; 129, 1000: a tile with a tail; 4099: full tiles and a tail
VOCABS = (1, 7, 33, 129, 1000, 4099)
# numpy's warnings about inf - inf under the interpreter; on a GPU nothing warns
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---- every divergence, dtype and shape


@pytest.mark.interpreted(20)
@each_name
@pytest.mark.parametrize(
    "pair",
    [*PAIRS.values(), (torch.bfloat16, torch.float64)],
    ids=[*PAIRS.keys(), "bf16-fp64"],
)
def test_dtypes(name: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    assert_like_reference(make(1, 3, 33, pair), spec_of(name, 33, hard=0.3, smoothing=0.1))


@pytest.mark.interpreted(14)
@each_name
@pytest.mark.parametrize("vocab", VOCABS)
def test_shapes(name: str, vocab: int) -> None:
    assert_like_reference(make(1, 3, vocab), spec_of(name, vocab))


@pytest.mark.interpreted(4)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0, 1000.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hard_labels(temperature: float, smoothing: float) -> None:
    x = make(1, 3, 300)._replace(keep=None)
    spec = spec_of("kl", 300, temperature=temperature, hard=0.4, smoothing=smoothing)
    assert_like_reference(x, spec)
    far = x._replace(student=x.student + 1e4, teacher=x.teacher - 1e4)
    assert_like_reference(far, spec)


@each_name
def test_logits_far_from_zero(name: str) -> None:
    x = make(1, 3, 1500, spread=3000.0)
    assert_like_reference(x, spec_of(name, 1500, temperature=1.0))


@pytest.mark.parametrize("name", ["kl", "js"])
def test_strided_rows_and_padded_columns(name: str) -> None:
    """Each operand lies in its own way; what is between the rows and past vocab is never used."""
    vocab = 300
    wide_s = torch.full((2, 3, 320), NAN, device=DEVICE)
    wide_t = torch.full((5, 2, 304), NAN, device=DEVICE)
    student, teacher = wide_s[:, :2], wide_t[::3].transpose(0, 1)
    student[..., :vocab], teacher[..., :vocab] = torch.randn(2, 2, 2, vocab).to(DEVICE).unbind()
    x = make(2, 2, vocab)._replace(student=student, teacher=teacher)
    spec = spec_of(name, vocab, hard=0.3, smoothing=0.1)
    grad = torch.full((2, 3, 4, 320), NAN, device=DEVICE)[:, 1:, 1][:, :2]
    loss, _ = assert_like_reference(x, spec, grad)
    dense = x._replace(student=student[..., :vocab].contiguous())
    dense = dense._replace(teacher=teacher[..., :vocab].contiguous())
    again = torch.empty_like(dense.student)
    assert torch.equal(loss, fused(gpu, dense, spec, again))
    assert torch.equal(grad[..., :vocab], again)


def test_no_rows() -> None:
    x = make(1, 0, 9)
    assert fused(gpu, x, spec_of("kl", 9), torch.empty_like(x.student)).shape == (0,)
    assert gpu.stats(x.student, 1.0, 9, None).shape == (0, 3)
    assert gpu.total(torch.empty(0, device=DEVICE), None, 1.0) == 0


@pytest.mark.interpreted(3)
@each_name
def test_in_place(name: str) -> None:
    for vocab in (7, 600, 4500):
        x = make(1, 3, vocab)
        spec = spec_of(name, vocab, hard=0.3)
        apart = torch.empty_like(x.student)
        loss = fused(gpu, x, spec, apart)
        assert torch.equal(loss, fused(gpu, x, spec, x.student))
        assert torch.equal(x.student, apart)


def test_label_outside_is_no_column() -> None:
    """Nothing is read or written past the row, which has a neighbour on either side."""
    for label in (-1, -5, 40, 2**40, -(2**40)):
        x = make(1, 3, 40)._replace(keep=None)
        x = x._replace(label=torch.full((3,), label, device=DEVICE))
        assert_like_reference(x, spec_of("kl", 40, hard=0.5, smoothing=0.1))


def test_rows_left_out_are_not_read() -> None:
    x = make(1, 4, 50)
    assert x.keep is not None
    x.student[0, ~x.keep], x.teacher[0, ~x.keep] = NAN, INF
    grad = torch.full((1, 4, 60), NAN, device=DEVICE)
    for name in NAMES:
        loss = fused(gpu, x, spec_of(name, 50), grad)
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
    stats = Stats(stats_s, stats_t, merged(x.student, 1.0))
    local = [spec._replace(vocab=p.stop - p.start) for p in parts]
    sums = sum(
        gpu.loss(x.student[..., p], x.teacher[..., p], stats, one, base.Rows(x.keep))
        for p, one in zip(parts, local, strict=True)
    )
    assert isinstance(sums, Tensor)
    grad = torch.full_like(x.student, NAN)
    for p, one in zip(parts, local, strict=True):
        label = None if x.label is None else x.label - p.start
        operands = (x.student[..., p], x.teacher[..., p], stats, sums[:, 1])
        gpu.grad(*operands, one, base.Rows(x.keep, label, x.scale, 0.5), grad[..., p])
    return sums[:, 0], grad


@pytest.mark.interpreted(5)
@each_name
@pytest.mark.parametrize("vocab", [33, 1300])
def test_split_passes_compose_to_the_fused(name: str, vocab: int) -> None:
    x = make(1, 3, vocab)
    assert x.label is not None
    x.label[0], cut = 0, vocab // 3
    spec = spec_of(name, vocab, hard=0.4, smoothing=0.1)
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
    spec = spec_of(name, 200)
    ours, true = (
        p.loss(*x[:2], Stats(*stats[1]), spec, base.Rows(x.keep)) for p in (gpu, reference)
    )
    torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


def test_stats_of_nothing() -> None:
    x = torch.full((1, 2, 70), -INF, device=DEVICE)
    x[0, 1, 3] = 2.0
    stats = gpu.stats(x, 2.0, 70, None)
    assert stats.tolist() == [[-INF, 0.0, -INF], [2.0, 1.0, -INF]]


# ---- exact zeros and edges


@pytest.mark.interpreted(10)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_identical_logits_give_exactly_nothing(name: str, dtype: torch.dtype) -> None:
    for vocab, temperature, spread in ((1, 1.0, 1.0), (33, 0.3, 5.0), (4200, 7.0, 1e4)):
        x = make(1, 2, vocab, (dtype, dtype), min(spread, 1e3))._replace(keep=None)
        x = x._replace(teacher=x.student.clone())
        grad = torch.full_like(x.student, NAN)
        loss = fused(gpu, x, spec_of(name, vocab, temperature=temperature), grad)
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
    loss = fused(gpu, x, spec_of(name, vocab), grad)
    true_grad = torch.zeros_like(x.student)
    true = fused(reference, x, spec_of(name, vocab), true_grad)
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
        spec = spec_of("kl", 9000, temperature=1.0)
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
        spec = spec_of("kl", 9)._replace(divergence="no_such")
        gpu.loss(x.student, x.teacher, Stats(*[torch.ones(2, 3)] * 2), spec, base.Rows())


def test_a_failed_launch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(1, 2, 9)
    monkeypatch.setattr("fastkd.backends.gpu.launch._ACC", {torch.float32: None})
    with pytest.raises(RuntimeError, match="fused_kernel could not be compiled or launched"):
        fused(gpu, x, spec_of("kl", 9), torch.empty_like(x.student))
