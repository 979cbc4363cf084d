"""Hidden states and weights whose logits are exact, and the rule for every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Backend
from oracle import FLOORS, assert_gradients, assert_values, oracle, plain
from torch import Tensor

import fastkd
from fastkd import LinearLogits
from fastkd.backends import products
from fastkd.backends.base import on_host
from fastkd.divergence import Divergence

NAN = float("nan")
KL = fastkd.divergences.kl
N, V, HS, HT = 7, 37, 16, 24
NAMES = ("hidden_s", "weight_s", "bias_s", "hidden_t", "weight_t", "bias_t")
each_way = pytest.mark.parametrize("reduction", ["mean", "none"])
Parts = dict[str, Tensor]

EXACT = {"bias": True, "scale": 0.5}  # logits without a rounding
HEADS: dict[str, dict[str, Any]] = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "scaled-bias": {"bias": True, "scale": -1.7},
    "softcap": {"softcap": 4.0},
    "everything": {"bias": True, "scale": 0.7, "softcap": 3.0},
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


def make_parts(
    backend: Backend,
    dtype: torch.dtype = torch.float32,
    n: int = N,
    v: int = V,
    v_t: int = 0,
    sizes: tuple[int, int] = (HS, HT),
) -> Parts:
    """Multiples of 1/4 from -1 to 1: their logits are exact in every dtype, as sums of few."""
    hs, ht = sizes
    shapes = {"hidden_s": (n, hs), "weight_s": (v, hs), "bias_s": (v,)}
    shapes |= {"hidden_t": (n, ht), "weight_t": (v_t or v, ht), "bias_t": (v_t or v,)}
    made = {name: torch.randint(-4, 5, shape) / 4 for name, shape in shapes.items()}
    return {name: x.to(backend.device, dtype) for name, x in made.items()}


def parts_in_a_row(backend: Backend, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, weight and bias of the student, then of the teacher, as the operators take them."""
    shapes = ((4, 5), (9, 5), (9,), (4, 7), (9, 7), (9,))
    return [torch.randn(shape).to(backend.device, dtype).requires_grad_() for shape in shapes]


def multiply_in(patch: pytest.MonkeyPatch, made: torch.dtype | None) -> None:
    """Products of 16 bits run in `made` on a CPU, or in their own dtype (None), whatever it is."""

    def multiplied_in(own: torch.dtype, device: torch.device) -> torch.dtype:
        return made if made and on_host(device) and own.itemsize < 4 else own

    patch.setattr(products, "multiplied_in", multiplied_in)


def as_linear(parts: Parts, side: str, bias: bool = False, **options: Any) -> LinearLogits:
    given = parts[f"bias_{side}"] if bias else None
    return LinearLogits(parts[f"hidden_{side}"], parts[f"weight_{side}"], given, **options)


def as_logits(
    parts: Parts, side: str, bias: bool = False, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The logits as a model's own code makes them."""
    z = parts[f"hidden_{side}"] @ parts[f"weight_{side}"].t()
    z = z + parts[f"bias_{side}"] if bias else z
    z = z * scale if scale != 1.0 else z
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def differentiate_parts(
    loss: Callable[[Parts], Tensor], parts: Parts, wrt: tuple[str, ...], upstream: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: x.detach().requires_grad_(name in wrt) for name, x in parts.items()}
    value = loss(leaves)
    by = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    grads = torch.autograd.grad(value, [leaves[name] for name in wrt], by)
    return value.detach(), dict(zip(wrt, grads, strict=True))


def check_parts(
    parts: Parts,
    head: dict[str, Any],
    labels: Tensor | None = None,
    *,
    sides: str = "st",
    wrt: tuple[str, ...] | None = None,
    upstream: Tensor | None = None,
    chunk_size: int | None = 3,
    pack: bool = False,
    divergence: Divergence = KL,
    **options: Any,
) -> dict[str, Tensor]:
    """The tolerance rule for the loss and the gradient of every part.

    sides: those that are linear. What a product rounds differs from ours to torch's, at random, so
    that a row's value is measured by the largest error of torch's, as gradients are.
    """
    if wrt is None:
        wrt = tuple(name for name in NAMES if head.get("bias") or not name.startswith("bias"))
    call = {"alpha": 0.0, "temperature": 1.0, "t_squared": False, "divergence": divergence}
    call |= options

    def ours(leaves: Parts) -> Tensor:
        operands = [
            as_linear(leaves, side, **head, chunk_size=chunk_size, pack=pack)
            if side in sides
            else as_logits(leaves, side, **head)
            for side in "st"
        ]
        return fastkd.distillation_loss(*operands, labels, **call)

    def torchs(leaves: Parts) -> Tensor:
        return plain(as_logits(leaves, "s", **head), as_logits(leaves, "t", **head), labels, **call)

    value, grads = differentiate_parts(ours, parts, wrt, upstream)
    near, near_grads = differentiate_parts(torchs, parts, wrt, upstream)
    true = {name: oracle(x) for name, x in parts.items()}
    exact, exact_grads = differentiate_parts(torchs, true, wrt, upstream)
    assert_values(value, exact + (near - exact).abs().max(), exact)
    for name in wrt:
        assert grads[name].shape == parts[name].shape
        assert grads[name].dtype == parts[name].dtype
        terms = 0.0
        if name.startswith("bias"):  # a sum over rows that cancels, of the logits' gradients
            logits = {side: as_logits(true, side, **head).detach() for side in "st"}
            leaf = logits[name[-1]].requires_grad_(True)
            loss = plain(logits["s"], logits["t"], labels, **call)
            by = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
            (rows,) = torch.autograd.grad(loss, leaf, by)
            terms = abs(head.get("scale", 1.0)) * float(rows.abs().flatten(0, -2).sum(0).max())
        rounding = FLOORS[value.dtype] * terms
        assert_gradients(grads[name], near_grads[name], exact_grads[name], rounding)
    return grads


def make_labels(backend: Backend, n: int = N, v: int = V) -> Tensor:
    labels = torch.randint(v, (n,), device=backend.device)
    labels[[0, 3, n - 1]] = -100
    return labels
