"""ULD by its definition, and what its tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from response_losses import classes, run  # noqa: F401  # of these tests, too
from torch import Tensor

from fastkd import distill

uld = distill.uld_loss


def plain(s: Tensor, t: Tensor, *, temperature: float = 1.0, top: int | None = None) -> Tensor:
    """The paper's sum over ranks [n]; with `top`, of the ranks from there on as one."""
    q, p = ((x / temperature).softmax(-1).sort(-1, descending=True).values for x in (s, t))
    width = max(q.size(-1), p.size(-1))
    q, p = (F.pad(x, (0, width - x.size(-1))) for x in (q, p))
    if top is not None:
        q, p = (torch.cat((x[:, :top], x[:, top:].sum(-1, keepdim=True)), -1) for x in (q, p))
    return (q - p).abs().sum(-1)


S, T, NONE = torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(0, dtype=torch.long)
