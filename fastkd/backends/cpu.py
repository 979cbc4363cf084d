"""The passes through the C++ extension `fastkd._C` (see `fastkd.backends.base.Backend`).

Tensors go in as addresses: everything that the kernels take for granted (shapes, strides, dtypes,
int64 labels, one keep byte per row) is made so here or by the drivers in `fastkd.engine`.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import buffer_pool, cpu_elements
from fastkd.backends.base import (
    Backend,
    LossSpec,
    Rows,
    Stats,
    Stepwise,
    TopKRows,
    acc_dtype,
    rows_of,
)
from fastkd.bernoulli import Bernoulli, Flat
from fastkd.divergence import divergences

try:
    from fastkd import _C
except ImportError as error:  # `choice.pick` turns it into the reference
    _root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    _cure = "reinstall with a C++17 compiler"
    if os.path.exists(os.path.join(_root, "setup.py")):  # which hides an installed package
        _cure = f"fastkd is imported from {_root}: pip install -e it with a "
        _cure += "C++17 compiler, or work in another folder"
    raise ImportError(f"its extension is not built or does not load: {error}; {_cure}") from None

if name := os.environ.get("FASTKD_ISA"):
    try:
        _C.use_isa(name)
    except ValueError as error:
        raise RuntimeError(f"FASTKD_ISA: {error} (here: {', '.join(_C.isas())})") from None

_DTYPES, _read = cpu_elements.DTYPES, cpu_elements.read
_INDEX = {name: index for index, name in enumerate(_C.divergences())}
_EXPECTATION = {name: divergences[name].expectation for name in divergences}
_NONE = (0, 0, 1, 0, 0)
# what a new one is made like: torch.empty, which reads a size and a dtype, takes twice as long
_NUMBER = {x: torch.empty((), dtype=x, device="cpu") for x in (torch.float32, torch.float64)}
# Elements below which a second thread costs more than it saves: waking one takes microseconds.
_GRAIN = 16384


def build() -> dict[str, Any]:
    """How the extension was built and what it runs on."""
    return {
        "isa": _C.isa(),
        "isas": _C.isas(),
        "openmp": _C.openmp(),
        "compiler": _C.compiler(),
    }


# GNU OpenMP's threads do not survive a fork, and a parallel region in the child waits for them for
# ever. A child works alone.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads(elements: int) -> int:
    if _forked or elements < 2 * _GRAIN:
        return 1
    return max(1, min(torch.get_num_threads(), elements // _GRAIN))


def _operand(x: Tensor) -> tuple[int, int, int, int, int]:
    """Of rows [A, B, V], or [N, V], that are read."""
    return _rows_at(_read(x), x)


def _written(x: Tensor | None) -> tuple[int, int, int, int, int]:
    return _NONE if x is None else _rows_at(x.data_ptr(), x)


def _rows_at(address: int, x: Tensor) -> tuple[int, int, int, int, int]:
    if x.dim() == 2:  # what has two dimensions needs no view to say so
        return address, _DTYPES[x.dtype], x.shape[0] or 1, 0, x.stride()[0]
    _, b, _ = x.shape
    outer, inner, _ = x.stride()
    return address, _DTYPES[x.dtype], b or 1, outer, inner


def _address(x: Tensor | None) -> int:
    return 0 if x is None else _read(x)


def _spec(spec: LossSpec) -> tuple[int, float, float, float, float, float, int, int, float]:
    index = _INDEX.get(spec.divergence)
    if index is None:
        raise RuntimeError(
            f"divergence: got {spec.divergence!r}, which the built extension does not have "
            f"({', '.join(_INDEX)}); build it again, or fastkd.use_backend('reference')"
        )
    return (index, *spec[1:])


def _fused(
    n: int,
    student: Tensor,
    teacher: Tensor,
    spec: LossSpec,
    rows: Rows,
    grad: Tensor | None,
    out: Tensor,
) -> tuple[Any, ...]:
    """The arguments of the extension's functions."""
    wide, threads, outputs = out.dtype is torch.float64, _threads(n * spec.vocab), rows.outputs
    sides = _rows_at(_read(student), student), _rows_at(_read(teacher), teacher), _spec(spec)
    told = 0 if outputs is None else outputs.data_ptr()
    return wide, n, threads, *sides, *_options(rows, grad), out.data_ptr(), told


def _in(acc: torch.dtype, stats: Stats) -> Stats:
    student, teacher, hard = stats
    hard = None if hard is None else hard.to(acc).contiguous()
    return Stats(student.to(acc).contiguous(), teacher.to(acc).contiguous(), hard)


def _options(rows: Rows, grad: Tensor | None) -> tuple[Any, ...]:
    """The arguments for a record of rows and a gradient."""
    keep, label, scale, factor = rows[:4]
    # each a call less than by _address: a small loss counts them
    a, b = 0 if keep is None else _read(keep), 0 if label is None else _read(label)
    c, width = 0 if scale is None else _read(scale), 0 if grad is None else grad.shape[-1]
    return a, b, c, factor, _written(grad), width


