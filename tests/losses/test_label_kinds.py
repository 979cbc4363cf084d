"""Labels that are probabilities of the classes, and classes with weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import Backend, logits
from oracle import FLOORS, assert_gradients, assert_values, differentiate, oracle
from torch import Tensor

import fastkd
from fastkd import nn
from fastkd.engine import reduction

F64 = (torch.float64, torch.float64)


def mixup(labels: Tensor, classes: int, lam: float = 0.7, smoothing: float = 0.1) -> Tensor:
    """As timm's Mixup makes its targets: a batch and the same batch from its end, smoothed."""
    off, on = smoothing / classes, 1.0 - smoothing + smoothing / classes
    hot = F.one_hot(labels, classes).float() * (on - off) + off
    return lam * hot + (1 - lam) * hot.flip(0)


def torchs(
    s: Tensor, t: Tensor, y: Tensor, *, alpha: float = 0.5, temperature: float = 2.0, **hard: Any
) -> Tensor:
    """What a user writes: torch's two losses, added."""
    logq, logp = ((x / temperature).log_softmax(-1) for x in (s, t))
    if not y.is_floating_point():
        kept = y != -100
        logq, logp = logq[kept], logp[kept]
    elif hard.get("weight") is not None:
        hard["weight"] = hard["weight"].to(s.dtype)
    y = y.to(s.dtype) if y.is_floating_point() else y
    soft = F.kl_div(logq, logp, reduction="batchmean", log_target=True)
    return alpha * F.cross_entropy(s, y, **hard) + (1 - alpha) * temperature**2 * soft


