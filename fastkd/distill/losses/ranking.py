"""Losses of rerankers: the scores that a student and a teacher give to a query's candidates.

Scores are [..., C], one row a query and C candidates, or flat, [R] or [R, 1], one pair of query and
candidate each, with `lengths` saying how many candidates each query has. What pads shorter lists is
named by `mask` or `lengths`, or is -inf on either side: it is not read, and its gradient is
exactly 0. `**rows` are weight, reduction and normalizer of the rows, as in `fastkd.losses`. Sums
are in float32 (float64 where an operand is), also under autocast.

>>> import torch
>>> from fastkd import distill
>>> student, teacher = (torch.nn.Linear(6, 1) for _ in range(2))  # a score of each pair
>>> batch = {"inputs": torch.randn(7, 6), "lengths": torch.tensor([3, 4])}  # of two queries
>>> term = distill.ranking(lengths="lengths", normalize="zscore")
>>> len(distill.train(student, [batch], term, teacher=teacher, progress=False))
1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Unpack

import fastkd
from fastkd import rows as row_options
from fastkd.arguments.messages import describe, shown, sizes, unexpected
from fastkd.arguments.numbers import integer
from fastkd.arguments.tensors import INT_DTYPES

from ..batch import Batch, Outputs
from ..targets import entry_of, teacher_logits, try_options
from ..terms import Term, Weight
from .chunked import logits as check_scores
from .chunked import wide

INF = math.inf
NORMALIZATIONS = ("none", "minmax", "zscore")
Lengths = Tensor | Sequence[int]


class Rows(TypedDict, total=False):
    """How much a row counts, as in `fastkd.losses`."""

    weight: Tensor | None
    reduction: Any
    normalizer: float | Tensor | None


def listwise_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
    normalize: str = "none",
    temperature: float = 1.0,
    divergence: Any = "kl",
    **rows: Unpack[Rows],
) -> Tensor:
    """Divergence of the softmax over a query's candidates: list-wise distillation of a reranker.

        T^2 D(p, q),   p = softmax(n(teacher) / T), q = softmax(n(student) / T) over the candidates

    in one pass. A row of fewer than two candidates says nothing and is left out: "mean" does not
    count it. n is applied to both sides, over the candidates of a row: "none"; "minmax", (x - min)
    / (max - min), which leaves scores that run from 0 to 1 as they are; "zscore", (x - mean) / std
    with the unbiased standard deviation. A row of equal scores becomes 0 with gradient 0.

    Args:
        student: scores [..., C], or flat with lengths; float32, bfloat16, float16 or float64.
        teacher: scores of the same shape, of any of these dtypes.
        mask: bool [..., C], False where a place holds no candidate.
        lengths: int [...], the candidates of each row, the first ones; of flat scores a tensor or
            a list whose sum is R. Not together with mask.
        normalize: n, "none", "minmax" or "zscore".
        temperature: T > 0, finite.
        divergence: as in `fastkd.distillation_loss`.
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Cao et al. 2007 (ListNet), ICML 2007; Reddi et al. 2021 (RankDistil), AISTATS 2021.
    """
    if not isinstance(normalize, str) or normalize not in NORMALIZATIONS:
        got = shown(normalize)
        raise ValueError(f"normalize: got {got}, expected one of {', '.join(NORMALIZATIONS)}")
    s, t, kept = _candidates(student, teacher, mask, lengths)
    _check(rows, s)
    if s.size(-1) == 1 and mask is None and lengths is None:
        got = f"scores {sizes(student.shape)}, of one candidate a row, from which nothing is learnt"
        raise ValueError(f"student: got {got}; expected [..., C], or lengths= for flat scores")
    if normalize != "none":
        change = _minmax if normalize == "minmax" else _standardised
        s, t = change(s, kept), change(t, kept)
    return divergence_over(s, t, kept, temperature=temperature, divergence=divergence, **rows)


def margin_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
    **rows: Unpack[Rows],
) -> Tensor:
    """Squared difference of margins: how far a query's positive stands above its negatives.

        mean over negatives j of  ((s_0 - s_j) - (t_0 - t_j))^2

    The positive is candidate 0. A student with other units than its teacher's is free to shift its
    scores, not to scale them. A row without its positive or without a negative is left out.

    Args:
        student: scores s [..., C], or flat with lengths; float32, bfloat16, float16 or float64.
        teacher: scores t [..., C] of any of these dtypes, or stored margins t_0 - t_j [..., C - 1];
            of one negative (C = 2) also [...], as sentence-transformers' labels.
        mask: bool [..., C], False where a place holds no candidate.
        lengths: int [...], the candidates of each row with its positive, the first ones; of flat
            scores a tensor or a list whose sum is R. Not together with mask.
        **rows: see the module.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Hofstaetter et al. 2020, arXiv 2010.02666 (there one negative).
    """
    s, t, kept = _candidates(student, teacher, mask, lengths, margins=True)
    _check(rows, s)
    if s.size(-1) < 2:
        got = sizes(student.shape)
        raise ValueError(f"student: got scores {got}, expected a positive and negatives, C >= 2")
    negative = kept[..., 1:] & kept[..., :1]
    error = (s[..., :1] - s[..., 1:]) - (t[..., :1] - t[..., 1:])
    count = negative.sum(-1)
    value = torch.where(negative, error, 0.0).square().sum(-1) / count.clamp(min=1)
    weight = rows.get("weight")
    factor = torch.ones_like(value) if weight is None else weight.to(value.dtype)
    counts, batch = (count > 0).reshape(-1), s.size(0) if s.dim() > 1 else 1
    options: Any = rows
    factor = row_options.factors(factor.reshape(-1), counts, None, batch, options)
    value = value * factor.view(value.shape)
    return value if rows.get("reduction") == "none" else value.sum()


def ranking(
    function: Callable[..., Tensor] = listwise_loss,
    weight: Weight = 1.0,
    *,
    mask: str | None = None,
    lengths: str | None = None,
    name: str | None = None,
    **options: Any,
) -> Term:
    """A term of a loss between scores: function(student, teacher, mask=, lengths=, **options).

    Args:
        function: `listwise_loss`, `margin_mse`, or one of your own.
        weight: factor, or step -> factor.
        mask: name of the batch's mask [..., C], not 0 where a candidate stands: an entry of its
            inputs, or of what else the loader's dict holds.
        lengths: name of the batch's numbers of candidates, found alike. Models that score one pair
            a row, [R, 1], need it; pairs of one query follow each other.
        name: None for the function's own.
        **options: of the function; `temperature` may be step -> T.

    Raises:
        ValueError: both mask and lengths; in training: a batch without what they name.
    """
    name = str(name or getattr(function, "__name__", "ranking"))
    if mask is not None and lengths is not None:
        raise ValueError(f"mask: got {shown(mask)} beside lengths, expected one of them")
    try_options(function, options, 2, 3)

    def call(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        found = dict(options)
        if mask is not None:
            found["mask"] = entry_of(batch, "mask", mask) != 0
        if lengths is not None:
            found["lengths"] = entry_of(batch, "lengths", lengths)
        if callable(found.get("temperature")):
            found["temperature"] = found["temperature"](batch.step)
        return function(student.logits, teacher_logits(name, teacher), **found)

    return Term(name, call, weight, mean="samples")


def divergence_over(
    s: Tensor,
    t: Tensor,
    kept: Tensor,
    *,
    temperature: float,
    divergence: Any,
    class_dim: int = -1,
    **rows: Any,
) -> Tensor:
    """T^2 D over the columns that are kept, bool [..., C]; rows of fewer than two are left out."""
    counts = kept.sum(class_dim) > 1
    # a column at -inf on both sides is none; rows that do not count are not read
    s, t = (torch.where(kept, x, -INF) for x in (s, t))
    labels = counts.long() - 1
    return fastkd.distillation_loss(
        s, t, labels, alpha=0.0, ignore_index=-1, temperature=temperature, divergence=divergence,
        class_dim=class_dim, **rows,
    )  # fmt: skip


def _check(rows: Rows, scores: Tensor) -> None:
    known = Rows.__annotations__
    if unknown := rows.keys() - known.keys():
        raise TypeError(unexpected(unknown, known))
    options: Any = rows
    row_options.check(options, list(scores.shape[:-1]))


def _candidates(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    lengths: Lengths | None,
    margins: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of both sides in one shape [..., C] and one dtype, and which are candidates."""
    for name, x in (("student", student), ("teacher", teacher)):
        # of queries without any candidate flat scores are empty
        check_scores(name, x.unsqueeze(-1) if lengths is not None and _is_flat(x) else x)
    if mask is not None and lengths is not None:
        raise ValueError("mask: got one beside lengths, expected one of them")
    if teacher.device != student.device:
        got = f"a tensor on {teacher.device}"
        raise ValueError(f"teacher: got {got}, expected the student's {student.device}")
    if lengths is not None:
        lengths = _numbers(lengths)
    acc = wide(student, teacher)
    sides = [
        _lists(name, x, lengths) if lengths is not None and _is_flat(x) else x
        for name, x in (("student", student), ("teacher", teacher))
    ]
    s, t = (x.to(acc) for x in sides)
    if margins and s.size(-1) == 2 and t.shape == s.shape[:-1]:
        t = t.unsqueeze(-1)
    if margins and t.dim() == s.dim() and t.size(-1) == s.size(-1) - 1:
        negatives = torch.where(t == -INF, -INF, -t)
        t = torch.cat([torch.zeros_like(negatives[..., :1]), negatives], -1)
    if s.shape != t.shape:
        least = f"{sizes(s.shape)} of the student" + (", or one margin fewer" if margins else "")
        raise ValueError(f"teacher: got scores {sizes(t.shape)}, expected {least}")
    kept = (s != -INF) & (t != -INF)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: got {describe(mask)}, expected bool {sizes(s.shape)}")
        if mask.shape != s.shape:
            raise ValueError(f"mask: got shape {sizes(mask.shape)}, expected {sizes(s.shape)}")
        kept = kept & mask
    elif lengths is not None and sides[0] is student:
        kept = kept & _first(lengths, s)
    return s, t, kept


