"""The tensors and numbers of an operand: what they must be, and what is said where they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, shown, sizes
from fastkd.arguments.numbers import integer, real

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
INDEX_DTYPES = frozenset((torch.int32, torch.int64))
INT_DTYPES = INDEX_DTYPES | {torch.int16, torch.int8, torch.uint8}


def layout(x: Tensor) -> str:
    """What a tensor that is not dense is, for a message."""
    return "a nested tensor" if x.is_nested else f"{type(x).__name__} ({x.layout})"


def check_dense(name: str, x: Tensor) -> None:
    """TypeError for a sparse or nested tensor."""
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: got {layout(x)}, expected a dense tensor")


def answers_itself(x: Tensor) -> bool:
    """Whether it is of a subclass that does torch's operations its own way, over other tensors.

    It has no memory that a kernel could read.
    """
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse what is no head: the tensors of a `LinearLogits`."""
    for name, x, shape in (
        ("hidden", hidden, "[..., H]"),
        ("weight", weight, "[V, H]"),
        ("bias", bias, "[V]"),
    ):
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {describe(x)}, expected a tensor {shape}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name}: got {layout(x)}, expected a dense tensor")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}: got {describe(x)}, expected float32, bfloat16, float16 or float64"
            )
    if hidden.dim() == 0 or hidden.size(-1) == 0:
        raise ValueError(f"hidden: got shape {sizes(hidden.shape)}, expected [..., H] with H >= 1")
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {sizes(weight.shape)}, expected [V, H]")
    if weight.size(1) != hidden.size(-1):
        raise ValueError(
            f"weight: got shape {sizes(weight.shape)}, expected [V, {hidden.size(-1)}] for hidden "
            f"states {sizes(hidden.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.size(0),):
        raise ValueError(
            f"bias: got shape {sizes(bias.shape)}, expected [{weight.size(0)}] for a weight "
            f"{sizes(weight.shape)}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name}: got a tensor on {x.device}, expected the hidden states' {hidden.device}"
            )


def check_topk(logprobs: Tensor, indices: Tensor, tail_logprob: Tensor | None) -> None:
    """Refuse what is no top-k teacher: the tensors of a `TopK`."""
    floats = "float32, bfloat16, float16 or float64"
    for name, x, form, dtypes, what in (
        ("logprobs", logprobs, "[..., K]", DTYPES, floats),
        ("indices", indices, "[..., K]", INDEX_DTYPES, "int32 or int64"),
        ("tail_logprob", tail_logprob, "[...]", DTYPES, floats),
    ):
        if x is None and name == "tail_logprob":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {describe(x)}, expected a tensor {form} of {what}")
        if x.layout is not torch.strided or x.is_nested or hasattr(x, "placements"):
            raise TypeError(f"{name}: got {layout(x)}, expected a dense tensor")
        if x.dtype not in dtypes:
            raise TypeError(f"{name}: got {describe(x)}, expected {what}")
        if x.device != logprobs.device:
            raise ValueError(
                f"{name}: got a tensor on {x.device}, expected the logprobs' {logprobs.device}"
            )
    shape = logprobs.shape
    if not shape or not shape[-1]:
        raise ValueError(f"logprobs: got shape {sizes(shape)}, expected [..., K] with K >= 1")
    if indices.shape != shape:
        raise ValueError(
            f"indices: got shape {sizes(indices.shape)}, expected the logprobs' {sizes(shape)}"
        )
    if tail_logprob is not None and tail_logprob.shape != shape[:-1]:
        raise ValueError(
            f"tail_logprob: got shape {sizes(tail_logprob.shape)}, expected {sizes(shape[:-1])}, "
            f"the leading dimensions of the logprobs' {sizes(shape)}"
        )


def check_map(columns: Tensor, device: torch.device, width: int) -> None:
    """Refuse what is no map of columns: that of a `MappedLogits`."""
    if not isinstance(columns, Tensor) or columns.dtype not in INDEX_DTYPES:
        hint = ""
        if isinstance(columns, Tensor) and columns.dtype == torch.bool:
            hint = "; of a mask, mask.nonzero().squeeze(-1) are the columns"
        raise TypeError(
            f"columns: got {describe(columns)}, expected a tensor [V] of int32 or int64{hint}"
        )
    if columns.layout is not torch.strided or columns.is_nested or hasattr(columns, "placements"):
        raise TypeError(f"columns: got {layout(columns)}, expected a dense tensor")
    if columns.dim() != 1 or not 1 <= columns.size(0) <= width:
        raise ValueError(
            f"columns: got shape {sizes(columns.shape)}, expected [V], 1 to {width} of the "
            f"teacher's {width} columns"
        )
    if columns.device != device:
        raise ValueError(
            f"columns: got a tensor on {columns.device}, expected the teacher's {device}"
        )


def head_numbers(
    scale: float, softcap: float | None, chunk_size: int | None
) -> tuple[float, float | None, int | None]:
    """The numbers of a `LinearLogits` as Python's own."""
    found: list[float | None] = []
    for name, x in (("scale", scale), ("softcap", softcap)):
        if x is None and name == "softcap":
            found.append(None)
            continue
        number = real(x)
        if number is None:
            hint = "; multiply hidden by a scale that is a tensor" if name == "scale" else ""
            raise TypeError(f"{name}: got {describe(x)}, expected a number{hint}")
        low = number > 0 if name == "softcap" else number != 0
        if not (low and 1e-18 <= abs(number) <= 1e18):
            what = "positive number" if name == "softcap" else "number other than 0"
            raise ValueError(f"{name}: got {shown(x)}, expected a {what} (of size 1e-18 to 1e18)")
        found.append(float(number))
    scale, softcap = float(found[0] or 0.0), found[1]
    if chunk_size is None:
        return scale, softcap, None
    rows = integer(chunk_size)
    if rows is None:
        raise TypeError(f"chunk_size: got {describe(chunk_size)}, expected a number of rows")
    if not 1 <= rows < 2**63:
        raise ValueError(f"chunk_size: got {shown(chunk_size)}, expected at least 1 row")
    return scale, softcap, rows


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which torch itself multiplies here and now; autocast has a say in it."""
    of_hidden, of_weight = (_multiplied(x) for x in (hidden, weight))
    if of_hidden != of_weight:
        raise TypeError(
            f"weight: got {weight.dtype}, expected the hidden states' {hidden.dtype}; cast one of "
            "them, or make the logits under autocast as the model does"
        )
    return of_hidden


def _multiplied(x: Tensor) -> torch.dtype:
    nothing = torch.zeros((0, 1), dtype=x.dtype, device=x.device)
    return torch.mm(nothing, nothing.t()).dtype
