"""From a `TopK` operand to the rows that the passes take, and the checks of its values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.arguments.messages import warn_once
from fastkd.backends.base import Backend, TopKRows
from fastkd.engine.reduction import reads_values
from fastkd.operands import TopK, join_rest, most_mass, unmeasured_rest

INF = math.inf


def topk_rows(
    teacher: TopK,
    temperature: float,
    vocab: int,
    keep: Tensor | None,
    acc: torch.dtype,
    backend: Backend,
) -> TopKRows:
    """The rows of a `TopK` as the passes take them: copies, which nobody else changes.

    keep: [...] or [N] bool: rows that are not kept are not looked at.

    Raises:
        ValueError: the loss's temperature is one at which the teacher is not known, or values that
            no teacher has (on the CPU and inside `fastkd.checked()`).
    """
    renormalized = teacher.tail in ("renormalize", "restrict")
    ratio = teacher.temperature / temperature
    count = teacher.size(-1)
    if ratio != 1.0 and not renormalized and count < vocab:
        raise ValueError(_temperatures(teacher, temperature))
    logprobs = teacher.logprobs.resolve_neg().reshape(-1, count).to(acc)
    indices = teacher.indices.reshape(-1, count).to(torch.int64)
    keep = None if keep is None else keep.reshape(-1)
    # whoever has no candidate for a place writes -1 there, or a column at -inf: both are absent
    absent = (indices == -1) | (logprobs == -INF)
    logprobs, indices = logprobs.masked_fill(absent, -INF), indices.masked_fill(absent, -1)
    tail = teacher.tail_logprob
    look = reads_values(teacher.logprobs)
    # columns that the student does not have may be a part of the rest
    past = indices >= vocab if teacher.tail == "bucket" else None
    if look:
        some = past is not None and _first(past.any(-1), keep) >= 0
        past, wide = (past, int(indices.max()) + 1) if some else (None, vocab)
        _check_values(backend, teacher, logprobs.detach(), indices, tail, keep, wide)
        if some:
            warn_once(
                f"teacher.indices: some are past the student's {vocab} columns; their probability "
                f"goes to the bucket (teacher.outside({vocab}) counts them)"
            )
    else:
        bad = indices < -1 if past is not None else (indices >= vocab) | (indices < -1)
        # a row without a column says nothing: it is no row of a teacher, either
        bad = bad | absent.all(-1, keepdim=True)
        logprobs, indices = logprobs.masked_fill(bad, math.nan), indices.masked_fill(bad, -1)
    if past is not None:
        tail = None if tail is None else tail.reshape(-1)
        logprobs, indices, tail = join_rest(logprobs, indices, tail, vocab)
    full = (indices >= 0).sum(-1) == vocab if count >= vocab else None  # rows of all columns
    if full is not None and past is not None:
        full = full & ~past.any(-1)
    if ratio != 1.0:
        logprobs = logprobs * ratio
        if not renormalized:  # known of a row of all columns, which needs p up to its sum only
            assert full is not None
            if look and _first(~full, keep) >= 0:
                raise ValueError(_temperatures(teacher, temperature))
            logprobs = torch.where(full.unsqueeze(-1), logprobs.log_softmax(-1), math.nan)
    if renormalized:
        logprobs = logprobs.log_softmax(-1)
    if teacher.tail == "restrict" or teacher.tail == "drop":
        tail = None
    elif teacher.tail == "renormalize":
        tail = logprobs.new_full((logprobs.size(0),), -INF)
    elif tail is not None:
        tail = tail.resolve_neg().reshape(-1).to(acc, copy=True)
    else:
        tail = unmeasured_rest(logprobs).to(acc)
    if tail is not None and full is not None:
        # nothing is left of a row that names every column, whatever rounding says of 1 - sum p
        tail = torch.where(full, -INF, tail)
    indices = indices.clone(memory_format=torch.contiguous_format)
    return TopKRows(logprobs.contiguous(), indices, tail, teacher.tail == "restrict")


def _temperatures(teacher: TopK, temperature: float) -> str:
    return (
        f"temperature: got {temperature:g} with a teacher stored at {teacher.temperature:g} "
        f"and tail={teacher.tail!r}; its probabilities at another temperature are not known: "
        f"use temperature={teacher.temperature:g}, store the teacher again, or give it "
        "tail='renormalize' or 'restrict', which need them up to their sum only"
    )


def _check_values(
    backend: Backend,
    teacher: TopK,
    logprobs: Tensor,
    indices: Tensor,
    tail: Tensor | None,
    keep: Tensor | None,
    vocab: int,
) -> None:
    fault, row, place = backend.first_fault(
        logprobs.contiguous(), indices.contiguous(), keep, vocab
    )
    if fault:
        raise ValueError(_fault(fault, row, place, logprobs, indices, vocab))
    if (row := _first((indices < 0).all(-1), keep)) >= 0:
        raise ValueError(
            f"teacher.logprobs: got no column with a probability above 0 in row {row} (each is -1 "
            "or at -inf), expected one at least; leave rows out that the teacher did not see, by "
            "labels at ignore_index (of the terms of fastkd.distill: rows='labelled')"
        )
    if teacher.tail in ("bucket", "drop"):  # the others divide by the mass, whatever it is
        mass = logprobs.exp().sum(-1)
        if (row := _first(mass > most_mass(logprobs), keep)) >= 0:
            raise ValueError(
                f"teacher.logprobs: got a mass of {float(mass[row]):g} in row {row}, expected at "
                "most 1 but for rounding; are these probabilities, logits, or log-probabilities at "
                "another temperature? tail='renormalize' and 'restrict' divide by the mass"
            )
    if tail is not None:
        row = _first(~(tail.detach().reshape(-1) <= 0.0), keep)
        if row >= 0:
            raise ValueError(
                f"teacher.tail_logprob: got {float(tail.reshape(-1)[row])} in row {row}, expected "
                "a log-probability, at most 0"
            )


def _first(wrong: Tensor, keep: Tensor | None) -> int:
    """The first kept row that is wrong, or -1."""
    wrong = wrong if keep is None else wrong & keep
    return int(wrong.nonzero()[0, 0]) if bool(wrong.any()) else -1


def _fault(fault: str, row: int, place: int, logprobs: Tensor, indices: Tensor, vocab: int) -> str:
    at = f"in row {row}, place {place}"
    if fault == "value":
        value = float(logprobs[row, place])
        return f"teacher.logprobs: got {value} {at}, expected a log-probability, at most 0"
    index = int(indices[row, place])
    if fault == "twice":
        return (
            f"teacher.indices: got {index} {at} for the second time, expected each column once; "
            "padding is -1, or any column with a logprob of -inf. Of a column that came up more "
            "than once, add the probabilities up in one place and set the others to -1"
        )
    expected = f"teacher.indices: got {index} {at}, expected 0 to {vocab - 1}, or -1 for padding"
    if index < 0:
        return f"{expected}: indices.clamp(min=-1) makes it so"
    return (
        f"{expected}; columns that the student does not have are a part of the rest with "
        f"tail='bucket', are left out by indices.masked_fill(indices >= {vocab}, -1), or are there "
        "with a larger vocab_size"
    )