def _wide(student: Tensor, teacher: Tensor) -> torch.dtype:
    """`acc_dtype` of two tensors, without leaving this file: a small loss counts its calls."""
    wide = torch.float64
    return wide if student.dtype is wide or teacher.dtype is wide else torch.float32


# float64s of a row in its first exchange, of an expectation or not, and its second: csrc/kernels.h
_EXPECTATION_SUMS, _SUMS, _RATES = 7, 6, 2
# Bytes of exponentials that wait for exchanges, kept by the thread. They are beyond the L2 cache
# from a few rows on and cost the same however many they are; what an exchange costs, half a
# millisecond of a core with gloo, is shared by all of its rows.
WAITING = 48 << 20
_NOWHERE = (0, 0, 0, 0, 0)


FAULTS = ("", "index", "twice", "value")  # by the extension's numbers


def exp2(x: Tensor) -> Tensor:
    """2^x elementwise with the running instruction set; contiguous float32, x <= 1."""
    out = torch.empty_like(x)
    _C.exp2(_read(x), out.data_ptr(), x.numel())
    return out


def log(x: Tensor) -> Tensor:
    """log x elementwise with the running instruction set; contiguous float32, x > 0."""
    out = torch.empty_like(x)
    _C.log(_read(x), out.data_ptr(), x.numel())
    return out


