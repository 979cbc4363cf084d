"""From logits to a `TopK`: the best columns, the columns that somebody chose, or samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.arguments.messages import describe, shown, sizes
from fastkd.arguments.numbers import WAITS, integer, real
from fastkd.arguments.tensors import INDEX_DTYPES
from fastkd.backends import reference
from fastkd.backends.base import Backend, chunks
from fastkd.backends.choice import pick
from fastkd.backends.products import autocast_off
from fastkd.engine import validate
from fastkd.engine.reduction import reads_values
from fastkd.operands import LinearLogits, Operand, Tail, TopK, build

INF = math.inf
# Elements of a copy of some rows, in which the columns that are kept are taken out to sum the rest
BLOCK = 2**22
FIRST = 64  # columns in which a nucleus is looked for, before more are sorted


@torch.no_grad()
def topk_from_logits(
    logits: Operand,
    k: int | None = None,
    *,
    indices: Tensor | None = None,
    top_p: float | None = None,
    method: Literal["top", "sample"] = "top",
    temperature: float = 1.0,
    tail: Tail = "bucket",
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> TopK:
    """The log-probabilities of some columns of each row, with the mass of the rest.

        k         log p of the k largest, tail_logprob = log(sum of p over the others), summed by
                  itself and so without cancellation
        indices   the same of the columns that somebody else chose: a student's own best ones
                  (`student.topk(k).indices`), those of a server's answer
        top_p     the nucleus: the fewest of the largest columns whose p sum to top_p or more, one
                  at least; with k, too, at most k of them
        k, method="sample"
                  k independent draws from p, with replacement: each column that came up once or
                  more, with its share of the draws; tail_logprob = -inf. The shares are unbiased
                  estimates of p, and so is the gradient of kl_div against them.

    p = softmax(logits / T). Works on a few rows at a time: no log-softmax of all of them is built,
    nor the logits of a `LinearLogits`. No gradient.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, or a `LinearLogits`.
        k: columns kept, or draws made, 1 <= k (<= V for "top").
        indices: [..., K] int32 or int64, each column of a row once, in any order; -1 pads.
        top_p: 0 < top_p <= 1; 1 keeps every column whose logit is not -inf. Without k the longest
            row says how many places all have, for which a GPU is waited for; torch.compile needs k.
        method: "top" or "sample".
        temperature: T > 0, finite.
        tail: what the loss makes of the rest, see `TopK`.
        vocab_size: use the first n columns only.
        generator: for the draws.

    Returns:
        TopK with logprobs and tail_logprob in float32 (float64 for float64 logits) and indices in
        int32: in the order of `indices` where these are given, else by falling log p, for "sample"
        by rising index. Places at -1 have logprob -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; not one of k, indices, top_p,
            or k with top_p. Values of `indices` are looked at on the CPU always, and on a GPU
            inside `fastkd.checked()`; elsewhere one out of range makes its row of a loss NaN.

    Anshumann et al. 2025 (random sampling distillation), arXiv 2503.16870; Holtzman et al. 2019
    (nucleus), arXiv 1904.09751; Agarwal et al. 2023 (GKD: rows that the student wrote), arXiv
    2306.13649.
    """
    vocab = validate.operands(logits, logits, vocab_size)
    temperature = validate.temperature(temperature)
    if not isinstance(method, str) or method not in ("top", "sample"):
        raise ValueError(f"method: got {shown(method)}, expected 'top' or 'sample'")
    k, top_p = _support(k, indices, top_p, method, vocab)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    lead = logits.shape[:-1]
    backend: Backend = reference.BACKEND if torch.compiler.is_compiling() else pick(logits.device)
    given = None if indices is None else _columns(backend, logits, indices, vocab)
    parts, done = [], 0
    for x in _blocks(logits, vocab):
        if method == "sample":
            assert k is not None
            parts.append(_sample(backend, x, k, temperature, acc, generator))
            continue
        stats = _stats(backend, x, temperature, acc)
        if given is not None:
            at, done = given[done : done + x.size(0)], done + x.size(0)
        elif top_p is not None:
            at = _nucleus(x, stats, top_p, k, temperature)
        else:
            assert k is not None
            at = x.topk(k, -1).indices
        parts.append(_measured(backend, x, stats, at, temperature))
    logprobs, found, rest = zip(*parts, strict=True)
    widest = max(x.size(-1) for x in found)
    return TopK(
        torch.cat([_padded(x, widest, -INF) for x in logprobs]).view(*lead, widest),
        torch.cat([_padded(x, widest, -1) for x in found]).view(*lead, widest),
        tail_logprob=torch.cat(rest).view(lead),
        temperature=temperature,
        tail=tail,
    )


def _support(
    k: int | None, indices: Tensor | None, top_p: float | None, method: str, vocab: int
) -> tuple[int | None, float | None]:
    """k and top_p as numbers, once one thing says which columns are kept."""
    given = [
        name for name, x in (("k", k), ("indices", indices), ("top_p", top_p)) if x is not None
    ]
    if given not in (["k"], ["indices"], ["top_p"], ["k", "top_p"]):
        got = " with ".join(given) or "none of them"
        raise ValueError(
            f"{given[0] if given else 'k'}: got {got}, expected one of k, indices and top_p, or k "
            "with top_p"
        )
    if method == "sample" and given != ["k"]:
        raise ValueError(f"method: got 'sample' with {given[-1]}, expected 'top', or k alone")
    number = None
    if k is not None:
        number = integer(k)
        if number is None:
            raise TypeError(f"k: got {describe(k)}, expected an integer")
        if not 1 <= number <= (vocab if method == "top" else 2**31):
            upper = f" <= {vocab}" if method == "top" else ""
            raise ValueError(f"k: got {shown(number)}, expected 1 <= k{upper}")
    if top_p is None:
        return number, None
    share = real(top_p)
    if share is None:
        raise TypeError(f"top_p: got {describe(top_p)}, expected a number{WAITS}")
    if not 0.0 < share <= 1.0:
        raise ValueError(f"top_p: got {shown(top_p)}, expected 0 < top_p <= 1")
    if number is None and torch.compiler.is_compiling():
        raise ValueError(
            "top_p: got no k with it under torch.compile, where the number of places cannot depend "
            "on values; expected k, the most columns of a row"
        )
    return number, float(share)


def _columns(backend: Backend, logits: Operand, indices: Tensor, vocab: int) -> Tensor:
    """[N, K] int64 of `indices`, as they were checked."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices: got {describe(indices)}, expected int32 or int64 [..., K]")
    if indices.dtype not in INDEX_DTYPES or indices.layout is not torch.strided:
        raise TypeError(f"indices: got {describe(indices)}, expected int32 or int64 [..., K]")
    shape = indices.shape
    if not shape or shape[:-1] != logits.shape[:-1] or not shape[-1]:
        raise ValueError(
            f"indices: got shape {sizes(shape)}, expected "
            f"{str([*logits.shape[:-1]])[:-1]}{', ' if logits.dim() > 1 else ''}K], K >= 1, for "
            f"logits {sizes(logits.shape)}"
        )
    if indices.device != logits.device:
        raise ValueError(
            f"indices: got a tensor on {indices.device}, expected the logits' {logits.device}"
        )
    at = indices.reshape(-1, shape[-1]).to(torch.int64).contiguous()
    if not reads_values(indices):
        return torch.where((at < -1) | (at >= vocab), -2, at)
    fault, row, place = backend.first_fault(
        at.new_zeros(at.shape, dtype=torch.float32), at, None, vocab
    )
    if fault:
        again = ", each column of a row once" if fault == "twice" else ""
        raise ValueError(
            f"indices: got {int(at[row, place])}{' again' if again else ''} in row {row}, place "
            f"{place}, expected 0 to {vocab - 1}, or -1 for padding{again}"
        )
    return at


