"""Every divergence on every backend, dtype, shape and input against the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from common import (
    INF,
    NAMED,
    TABLE,
    Backend,
    Shape,
    each_divergence,
    each_form,
    each_input,
    each_name,
    each_pair,
    each_shape,
    logits,
)
from oracle import assert_as_good_as_torch, assert_values, differentiate, oracle, plain
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd.backends.base import Backend as Passes
from fastkd.backends.base import LossSpec, Rows, Stats
from fastkd.backends.choice import pick
from fastkd.divergence import Divergence

Pair = tuple[torch.dtype, torch.dtype]


@pairwise
@each_divergence
@each_pair
@each_shape
@pytest.mark.interpreted(24)
def test_shapes(backend: Backend, divergence: Divergence, pair: Pair, shape: Shape) -> None:
    student, teacher = logits(backend, shape.rows, shape.vocab, pair)
    upstream = torch.rand(shape.rows, device=backend.device) + 0.5
    assert_as_good_as_torch(
        student, teacher, divergence=divergence, reduction="none", upstream=upstream
    )


@pairwise
@each_form
@each_divergence
@each_pair
@each_input
@pytest.mark.interpreted(24)
def test_inputs(
    form: str,
    backend: Backend,
    divergence: Divergence,
    pair: Pair,
    make: Callable[[int, int], tuple[Tensor, Tensor]],
) -> None:
    student, teacher = logits(backend, 6, 67, pair, make)
    assert_as_good_as_torch(student, teacher, divergence=divergence, reduction="none", form=form)


@pairwise
@each_name
@each_pair
@each_input
@pytest.mark.not_interpreted
def test_inputs_over_several_blocks(
    backend: Backend,
    divergence: Divergence,
    pair: Pair,
    make: Callable[[int, int], tuple[Tensor, Tensor]],
) -> None:
    student, teacher = logits(backend, 3, 5003, pair, make)
    assert_as_good_as_torch(student, teacher, divergence=divergence, reduction="none")


@pairwise
@each_form
@each_divergence
@each_pair
@pytest.mark.parametrize("temperature", [0.01, 0.5, 4.0, 1000.0])
@pytest.mark.interpreted(12)
def test_temperatures(
    form: str, backend: Backend, divergence: Divergence, pair: Pair, temperature: float
) -> None:
    student, teacher = logits(backend, 4, 33, pair)
    assert_as_good_as_torch(
        student,
        teacher,
        divergence=divergence,
        temperature=temperature,
        reduction="none",
        form=form,
    )


@each_name
@pytest.mark.parametrize("make_first", [True, False], ids=["high-first", "high-last"])
def test_maximum_moves_between_blocks(
    backend: Backend, divergence: Divergence, make_first: bool
) -> None:
    """An online maximum that rises block by block, or falls, is rescaled or left alone."""
    student, teacher = logits(backend, 2, 6200)
    ramp = torch.linspace(-60, 60, 6200, device=backend.device)
    ramp = ramp.flip(0) if make_first else ramp
    assert_as_good_as_torch(student + ramp, teacher + ramp, divergence=divergence, reduction="none")


GIVEN = [
    *((name, {}) for name in NAMED),
    *((entry.name, {entry.parameter: 0.3}) for entry in TABLE if entry.parameter),
]


@pairwise
@each_form
@pytest.mark.parametrize(("name", "parameters"), GIVEN, ids=str)
def test_named_function_is_the_soft_term_alone(
    form: str, backend: Backend, name: str, parameters: dict[str, float]
) -> None:
    """The functions of one divergence are the general one without labels and without T^2."""
    divergence = fastkd.divergences[name]
    student, teacher = logits(backend, 4, 19)
    named = differentiate(NAMED[name], student, teacher, temperature=3.0, **parameters, form=form)
    general = differentiate(
        fastkd.distillation_loss,
        student,
        teacher,
        temperature=3.0,
        alpha=0.0,
        divergence=divergence(**parameters),
        t_squared=False,
        form=form,
    )
    assert torch.equal(named.value, general.value)
    assert torch.equal(named.student, general.student)


@each_name
def test_temperature_changes_the_result(backend: Backend, divergence: Divergence) -> None:
    student, teacher = logits(backend, 4, 19)
    at_one, at_two = (
        fastkd.distillation_loss(
            student,
            teacher,
            alpha=0.0,
            divergence=divergence,
            temperature=temperature,
            t_squared=False,
        )
        for temperature in (1.0, 2.0)
    )
    assert (at_one - at_two).abs() > 1e-2


@pairwise
@each_form
@pytest.mark.parametrize("name", [entry.name for entry in TABLE])
@pytest.mark.interpreted(6)
def test_backends_agree(form: str, kernels: Backend, name: str) -> None:
    """The divergence by its name, on the kernels and on the reference: one mathematics."""
    student, teacher = logits(kernels, 5, 130)
    labels = torch.randint(130, (5,), device=kernels.device)
    here = differentiate(
        fastkd.distillation_loss, student, teacher, labels, divergence=name, form=form
    )
    with fastkd.use_backend("reference"):
        there = differentiate(
            fastkd.distillation_loss, student, teacher, labels, divergence=name, form=form
        )
    torch.testing.assert_close(here.value, there.value, rtol=4e-6, atol=0)
    torch.testing.assert_close(here.student, there.student, rtol=4e-6, atol=4e-7)


def _spec(divergence: Divergence, vocab: int, **rest: float) -> LossSpec:
    return LossSpec(divergence.name, divergence.param, 2.0, 0.7, 0.0, 0.0, vocab, vocab)._replace(
        **rest
    )


def _gradient_of_split(
    passes: Passes,
    student: Tensor,
    teacher: Tensor,
    spec: LossSpec,
    keep: Tensor | None,
    label: Tensor | None,
) -> Tensor:
    """stats, loss, grad: the three passes one after the other on rows [1, N, V]."""
    s, t = student.unsqueeze(0), teacher.unsqueeze(0)
    stats = [passes.stats(x, spec.temperature, spec.vocab, keep) for x in (s, t)]
    hard = passes.stats(s, 1.0, spec.vocab, keep) if spec.hard else None
    rows = Rows(keep, label)
    pairs = passes.loss(s, t, Stats(*stats), spec, rows)
    grad = torch.full_like(s, float("nan"))
    passes.grad(s, t, Stats(*stats, hard), pairs, spec, rows, grad)
    return grad[0]


@each_divergence
@pytest.mark.interpreted(5)
@pytest.mark.parametrize("hard", [0.0, 0.3], ids=["soft", "soft-and-hard"])
def test_split_passes_make_the_fused_one(
    backend: Backend, divergence: Divergence, hard: float
) -> None:
    student, teacher = logits(backend, 6, 41)
    keep = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool, device=backend.device)
    student[2] = teacher[2] = float("nan")
    label = torch.randint(37, (6,), device=backend.device)
    spec = _spec(divergence, 37, classes=37, hard=hard, smoothing=hard / 2)
    passes = pick(backend.device)
    grad = torch.full_like(student, float("nan"))
    rows = [x.unsqueeze(0) for x in (student, teacher, grad)]
    passes.fused(rows[0], rows[1], spec, Rows(keep, label), rows[2])
    split = _gradient_of_split(passes, student, teacher, spec, keep, label)
    torch.testing.assert_close(split, grad, rtol=1e-5, atol=1e-6)
    assert not split[2].any() and not split[:, 37:].any()


@each_divergence
@pytest.mark.interpreted(5)
def test_split_vocabulary(backend: Backend, divergence: Divergence) -> None:
    """Two shards, whose (max, sum) and (value, slope) are put together in between."""
    student, teacher = logits(backend, 4, 50, (torch.float64, torch.float64))
    passes, cut = pick(backend.device), 19
    shards = [(student[None, :, at], teacher[None, :, at]) for at in (slice(cut), slice(cut, None))]
    specs = [_spec(divergence, s.size(-1), classes=50) for s, _ in shards]
    whole = [
        _together([passes.stats(shard[side], 2.0, shard[side].size(-1), None) for shard in shards])
        for side in (0, 1)
    ]
    sums = [
        passes.loss(*shard, Stats(*whole), spec, Rows())
        for shard, spec in zip(shards, specs, strict=True)
    ]
    pairs = torch.stack(sums).sum(0)
    grads = []
    for shard, spec in zip(shards, specs, strict=True):
        grads.append(torch.full_like(shard[0], float("nan")))
        args = (*shard, Stats(*whole), pairs, spec, Rows(), grads[-1])
        passes.grad(*args)
    exact = differentiate(
        plain, student, teacher, divergence=divergence, temperature=2.0, reduction="none"
    )
    value = divergence.row_loss(pairs[:, 0])
    torch.testing.assert_close(value, exact.value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat(grads, -1)[0], 0.7 * exact.student, rtol=1e-10, atol=1e-12)


def _together(stats: list[Tensor], temperature: float = 2.0) -> Tensor:
    top = torch.stack([each[:, 0] for each in stats]).amax(0)
    total = sum(each[:, 1] * ((each[:, 0] - top) / temperature).exp() for each in stats)
    # the sum of x - max is the caller's, for label smoothing: no pass reads it
    return torch.stack((top, total, torch.full_like(top, math.nan)), -1)


@pytest.mark.parametrize("name", ["stats", "loss"])
def test_stats_of_impossible_rows(backend: Backend, name: str) -> None:
    """A side at -inf everywhere has max -inf and sum 0; two of them differ in nothing."""
    student = torch.full((1, 2, 5), -INF, device=backend.device)
    passes, spec = pick(backend.device), _spec(fastkd.divergences.kl, 5)
    stats = passes.stats(student, 2.0, 5, None)
    if name == "stats":
        assert stats[:, 0].tolist() == [-INF, -INF] and stats[:, 1].tolist() == [0, 0]
    else:
        assert not passes.loss(student, student, Stats(stats, stats), spec, Rows()).any()


def test_values_of_stats(backend: Backend) -> None:
    student, _ = logits(backend, 5, 300)
    top, total, below = pick(backend.device).stats(student[None], 3.0, 290, None).unbind(-1)
    used = student[:, :290]
    torchs, exact = (x - x.amax(-1, True) for x in (used, oracle(used)))
    assert torch.equal(top, used.amax(-1))
    assert_values(total, (torchs / 3.0).exp().sum(-1), (exact / 3.0).exp().sum(-1))
    assert_values(below, torchs.sum(-1), exact.sum(-1), nat=300.0)


def test_total_is_a_weighted_sum(backend: Backend) -> None:
    passes = pick(backend.device)
    loss = torch.rand(1000, device=backend.device)
    scale = torch.rand(1000, device=backend.device)
    for by in (None, scale):
        total = passes.total(loss, by, 0.25)
        torchs, exact = (
            0.25 * (x * (1.0 if by is None else by.to(x.dtype))).sum()
            for x in (loss, loss.double())
        )
        assert total.dim() == 0 and total.dtype == torch.float32
        assert_values(total, torchs, exact)


@pytest.mark.parametrize("by", [1.0, 0.0, -2.5])
def test_multiply(backend: Backend, by: float) -> None:
    passes, factor = pick(backend.device), torch.tensor(by, device=backend.device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, 1), (3, 37), (2, 3000), (2, 3, 5)):
            grad = torch.randn(shape, device=backend.device, dtype=dtype)
            expected = (grad.float() * by).to(dtype)
            passes.multiply(grad, factor)
            assert torch.equal(grad, expected)
