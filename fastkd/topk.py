"""From logits to a `TopK`: the best k columns or k samples of each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, shown
from fastkd.arguments.numbers import integer
from fastkd.backends import reference
from fastkd.backends.base import Backend, chunks, without_autocast
from fastkd.backends.choice import pick
from fastkd.engine import validate
from fastkd.operands import LinearLogits, Operand, Tail, TopK, build

INF = math.inf
# Elements of a copy of some rows, in which the columns that are kept are taken out to sum the rest
BLOCK = 2**22


@torch.no_grad()
def topk_from_logits(
    logits: Operand,
    k: int,
    *,
    method: Literal["top", "sample"] = "top",
    temperature: float = 1.0,
    tail: Tail = "bucket",
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> TopK:
    """The best k log-probabilities of each row with the mass of the rest, or k samples of it.

        "top"     log p of the k largest, tail_logprob = log(sum of p over the others), summed by
                  itself and so without cancellation
        "sample"  k independent draws from p, with replacement: each column that came up once or
                  more, with its share of the draws; tail_logprob = -inf. The shares are unbiased
                  estimates of p, and so is the gradient of kl_div against them.

    p = softmax(logits / T). Works on a few rows at a time: no log-softmax of all of them is built,
    nor the logits of a `LinearLogits`. No gradient.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, or a `LinearLogits`.
        k: columns kept, or draws made, 1 <= k (<= V for "top").
        method: "top" or "sample".
        temperature: T > 0, finite.
        tail: what the loss makes of the rest, see `TopK`.
        vocab_size: use the first n columns only.
        generator: for the draws.

    Returns:
        TopK with logprobs and tail_logprob in float32 (float64 for float64 logits) and indices in
        int32, by falling log p for "top" and by rising index for "sample", where -1 pads.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Anshumann et al. 2025 (random sampling distillation), arXiv 2503.16870.
    """
    vocab = validate.operands(logits, logits, vocab_size)
    temperature = validate.temperature(temperature)
    if not isinstance(method, str) or method not in ("top", "sample"):
        raise ValueError(f"method: got {shown(method)}, expected 'top' or 'sample'")
    draws = integer(k)
    if draws is None:
        raise TypeError(f"k: got {describe(k)}, expected an integer")
    k = draws
    most = vocab if method == "top" else 2**31
    if not 1 <= k <= most:
        upper = f" <= {vocab}" if method == "top" else ""
        raise ValueError(f"k: got {shown(k)}, expected 1 <= k{upper}")
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    lead = logits.shape[:-1]
    backend: Backend = reference.BACKEND if torch.compiler.is_compiling() else pick(logits.device)
    parts = []
    for x in _blocks(logits, vocab):
        if method == "top":
            parts.append(_top(backend, x, k, temperature, acc))
        else:
            parts.append(_sample(backend, x, k, temperature, acc, generator))
    logprobs, indices, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopK(
        logprobs.view(*lead, k),
        indices.view(*lead, k),
        tail_logprob=rest.view(lead),
        temperature=temperature,
        tail=tail,
    )


def _blocks(logits: Operand, vocab: int) -> Iterator[Tensor]:
    """A few rows of logits at a time, [rows, vocab]."""
    step = max(1, BLOCK // vocab)
    x = logits.hidden if isinstance(logits, LinearLogits) else logits
    flat = x.resolve_neg().reshape(-1, x.size(-1))
    if isinstance(logits, LinearLogits):
        # products of few rows read all of the weight for little
        step = max(step, min(chunks(logits.device).budget // (8 * vocab), 512))

    if torch.compiler.is_compiling():  # a loop would be written out, for one number of rows
        blocks = (flat,)
    else:
        blocks = flat.split(step)
    for x in blocks:
        if isinstance(logits, LinearLogits):
            with without_autocast(logits.device):
                yield build(x, logits.weight, logits.bias, logits.head, vocab)
        else:
            yield x[:, :vocab]


def _top(
    backend: Backend, x: Tensor, k: int, temperature: float, acc: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    best = x.topk(k, -1)
    top, total, _ = backend.stats(x.unsqueeze(0), temperature, x.size(-1), None).to(acc).unbind(-1)
    others = x.scatter(-1, best.indices, -INF)
    stats = backend.stats(others.unsqueeze(0), temperature, x.size(-1), None).to(acc)
    log_total = total.log()
    logprobs = (best.values.to(acc) - top.unsqueeze(-1)) / temperature - log_total.unsqueeze(-1)
    rest = (stats[:, 0] - top) / temperature + stats[:, 1].log() - log_total
    # -inf and not NaN where nothing is left: the maximum of no logits is -inf, their sum 0
    rest = torch.where(stats[:, 1] == 0, torch.where(total.isnan(), total, -INF), rest)
    return logprobs.clamp_max(0.0), best.indices.to(torch.int32), rest.clamp_max(0.0)


def _sample(
    backend: Backend,
    x: Tensor,
    k: int,
    temperature: float,
    acc: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of the distribution function: first the piece of the row, then the column in it."""
    size = _piece(x.size(-1), k)
    mass, top = _masses(backend, x, size, temperature, acc)
    below = mass.cumsum(-1)
    total = below[:, -1:]
    where = torch.rand((x.size(0), k), dtype=torch.float64, device=x.device, generator=generator)
    where = where * total
    drawn = _first_above(below, where)
    if size > 1:
        before = torch.where(drawn > 0, below.gather(-1, (drawn - 1).clamp_min(0)), 0.0)
        start = (drawn * size).clamp_max(x.size(-1) - size)  # the last piece may be a short one
        row = torch.arange(x.size(0), device=x.device).unsqueeze(-1)
        own = x.unfold(-1, size, 1)[row, start].to(acc)
        own = own.sub_(top.unsqueeze(-1)).div_(temperature).exp_()
        if x.size(-1) % size:
            early = torch.arange(size, device=x.device) < (drawn * size - start).unsqueeze(-1)
            own = own.masked_fill_(early, 0.0)
        own = own.cumsum(-1, dtype=torch.float64)
        drawn = start + _first_above(own, (where - before).unsqueeze(-1)).squeeze(-1)
    drawn = drawn.clamp_max(x.size(-1) - 1).sort(-1).values  # of a row with a NaN
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(-1) - 1
    counts = torch.zeros((x.size(0), k), dtype=acc, device=x.device)
    counts.scatter_add_(-1, place, torch.ones_like(drawn, dtype=acc))
    indices = torch.full_like(drawn, -1).scatter_(-1, place, drawn)
    logprobs = torch.where(counts > 0, (counts / k).log(), -INF)
    logprobs = torch.where(total.isfinite(), logprobs, math.nan)  # of a row with a NaN
    rest = torch.full_like(logprobs[:, 0], -INF)
    return logprobs, indices.to(torch.int32), rest


