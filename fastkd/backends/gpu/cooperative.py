"""Wide rows: programs that run at the same time cooperate on each row, in one launch.

With one program per row, as many rows are in flight as programs are resident. What their sum loop
has read does not fit into the L2 cache, and the gradient loop reads it from memory again. With
`splits` programs per row, `splits` times fewer rows are in flight. Each program sums its split of
the columns, writes its partial sums to memory, waits for those of the others, and merges them all
in order. So every program computes the row's constants from the same numbers, and the bits are the
same from run to run.

A program takes the next ticket, and the splits of a row have consecutive tickets. Whatever the
order in which programs start, at most one begun row lacks a split that no program has begun. So
some program can always go on, as long as more programs are resident than share a row. A number that
is not written yet is UNWRITTEN, a NaN that no computation returns. A program waits for the numbers
themselves: no counter, no fence. A wait of seconds means a fault of the device or of this file; it
ends with NaN in the loss and the gradient.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastkd.backends.base import on_host
from fastkd.backends.gpu import split_rows
from fastkd.backends.gpu.outputs import leave_out
from fastkd.backends.gpu.pairs import grad_loop, pair_loop
from fastkd.backends.gpu.rows import (
    at_one,
    expectation,
    grad_factor,
    hard_loss,
    label_column,
    zero_columns,
)
from fastkd.backends.gpu.split_rows import (
    PARTIALS_OUT,
    label_logit,
    load_partials,
    merge_partials,
    pack_partials,
    partials_of,
    split_bounds,
    store_merged,
)
from fastkd.backends.gpu.sums import safe_sums, sum_loop
from fastkd.backends.gpu.tiles import row_at, row_span, scalar

# The most programs of a row. The fewest rows that a device must have room for, even with several
# launches at a time. The share of the L2 cache that rows in flight may fill: the rest is for the
# gradient's stores, and for what a cache of two halves keeps twice.
MOST, LEAST_ROWS, KEPT = 32, 8, 0.75
# "0": programs never cooperate. A number: so many programs share every row, for measurements only
# (`make gpu`).
VARIABLE = "FASTKD_GPU_COOPERATIVE"
# the capacity of the host: under the interpreter nothing is resident
HOST: Capacity | None = None

# the bits of a number that is not written yet: arithmetic makes other NaNs
UNWRITTEN = tl.constexpr(-1)
SUMS = tl.constexpr(2)  # of a split: the sum of values, and that of slopes
# polls before a program gives up; each is a round trip to the cache
PATIENCE = tl.constexpr(1 << 22)


class Capacity(NamedTuple):
    """What a device can hold at a time."""

    processors: int
    cache: int  # bytes of L2


@cache
def _capacity(device: torch.device) -> Capacity | None:
    known = torch.get_device_module(device).get_device_properties(device)
    cache_bytes = int(getattr(known, "L2_cache_size", 0))
    return Capacity(int(known.multi_processor_count), cache_bytes) if cache_bytes else None


def capacity(device: torch.device, arch: str) -> Capacity | None:
    """What a device of this architecture can hold; None where cooperation does not pay.

    gfx942 and its like have one cache for each part of the chip, and programs would reach across.
    """
    if on_host(device) or device.index is None:
        return HOST
    return _capacity(device) if arch.startswith("sm_") else None


def programs_per_row(
    rows: int, vocab: int, row_bytes: int, tile_columns: int, resident: int, holds: Capacity | None
) -> int:
    """How many programs share a row; 1 where the rows fit the cache and no processor is idle.

    It depends on shapes and the device alone, so that the same call gives the same bits.

    Args:
        rows, vocab: of the operands.
        row_bytes: bytes of a row of both operands.
        tile_columns: columns of a tile.
        resident: programs that a multiprocessor runs at a time.
        holds: the device's capacity.
    """
    if holds is None or resident < 1:
        return 1
    places = resident * holds.processors
    most = min(MOST, vocab // (split_rows.TILES * tile_columns), places // LEAST_ROWS)
    given = os.environ.get(VARIABLE, "")
    if given and not given.isdecimal():
        raise ValueError(f"{VARIABLE}: got {given!r}, expected a number of programs, or 0 for none")
    fits = -(-places * row_bytes // int(KEPT * holds.cache))
    wanted = int(given) if given else min(max(fits, places // max(rows, 1)), most)
    if wanted <= 1 or most <= 1:
        return 1
    if given:
        return min(wanted, MOST, places // LEAST_ROWS)
    # a few more programs where they share the tiles more evenly
    tiles = -(-vocab // tile_columns)
    return min(range(wanted, min(most, wanted * 3 // 2) + 1), key=lambda n: (-(-tiles // n) * n, n))


@triton.jit
def publish(x, found, COUNT: tl.constexpr, split, splits):
    """Writes the numbers of a split, each atomically, so that the whole device sees them."""
    known = tl.where(found != found, float("nan"), found).to(tl.int32, bitcast=True)
    x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_xchg(x + tl.arange(0, COUNT) * splits + split, known, sem="relaxed")


@triton.jit
def any_unwritten(x, count, SPAN: tl.constexpr):
    """Whether one of `count` numbers is not written yet.

    SPAN is at least the number of threads of a program. Else two threads would read the same
    number, only one of them might see it written, and they would diverge.
    """
    at = tl.arange(0, SPAN)
    x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    found = tl.load(x + at, mask=at < count, other=0, volatile=True)
    return tl.max((found == UNWRITTEN).to(tl.int32), 0)


@triton.jit
def wait(x, count, SPAN: tl.constexpr):
    """Returns when all numbers are written, or after PATIENCE polls."""
    patience = tl.full((), PATIENCE, tl.int32)
    unwritten = any_unwritten(x, count, SPAN)
    while (unwritten != 0) & (patience > 0):
        patience -= 1
        unwritten = any_unwritten(x, count, SPAN)


@triton.jit
def cooperative_pair_loop(
    student, teacher, sums, split, splits, begin, end, m_s, d_s, m_t, d_t, exponent, param,
    DIVERGENCE: tl.constexpr, UNALIGNED: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`pair_loop` of a row, by all programs that share it."""
    value, slopes = pair_loop(
        student, teacher, begin, end, m_s, d_s, m_t, d_t, exponent, param,
        DIVERGENCE, "evict_last", UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    found = tl.where(tl.arange(0, SUMS) == 0, value, slopes)
    publish(sums, found, SUMS, split, splits)
    wait(sums, SUMS * splits, SPAN)
    value = tl.sum(load_partials(sums, splits, 0, 0.0, SPLITS), 0)
    return value, tl.sum(load_partials(sums, splits, 1, 0.0, SPLITS), 0)


@triton.jit
def cooperative_sum_loop(
    student, teacher, partial, at_label, split, splits, start, stop, begin, end, exponent,
    EXPECTATION: tl.constexpr, HARD_T1: tl.constexpr, SMOOTH: tl.constexpr,
    COUNT: tl.constexpr, UNALIGNED: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`sum_loop` of a row, by all programs that share it."""
    m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, weighted_s, weighted_t = sum_loop(
        student, teacher, begin, end, exponent,
        EXPECTATION, HARD_T1, SMOOTH, COUNT == PARTIALS_OUT, UNALIGNED, ACC, LANES, GROUP,
    )  # fmt: skip
    found = pack_partials(
        m_s, d_s, m_t, d_t, cross, sum_t1, sum_shifted, at_label, weighted_s, weighted_t, COUNT
    )
    publish(partial, found, COUNT, split, splits)
    wait(partial, COUNT * splits, SPAN)
    return merge_partials(
        partial, splits, start, stop, exponent,
        EXPECTATION, HARD_T1, SMOOTH, UNALIGNED, SPLITS, ACC, LANES, GROUP,
    )  # fmt: skip


@triton.jit
def cooperative_value(
    student, teacher, sums, split, splits, begin, end, m_s, d_s, m_t, d_t, cross,
    exponent, inverse, param,
    DIVERGENCE: tl.constexpr, EXPECTATION: tl.constexpr, UNALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr,
    ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`rows.row_value` of a row, by all programs that share it."""
    if EXPECTATION == "none":
        value, slopes = cooperative_pair_loop(
            student, teacher, sums, split, splits, begin, end, m_s, d_s, m_t, d_t, exponent, param,
            DIVERGENCE, UNALIGNED, SPLITS, SPAN, ACC, LANES, GROUP,
        )  # fmt: skip
    else:
        value = expectation(d_s, d_t, cross, inverse, EXPECTATION)
        if value * 0.0 != 0.0:  # as in `rows.expectation_or_pairs`: for all splits, or for none
            value, _ = cooperative_pair_loop(
                student, teacher, sums, split, splits, begin, end,
                m_s, d_s, m_t, d_t, exponent, param,
                DIVERGENCE, UNALIGNED, SPLITS, SPAN, ACC, LANES, GROUP,
            )  # fmt: skip
        slopes = value
    return value, slopes


@triton.jit(do_not_specialize=["splits", "align_offset", "per_s", "per_t", "per_g"])
def cooperative_kernel(
    # pointers: as in `rows.fused_kernel`, then what programs exchange
    student, teacher, grad, loss, outputs, keep, label, scale, skip, ticket, partial, sums,
    # shape, rows and loss spec, as in `rows.fused_kernel`
    splits, vocab, classes, width,
    align_offset, per_s, outer_s, inner_s, per_t, outer_t, inner_t, per_g, outer_g, inner_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    factor: tl.float64,
    # constants
    DIVERGENCE: tl.constexpr, OF_SUM: tl.constexpr, EXPECTATION: tl.constexpr,
    HARD_T1: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, COUNT: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr,
    UNALIGNED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`rows.fused_kernel` for one split of a row: the next one that no program has begun.

    ticket [1], partial [rows, COUNT, splits] and sums [rows, SUMS, splits] hold UNWRITTEN at the
    start. The first split of a row stores the loss.
    """
    if skip is not None:
        if tl.load(skip) != 0:
            return
    turn = tl.atomic_add(ticket, 1, sem="relaxed") - UNWRITTEN
    row, split = turn // splits, turn % splits
    start, stop = row_span(row, per_s, outer_s, inner_s, align_offset, vocab, GROUP)
    begin, end = split_bounds(split, splits, start, stop, UNALIGNED, LANES, GROUP)
    last = tl.where(split == splits - 1, start + width, end)
    if grad is not None:
        grad = row_at(grad, row, per_g, outer_g, inner_g, align_offset, GROUP, UNALIGNED)
    if keep is not None:
        if tl.load(keep + row) == 0:
            if split == 0:
                leave_out(loss, outputs, row, ACC)
            if grad is not None:
                zero_columns(grad, begin, last, LANES, GROUP, UNALIGNED)
            return
    student = row_at(student, row, per_s, outer_s, inner_s, align_offset, GROUP, UNALIGNED)
    teacher = row_at(teacher, row, per_t, outer_t, inner_t, align_offset, GROUP, UNALIGNED)
    partial = partials_of(partial, row, splits, COUNT)
    sums = partials_of(sums, row, splits, SUMS)
    exponent, inverse, param = scalar(exponent, ACC), scalar(inverse, ACC), scalar(param, ACC)
    soft, hard = scalar(soft, ACC), scalar(hard, ACC)
    one_minus_eps, eps_over_v = scalar(one_minus_eps, ACC), scalar(eps_over_v, ACC)

    column, at_label = -1, scalar(0.0, ACC)
    if label is not None:  # now, before any split of an in-place gradient is written
        at_label = label_logit(student, label, row, split, start, vocab, ACC)
        column, here = label_column(label, row, start, vocab)
    m_s, raw_s, m_t, raw_t, cross, sum_t1, sum_shifted = cooperative_sum_loop(
        student, teacher, partial, at_label, split, splits, start, stop, begin, end, exponent,
        EXPECTATION, HARD_T1, SMOOTH, COUNT, UNALIGNED, SPLITS, SPAN, ACC, LANES, GROUP,
    )  # fmt: skip
    d_s, d_t = safe_sums(raw_s, raw_t)
    value, slopes = cooperative_value(
        student, teacher, sums, split, splits, begin, end, m_s, d_s, m_t, d_t, cross,
        exponent, inverse, param,
        DIVERGENCE, EXPECTATION, UNALIGNED, SPLITS, SPAN, ACC, LANES, GROUP,
    )  # fmt: skip
    if not HARD_T1:
        sum_t1 = raw_s
    value, of = OF_SUM(value, (raw_s == 0) & (raw_t == 0))
    result = soft * value
    if outputs is not None:
        store_merged(
            outputs, partial, row, splits, value, m_s, raw_s, m_t, raw_t, exponent, inverse,
            SPLITS, ACC, split,
        )  # fmt: skip
    if label is not None:
        at_label = tl.sum(load_partials(partial, splits, 7, 0.0, SPLITS), 0)
        result += hard * hard_loss(
            outputs, row, m_s, sum_t1, sum_shifted, at_label, here, vocab, classes, one_minus_eps,
            eps_over_v, SMOOTH, ACC, split,
        )  # fmt: skip
    z_value, unit = at_one(m_s, sum_t1, hard, scalar(z, ACC), Z_LOSS)
    tl.store(loss + row, result + z_value, mask=split == 0)
    if grad is not None:
        by = grad_factor(factor, scale, row, ACC)
        grad_loop(
            grad, student, teacher, begin, end, m_s, d_s, m_t, d_t, slopes, sum_t1, column,
            exponent, param, soft * inverse, of, unit, hard, one_minus_eps, eps_over_v, by,
            DIVERGENCE, label is not None or Z_LOSS, HARD_T1,
            EXPECTATION != "none", UNALIGNED, ACC, LANES, GROUP,
        )  # fmt: skip
        zero_columns(grad, end, last, LANES, GROUP, UNALIGNED)
