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
from fastkd.backends.gpu.arguments import Sides
from fastkd.backends.gpu.outputs import leave_out
from fastkd.backends.gpu.pairs import grad_loop, pair_loop
from fastkd.backends.gpu.rows import (
    at_one,
    expectation,
    grad_factor,
    hard_loss,
    label_column,
    spec_of,
    zero_columns,
)
from fastkd.backends.gpu.split_rows import (
    PARTIALS_OUT,
    label_logit,
    load_partials,
    merge_partials,
    pack_partials,
    partials_of,
    split_of,
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
def cooperative_pair_loop(student, teacher, sums, split, sides, spec, const):
    """`pair_loop` of a row, by all programs that share it."""
    value, slopes = pair_loop(
        student, teacher, split.begin, split.end, sides, spec.exponent, spec.param, const,
        "evict_last",
    )  # fmt: skip
    found = tl.where(tl.arange(0, SUMS) == 0, value, slopes)
    publish(sums, found, SUMS, split.number, split.splits)
    wait(sums, SUMS * split.splits, const.SPAN)
    value = tl.sum(load_partials(sums, split.splits, 0, 0.0, const.SPLITS), 0)
    return value, tl.sum(load_partials(sums, split.splits, 1, 0.0, const.SPLITS), 0)


@triton.jit
def cooperative_sum_loop(
    student, teacher, partial, at_label, split, start, stop, exponent, const
):  # fmt: skip
    """`sum_loop` of a row, by all programs that share it; its weighted sums are 0."""
    sums = sum_loop(
        student, teacher, split.begin, split.end, exponent, const, const.COUNT == PARTIALS_OUT
    )
    publish(
        partial, pack_partials(sums, at_label, const.COUNT), const.COUNT, split.number, split.splits
    )
    wait(partial, const.COUNT * split.splits, const.SPAN)
    return merge_partials(partial, split.splits, start, stop, exponent, const)


@triton.jit
def cooperative_value(student, teacher, sums, split, sides, cross, spec, const):
    """`rows.row_value` of a row, by all programs that share it."""
    if const.EXPECTATION == "none":
        value, slopes = cooperative_pair_loop(student, teacher, sums, split, sides, spec, const)
    else:
        value = expectation(sides.d_s, sides.d_t, cross, spec.inverse, const.EXPECTATION)
        if value * 0.0 != 0.0:  # as in `rows.expectation_or_pairs`: for all splits, or for none
            value, _ = cooperative_pair_loop(student, teacher, sums, split, sides, spec, const)
        slopes = value
    return value, slopes


@triton.jit(do_not_specialize=["splits", "align_offset", "per_s", "per_t", "per_g"])
def cooperative_kernel(
    # as in `rows.fused_kernel`, but that rows are `Cooperating`
    student, teacher, grad, rows, shape, splits, align_offset, per_s, per_t, per_g,
    exponent: tl.float64, inverse: tl.float64, param: tl.float64, soft: tl.float64,
    hard: tl.float64, one_minus_eps: tl.float64, eps_over_v: tl.float64, z: tl.float64,
    factor: tl.float64,
    const,
):  # fmt: skip
    """`rows.fused_kernel` for one split of a row: the next one that no program has begun.

    ticket [1], partial [rows, COUNT, splits] and sums [rows, SUMS, splits] hold UNWRITTEN at the
    start. The first split of a row stores the loss.
    """
    if rows.skip is not None:
        if tl.load(rows.skip) != 0:
            return
    turn = tl.atomic_add(rows.ticket, 1, sem="relaxed") - UNWRITTEN
    row, number = turn // splits, turn % splits
    start, stop = row_span(student, per_s, row, align_offset, shape.vocab, const)
    split = split_of(number, splits, start, stop, const)
    last = tl.where(number == splits - 1, start + shape.width, split.end)
    if grad is not None:
        grad = row_at(grad, per_g, row, align_offset, const)
    if rows.keep is not None:
        if tl.load(rows.keep + row) == 0:
            if number == 0:
                leave_out(rows, row, const)
            if grad is not None:
                zero_columns(grad, split.begin, last, const)
            return
    student = row_at(student, per_s, row, align_offset, const)
    teacher = row_at(teacher, per_t, row, align_offset, const)
    partial = partials_of(rows.partial, row, splits, const.COUNT)
    sums = partials_of(rows.sums, row, splits, SUMS)
    spec = spec_of(exponent, inverse, param, soft, hard, one_minus_eps, eps_over_v, const)

    column, at_label = -1, scalar(0.0, const.ACC)
    if rows.label is not None:  # now, before any split of an in-place gradient is written
        at_label = label_logit(student, rows.label, row, number, start, shape.vocab, const)
        column, here = label_column(rows.label, row, start, shape.vocab)
    of_row = cooperative_sum_loop(
        student, teacher, partial, at_label, split, start, stop, spec.exponent, const
    )
    d_s, d_t = safe_sums(of_row.d_s, of_row.d_t)
    sides = Sides(of_row.m_s, d_s, of_row.m_t, d_t)
    value, slopes = cooperative_value(
        student, teacher, sums, split, sides, of_row.cross, spec, const
    )
    sum_t1 = of_row.sum_t1 if const.HARD_T1 else of_row.d_s
    value, of = const.OF_SUM(value, (of_row.d_s == 0) & (of_row.d_t == 0))
    result = spec.soft * value
    if rows.outputs is not None:
        store_merged(rows.outputs, partial, row, splits, value, of_row, spec, const, number)
    if rows.label is not None:
        at_label = tl.sum(load_partials(partial, splits, 7, 0.0, const.SPLITS), 0)
        result += spec.hard * hard_loss(
            rows.outputs, row, of_row.m_s, sum_t1, of_row.sum_shifted, at_label, here, shape, spec,
            const, number,
        )  # fmt: skip
    z_value, unit = at_one(of_row.m_s, sum_t1, spec.hard, scalar(z, const.ACC), const.Z_LOSS)
    tl.store(rows.loss + row, result + z_value, mask=number == 0)
    if grad is not None:
        by = grad_factor(factor, rows.scale, row, const)
        grad_loop(
            grad, student, teacher, split.begin, split.end, sides, slopes, sum_t1, column, of,
            unit, by, spec, const, const.EXPECTATION != "none",
        )  # fmt: skip
        zero_columns(grad, split.end, last, const)
