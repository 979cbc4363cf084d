"""Is it the teacher whose outputs are stored already? It is asked for some of them again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fastkd

from .codec import logprob_bound

SAMPLES, ROWS = 4, 16  # asked for again, at most
SLACK, SLACK_16 = 0.02, 0.15  # nats: what another batch size or 16 bits may move a mean by


def check_same(path: Any, spec: Any, stored: list[Any], said: Any, dtype: Any) -> None:
    """Compare samples of the cache with what the teacher says of them now.

    Args:
        path, spec: of the cache.
        stored: its samples, `TopK` [L, K] or [K], or logits.
        said: the same of the teacher at work: the k best columns where the cache has draws.
        dtype: of the teacher's logits.

    Raises:
        ValueError: they are apart by more than encoding and rounding explain.
    """
    slack = SLACK if dtype in (torch.float32, torch.float64) else SLACK_16
    for old, new in zip(stored, said, strict=True):
        apart = (_logits if isinstance(old, Tensor) else _topk)(spec, old, new)
        if apart > slack:
            raise ValueError(
                f"teacher: got outputs {apart:.3g} nats off what is stored of the same samples in "
                f"{str(path)[:150]}, expected the same teacher and the same data in the same order "
                "to go on with; write another's outputs to a folder of their own (model= and "
                "data= name whose they are)"
            )


def _logits(_: Any, old: Tensor, new: Tensor) -> float:
    """Mean distance beyond the rounding of 16 bits."""
    one, two = old.float(), new[: len(old)].float().cpu()
    rows = (one != 0) & one.isfinite() & two.isfinite()
    one, two = one[rows], two[rows]
    return float((one - two).abs().mean() - 2.0**-8 * one.abs().mean()) if len(one) else 0.0


def _topk(spec: Any, old: Any, new: fastkd.TopK) -> float:
    """Mean distance of the log-probabilities of columns that both have; 1 where few are."""
    if old.dim() == 1:
        old, new = old[None], new[None]
    some = (old.indices >= 0).any(-1).nonzero().flatten()[:ROWS]
    if not len(some):
        return 0.0
    columns, given = old.indices[some].long(), old.logprobs[some].double()
    there, now = new.indices[some.to(new.device)].long().cpu(), new.logprobs.double().cpu()[some]
    both = (columns[:, :, None] == there[:, None, :]) & (columns >= 0)[:, :, None]
    if spec.method == "sample":  # are as many draws among the best columns as these have mass?
        share = float(torch.where(both.any(-1), given.exp(), 0.0).sum(-1).mean())
        mass = float(now.exp().sum(-1).mean())
        noise = math.sqrt(max(mass * (1 - mass), 0.0) / (spec.k * len(some)))
        return max(abs(share - mass) - 6 * noise, 0.0)
    if float(both.sum()) < 0.5 * float((columns >= 0).sum()):
        return 1.0
    apart = (given[:, :, None] - now[:, None, :]).abs()
    bound = logprob_bound(spec.encoding, spec.k, given)[:, :, None].expand_as(apart)
    sure = both & apart.isfinite() & bound.isfinite()
    return float((apart - bound)[sure].mean()) if bool(sure.any()) else 1.0
