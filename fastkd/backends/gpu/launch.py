"""The passes of a `fastkd.backends.base.Backend` on the row kernels: shapes in, launches out."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.backends.base import (
    Backend,
    LossSpec,
    Rows,
    TopKRows,
    batch_invariant,
    interpreted,
    on_host,
    rows_of,
)
from fastkd.backends.gpu import alignment, cooperative, proof, split_rows
from fastkd.backends.gpu import divergence as pairs
from fastkd.backends.gpu import rows as kernels
from fastkd.backends.gpu import topk as topk_kernels
from fastkd.backends.gpu.arguments import (
    Cooperating,
    PerRow,
    Place,
    Shape,
    Stored,
    constants,
    constants_of,
    only,
)
from fastkd.backends.gpu.tiles import ALIGNED, BY_COLUMN, OFFSET
from fastkd.backends.gpu.tune import OF_PROCESSOR, Tile, registers, tile
from fastkd.divergence import divergences

LOG2E = 1.0 / math.log(2.0)
TOTAL_BLOCK = 1024
MOST_POINTS = 128  # named columns at a time
LAST = 2**31 - 1  # above every column
# A contracted product rounds where its twin on the other side does not, and identical logits must
# cancel exactly. The formulas stand it too (`pair`); this keeps every target on one result.
PINNED = {"enable_fp_fusion": False}

if interpreted():
    from fastkd.backends.gpu.interpreter_fixes import repair

    repair()

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
_EXPECTATION = {name: divergences[name].expectation or "none" for name in divergences}
_OF_SUM = {name: pairs.of_sum(name) for name in divergences}


class GpuInfo(NamedTuple):
    arch: str  # "sm_90", "gfx942", ...; "default" for the interpreter
    warp: int  # threads of a warp


@cache
def gpu_info(device: torch.device) -> GpuInfo:
    """What a device is, asked for once."""
    if on_host(device):  # through the interpreter
        return GpuInfo("default", 32)
    with torch.get_device_module(device).device(device):
        target = triton.runtime.driver.active.get_current_target()
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    return GpuInfo(arch.partition(":")[0], int(target.warp_size))


def launch(
    kernel: Any, programs: int, args: dict[str, Any], threads: int, device: torch.device
) -> None:
    """Runs a kernel on a device; the only place that does.

    args: by name, and Triton's option `maxnreg` (`_registers`).

    Raises:
        RuntimeError: Triton could not compile or start it. Nothing falls back in silence.
    """
    try:
        on_cpu = on_host(device)
        with nullcontext() if on_cpu else torch.get_device_module(device).device(device):
            warps = max(1, threads // gpu_info(device).warp)
            kernel[(programs,)](**args, num_warps=warps, **PINNED)
    except Exception as error:
        raise RuntimeError(
            f"fastkd: {kernel.__name__} could not be compiled or launched on {device} by Triton "
            f"{triton.__version__} with {constants_of(args)}: {error}; "
            "fastkd.use_backend('reference') runs the same loss in plain torch"
        ) from error


def divergence_of(spec: LossSpec) -> Any:
    pair = getattr(pairs, spec.divergence, None)
    if pair is None:
        raise NotImplementedError(
            f"divergence: got {spec.divergence!r}, which has no function in "
            "fastkd.backends.gpu.divergence; expected one under that name, or "
            "fastkd.use_backend('reference')"
        )
    return pair


def place(x: Tensor, align_offset: int | None = None) -> Place:
    """Where the rows of x [A, B, V] lie.

    align_offset: columns from the boundary that the pointer is moved down to, which aligns it.
    """
    if align_offset:
        start = x.storage_offset() - align_offset
        return Place(x.as_strided((1,), (1,), start), x.stride(0), x.stride(1))
    return Place(x, x.stride(0), x.stride(1))


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def acc_of(student: Tensor, teacher: Tensor) -> torch.dtype:
    """`acc_dtype` of two tensors, without leaving this file: a call counts its own."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def tile_of(vocab: int, *operands: Tensor | None) -> tuple[Tile, dict[str, int]]:
    """The tile of rows, and what of it a launch's arguments take."""
    size = tile(vocab, max(x.element_size() for x in operands if x is not None))
    return size, {"LANES": size.lanes, "GROUP": size.group}


def lay(
    vocab: int, *operands: Tensor, loops: bool = True
) -> tuple[Tile, dict[str, Any], int | None]:
    """(tile, what of it a launch takes, alignment offset) of rows.

    loops: of the usual loops over a row; no offset otherwise.
    """
    size, lanes = tile_of(vocab, *operands)
    align_offset, how = None, 0
    if batch_invariant():
        whole = all(alignment.on_boundary(x) for x in operands)
        how = (ALIGNED if whole else BY_COLUMN).value
    elif loops and vocab >= alignment.UNALIGNED_TILES * size.lanes * size.group:
        align_offset = alignment.align_offset(size.group, *operands)
        how = 0 if align_offset is None else OFFSET.value
    return size, {**lanes, "UNALIGNED": how}, align_offset