def _is_flat(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dim() == 1 or x.shape[1:] == (1,))


def _numbers(lengths: Lengths) -> Tensor:
    """lengths as a tensor of integers."""
    found = lengths
    if isinstance(lengths, (list, tuple)) and all(integer(n) is not None for n in lengths):
        found = torch.tensor([integer(n) for n in lengths], dtype=torch.int64)
    if not isinstance(found, Tensor) or found.dtype not in INT_DTYPES:
        raise TypeError(f"lengths: got {describe(lengths)}, expected integers, one a query")
    if _readable(found) and bool((found < 0).any()):
        raise ValueError(f"lengths: got {int(found.min())}, expected integers >= 0")
    return found


def _readable(lengths: Tensor) -> bool:
    """Whether to look at the values: not those of a device, and not in a graph that is compiled."""
    return lengths.device.type == "cpu" and not torch.compiler.is_compiling()


def _lists(name: str, x: Tensor, lengths: Tensor) -> Tensor:
    """Flat scores [R] or [R, 1] as rows of candidates, -inf behind each."""
    numbers = lengths.tolist()
    if lengths.dim() != 1 or sum(numbers) != x.numel():
        got = f"scores {sizes(x.shape)} for lengths whose sum is {int(lengths.sum())}"
        raise ValueError(f"{name}: got {got}, expected flat scores, one for each candidate")
    if not x.numel():  # two places for each query, none a candidate
        return (x.sum() - INF).expand(len(numbers), 2)
    return pad_sequence(list(x.reshape(-1).split(numbers)), True, -INF)


