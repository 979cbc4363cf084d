"""Wide rows: a team of programs that run at the same time shares each row, in one launch.

A program to a row has as many rows in flight as programs are resident, and what their first sweep
has read does not fit into the L2 cache: the second reads it from memory again. A team of `parts`
programs has `parts` times fewer rows in flight. Each program sweeps its part of the columns, leaves
its sums in memory, waits for the others' and goes on with all of them, merged in their order: every
program computes the row's constants from the same numbers, and the same bits come from run to run.

Programs draw tickets, and a row's parts are consecutive ones: whatever order they are started in,
at most one of the rows begun lacks a part that nobody has begun, so that some program can go on as
long as more programs are resident than a team has. A number that is not there yet is the one NaN
that no computation returns, so nothing but the numbers themselves is waited for: no counter, no
fence. A wait of seconds, which only a fault of the device or of this file explains, ends with NaN
in the loss and the gradient.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastkd.backends.base import on_host
from fastkd.backends.gpu import split_rows
from fastkd.backends.gpu.device_fns import (
    first_sweep,
    gradient_sweep,
    norms,
    pair_sweep,
    row_at,
    row_span,
    scalar,
)
from fastkd.backends.gpu.rows import entropy, expectation, zero_columns
from fastkd.backends.gpu.split_rows import (
    LEFT,
    bounds,
    gathered,
    label_logit,
    left,
    merged,
    numbers,
)

# the programs of a team, at most, and how many teams a device must have room for, several launches
# at a time included; and the share of the L2 cache that the rows in flight may fill,
# beside the gradient's stores and what a cache of two halves keeps twice
MOST, TEAMS, KEPT = 32, 8, 0.75
# "0": no teams; a number of programs: every row's, for measurements only (`make gpu`)
VARIABLE = "FASTKD_GPU_TEAM"
# of tensors that no device holds: nothing is resident under the interpreter
HOST: Capacity | None = None

# what a number is before it is known, as a pattern of bits: arithmetic makes other NaNs
MISSING = tl.constexpr(-1)
SUMS = tl.constexpr(2)  # of a part's values and of its slopes
# polls of a launch, each a round trip to the cache
PATIENCE = tl.constexpr(1 << 22)


class Capacity(NamedTuple):
    """What a device can hold at a time."""

    processors: int
    cache: int  # bytes of L2


_refused: dict[torch.device, str] = {}


@cache
def _capacity(device: torch.device) -> Capacity | None:
    known = torch.get_device_module(device).get_device_properties(device)
    cache_bytes = int(getattr(known, "L2_cache_size", 0))
    return Capacity(int(known.multi_processor_count), cache_bytes) if cache_bytes else None


def capacity(device: torch.device, arch: str) -> Capacity | None:
    """What a device of the architecture can hold; None where teams do not work, or are of no use.

    gfx942 and its like have a cache for each part of the chip, which teams would reach across.
    """
    if device in _refused:
        return None
    if on_host(device) or device.index is None:
        return HOST
    return _capacity(device) if arch.startswith("sm_") else None


def refuse(device: torch.device, error: Exception) -> None:
    """From here on the device does without teams."""
    _refused[device] = str(error)
    warnings.warn(
        f"{error}; wide rows go on with a program each, which reads them twice",
        RuntimeWarning,
        stacklevel=2,
    )


def parts(
    rows: int, vocab: int, row_bytes: int, tile_columns: int, resident: int, holds: Capacity | None
) -> int:
    """How many programs share a row: 1 where neither the cache nor idle processors ask for more.

    A function of shapes and the device alone: the same call gives the same bits.

    Args:
        rows, vocab: of the operands.
        row_bytes: of a row of both of them.
        tile_columns: of a program.
        resident: programs of a multiprocessor.
        holds: the device's.
    """
    if holds is None or resident < 1:
        return 1
    places = resident * holds.processors
    most = min(MOST, vocab // (split_rows.TILES * tile_columns), places // TEAMS)
    given = os.environ.get(VARIABLE, "")
    if given and not given.isdecimal():
        raise ValueError(f"{VARIABLE}: got {given!r}, expected a number of programs, or 0 for none")
    fits = -(-places * row_bytes // int(KEPT * holds.cache))
    wanted = int(given) if given else min(max(fits, places // max(rows, 1)), most)
    if wanted <= 1 or most <= 1:
        return 1
    if given:
        return min(wanted, MOST, places // TEAMS)
    # some more than needed where they share the tiles more evenly
    tiles = -(-vocab // tile_columns)
    return min(range(wanted, min(most, wanted * 3 // 2) + 1), key=lambda n: (-(-tiles // n) * n, n))


@triton.jit
def publish(x, found, COUNT: tl.constexpr, part, parts):
    """A part's numbers, each at once and for the whole device to see."""
    known = tl.where(found != found, float("nan"), found).to(tl.int32, bitcast=True)
    x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_xchg(x + tl.arange(0, COUNT) * parts + part, known, sem="relaxed")


@triton.jit
def missing(x, count, SPAN: tl.constexpr):
    """Whether one of count numbers is not there yet.

    SPAN is no less than the program's threads: a number that two threads read could be there for
    one of them alone, and they would part.
    """
    at = tl.arange(0, SPAN)
    x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    found = tl.load(x + at, mask=at < count, other=0, volatile=True)
    return tl.max((found == MISSING).to(tl.int32), 0)


@triton.jit
def wait(x, count, SPAN: tl.constexpr):
    """Returns when all numbers are there, or after PATIENCE."""
    patience = tl.full((), PATIENCE, tl.int32)
    lacking = missing(x, count, SPAN)
    while (lacking != 0) & (patience > 0):
        patience -= 1
        lacking = missing(x, count, SPAN)


