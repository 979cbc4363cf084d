"""Training steps on a GPU: torch.compile, CUDA graphs, autocast with its gradient scaler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastkd

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
VOCAB, ROWS = 5003, 32


@pytest.fixture(autouse=True)
def poisoned_empty() -> None:
    """Not here: what stands in for torch.empty elsewhere cannot be traced."""


def _models() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    body, head = nn.Linear(16, 24, device="cuda"), nn.Linear(24, VOCAB, device="cuda")
    return body, head, torch.randn(VOCAB, 40, device="cuda")


def _batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator("cuda").manual_seed(seed)
    labels = torch.randint(VOCAB, (ROWS,), device="cuda", generator=draw)
    labels[3] = -100
    x, hidden = (torch.randn(ROWS, n, device="cuda", generator=draw) for n in (16, 40))
    return x, hidden, labels


def _loss(form: str, models: Any, x: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
    body, head, theirs = models
    mine, said = body(x).tanh(), hidden
    if form == "linear":
        student: Any = fastkd.LinearLogits(mine, head.weight, head.bias)
        return fastkd.distillation_loss(student, fastkd.LinearLogits(said, theirs), labels)
    logits = said @ theirs.t()
    if form == "topk":
        stored = fastkd.topk_from_logits(logits, 16, temperature=2.0)
        return fastkd.distillation_loss(head(mine), stored, labels)
    if form == "none":
        return fastkd.js_div(head(mine), logits, labels=labels, reduction="none").mean()
    return fastkd.distillation_loss(head(mine), logits, labels, inplace=form == "inplace")


FORMS = ["dense", "linear", "topk", "none", "inplace"]


def _step(form: str, models: Any, loss: Callable[..., Tensor] = _loss) -> Callable[..., Tensor]:
    weights = [*models[0].parameters(), *models[1].parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.5)  # one without a state, which a capture would reset

    def step(*batch: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(form, models, *batch)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def _path(step: Callable[..., Tensor]) -> Tensor:
    return torch.stack([step(*_batch(seed)).clone() for seed in range(4)])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_step(form: str, mode: str) -> None:
    """reduce-overhead: replayed from CUDA graphs."""
    expected = _path(_step(form, _models()))
    compiled = torch.compile(_loss, fullgraph=True, mode=mode)
    torch.testing.assert_close(
        _path(_step(form, _models(), compiled)), expected, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_step_captured_in_a_graph(form: str) -> None:
    """Forward, backward and optimizer, captured once and replayed with other batches."""
    expected = _path(_step(form, _models()))
    models = _models()
    weights = [*models[0].parameters(), *models[1].parameters()]
    step, held = _step(form, models), _batch(0)
    before = [weight.detach().clone() for weight in weights]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, memory is had, before the capture
        for _ in range(2):
            step(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for weight, was in zip(weights, before, strict=True):
            weight.copy_(was)
    with torch.cuda.graph(graph):
        value = step(*held)

    def replayed(*batch: Tensor) -> Tensor:
        for old, new in zip(held, batch, strict=True):
            old.copy_(new)
        graph.replay()
        return value

    torch.testing.assert_close(_path(replayed), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_autocast_with_a_gradient_scaler(form: str, dtype: torch.dtype) -> None:
    models, wide, batch = _models(), _models(), _batch(1)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    with torch.autocast("cuda", dtype):
        value = _loss(form, models, *batch)
    assert value.dtype == torch.float32
    scaler.scale(value).backward()
    exact = _loss(form, wide, *batch)
    exact.backward()
    torch.testing.assert_close(value, exact, rtol=2e-2, atol=2e-2)
    for one, other in zip(models[1].parameters(), wide[1].parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        grad = one.grad / scaler.get_scale()
        near = 2e-2 * float(other.grad.abs().max())
        torch.testing.assert_close(grad, other.grad, rtol=5e-2, atol=near)


def test_torch_func_on_a_gpu() -> None:
    student, teacher = torch.randn(4, 99, device="cuda"), torch.randn(4, 99, device="cuda")
    x = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(fastkd.kl_div(x, teacher), x)
    found = torch.func.grad(lambda s: fastkd.kl_div(s, teacher))(student)
    torch.testing.assert_close(found, expected)
