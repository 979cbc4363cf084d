"""The passes through the C++ extension `fastkd._C` (see `fastkd.backend.Passes`).

Tensors go in as addresses: everything that the kernels take for granted (shapes, strides, dtypes,
int64 labels, one keep byte per row) is made so here or by the callers in losses.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastkd import arena
from fastkd.backend import Plan, acc_dtype, rows

try:
    from fastkd import _C
except ImportError as error:  # backend.pick turns it into the reference
    raise ImportError(
        f"its extension is not built or does not load: {error}; reinstall with a C++17 compiler"
    ) from None

if name := os.environ.get("FASTKD_ISA"):
    try:
        _C.use_isa(name)
    except ValueError as error:
        raise RuntimeError(f"FASTKD_ISA: {error} (here: {', '.join(_C.isas())})") from None

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_INDEX = {name: index for index, name in enumerate(_C.divergences())}
_NONE = (0, 0, 1, 0, 0)
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
    return 1 if _forked else max(1, min(torch.get_num_threads(), elements // _GRAIN))


def _operand(x: Tensor) -> tuple[int, int, int, int, int]:
    _, b, _ = x.shape
    outer, inner, _ = x.stride()
    return x.data_ptr(), _DTYPES[x.dtype], max(b, 1), outer, inner


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _plan(plan: Plan) -> tuple[int, float, float, float, float, float, int, int]:
    index = _INDEX.get(plan.divergence)
    if index is None:
        raise RuntimeError(
            f"divergence: got {plan.divergence!r}, which the built extension does not have "
            f"({', '.join(_INDEX)}); build it again, or fastkd.use_backend('reference')"
        )
    return (index, *plan[1:])


def fused(
    student: Tensor,
    teacher: Tensor,
    plan: Plan,
    keep: Tensor | None,
    label: Tensor | None,
    scale: Tensor | None,
    factor: float,
    grad: Tensor | None,
) -> Tensor:
    a, b, _ = student.shape
    n, acc = a * b, acc_dtype(student, teacher)
    out = torch.empty(n, dtype=acc)
    if n == 0:
        return out
    _C.fused(
        acc == torch.float64,
        n,
        _threads(n * plan.vocab),
        _operand(student),
        _operand(teacher),
        _plan(plan),
        _address(keep),
        _address(label),
        _address(scale),
        factor,
        _NONE if grad is None else _operand(grad),
        0 if grad is None else grad.size(-1),
        out.data_ptr(),
    )
    return out


def stats(x: Tensor, temperature: float, vocab: int, keep: Tensor | None) -> Tensor:
    a, b, _ = x.shape
    n, acc = a * b, acc_dtype(x, x)
    out = torch.empty(n, 3, dtype=acc)
    _C.stats(
        acc == torch.float64,
        n,
        _threads(n * vocab),
        _operand(x),
        temperature,
        vocab,
        _address(keep),
        out.data_ptr(),
    )
    return out


def loss(
    student: Tensor,
    teacher: Tensor,
    stats_s: Tensor,
    stats_t: Tensor,
    plan: Plan,
    keep: Tensor | None,
) -> Tensor:
    a, b, _ = student.shape
    n, acc = a * b, acc_dtype(student, teacher)
    out = torch.empty(n, 2, dtype=acc)
    stats_s, stats_t = stats_s.to(acc).contiguous(), stats_t.to(acc).contiguous()
    _C.loss(
        acc == torch.float64,
        n,
        _threads(n * plan.vocab),
        _operand(student),
        _operand(teacher),
        _plan(plan),
        stats_s.data_ptr(),
        stats_t.data_ptr(),
        _address(keep),
        out.data_ptr(),
    )
    return out


def grad(
    student: Tensor,
    teacher: Tensor,
    stats_s: Tensor,
    stats_t: Tensor,
    stats_hard: Tensor | None,
    slope: Tensor,
    plan: Plan,
    keep: Tensor | None,
    label: Tensor | None,
    scale: Tensor | None,
    factor: float,
    grad: Tensor,
) -> None:
    a, b, _ = student.shape
    n, acc = a * b, acc_dtype(student, teacher)
    stats_s, stats_t = stats_s.to(acc).contiguous(), stats_t.to(acc).contiguous()
    stats_hard = None if stats_hard is None else stats_hard.to(acc).contiguous()
    slope = slope.to(acc).contiguous()
    _C.grad(
        acc == torch.float64,
        n,
        _threads(n * plan.vocab),
        _operand(student),
        _operand(teacher),
        _plan(plan),
        stats_s.data_ptr(),
        stats_t.data_ptr(),
        _address(stats_hard),
        slope.data_ptr(),
        _address(keep),
        _address(label),
        _address(scale),
        factor,
        _operand(grad),
        grad.size(-1),
    )


def weigh(
    labels: Tensor | None,
    ignore_index: int,
    vocab: int,
    weight: Tensor | None,
    mean: bool,
    n: int,
    acc: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor, int]:
    """(keep, label, scale, first row whose label is out of range or -1); see reduction.fold."""
    keep = None if labels is None else torch.empty(n, dtype=torch.bool)
    label = None if labels is None else labels.reshape(-1).to(torch.int64).contiguous()
    by = None if weight is None else weight.detach().resolve_neg().reshape(-1)
    by = None if by is None else by.to(acc).contiguous()
    scale = torch.empty(n, dtype=acc)
    wrong = _C.weigh(
        acc == torch.float64,
        n,
        _address(label),
        ignore_index,
        vocab,
        _address(by),
        mean,
        _address(keep),
        scale.data_ptr(),
    )
    return keep, label, scale, wrong


def total(loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
    out = torch.empty((), dtype=loss.dtype)
    wide = loss.dtype == torch.float64
    _C.total(wide, loss.data_ptr(), _address(scale), factor, loss.numel(), out.data_ptr())
    return out


def empty_gradient(like: Tensor) -> Tensor:
    return arena.empty(like)


def multiply(grad: Tensor, by: Tensor) -> None:
    if float(by) == 1.0:  # on the host a look costs less than the call
        return
    by, x = by.resolve_neg(), rows(grad)
    a, b, width = x.shape
    _C.multiply(
        _operand(x),
        a * b,
        width,
        _threads(x.numel()),
        by.dtype == torch.float64,
        by.data_ptr(),
    )


def exp2(x: Tensor) -> Tensor:
    """2^x elementwise with the running instruction set; contiguous float32, x <= 1."""
    out = torch.empty_like(x)
    _C.exp2(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def log(x: Tensor) -> Tensor:
    """log x elementwise with the running instruction set; contiguous float32, x > 0."""
    out = torch.empty_like(x)
    _C.log(x.data_ptr(), out.data_ptr(), x.numel())
    return out
