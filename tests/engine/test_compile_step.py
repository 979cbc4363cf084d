"""Whole training steps under torch.compile: forward, backward and the update, against eager ones.

`test_compile.py` has the losses by themselves; here they stand in a step, for several batch sizes,
and the number of graphs is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastkd

pytestmark = pytest.mark.usefixtures("fresh_compiler")
VOCAB, BATCHES = 11, (4, 7, 5)
Loss = Callable[["Student", Tensor, Tensor, Tensor], Tensor]
TEACHER = torch.randn(VOCAB, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def poisoned_empty() -> None:
    """Not here: what stands in for torch.empty elsewhere cannot be traced."""


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, VOCAB)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=draw) / 2

    def hidden(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


def _divergences(model: Student, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """All of them, each with the hard term, in one graph."""
    student, said = model(x), teacher @ TEACHER.t()
    values = [
        fastkd.distillation_loss(student, said, labels, divergence=name, label_smoothing=0.1)
        for name in fastkd.divergences
    ]
    return torch.stack(values).mean()


def _linear(reduction: str) -> Loss:
    def loss(model: Student, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student = fastkd.LinearLogits(model.hidden(x), model.head.weight, model.head.bias)
        said = fastkd.LinearLogits(teacher, TEACHER)
        return fastkd.distillation_loss(student, said, labels, reduction=reduction).mean()

    return loss


def _topk(linear: bool) -> Loss:
    def loss(model: Student, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        said = fastkd.topk_from_logits(fastkd.LinearLogits(teacher, TEACHER), 4, temperature=2.0)
        student: Any = model(x)
        if linear:
            student = fastkd.LinearLogits(model.hidden(x), model.head.weight, model.head.bias)
        return fastkd.distillation_loss(student, said, labels)

    return loss


def _plain(**options: Any) -> Loss:
    def loss(model: Student, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return fastkd.js_div(model(x), teacher @ TEACHER.t(), **options).sum()

    return loss


LOSSES: dict[str, Loss] = {
    "divergences": _divergences,
    "linear": _linear("mean"),
    "linear-none": _linear("none"),
    "topk": _topk(linear=False),
    "topk-linear": _topk(linear=True),
    "none": _plain(reduction="none"),
    "inplace": _plain(inplace=True),
}


# what autograd makes of their parts is what it makes of others': here they are traced
TRACED_ONLY = {"divergences", "linear-none", "topk-linear"}


def _batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    for n in BATCHES:
        labels = torch.randint(VOCAB, (n,), generator=draw)
        labels[1] = -100
        yield torch.randn(n, 5, generator=draw), torch.randn(n, 7, generator=draw), labels


def _path(step: Callable[..., Tensor]) -> Tensor:
    """The losses of some steps with batches of several sizes."""
    return torch.stack([step(*batch).clone() for batch in _batches()])


def _descent(loss: Loss) -> tuple[Student, Callable[..., Tensor]]:
    """A step of gradient descent, all of it torch operations."""
    model = Student()

    def step(*batch: Tensor) -> Tensor:
        value = loss(model, *batch)
        weights = list(model.parameters())
        grads = torch.autograd.grad(value, weights)
        with torch.no_grad():
            for weight, grad in zip(weights, grads, strict=True):
                weight -= 0.3 * grad
        return value.detach()

    return model, step


def _counted(
    step: Callable[..., Tensor], counter: CompileCounterWithBackend, graphs: list[int]
) -> Callable[..., Tensor]:
    """The step, which notes after each call how many graphs there are."""

    def run(*batch: Tensor) -> Tensor:
        value = step(*batch)
        graphs.append(counter.frame_count)
        return value

    return run


def _assert_alike(one: Student, other: Student, losses: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*losses)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.equal(one.body.weight, Student().body.weight)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_one_graph_for_every_batch_size(name: str) -> None:
    """Forward, backward and update, where torch traces a backward; else the forward."""
    traced = hasattr(torch._dynamo.config, "trace_autograd_ops")
    eager, step = _descent(LOSSES[name])
    expected = _path(step)
    counter = CompileCounterWithBackend("eager" if name in TRACED_ONLY else "aot_eager")
    if traced:
        model, step = _descent(LOSSES[name])
        step = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    else:
        compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend=counter)
        model, step = _descent(compiled)
    patched = torch._dynamo.config.patch(trace_autograd_ops=True) if traced else nullcontext()
    with patched:
        _assert_alike(model, eager, (_path(_counted(step, counter, graphs := [])), expected))
    assert graphs == graphs[:1] * len(BATCHES)


def _with(optimizer: Any, name: str) -> tuple[Student, Callable[..., Tensor]]:
    model = Student()
    update = optimizer(model.parameters(), lr=0.05)

    def step(*batch: Tensor) -> Tensor:
        update.zero_grad()
        value = LOSSES[name](model, *batch)
        value.backward()
        update.step()
        return value.detach()

    return model, step


@pytest.mark.parametrize(
    ("name", "autograd", "optimizer"),
    [
        ("linear", True, torch.optim.SGD),
        ("none", False, torch.optim.AdamW),
    ],
)
def test_a_step_with_an_optimizer(name: str, autograd: bool, optimizer: Any) -> None:
    """torch breaks the graph at its optimizers and at backward; nothing is compiled anew."""
    eager, step = _with(optimizer, name)
    expected = _path(step)
    # beside what is traced in one graph above, the optimizer's part is torch's own
    counter = CompileCounterWithBackend("aot_eager" if autograd else "eager")
    model, step = _with(optimizer, name)
    run = _counted(torch.compile(step, dynamic=True, backend=counter), counter, graphs := [])
    with torch._dynamo.config.patch(compiled_autograd=autograd):
        _assert_alike(model, eager, (_path(run), expected))
    assert graphs == graphs[:1] * len(BATCHES)


# ---- autocast and activation checkpointing


def _under_autocast(loss: Loss) -> Loss:
    def inside(model: Student, *batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, *batch)
        assert value.dtype == torch.float32  # what is summed up, whatever the logits come in
        return value

    return inside


def _gradients(loss: Loss, model: Student, batch: tuple[Tensor, ...]) -> list[Tensor]:
    value = loss(model, *batch)
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]


@pytest.mark.parametrize("name", ["none", "linear", "topk-linear"])
def test_autocast_in_a_graph_and_beside_one(name: str) -> None:
    batch = next(iter(_batches()))
    inside = _under_autocast(LOSSES[name])
    wide = _gradients(LOSSES[name], Student(), batch)
    eager = _gradients(inside, Student(), batch)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    graph = _gradients(compiled, Student(), batch)
    for one, two, exact in zip(eager, graph, wide, strict=True):
        near = {"rtol": 2e-2, "atol": 2e-2 * float(exact.abs().max())}
        torch.testing.assert_close(one, exact, **near)
        torch.testing.assert_close(two, exact, **near)
    assert not torch.equal(eager[1], wide[1])  # bfloat16 was at work


def test_linear_logits_under_autocast_multiply_as_a_linear_layer_does() -> None:
    """The logits of `F.linear` under autocast, in its dtype: the same loss and gradients."""
    model = Student()
    (x, teacher, labels), found = next(iter(_batches())), []
    for linear in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            student: Any = model(x)
            assert student.dtype == torch.bfloat16
            if linear:
                head = model.head
                student = fastkd.LinearLogits(model.hidden(x), head.weight, head.bias)
                assert student.dtype == torch.bfloat16
            loss = fastkd.distillation_loss(student, teacher @ TEACHER.t(), labels)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for dense, linear in zip(*found, strict=True):
        assert dense.dtype == linear.dtype == torch.float32
        torch.testing.assert_close(linear, dense, rtol=1e-2, atol=1e-2 * float(dense.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("name", ["divergences", "linear", "linear-none", "topk", "none"])
def test_activation_checkpointing_of_model_and_loss(name: str, reentrant: bool) -> None:
    model, batch = Student(), next(iter(_batches()))
    plain = _gradients(LOSSES[name], model, batch)
    x = batch[0].clone().requires_grad_()  # which a reentrant one asks for

    def again(x: Tensor) -> Tensor:
        return LOSSES[name](model, x, *batch[1:])

    value = checkpoint(again, x, use_reentrant=reentrant)
    value.backward()
    assert torch.equal(value, plain[0])
    for weight, expected in zip(model.parameters(), plain[1:], strict=True):
        torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=1e-7)


def test_activation_checkpointing_in_a_graph() -> None:
    model, batch = Student(), next(iter(_batches()))
    loss = LOSSES["linear"]

    def again(model: Student, *batch: Tensor) -> Tensor:
        return checkpoint(loss, model, *batch, use_reentrant=False)

    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    found, plain = _gradients(compiled, model, batch), _gradients(loss, model, batch)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)
