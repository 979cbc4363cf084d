"""`return_outputs=True`: what a loss tells of each row beside its value, from the same pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    INF,
    Backend,
    each_divergence,
    each_dtype,
    each_form,
    each_name,
    each_pair,
    in_form,
    logits,
)
from oracle import assert_values, oracle
from pairwise import pairwise
from told import IGNORED, assert_told, entropy
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

each_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


def test_a_training_loop_that_logs(backend: Backend) -> None:
    """The habit: the parts of the loss and both entropies, without a second look at the logits."""
    model = torch.nn.Linear(8, 30, device=backend.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, teacher = torch.randn(6, 8).to(model.weight.device), torch.randn(6, 30).to(backend.device)
    labels, history = teacher.argmax(-1), []
    for _ in range(3):
        loss, rows = fastkd.distillation_loss(model(x), teacher, labels, return_outputs=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: row.mean().item() for name, row in rows._asdict().items()})
    assert list(history[0]) == list(fastkd.LossOutputs._fields)
    assert history[2]["soft"] < history[0]["soft"] and history[2]["hard"] < history[0]["hard"]
    last = history[2]
    assert float(loss.detach()) == pytest.approx(0.5 * last["hard"] + 0.5 * 4 * last["soft"], 1e-5)
    assert 0 < last["student_entropy"] < 3.5 and 0 < last["teacher_entropy"] < 3.5


# ---- every divergence, dtype and driver


@pairwise
@each_divergence
@each_pair
@each_form
@each_reduction
@pytest.mark.parametrize("shape", [(4, 5), (3, 17), (2, 2049), (2, 8_300)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_outputs_by_the_rule(
    backend: Backend,
    divergence: Divergence,
    pair: Any,
    form: str,
    reduction: str,
    shape: tuple[int, int],
    temperature: float,
) -> None:
    student, teacher = logits(backend, *shape, pair)
    labels = torch.randint(shape[1], shape[:1], device=backend.device)
    labels[0] = IGNORED
    call = {"divergence": divergence, "temperature": temperature, "label_smoothing": 0.1}
    operands = in_form(student, teacher, form)
    for alpha in (0.0, 0.3):
        _, outputs = fastkd.distillation_loss(
            *operands, labels, alpha=alpha, reduction=reduction, return_outputs=True, **call
        )
        assert_told(outputs, student, teacher, labels, hard=alpha > 0, **call)


@each_name
@each_form
def test_outputs_leave_loss_and_gradient_alone(
    kernels: Backend, divergence: Divergence, form: str
) -> None:
    """The same bits with and without, of the gradient in both operands too."""
    vocab = 3000 if form == "logits" else 500  # a factorisation is the dearest part of the others
    labels = torch.tensor([3, IGNORED, 0, vocab - 1], device=kernels.device)
    weight = torch.rand(4, device=kernels.device)
    for options in (
        {"alpha": 0.0},
        {"alpha": 0.3, "label_smoothing": 0.1, "weight": weight},
        {"alpha": 0.3, "reduction": "none"},
        {"alpha": 1.0},
    ):
        found: list[list[Tensor]] = []
        student, teacher = logits(kernels, 4, vocab, (torch.bfloat16, torch.bfloat16))
        for wanted in (False, True):
            s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
            call = {"divergence": divergence, "return_outputs": wanted, **options}
            result: Any = fastkd.distillation_loss(*in_form(s, t, form), labels, **call)
            loss: Any = result[0] if wanted else result
            loss.backward(torch.ones_like(loss))
            found.append([loss.detach(), s.grad, t.grad])  # type: ignore[list-item]
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@each_dtype
@each_name
def test_without_a_gradient(backend: Backend, dtype: torch.dtype, divergence: Divergence) -> None:
    student, teacher = logits(backend, 3, 40, (dtype, dtype))
    with torch.no_grad():
        loss, outputs = fastkd.distillation_loss(
            student, teacher, alpha=0.0, divergence=divergence, temperature=2.0, return_outputs=True
        )
    assert_told(outputs, student, teacher, divergence=divergence, temperature=2.0)
    assert loss == pytest.approx(4 * outputs.soft.mean().item(), rel=1e-5)


def test_cross_entropy_less_entropy_is_the_divergence(backend: Backend) -> None:
    """kl: soft = H(p, q) - H(p), each as told, by the rule."""
    student, teacher = logits(backend, 5, 700)
    _, outputs = fastkd.kl_div(student, teacher, temperature=1.7, return_outputs=True)
    s, t = oracle(student) / 1.7, oracle(teacher) / 1.7
    cross = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)
    plain = -((teacher / 1.7).softmax(-1) * (student / 1.7).log_softmax(-1)).sum(-1)
    assert_values(outputs.soft + outputs.teacher_entropy, plain, cross)


def test_every_function_takes_it(backend: Backend) -> None:
    student, teacher = logits(backend, 2, 9)
    for name, divergence in (
        ("kl_div", "kl"),
        ("reverse_kl_div", "reverse_kl"),
        ("js_div", "js"),
        ("skew_kl_div", "skew_kl"),
        ("skew_reverse_kl_div", "skew_reverse_kl"),
        ("tv_distance", "tv"),
    ):
        loss, outputs = getattr(fastkd, name)(student, teacher, return_outputs=True)
        assert isinstance(outputs, fastkd.LossOutputs)
        assert_told(outputs, student, teacher, divergence=fastkd.divergences[divergence])
        assert torch.allclose(loss, outputs.soft.mean())


def test_modules_return_what_functions_do(backend: Backend) -> None:
    student, teacher = logits(backend, 2, 9)
    labels = torch.tensor([1, 2], device=backend.device)
    module = fastkd.nn.DistillationLoss(temperature=3.0, return_outputs=True)
    assert "return_outputs=True" in repr(module)
    _, outputs = module(student, teacher, labels)
    kl = fastkd.divergences.kl
    assert_told(outputs, student, teacher, labels, divergence=kl, temperature=3.0)
    _, outputs = fastkd.nn.JSDiv(return_outputs=True)(student, teacher)
    assert_told(outputs, student, teacher, divergence=fastkd.divergences.js)


# ---- rows and columns


def test_ignored_rows_hold_zero_whatever_they_hold(backend: Backend) -> None:
    student, teacher = logits(backend, 6, 50)
    student[1], teacher[4] = float("nan"), float("nan")
    labels = torch.tensor([7, IGNORED, 3, 0, IGNORED, 49], device=backend.device)
    for alpha in (0.0, 0.5):
        options = {"alpha": alpha, "temperature": 2.0}
        for reduction in ("mean", "none"):
            _, outputs = fastkd.distillation_loss(
                student, teacher, labels, reduction=reduction, return_outputs=True, **options
            )
            assert_told(
                outputs, student, teacher, labels,
                divergence=fastkd.divergences.kl, temperature=2.0, hard=alpha > 0,
            )  # fmt: skip


def test_leading_shape_strides_and_vocab_size(backend: Backend) -> None:
    wide, teacher = logits(backend, 12, 70)
    student = wide.view(3, 4, 70)[:, :, 3:67]
    teacher = teacher.view(4, 3, 70).transpose(0, 1)[:, :, :64]
    labels = torch.randint(60, (3, 4), device=backend.device)
    _, outputs = fastkd.distillation_loss(
        student, teacher, labels, vocab_size=60, return_outputs=True
    )
    kl = fastkd.divergences.kl
    assert_told(outputs, student, teacher, labels, divergence=kl, temperature=2.0, vocab_size=60)


def test_no_rows(backend: Backend) -> None:
    student, teacher = logits(backend, 0, 12)
    labels = torch.zeros(0, dtype=torch.int64, device=backend.device)
    for alpha in (0.0, 0.5):
        loss, outputs = fastkd.distillation_loss(
            student, teacher, labels, alpha=alpha, return_outputs=True
        )
        assert loss == 0 and all(x is None or x.shape == (0,) for x in outputs)


def test_one_column(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 1)
    labels = torch.zeros(3, dtype=torch.int64, device=backend.device)
    with pytest.warns(UserWarning):
        _, outputs = fastkd.distillation_loss(student, teacher, labels, return_outputs=True)
    assert_told(
        outputs, student, teacher, labels, divergence=fastkd.divergences.kl, temperature=2.0
    )


@each_name
def test_impossible_columns_and_certain_teachers(backend: Backend, divergence: Divergence) -> None:
    student, teacher = logits(backend, 4, 300)
    student[:, 5] = teacher[:, 5] = -INF
    teacher[1], teacher[2, :290] = -INF, -INF
    teacher[1, 7] = 3.0
    student[3, 280:] += 1e4
    if divergence.name == "reverse_kl":  # infinite where the teacher has 0
        student[1], student[2, :290] = -INF, -INF
        student[1, 7] = 2.0
    _, outputs = fastkd.distillation_loss(
        student, teacher, alpha=0.0, divergence=divergence, temperature=0.7, return_outputs=True
    )
    assert_told(outputs, student, teacher, divergence=divergence, temperature=0.7)
    assert outputs.teacher_entropy[1] == 0.0


def test_temperatures_at_both_ends(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 4000)
    for temperature in (1e-2, 1e3):
        _, outputs = fastkd.kl_div(student, teacher, temperature=temperature, return_outputs=True)
        kl = fastkd.divergences.kl
        assert_told(outputs, student, teacher, divergence=kl, temperature=temperature)


def test_a_late_maximum(backend: Backend) -> None:
    """Where a kernel's running shift must move on, and a row that is beyond its fast form."""
    student, teacher = logits(backend, 4, 20_000)
    student[0, 9000] += 60.0
    teacher[0, 17_000] += 300.0
    student[1, 5000:] += 25.0
    labels = torch.tensor([9000, 3, 19_999, 4], device=backend.device)
    _, outputs = fastkd.distillation_loss(student, teacher, labels, return_outputs=True)
    assert_told(
        outputs, student, teacher, labels, divergence=fastkd.divergences.kl, temperature=2.0
    )