def _padded(x: Tensor, width: int, value: float) -> Tensor:
    return x if x.size(-1) == width else F.pad(x, (0, width - x.size(-1)), value=value)


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
            with autocast_off(logits.device)():
                yield build(x, logits.weight, logits.bias, logits.head, vocab)
        else:
            yield x[:, :vocab]


def _stats(
    backend: Backend, x: Tensor, temperature: float, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and the sum of exp((x - largest) / T)."""
    top, total, _ = backend.stats(x.unsqueeze(0), temperature, x.size(-1), None).to(acc).unbind(-1)
    return top, total


def _nucleus(
    x: Tensor, stats: tuple[Tensor, Tensor], top_p: float, k: int | None, temperature: float
) -> Tensor:
    """The columns [rows, K] of the smallest mass that is top_p or more, -1 behind them."""
    top, total = (z.double().unsqueeze(-1) for z in stats)
    width = k or min(FIRST, x.size(-1))
    while True:
        best = x.topk(width, -1)
        if top_p == 1.0:  # a sum of all columns is 1 but for rounding, which must drop none
            wanted = best.values != -INF
            more = wanted[:, -1:]
        else:
            reached = ((best.values.double() - top) / temperature).exp().div_(total).cumsum(-1)
            wanted, more = F.pad(reached[:, :-1], (1, 0)) < top_p, reached[:, -1:] < top_p
        if k is not None or width == x.size(-1) or not bool(more.any()):
            break
        width = min(8 * width, x.size(-1))
    wanted[:, 0] = True
    at = torch.where(wanted, best.indices, -1)
    return at if k is not None else at[:, : int(wanted.sum(-1).max()) if x.size(0) else 1]


def _measured(
    backend: Backend, x: Tensor, stats: tuple[Tensor, Tensor], at: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the columns `at` [rows, K], themselves, and log of the sum of p over the others."""
    top, total = stats
    acc = total.dtype
    last = at.amax(-1, keepdim=True)  # where nothing is named, a column that is, or none
    place = torch.where(at >= 0, at, last).clamp_min(0)
    values = x.gather(-1, place)
    others = x.scatter(-1, place, values.masked_fill(last >= 0, -INF))
    other_top, other_total = _stats(backend, others, temperature, acc)
    log_total = total.log()
    logprobs = (values.to(acc) - top.unsqueeze(-1)) / temperature - log_total.unsqueeze(-1)
    logprobs = logprobs.clamp_max(0.0).masked_fill(at == -1, -INF).masked_fill(at < -1, math.nan)
    rest = (other_top - top) / temperature + other_total.log() - log_total
    # -inf and not NaN where nothing is left: the maximum of no logits is -inf, their sum 0
    rest = torch.where(other_total == 0, torch.where(total.isnan(), total, -INF), rest)
    return logprobs, at.to(torch.int32), rest.clamp_max(0.0)


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
