"""Few rows: several programs share a row, and each takes one split of its columns.

With one program per row, multiprocessors are idle where there are fewer than about two rows for
each. Here a row's programs write the partial sums of their splits, and the next launch merges them
in order: no atomics, and the same bits from run to run. Launches of a loss and its gradient:

    split_sums    partial sums of a split                           a program per split
    split_pairs   value and slopes of a split; only without an      a program per split
                  expectation
    split_finish  the row's loss, and constants for its gradient    a program per row
    split_grad    the gradient of a split                           a program per split
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from fastkd.backends.base import on_host
from fastkd.backends.gpu.outputs import leave_out, store_soft
from fastkd.backends.gpu.pairs import grad_loop, pair_loop
from fastkd.backends.gpu.rows import (
    at_one,
    expectation_or_pairs,
    grad_factor,
    hard_loss,
    label_column,
    zero_columns,
)
from fastkd.backends.gpu.sums import (
    LOWEST32,
    LOWEST64,
    merge_sides,
    safe_sums,
    sum_loop,
    weighted_merge,
)
from fastkd.backends.gpu.tiles import OFFSET, row_at, row_span, scalar

# programs wanted per multiprocessor, fewest tiles of a split, most splits of a row
PROGRAMS, TILES, MOST = 2, 2, 64
# numbers that a split writes: those of `sum_loop`, and the logit at the label; with outputs, two
# more, and places up to a power of 2
PARTIALS, PARTIALS_OUT = tl.constexpr(8), tl.constexpr(16)
# of a row, for its gradient: (max, sum) of both sides, slopes, sum at T = 1, `of_sum`'s derivative,
# factor of q at T = 1
CONSTANTS = tl.constexpr(8)
# processors of the host, under the interpreter: with 0 no row is split
HOST_PROCESSORS = 0

_UNSPECIALIZED = ["splits", "align_offset", "per_s", "per_t"]


@cache
def _multiprocessors(device: torch.device) -> int:
    known = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(known, "multi_processor_count", 0) or getattr(known, "gpu_eu_count", 1))


def processors(device: torch.device) -> int:
    """The number of multiprocessors of a device."""
    # only a device with memory has an index
    nowhere = on_host(device) or device.index is None
    return HOST_PROCESSORS if nowhere else _multiprocessors(device)


def programs_per_row(rows: int, vocab: int, tile_columns: int, processors: int) -> int:
    """How many programs share a row; 1 where there are rows enough, or too few columns.

    It depends on shapes and the device alone, so that the same call gives the same bits.
    """
    wanted = -(-PROGRAMS * processors // max(rows, 1))
    return max(1, min(wanted, vocab // (TILES * tile_columns), MOST))


def partials(outputs: torch.Tensor | None) -> tl.constexpr:
    """How many numbers a split writes."""
    return PARTIALS if outputs is None else PARTIALS_OUT


@triton.jit
def split_bounds(
    split, splits, start, stop, UNALIGNED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr
):
    """Columns of a split of [start, stop): whole tiles, shared as evenly as possible."""
    tiles = tl.cdiv(stop, LANES * GROUP)
    begin = split * tiles // splits * (LANES * GROUP)
    end = (split + 1) * tiles // splits * (LANES * GROUP)
    if UNALIGNED == OFFSET:
        begin = tl.maximum(begin, start)
    return begin, tl.minimum(end, stop)


@triton.jit
def partials_of(x, row, splits, COUNT: tl.constexpr):
    """A row of x [rows, COUNT, splits]: COUNT numbers of each split."""
    return x + row.to(tl.int64) * COUNT * splits


@triton.jit
def load_partials(x, splits, n, other, SPLITS: tl.constexpr):
    """Number n of all splits of the row at x.

    volatile: another program of the same launch may have written it (`cooperative.py`), and this
    multiprocessor's cache would not know.
    """
    split = tl.arange(0, SPLITS)
    return tl.load(x + n * splits + split, mask=split < splits, other=other, volatile=True)


@triton.jit
def pack_partials(
    m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, at_label, weighted_s, weighted_t,
    COUNT: tl.constexpr,
):  # fmt: skip
    """[COUNT]: the numbers of a split, in the order that `merge_partials` reads."""
    n = tl.arange(0, COUNT)
    x = tl.where(n == 0, m_s, tl.where(n == 1, d_s, tl.where(n == 2, m_t, d_t)))
    y = tl.where(n == 4, cross, tl.where(n == 5, sum_t1, tl.where(n == 6, sum_shifted, at_label)))
    found = tl.where(n < 4, x, y)
    if COUNT == PARTIALS_OUT:
        more = tl.where(n == 8, weighted_s, tl.where(n == 9, weighted_t, 0.0))
        found = tl.where(n < 8, found, more)
    return found


@triton.jit
def store_merged(
    outputs, partial, row, splits, value, top_s, sum_s, top_t, sum_t, exponent, inverse,
    SPLITS: tl.constexpr, ACC: tl.constexpr, split=0,
):  # fmt: skip
    """`store_soft` of the whole row, by its first split alone."""
    lowest: tl.constexpr = LOWEST64 if ACC == tl.float64 else LOWEST32
    m_s = load_partials(partial, splits, 0, lowest, SPLITS)
    d_s = load_partials(partial, splits, 1, 0.0, SPLITS)
    m_t = load_partials(partial, splits, 2, lowest, SPLITS)
    d_t = load_partials(partial, splits, 3, 0.0, SPLITS)
    weighted_s = load_partials(partial, splits, 8, 0.0, SPLITS)
    weighted_t = load_partials(partial, splits, 9, 0.0, SPLITS)
    of_s = weighted_merge(weighted_s, d_s, m_s, exponent)
    of_t = weighted_merge(weighted_t, d_t, m_t, exponent)
    if split == 0:
        store_soft(outputs, row, value, top_s, sum_s, of_s, top_t, sum_t, of_t, inverse)


@triton.jit
def merge_partials(
    partial, splits, start, stop, exponent,
    EXPECTATION: tl.constexpr, HARD_T1: tl.constexpr, SUM_SHIFTED: tl.constexpr,
    UNALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What `sum_loop` would return for the whole row."""
    lowest: tl.constexpr = LOWEST64 if ACC == tl.float64 else LOWEST32
    m_s = load_partials(partial, splits, 0, lowest, SPLITS)
    d_s = load_partials(partial, splits, 1, 0.0, SPLITS)
    m_t = load_partials(partial, splits, 2, lowest, SPLITS)
    d_t = load_partials(partial, splits, 3, 0.0, SPLITS)
    cross = load_partials(partial, splits, 4, 0.0, SPLITS)
    sum_t1 = load_partials(partial, splits, 5, 0.0, SPLITS)
    top_s, sum_s, top_t, sum_t, all_cross, all_t1 = merge_sides(
        m_s, d_s, m_t, d_t, cross, sum_t1, exponent, EXPECTATION, HARD_T1
    )
    all_shifted = scalar(0.0, ACC)
    if SUM_SHIFTED:
        split = tl.arange(0, SPLITS)
        begin, end = split_bounds(split, splits, start, stop, UNALIGNED, LANES, GROUP)
        sum_shifted = load_partials(partial, splits, 6, 0.0, SPLITS)
        sum_shifted += tl.maximum(end - begin, 0).to(ACC) * (m_s - top_s)
        all_shifted = tl.sum(tl.where(split < splits, sum_shifted, 0.0), 0)
    return top_s, sum_s, top_t, sum_t, all_cross, all_t1, all_shifted


