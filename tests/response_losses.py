"""The response losses by their papers' formulas, and the cases that their tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import FLOORS, assert_gradients, assert_values, oracle, row_factor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import distill


def _rest(x: Tensor, labels: Tensor) -> Tensor:
    """[n, V - 1]: the classes other than the label's."""
    other = torch.arange(x.size(-1), device=x.device) != labels.unsqueeze(-1)
    return x[other].view(x.size(0), -1)


def _at(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


def plain_mse(s: Tensor, t: Tensor, y: Tensor, *, centred: bool = True) -> Tensor:
    if centred:
        s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    return (s - t).square().sum(-1) / (2 * s.size(-1))


def plain_dkd(
    s: Tensor, t: Tensor, y: Tensor, *, temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    binary, rest = [], []
    for x in (t / temperature, s / temperature):
        log = x.log_softmax(-1)
        binary.append(torch.stack((_at(log, y), _rest(log, y).logsumexp(-1)), -1))
        rest.append(_rest(x, y).log_softmax(-1))
    return temperature**2 * (alpha * _kl(*binary) + beta * _kl(*rest))


def plain_nkd(s: Tensor, t: Tensor, y: Tensor, *, temperature: float, gamma: float = 1.5) -> Tensor:
    target = _at(t.softmax(-1), y) * _at(s.log_softmax(-1), y)
    p, logq = _rest(t / temperature, y).softmax(-1), _rest(s / temperature, y).log_softmax(-1)
    return -target - gamma * temperature**2 * (p * logq).sum(-1)


def plain_zscore(s: Tensor, t: Tensor, y: Tensor, *, temperature: float) -> Tensor:
    s, t = ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) for x in (s, t))
    logp, logq = ((x / temperature).log_softmax(-1) for x in (t, s))
    return temperature**2 * _kl(logp, logq)


def plain_cosine(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(s, t, -1)


def plain_dist(
    s: Tensor, t: Tensor, y: Tensor, *, temperature: float, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """0-d: not a loss of rows."""
    logq, logp = ((x / temperature).log_softmax(-1) for x in (s, t))
    # relative to the class's largest one: a correlation does not see it, and e^-5000 would be 0
    over_batch = [(x - x.detach().amax(0)).exp() for x in (logq, logp)]
    inter = 1 - _pearson(logq.exp(), logp.exp(), -1).mean()
    return beta * inter + gamma * (1 - _pearson(*over_batch, 0).mean())


def _pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    square_x, square_y = (z.square().sum(dim) for z in (x, y))
    one, both = (square_x == 0) | (square_y == 0), (square_x == 0) & (square_y == 0)
    r = (x * y).sum(dim) / torch.where(one, 1.0, square_x * square_y).sqrt()
    return torch.where(both, 1.0, torch.where(one, 0.0, r))


class Loss(NamedTuple):
    """A loss, its formula, and which options and inputs it has."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    temperature: bool = True
    labels: bool = False  # needs them
    masked: bool = False  # -inf is an input
    zero: bool = True  # at student = teacher

    @property
    def name(self) -> str:
        return self.ours.__name__


LOSSES = [
    Loss(distill.logit_mse, plain_mse, temperature=False),
    Loss(distill.dkd, plain_dkd, labels=True, masked=True),
    Loss(distill.nkd, plain_nkd, labels=True, masked=True, zero=False),
    Loss(distill.zscore, plain_zscore),
    Loss(distill.cosine, plain_cosine, temperature=False),
    Loss(distill.dist, plain_dist, masked=True),
]


BY_NAME = {loss.name: loss for loss in LOSSES}


PER_ROW = [loss for loss in LOSSES if loss.name != "dist"]


def each(losses: list[Loss]) -> Any:
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: loss.name)


def classes(n: int, v: int) -> Tensor:
    """A label for each row, two of them ignored: the first and the last but one."""
    y = torch.arange(n) % v
    y[0] = y[-2] = -100
    return y


def run(loss: Callable[..., Tensor], *operands: Any, **options: Any) -> tuple[Tensor, Tensor]:
    s, *others = operands
    s = s.detach().requires_grad_()
    value = loss(s, *others, **options)
    (grad,) = torch.autograd.grad(value, s, torch.ones_like(value))
    return value.detach(), grad


class Made(TorchDispatchMode):
    """The sizes of the tensors that are made meanwhile, in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
        out = f(*args, **(kw or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.sizes.append(out.numel())
        return out


def reduced(loss: Loss, s: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The formula on the rows that count, reduced."""
    names = ("weight", "reduction", "normalizer")
    rows = {name: options.pop(name) for name in names if name in options}
    keep, factor = row_factor(s, y, weight=rows.pop("weight", None), **{"reduction": "mean"} | rows)
    value = loss.plain(s[keep], t[keep], y[keep], **options)
    if not value.dim():
        return value
    value = value.new_zeros(keep.shape).masked_scatter(keep, value) * factor.to(value.dtype)
    return value if rows.get("reduction") == "none" else value.sum()


def assert_right(loss: Loss, s: Tensor, t: Tensor, y: Tensor, **options: Any) -> None:
    """The tolerance rule of all tests, for the value and the student's gradient."""
    value, grad = run(loss.ours, s, t, y, **options)
    assert grad.dtype == s.dtype and grad.shape == s.shape
    theirs = run(lambda *a, **k: reduced(loss, *a, **k), s, t, y, **options)
    true = run(lambda *a, **k: reduced(loss, *a, **k), oracle(s), oracle(t), y, **options)
    T = options.get("temperature", 1.0)
    nat = {"dkd": 9 * T * T, "nkd": 1.5 * T * T, "zscore": T * T}.get(loss.name, 1.0)
    assert_values(value, theirs[0], true[0], nat)
    # what the gradient is the difference of: probabilities times nat / T, directions over a norm
    kept = oracle(s)[y != -100]
    size = {"logit_mse": 0.0, "dist": 2 / T}.get(loss.name, nat / T)
    if loss.name == "zscore":
        size /= float(kept.std(-1).min())
    if loss.name == "cosine":
        size /= float(kept.norm(dim=-1).min())
    rounding = FLOORS[value.dtype] * size
    assert_gradients(grad, theirs[1], true[1], rounding)
    assert (grad[y == -100] == 0).all()
