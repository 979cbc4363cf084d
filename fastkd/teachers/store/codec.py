"""How a teacher's rows are written: what is kept of a number, and how far it may be from it.

A token of k = 32 at V = 128 256 takes 106 bytes: 68 of columns, 32 of log-probabilities, 4 of the
row's level, 2 of log(1 - sum p), which is within 2**-11 of its size.

Columns are integers of as many bits as the vocabulary's size has, each row from a byte of its own;
vocab_size itself is padding. Log-probabilities ("uint8") are gaps below the row's level, a byte
each of a table whose steps grow with the gap, so that the row's mass stays what it was:

    stored = level - gap,    level = log sum e^given - log sum e^-gap (float32)
    |stored - given| <= step * (2 * floor + gap + log k) + 2**-22 * (|given| + gap),

gap being what the row's largest is above it, up to `reach`: further down it is stored as `reach`.
Why: a gap is within step * (floor + gap), and a row's level moves by log of a mean of e^error under
the row's own probabilities w; with gaps y the mean of step * y is at most step * log k, for
sum w**(1 - s) <= k**s. "counts" are the draws of a sampled teacher, share = count / k, a byte each
and exact; "plain" are float32 beside int32 columns, which any reader understands.

Hidden states are floats of a dtype, or ("int8") code * row_scale, row_scale = max |hidden| / 127.
Their logits are those of the teacher, but for the products' own rounding, within

    row_norm * (step * max |hidden| of the row + floor),   row_norm = |scale| max_v sum_i |w_vi|

with `hidden_step` of the encoding: 0 where it is the teacher's own dtype. A softcap takes nothing
away from that. A log-probability at T is within 2 / T of it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastkd.teachers import bits

GONE = MOST_DRAWS = 255  # the byte of a probability of 0
FLOOR, REACH = 0.5, 128.0  # nats: where the steps of "uint8" begin to grow, and where they end
RATE = math.log1p(REACH / FLOOR) / (GONE - 1)
STEP = math.tanh(RATE / 2)  # between two marks of a geometric table: relative to the nearest
TINY = 2.0**-126  # the smallest normal float32
LOGITS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENCODINGS = ("uint8", "plain", "counts")
HIDDEN = (*LOGITS, "int8")
ERRORS = {  # |stored - given| is at most
    "uint8": f"{STEP:.6f} * (1 + gap + log k) + 2**-22 * (|given| + gap), gap <= {REACH:g}",
    "counts": "2**-22 * |given| of whole draws",
    **{"plain": "2**-24 * |given|", "float32": "2**-24 * |given|"},
    **{"bfloat16": "2**-8 * |given|", "float16": "2**-11 * |given| + 2**-25"},
}


def logprob_bound(encoding: str, k: int, given: Tensor) -> Tensor:
    """The largest error of each log-probability of rows `given` [..., K], in nats."""
    gap = (given.amax(-1, keepdim=True) - given).clamp_max(REACH)
    step = STEP if encoding == "uint8" else 0.0
    return step * (2 * FLOOR + gap + math.log(k)) + 2.0**-22 * (given.abs() + gap)


def pack(indices: Tensor, vocab_size: int) -> Tensor:
    """Columns [R, K], -1 for padding, as bytes [R, ceil(K * bits / 8)]."""
    return bits.pack(indices.masked_fill(indices < 0, vocab_size), vocab_size.bit_length())


def unpack(packed: Tensor, k: int, vocab_size: int) -> Tensor:
    """The columns [R, K] int32 of bytes by `pack`; what it never wrote is above vocab_size."""
    number = bits.unpack(packed, k, vocab_size.bit_length())
    return number.masked_fill(number == vocab_size, -1).to(torch.int32)


@functools.lru_cache
def _gaps() -> tuple[Tensor, Tensor]:
    """The 256 gaps of "uint8" in float32, the last +inf, and what lies midway between them."""
    marks = FLOOR * torch.expm1(RATE * torch.arange(GONE, dtype=torch.float64))
    marks = marks.float().double()  # encoded with the very numbers that decode
    middle = (marks[1:] + marks[:-1]) / 2
    return torch.cat([marks, torch.tensor([math.inf])]).float(), middle


def encode(logprobs: Tensor, encoding: str) -> dict[str, Tensor]:
    """Log-probabilities [R, K], -inf for padding, as tensors for a shard."""
    given, k = logprobs.double(), logprobs.size(-1)
    if encoding == "plain":
        return {"logprobs": given.float()}
    if encoding == "counts":
        draws = given.exp() * k
        count = draws.round()
        if not bool(((draws - count).abs() <= 1e-3).all()):
            worst = f"{float(draws.flatten()[(draws - count).abs().argmax()]):g} draws in {k}"
            raise ValueError(f"logprobs: got {worst}, expected whole draws, or encoding='uint8'")
        return {"logprobs": count.to(torch.uint8)}
    top = given.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    gap = top - given
    table, middle = _gaps()
    code = torch.bucketize(gap, middle).masked_fill_(gap.isinf(), GONE).to(torch.uint8)
    kept = table.double()[code.int()]
    moved = (-gap).exp().sum(-1, keepdim=True).log() - (-kept).exp().sum(-1, keepdim=True).log()
    # above 0 a level would make probabilities above 1; a row without any has no level
    level = (top + moved.nan_to_num_(nan=0.0)).clamp_max_(0.0)
    return {"logprobs": code, "level": level.squeeze(-1).float()}


def decode(code: Tensor, level: Tensor | None, encoding: str) -> Tensor:
    """Log-probabilities [R, K] float32 from the tensors of `encode`."""
    if encoding == "plain":
        return code
    if level is None:  # counts of draws
        return (code.double() / code.size(-1)).log().float()
    gap = _gaps()[0].index_select(0, code.flatten().int()).view(code.shape)
    return level.unsqueeze(-1) - gap


def encode_tail(tail: Tensor, encoding: str) -> Tensor:
    """log(1 - sum p) [R] as float16; below its range it is its lowest, and -inf stays."""
    if encoding == "plain":
        return tail.float()
    return torch.where(tail.isinf(), tail, tail.clamp_min(-65504.0)).half()


def encode_numbers(given: Tensor, encoding: str, name: str) -> dict[str, Tensor]:
    """Logits [R, V] or hidden states [R, H] as tensors for a shard."""
    if encoding != "int8":
        return {name: given.to(LOGITS[encoding])}
    given = given.double()
    scale = (given.abs().amax(-1) / 127).clamp_min(TINY).float()
    code = (given / scale.double().unsqueeze(-1)).round().clamp(-127, 127)
    return {name: code.to(torch.int8), "row_scale": scale}


def decode_hidden(code: Tensor, scale: Tensor | None, dtype: str) -> Tensor:
    """Hidden states [R, H] in the head's dtype from the tensors of `encode_hidden`."""
    hidden = code if scale is None else code.float() * scale.unsqueeze(-1)
    return hidden.to(getattr(torch, dtype))


def hidden_step(encoding: str, dtype: str) -> tuple[float, float]:
    """(step, floor): an element given in `dtype` is within step * max |hidden| + floor."""
    unit = {name: torch.finfo(getattr(torch, name)).eps / 2 for name in (*LOGITS, dtype)}
    floor = 2.0**-24 if "float16" in (encoding, dtype) else TINY  # below normal numbers
    if encoding == "int8":
        return 1 / 254 + unit["float32"] + unit[dtype], floor
    kept = LOGITS[encoding]
    exact = torch.promote_types(kept, getattr(torch, dtype)) == kept
    return (0.0, 0.0) if exact else (unit[encoding], floor)


def logit_bound(spec: Any, hidden: Tensor) -> Tensor:
    """The largest error [...] of a logit of rows hidden [..., H] in a store of this spec."""
    step, floor = hidden_step(spec.encoding, spec.head["dtype"])
    return spec.head["row_norm"] * (step * hidden.detach().double().abs().amax(-1) + floor)
