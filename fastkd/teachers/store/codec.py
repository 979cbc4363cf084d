"""How a teacher's rows are written: what is kept of a number, and how far it may be from it.

Columns are integers of `index_bits` bits, one after the other, each row from a byte of its own.
Log-probabilities are gaps below the row's level, so that the row's mass stays what it was:

    stored = level - gap,    level = log sum e^given - log sum e^-gap

The level is a float32; a gap is one byte of a table whose steps grow with the gap ("uint8"), or a
float16. Both keep a gap within step * (floor + gap), so with the level's share of it

    |stored - given| <= step * (2 * floor + gap + log k) + 2**-22 * (|given| + gap),

gap being what the row's largest is above it, up to `reach`: further down it is stored as `reach`.
Why: a row's level moves by log of a mean of e^error under the row's own probabilities w, and with
gaps y that mean of step * y is at most step * log k, for sum w**(1 - s) <= k**s.

"counts" are the draws of a sampled teacher, share = count / k, one byte each and exact.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

GONE = 255  # the byte of a probability of 0
FLOOR, REACH = 0.5, 128.0  # nats: where the steps of "uint8" begin to grow, and where they end
RATE = math.log1p(REACH / FLOOR) / (GONE - 1)
HALF = torch.finfo(torch.float16)
MOST_DRAWS = GONE


class Bound(NamedTuple):
    """A gap's error is at most step * (floor + gap), for gaps up to reach, in nats."""

    step: float
    floor: float
    reach: float


# a value between two marks of a geometric table is nearest to one within tanh(rate / 2) of it
BOUNDS = {
    "uint8": Bound(math.tanh(RATE / 2), FLOOR, REACH),
    "float16": Bound(HALF.eps / 2, HALF.smallest_normal, HALF.max),
    "counts": Bound(0.0, 0.0, math.inf),
}
LOGITS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def logprob_bound(encoding: str, k: int, given: Tensor) -> Tensor:
    """The largest error of each log-probability of rows `given` [..., K], in nats."""
    step, floor, reach = BOUNDS[encoding]
    gap = (given.amax(-1, keepdim=True) - given).clamp_max(reach)
    return step * (2 * floor + gap + math.log(k)) + 2.0**-22 * (given.abs() + gap)


def bound_facts(encoding: str, k: int | None) -> dict[str, Any]:
    """The same in words and numbers, for an index."""
    if k is None:
        error = {
            "float32": "0 from float32",
            "bfloat16": "2**-8 * |logit|",
            "float16": "2**-11 * |logit| + 2**-25",
        }
        return {"logits": f"|stored - given| <= {error[encoding]}"}
    tail = "|stored - given| <= 2**-11 * |given| + 2**-25"
    if encoding == "counts":
        return {"logprobs": "shares of k draws, exact but for float32", "tail_logprob": tail}
    step, floor, reach = BOUNDS[encoding]
    formula = "step * (2 * floor + gap + log k) + 2**-22 * (|given| + gap), gap <= reach"
    numbers = {"step": step, "floor": floor, "reach": reach, "k": k}
    return {"logprobs": f"|stored - given| <= {formula}", **numbers, "tail_logprob": tail}


def index_bits(vocab_size: int) -> int:
    """Bits of one column: 0 to vocab_size - 1, and vocab_size itself for padding."""
    return vocab_size.bit_length()


@functools.lru_cache
def _places(k: int, bits: int) -> tuple[Tensor, Tensor]:
    """First byte and bit in it of each of k numbers."""
    start = torch.arange(k) * bits
    return start // 8, start % 8


