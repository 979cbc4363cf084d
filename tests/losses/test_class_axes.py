"""Classes along another dimension than the last, and several labels that leave a row out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import Backend, each_name
from oracle import assert_gradients, assert_values, differentiate, oracle, plain
from torch import Tensor

import fastkd
from fastkd import distill, nn, rows
from fastkd.divergence import Divergence

KL = fastkd.divergences.kl
IGNORED = (-100, 255)


def maps(backend: Backend, *shape: int, form: str = "nchw") -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher [N, C, H, W] and labels [N, H, W], some of them 255 and -100."""
    shape = shape or (2, 5, 3, 2)
    student, teacher = (2 * torch.randn(shape, device=backend.device) for _ in range(2))
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), device=backend.device)
    labels[0, 0], labels[-1, -1, 0] = 255, -100
    if form == "channels-last":
        student, teacher = (
            x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)
        )
    if form == "narrow":  # neither dense nor with classes of stride 1
        wide = torch.randn(shape[0], shape[1], shape[2], 2 * shape[3], device=backend.device)
        wide[..., ::2] = student
        student = wide[..., ::2]
    return student, teacher, labels


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


def segmentation(s: Tensor, t: Tensor, y: Tensor, T: float, **options: Any) -> Tensor:
    """What a user of a segmentation net writes in torch."""
    kept = (y != 255) & (y != -100)
    hard = F.cross_entropy(s, y.masked_fill(~kept, 255), ignore_index=255, **options)
    logq, logp = (last((x / T).log_softmax(1))[kept] for x in (s, t))
    return 0.5 * hard + 0.5 * T * T * F.kl_div(logq, logp, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("form", ["nchw", "channels-last", "narrow"])
def test_a_segmentation_net(backend: Backend, form: str) -> None:
    s, t, y = maps(backend, form=form)
    found = differentiate(
        fastkd.distillation_loss, s, t, y, class_dim=1, ignore_index=IGNORED, temperature=2.0
    )
    its, true = (
        differentiate(segmentation, *x, y, T=2.0) for x in ((s, t), (oracle(s), oracle(t)))
    )
    assert_values(found.value, its.value, true.value)
    assert found.student is not None and its.student is not None and true.student is not None
    assert_gradients(found.student, its.student, true.student)
    assert not last(found.student)[(y == 255) | (y == -100)].any()
    if form != "narrow":
        assert found.student.stride() == s.stride()


@pytest.mark.not_interpreted
@each_name
@pytest.mark.parametrize("form", ["nchw", "channels-last"])
def test_every_divergence_and_reduction(
    backend: Backend, divergence: Divergence, form: str
) -> None:
    s, t, y = maps(backend, form=form)
    weight = torch.rand(y.shape, device=backend.device)
    for reduction in ("mean", "none", "batchmean"):
        options: dict[str, Any] = dict(weight=weight, reduction=reduction, divergence=divergence)
        call: dict[str, Any] = dict(options, alpha=0.0, temperature=2.0, ignore_index=IGNORED)
        moved = differentiate(fastkd.distillation_loss, s, t, y, **call, class_dim=1, wrt="both")
        apart = differentiate(fastkd.distillation_loss, last(s), last(t), y, **call, wrt="both")
        assert torch.equal(moved.value, apart.value)
        assert moved.value.shape == (y.shape if reduction == "none" else ())
        for mine, its, x in ((moved.student, apart.student, s), (moved.teacher, apart.teacher, t)):
            assert mine is not None and its is not None
            assert torch.equal(last(mine), its) and mine.stride() == x.stride()


@pytest.mark.not_interpreted
@pytest.mark.parametrize("class_dim", [0, 1, -2, 2, -1, 3])
def test_any_dimension(backend: Backend, class_dim: int) -> None:
    s, t = (torch.randn(3, 4, 5, 6, device=backend.device) for _ in range(2))
    want = fastkd.js_div(
        s.movedim(class_dim, -1).contiguous(), t.movedim(class_dim, -1).contiguous(), beta=0.3
    )
    assert torch.equal(fastkd.js_div(s, t, beta=0.3, class_dim=class_dim), want)
    assert torch.equal(nn.JSDiv(beta=0.3, class_dim=class_dim)(s, t), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tiles_of_large_maps(dtype: torch.dtype) -> None:
    for shape in ((2, 33, 5, 13), (1, 70, 1, 2), (3, 2, 65)):
        s, t = torch.randn(2, *shape).to(dtype).unbind()
        moved = differentiate(fastkd.kl_div, s, t, class_dim=1, wrt="both")
        apart = differentiate(fastkd.kl_div, last(s), last(t), wrt="both")
        assert torch.equal(moved.value, apart.value)
        for mine, its in ((moved.student, apart.student), (moved.teacher, apart.teacher)):
            assert mine is not None and its is not None and mine.is_contiguous()
            assert torch.equal(last(mine), its)


def test_a_channels_last_map_is_read_where_it_lies_and_written_there() -> None:
    s, t, y = maps(Backend("cpu", torch.device("cpu")), form="channels-last")
    model = s.clone(memory_format=torch.preserve_format).requires_grad_() * 1
    kept = model.data_ptr()
    (grad,) = torch.autograd.grad(
        fastkd.distillation_loss(model, t, y, class_dim=1, ignore_index=IGNORED, inplace=True),
        model,
    )
    assert grad.data_ptr() == kept and grad.stride() == s.stride()


def test_outputs_have_the_shape_of_the_maps(backend: Backend) -> None:
    s, t, y = maps(backend)
    _, told = fastkd.distillation_loss(
        s, t, y, class_dim=1, ignore_index=IGNORED, return_outputs=True
    )
    assert all(x.shape == y.shape for x in told)


def test_compiled_and_differentiated_again() -> None:
    s, t, y = maps(Backend("cpu", torch.device("cpu")))

    def loss(s: Tensor) -> Tensor:
        return fastkd.kl_div(s, t, labels=y, class_dim=1, ignore_index=IGNORED)

    want = differentiate(lambda s, _: loss(s), s, t)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    found = differentiate(lambda s, _: compiled(s), s, t)
    torch.testing.assert_close(found.value, want.value)
    torch.testing.assert_close(found.student, want.student)
    torch.testing.assert_close(torch.func.grad(loss)(s), want.student)
    few, other = (x.double()[:1, :, 1:2, :2].contiguous() for x in (s, t))
    assert torch.autograd.gradgradcheck(
        lambda x: fastkd.kl_div(x, other, class_dim=1), few.requires_grad_()
    )


# ---- several labels that leave a row out


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_ignored_labels(backend: Backend, dtype: torch.dtype, reduction: str) -> None:
    s, t = (torch.randn(6, 200, device=backend.device) for _ in range(2))
    y = torch.tensor([1, 255, 156, 2, 7, 255], device=backend.device).to(dtype)
    one = y.long().clone()
    one[(one == 255) | (one == 7)] = -100
    call: dict[str, Any] = dict(reduction=reduction, alpha=0.3)
    for several in ((*IGNORED, 7), [255, 7], range(7, 256, 248)):
        found = differentiate(fastkd.distillation_loss, s, t, y, ignore_index=several, **call)
        want = differentiate(fastkd.distillation_loss, s, t, one, **call)
        assert torch.equal(found.value, want.value) and torch.equal(found.student, want.student)
    assert torch.equal(
        nn.DistillationLoss(ignore_index=[255, 7], **call)(s, t, y),
        fastkd.distillation_loss(s, t, one, **call),
    )
    assert fastkd.token_count(y, ignore_index=(255, 7)) == 3
    keep, label, bad = rows.mask(s, y, (255, 7))
    assert keep.tolist() == [True, False, True, True, False, False] and bad is None
    assert label.tolist() == [1, 0, 156, 2, 0, 0]


def test_no_rows() -> None:
    none = torch.randn(0, 5, 3, requires_grad=True)
    loss = fastkd.kl_div(none, none.detach().clone(), class_dim=1)
    assert loss == 0 and torch.autograd.grad(loss, none)[0].shape == none.shape


def test_repr() -> None:
    text = repr(nn.DistillationLoss(class_dim=1, ignore_index=(-100, 255)))
    assert "class_dim=1" in text and "ignore_index=(-100, 255)" in text
    assert "ignore_index=3" in repr(nn.KLDiv(ignore_index=[3]))


# ---- the other losses of rows, and terms


@pytest.mark.parametrize("loss", [distill.logit_mse, distill.dkd, distill.cosine, distill.dist])
def test_losses_of_distill(loss: Any) -> None:
    s, t, y = maps(Backend("cpu", torch.device("cpu")))
    found = differentiate(loss, s, t, y, class_dim=1, ignore_index=IGNORED)
    want = differentiate(loss, last(s), last(t), y, ignore_index=IGNORED)
    assert torch.equal(found.value, want.value) and torch.equal(last(found.student), want.student)


def test_terms() -> None:
    torch.manual_seed(0)
    images, y = torch.randn(4, 2, 5, 5), torch.randint(3, (4, 5, 5))
    y[:, 0] = -100
    student, teacher = torch.nn.Conv2d(2, 3, 1), torch.nn.Conv2d(2, 3, 1)
    want = segmentation(student(images), teacher(images), y, 4.0).detach()
    terms = [
        distill.hard(0.5, class_dim=1),
        distill.soft(0.5, rows="labelled", class_dim=1),
        distill.response(distill.logit_mse, 0.0, class_dim=1),
    ]
    seen: list[float] = []
    distill.train(
        student, [(images, y)], terms, teacher=teacher, epochs=1,
        on_step=lambda _, __, loss: seen.append(float(loss)),
    )  # fmt: skip
    assert seen == pytest.approx([float(want)], rel=1e-5)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(class_dim=4), ValueError, r"class_dim: got 4, expected -4 to 3.*\[2, 5, 3, 4\]"),
        (dict(class_dim=1.0), TypeError, "class_dim: got float 1.0, expected an integer"),
        (dict(class_dim=None), TypeError, "class_dim: got NoneType None"),
        (dict(class_dim=1, group=object()), NotImplementedError, "class_dim: got 1 with a group"),
        (dict(ignore_index=(1, 2.5)), TypeError, r"ignore_index: got float 2.5.*\(-100, 255\)"),
        (dict(ignore_index=()), ValueError, "ignore_index: got none"),
        (dict(ignore_index="255"), TypeError, "ignore_index: got str '255'"),
        (dict(class_dim=1, teacher=torch.randn(2, 5)), ValueError, r"teacher: got shape \[2, 5\]"),
        (dict(class_dim=1, labels=torch.ones(2, 5, 3).long()), ValueError, "labels: got shape"),
        (dict(labels=torch.ones(2, 3, 4).long()), ValueError, "labels: got .*give class_dim=1"),
        (dict(class_dim=1, student=3), TypeError, "student: got int 3"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], says: str) -> None:
    good = dict(student=torch.randn(2, 5, 3, 4), teacher=torch.randn(2, 5, 3, 4))
    with pytest.raises(error, match=says) as found:
        fastkd.kl_div(**{**good, **options})
    assert len(str(found.value)) <= 500


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_operands_whose_classes_are_last(side: str) -> None:
    x = torch.randn(2, 5, 3, 4)
    linear = fastkd.LinearLogits(torch.randn(2, 3, 4, 6), torch.randn(5, 6))
    stored = fastkd.topk_from_logits(last(x), 2)
    for operand in [linear] if side == "student" else [linear, stored]:
        pair = {"student": x, "teacher": x.clone(), side: operand}
        with pytest.raises(TypeError, match=rf"class_dim: got 1 .* as {side}, whose classes are"):
            fastkd.kl_div(**pair, class_dim=1)


def test_plain_is_the_formula_of_segmentation() -> None:
    """The oracle of this file agrees with that of all others."""
    s, t, y = maps(Backend("cpu", torch.device("cpu")))
    y = y.masked_fill(y == 255, -100)
    ours = plain(last(s), last(t), y, divergence=KL, alpha=0.5, temperature=2.0, t_squared=True)
    torch.testing.assert_close(ours, segmentation(s, t, y, 2.0))
