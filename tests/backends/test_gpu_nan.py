"""A NaN, or +inf, of either side reaches the loss and every gradient of its row, and no other's.

Through the interpreter or on a GPU, against the reference: wherever it stands (alone in its lane,
too), and however far below the row's maximum.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

from common import DTYPES
from pairwise import pairwise

import fastkd
from fastkd.backends.base import LossSpec, Rows, Stats, TopKRows, acc_dtype
from fastkd.backends.reference import BACKEND as reference

pytest.importorskip("triton")
from fastkd.backends.gpu import BACKEND as gpu
from fastkd.backends.gpu import launch, split_rows
from fastkd.backends.gpu.tune import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN, INF = math.nan, math.inf
each_name = pytest.mark.parametrize("name", list(fastkd.divergences))
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def spec_of(name: str, vocab: int, hard: float = 0.0) -> LossSpec:
    param = 0.3 if fastkd.divergences[name].parameter else 0.0
    return LossSpec(name, param, 1.0, 0.7, hard, 0.0, vocab, vocab)


def spoilt(x: Tensor) -> Tensor:
    """x [5, V] with a row for each place of a NaN or an infinity; rows 0 and 4 keep sound."""
    x = x.clone()
    vocab = x.size(-1)
    x[1, 0], x[2, vocab // 2], x[3, vocab - 1] = NAN, INF, NAN
    x[1:4, 1] = 200.0  # a maximum that leaves no weight to the lanes of others
    return x


def assert_rows(loss: Tensor, grad: Tensor, true: Tensor, true_grad: Tensor) -> None:
    nan = true.isnan()
    assert nan.any() and not nan.all()
    torch.testing.assert_close(loss.isnan(), nan)
    torch.testing.assert_close(grad.isnan(), true_grad.isnan())
    assert grad[nan].isnan().all() and not grad[~nan].isnan().any()


def run(passes: Any, s: Tensor, t: Tensor | TopKRows, spec: LossSpec, label: Tensor | None) -> Any:
    grad = torch.zeros_like(s).unsqueeze(0)
    dense = not isinstance(t, TopKRows)
    teacher: Any = t.unsqueeze(0) if isinstance(t, Tensor) else t
    act = passes.fused if dense else passes.topk
    loss = act(s.unsqueeze(0), teacher, spec, Rows(None, label), grad)
    return loss, grad[0]


@pairwise
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("vocab", [7, 9, 17, 300])
@each_dtype
@each_name
def test_nan_stays_in_its_row(name: str, dtype: torch.dtype, vocab: int, side: int) -> None:
    sides = [torch.randn(5, vocab).to(DEVICE, dtype) for _ in range(2)]
    sides[side] = spoilt(sides[side])
    label = torch.arange(5, device=DEVICE) if vocab % 2 else None
    spec = spec_of(name, vocab, 0.0 if label is None else 0.5)
    assert_rows(*run(gpu, *sides, spec, label), *run(reference, *sides, spec, label))


@pytest.mark.interpreted(3)
@pytest.mark.parametrize("vocab", [4096, 5000])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "skew_kl"])
def test_in_wide_rows_of_far_logits(name: str, vocab: int) -> None:
    for side in range(2):
        sides = [(1e4 * torch.randn(2, vocab)).to(DEVICE) for _ in range(2)]
        sides[side][1, vocab - 1] = NAN
        spec = spec_of(name, vocab)
        loss, grad = run(gpu, *sides, spec, None)
        assert loss.isnan().tolist() == [False, True]
        assert grad[1].isnan().all() and not grad[0].isnan().any()


@pytest.mark.interpreted(6)
@pytest.mark.parametrize("side", [0, 1])
@each_name
def test_where_several_programs_share_a_row(
    name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "tile", lambda vocab, size, *_: Tile(8 * size, 16 // size, 32))
    monkeypatch.setattr(split_rows, "programs_per_row", lambda *shape: 3)
    sides = [torch.randn(5, 300).to(DEVICE) for _ in range(2)]
    sides[side] = spoilt(sides[side])
    spec = spec_of(name, 300)
    assert_rows(*run(gpu, *sides, spec, None), *run(reference, *sides, spec, None))


@pytest.mark.interpreted(6)
@pytest.mark.parametrize("side", [0, 1])
@each_name
def test_the_split_passes(name: str, side: int) -> None:
    """stats, loss and grad by themselves."""
    vocab = 17
    sides = [torch.randn(5, vocab).to(DEVICE) for _ in range(2)]
    sides[side] = spoilt(sides[side])
    spec = spec_of(name, vocab)
    s, t = (x.unsqueeze(0) for x in sides)
    stats = [gpu.stats(x, 1.0, vocab, None) for x in (s, t)]
    assert stats[side][:, 1].isnan().tolist() == [False, True, True, True, False]
    both = gpu.loss(s, t, Stats(*stats), spec, Rows())
    grad = torch.zeros_like(s)
    gpu.grad(s, t, Stats(*stats), both[:, 1], spec, Rows(), grad)
    assert_rows(both[:, 0], grad[0], *run(reference, *sides, spec, None))


@pytest.mark.interpreted(9)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@each_name
def test_a_stored_teacher(name: str, tail: str) -> None:
    """In the named columns, and in the rest."""
    vocab = 17
    s = spoilt(torch.randn(5, vocab).to(DEVICE))
    # the columns of a NaN or infinity are named in no row, or all of them in every row
    for named in ([1, 3, 5], [0, 1, vocab // 2, vocab - 1]):
        acc = acc_dtype(s, s)
        mass = torch.full((5, len(named)), 0.9 / len(named), dtype=acc, device=DEVICE)
        if tail == "renormalize":
            mass = mass / 0.9
        at = torch.tensor(named, device=DEVICE).expand(5, -1).contiguous()
        rest = torch.full((5,), 0.1, dtype=acc, device=DEVICE).log() if tail == "bucket" else None
        teacher = TopKRows(mass.log(), at, rest, False)
        ours = run(gpu, s, teacher, spec_of(name, vocab), None)
        theirs = run(reference, s, teacher, spec_of(name, vocab), None)
        assert_rows(*ours, *theirs)


@each_dtype
def test_the_best_columns_of_a_row_with_a_nan(dtype: torch.dtype) -> None:
    logits = spoilt(torch.randn(5, 17).to(DEVICE, dtype))
    with fastkd.use_backend("gpu"):
        best = fastkd.topk_from_logits(logits, 4)
    assert best.logprobs.isnan().any(-1).tolist() == [False, True, True, True, False]
    assert best.logprobs[1:4].isnan().all()


@each_name
def test_a_restricted_teacher(name: str) -> None:
    """A NaN off its columns reaches nothing; one in them the loss and every named column."""
    student = spoilt(torch.randn(5, 17).to(DEVICE))
    for named in ([1, 3, 5], [0, 1, 8, 16]):
        logprobs = torch.full((5, len(named)), 1 / len(named), device=DEVICE).log()
        at = torch.tensor(named, device=DEVICE).expand(5, -1).contiguous()
        teacher = fastkd.TopK(logprobs, at, tail="restrict")
        found = {}
        for backend in ("gpu", "reference"):
            s = student.clone().requires_grad_()
            with fastkd.use_backend(backend):
                options = {"alpha": 0.0, "temperature": 1.0, "reduction": "none"}
                entry = fastkd.divergences[name]
                loss = fastkd.distillation_loss(s, teacher, divergence=entry, **options)
                loss.sum().backward()
            found[backend] = loss.detach().isnan(), s.grad[:, named].isnan()
            sound = ~found[backend][0]
            assert not s.grad[sound].isnan().any()
        for ours, theirs in zip(found["gpu"], found["reference"], strict=True):
            torch.testing.assert_close(ours, theirs)
        spoils = named[0] == 0  # the places of the NaNs are named
        assert found["gpu"][0].tolist() == [False, spoils, spoils, spoils, False]