def _piece(vocab: int, k: int) -> int:
    """Columns of a piece: the sums of all pieces take as long as what k draws read again.

    As measured on a CPU, where a piece costs what 4 columns that are read again do. 1, each column
    by itself, where there are so many draws that they would read most of the row again.
    """
    return 1 if 32 * k > vocab else 2 ** round(math.log2(4 * vocab / k) / 2)


def _masses(
    backend: Backend, x: Tensor, size: int, temperature: float, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    """float64 [rows, pieces], sum of exp((x - largest of the row) / T), and [rows, 1] the largest.

    A sum of a few positive numbers in float32 is off by rounding, of which the draws within the
    piece know nothing: they are by its own columns. The sums of pieces are in float64.
    """
    rows, vocab = x.shape
    if size == 1:
        top = x.amax(-1, keepdim=True).to(acc)
        return ((x.to(acc) - top) / temperature).exp().double(), top
    even = vocab // size * size
    parts = [x[:, :even].unflatten(-1, (-1, size))]
    if even < vocab:
        parts.append(x[:, None, even:])
    stats = [
        backend.stats(part, temperature, part.size(-1), None)[:, :2].reshape(rows, -1, 2)
        for part in parts
    ]
    tops, totals = torch.cat(stats, 1).unbind(-1)
    top = tops.amax(-1, keepdim=True)
    return totals.double() * ((tops - top).double() / temperature).exp(), top.to(acc)


def _first_above(below: Tensor, where: Tensor) -> Tensor:
    """Where rising sums [..., n] first pass `where` [..., k], which is at a column that adds."""
    last = below[..., -1:].nextafter(torch.zeros_like(below[..., -1:]))  # beyond only by rounding
    return torch.searchsorted(below, torch.minimum(where, last), right=True)