def test_a_row_beyond_the_fast_form(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 5000)
    student[1, 4999], teacher[1, 300] = 1e32, -1e35
    labels = torch.tensor([3, 4999, 4], device=backend.device)
    _, outputs = fastkd.distillation_loss(student, teacher, labels, return_outputs=True)
    assert outputs.student_entropy[1] == outputs.hard[1] == outputs.label_logprob[1] == 0
    assert outputs.student_logsumexp[1].item() == pytest.approx(5e31)
    logp = (teacher[1].double() / 2).log_softmax(-1)
    true = entropy(logp.clamp(min=-1e9))
    assert outputs.teacher_entropy[1].item() == pytest.approx(true.item(), rel=1e-5)
    assert outputs.soft[1] > 1e30


def test_nan_stays_in_its_row(backend: Backend) -> None:
    student, teacher = logits(backend, 3, 40)
    student[1, 3] = float("nan")
    _, outputs = fastkd.kl_div(student, teacher, return_outputs=True)
    for x in (outputs.soft, outputs.student_entropy, outputs.student_logsumexp):
        assert x.isnan().tolist() == [False, True, False]
    assert outputs.teacher_entropy.isfinite().all()


def test_rows_that_are_impossible_on_both_sides(backend: Backend) -> None:
    student, teacher = logits(backend, 2, 40)
    student[1], teacher[1] = -INF, -INF
    _, outputs = fastkd.kl_div(student, teacher, return_outputs=True)
    assert outputs.soft[1] == outputs.student_entropy[1] == outputs.teacher_entropy[1] == 0
    assert outputs.student_logsumexp[1] == outputs.teacher_logsumexp[1] == -INF