class CPU(Backend):
    """The C++ kernels; values are where they can be read at once."""

    on_host = has_steps = True
    guesses = "host"

    def fused(
        self, student: Tensor, teacher: Tensor, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        n = student.shape[0] * student.shape[1]
        out = student.new_empty(n, dtype=_wide(student, teacher))
        if n != 0:
            _C.fused(*_fused(n, student, teacher, spec, rows, grad, out))
        return out

    def fused_total(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor | None,
        upstream: float | Tensor,
    ) -> Tensor:
        n = student.numel() // student.shape[-1]
        if student.dim() != 2:  # as its gradient and, in rows, the teacher
            student, teacher = rows_of(student), rows_of(teacher)  # named, since they may be copies
            grad = None if grad is None else rows_of(grad)
        out = torch.empty_like(_NUMBER[_wide(student, teacher)])
        _C.fused_total(*(*_fused(n, student, teacher, spec, rows, grad, out), upstream))
        return out

    def topk(
        self, student: Tensor, teacher: TopKRows, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        n = student.shape[0] * student.shape[1]
        out = torch.empty(n, dtype=teacher.logprobs.dtype)
        if n == 0:
            return out
        (logprobs, indices, tail, restrict), told = teacher, rows.outputs
        points = _read(logprobs), _read(indices), _address(tail), logprobs.shape[1], restrict
        _C.topk(
            *(out.dtype is torch.float64, n, _threads(n * spec.vocab), _operand(student), points),
            *(divergences[spec.divergence].centre(spec.param), _spec(spec)),
            *(*_options(rows, grad), out.data_ptr(), 0 if told is None else told.data_ptr()),
        )
        return out

    def stats(self, x: Tensor, temperature: float, vocab: int, keep: Tensor | None) -> Tensor:
        a, b, _ = x.shape
        n, acc = a * b, acc_dtype(x, x)
        out = x.new_empty(n, 3, dtype=acc)
        _C.stats(
            *(acc == torch.float64, n, _threads(n * vocab), _operand(x)),
            *(temperature, vocab, _address(keep), out.data_ptr()),
        )
        return out

    def loss(
        self, student: Tensor, teacher: Tensor, stats: Stats, spec: LossSpec, rows: Rows
    ) -> Tensor:
        a, b, _ = student.shape
        n, acc = a * b, acc_dtype(student, teacher)
        out = student.new_empty(n, 2, dtype=acc)
        stats = _in(acc, stats)
        _C.loss(
            *(acc == torch.float64, n, _threads(n * spec.vocab)),
            *(_operand(student), _operand(teacher), _spec(spec)),
            *(_read(stats.student), _read(stats.teacher), _address(rows.keep), out.data_ptr()),
        )
        return out

    def grad(
        self,
        student: Tensor,
        teacher: Tensor,
        stats: Stats,
        pairs: Tensor,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor,
    ) -> None:
        a, b, _ = student.shape
        n, acc = a * b, acc_dtype(student, teacher)
        stats = _in(acc, stats)
        pairs = pairs.to(acc).contiguous()
        _C.grad(
            *(acc == torch.float64, n, _threads(n * spec.vocab)),
            *(_operand(student), _operand(teacher), _spec(spec)),
            *(_read(stats.student), _read(stats.teacher), _address(stats.hard), _read(pairs)),
            *_options(rows, grad),
        )

    def stepwise(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor | None,
        ranks: int,
        rank: int,
        widest: int,
    ) -> Stepwise | None:
        keep, label, scale, factor = rows[:4]
        expectation = _EXPECTATION[spec.divergence]
        kept = grad is not None or expectation is None
        n = student.shape[0] * student.shape[1]
        if _wide(student, teacher) is not torch.float32 or widest > _C.most_columns:
            return None
        waiting = 2 if expectation else 3
        # the same on every rank, also on one that wants no gradient
        most = max(1, min(n, WAITING // (waiting * _C.step_bytes(widest, True))))
        together = -(-n // -(-n // most)) if n else 1  # in as many passes, evenly
        floats = _EXPECTATION_SUMS if expectation else _SUMS
        out = student.new_empty(n, dtype=torch.float32)
        redo = student.new_empty(n, dtype=torch.bool)
        slot = _C.step_bytes(spec.vocab, kept)
        memory = _C.scratch(waiting * together * slot)
        if memory == 0:
            raise MemoryError(f"group: no memory for {waiting * together * slot} bytes")
        operands = (
            (ranks, rank, _threads(min(together, n) * spec.vocab), n),
            *(_operand(student), _operand(teacher), _spec(spec), _address(keep), _address(label)),
            *(_address(scale), factor, _written(grad)),
            *(0 if grad is None else grad.shape[-1], out.data_ptr(), redo.data_ptr()),
        )
        begun: dict[int, Tensor] = {}

        def begin(start: int) -> tuple[int, int, int, int, int]:
            if start >= n:
                return _NOWHERE
            size = min(together, n - start)
            begun[start] = out.new_empty(size, floats, dtype=torch.float64)
            return start, size, begun[start].data_ptr(), 0, 0

        def one(start: int) -> Generator[Tensor, Tensor, None]:
            held = (keep, label, scale)  # named until the last step is over
            own = memory + start // together % waiting * together * slot
            if start not in begun:
                _C.vocab_parallel_step(0, *operands, own, begin(start), _NOWHERE)
            sent = begun.pop(start)
            size = sent.shape[0]
            sums, rates = (yield sent), None
            if expectation is None:
                sent = out.new_empty(size, _RATES, dtype=torch.float64)
                some = start, size, sent.data_ptr(), _read(sums), 0
                _C.vocab_parallel_step(1, *operands, own, some, _NOWHERE)
                rates = yield sent
            some = start, size, 0, _read(sums), _address(rates)
            _C.vocab_parallel_step(2, *operands, own, some, begin(start + waiting * together))
            del held

        return Stepwise(out, redo, (one(start) for start in range(0, n, together)), waiting)

    def bernoulli(self, what: Bernoulli, x: Flat, *others: Any) -> float:
        return _C.bernoulli(*cpu_elements.written(_threads(x.student.numel()), what, x, *others))

    def transposed(self, x: Tensor) -> Tensor:
        a, b, c = x.shape
        out, threads = x.new_empty(a, c, b), _threads(x.numel())
        _C.transpose(a, b, c, x.element_size(), threads, _read(x), out.data_ptr())
        return out

    def count_elements(self, x: Flat) -> float:
        return _C.count_elements(*cpu_elements.counted(_threads(x.student.numel()), x))

    def count(
        self, labels: Tensor, ignore_index: int, vocab: int
    ) -> tuple[Tensor | None, Tensor, int, int]:
        label = labels if labels.dim() == 1 else labels.reshape(-1)
        if label.dtype is not torch.int64 or not label.is_contiguous():
            label = label.to(torch.int64).contiguous()
        n, keep = label.shape[0], None
        wrong, kept = _C.count_labels(n, _read(label), ignore_index, vocab, 0)
        if kept != n and wrong < 0:
            keep = label.new_empty(n, dtype=torch.bool)
            _C.count_labels(n, _read(label), ignore_index, vocab, keep.data_ptr())
        return keep, label, kept, wrong

    def first_fault(
        self, logprobs: Tensor, indices: Tensor, keep: Tensor | None, vocab: int
    ) -> tuple[str, int, int]:
        n, k = logprobs.shape
        wide = logprobs.dtype is torch.float64
        addresses = _read(logprobs), _read(indices), _address(keep)
        fault, row, place = _C.validate_topk(wide, n, k, *addresses, vocab)
        return FAULTS[fault], row, place

    def weigh(self, keep: Tensor | None, weight: Tensor, mean: bool, acc: torch.dtype) -> Tensor:
        by = weight.detach().resolve_neg().reshape(-1).to(acc).contiguous()
        scale = torch.empty_like(by)
        wide, addresses = acc == torch.float64, (_address(keep), _read(by))
        _C.row_scale(wide, by.numel(), *addresses, mean, scale.data_ptr())
        return scale

    def total(self, loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
        out = torch.empty_like(_NUMBER[loss.dtype])
        wide = loss.dtype == torch.float64
        _C.weighted_sum(wide, _read(loss), _address(scale), factor, loss.numel(), out.data_ptr())
        return out

    def empty_gradient(self, like: Tensor) -> Tensor:
        if like.nbytes < buffer_pool.LEAST:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        return buffer_pool.empty(like)

    def multiply(self, grad: Tensor, by: Tensor) -> None:
        if float(by) == 1.0:  # on the host a look costs less than the call
            return
        by, x = by.resolve_neg(), rows_of(grad)
        a, b, width = x.shape
        wide = by.dtype == torch.float64
        _C.multiply(_written(x), a * b, width, _threads(x.numel()), wide, _read(by))


BACKEND = CPU()