def scale_args(spec: LossSpec) -> dict[str, float]:
    return {"exponent": LOG2E / spec.temperature, "param": spec.param}


def spec_args(spec: LossSpec, rows: Rows) -> dict[str, float]:
    """The floats of a loss, which stay apart: a tuple would round them to float32."""
    return {
        **scale_args(spec),
        **dict(inverse=1.0 / spec.temperature, soft=spec.soft, hard=spec.hard),
        **dict(one_minus_eps=1.0 - spec.smoothing, eps_over_v=spec.smoothing / spec.classes),
        **dict(z=spec.z_loss, factor=rows.factor),
    }


def per_row(rows: Rows, loss: Tensor | None = None) -> PerRow:
    keep, label, scale = contiguous(rows.keep), contiguous(rows.label), contiguous(rows.scale)
    return PerRow(loss, rows.outputs, keep, label, scale, rows.skip)


def shape_of(spec: LossSpec, grad: Tensor | None, classes: int | None = None) -> Shape:
    return Shape(spec.vocab, spec.vocab if grad is None else grad.size(2), classes)


def constants_for(spec: LossSpec, rows: Rows, acc: torch.dtype) -> dict[str, Any]:
    """What the kernels of fused, topk and grad are compiled for alike."""
    at_one = rows.label is not None or spec.z_loss != 0.0
    return {
        "DIVERGENCE": divergence_of(spec),
        "OF_SUM": _OF_SUM[spec.divergence],
        "HARD": at_one,
        "HARD_T1": at_one and spec.temperature != 1.0,
        "Z_LOSS": spec.z_loss != 0.0,
        "ACC": _ACC[acc],
    }


def _registers(most: int | None) -> dict[str, int]:
    """Triton's option of `tune.registers`."""
    return {} if most is None else {"maxnreg": most}


def _fused_cooperative(
    args: dict[str, Any], wants: dict[str, Any], n: int, splits: int, threads: int, most: int | None
) -> None:
    """`fused` by cooperative programs."""
    rows = args["rows"]
    loss, count = rows.loss, split_rows.partials(rows.outputs).value
    counts = 1, n * splits * count, n * splits * cooperative.SUMS.value
    unknown = torch.full(
        (sum(counts),), cooperative.UNWRITTEN.value, dtype=torch.int32, device=loss.device
    )
    ticket, partial, sums = unknown.split(counts)
    span = max(threads, count * cooperative.MOST)
    args = {
        **args,
        "rows": Cooperating(
            **rows._asdict(),
            ticket=ticket,
            partial=partial.view(loss.dtype),
            sums=sums.view(loss.dtype),
        ),
        "splits": splits,
        "const": constants(**wants, SPLITS=cooperative.MOST, COUNT=count, SPAN=span),
        **_registers(most),
    }
    launch(cooperative.cooperative_kernel, n * splits, args, threads, loss.device)


def _fused_split(
    args: dict[str, Any], wants: dict[str, Any], n: int, splits: int, threads: int
) -> None:
    """`fused` with several programs to a row."""
    rows, shape, grad = args["rows"], args["shape"], args["grad"]
    loss, by_pairs = rows.loss, wants["EXPECTATION"] == "none"
    count = split_rows.partials(rows.outputs).value
    wants = {**wants, "SPLITS": split_rows.MOST, "COUNT": count}
    args = {
        **args,
        **dict(splits=splits, vocab=shape.vocab),
        "partial": loss.new_empty(n, count, splits),
        "sums": loss.new_empty(n, 2, splits) if by_pairs else None,
        "constants": None if grad is None else loss.new_empty(n, split_rows.CONSTANTS.value),
    }
    steps = [
        (split_rows.split_sums_kernel, split_rows.SUMS_READS, n * splits, True),
        (split_rows.split_pairs_kernel, split_rows.PAIRS_READS, n * splits, by_pairs),
        (split_rows.split_finish_kernel, split_rows.FINISH_READS, n, True),
        (split_rows.split_grad_kernel, split_rows.GRAD_READS, n * splits, grad is not None),
    ]
    for kernel, reads, programs, needed in steps:
        if needed:
            args["const"] = constants(reads, **wants)
            args["rows"], args["shape"] = only(rows, reads), only(shape, reads)
            taken = {name: args[name] for name in kernel.arg_names}
            launch(kernel, programs, taken, threads, loss.device)


