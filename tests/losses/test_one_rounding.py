"""What users make of a loss before backward: one rounding, the same bits always."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import Backend, each_name
from factor_parts import (  # noqa: F401
    CPU,
    Loss,
    N,
    T,
    V,
    each_operand,
    inputs,
    loss_of,
    nothing_remembered,
)
from linear_parts import multiply_in
from pairwise import pairwise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.backends import products as products_of
from fastkd.divergence import Divergence
from fastkd.engine import autograd as upstreams

FACTORS = [2.0**-10, 2.0**4, 65536.0, 2.0**20, 0.3, -1.7, 1234.5]
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
each_factor = pytest.mark.parametrize("factor", FACTORS, ids=lambda x: f"{x:g}")
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES.keys())


def exact(loss: Loss, student: Any, teacher: Any, leaf: Tensor, factor: float) -> Tensor:
    """The gradient in float64, by the reference."""
    wide = leaf.detach().double().requires_grad_()
    if isinstance(student, fastkd.LinearLogits):
        student = fastkd.LinearLogits(wide, student.weight.double())
    else:
        student = wide
    teacher = teacher.double() if isinstance(teacher, Tensor) else teacher
    with fastkd.use_backend("reference"):
        (grad,) = torch.autograd.grad(loss(student, teacher) * factor, wide)
    return grad


def away(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


@pairwise
@each_operand
@each_name
@each_half
@each_factor
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("products", [None, torch.float32], ids=["16 bits", "float32"])
@pytest.mark.interpreted(6)
def test_a_gradient_is_rounded_once_with_its_factor(
    kernels: Backend,
    operand: str,
    divergence: Divergence,
    dtype: torch.dtype,
    factor: float,
    reduction: str,
    products: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    multiply_in(monkeypatch, products)
    s, t, leaf = inputs(kernels, dtype, operand)
    loss = loss_of(divergence, reduction)
    truth = exact(loss, s, t, leaf, factor)
    if not bool(truth.to(dtype).isfinite().all()):
        pytest.skip("beyond float16")
    once = away(truth.to(dtype), truth)
    # in 16 bits the logits' gradient is rounded, too, and the sum of products
    halves = products_of.multiplied_in(dtype, leaf.device) == dtype
    most = 2.5 if operand == "linear" and halves else 1.1
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss(s, t) * factor, leaf)
        assert away(grad, truth) <= most * once + 1e-7


# ---- the same bits, whatever happened before


@pairwise
@each_operand
@each_name
@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.interpreted(3)
def test_bits_do_not_depend_on_what_happened_before(
    kernels: Backend, operand: str, divergence: Divergence, inplace: bool, dtype: torch.dtype
) -> None:
    s, t, leaf = inputs(kernels, dtype, operand)
    loss = loss_of(divergence, inplace=inplace and operand != "linear")

    def step(factor: float) -> Tensor:
        own = leaf.detach().clone().requires_grad_()
        student = own * 1 if operand != "linear" else fastkd.LinearLogits(own, s.weight)
        (loss(student, t) * factor).backward()
        assert own.grad is not None
        return own.grad

    factors = [3.7, 3.7, 3.7, 0.11, 8.0] if not inplace else [3.7, 3.7, 3.7, 3.7]
    fresh = {}
    for factor in set(factors):
        upstreams._places.of.clear()
        fresh[factor] = step(factor)
    if inplace and kernels.name == "gpu":  # where a wrong guess is not seen on the host
        fresh[3.7] = step(3.7)
    else:
        upstreams._places.of.clear()
    for factor in factors:
        torch.testing.assert_close(step(factor), fresh[factor], rtol=0, atol=0)


@each_operand
@pytest.mark.interpreted(3)
def test_a_second_backward_gives_the_first_one_s_gradient(kernels: Backend, operand: str) -> None:
    s, t, leaf = inputs(kernels, torch.bfloat16, operand)
    for _ in range(2):
        value = loss_of(fastkd.divergences.kl)(s, t) * 0.7
        first = torch.autograd.grad(value, leaf, retain_graph=True)[0].clone()
        second = torch.autograd.grad(value, leaf, retain_graph=True)[0]
        assert torch.equal(first, second)
        double = torch.autograd.grad(value, leaf, torch.tensor(2.0, device=leaf.device))[0]
        assert torch.equal(double, 2 * first)


# ---- factors that are no ordinary numbers


@each_operand
@pytest.mark.parametrize("factor", [0.0, -0.0, float("inf"), float("nan")])
@pytest.mark.interpreted(3)
def test_upstreams_of_0_and_beyond_numbers(kernels: Backend, operand: str, factor: float) -> None:
    s, t, leaf = inputs(kernels, torch.float32, operand)
    labels = torch.zeros(N, dtype=torch.long, device=kernels.device)
    labels[3] = -100
    loss = loss_of(fastkd.divergences.kl, labels=labels)
    for _ in range(3):
        (grad,) = torch.autograd.grad(loss(s, t) * factor, leaf)
        assert bool((grad[3] == 0).all()) or operand == "linear"
        kept = torch.cat((grad[:3], grad[4:]))
        if factor == 0.0:
            assert bool((kept == 0).all())
        else:
            assert not bool(kept.isfinite().any())
    (grad,) = torch.autograd.grad(loss(s, t) * 2.0, leaf)
    assert bool(grad.isfinite().all())


# ---- where training code puts it


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, V))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    net, x, t = model(), torch.randn(N, 6, requires_grad=True), torch.randn(N, V)

    def whole(x: Tensor) -> Tensor:
        return fastkd.kl_div(net(x), t, temperature=T)

    grads = []
    for run in range(6):
        value = checkpoint(whole, x, use_reentrant=reentrant) if run % 2 else whole(x)
        (value * T * T / 3).backward()
        grads.append(x.grad)
        x.grad = None
    for grad in grads[1:]:
        assert grad is not None
        torch.testing.assert_close(grad, grads[0], rtol=0, atol=0)


def test_a_loop_with_a_gradient_scaler_is_that_of_torch() -> None:
    """Accumulated, mixed with a cross-entropy, under float16's scaler."""
    x, t = torch.randn(4, N, 6), torch.randn(4, N, V)
    labels = torch.randint(V, (4, N))

    def train(divergence: Loss) -> list[Tensor]:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for _step in range(6):
            for part in range(4):
                with torch.autocast("cpu", torch.float16):
                    logits = net(x[part])
                soft = divergence(logits, t[part])
                hard = torch.nn.functional.cross_entropy(logits.float(), labels[part])
                scaler.scale((0.7 * soft * T * T + 0.3 * hard) / 4).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [p.detach() for p in net.parameters()]

    def plain(s: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = (s.float() / T).log_softmax(-1), (t / T).log_softmax(-1)
        return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    ours = train(lambda s, t: fastkd.kl_div(s, t, temperature=T))
    for a, b in zip(ours, train(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
