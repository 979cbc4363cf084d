"""What may stand in for a tensor of logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def kind(x: object) -> str:
    """What an argument is, for a message."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)} of {x.dtype} on {x.device}"
    return f"{type(x).__name__} {x!r}"


class Head(NamedTuple):
    """What turns hidden states into logits besides tensors; dtype is that of the products."""

    scale: float
    softcap: float | None
    dtype: torch.dtype


class LinearLogits:
    """Logits of a language model's head that are never built: hidden states and the head's weight.

        logits = cap(scale * (hidden @ weight.T + bias)),   cap(z) = softcap * tanh(z / softcap)

    Stands in for the student's logits, the teacher's or both, in every loss of fastkd: the two
    N x V matrices then exist a chunk of rows at a time, and the student's chunk is overwritten by
    its own gradient. The two sides may differ in hidden size and dtype.

    With reduction="none", with a weight or normalizer that requires grad and under torch.compile,
    backward makes the logits a second time (six products, not four); double backward, the
    reference backend and a divergence without a dual (for a teacher's gradient) build them in full.

    It is made where the logits would be made, and behaves as they would: under `torch.no_grad` it
    takes no part in autograd, under autocast its products run in autocast's dtype.

    scale multiplies what the head gives, its bias too, and the softcap comes last. So Cohere's
    logit_scale is `scale`, Granite's logits_scaling is `scale=1 / logits_scaling`, Gemma's
    final_logit_softcapping is `softcap`. A scale that is learnt goes into the operands instead:
    `LinearLogits(hidden * scale, weight)`.

    Args:
        hidden: hidden states [..., H], float32, bfloat16, float16 or float64.
        weight: the head's weight [V, H], in hidden's dtype unless under autocast. One that
            requires grad gets its gradient, a teacher's too: detach it, or freeze the teacher.
        bias: [V] floats, or None.
        scale: a finite number other than 0.
        softcap: a positive number, or None for none.
        chunk_size: rows of a chunk; None for what FASTKD_CHUNK (read when fastkd is imported)
            says, or else for what a budget of memory holds. Where both sides give one, the
            smaller. It changes results by rounding only.
        pack: leave ignored rows out of the matrix products. Counting them waits for the device,
            once a call; torch.compile leaves them in.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or sizes that do not match.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        chunk_size: int | None = None,
        pack: bool = False,
    ) -> None:
        _tensors(hidden, weight, bias)
        _numbers(scale, softcap, chunk_size)
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
            bias = None if bias is None else bias.detach()
        self.hidden, self.weight, self.bias = hidden, weight, bias
        cap = None if softcap is None else float(softcap)
        self.head = Head(float(scale), cap, _product_dtype(hidden, weight))
        self.chunk_size, self.pack = chunk_size, bool(pack)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias."""
        return self.hidden, self.weight, self.bias

    @property
    def shape(self) -> torch.Size:
        """[..., V], the shape of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.size(0)))

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in self.tensors)

    def dim(self) -> int:
        return self.hidden.dim()

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def __repr__(self) -> str:
        text = f"LinearLogits({list(self.shape)} of {self.dtype}, H={self.hidden.size(-1)}"
        text += ", bias" if self.bias is not None else ""
        scale, cap, _ = self.head
        text += f", scale={scale:g}" if scale != 1.0 else ""
        return text + (f", softcap={cap:g})" if cap is not None else ")")


Operand = Tensor | LinearLogits


def build(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    vocab: int,
    keep: Tensor | None = None,
) -> Tensor:
    """The first logits [..., vocab] themselves in plain torch, differentiable: the definition.

    keep: [...] bool or None; what rows hold that are not kept reaches no value and no gradient.
    """
    scale, cap, dtype = head
    weight, bias = weight[:vocab], None if bias is None else bias[:vocab]
    if keep is not None:
        hidden = torch.where(keep.unsqueeze(-1), hidden, 0.0)
    bias = None if bias is None else bias.to(dtype)
    z = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
    z = z if scale == 1.0 else z * scale
    return z if cap is None else (z / cap).tanh() * cap


def _tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, x, shape in (
        ("hidden", hidden, "[..., H]"),
        ("weight", weight, "[V, H]"),
        ("bias", bias, "[V]"),
    ):
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {kind(x)}, expected a tensor {shape}")
        if type(x) is not Tensor and type(x) is not Parameter and hasattr(x, "placements"):
            raise TypeError(
                f"{name}: got a {type(x).__name__} placed as {x.placements}, expected a plain "
                "tensor: distributed ones are not supported, give the whole with .full_tensor()"
            )
        if x.layout is not torch.strided:
            raise TypeError(f"{name}: got {type(x).__name__} ({x.layout}), expected a dense tensor")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}: got {kind(x)}, expected float32, bfloat16, float16 or float64"
            )
    if hidden.dim() == 0 or hidden.size(-1) == 0:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, expected [..., H] with H >= 1")
    if weight.dim() != 2 or weight.size(0) == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [V, H] with V >= 1")
    if weight.size(1) != hidden.size(-1):
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, expected [V, {hidden.size(-1)}] for hidden "
            f"states {list(hidden.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.size(0),):
        raise ValueError(
            f"bias: got shape {list(bias.shape)}, expected [{weight.size(0)}] for a weight "
            f"{list(weight.shape)}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name}: got a tensor on {x.device}, expected the hidden states' {hidden.device}"
            )


def _numbers(scale: float, softcap: float | None, chunk_size: int | None) -> None:
    for name, x in (("scale", scale), ("softcap", softcap)):
        if x is None and name == "softcap":
            continue
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            hint = "; multiply hidden by a scale that is a tensor" if name == "scale" else ""
            raise TypeError(f"{name}: got {kind(x)}, expected a number{hint}")
        low = x > 0 if name == "softcap" else x != 0
        if not (low and math.isfinite(x) and 1e-18 <= abs(x) <= 1e18):
            what = "positive number" if name == "softcap" else "number other than 0"
            raise ValueError(f"{name}: got {x!r}, expected a {what} (of size 1e-18 to 1e18)")
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: got {kind(chunk_size)}, expected a number of rows")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1 row")


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
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
