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
from fastkd.backends.gpu.arguments import Sides, Split, Sums
from fastkd.backends.gpu.outputs import leave_out, store_soft
from fastkd.backends.gpu.pairs import grad_loop, pair_loop
from fastkd.backends.gpu.rows import (
    at_one,
    expectation_or_pairs,
    grad_factor,
    hard_loss,
    label_column,
    spec_of,
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

# what each kernel reads of `PerRow`, `Shape` and `Constants`; tile, layout and accumulation dtype
# all of them do
_TILE = {"UNALIGNED", "ACC", "LANES", "GROUP"}
SUMS_READS = frozenset(
    _TILE | {"keep", "label", "skip", "EXPECTATION", "HARD_T1", "SMOOTH", "COUNT"}
)
PAIRS_READS = frozenset(_TILE | {"keep", "skip", "DIVERGENCE", "SPLITS", "COUNT"})
FINISH_READS = SUMS_READS | {"loss", "outputs", "vocab", "classes"}
FINISH_READS |= {"DIVERGENCE", "OF_SUM", "Z_LOSS", "SPLITS"}
GRAD_READS = frozenset(_TILE | {"keep", "label", "scale", "skip", "vocab", "width"})
GRAD_READS |= {"DIVERGENCE", "EXPECTATION", "HARD", "HARD_T1"}


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
def split_of(number, splits, start, stop, const):
    """`Split` of [start, stop): whole tiles, shared as evenly as possible."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    tiles = tl.cdiv(stop, TILE)
    begin = number * tiles // splits * TILE
    end = (number + 1) * tiles // splits * TILE
    if const.UNALIGNED == OFFSET:
        begin = tl.maximum(begin, start)
    return Split(number, splits, begin, tl.minimum(end, stop))


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
def pack_partials(sums, at_label, COUNT: tl.constexpr):
    """[COUNT]: the numbers of a split, in the order that `merge_partials` reads."""
    n = tl.arange(0, COUNT)
    x = tl.where(n == 0, sums.m_s, tl.where(n == 1, sums.d_s, tl.where(n == 2, sums.m_t, sums.d_t)))
    y = tl.where(n == 6, sums.sum_shifted, at_label)
    y = tl.where(n == 4, sums.cross, tl.where(n == 5, sums.sum_t1, y))
    found = tl.where(n < 4, x, y)
    if COUNT == PARTIALS_OUT:
        more = tl.where(n == 8, sums.weighted_s, tl.where(n == 9, sums.weighted_t, 0.0))
        found = tl.where(n < 8, found, more)
    return found


@triton.jit
def load_sides(partial, splits, const):
    """`Sides` of all splits."""
    lowest: tl.constexpr = LOWEST64 if const.ACC == tl.float64 else LOWEST32
    m_s = load_partials(partial, splits, 0, lowest, const.SPLITS)
    d_s = load_partials(partial, splits, 1, 0.0, const.SPLITS)
    m_t = load_partials(partial, splits, 2, lowest, const.SPLITS)
    return Sides(m_s, d_s, m_t, load_partials(partial, splits, 3, 0.0, const.SPLITS))


@triton.jit
def store_merged(outputs, partial, row, splits, value, sums, spec, const, split=0):
    """`store_soft` of the whole row, whose `Sums` lack the weighted ones, by its first split."""
    of = load_sides(partial, splits, const)
    weighted_s = load_partials(partial, splits, 8, 0.0, const.SPLITS)
    weighted_t = load_partials(partial, splits, 9, 0.0, const.SPLITS)
    of_s = weighted_merge(weighted_s, of.d_s, of.m_s, spec.exponent)
    of_t = weighted_merge(weighted_t, of.d_t, of.m_t, spec.exponent)
    m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, _, _ = sums
    if split == 0:
        sums = Sums(m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, of_s, of_t)
        store_soft(outputs, row, value, sums, spec.inverse)


@triton.jit
def merge_partials(partial, splits, start, stop, exponent, const):
    """What `sum_loop` would return for the whole row, but for the weighted sums, which are 0."""
    of = load_sides(partial, splits, const)
    cross = load_partials(partial, splits, 4, 0.0, const.SPLITS)
    sum_t1 = load_partials(partial, splits, 5, 0.0, const.SPLITS)
    top_s, sum_s, top_t, sum_t, all_cross, all_t1 = merge_sides(
        of.m_s, of.d_s, of.m_t, of.d_t, cross, sum_t1, exponent, const
    )
    none = scalar(0.0, const.ACC)
    all_shifted = none
    if const.SMOOTH:
        number = tl.arange(0, const.SPLITS)
        split = split_of(number, splits, start, stop, const)
        sum_shifted = load_partials(partial, splits, 6, 0.0, const.SPLITS)
        sum_shifted += tl.maximum(split.end - split.begin, 0).to(const.ACC) * (of.m_s - top_s)
        all_shifted = tl.sum(tl.where(number < splits, sum_shifted, 0.0), 0)
    return Sums(top_s, sum_s, top_t, sum_t, all_cross, all_t1, all_shifted, none, none)


@triton.jit
def label_logit(student, label, row, split, start, vocab, const):
    """The logit at a row's label for split 0, and 0 for the others: the splits are summed."""
    column, here = label_column(label, row, start, vocab)
    return tl.load(student + column, mask=here & (split == 0), other=0.0).to(const.ACC)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def split_sums_kernel(
    student, teacher, partial, rows, vocab, splits, align_offset, per_s, per_t,
    exponent: tl.float64, const,
):  # fmt: skip
    """partial[row, :, split] = the sums of a split, and split 0's logit at the label."""
    if rows.skip is not None:
        if tl.load(rows.skip) != 0:
            return
    row, number = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, stop = row_span(student, per_s, row, align_offset, vocab, const)
    split = split_of(number, splits, start, stop, const)
    if rows.keep is not None:
        if tl.load(rows.keep + row) == 0:
            return
    student = row_at(student, per_s, row, align_offset, const)
    teacher = row_at(teacher, per_t, row, align_offset, const)
    at_label = scalar(0.0, const.ACC)
    if rows.label is not None:  # now, before any split of an in-place gradient is written
        at_label = label_logit(student, rows.label, row, number, start, vocab, const)
    sums = sum_loop(
        student, teacher, split.begin, split.end, scalar(exponent, const.ACC), const,
        const.COUNT == PARTIALS_OUT,
    )  # fmt: skip
    partial = partials_of(partial, row, splits, const.COUNT)
    found = pack_partials(sums, at_label, const.COUNT)
    tl.store(partial + tl.arange(0, const.COUNT) * splits + number, found)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def split_pairs_kernel(
    student, teacher, partial, sums, rows, vocab, splits, align_offset, per_s, per_t,
    exponent: tl.float64, param: tl.float64, const,
):  # fmt: skip
    """sums[row, :, split] = (sum of the values, sum of the centred slopes) of a split."""
    if rows.skip is not None:
        if tl.load(rows.skip) != 0:
            return
    row, number = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, stop = row_span(student, per_s, row, align_offset, vocab, const)
    split = split_of(number, splits, start, stop, const)
    if rows.keep is not None:
        if tl.load(rows.keep + row) == 0:
            return
    exponent = scalar(exponent, const.ACC)
    of = merge_partials(
        partials_of(partial, row, splits, const.COUNT), splits, start, stop, exponent, const
    )
    d_s, d_t = safe_sums(of.d_s, of.d_t)
    value, slopes = pair_loop(
        row_at(student, per_s, row, align_offset, const),
        row_at(teacher, per_t, row, align_offset, const),
        split.begin, split.end, Sides(of.m_s, d_s, of.m_t, d_t),
        exponent, scalar(param, const.ACC), const, "evict_last",
    )  # fmt: skip
    sums = partials_of(sums, row, splits, 2) + number
    tl.store(sums, value)
    tl.store(sums + splits, slopes)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def split_finish_kernel(
    student, teacher, partial, sums, constants, rows, shape, splits, align_offset, per_s, per_t,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    const,
):  # fmt: skip
    """loss as in `rows.fused_kernel`; constants: those of `split_grad_kernel`."""
    if rows.skip is not None:
        if tl.load(rows.skip) != 0:
            return
    row = tl.program_id(0)
    start, stop = row_span(student, per_s, row, align_offset, shape.vocab, const)
    if rows.keep is not None:
        if tl.load(rows.keep + row) == 0:
            leave_out(rows, row, const)
            return
    spec = spec_of(exponent, inverse, param, soft, hard, one_minus_eps, eps_over_v, const)
    partial = partials_of(partial, row, splits, const.COUNT)
    of_row = merge_partials(partial, splits, start, stop, spec.exponent, const)
    m_s, m_t = of_row.m_s, of_row.m_t
    d_s, d_t = safe_sums(of_row.d_s, of_row.d_t)
    if const.EXPECTATION == "none":
        sums = partials_of(sums, row, splits, 2)
        value = tl.sum(load_partials(sums, splits, 0, 0.0, const.SPLITS), 0)
        slopes = tl.sum(load_partials(sums, splits, 1, 0.0, const.SPLITS), 0)
    else:
        value = expectation_or_pairs(
            row_at(student, per_s, row, align_offset, const),
            row_at(teacher, per_t, row, align_offset, const),
            start, stop, Sides(m_s, d_s, m_t, d_t), of_row.cross, spec, const,
        )  # fmt: skip
        slopes = value
    value, of = const.OF_SUM(value, (of_row.d_s == 0) & (of_row.d_t == 0))
    if rows.outputs is not None:
        store_merged(rows.outputs, partial, row, splits, value, of_row, spec, const)
    value = spec.soft * value
    sum_t1 = of_row.sum_t1 if const.HARD_T1 else of_row.d_s
    if rows.label is not None:
        _, here = label_column(rows.label, row, start, shape.vocab)
        at_label = tl.sum(load_partials(partial, splits, 7, 0.0, const.SPLITS), 0)
        of_label = hard_loss(
            rows.outputs, row, m_s, sum_t1, of_row.sum_shifted, at_label, here, shape, spec, const
        )
        value += spec.hard * of_label
    z_value, unit = at_one(m_s, sum_t1, spec.hard, scalar(z, const.ACC), const.Z_LOSS)
    tl.store(rows.loss + row, value + z_value)
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
    student, teacher, grad, constants, rows, shape, splits, align_offset, per_s, per_t, per_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, factor: tl.float64,
    const,
):  # fmt: skip
    """The gradient of `rows.fused_kernel` in one split; the last split reaches to `width`."""
    if rows.skip is not None:
        if tl.load(rows.skip) != 0:
            return
    row, number = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, stop = row_span(student, per_s, row, align_offset, shape.vocab, const)
    split = split_of(number, splits, start, stop, const)
    grad = row_at(grad, per_g, row, align_offset, const)
    last = tl.where(number == splits - 1, start + shape.width, split.end)
    if rows.keep is not None:
        if tl.load(rows.keep + row) == 0:
            zero_columns(grad, split.begin, last, const)
            return
    column = -1
    if rows.label is not None:
        column, _ = label_column(rows.label, row, start, shape.vocab)
    by = grad_factor(factor, rows.scale, row, const)
    spec = spec_of(exponent, inverse, param, soft, hard, one_minus_eps, eps_over_v, const)
    constants = constants + row * CONSTANTS
    m_s, d_s, m_t = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    sides = Sides(m_s, d_s, m_t, tl.load(constants + 3))
    slopes, sum_t1 = tl.load(constants + 4), tl.load(constants + 5)
    of, unit = tl.load(constants + 6), tl.load(constants + 7)
    grad_loop(
        grad,
        row_at(student, per_s, row, align_offset, const),
        row_at(teacher, per_t, row, align_offset, const),
        split.begin, split.end, sides, slopes, sum_t1, column, of, unit, by, spec, const,
        const.EXPECTATION != "none",
    )  # fmt: skip
    zero_columns(grad, split.end, last, const)
