"""Formulas of the C++ backend that keep the last digit: js both ways round, disjoint sides."""

from __future__ import annotations

import pytest
import torch

import fastkd

pytest.importorskip("fastkd._C")


@pytest.mark.parametrize(("shape", "draws"), [((2, 3, 5), 200), ((4, 1000), 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_js_is_symmetric(dtype: torch.dtype, shape: tuple[int, ...], draws: int) -> None:
    with fastkd.use_backend("cpu"):
        for _ in range(draws):
            s, t = torch.randn(2, *shape).to(dtype)
            assert torch.equal(fastkd.js_div(s, t), fastkd.js_div(t, s))


@pytest.mark.parametrize("loss", [fastkd.skew_kl_div, fastkd.js_div])
def test_gradients_of_disjoint_sides(loss: object) -> None:
    s, t = torch.tensor([[0.0, -7, -10, -70]]), torch.tensor([[-100.0, -27, -23, 0]])
    grads = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        x = s.to(dtype, copy=True).requires_grad_()
        with fastkd.use_backend(backend):
            (grads[backend],) = torch.autograd.grad(loss(x, t.to(dtype)), x)  # type: ignore[operator]
    torch.testing.assert_close(grads["cpu"].double(), grads["reference"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [1e-12, 1e-9, 1e-4, 1 - 1e-4, 1 - 1e-9, 1 - 1e-12])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_js_of_a_share_that_rounds_to_0_or_1(beta: float, side: str) -> None:
    """Finite beside columns that one side excludes: 0 * log 0 is 0."""
    whole, holed = torch.randn(2, 3, 16)
    holed[:, ::2] = -torch.inf
    s, t = (holed, whole) if side == "student" else (whole, holed)
    found = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        x = s.to(dtype, copy=True).requires_grad_()
        with fastkd.use_backend(backend):
            loss = fastkd.js_div(x, t.to(dtype), beta=beta)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.isfinite().all()
        found[backend] = loss.detach().double()
    torch.testing.assert_close(found["cpu"], found["reference"], rtol=1e-4, atol=1e-7)
