"""Sums, products and quotients: the terms of a loss, and the factors before them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import operands
from .flow import Part, Source, Tag, number, take
from .source import power

if TYPE_CHECKING:
    from .watch import Watch

MUL = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
DIV = {"div", "div_", "__truediv__", "__itruediv__", "true_divide", "divide"}
ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
SUB = {"sub", "sub_", "__sub__", "__isub__", "subtract", "__rsub__", "rsub"}


def _two(args: Any, named: Any) -> tuple[Any, Any]:
    other = args[1] if len(args) > 1 else named.get("other")
    return args[0], other


def product(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    a, b = _two(args, named)
    tags = watch.book.get(a), watch.book.get(b)
    for x, tag, other, at in ((a, tags[0], b, tags[1]), (b, tags[1], a, tags[0])):
        if tag is not None and tag.terms:
            by = number(other)
            if by is not None:
                _scale(watch, tag, new, by, 1.0)
                return
            terms = tag.terms + (at.terms if at is not None else ())
            new.terms = _masked(terms, other, x)
            return
    if _hand(watch, a, b, out, new):
        return
    for x, tag, other in ((a, tags[0], b), (b, tags[1], a)):
        by = number(other) if isinstance(x, Tensor) and x.dim() else None
        if by is not None and by:
            tag = watch.book.of(x)
            keep = tag.kind in ("", "prob", "logprob")
            if keep:
                by = 1.0 if tag.kind == "prob" else by
                take(new, replace(tag, temperature=tag.temperature / by))
            return


def quotient(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    a, b = _two(args, named)
    tag, other = watch.book.get(a), watch.book.get(b)
    by = number(b)
    if tag is not None and tag.terms:
        if by is None and isinstance(b, Tensor) and b.numel() == 1:
            by = float(b)
        if by:
            _scale(watch, tag, new, 1.0 / by, -1.0)
        else:
            new.terms = tag.terms
        return
    if tag is not None and other is not None and tag.kind == other.kind == "prob":
        new.kind, new.pair = "ratio", (tag, other)
        return
    if by and isinstance(a, Tensor) and a.dim():
        tag = watch.book.of(a)
        if tag.kind in ("", "prob", "logprob"):
            by = 1.0 if tag.kind == "prob" else by
            take(new, replace(tag, temperature=tag.temperature * by))
    elif other is None and tag is not None and isinstance(b, Tensor) and b.dim() and b.numel() > 1:
        if tag.kind == "prob":  # normalised again
            take(new, tag)


def _scale(watch: Watch, tag: Tag, new: Tag, by: float, sign: float) -> None:
    frame = next(watch.program.frames(), None)
    parts = []
    soft = next((x.term.temperature for x in tag.terms if x.term.teacher is not None), 1.0)
    for part in tag.terms:
        t, event = part.term.temperature if part.term.teacher is not None else soft, None
        if frame is not None and abs(t - 1.0) > 1e-6:
            value = by if sign > 0 or not by else 1.0 / by
            exact = next((n for n in (1, 2, 4) if abs(value - t**n) <= 1e-5 * abs(value)), 0)
            found = power(frame, t)
            site = watch.program.site()
            if found:
                event = (site, found)
            elif exact:
                event = (site, sign * exact)
                if event in part.powers:  # twice by T in one line that could not be read
                    event = (site, 2.0 * sign * exact)
        parts.append(part.scaled(by, event))
    new.terms, new.scale = tuple(parts), tag.scale


def _masked(terms: tuple[Part, ...], other: Any, x: Tensor) -> tuple[Part, ...]:
    """Terms of rows times a mask: fewer rows count."""
    if not isinstance(other, Tensor) or other.numel() < 2:
        return terms
    values = other.detach()
    if other.is_floating_point() and not bool(((values == 0) | (values == 1)).all()):
        return terms
    share = float(values.float().mean())
    for part in terms:
        part.term.rows = part.term.rows * share if share else part.term.rows
    return terms


def reduced(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    x = args[0]
    tag = watch.book.get(x)
    if tag is None:
        return
    by, mean = 1.0, name in ("mean", "nanmean")
    if mean and out.numel():
        by = out.numel() / x.numel()
    dims = named.get("dim", args[1] if len(args) > 1 else None)
    new.terms = tuple(_over(part, mean, dims, x).scaled(by) for part in tag.terms)
    new.scale = tag.scale


def _over(part: Part, mean: bool, dims: Any, x: Tensor) -> Part:
    """A term before a sum or a mean, which may be one over the classes."""
    axis = part.term.student.tag.axis or -1
    given = dims if isinstance(dims, (tuple, list)) else [dims]
    inside = dims is None or any(isinstance(d, int) and d in (axis, axis + x.dim()) for d in given)
    if not part.whole or not inside:
        return part
    size = part.term.student.columns if mean else 1
    return part._replace(factor=part.factor * size, columns=size, whole=False)


def joined(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    a, b = _two(args, named)
    first, second = watch.book.get(a), watch.book.get(b)
    terms = (first.terms if first else ()) + (second.terms if second else ())
    if terms:
        new.terms = terms
        value = number(b) if first and first.terms else number(a)
        if isinstance(b if first and first.terms else a, float) and value:
            _float_term(watch, value)
        return
    if first is None or second is None:
        one, value = (first, b) if first is not None else (second, a)
        if one is not None and one.kind in ("prob", "logprob") and number(value) is not None:
            take(new, one)
        return
    kinds = first.kind, second.kind
    if kinds == ("prob", "prob") and name in ADD:
        take(new, replace(first, mask=first.mask | second.mask, source=Source(None), pair=None))
    elif kinds == ("logprob", "logprob") and name in SUB:
        pair = (second, first) if name in ("__rsub__", "rsub") else (first, second)
        new.kind, new.pair = "logratio", pair
    elif kinds[0] == "" and kinds[1] == "lse" and first.source is second.source:
        take(new, replace(first, kind="logprob"))
    elif not any(kinds) and name in SUB and operands.two_models(watch, first, second, True):
        operands.term(watch, new, "pair", name, a, b, 1.0, 1.0)


def _float_term(watch: Watch, value: float) -> None:
    """A number in a sum that was a loss before .item()."""
    watch.added.append(value)
    for was, one in watch.items[-50:]:
        if was == value and one.teacher is not None:
            text = f"{one.name} enters the sum as the number {value:.4g}: it has no gradient"
            watch.mark("gradient", one.site, text, "add the tensor, not its .item()")


def _term(watch: Watch, new: Tag, log_q: Tensor, p: Tensor, of: Tag | None = None) -> None:
    """A product by hand: a value for each class of each row."""
    rows = p.numel() / p.shape[-1]
    operands.term(watch, new, "hand", "by hand", log_q, p, 1.0, rows, of)
    new.terms = (new.terms[0]._replace(whole=True),)


def _hand(watch: Watch, a: Any, b: Any, out: Tensor, new: Tag) -> bool:
    """p * log q, or p * (log p - log q)."""
    tags = watch.book.get(a), watch.book.get(b)
    for p, x, other, y in ((tags[0], a, tags[1], b), (tags[1], b, tags[0], a)):
        if p is None or other is None or p.kind != "prob" or x.shape != y.shape:
            continue
        if other.kind == "logprob" and other.source is not p.source:
            _term(watch, new, y, x)
            return True
        if other.kind == "logratio" and other.pair is not None:
            sides = other.pair
            log_q = sides[1] if sides[0].source is p.source else sides[0]
            if log_q.source is not p.source:
                _term(watch, new, y, x, log_q)
                return True
    return False
