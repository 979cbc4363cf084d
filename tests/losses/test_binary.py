"""Losses of one logit each, against torch's own functions of two classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import require
from oracle import FLOORS, assert_gradients, assert_values, differentiate, oracle
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.divergence import Divergence
from fastkd.engine import elementwise

NAN, INF = float("nan"), float("inf")
TABLE = fastkd.divergences
LOSSES = {
    "kl": (fastkd.binary_kl_div, TABLE.kl, {}),
    "reverse_kl": (fastkd.binary_reverse_kl_div, TABLE.reverse_kl, {}),
    "js": (fastkd.binary_js_div, TABLE.js(beta=0.3), {"beta": 0.3}),
}


@pytest.fixture(params=["cpu", "gpu", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels, and torch's operations."""
    if request.param != "reference":
        require(request.param)
    with fastkd.use_backend(request.param):
        yield request.param


each_loss = pytest.mark.parametrize("name", LOSSES)


def two(x: Tensor) -> Tensor:
    """The logarithms of both outcomes, [..., 2]."""
    return torch.stack((F.logsigmoid(x), F.logsigmoid(-x)), -1)


def torchs(
    s: Tensor, t: Tensor, y: Tensor | None, *, divergence: Divergence, temperature: float = 2.0,
    alpha: float = 0.0, pos_weight: Tensor | None = None, t_squared: bool = True,
) -> Tensor:  # fmt: skip
    """What a user writes: [...] of each logit."""
    logp, logq = two(t / temperature), two(s / temperature)
    soft = divergence.value(logp, logq, divergence.param).sum(-1)
    soft = (1 - alpha) * (temperature**2 if t_squared else 1.0) * soft
    if not alpha:
        return soft
    assert y is not None
    pos = None if pos_weight is None else pos_weight.to(s.dtype)
    y = y.to(s.dtype)
    return alpha * F.binary_cross_entropy_with_logits(s, y, pos_weight=pos, reduction="none") + soft