@triton.jit
def team_pairs(
    student, teacher, sums, part, parts, begin, end, m_s, d_s, m_t, d_t, exponent, param,
    DIVERGENCE: tl.constexpr, SHIFTED: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`pair_sweep` of a row by all of its team."""
    value, slopes = pair_sweep(
        student, teacher, begin, end, m_s, d_s, m_t, d_t, exponent, param,
        DIVERGENCE, "evict_last", SHIFTED, ACC, LANES, GROUP,
    )  # fmt: skip
    found = tl.where(tl.arange(0, SUMS) == 0, value, slopes)
    publish(sums, found, SUMS, part, parts)
    wait(sums, SUMS * parts, SPAN)
    value = tl.sum(gathered(sums, parts, 0, 0.0, PARTS), 0)
    return value, tl.sum(gathered(sums, parts, 1, 0.0, PARTS), 0)


@triton.jit(do_not_specialize=["parts", "skew", "per_s", "per_t", "per_g"])
def team_kernel(
    student, teacher, grad, loss, keep, label, scale, ticket, partial, sums,
    parts, vocab, classes, width, skew,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t, per_g, outer_g, inner_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, sure: tl.float64, spread: tl.float64, factor: tl.float64,
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, UNIT: tl.constexpr, SMOOTH: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`rows.fused_kernel` for a part of a row: the next one that nobody has begun.

    ticket [1], partial [rows, LEFT, parts] and sums [rows, SUMS, parts] hold MISSING at the start.
    The first part of a row stores the loss.
    """
    SHIFTED: tl.constexpr = skew is not None
    turn = tl.atomic_add(ticket, 1, sem="relaxed") - MISSING
    row, part = turn // parts, turn % parts
    start, stop = row_span(row, per_s, outer_s, inner_s, skew, vocab, GROUP)
    begin, end = bounds(part, parts, start, stop, SHIFTED, LANES, GROUP)
    last = tl.where(part == parts - 1, start + width, end)
    if grad is not None:
        grad = row_at(grad, row, per_g, outer_g, inner_g, skew, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            if part == 0:
                tl.store(loss + row, scalar(0.0, ACC))
            if grad is not None:
                zero_columns(grad, begin, last, LANES, GROUP, SHIFTED)
            return
    student = row_at(student, row, per_s, outer_s, inner_s, skew, GROUP)
    teacher = row_at(teacher, row, per_t, outer_t, inner_t, skew, GROUP)
    partial, sums = numbers(partial, row, parts, LEFT), numbers(sums, row, parts, SUMS)
    exponent, inverse, param = scalar(exponent, ACC), scalar(inverse, ACC), scalar(param, ACC)
    soft, hard = scalar(soft, ACC), scalar(hard, ACC)
    sure, spread = scalar(sure, ACC), scalar(spread, ACC)

    column = -1
    at_label = scalar(0.0, ACC)
    if label is not None:  # here, where no part of an in-place gradient is written yet
        at_label = label_logit(student, label, row, part, start, vocab, ACC)
        wanted = tl.load(label + row)
        here = (wanted >= 0) & (wanted < vocab)
        column = tl.where(here, wanted + start, -1).to(tl.int32)
    m_s, d_s, m_t, d_t, cross, unit, drift = first_sweep(
        student, teacher, begin, end, exponent,
        EXPECTATION, UNIT, SMOOTH, SHIFTED, ACC, LANES, GROUP,
    )  # fmt: skip
    found = left(m_s, d_s, m_t, d_t, cross, unit, drift, at_label)
    publish(partial, found, LEFT, part, parts)
    wait(partial, LEFT * parts, SPAN)
    m_s, raw_s, m_t, raw_t, cross, unit, drift = merged(
        partial, parts, start, stop, exponent,
        EXPECTATION, UNIT, SMOOTH, SHIFTED, PARTS, ACC, LANES, GROUP,
    )  # fmt: skip
    d_s, d_t = norms(raw_s, raw_t)
    if EXPECTATION == "none":
        value, slopes = team_pairs(
            student, teacher, sums, part, parts, begin, end, m_s, d_s, m_t, d_t, exponent, param,
            DIVERGENCE, SHIFTED, PARTS, SPAN, ACC, LANES, GROUP,
        )  # fmt: skip
    else:
        value = expectation(d_s, d_t, cross, inverse, EXPECTATION)
        if value * 0.0 != 0.0:  # as in `rows.expected`; of all parts or of none
            value, _ = team_pairs(
                student, teacher, sums, part, parts, begin, end,
                m_s, d_s, m_t, d_t, exponent, param,
                DIVERGENCE, SHIFTED, PARTS, SPAN, ACC, LANES, GROUP,
            )  # fmt: skip
        slopes = value
    if not UNIT:
        unit = raw_s
    result = soft * value
    if label is not None:
        at_label = tl.sum(gathered(partial, parts, 7, 0.0, PARTS), 0)
        result += hard * entropy(
            m_s, unit, drift, at_label, here, vocab, classes, sure, spread, SMOOTH, ACC
        )
    tl.store(loss + row, result, mask=part == 0)
    if grad is not None:
        by = scalar(factor, ACC)
        if scale is not None:
            by = by * tl.load(scale + row)
        gradient_sweep(
            grad, student, teacher, begin, end, m_s, d_s, m_t, d_t, slopes, unit,
            column, exponent, param, soft * inverse * by, hard * by, sure + spread, spread,
            DIVERGENCE, EXPECTATION == "teacher", label is not None, UNIT,
            EXPECTATION != "none", SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
        zero_columns(grad, end, last, LANES, GROUP, SHIFTED)
