"""What mdistiller and torchdistill compute of features and relations, beside the line to write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import distill
from fastkd.distill import attention, relations

N, T = 8, 2.0


def _distances(x: Tensor) -> Tensor:
    """Between all N x N samples, in units of the mean of those that are not 0."""
    between = (x.unsqueeze(1) - x.unsqueeze(0)).square().sum(-1)
    away = between.clamp_min(1e-12).sqrt() * (1 - torch.eye(N, dtype=x.dtype))
    return away / away[away > 0].mean()


def _angles(x: Tensor) -> Tensor:
    towards = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    return towards @ towards.mT


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    """One minus the mean of the rows' correlations."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return 1 - F.cosine_similarity(a, b, dim=1).mean()


def _dist(s: Tensor, t: Tensor) -> Tensor:
    q, p = (x.div(T).softmax(1) for x in (s, t))
    return T**2 * (0.5 * _unlike(q, p) + 2.0 * _unlike(q.T, p.T))


def _standardised(s: Tensor, t: Tensor) -> Tensor:
    s, t = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) / T for x in (s, t))
    return F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")


def _maps(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(_as_maps(x).square().mean(1).flatten(1)) for x in (s, t))
    return (s - t).square().mean()


def _as_maps(x: Tensor) -> Tensor:
    return x.view(N, 2, 3, 2)


def _similar(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(x @ x.T) for x in (s, t))
    return (s - t).square().sum() / N**2


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "RKD, distances": (
        lambda s, t: F.smooth_l1_loss(_distances(s), _distances(t)),
        lambda s, t: (1 - 1 / N) * relations.rkd_distance(s, t),
    ),
    "RKD, angles": (
        lambda s, t: F.smooth_l1_loss(_angles(s), _angles(t)),
        lambda s, t: (1 - 1 / N) * (1 - 2 / N) * relations.rkd_angle(s, t),
    ),
    "SP": (_similar, relations.sp),
    "AT": (_maps, lambda s, t: attention.at(_as_maps(s), _as_maps(t))),
    "DISTLoss": (
        _dist,
        lambda s, t: T**2 * distill.dist(s, t, beta=0.5, gamma=2.0, temperature=T),
    ),
    "LogitStdKDLoss": (_standardised, lambda s, t: distill.zscore(s, t, temperature=T) / T**2),
}


@pytest.mark.parametrize(("theirs", "ours"), PAIRS.values(), ids=PAIRS.keys())
def test_the_line_equals_their_loss(
    theirs: Callable[..., Tensor], ours: Callable[..., Tensor]
) -> None:
    s, t = torch.randn(2, N, 12, dtype=torch.float64)
    s.requires_grad_()
    sides = [side(s, t) for side in (ours, theirs)]
    torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(side, s)[0] for side in sides]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)
