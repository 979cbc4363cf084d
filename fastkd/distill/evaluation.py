"""Quick figures of one model or two: accuracy, cross-entropy, agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import IGNORED, Outputs, batches, device_of, forward, moved, restored_modes
from .targets import class_numbers, classes_last


class Evaluation(NamedTuple):
    """Share of right answers in [0, 1] and mean cross-entropy in nats, over `rows` rows."""

    accuracy: float
    cross_entropy: float
    rows: int


def evaluate(model: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Accuracy and mean cross-entropy of `model` in eval mode; rows labelled -100 do not count.

    Args:
        model: module, inputs -> logits [..., V]; its mode is restored.
        loader: gives (inputs, labels [...] int).

    Raises:
        ValueError: no batch, a batch without labels, or no row that counts.
    """

    def count(labels: Tensor | None, logits: Tensor) -> list[Tensor]:
        if labels is None:
            raise ValueError("loader: got inputs alone, expected (inputs, labels)")
        labels = class_numbers("own", logits, labels)
        flat = logits.flatten(0, -2).float()
        nats = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return [(logits.argmax(-1) == labels).sum(), nats]

    rows, right, nats = _totals([model], loader, count)
    return Evaluation(right / rows, nats / rows, int(rows))


def agreement(model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any]) -> float:
    """Share of rows, in [0, 1], where both models (in eval mode) predict the same class.

    Args:
        model_a, model_b: modules on one device, inputs -> logits [..., V]; modes are restored.
        loader: gives inputs, or (inputs, labels [...]) whose rows labelled -100 do not count.

    Raises:
        ValueError: no batch, or no row that counts.
    """

    def count(labels: Tensor | None, a: Tensor, b: Tensor) -> list[Tensor]:
        same = a.argmax(-1) == b.argmax(-1)
        return [(same if labels is None else same & (labels != IGNORED)).sum()]

    rows, same = _totals([model_a, model_b], loader, count)
    return same / rows


def _totals(
    models: list[nn.Module], loader: Iterable[Any], count: Callable[..., Any]
) -> list[float]:
    """[rows that count, *count(labels, *logits)], each summed over the loader; one host sync."""
    parts = []
    device = device_of(models[0])
    with torch.no_grad(), restored_modes(*models):
        for item in batches(loader, "to evaluate"):
            batch = moved(item, device)
            labels = batch.labels
            outputs = [forward(model.eval(), batch.inputs) for model in models]
            logits = [Outputs(raw, role="model").logits for raw in outputs]
            for x in logits:
                classes_last("", x, labels, batch.inputs)
            shape = logits[0].shape[:-1]
            rows = torch.tensor(shape.numel()) if labels is None else (labels != IGNORED).sum()
            parts.append(torch.stack([rows.to(logits[0].device), *count(labels, *logits)]))
    totals = [math.fsum(column) for column in zip(*torch.stack(parts).tolist(), strict=True)]
    if totals[0] == 0:
        raise ValueError(f"loader: got only rows labelled {IGNORED}, expected others too")
    return totals
