"""Few rows: several programs to a row, each with its part of the columns.

One program to a row leaves multiprocessors idle where the rows are fewer than about two to each.
Here a row's programs write what they found in their part, and the next launch merges the parts in
their order: no atomics, and the same bits from run to run. Launches of a loss and its gradient:

    part    sums of a part's first sweep                       a program per part
    pairs   a part's value and slopes, both norms known        a program per part; js, skew, tv
    finish  the row's loss, and the constants of its gradient  a program per row
    grad    a part's gradient                                  a program per part
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from fastkd.backends.base import on_host
from fastkd.backends.gpu.device_fns import (
    LOWEST32,
    LOWEST64,
    first_sweep,
    gradient_sweep,
    merge_sides,
    norms,
    pair_sweep,
    row_at,
    row_span,
    scalar,
)
from fastkd.backends.gpu.rows import entropy, expected, zero_columns

# programs wanted for each multiprocessor, fewest tiles of a part, most parts of a row
PROGRAMS, TILES, MOST = 2, 2, 64
# numbers that a part leaves behind: those of `first_sweep`, and the logit at the label
LEFT = tl.constexpr(8)
# of tensors that no device holds: 0 splits nothing under the interpreter
HOST_PROCESSORS = 0

_PARTS = ["parts", "skew", "per_s", "per_t"]


@cache
def _multiprocessors(device: torch.device) -> int:
    known = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(known, "multi_processor_count", 0) or getattr(known, "gpu_eu_count", 1))


def processors(device: torch.device) -> int:
    """How many programs a device can start at the same time on hardware of their own."""
    # a device with memory has an index
    nowhere = on_host(device) or device.index is None
    return HOST_PROCESSORS if nowhere else _multiprocessors(device)


def parts(rows: int, vocab: int, tile_columns: int, processors: int) -> int:
    """How many programs share a row: 1 where rows or columns do not ask for more.

    A function of shapes and the device alone: the same call gives the same bits.
    """
    wanted = -(-PROGRAMS * processors // max(rows, 1))
    return max(1, min(wanted, vocab // (TILES * tile_columns), MOST))


@triton.jit
def bounds(
    part, parts, start, stop, SHIFTED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr
):
    """Columns of a part of a row's [start, stop): whole tiles, as evenly as they go."""
    tiles = tl.cdiv(stop, LANES * GROUP)
    own_start = part * tiles // parts * (LANES * GROUP)
    own_stop = (part + 1) * tiles // parts * (LANES * GROUP)
    if SHIFTED:
        own_start = tl.maximum(own_start, start)
    return own_start, tl.minimum(own_stop, stop)


@triton.jit
def numbers(x, row, parts, COUNT: tl.constexpr):
    """A row of x [rows, COUNT, parts]: COUNT numbers of each of its parts."""
    return x + row.to(tl.int64) * COUNT * parts


@triton.jit
def gathered(x, parts, n, other, PARTS: tl.constexpr):
    """Number n of all parts of the row whose numbers are at x.

    volatile: a program of this very launch may have written it (`team.py`), and not into the cache
    of this multiprocessor.
    """
    part = tl.arange(0, PARTS)
    return tl.load(x + n * parts + part, mask=part < parts, other=other, volatile=True)


@triton.jit
def left(m_s, d_s, m_t, d_t, cross, unit, drift, at_label):
    """[LEFT]: what a part leaves behind, in the order that `merged` wants."""
    n = tl.arange(0, LEFT)
    x = tl.where(n == 0, m_s, tl.where(n == 1, d_s, tl.where(n == 2, m_t, d_t)))
    y = tl.where(n == 4, cross, tl.where(n == 5, unit, tl.where(n == 6, drift, at_label)))
    return tl.where(n < 4, x, y)


