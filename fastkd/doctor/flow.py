"""What is known of a tensor while a script runs: whose output it is, and what was done to it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Site(NamedTuple):
    """A line of the user's program."""

    file: str
    line: int


class Origin(NamedTuple):
    """One call of a module whose output a tensor is; `inputs` tell two calls apart."""

    module: nn.Module
    call: int
    inputs: tuple[Any, ...]


class Source:
    """The logits that a softmax was taken of: two with one source are of the same logits.

    None: a mixture, of no logits.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        self.held = None if tensor is None else weakref.ref(tensor)

    def tensor(self) -> Tensor | None:
        return None if self.held is None else self.held()


@dataclass
class Run:
    """One model's pass over token ids, and at which places the loss had a gradient."""

    ids: Tensor  # [B, S]
    latest: weakref.ref[Tensor] | None = None
    hooked: bool = False
    site: Site | None = None  # of the loss to blame
    trained: Tensor | None = None  # [B, S] bool
    forbidden: list[tuple[Tensor, str]] = field(default_factory=list)  # not to be trained, why


@dataclass
class Tag:
    """What is known of one tensor."""

    mask: int = 0  # the parameters it depends on, a bit each
    noisy: bool = False  # went through dropout or a batch's own statistics
    kind: str = ""  # "", prob, logprob, lse, ratio, logratio
    source: Source | None = None
    temperature: float = 1.0  # what the logits were divided by
    axis: int | None = None  # of the classes, from the last: -1
    faults: frozenset[str] = frozenset()  # "axis", "twice"
    rows: Tensor | None = None  # [..., 1]: number of the place in the ids of `run`
    run: Run | None = None
    origins: tuple[Origin, ...] = ()  # the innermost first
    terms: tuple[Part, ...] = ()
    pair: tuple[Tag, Tag] | None = None  # of a ratio
    mapped: bool = False  # the columns were chosen or reordered
    columns: int = 0  # before a truncation
    squashed: bool = False  # by a sigmoid
    scale: float = 0.0  # of a GradScaler


@dataclass
class Side:
    """One operand of a loss."""

    tag: Tag
    grad: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        """The number of classes."""
        axis = -1 if self.tag.axis is None or self.tag.faults else self.tag.axis
        return max(self.shape[axis], 1) if len(self.shape) >= -axis else 1


@dataclass
class Term:
    """One loss as it was computed."""

    kind: str  # kl, soft, hand, hard, pair
    name: str
    site: Site
    student: Side
    teacher: Side | None
    temperature: float = 1.0
    rows: float = 1.0  # how many count
    power: int = 0  # of T, that the loss itself carries
    sampled: bool = False  # rows are a random choice, as of a masked language model
    reverse: bool = False  # the program says that the direction is meant
    grad: bool = True
    grad_mode: bool = True
    files: tuple[str, ...] = ()
    step: int = 0
    place: Site | None = None  # of the call itself


class Part(NamedTuple):
    """A term in a sum: its factor and where powers of the temperature came in."""

    term: Term
    factor: float  # of a row, as if a mean were over all rows; `columns` divides it again
    powers: tuple[tuple[Site, float], ...] = ()
    detached: bool = False
    columns: float = 1.0  # of a mean over the classes; of a batchmean the share of the rows
    whole: bool = False  # the values are still those of single classes

    def scaled(self, by: float, power: tuple[Site, float] | None = None) -> Part:
        powers = self.powers
        if power is None and math.isclose(by, self.columns):
            return self._replace(columns=1.0)  # made a mean over all rows
        if power is not None and power not in powers:
            powers = (*powers, power)
        return self._replace(factor=self.factor * by, powers=powers)


@dataclass
class Book:
    """The tags of all tensors alive, and the bits of the parameters."""

    tags: dict[int, tuple[weakref.ref[Tensor], Tag]] = field(default_factory=dict)
    bits: dict[int, int] = field(default_factory=dict)
    parameters: list[Tensor] = field(default_factory=list)

    def get(self, x: Any) -> Tag | None:
        held = self.tags.get(id(x))
        return held[1] if held is not None and held[0]() is x else None

    def put(self, x: Tensor, tag: Tag) -> Tag:
        key, tags = id(x), self.tags

        def gone(ref: weakref.ref[Tensor]) -> None:
            if (held := tags.get(key)) is not None and held[0] is ref:
                del tags[key]

        self.tags[key] = (weakref.ref(x, gone), tag)
        return tag

    def of(self, x: Tensor) -> Tag:
        """The tag of a tensor, a new one for a tensor not met before."""
        tag = self.get(x)
        if tag is None:
            tag = self.put(x, Tag(mask=self.bit(x)))
        if tag.source is None:
            tag.source = Source(None if tag.kind else x)
        return tag

    def bit(self, x: Tensor) -> int:
        """The bit of a parameter, or of any leaf that is trained; 0 for other tensors."""
        if not isinstance(x, nn.Parameter) and not (x.is_leaf and x.requires_grad):
            return 0
        at = self.bits.get(id(x))
        if at is None:
            at = self.bits[id(x)] = len(self.parameters)
            self.parameters.append(x)
        return 1 << at

    def of_parameters(self, parameters: Any) -> int:
        mask = 0
        for x in parameters:
            mask |= self.bit(x)
        return mask

    def within(self, mask: int) -> list[Tensor]:
        """The parameters of a mask."""
        return [x for at, x in enumerate(self.parameters) if mask >> at & 1]


