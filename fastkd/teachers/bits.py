"""Numbers of so many bits one after the other, most significant bit first, each row from a byte."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOST = 56  # bits: a number and what is beside it in its first byte are one int64


@functools.lru_cache
def _places(k: int, bits: int) -> tuple[Tensor, Tensor, int]:
    """First byte of each of k numbers, the bits behind it in its last, and bytes that it spans."""
    start, count = torch.arange(k) * bits, (bits + 14) // 8
    return start // 8, 8 * count - bits - start % 8, count


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [R, K] from 0 on as bytes [R, ceil(K * bits / 8)]."""
    rows, k = numbers.shape
    first, shift, count = _places(k, bits)
    window, size = numbers.long() << shift, -(-k * bits // 8)
    out = torch.zeros((rows, size + count), dtype=torch.int32)
    for place in range(count):  # the bits of two numbers never meet: their sum is their union
        byte = (window >> (8 * (count - 1 - place))) & 255
        out.index_add_(1, first + place, byte.to(torch.int32))
    return out[:, :size].to(torch.uint8)


def unpack(packed: Tensor, k: int, bits: int) -> Tensor:
    """The numbers [R, K] of bytes by `pack`, int32 where these hold what they span."""
    first, shift, count = _places(k, bits)
    kind = torch.int32 if count <= 4 else torch.int64
    padded = torch.nn.functional.pad(packed, (0, count))
    number = padded.index_select(1, first).to(kind)
    for place in range(1, count):
        number = (number << 8) | padded.index_select(1, first + place)
    return (number >> shift.to(kind)) & ((1 << bits) - 1)