@triton.jit
def label_logit(student, label, row, split, start, vocab, ACC: tl.constexpr):
    """The logit at a row's label for split 0, and 0 for the others: the splits are summed."""
    column, here = label_column(label, row, start, vocab)
    return tl.load(student + column, mask=here & (split == 0), other=0.0).to(ACC)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def split_sums_kernel(
    student, teacher, partial, keep, label, skip,
    vocab, splits, align_offset,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t,
    exponent: tl.float64,
    EXPECTATION: tl.constexpr, HARD_T1: tl.constexpr, SMOOTH: tl.constexpr,
    COUNT: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """partial[row, :, split] = the sums of a split, and split 0's logit at the label."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, stop = row_span(row, per_s, outer_s, inner_s, align_offset, vocab, GROUP)
    begin, end = split_bounds(split, splits, start, stop, UNALIGNED, LANES, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            return
    student = row_at(student, row, per_s, outer_s, inner_s, align_offset, GROUP, UNALIGNED)
    teacher = row_at(teacher, row, per_t, outer_t, inner_t, align_offset, GROUP, UNALIGNED)
    at_label = scalar(0.0, ACC)
    if label is not None:  # now, before any split of an in-place gradient is written
        at_label = label_logit(student, label, row, split, start, vocab, ACC)
    m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t = sum_loop(
        student, teacher, begin, end, scalar(exponent, ACC),
        EXPECTATION, HARD_T1, SMOOTH, COUNT == PARTIALS_OUT, UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    found = pack_partials(
        m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, at_label, weighted_s, weighted_t, COUNT
    )
    partial = partials_of(partial, row, splits, COUNT)
    tl.store(partial + tl.arange(0, COUNT) * splits + split, found)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def split_pairs_kernel(
    student, teacher, partial, sums, keep, skip,
    vocab, splits, align_offset,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64,
    DIVERGENCE: tl.constexpr, SPLITS: tl.constexpr, COUNT: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """sums[row, :, split] = (sum of the values, sum of the centred slopes) of a split."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, stop = row_span(row, per_s, outer_s, inner_s, align_offset, vocab, GROUP)
    begin, end = split_bounds(split, splits, start, stop, UNALIGNED, LANES, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            return
    exponent = scalar(exponent, ACC)
    m_s, d_s, m_t, d_t, _, _, _ = merge_partials(
        partials_of(partial, row, splits, COUNT), splits, start, stop, exponent,
        "none", False, False, UNALIGNED, SPLITS, ACC, LANES, GROUP,
    )  # fmt: skip
    d_s, d_t = safe_sums(d_s, d_t)
    value, slopes = pair_loop(
        row_at(student, row, per_s, outer_s, inner_s, align_offset, GROUP, UNALIGNED),
        row_at(teacher, row, per_t, outer_t, inner_t, align_offset, GROUP, UNALIGNED),
        begin, end, m_s, d_s, m_t, d_t, exponent, scalar(param, ACC),
        DIVERGENCE, "evict_last", UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    sums = partials_of(sums, row, splits, 2) + split
    tl.store(sums, value)
    tl.store(sums + splits, slopes)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def split_finish_kernel(
    student, teacher, partial, sums, constants, loss, outputs, keep, label, skip,
    vocab, classes, splits, align_offset,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    DIVERGENCE: tl.constexpr, OF_SUM: tl.constexpr, EXPECTATION: tl.constexpr,
    HARD_T1: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, COUNT: tl.constexpr,
    SPLITS: tl.constexpr, UNALIGNED: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss as in `rows.fused_kernel`; constants: those of `split_grad_kernel`."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row = tl.program_id(0)
    start, stop = row_span(row, per_s, outer_s, inner_s, align_offset, vocab, GROUP)
    if keep is not None:
        if tl.load(keep + row) == 0:
            leave_out(loss, outputs, row, ACC)
            return
    exponent, inverse = scalar(exponent, ACC), scalar(inverse, ACC)
    one_minus_eps, eps_over_v = scalar(one_minus_eps, ACC), scalar(eps_over_v, ACC)
    partial = partials_of(partial, row, splits, COUNT)
    m_s, raw_s, m_t, raw_t, cross, sum_t1, sum_shifted = merge_partials(
        partial, splits, start, stop, exponent,
        EXPECTATION, HARD_T1, SMOOTH, UNALIGNED, SPLITS, ACC, LANES, GROUP,
    )  # fmt: skip
    d_s, d_t = safe_sums(raw_s, raw_t)
    if EXPECTATION == "none":
        sums = partials_of(sums, row, splits, 2)
        value = tl.sum(load_partials(sums, splits, 0, 0.0, SPLITS), 0)
        slopes = tl.sum(load_partials(sums, splits, 1, 0.0, SPLITS), 0)
    else:
        value = expectation_or_pairs(
            row_at(student, row, per_s, outer_s, inner_s, align_offset, GROUP, UNALIGNED),
            row_at(teacher, row, per_t, outer_t, inner_t, align_offset, GROUP, UNALIGNED),
            start, stop, m_s, d_s, m_t, d_t, cross, exponent, inverse, scalar(param, ACC),
            DIVERGENCE, EXPECTATION, UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
        slopes = value
    value, of = OF_SUM(value, (raw_s == 0) & (raw_t == 0))
    if outputs is not None:
        store_merged(
            outputs, partial, row, splits, value, m_s, raw_s, m_t, raw_t, exponent, inverse,
            SPLITS, ACC,
        )  # fmt: skip
    value = scalar(soft, ACC) * value
    if not HARD_T1:
        sum_t1 = raw_s
    if label is not None:
        _, here = label_column(label, row, start, vocab)
        at_label = tl.sum(load_partials(partial, splits, 7, 0.0, SPLITS), 0)
        of_label = hard_loss(
            outputs, row, m_s, sum_t1, sum_shifted, at_label, here, vocab, classes, one_minus_eps,
            eps_over_v, SMOOTH, ACC,
        )  # fmt: skip
        value += scalar(hard, ACC) * of_label
    z_value, unit = at_one(m_s, sum_t1, scalar(hard, ACC), scalar(z, ACC), Z_LOSS)
    tl.store(loss + row, value + z_value)
    if constants is not None:
        constants = constants + row * CONSTANTS
        tl.store(constants, m_s)
        tl.store(constants + 1, d_s)
        tl.store(constants + 2, m_t)
        tl.store(constants + 3, d_t)
        tl.store(constants + 4, slopes)
        tl.store(constants + 5, sum_t1)
        tl.store(constants + 6, of)
        tl.store(constants + 7, unit)


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "per_g"])
def split_grad_kernel(
    student, teacher, grad, constants, keep, label, scale, skip,
    vocab, width, splits, align_offset,
    per_s, outer_s, inner_s, per_t, outer_t, inner_t, per_g, outer_g, inner_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, factor: tl.float64,
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, HARD_T1: tl.constexpr,
    Z_LOSS: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of `rows.fused_kernel` in one split; the last split reaches to `width`."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, stop = row_span(row, per_s, outer_s, inner_s, align_offset, vocab, GROUP)
    begin, end = split_bounds(split, splits, start, stop, UNALIGNED, LANES, GROUP)
    grad = row_at(grad, row, per_g, outer_g, inner_g, align_offset, GROUP, UNALIGNED)
    last = tl.where(split == splits - 1, start + width, end)
    if keep is not None:
        if tl.load(keep + row) == 0:
            zero_columns(grad, begin, last, LANES, GROUP, UNALIGNED)
            return
    column = -1
    if label is not None:
        column, _ = label_column(label, row, start, vocab)
    by = grad_factor(factor, scale, row, ACC)
    inverse, eps_over_v = scalar(inverse, ACC), scalar(eps_over_v, ACC)
    constants = constants + row * CONSTANTS
    grad_loop(
        grad,
        row_at(student, row, per_s, outer_s, inner_s, align_offset, GROUP, UNALIGNED),
        row_at(teacher, row, per_t, outer_t, inner_t, align_offset, GROUP, UNALIGNED),
        begin, end, tl.load(constants), tl.load(constants + 1), tl.load(constants + 2),
        tl.load(constants + 3), tl.load(constants + 4), tl.load(constants + 5), column,
        scalar(exponent, ACC), scalar(param, ACC), scalar(soft, ACC) * inverse,
        tl.load(constants + 6), tl.load(constants + 7), scalar(hard, ACC),
        scalar(one_minus_eps, ACC), eps_over_v, by,
        DIVERGENCE, label is not None or Z_LOSS, HARD_T1,
        EXPECTATION != "none", UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    zero_columns(grad, end, last, LANES, GROUP, UNALIGNED)
