"""torch.compile: no graph break, the same numbers as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import NAMED, REDUCTIONS, Backend, each_form, each_name, in_form, logits
from linear_parts import parts_in_a_row
from pairwise import pairwise
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd
from fastkd.divergence import Divergence

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _run(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    s, t = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = loss(s, t)
    return (value.detach(), *torch.autograd.grad(value.sum(), (s, t)))


def _close(compiled: tuple[Tensor, ...], eager: tuple[Tensor, ...]) -> None:
    for one, other in zip(compiled, eager, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other)


def _compiled(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """fullgraph: a graph break is an error."""
    return torch.compile(loss, fullgraph=True, **{"backend": "aot_eager", **options})


@pairwise
@each_form
@each_name
@pytest.mark.interpreted(1)
def test_compiled_is_eager(form: str, kernels: Backend, divergence: Divergence) -> None:
    student, teacher = logits(kernels, 4, 9)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return fastkd.distillation_loss(*in_form(s, t, form), alpha=0.0, divergence=divergence)

    _close(_run(_compiled(loss), student, teacher), _run(loss, student, teacher))


@pairwise
@each_form
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.interpreted(1)
def test_compiled_with_every_option(form: str, kernels: Backend, reduction: str) -> None:
    student, teacher = logits(kernels, 4, 12, (torch.bfloat16, torch.float32))
    labels = torch.tensor([1, -100, 0, 8], device=kernels.device)
    weight = torch.rand(4, device=kernels.device)
    options = {"normalizer": 3.0} if reduction == "mean" else {}

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return fastkd.distillation_loss(
            *in_form(s, t, form),
            labels,
            divergence="skew_kl",
            label_smoothing=0.1,
            z_loss=0.01,
            weight=weight,
            vocab_size=9,
            reduction=reduction,
            **options,
        )

    _close(_run(_compiled(loss), student, teacher), _run(loss, student, teacher))


LOSSES = (*NAMED.values(), fastkd.nn.KLDiv(temperature=2.0), fastkd.nn.JSDiv(beta=0.2))


def test_compiled_functions_and_modules() -> None:
    """All in one graph; what autograd makes of their parts is in the tests above."""
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)

    def losses(s: Tensor, t: Tensor) -> Tensor:
        return torch.stack([loss(s, t) for loss in LOSSES])

    compiled = _compiled(losses, backend="eager")
    _close(_run(compiled, student, teacher), _run(losses, student, teacher))


def test_no_graph_break() -> None:
    explained = torch._dynamo.explain(fastkd.distillation_loss)(
        torch.randn(4, 9).requires_grad_(), torch.randn(4, 9), torch.tensor([1, 2, -100, 3])
    )
    assert explained.graph_break_count == 0 and explained.graph_count == 1


def test_dynamic_shapes_compile_once(kernels: Backend) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return fastkd.js_div(s, t, temperature=2.0)

    compiled = _compiled(loss, dynamic=True, backend=counter)
    frames = []
    for n, v in ((2, 9), (3, 9), (2, 31)):
        student, teacher = logits(kernels, n, v)
        _close(_run(compiled, student, teacher), _run(loss, student, teacher))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


def test_bad_labels_under_compile_are_nan_and_never_a_read_out_of_bounds(kernels: Backend) -> None:
    """Values cannot be checked in a graph: a bad label makes its row NaN and no other."""
    student, teacher = logits(kernels, 4, 9)
    labels = torch.tensor([1, 1_000_000_000, 0, -7], device=kernels.device)
    good = labels.clone()
    good[[1, 3]] = 0

    def loss(s: Tensor, t: Tensor, at: Tensor) -> Tensor:
        return fastkd.distillation_loss(s, t, at, reduction="none")

    value = _compiled(loss)(student, teacher, labels)
    expected = loss(student, teacher, good)
    assert value.isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(value[[0, 2]], expected[[0, 2]])


def test_ignored_rows_under_compile(kernels: Backend) -> None:
    student, teacher = logits(kernels, 4, 9)
    student[1] = teacher[1] = float("nan")
    labels = torch.tensor([1, -100, 0, 8], device=kernels.device)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return fastkd.distillation_loss(s, t, labels)

    value, grad_s, grad_t = _run(_compiled(loss), student, teacher)
    assert value.isfinite() and not grad_s[1].any() and not grad_t[1].any()
    _close((value, grad_s, grad_t), _run(loss, student, teacher))


def test_bad_input_under_compile_is_refused() -> None:
    compiled = _compiled(lambda s, t: fastkd.kl_div(s, t, temperature=-1.0))
    with pytest.raises(Exception, match=r"temperature: got -1\.0"):
        compiled(torch.randn(4, 9), torch.randn(4, 9))


def test_inductor() -> None:
    """The whole way through the compiler: forward, backward, and what it fuses around the loss."""
    # more labels than rows: where a batch has as many, the slice is the whole, of another graph
    weight, labels = torch.randn(31, 8), torch.tensor([1, 2, -100, 30, 0, 5, 7])

    def loss(x: Tensor, t: Tensor) -> Tensor:
        student = (x @ weight.t()).tanh() * 3
        return fastkd.distillation_loss(student, t, labels[: x.size(0)], divergence="js")

    # no vectors of its own: their headers are half of what it compiles
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, options={"cpp.simdlen": 1})
    for n in (6, 4):
        hidden, teacher = torch.randn(n, 8), torch.randn(n, 31)
        _close(_run(compiled, hidden, teacher), _run(loss, hidden, teacher))


def test_a_compiled_training_step() -> None:
    """Ten steps of a small student, compiled and not: the same path, and the loss falls."""
    x, labels = torch.randn(16, 8), torch.randint(31, (16,))
    teacher = 2 * torch.randn(16, 31)
    paths = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        student = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 31)
        )
        optimizer = torch.optim.SGD(student.parameters(), lr=0.3)

        def step(student: torch.nn.Module = student) -> Tensor:
            return fastkd.distillation_loss(student(x), teacher, labels)

        run = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = run()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        paths.append(torch.stack(losses))
    assert paths[0][-1] < 0.9 * paths[0][0]
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-4, atol=0)


def test_a_temperature_that_changes(kernels: Backend) -> None:
    """Annealing: torch.compile turns a number that changes between calls into a symbol."""
    student, teacher = logits(kernels, 2, 9)

    def loss(s: Tensor, t: Tensor, temperature: float) -> Tensor:
        return fastkd.kl_div(s, t, temperature=temperature)

    compiled = _compiled(loss)
    for temperature in (1.0, 2.0, 3.5):
        _close(
            _run(lambda s, t, at=temperature: compiled(s, t, at), student, teacher),
            _run(lambda s, t, at=temperature: loss(s, t, at), student, teacher),
        )


def test_compiled_on_the_reference() -> None:
    """Where the extension is not built, a compiled step runs all the same."""
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    labels = torch.tensor([1, -100, 0, 8])

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return fastkd.distillation_loss(s, t, labels)

    with fastkd.use_backend("reference"):
        _close(_run(_compiled(loss), student, teacher), _run(loss, student, teacher))


@pytest.mark.parametrize("loss", [fastkd.kl_div, fastkd.distillation_loss])
def test_a_temperature_that_changes_compiles_again(loss: Any) -> None:
    """What the README says of schedules: another graph for each value, not another value."""
    torch.compiler.reset()
    s, t = torch.randn(3, 7), torch.randn(3, 7)
    options = {"alpha": 0.0} if loss is fastkd.distillation_loss else {}
    compiled = torch.compile(
        lambda T: loss(s, t, temperature=T, **options), backend="eager", fullgraph=True
    )
    for temperature in (1.0, 1.5, 4, 3, 2.5):
        want = loss(s, t, temperature=temperature, **options)
        torch.testing.assert_close(compiled(temperature), want)


# ---- logits that are never built

LINEAR_OPTIONS = {"scale": 0.5, "softcap": 3.0, "chunk_size": 2}


def _linear_loss(*parts: Tensor, **options: Any) -> Tensor:
    student = fastkd.LinearLogits(*parts[:3], **LINEAR_OPTIONS)
    return fastkd.js_div(student, fastkd.LinearLogits(*parts[3:]), **options)


@pytest.mark.parametrize(
    ("compiler", "reduction"), [("aot_eager", "mean"), ("aot_eager", "none"), ("inductor", "none")]
)
@pytest.mark.interpreted(1)
def test_compiled_linear_logits(kernels: Backend, compiler: str, reduction: str) -> None:
    parts = parts_in_a_row(kernels)
    labels = torch.tensor([1, -100, 0, 8], device=kernels.device)

    def loss(*parts: Tensor) -> Tensor:
        return _linear_loss(*parts, labels=labels, reduction=reduction)

    results = []
    for run in (_compiled(loss, backend=compiler), loss):
        value = run(*parts)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), parts)))
    _close(*results)


def test_compiled_linear_logits_under_autocast(kernels: Backend) -> None:
    parts = parts_in_a_row(kernels)

    def loss(*parts: Tensor) -> Tensor:
        with torch.autocast(kernels.device.type, dtype=torch.bfloat16):
            return _linear_loss(*parts)

    results = []
    for run in (_compiled(loss), loss):
        value = run(*parts)
        results.append((value.detach(), *torch.autograd.grad(value, parts)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_a_compiled_labels_only_loss_of_linear_logits(kernels: Backend) -> None:
    parts = parts_in_a_row(kernels)
    labels = torch.tensor([1, -100, 0, 8], device=kernels.device)

    def loss(*parts: Tensor) -> Tensor:
        sides = fastkd.LinearLogits(*parts[:3]), fastkd.LinearLogits(*parts[3:])
        return fastkd.distillation_loss(*sides, labels, alpha=1.0)

    results = []
    for run in (_compiled(loss), loss):
        value = run(*parts)
        results.append((value.detach(), *torch.autograd.grad(value, parts)))
    _close(*results)
    assert not any(grad.any() for grad in results[0][4:])
