"""What the losses are judged on: five distributions of logits, vocabularies and temperatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURES = (0.1, 1.0, 2.0, 10.0, 100.0)
VOCABS = (10, 100, 1000, 32_000, 262_144)
QUICK_TEMPERATURES = (0.1, 2.0, 100.0)
QUICK_VOCABS = (10, 1025)

Pair = tuple[Tensor, Tensor]


def _normal(n: int, v: int, generator: torch.Generator) -> Pair:
    size = (2, n, v)
    s, t = 3 * torch.randn(size, generator=generator, dtype=torch.float64)
    return s, t


def _peaked(n: int, v: int, generator: torch.Generator) -> Pair:
    """Nearly all mass on one column: the same one on both sides in even rows, another in odd."""
    s, t = _normal(n, v, generator)
    row = torch.arange(n)
    s[row, row % v] += 40
    t[row, (row + row % 2) % v] += 40
    return s, t


def _one_hot(n: int, v: int, generator: torch.Generator) -> Pair:
    """A teacher sure of one column. Not by -inf, of which plain torch's JS and skew make NaN."""
    s, _ = _normal(n, v, generator)
    return s, 1e4 * (F.one_hot(torch.arange(n) % v, v).double() - 1)


def _ties(n: int, v: int, generator: torch.Generator) -> Pair:
    """Five different values, each many times."""
    s, t = torch.randint(-2, 3, (2, n, v), generator=generator).double()
    return s, t


def _wide(n: int, v: int, generator: torch.Generator) -> Pair:
    size = (2, n, v)
    s, t = 2e4 * torch.rand(size, generator=generator, dtype=torch.float64) - 1e4
    return s, t


DISTRIBUTIONS: dict[str, Callable[[int, int, torch.Generator], Pair]] = {
    "normal": _normal,
    "peaked": _peaked,
    "one-hot": _one_hot,
    "ties": _ties,
    "wide": _wide,
}


class Batch(NamedTuple):
    """Logits [N, V] and labels [N]: one call's input."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def sizes(vocab: int) -> tuple[int, int]:
    """(batches, rows of each): one loss may be right by luck, the worst of several is not.

    At least two rows, so that the mean is exercised and one dynamic shape serves torch.compile.
    """
    return (8, 4) if vocab <= 5000 else (4, 2) if vocab <= 50_000 else (1, 2)


def batches(distribution: str, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Batch]:
    """The inputs at one vocabulary; the same numbers for every dtype, before they are rounded."""
    count, rows = sizes(vocab)
    generator = torch.Generator().manual_seed(vocab)
    student, teacher = DISTRIBUTIONS[distribution](count * rows, vocab, generator)
    labels = torch.randint(0, vocab, (count * rows,), generator=generator)
    split = [x.to(device).split(rows) for x in (student.to(dtype), teacher.to(dtype), labels)]
    return [Batch(*parts) for parts in zip(*split, strict=True)]