def assert_right(s: Tensor, t: Tensor, y: Tensor, **options: Any) -> None:
    """The tolerance rule of all tests, for value and gradient."""
    found = differentiate(fastkd.distillation_loss, s, t, y, **options)
    if "class_weight" in options:
        options["weight"] = options.pop("class_weight")
    its = differentiate(torchs, s, t, y, **options)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    true = differentiate(torchs, oracle(s), oracle(t), y, **exact)
    assert_values(found.value, its.value, true.value)
    assert found.student is not None and its.student is not None and true.student is not None
    # three roundings to the student's dtype: of both terms' gradients and of their sum
    rounding = 2 * FLOORS[s.dtype] * float(true.student.abs().max()) + FLOORS[torch.float32]
    assert_gradients(found.student, its.student, true.student, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixup(backend: Backend, dtype: torch.dtype, smoothing: float) -> None:
    s, t = logits(backend, 5, 13, (dtype, dtype))
    y = mixup(torch.randint(13, (5,)), 13).to(backend.device)
    assert_right(s, t, y, alpha=0.3, temperature=3.0, label_smoothing=smoothing)
    weight = torch.rand(13, device=backend.device)
    assert_right(s, t, y, alpha=0.3, label_smoothing=smoothing, class_weight=weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights(backend: Backend, smoothing: float) -> None:
    s, t = logits(backend, 5, 13)
    y = torch.tensor([3, -100, 12, 0, 3], device=backend.device)
    weight = torch.rand(13, device=backend.device)
    weight[0] = 0.0
    s[1] = float("nan")
    assert_right(s[2:], t[2:], y[2:], class_weight=weight, label_smoothing=smoothing)
    found = differentiate(
        fastkd.distillation_loss, s, t, y, class_weight=weight, label_smoothing=smoothing
    )
    kept = [0, 2, 3, 4]
    want = differentiate(torchs, s[kept], t[kept], y[kept], weight=weight,
                         label_smoothing=smoothing)  # fmt: skip
    torch.testing.assert_close(found.value, want.value)
    assert found.student is not None and not found.student[1].any()
    torch.testing.assert_close(found.student[kept], want.student)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("kind", ["soft", "classes", "smoothed"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_reductions_weights_and_outputs(backend: Backend, kind: str, reduction: Any) -> None:
    s, t = logits(backend, 4, 6, F64)
    y = torch.tensor([3, 5, 0, 2], device=backend.device)
    smoothing, soft = (0.2 if kind == "smoothed" else 0.0), kind == "soft"
    of_class = torch.rand(6, dtype=torch.float64, device=backend.device)
    weight = torch.rand(4, dtype=torch.float64, device=backend.device)
    labels = mixup(y, 6).double() if soft else y
    hard = F.cross_entropy(s, labels, of_class, reduction="none", label_smoothing=smoothing)
    kl = F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="none").sum(-1) * 4
    by_hard = weight if soft else weight * of_class[y]
    mean = (0.3 * (weight * hard).sum() / by_hard.sum()) + 0.7 * (weight * kl).sum() / weight.sum()
    rows = weight * (0.3 * hard + 0.7 * kl)
    want = {"mean": mean, "sum": rows.sum(), "batchmean": rows.sum() / 4, "none": rows}[reduction]
    options: dict[str, Any] = dict(alpha=0.3, class_weight=of_class, label_smoothing=smoothing)
    call = options | dict(weight=weight, reduction=reduction)
    got, told = fastkd.distillation_loss(s, t, labels, **call, return_outputs=True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(told.hard, hard, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(told.soft, kl / 4, rtol=1e-9, atol=1e-12)
    plain = fastkd.distillation_loss(s, t, labels, **call)
    torch.testing.assert_close(plain, want, rtol=1e-9, atol=1e-12)
    module = nn.DistillationLoss(**options, reduction=reduction)
    assert torch.equal(module(s, t, labels, weight=weight), plain)
    if reduction == "mean":
        both = fastkd.distillation_loss(s, t, labels, **call, normalizer=3.0)
        torch.testing.assert_close(both, rows.sum() / 3, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", ["one-hot", "zero-weights"])
def test_one_hot_probabilities_are_labels(backend: Backend, value: str) -> None:
    s, t = logits(backend, 5, 9)
    s[0, 3], t[0, 3] = -torch.inf, -torch.inf  # a class that no one has
    y = torch.tensor([0, 8, 2, 2, 1], device=backend.device)
    hot = F.one_hot(y, 9).float()
    if value == "one-hot":
        want = differentiate(fastkd.distillation_loss, s, t, y)
        found = differentiate(fastkd.distillation_loss, s, t, hot)
        torch.testing.assert_close(found.value, want.value)
        torch.testing.assert_close(found.student, want.student, rtol=1e-5, atol=1e-7)
        return
    none = torch.zeros(9, device=backend.device)
    for labels in (y, hot):
        found = fastkd.distillation_loss(s, t, labels, class_weight=none)
        want_soft = fastkd.distillation_loss(s, t, alpha=0.0) / 2
        torch.testing.assert_close(found, want_soft)


def test_in_place_and_in_float64() -> None:
    """The second term must not read a gradient."""
    torch.manual_seed(0)
    s, t, y = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.tensor([1, 2, 3, 0])
    for labels in (y, mixup(y, 6).double()):
        call: dict[str, Any] = dict(class_weight=torch.rand(6).double(), label_smoothing=0.1)
        found, want = (
            fastkd.distillation_loss(s * 1, t, labels, inplace=inplace, **call)
            for inplace in (True, False)
        )
        assert torch.equal(found, want) and found.dtype == torch.float32
        assert torch.equal(*(torch.autograd.grad(x, s)[0] for x in (found, want)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_float64_keeps_its_digits_beside_narrow_class_weights(smoothing: float) -> None:
    s, t = (torch.randn(15, 37, dtype=torch.float64) for _ in range(2))
    y = torch.randint(37, (15,))
    for weight in (torch.rand(37), torch.rand(37).bfloat16()):
        found = differentiate(fastkd.distillation_loss, s, t, y, alpha=1.0, class_weight=weight,
                              label_smoothing=smoothing)  # fmt: skip
        want = differentiate(torchs, s, t, y, alpha=1.0, weight=weight.double(),
                             label_smoothing=smoothing)  # fmt: skip
        torch.testing.assert_close(found.value, want.value, rtol=1e-14, atol=0)
        torch.testing.assert_close(found.student, want.student, rtol=0, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_term_alone(alpha: float) -> None:
    torch.manual_seed(0)
    s, t, y = torch.randn(4, 6), torch.randn(4, 6), mixup(torch.tensor([1, 2, 3, 0]), 6)
    got = fastkd.distillation_loss(s, t, y, alpha=alpha, z_loss=0.1)
    z = 0.1 * s.logsumexp(-1).square().mean()
    torch.testing.assert_close(got, torchs(s, t, y, alpha=alpha) + z)


def test_maps_heads_stored_teachers_and_padded_columns() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 3, 5), torch.randn(7, 5)
    s, t = hidden @ head.T, torch.randn(2, 3, 7)
    y = torch.randint(7, (2, 3))
    soft = mixup(y.view(-1), 7).view(2, 3, 7)
    weight = torch.rand(7)
    for labels, class_weight in ((soft, None), (soft, weight), (y, weight)):
        options: dict[str, Any] = dict(class_weight=class_weight, alpha=0.3)
        want = differentiate(fastkd.distillation_loss, s, t, labels, **options)
        axis = labels.movedim(-1, 1) if labels is soft else labels
        maps = differentiate(
            fastkd.distillation_loss, s.movedim(-1, 1).contiguous(),
            t.movedim(-1, 1).contiguous(), axis, class_dim=1, **options,
        )  # fmt: skip
        torch.testing.assert_close(maps.value, want.value)
        torch.testing.assert_close(maps.student.movedim(1, -1), want.student)
        linear = fastkd.LinearLogits(hidden, head)
        got = fastkd.distillation_loss(linear, t, labels, **options)
        torch.testing.assert_close(got, want.value)
        stored = fastkd.topk_from_logits(t, 7, temperature=2.0)
        got = fastkd.distillation_loss(s, stored, labels, **options)
        torch.testing.assert_close(got, want.value, rtol=1e-4, atol=1e-5)
        wide = F.pad(s, (0, 2), value=9.0)
        got = fastkd.distillation_loss(wide, t, labels, vocab_size=7, **options)
        torch.testing.assert_close(got, want.value)


def test_compiled_and_in_functorch() -> None:
    torch.manual_seed(0)
    s, t, y = torch.randn(4, 6), torch.randn(4, 6), mixup(torch.tensor([1, 2, 3, 0]), 6)

    def loss(s: Tensor) -> Tensor:
        return fastkd.distillation_loss(s, t, y, class_weight=torch.arange(6.0))

    want = differentiate(lambda s, _: loss(s), s, t)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(s), want.value)
    torch.testing.assert_close(torch.func.grad(loss)(s), want.student)


def test_repr() -> None:
    module = nn.DistillationLoss(label_smoothing=0.1, class_weight=torch.ones(5))
    assert "0.5 CE(label_smoothing=0.1, class_weight=[5]) + 0.5" in repr(module)
    assert not module.state_dict() and module.double().class_weight.dtype == torch.float64


Y = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(class_weight=[1.0] * 5), TypeError, r"class_weight: got list .*floats \[5\]"),
        (dict(class_weight=torch.ones(5).long()), TypeError, "class_weight: got .*int64"),
        (dict(class_weight=torch.ones(4)), ValueError, r"class_weight: got shape \[4\].*\[5\]"),
        (dict(class_weight=torch.ones(5, device="meta")), ValueError, "class_weight: got .*meta"),
        (dict(class_weight=torch.ones(5).requires_grad_()), ValueError, "class_weight: .*detach"),
        (
            dict(class_weight=torch.arange(5) - 0.5),
            ValueError,
            r"class_weight: got -0\.5 for a",
        ),
        (dict(class_weight=torch.ones(5), labels=Y + 3), ValueError, "labels: got 5 in row 2"),
        (dict(labels=torch.full((3, 5), 0.5)), ValueError, "sum to 2.5 in row 0.*binary_distil"),
        (dict(labels=torch.eye(3, 5) * 2 - 1), ValueError, "labels: got probabilities"),
        (dict(labels=torch.eye(3, 4)), ValueError, r"labels: got shape \[3, 4\], expected prob"),
        (dict(labels=torch.eye(3, 5).requires_grad_()), ValueError, "labels: got .*detach"),
        (dict(labels=Y.float()), TypeError, r"labels: got .*float32.*expected integers \[3\]"),
        (dict(labels=torch.eye(3, 5), group=object()), NotImplementedError, "labels: .*group"),
        (dict(labels=torch.eye(3, 5), weigth=1), TypeError, "did you mean 'weight'"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], says: str) -> None:
    good = dict(student=torch.randn(3, 5), teacher=torch.randn(3, 5), labels=Y)
    with pytest.raises(error, match=says) as found:
        fastkd.distillation_loss(**{**good, **options})
    assert len(str(found.value)) <= 500


def test_probabilities_in_a_bare_divergence() -> None:
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    with pytest.raises(TypeError, match=r"labels of fastkd\.distillation_loss alone"):
        fastkd.kl_div(s, t, labels=torch.eye(3, 5))


def test_class_weights_on_a_device_are_read_where_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Elsewhere a look would be a wait for the device."""
    options: dict[str, Any] = dict(alpha=1.0, class_weight=torch.tensor([1.0, -0.5, 2, 1, 1]))
    s = torch.randn(3, 5)
    monkeypatch.setattr(reduction, "on_host", lambda _: False)
    found = fastkd.distillation_loss(s, s.flip(0), Y, **options)
    want = F.cross_entropy(s, Y, weight=options["class_weight"])
    torch.testing.assert_close(found, want)
    with fastkd.checked(), pytest.raises(ValueError, match=r"class_weight: got -0\.5"):
        fastkd.distillation_loss(s, s.flip(0), Y, **options)