def _first(lengths: Tensor, s: Tensor) -> Tensor:
    """Which places [..., C] lie before their row's length."""
    numbers = lengths.to(s.device)
    if numbers.shape != s.shape[:-1]:
        got = sizes(numbers.shape)
        raise ValueError(f"lengths: got shape {got}, expected {sizes(s.shape[:-1])}")
    if _readable(lengths) and bool((lengths > s.size(-1)).any()):
        expected = f"at most {s.size(-1)}, the candidates of a row"
        raise ValueError(f"lengths: got {int(lengths.max())}, expected {expected}")
    return torch.arange(s.size(-1), device=s.device) < numbers.unsqueeze(-1)


def _minmax(x: Tensor, kept: Tensor) -> Tensor:
    """(x - min) / (max - min) over what is kept of each row."""
    some = kept.any(-1, keepdim=True)
    low = torch.where(kept, x, INF).amin(-1, keepdim=True)
    high = torch.where(kept, x, -INF).amax(-1, keepdim=True)
    low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
    return _over(torch.where(kept, x, low) - low, high - low)


def _standardised(x: Tensor, kept: Tensor) -> Tensor:
    """(x - mean) / std over what is kept of each row, std the unbiased one."""
    count = kept.sum(-1, keepdim=True)
    high = torch.where(kept, x.detach(), -INF).amax(-1, keepdim=True)
    # less the largest first: equal scores are exactly 0, and large ones keep their digits
    x = torch.where(kept, x - torch.where(count > 0, high, 0.0), 0.0)
    d = torch.where(kept, x - x.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
    variance = d.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    constant = variance == 0
    return _over(d, torch.where(constant, 1.0, variance).sqrt().masked_fill(constant, 0.0))


def _over(x: Tensor, by: Tensor) -> Tensor:
    constant = by == 0
    return torch.where(constant, 0.0, x / torch.where(constant, 1.0, by))
