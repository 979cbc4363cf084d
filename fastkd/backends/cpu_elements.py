"""Arguments of the C++ passes over losses of one logit each.

`bernoulli` gives the sum of weight * loss and writes what it is given memory for; `count_elements`
gives the sum of the weights of the logits that count, -inf for a label that is not in 0 to 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.bernoulli import Bernoulli, ElementFactor, Flat

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
LABELS = DTYPES | {torch.int64: 4, torch.int32: 5, torch.int16: 6, torch.int8: 7, torch.uint8: 8}
NO_LABELS = 9
PAIRS = {"kl": 1, "reverse_kl": 2, "js": 3}
# The address to read from: `data_ptr` gives one to write to, for which a copy-on-write tensor takes
# a copy first. An older torch knows no other.
read = getattr(Tensor, "const_data_ptr", Tensor.data_ptr)


def _sides(x: Flat) -> tuple[int, int, int, int, int, int]:
    y = x.labels
    of_labels = (0, NO_LABELS) if y is None else (read(y), LABELS[y.dtype])
    teacher = x.student if x.teacher is None else x.teacher
    own = read(x.student), DTYPES[x.student.dtype]
    return *own, read(teacher), DTYPES[teacher.dtype], *of_labels


def _factor(x: ElementFactor | None) -> tuple[int, int, int]:
    return (0, 1, 1) if x is None else (read(x.data), x.repeat, x.data.numel())


def counted(threads: int, x: Flat) -> tuple[Any, ...]:
    """Of the pass that counts."""
    wide, n = x.acc is torch.float64, x.student.numel()
    return wide, n, threads, _sides(x), x.ignored, _factor(x.weight)


def written(
    threads: int, what: Bernoulli, x: Flat, factor: float, *others: Tensor | None
) -> tuple[Any, ...]:
    """Of the pass itself.

    others: [n] each or None: upstream in acc, one more factor of each value and gradient; memory
    for the gradients of student and teacher, times factor; memory for the values.
    """
    spec = PAIRS[what.divergence.name], what.divergence.param or 0.0, what.temperature
    upstream, *memory = others
    return (
        *(*counted(threads, x), _factor(x.pos_weight), (*spec, what.soft, what.hard, factor)),
        0 if upstream is None else read(upstream),
        *(0 if y is None else y.data_ptr() for y in memory),
    )