# ---- what else a call may be


def test_what_is_not_known_is_none(backend: Backend) -> None:
    student, teacher = logits(backend, 2, 9)
    labels = torch.tensor([1, 2], device=backend.device)
    _, outputs = fastkd.kl_div(student, teacher, return_outputs=True)
    assert outputs.hard is None and outputs.label_logprob is None
    for form in ("dense", "linear-student", "linear"):
        _, outputs = fastkd.distillation_loss(
            *in_form(student, teacher, form), labels, alpha=1.0, return_outputs=True
        )
        unknown = outputs.soft, outputs.teacher_entropy, outputs.teacher_logsumexp
        assert unknown == (None, None, None)
        true = F.cross_entropy(oracle(student), labels, reduction="none")
        assert_values(outputs.hard, F.cross_entropy(student, labels, reduction="none"), true)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_in_place_and_again(kernels: Backend, alpha: float) -> None:
    """The outputs are of the logits, which the gradient overwrites; a later backward tells none."""
    student, teacher = logits(kernels, 3, 40)
    labels = torch.tensor([1, 2, 3], device=kernels.device)
    for _ in range(3):  # the guess of the upstream gradient differs
        leaf = student.clone().requires_grad_()
        loss, outputs = fastkd.distillation_loss(
            leaf * 1, teacher, labels, alpha=alpha, inplace=True, return_outputs=True
        )
        (loss * 3).backward()
        assert_told(
            outputs,
            student,
            teacher,
            labels,
            divergence=fastkd.divergences.kl,
            temperature=2.0,
            hard=alpha > 0,
        )
    leaf = student.clone().requires_grad_()
    loss, outputs = fastkd.kl_div(leaf, teacher, return_outputs=True)
    before = outputs.soft.clone()
    outputs.soft.zero_()
    (grad,) = torch.autograd.grad(loss * 5, leaf, retain_graph=True, create_graph=True)
    grad.sum().backward()
    assert not outputs.soft.any() and before.any()