def take(new: Tag, tag: Tag) -> None:
    """Makes a tag equal to another."""
    for name in Tag.__dataclass_fields__:
        setattr(new, name, getattr(tag, name))


def tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors of nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for x in value:
            yield from tensors(x, depth - 1)
    elif depth and isinstance(value, dict):
        for x in value.values():
            yield from tensors(x, depth - 1)


def number(x: Any) -> float | None:
    """The value of a number or of a tensor of one element without a graph."""
    if isinstance(x, Tensor):
        if x.dim() or x.requires_grad or x.is_meta or x.is_complex():
            return None
        return float(x)
    return float(x) if isinstance(x, (int, float)) else None


SHAPES = {"view", "reshape", "flatten", "view_as", "unflatten", "reshape_as"}
TURNS = {"transpose", "permute", "movedim", "swapaxes", "t", "T", "mT", "moveaxis", "swapdims"}
SAME = {
    *("contiguous", "to", "type", "float", "half", "double", "bfloat16", "detach", "detach_"),
    *("clone", "cpu", "cuda", "requires_grad_", "data", "type_as", "nan_to_num", "neg", "alias"),
    *("__neg__", "clamp", "clip", "clamp_min", "masked_fill", "masked_fill_", "clamp_", "negative"),
}
PICKS = {
    *("__getitem__", "narrow", "select", "squeeze", "unsqueeze", "roll", "flip", "index_select"),
    *("chunk", "split", "unbind", "masked_select", "gather", "take_along_dim", "expand"),
}
TRANSPARENT = SHAPES | TURNS | SAME | PICKS


def moved(tag: Tag, name: str, func: Any, x: Tensor, out: Tensor, rest: Any, named: Any) -> Tag:
    """The tag of a view, a copy or a choice of x."""
    new = replace(tag, axis=_axis(tag.axis, name, func, x, out, rest, named))
    new.rows = _rows(tag.rows, name, func, x, out, rest, named)
    new.run = tag.run if new.rows is not None else None
    if name in ("gather", "take_along_dim"):
        new.mapped = True
    if name in ("__getitem__", "index_select", "narrow") and x.dim() and out.dim():
        index = rest[0] if rest else None
        last = isinstance(index, tuple) and len(index) == x.dim() and index[-1]
        if name == "index_select" or isinstance(last, (Tensor, list)):
            new.mapped = True
        elif x.shape[-1] != out.shape[-1] and out.dim() == x.dim():
            new.columns = tag.columns or x.shape[-1]
    return new


def _axis(
    axis: int | None, name: str, func: Any, x: Tensor, out: Tensor, rest: Any, named: Any
) -> int | None:
    if axis is None or -axis > x.dim():
        return None
    if name in TURNS and x.dim() > 1:
        sizes = torch.empty(tuple(range(2, x.dim() + 2)), device="meta")
        if name in ("T", "mT"):
            turned = getattr(sizes, name)
        else:
            turned = func(sizes, *rest, **named)
        return list(turned.shape).index(x.dim() + 2 + axis) - turned.dim()
    if -axis > out.dim():
        return None
    if out.shape[axis] == x.shape[axis] and (axis == -1 or out.dim() == x.dim()):
        return axis
    return axis if name in ("__getitem__", "narrow") and out.dim() == x.dim() else None


def _rows(
    rows: Tensor | None, name: str, func: Any, x: Tensor, out: Tensor, rest: Any, named: Any
) -> Tensor | None:
    if rows is None:
        return None
    if out.shape == x.shape and name in SAME:
        return rows
    if name in SHAPES:
        fits = out.dim() and out.shape[-1] == x.shape[-1] and rows.shape[-1] == 1
        if fits and rows.numel() * out.shape[-1] == out.numel():
            return rows.reshape(*out.shape[:-1], 1)
        return None
    if name in TURNS or name in PICKS - {"gather", "take_along_dim", "masked_select", "expand"}:
        try:
            found = getattr(rows, name) if name in ("T", "mT") else func(rows, *rest, **named)
        except (RuntimeError, IndexError, TypeError):
            return None
        if isinstance(found, Tensor) and found.dim() == out.dim():
            differ = [a for a, b in zip(found.shape, out.shape, strict=True) if a != b]
            if differ in ([], [1]):
                return found
    return None


def kept_rows(rows: Tensor | None, out: Tensor) -> Tensor | None:
    """The places of an output that has one row for each row of the input."""
    if rows is not None and rows.dim() == out.dim() > 1 and rows.shape[-1] == 1:
        return rows if rows.shape[:-1] == out.shape[:-1] else None
    return None