@triton.jit
def merged(
    partial, parts, start, stop, exponent,
    EXPECTATION: tl.constexpr, UNIT: tl.constexpr, DRIFT: tl.constexpr, SHIFTED: tl.constexpr,
    PARTS: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What `first_sweep` would return for the whole row."""
    lowest: tl.constexpr = LOWEST64 if ACC == tl.float64 else LOWEST32
    m_s = gathered(partial, parts, 0, lowest, PARTS)
    d_s = gathered(partial, parts, 1, 0.0, PARTS)
    m_t = gathered(partial, parts, 2, lowest, PARTS)
    d_t = gathered(partial, parts, 3, 0.0, PARTS)
    cross = gathered(partial, parts, 4, 0.0, PARTS)
    unit = gathered(partial, parts, 5, 0.0, PARTS)
    top_s, sum_s, top_t, sum_t, all_cross, all_unit = merge_sides(
        m_s, d_s, m_t, d_t, cross, unit, exponent, EXPECTATION, UNIT
    )
    all_drift = scalar(0.0, ACC)
    if DRIFT:
        begin, end = bounds(tl.arange(0, PARTS), parts, start, stop, SHIFTED, LANES, GROUP)
        drift = gathered(partial, parts, 6, 0.0, PARTS)
        drift += tl.maximum(end - begin, 0).to(ACC) * (m_s - top_s)
        all_drift = tl.sum(tl.where(tl.arange(0, PARTS) < parts, drift, 0.0), 0)
    return top_s, sum_s, top_t, sum_t, all_cross, all_unit, all_drift


@triton.jit
def label_logit(student, label, row, part, start, vocab, ACC: tl.constexpr):
    """The logit at a row's label for part 0, 0 for the others, which the row's sum leaves alone."""
    wanted = tl.load(label + row)
    here = (wanted >= 0) & (wanted < vocab) & (part == 0)
    column = tl.where(here, wanted + start, -1).to(tl.int32)
    return tl.load(student + column, mask=here, other=0.0).to(ACC)


@triton.jit(do_not_specialize=_PARTS)
def part_kernel(
    student, teacher, partial, keep, label,
    vocab, parts, skew,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t,
    exponent: tl.float64,
    EXPECTATION: tl.constexpr, UNIT: tl.constexpr, SMOOTH: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """partial[row, :, part] = sums of the first sweep, and part 0's logit at the label."""
    SHIFTED: tl.constexpr = skew is not None
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    start, stop = row_span(row, per_s, outer_s, inner_s, skew, vocab, GROUP)
    begin, end = bounds(part, parts, start, stop, SHIFTED, LANES, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            return
    student = row_at(student, row, per_s, outer_s, inner_s, skew, GROUP)
    teacher = row_at(teacher, row, per_t, outer_t, inner_t, skew, GROUP)
    at_label = scalar(0.0, ACC)
    if label is not None:  # here, where no part of an in-place gradient is written yet
        at_label = label_logit(student, label, row, part, start, vocab, ACC)
    m_s, d_s, m_t, d_t, cross, unit, drift = first_sweep(
        student, teacher, begin, end, scalar(exponent, ACC),
        EXPECTATION, UNIT, SMOOTH, SHIFTED, ACC, LANES, GROUP,
    )  # fmt: skip
    found = left(m_s, d_s, m_t, d_t, cross, unit, drift, at_label)
    tl.store(numbers(partial, row, parts, LEFT) + tl.arange(0, LEFT) * parts + part, found)


@triton.jit(do_not_specialize=_PARTS)
def pairs_kernel(
    student, teacher, partial, sums, keep,
    vocab, parts, skew,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64,
    DIVERGENCE: tl.constexpr, PARTS: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """sums[row, :, part] = (sum of the values, sum of the centred slopes) of a part."""
    SHIFTED: tl.constexpr = skew is not None
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    start, stop = row_span(row, per_s, outer_s, inner_s, skew, vocab, GROUP)
    begin, end = bounds(part, parts, start, stop, SHIFTED, LANES, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            return
    exponent = scalar(exponent, ACC)
    m_s, d_s, m_t, d_t, _, _, _ = merged(
        numbers(partial, row, parts, LEFT), parts, start, stop, exponent,
        "none", False, False, SHIFTED, PARTS, ACC, LANES, GROUP,
    )  # fmt: skip
    d_s, d_t = norms(d_s, d_t)
    value, slopes = pair_sweep(
        row_at(student, row, per_s, outer_s, inner_s, skew, GROUP),
        row_at(teacher, row, per_t, outer_t, inner_t, skew, GROUP),
        begin, end, m_s, d_s, m_t, d_t, exponent, scalar(param, ACC),
        DIVERGENCE, "evict_last", SHIFTED, ACC, LANES, GROUP,
    )  # fmt: skip
    sums = numbers(sums, row, parts, 2) + part
    tl.store(sums, value)
    tl.store(sums + parts, slopes)


@triton.jit(do_not_specialize=_PARTS)
def finish_kernel(
    student, teacher, partial, sums, constants, loss, keep, label,
    vocab, classes, parts, skew,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, sure: tl.float64, spread: tl.float64,
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, UNIT: tl.constexpr, SMOOTH: tl.constexpr,
    PARTS: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss as in `rows.fused_kernel`; constants = (max, sum) of both sides, slopes, unit."""
    SHIFTED: tl.constexpr = skew is not None
    row = tl.program_id(0)
    start, stop = row_span(row, per_s, outer_s, inner_s, skew, vocab, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            tl.store(loss + row, scalar(0.0, ACC))
            return
    exponent, inverse = scalar(exponent, ACC), scalar(inverse, ACC)
    sure, spread = scalar(sure, ACC), scalar(spread, ACC)
    partial = numbers(partial, row, parts, LEFT)
    m_s, raw_s, m_t, raw_t, cross, unit, drift = merged(
        partial, parts, start, stop, exponent,
        EXPECTATION, UNIT, SMOOTH, SHIFTED, PARTS, ACC, LANES, GROUP,
    )  # fmt: skip
    d_s, d_t = norms(raw_s, raw_t)
    if EXPECTATION == "none":
        sums = numbers(sums, row, parts, 2)
        value = tl.sum(gathered(sums, parts, 0, 0.0, PARTS), 0)
        slopes = tl.sum(gathered(sums, parts, 1, 0.0, PARTS), 0)
    else:
        value = expected(
            row_at(student, row, per_s, outer_s, inner_s, skew, GROUP),
            row_at(teacher, row, per_t, outer_t, inner_t, skew, GROUP),
            start, stop, m_s, d_s, m_t, d_t, cross, exponent, inverse, scalar(param, ACC),
            DIVERGENCE, EXPECTATION, SHIFTED, ACC, LANES, GROUP,
        )  # fmt: skip
        slopes = value
    value = scalar(soft, ACC) * value
    if not UNIT:
        unit = raw_s
    if label is not None:
        wanted = tl.load(label + row)
        here = (wanted >= 0) & (wanted < vocab)
        at_label = tl.sum(gathered(partial, parts, 7, 0.0, PARTS), 0)
        value += scalar(hard, ACC) * entropy(
            m_s, unit, drift, at_label, here, vocab, classes, sure, spread, SMOOTH, ACC
        )
    tl.store(loss + row, value)
    if constants is not None:
        constants = constants + row * 6
        tl.store(constants, m_s)
        tl.store(constants + 1, d_s)
        tl.store(constants + 2, m_t)
        tl.store(constants + 3, d_t)
        tl.store(constants + 4, slopes)
        tl.store(constants + 5, unit)


@triton.jit(do_not_specialize=[*_PARTS, "per_g"])
def grad_part_kernel(
    student, teacher, grad, constants, keep, label, scale,
    vocab, width, parts, skew,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t, per_g, outer_g, inner_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, sure: tl.float64, spread: tl.float64, factor: tl.float64,
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of `rows.fused_kernel` in the columns of a part; the last one's reach width."""
    SHIFTED: tl.constexpr = skew is not None
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    start, stop = row_span(row, per_s, outer_s, inner_s, skew, vocab, GROUP)
    begin, end = bounds(part, parts, start, stop, SHIFTED, LANES, GROUP)
    grad = row_at(grad, row, per_g, outer_g, inner_g, skew, GROUP)
    last = tl.where(part == parts - 1, start + width, end)
    if keep is not None:
        if tl.load(keep + row) == 0:
            zero_columns(grad, begin, last, LANES, GROUP, SHIFTED)
            return
    column = -1
    if label is not None:
        wanted = tl.load(label + row)
        here = (wanted >= 0) & (wanted < vocab)
        column = tl.where(here, wanted + start, -1).to(tl.int32)
    by = scalar(factor, ACC)
    if scale is not None:
        by = by * tl.load(scale + row)
    inverse, spread = scalar(inverse, ACC), scalar(spread, ACC)
    constants = constants + row * 6
    gradient_sweep(
        grad,
        row_at(student, row, per_s, outer_s, inner_s, skew, GROUP),
        row_at(teacher, row, per_t, outer_t, inner_t, skew, GROUP),
        begin, end, tl.load(constants), tl.load(constants + 1), tl.load(constants + 2),
        tl.load(constants + 3), tl.load(constants + 4), tl.load(constants + 5),
        column, scalar(exponent, ACC), scalar(param, ACC),
        scalar(soft, ACC) * inverse * by, scalar(hard, ACC) * by,
        scalar(sure, ACC) + spread, spread,
        DIVERGENCE, EXPECTATION == "teacher", label is not None, UNIT,
        EXPECTATION != "none", SHIFTED, ACC, LANES, GROUP,
    )  # fmt: skip
    zero_columns(grad, end, last, LANES, GROUP, SHIFTED)
