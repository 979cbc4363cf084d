"""What travels together: the tuples that kernels and device functions take, read by name.

Triton specializes every number and pointer of a tuple. So what must not be specialized, because it
changes from batch to batch, stays an argument of its own (`per_s`, `align_offset`, `splits`), and
so does each float of a loss, which a tuple would round to float32.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton.language as tl

from fastkd.backends.base import interpreted

# ---- what the host hands over; None for what is not given, or not read


class Place(NamedTuple):
    """An operand: row r starts at pointer + (r // per) * outer + (r % per) * inner."""

    pointer: Any
    outer: Any
    inner: Any


class Shape(NamedTuple):
    vocab: Any
    width: Any = None  # of the gradient
    classes: Any = None  # of all ranks


class PerRow(NamedTuple):
    """Pointers to an element of each row; outputs to a few of them, and skip to a single one."""

    loss: Any = None
    outputs: Any = None
    keep: Any = None
    label: Any = None
    scale: Any = None
    skip: Any = None


class Cooperating(NamedTuple):
    """`PerRow`, and what the programs of a row exchange."""

    loss: Any
    outputs: Any
    keep: Any
    label: Any
    scale: Any
    skip: Any
    ticket: Any
    partial: Any
    sums: Any


class Known(NamedTuple):
    """What other passes, or other ranks, have summed over each row."""

    student: Any
    teacher: Any
    hard: Any = None
    pairs: Any = None


class Stored(NamedTuple):
    """A top-k teacher [rows, count], sorted_indices [rows, count + 1]; grad: memory like it."""

    logprobs: Any
    indices: Any
    sorted_indices: Any
    grad: Any
    tail: Any


class Constants(NamedTuple):
    """What a kernel is compiled for; None where it does not read a constant, and so for no."""

    DIVERGENCE: Any = None
    OF_SUM: Any = None
    EXPECTATION: Any = None
    HARD: Any = None  # there is a term at T = 1
    HARD_T1: Any = None  # and T is another one
    SMOOTH: Any = None
    Z_LOSS: Any = None
    CENTRED: Any = None
    RESTRICT: Any = None
    NO_TAIL: Any = None
    POINTS: Any = None
    COUNT: Any = None
    SPLITS: Any = None
    SPAN: Any = None
    UNALIGNED: Any = None
    ACC: Any = None
    LANES: Any = None
    GROUP: Any = None


@cache
def constants(reads: frozenset[str] | None = None, /, **values: Any) -> Any:
    """`Constants` as a launch takes them, of a kernel that reads some, or all of these.

    A function goes as it is: Triton then tells two of one name apart by their source, where a
    constexpr of it would be known by name alone, and an edited divergence would run an old binary.
    The interpreter would make a tensor of every number in a tuple.
    """
    if reads is not None:
        values = {name: value for name, value in values.items() if name in reads}
    if interpreted():
        return SimpleNamespace(**{**Constants()._asdict(), **values})
    plain = {k: v if hasattr(v, "cache_key") else tl.constexpr(v) for k, v in values.items()}
    return Constants(**plain)


def constants_of(args: dict[str, Any]) -> dict[str, Any]:
    """The constants among the arguments of a launch, by name, without those that are None."""
    own = {name: getattr(args.get("const"), name, None) for name in Constants._fields}
    found = {**own, **{name: value for name, value in args.items() if name.isupper()}}
    return {name: getattr(x, "value", x) for name, x in found.items() if x is not None}


def only(of: Any, names: frozenset[str]) -> Any:
    """A tuple without the fields that a kernel does not read, for which it is not compiled."""
    return type(of)(*[x if name in names else None for name, x in zip(of._fields, of, strict=True)])


# ---- what device functions hand to each other; Triton 3.3 wants no None in a tuple that it makes


class Spec(NamedTuple):
    """The loss spec in the accumulation dtype: see "Names in the kernels" in README.md."""

    exponent: Any
    inverse: Any
    param: Any
    soft: Any
    hard: Any
    one_minus_eps: Any
    eps_over_v: Any


class Sides(NamedTuple):
    """(max, sum) of the student and of the teacher."""

    m_s: Any
    d_s: Any
    m_t: Any
    d_t: Any


class Logs(NamedTuple):
    """`Sides` with the sums' logarithms to base 2."""

    m_s: Any
    log_s: Any
    m_t: Any
    log_t: Any


class Sums(NamedTuple):
    """What the first loop over a row sums, of a lane, a split or a row: see `sums.sum_tile`."""

    m_s: Any
    d_s: Any
    m_t: Any
    d_t: Any
    cross: Any
    sum_t1: Any
    sum_shifted: Any
    weighted_s: Any
    weighted_t: Any


class Slopes(NamedTuple):
    """Factors of a row's gradient, and the label's column: see `pairs.grad_loop`."""

    soft: Any
    shift: Any
    unit: Any
    target: Any
    eps_over_v: Any
    column: Any


class Softmax(NamedTuple):
    """The softmax of a row against a top-k teacher.

    m_rest, d_rest: (max, sum) off the support. m_row: the row's maximum, m_soft that of the
    softmax, and log_total its sum to base 2. share: what a unit of d_rest has of it. sum_t1: the
    support's sum at T = 1, relative to m_row.
    """

    m_rest: Any
    d_rest: Any
    m_row: Any
    m_soft: Any
    log_total: Any
    share: Any
    sum_t1: Any


class Support(NamedTuple):
    """A top-k teacher's columns of a row."""

    logprobs: Any
    indices: Any


class TopKSlopes(NamedTuple):
    """As `Slopes`; total: the sum of all slopes. rest: the factor off the support."""

    soft: Any
    total: Any
    rest: Any
    unit: Any
    target: Any
    eps_over_v: Any
    column: Any


class Split(NamedTuple):
    """Which split of a row, of how many, and its columns [begin, end)."""

    number: Any
    splits: Any
    begin: Any
    end: Any


class Weights(NamedTuple):
    """The floats of a loss of one logit each, in the accumulation dtype."""

    inverse: Any
    soft: Any
    hard: Any
    param: Any
