"""Messages quote type, size and the first few values of an argument, never the whole of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastkd.messages import kind, shown

MOST = 500


class Huge:
    def __repr__(self) -> str:
        return "huge\n" * 10**5


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)

MONSTERS: dict[str, Any] = {
    "list": [0.5] * 6400,
    "nested": [[-1.0] * 1000] * 64,
    "tensors": (torch.randn(64, 3),) * 2,
    "dict": {f"key {i}": torch.randn(9) for i in range(1000)},
    "array": torch.randn(100, 100).numpy(),
    "text": "x" * 10**6,
    "bytes": b"x" * 10**6,
    "huge": Huge(),
    "silent": Silent(),
    "silents": [Silent()] * 99,
    "circle": CIRCLE,
    "number": 10**5000,
    "module": torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(500))),
    "type": type("T" * 5000, (), {})(),
    "sizes": torch.ones([1] * 60),
    "set": set(range(10**5)),
}


@pytest.mark.parametrize("name", MONSTERS)
def test_a_quotation_is_short(name: str) -> None:
    x = MONSTERS[name]
    assert len(kind(x)) <= 200 and len(shown(x)) <= 100
    assert "\n" not in kind(x) and (type(x).__name__[:20] in kind(x) or isinstance(x, torch.Tensor))


def test_a_quotation_says_size_and_first_values() -> None:
    assert kind([[-1.0] * 1000] * 2) == "list [[-1.0, ...] (1000 long), [-1.0, ...] (1000 long)]"
    assert kind([1, 2, 3, 4]) == "list [1, 2, 3, ...] (4 long)"
    assert kind((torch.ones(2, 3), None)) == "tuple (tensor[2, 3], None)"
    assert (
        kind(torch.ones(2, 4).numpy()) == "ndarray [2, 4] of float32 [1.0, 1.0, 1.0, ...] (8 long)"
    )
    assert kind("2") == "str '2'" and kind(2.0) == "float 2.0" and shown("avg") == "'avg'"
