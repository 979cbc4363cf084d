"""The same cases under pytest-benchmark: `pytest bench --benchmark-only`.

For its comparison of saved runs and its machine records. No time is asserted: a slow neighbour is
no defect. Unlike in `python -m bench`, providers run one after the other, not in turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gate
from bench.cases import CASES, CPU_SHAPES, SMALL_SHAPES, Case, Shape
from bench.measure import Bench
from bench.providers import DEMO_PROVIDERS, PROVIDERS, Provider, Unavailable, eager

pytest.importorskip("pytest_benchmark")

SHAPES = (SMALL_SHAPES[-1], CPU_SHAPES[0])
MANY_ROUNDS, FEW_ROUNDS = 100, 10


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@pytest.mark.parametrize(
    "provider", [PROVIDERS[name] for name in DEMO_PROVIDERS], ids=lambda p: p.name
)
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_forward_backward(benchmark: Any, case: Case, provider: Provider, shape: Shape) -> None:
    device = torch.device("cpu")
    torch.compiler.reset()
    bench = Bench(case, shape, torch.float32, device)
    true = gate.truth(case, bench.inputs)
    allowed = gate.bound(gate.errors(*bench.training(eager(case, device))(), true), torch.float32)
    try:
        call = provider.build(case, device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert gate.errors(*bench.training(call)(), true).within(allowed)
    del true

    def fresh() -> tuple[tuple[Any], dict[str, Any]]:
        return (bench.training(call),), {}

    benchmark.group = f"{case.name} {shape.label}"
    benchmark.extra_info["floor_bytes"] = case.floor_bytes(shape, torch.float32, gradient=True)
    rounds = MANY_ROUNDS if shape in SMALL_SHAPES else FEW_ROUNDS
    benchmark.pedantic(lambda run: run(), setup=fresh, rounds=rounds, warmup_rounds=1)