class FusedPasses(Backend):
    """The passes of a whole row; `unfused.py` has those that ranks exchange sums between."""

    guesses = "device"

    def fused(
        self, student: Tensor, teacher: Tensor, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        return self._fused(student, teacher, spec, rows, grad)

    def _fused(
        self, student: Tensor, teacher: Tensor, spec: LossSpec, rows: Rows, grad: Tensor | None,
        cooperating: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """`fused`; cooperating: of a trial of cooperative programs, whether they are at work."""
        acc = acc_of(student, teacher)
        n = student.size(0) * student.size(1)
        loss = torch.empty(n, dtype=acc, device=student.device)
        if n == 0:
            return loss
        rows = rows if spec.hard != 0.0 else rows._replace(label=None)
        third = student if grad is None else grad
        size, lanes, align_offset = lay(spec.vocab, student, teacher, third)
        args = {
            **dict(student=place(student, align_offset), teacher=place(teacher, align_offset)),
            **dict(grad=None if grad is None else place(grad, align_offset)),
            **dict(rows=per_row(rows, loss), shape=shape_of(spec, grad, spec.classes)),
            **dict(align_offset=align_offset, per_s=student.size(1), per_t=teacher.size(1)),
            **dict(per_g=third.size(1)),
            **spec_args(spec, rows),
        }
        wants = {
            **constants_for(spec, rows, acc),
            "EXPECTATION": _EXPECTATION[spec.divergence],
            "SMOOTH": rows.label is not None and spec.smoothing != 0.0,
            **lanes,
        }
        row_bytes = spec.vocab * (student.element_size() + teacher.element_size())
        columns = size.lanes * size.group
        device, threads = student.device, size.threads
        # the pattern of UNWRITTEN is that of a float32
        none, arch = acc == torch.float64, gpu_info(device).arch
        light = align_offset is None and (not spec.at_one or wants["EXPECTATION"] != "none")
        most = registers(arch, threads, light)
        holds = None if none else cooperative.capacity(device, arch)
        resident = OF_PROCESSOR // ((most or 64) * threads)
        splits, choose = proof.SPLITS if cooperating else 1, cooperating is None
        if choose and not batch_invariant():
            splits = cooperative.programs_per_row(
                n, spec.vocab, row_bytes, columns, resident, holds
            )
            if splits > 1 and not proof.proven(device, self._fused):
                splits = 1
        if splits > 1:
            try:
                _fused_cooperative(args, wants, n, splits, threads, most)
                return loss
            except RuntimeError as error:
                if cooperating:
                    raise
                proof.refuse(device, str(error))
        splits = 1
        if choose and not batch_invariant():
            splits = split_rows.programs_per_row(
                n, spec.vocab, columns, split_rows.processors(device)
            )
        if splits > 1:
            _fused_split(args, wants, n, splits, threads)
        else:
            # of aligned rows ptxas takes no more than lets three or four programs be resident
            args |= {"const": constants(**wants)}
            args |= {} if align_offset is None else _registers(most)
            launch(kernels.fused_kernel, n, args, threads, device)
        return loss

    def topk(
        self, student: Tensor, teacher: TopKRows, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        logprobs, indices, tail, restrict = teacher
        acc, (n, count) = logprobs.dtype, logprobs.shape
        loss = torch.empty(n, dtype=acc, device=student.device)
        if n == 0:
            return loss
        rows = rows if spec.hard != 0.0 else rows._replace(label=None)
        third = student if grad is None else grad
        size, lanes, _ = lay(spec.vocab, student, third, loops=False)
        indices = indices.to(torch.int32)
        past = torch.where(indices < 0, LAST, indices).sort(-1).values
        named = Stored(
            logprobs,
            indices,
            torch.nn.functional.pad(past, (0, 1), value=LAST),
            None if grad is None else torch.empty_like(logprobs),
            tail,
        )
        args = {
            **dict(student=place(student), grad=None if grad is None else place(grad)),
            **dict(teacher=named, rows=per_row(rows, loss)),
            **dict(shape=shape_of(spec, grad, spec.classes), count=count),
            **dict(per_s=student.size(1), per_g=third.size(1)),
            **spec_args(spec, rows),
            "centre": divergences[spec.divergence].centre(spec.param),
            "const": constants(
                **constants_for(spec, rows, acc),
                RESTRICT=restrict,
                NO_TAIL=tail is None and not restrict,
                SMOOTH=rows.label is not None and spec.smoothing != 0.0,
                POINTS=min(MOST_POINTS, triton.next_power_of_2(count)),
                **lanes,
            ),
        }
        launch(topk_kernels.topk_kernel, n, args, size.threads, student.device)
        return loss

    def total(self, loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
        out = torch.empty((), dtype=loss.dtype, device=loss.device)
        args = {
            **dict(loss=loss.contiguous(), scale=contiguous(scale), out=out, n=loss.numel()),
            **dict(factor=factor, BLOCK=TOTAL_BLOCK),
        }
        launch(kernels.total_kernel, 1, args, 256, loss.device)
        return out

    def multiply(self, grad: Tensor, by: Tensor) -> None:
        flat = rows_of(grad)
        if flat.data_ptr() != grad.data_ptr() or grad.numel() == 0:
            grad.mul_(by)  # three or more strides that do not merge: `rows_of` has made a copy
            return
        size, lanes = tile_of(flat.size(2), grad)
        args = {
            **dict(grad=place(flat), by=by, width=flat.size(2), per=flat.size(1)),
            "const": constants(**lanes, UNALIGNED=0),
        }
        launch(
            kernels.multiply_kernel, flat.size(0) * flat.size(1), args, size.threads, grad.device
        )