def inputs(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels [6, 5]."""
    s, t, y = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5), torch.rand(6, 5)
    if kind == "large":
        s, t = 2e4 * torch.rand(6, 5) - 1e4, 2e4 * torch.rand(6, 5) - 1e4
        s[0], t[0] = 1e4, -1e4
    if kind == "equal":
        t = s.clone()
    if kind == "close":
        t = s + 1e-3 * torch.randn(6, 5)
    y[0], y[1] = 0.0, 1.0
    return s.to(dtype), t.to(dtype), y


@each_loss
@pytest.mark.parametrize("kind", ["random", "large", "equal", "close"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 2.0])
def test_values_and_gradients(
    name: str, kind: str, dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "BLOCK", 10)  # two rows at a time
    s, t, y = inputs(kind, dtype)
    entry = LOSSES[name][1]
    for alpha in (0.0, 0.3):
        options: dict[str, Any] = dict(divergence=entry, temperature=temperature, alpha=alpha)
        options["pos_weight"] = torch.rand(5)
        call = dict(options, reduction="none")
        labels = {"labels": y} if alpha else {}
        found = differentiate(fastkd.binary_distillation_loss, s, t, wrt="both", **labels, **call)
        its, true = (
            differentiate(torchs, *x, y, wrt="both", **options)
            for x in ((s, t), (oracle(s), oracle(t)))
        )
        acc = torch.promote_types(dtype, torch.float32)
        assert found.value.dtype == acc and found.value.shape == s.shape
        # the value is the difference of numbers of the logits' size
        nat = temperature**2 * (1 + float((s.double() - t.double()).abs().max()) / temperature)
        assert_values(found.value, its.value, true.value, nat)
        rounding = FLOORS[acc] * (temperature + alpha)
        if kind == "large" and name != "kl":
            rounding *= 1 + float((s.double() - t.double()).abs().max()) / temperature
        for mine, torch_, exact, x in (
            (found.student, its.student, true.student, s),
            (found.teacher, its.teacher, true.teacher, t),
        ):
            assert mine is not None and torch_ is not None and exact is not None
            assert mine.dtype == x.dtype
            assert_gradients(mine, torch_, exact, rounding)
        if kind == "equal" and not alpha and name != "js":
            assert not found.value.any() and not found.student.any() and not found.teacher.any()


@each_loss
def test_it_is_the_loss_of_two_classes(name: str) -> None:
    s, t, _ = inputs("random", torch.float64)
    loss, entry, own = LOSSES[name]
    classes = {"kl": fastkd.kl_div, "reverse_kl": fastkd.reverse_kl_div, "js": fastkd.js_div}[name]
    zero = torch.zeros_like(s)
    want = classes(torch.stack((s, zero), -1), torch.stack((t, zero), -1), temperature=3.0, **own)
    torch.testing.assert_close(loss(s, t, temperature=3.0, **own), want)
    module = fastkd.nn.BinaryDivergence(entry, temperature=3.0)
    torch.testing.assert_close(module(s, t), want)


def test_infinite_logits_are_defined() -> None:
    s = torch.tensor([INF, -INF, INF, -INF, 1.0, 1.0, INF])
    t = torch.tensor([INF, -INF, -INF, INF, INF, -INF, 1.0])
    log2 = torch.tensor(1.0)
    want = torch.stack((*[0 * log2] * 2, *[INF * log2] * 2, -F.logsigmoid(log2),
                        -F.logsigmoid(-log2), INF * log2))  # fmt: skip
    torch.testing.assert_close(fastkd.binary_kl_div(s, t, reduction="none"), want)
    torch.testing.assert_close(fastkd.binary_reverse_kl_div(t, s, reduction="none"), want)
    labels = torch.tensor([1.0, 0.0])
    hard = fastkd.binary_distillation_loss(s[:2], t[:2], labels, alpha=1.0, reduction="none")
    assert hard.tolist() == [0.0, 0.0]


def test_a_multi_label_classifier() -> None:
    """As one writes it, with labels that are missing."""
    torch.manual_seed(0)
    s, t, y = inputs("random", torch.float32)
    y[y > 0.7], pos = -100.0, torch.rand(5)
    y[2, 0] = NAN
    kept = (y >= 0) & (y <= 1)
    s[~kept], t[~kept] = NAN, NAN
    s.requires_grad_()
    of_all = torchs(
        torch.where(kept, s, 0.0), torch.where(kept, t, 0.0), torch.where(kept, y, 0.0),
        divergence=TABLE.kl, alpha=0.5, pos_weight=pos,
    )  # fmt: skip
    weight = torch.rand(6, 1)
    for reduction, given, by in (
        ("mean", None, kept.sum()),
        ("sum", None, 1.0),
        ("mean", weight, (weight * kept).sum()),
    ):
        factor = kept * (1.0 if given is None else given)
        want = (of_all * factor).sum() / by
        module = fastkd.nn.BinaryDistillationLoss(pos_weight=pos, reduction=reduction)
        got = module(s, t, y, weight=given)
        torch.testing.assert_close(got, want)
        (grad,), (its,) = (torch.autograd.grad(x, s, retain_graph=True) for x in (got, want))
        torch.testing.assert_close(grad, its)
        assert not grad[~kept].any()
    per = fastkd.binary_distillation_loss(s, t, y, pos_weight=pos, reduction="none")
    assert not per[~kept].any()
    got = fastkd.binary_distillation_loss(s, t, y, pos_weight=pos, normalizer=7)
    torch.testing.assert_close(got, (of_all * kept).sum() / 7)
    ints = torch.where(kept, (y > 0.3).long(), -100)
    torch.testing.assert_close(
        fastkd.binary_distillation_loss(s, t, ints, ignore_index=(-100, 255)),
        fastkd.binary_distillation_loss(s, t, torch.where(kept, ints.float(), NAN)),
    )


@pytest.mark.parametrize("shape", [(), (7,), (7, 1), (0, 3), (2, 3, 4, 5)])
def test_shapes_and_layouts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "BLOCK", 8)
    s, t = torch.randn(shape), torch.randn(shape)
    if len(shape) == 4:
        s = s.contiguous(memory_format=torch.channels_last)
    y = torch.rand(shape)
    want = differentiate(torchs, s, t, y, divergence=TABLE.kl, alpha=0.5, wrt="both")
    found = differentiate(fastkd.binary_distillation_loss, s, t, y, reduction="none", wrt="both")
    torch.testing.assert_close(found.value, want.value)
    for mine, its, x in ((found.student, want.student, s), (found.teacher, want.teacher, t)):
        torch.testing.assert_close(mine, its)
        assert mine is not None and mine.shape == x.shape
    assert found.student.stride() == s.stride()
    if len(shape) == 4:
        pos, weight = torch.rand(3, 1, 1), torch.rand(2, 1, 1, 1)
        of_all = torchs(s, t, y, divergence=TABLE.kl, alpha=0.5, pos_weight=pos)
        got = fastkd.binary_distillation_loss(s, t, y, pos_weight=pos, weight=weight)
        torch.testing.assert_close(got, (of_all * weight).sum() / (weight.sum() * 60))


def test_one_rounding() -> None:
    """A factor behind the loss goes in before the gradient is rounded to 16 bits."""
    s, t = (torch.randn(40, 50).half() for _ in range(2))
    by = torch.tensor(65_536.0)
    found = differentiate(fastkd.binary_kl_div, s, t, upstream=by)
    exact = differentiate(fastkd.binary_kl_div, s.double(), t.double(), upstream=by)
    assert found.student is not None and exact.student is not None
    error = (found.student.double() - exact.student).abs() / exact.student.abs()
    assert float(error.nan_to_num().max()) < 2.0**-10  # 0 / 0 of equal logits


def test_every_derivative_and_compiled() -> None:
    s, t, y = (x[:2, :2].contiguous() for x in inputs("random", torch.float64))
    weight = torch.rand(2, 2, dtype=torch.float64)

    def loss(s: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return fastkd.binary_distillation_loss(
            s, t, y, divergence=TABLE.js(beta=0.3), weight=weight
        )

    leaves = [x.requires_grad_() for x in (s, t, weight)]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    fixed = weight.detach()
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, fixed), leaves[:2])
    assert torch.autograd.gradgradcheck(lambda s, t: loss(s, t, fixed), leaves[:2])
    want = torch.autograd.grad(loss(s, t, fixed), s)[0]
    torch.testing.assert_close(torch.func.grad(loss)(s.detach(), t.detach(), fixed), want)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(s, t, fixed), loss(s, t, fixed))
    with torch.inference_mode():
        teacher = torch.randn(2, 2, dtype=torch.float64)
    loss(s, teacher, fixed).backward()


def test_terms() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randint(2, (8, 3)).float()
    y[0, 0] = -100
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    s, t = student(x).detach(), teacher(x).detach()
    kept = y != -100
    hard = F.binary_cross_entropy_with_logits(s[kept], y[kept])
    soft = torchs(s, t, None, divergence=TABLE.kl).mean()
    seen: list[float] = []
    terms = [distill.binary_hard(0.3), distill.binary_soft(0.7)]
    distill.train(
        student, [(x, y)], terms, teacher=teacher, epochs=1, progress=False,
        on_step=lambda _, __, loss: seen.append(float(loss)),
    )  # fmt: skip
    assert seen == pytest.approx([float(0.3 * hard + 0.7 * soft)], rel=1e-5)


def test_repr() -> None:
    says = repr(fastkd.nn.BinaryDistillationLoss(alpha=0.3, pos_weight=torch.ones(5)))
    assert "0.3 BCE(pos_weight=[5]) + 0.7 T^2 kl(p, q), p = sigmoid(teacher / T), T=2" in says
    says = repr(fastkd.nn.BinaryDivergence("js", ignore_index=(1, 2)))
    assert "js(beta=0.5)(p, q), p = sigmoid" in says and "ignore_index=(1, 2)" in says


X = torch.randn(3, 2)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(student=[1.0]), TypeError, r"student: got list .*one for each yes or no"),
        (dict(teacher=X.long()), TypeError, "teacher: got .*int64.*float32"),
        (dict(teacher=X[:2]), ValueError, r"teacher: got shape \[2, 2\]"),
        (dict(teacher=X.to("meta")), ValueError, "teacher: got a tensor on meta"),
        (dict(labels=None), ValueError, "labels: got None with alpha=0.5"),
        (dict(labels=[1]), TypeError, "labels: got list"),
        (dict(labels=X.relu().to_sparse()), TypeError, r"labels: got Tensor \(torch.sparse_coo\)"),
        (dict(weight=X.to_sparse()), TypeError, r"weight: got Tensor \(torch.sparse_coo\), expect"),
        (dict(labels=X.to(torch.float8_e4m3fn)), TypeError, "labels: got .*float8"),
        (dict(labels=torch.ones(3).long()), ValueError, "fastkd.distillation_loss"),
        (dict(labels=X[:, 0]), ValueError, r"labels: got shape \[3\], expected a tensor \[3, 2\]"),
        (dict(labels=torch.full((3, 2), 2)), ValueError, "labels: got 2, expected 0 to 1, NaN or"),
        (dict(labels=torch.full((3, 2), -0.5)), ValueError, r"labels: got -0\.5"),
        (dict(weight=2.0), TypeError, "weight: got float 2.0, expected floats that broadcast"),
        (dict(weight=torch.ones(3)), ValueError, r"weight: got shape \[3\].*to \[3, 2\]"),
        (dict(pos_weight=torch.ones(5, 3, 2)), ValueError, r"pos_weight: got shape \[5, 3, 2\]"),
        (dict(pos_weight=torch.tensor([2.0, -1.0])), ValueError, "pos_weight: got -1 for a class"),
        (dict(reduction="batchmean"), ValueError, "reduction: got 'batchmean', expected one of"),
        (dict(divergence="tv"), ValueError, "divergence: got 'tv', expected one of kl, rev"),
        (dict(temperature=0.0), ValueError, "temperature: got 0.0"),
        (dict(alpha=2.0), ValueError, "alpha: got 2.0"),
        (dict(normalizer=2, reduction="sum"), ValueError, "normalizer: got int 2"),
        (dict(weigth=1), TypeError, "unexpected option 'weigth'.*did you mean 'weight'"),
        (dict(ignore_index=1.5), TypeError, "ignore_index: got float 1.5"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], says: str) -> None:
    good = dict(student=X, teacher=X.clone(), labels=torch.ones(3, 2))
    with pytest.raises(error, match=says) as found:
        fastkd.binary_distillation_loss(**{**good, **options})
    assert len(str(found.value)) <= 500


def test_labels_that_nobody_may_read_become_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where reading them would wait."""
    monkeypatch.setattr("fastkd.engine.elementwise.reads_values", lambda _: False)
    labels = torch.tensor([[0.0, 2.0], [1.0, 0.5], [-100.0, 1.0]])
    found = differentiate(fastkd.binary_distillation_loss, X, X + 1, labels, reduction="none")
    assert found.value.isnan().tolist() == [[False, True], [False, False], [False, False]]
    assert found.student is not None and found.student.isnan().equal(found.value.isnan())