def test_packed_linear_rows(backend: Backend) -> None:
    student, teacher = logits(backend, 6, 50)
    labels = torch.tensor([7, IGNORED, 3, 0, IGNORED, 49], device=backend.device)
    eye = torch.eye(50, device=backend.device)
    packed = fastkd.LinearLogits(student, eye, pack=True, chunk_size=3)
    for alpha in (0.0, 0.5):
        _, outputs = fastkd.distillation_loss(
            packed, teacher, labels, alpha=alpha, return_outputs=True
        )
        assert_told(
            outputs,
            student,
            teacher,
            labels,
            divergence=fastkd.divergences.kl,
            temperature=2.0,
            hard=alpha > 0,
        )


def test_inside_torch_func() -> None:
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)

    def loss(s: Tensor, t: Tensor) -> Any:
        value, outputs = fastkd.kl_div(s.unsqueeze(0), t.unsqueeze(0), return_outputs=True)
        return value, (outputs.soft, outputs.student_entropy)  # an auxiliary result is no None

    grad, found = torch.func.vmap(torch.func.grad(loss, has_aux=True))(student, teacher)
    _, usual = fastkd.kl_div(student, teacher, return_outputs=True)
    assert grad.shape == (4, 9)
    for x, true in zip(found, (usual.soft, usual.student_entropy), strict=True):
        assert torch.allclose(x.squeeze(-1), true, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("operand", ["logits", "linear", "topk"])
def test_compiled(operand: str, alpha: float) -> None:
    """As eager, in one graph."""
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    labels = torch.tensor([1, IGNORED, 0, 8])

    def loss(s: Tensor, t: Tensor) -> Any:
        of: Any = fastkd.LinearLogits(s, torch.eye(9)) if operand == "linear" else s
        to: Any = fastkd.topk_from_logits(t, 3) if operand == "topk" else t
        return fastkd.distillation_loss(
            of, to, labels, alpha=alpha, temperature=1.0, return_outputs=True
        )

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        value, outputs = function(leaf, teacher)
        assert not any(x is not None and x.requires_grad for x in outputs)
        value.backward()
        found.append((leaf.grad, *outputs))
    for x, y in zip(*found, strict=True):
        assert x is y is None or torch.allclose(x, y, atol=1e-6)


def test_refused_where_it_is_not_supported() -> None:
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    with pytest.raises(NotImplementedError, match=r"return_outputs.*group"):
        fastkd.kl_div(student, teacher, group=object(), return_outputs=True)
