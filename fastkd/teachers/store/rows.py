"""A batch of a teacher's outputs as the rows of a shard, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.arguments.messages import shown

from .codec import LOGITS, encode, encode_tail, pack
from .format import CacheSpec


class Where:
    """Names a row among those that are kept, for a message."""

    def __init__(self, samples: list[int], keep: Tensor) -> None:
        self._samples, self._keep = samples, keep

    def __call__(self, row: int) -> str:
        sample, place = self._keep.nonzero()[row].tolist()
        return f"in row {place} of sample {self._samples[sample]}"


def row_counts(lengths: Any, size: int, longest: int) -> Tensor:
    if lengths is None:
        return torch.full((size,), longest)
    counts = torch.as_tensor(lengths).cpu()
    if counts.shape != (size,) or counts.is_floating_point():
        got = f"{list(counts.shape)} of {counts.dtype}"
        raise ValueError(f"lengths: got {got}, expected [{size}] integers")
    if size and not 0 <= int(counts.min()) <= int(counts.max()) <= longest:
        got = f"{int(counts.min())} to {int(counts.max())}"
        raise ValueError(f"lengths: got {got}, expected 0 to {longest}")
    return counts.long()


def _raise_first(wrong: Tensor, values: Tensor, where: Where, name: str, expected: str) -> None:
    """Raise for the first element of `wrong` [R] or [R, K] that is set, if any."""
    if bool(wrong.any()):
        place = wrong.nonzero()[0]
        got = values[tuple(place)].item()
        raise ValueError(f"{name}: got {got:g} {where(int(place[0]))}, expected {expected}")


def topk_rows(outputs: Any, keep: Tensor, spec: CacheSpec, where: Where) -> dict[str, Tensor]:
    """Rows of a `TopK` [B, L, K] for a shard."""
    if not isinstance(outputs, fastkd.TopK):
        raise TypeError(f"outputs: got a tensor, expected TopK: the cache keeps {spec.k} columns")
    k, vocab = spec.k, spec.vocab_size
    if outputs.size(-1) != k:
        raise ValueError(f"outputs: got K = {outputs.size(-1)}, expected {k}, the cache's k")
    for name in ("temperature", "tail"):
        if (got := getattr(outputs, name)) != (wanted := getattr(spec, name)):
            raise ValueError(f"outputs: got {name}={shown(got)}, expected the cache's {wanted!r}")
    if (outputs.tail_logprob is not None) != spec.measured:
        kinds = ("without tail_logprob", "with tail_logprob")
        raise ValueError(f"outputs: got one {kinds[not spec.measured]}, expected one as before")
    indices = outputs.indices.detach().cpu()[keep].long()
    logprobs = outputs.logprobs.detach().cpu()[keep].double()
    indices = indices.masked_fill(logprobs == -torch.inf, -1)  # absent, as for the losses
    named = indices >= 0
    wrong = (indices < -1) | (indices >= vocab)
    _raise_first(wrong, indices, where, "indices", f"0 to {vocab - 1}, or -1 for padding")
    order = indices.sort(-1).values
    again = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
    _raise_first(again, order, where, "indices", "each column once, -1 for padding")
    wrong = named & ~(logprobs <= 0.0)
    _raise_first(wrong, logprobs, where, "logprobs", "a log-probability, at most 0")
    logprobs = torch.where(named, logprobs, -torch.inf)
    stored = logprobs
    tensors = {"indices": pack(indices, vocab), **encode(logprobs, spec.encoding)}
    if outputs.tail_logprob is not None:
        tail = outputs.tail_logprob.detach().cpu()[keep].double()
        wrong = ~(tail <= 0.0)
        _raise_first(wrong, tail, where, "tail_logprob", "a log-probability, at most 0")
        tensors["tail_logprob"] = encode_tail(tail)
        stored = torch.cat((logprobs, tail.unsqueeze(-1)), -1) if spec.tail == "bucket" else stored
    if spec.tail in ("bucket", "drop"):  # the others divide by the mass, whatever it is
        mass = stored.exp().sum(-1)
        wrong = mass > fastkd.TopK.most_mass(stored)
        _raise_first(wrong, mass, where, "mass", "at most 1 but for rounding")
    return tensors


def logit_rows(outputs: Any, keep: Tensor, spec: CacheSpec, where: Where) -> dict[str, Tensor]:
    """Rows of logits [B, L, V] for a shard."""
    if not isinstance(outputs, Tensor):
        raise TypeError("outputs: got TopK, expected a tensor: the cache keeps all logits")
    if outputs.size(-1) != spec.vocab_size or not outputs.is_floating_point():
        got = f"{list(outputs.shape)} of {outputs.dtype}"
        raise ValueError(f"outputs: got {got}, expected floats [..., {spec.vocab_size}]")
    given = outputs.detach().cpu()[keep]
    wrong = given.isnan() | (given == torch.inf)
    _raise_first(wrong, given, where, "logits", "a number or -inf")
    kept = given.to(LOGITS[spec.encoding])
    wrong = kept.isinf() & ~given.isinf()
    expected = f"what {spec.encoding} holds; encoding='float32' holds more"
    _raise_first(wrong, given, where, "logits", expected)
    return {"logits": kept.contiguous()}