def pack(indices: Tensor, vocab_size: int) -> Tensor:
    """Columns [R, K], -1 for padding, as bytes [R, ceil(K * bits / 8)]."""
    bits, (rows, k) = index_bits(vocab_size), indices.shape
    first, shift = _places(k, bits)
    number = torch.where(indices < 0, vocab_size, indices.long()) << shift
    size, count = -(-k * bits // 8), (bits + 14) // 8
    out = torch.zeros((rows, size + count), dtype=torch.int32)
    for place in range(count):  # the bits of two numbers never meet: their sum is their union
        byte = (number >> (8 * place)) & 255
        out.index_add_(1, first + place, byte.to(torch.int32))
    return out[:, :size].to(torch.uint8)


def unpack(packed: Tensor, k: int, vocab_size: int) -> Tensor:
    """The columns [R, K] int32 of bytes by `pack`; what it never wrote is above vocab_size."""
    bits = index_bits(vocab_size)
    first, shift = _places(k, bits)
    count = (bits + 14) // 8
    kind = torch.int32 if count <= 4 else torch.int64
    padded = torch.nn.functional.pad(packed, (0, count))
    number = padded.index_select(1, first).to(kind)
    for place in range(1, count):
        number |= padded.index_select(1, first + place).to(kind) << (8 * place)
    number = (number >> shift.to(kind)) & ((1 << bits) - 1)
    return torch.where(number == vocab_size, -1, number).to(torch.int32)


@functools.lru_cache
def _gaps() -> tuple[Tensor, Tensor]:
    """The 256 gaps of "uint8" in float32, the last +inf, and what lies midway between them."""
    marks = FLOOR * torch.expm1(RATE * torch.arange(GONE, dtype=torch.float64))
    marks = marks.float().double()  # encoded with the very numbers that decode
    middle = (marks[1:] + marks[:-1]) / 2
    return torch.cat([marks, torch.tensor([math.inf])]).float(), middle


@functools.lru_cache
def _shares(k: int) -> Tensor:
    """log(count / k) of every byte, float32."""
    return (torch.arange(256, dtype=torch.float64) / k).log().float()


def encode(logprobs: Tensor, encoding: str) -> dict[str, Tensor]:
    """Log-probabilities [R, K], -inf for padding, as tensors for a shard.

    Raises:
        ValueError: "counts" of what are no shares of K draws.
    """
    given, k = logprobs.double(), logprobs.size(-1)
    if encoding == "counts":
        draws = given.exp() * k
        count = draws.round()
        if not bool(((draws - count).abs() <= 1e-3).all()):
            worst = float(draws.flatten()[(draws - count).abs().argmax()])
            raise ValueError(
                f"logprobs: got a share of {worst:g} draws in {k}, expected whole draws; "
                "encoding='uint8' holds any"
            )
        return {"logprobs": count.to(torch.uint8)}
    top = given.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    gap = top - given
    gone = gap.isinf()
    if encoding == "uint8":
        table, middle = _gaps()
        code = torch.bucketize(gap, middle).masked_fill_(gone, GONE).to(torch.uint8)
        kept = table.double()[code.int()]
    else:
        code = torch.where(gone, gap, gap.clamp_max(HALF.max)).half()
        kept = code.double()
    moved = (-gap).exp().sum(-1, keepdim=True).log() - (-kept).exp().sum(-1, keepdim=True).log()
    # above 0 a level would make probabilities above 1; a row without any has no level
    level = (top + moved.nan_to_num_(nan=0.0)).clamp_max_(0.0)
    return {"logprobs": code, "level": level.squeeze(-1).float()}


def decode(stored: dict[str, Tensor], encoding: str) -> Tensor:
    """Log-probabilities [R, K] float32 from the tensors of `encode`."""
    code = stored["logprobs"]
    if encoding == "float16":
        return stored["level"].unsqueeze(-1) - code.float()
    table = _shares(code.size(-1)) if encoding == "counts" else _gaps()[0]
    number = table.index_select(0, code.flatten().int()).view(code.shape)
    return number if encoding == "counts" else stored["level"].unsqueeze(-1) - number


def encode_tail(tail_logprob: Tensor) -> Tensor:
    """log(1 - sum p) [R] as float16; below its range it is its lowest, and -inf stays."""
    kept = torch.where(tail_logprob.isinf(), tail_logprob, tail_logprob.clamp_min(HALF.min))
    return kept.half()
