"""Is it the same teacher? By how far two outputs are apart, and by its tokenizer's name."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastkd
from fastkd.arguments.messages import shown

ROWS = 16  # of a sample, at most


def apart(old: Any, new: Any, *, draws: int = 0) -> float:
    """Mean distance of two outputs of a sample, [L, ...] or of one row.

    Of logits where both are finite, of hidden states through the head; of `TopK` that of the
    log-probabilities of columns that both have, 1 where few are.

    Args:
        old, new: of one kind; `new` may have more rows.
        draws: how many draws of a teacher each row of `old` is; `new` has the best columns then.
    """
    if old.dim() == 1:
        old, new = old[None], new[None]
    if isinstance(old, fastkd.TopK):
        return _topk(old, new.to("cpu"), draws)
    if isinstance(old, fastkd.LinearLogits):
        rows = (old.hidden != 0).any(-1).nonzero().flatten()[:ROWS]
        moved = old.hidden[rows] - new.hidden.cpu()[rows]
        return abs(old.head.scale) * _mean(linear(moved, old.weight).float())
    one, two = old.float(), new[: len(old)].float().cpu()
    rows = (one != 0) & one.isfinite() & two.isfinite()
    return _mean((one - two)[rows])


def _mean(x: Tensor) -> float:
    return float(x.abs().mean()) if x.numel() else 0.0


def _topk(old: fastkd.TopK, new: fastkd.TopK, draws: int) -> float:
    some = (old.indices >= 0).any(-1).nonzero().flatten()[:ROWS]
    if not len(some):
        return 0.0
    columns, given = old.indices[some].long(), old.logprobs[some].double()
    there, now = new.indices[some].long(), new.logprobs[some].double()
    both = (columns[:, :, None] == there[:, None, :]) & (columns >= 0)[:, :, None]
    if draws:  # are as many draws among the best columns as these have mass?
        share = float(torch.where(both.any(-1), given.exp(), 0.0).sum(-1).mean())
        mass = float(now.exp().sum(-1).mean())
        noise = math.sqrt(max(mass * (1 - mass), 0.0) / (draws * len(some)))
        return max(abs(share - mass) - 6 * noise, 0.0)
    found = (given[:, :, None] - now[:, None, :])[both]
    found = found[found.isfinite()]
    return _mean(found) if 2 * len(found) >= float((columns >= 0).sum()) else 1.0


def tokenizer_name(tokenizer: Any) -> str:
    """A tokenizer's name: a str as it is; an object by the hash of its get_vocab()."""
    if isinstance(tokenizer, str):
        return tokenizer
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"tokenizer: got {shown(tokenizer)}, expected a name or a tokenizer")
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return "sha256:" + hashlib.sha256(json.dumps(entries).encode()).hexdigest()
