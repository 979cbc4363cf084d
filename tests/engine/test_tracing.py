"""Losses with labels where no values are known: make_fx, FakeTensorMode, torch.jit.trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastkd

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl_div": lambda s, t, y: fastkd.kl_div(s, t, labels=y),
    "none": lambda s, t, y: fastkd.js_div(s, t, labels=y, reduction="none"),
    "weight": lambda s, t, y: fastkd.kl_div(s, t, labels=y, weight=t[:, 0].abs()),
    "distillation_loss": lambda s, t, y: fastkd.distillation_loss(s, t, y),
    "linear": lambda s, t, y: fastkd.kl_div(
        fastkd.LinearLogits(s, t), fastkd.LinearLogits(2 * s, t), labels=y
    ),
    "top-k": lambda s, t, y: fastkd.kl_div(s, fastkd.topk_from_logits(t, 3), labels=y),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture(autouse=True)
def reference() -> object:
    with fastkd.use_backend("reference"):
        yield


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 4), torch.randn(4, 4), torch.tensor([0, -100, 3, 2])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_loss
def test_make_fx(loss: Callable[..., Tensor], mode: str) -> None:
    """Labels are arguments: the graph serves other ones, and those out of range make NaN."""
    s, t, y = operands()
    graph = make_fx(loss, tracing_mode=mode)(s, t, y)
    for labels in (y, torch.tensor([-100, 1, 1, -100])):
        torch.testing.assert_close(graph(s, t, labels), loss(s, t, labels))
    assert graph(s, t, torch.tensor([0, 4, -100, 1])).isnan().any()


@each_loss
def test_fake_tensors(loss: Callable[..., Tensor]) -> None:
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in operands()]
    with mode:
        out = loss(*fakes)
    assert out.shape == loss(*operands()).shape and hasattr(out, "fake_mode")


@each_loss
def test_jit_trace(loss: Callable[..., Tensor]) -> None:
    given = operands()
    # the graphs of two tracings differ where a LinearLogits is made; the values are compared below
    traced = torch.jit.trace(loss, given, check_trace=False)
    torch.testing.assert_close(traced(*given), loss(*given))


def test_values_are_looked_at_elsewhere() -> None:
    s, t, _ = operands()
    with pytest.raises(ValueError, match="labels: got 4 in row 1"):
        fastkd.kl_div(s, t, labels=torch.tensor([0, 4, 1, 1]))
