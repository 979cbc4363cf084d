"""Stored teachers as people and servers send them: 16 bits, pads at -inf, other temperatures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import NAMED, Backend
from torch import Tensor

import fastkd
from fastkd.operands import TAILS
from fastkd.teachers import store

INF = math.inf
each_tail = pytest.mark.parametrize("tail", TAILS)


def at(backend: Backend, x: Tensor) -> Tensor:
    return x.to(backend.device)


# ---- rounding


def equal_ones(count: int) -> Tensor:
    return torch.full((1, count), 1.0 / count).log()


def two_digits(count: int) -> Tensor:
    return (equal_ones(count) * 100).trunc() / 100


@pytest.mark.parametrize("cast", ["bfloat16", "float16", "upcast", "digits"])
@pytest.mark.parametrize("count", [2, 10, 58, 69, 100, 1000])
@each_tail
def test_a_mass_above_1_by_rounding(backend: Backend, tail: str, count: int, cast: str) -> None:
    logprobs = equal_ones(count)
    if cast == "digits":
        logprobs = two_digits(count)
    else:
        logprobs = logprobs.to(torch.float16 if cast == "float16" else torch.bfloat16)
    if cast == "upcast":
        logprobs = logprobs.float()
    stored = fastkd.TopK(at(backend, logprobs), at(backend, torch.arange(count)[None]), tail=tail)
    student = at(backend, torch.zeros(1, count + 1).index_fill(1, torch.tensor([count]), -30.0))
    got = fastkd.kl_div(student, stored)
    assert got.isfinite() and abs(float(got)) < 0.06
    if tail in ("renormalize", "restrict"):
        assert abs(float(got)) < 2e-6


def test_a_half_in_bfloat16(backend: Backend) -> None:
    half = torch.tensor([[0.5, 0.5]]).log().bfloat16()
    student = at(backend, torch.tensor([[0.0, 0.0, -30.0]]))
    for tail in TAILS:
        stored = fastkd.TopK(at(backend, half), at(backend, torch.tensor([[0, 1]])), tail=tail)
        got = float(fastkd.kl_div(student, stored))
        if tail in ("renormalize", "restrict"):
            assert abs(got) < 1e-7
        else:
            p = half.double()
            want = (p.exp() * (p - math.log(0.5))).sum()
            assert got == pytest.approx(float(want), abs=2e-7) and got < 0.00175


def test_an_ordinary_log_softmax_in_bfloat16(backend: Backend) -> None:
    torch.manual_seed(0)
    values, ids = (torch.randn(512, 1000) * 6).bfloat16().log_softmax(-1).topk(32)
    most = values.double().exp().sum(-1).topk(8).indices  # of these rows the rounding is worst
    stored = fastkd.TopK(at(backend, values[most]), at(backend, ids[most]))
    assert fastkd.kl_div(at(backend, torch.randn(8, 1000)), stored).isfinite()


@pytest.mark.parametrize(
    "logprobs",
    [
        pytest.param(torch.tensor([[0.6, 0.45]]).log(), id="1.05"),
        pytest.param(torch.tensor([[0.9, 0.9]]).log(), id="1.8"),
        pytest.param(-torch.tensor([[0.5, 0.3, 0.2]]), id="negated probabilities"),
        pytest.param(torch.tensor([[0.0, 0.0]]), id="twice 1"),
    ],
)
@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_a_mass_that_no_rounding_makes(backend: Backend, tail: str, logprobs: Tensor) -> None:
    ids = torch.arange(logprobs.size(-1))[None]
    stored = fastkd.TopK(at(backend, logprobs), at(backend, ids), tail=tail)
    with (
        fastkd.checked(),
        pytest.raises(ValueError, match=r"a mass of 1\.|a mass of 2|mass.*row 0"),
    ):
        fastkd.kl_div(at(backend, torch.zeros(1, 5)), stored)


# ---- absent columns


def teacher_of(rows: list[list[tuple[int, float]]], tail: str, backend: Backend) -> fastkd.TopK:
    ids = torch.tensor([[index for index, _ in row] for row in rows])
    logprobs = torch.tensor([[p for _, p in row] for row in rows]).log()
    return fastkd.TopK(at(backend, logprobs), at(backend, ids), tail=tail)


@each_tail
@pytest.mark.parametrize("name", NAMED)
def test_an_entry_at_minus_infinity_is_absent(backend: Backend, name: str, tail: str) -> None:
    torch.manual_seed(0)
    student = at(backend, torch.randn(1, 10))
    absent = teacher_of([[(7, 0.9), (-1, 0.0), (-1, 0.0)]], tail, backend)
    results = []
    for pads in ((0, 0), (0, 1), (7, 7), (-1, 0), (-100, 10**6)):
        served = teacher_of([[(7, 0.9), (pads[0], 0.0), (pads[1], 0.0)]], tail, backend)
        x = student.clone().requires_grad_()
        value = NAMED[name](x, served, reduction="sum")
        (grad,) = torch.autograd.grad(value, x)
        results.append((value, grad))
    x = student.clone().requires_grad_()
    want = NAMED[name](x, absent, reduction="sum")
    (want_grad,) = torch.autograd.grad(want, x)
    for value, grad in results:
        torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(grad, want_grad, rtol=0, atol=0, equal_nan=True)


def test_what_a_server_sends(backend: Backend) -> None:
    torch.manual_seed(0)
    served = teacher_of([[(7, 0.9), (0, 0.0)]], "bucket", backend)
    student = at(backend, torch.randn(1, 10))
    assert float(fastkd.kl_div(student, served)) == pytest.approx(1.238020, abs=2e-6)
    assert float(fastkd.reverse_kl_div(student, served)) == pytest.approx(1.435645, abs=2e-6)


@each_tail
def test_a_masked_teacher(backend: Backend, tail: str) -> None:
    """Columns at -inf that topk_from_logits takes up because k is larger than what is left."""
    torch.manual_seed(0)
    logits = at(backend, torch.randn(3, 10))
    logits[:, 4:] = -INF
    student = at(backend, torch.randn(3, 10))
    many, few = (fastkd.topk_from_logits(logits, k, tail=tail) for k in (8, 4))
    torch.testing.assert_close(fastkd.kl_div(student, many), fastkd.kl_div(student, few))


def test_true_duplicates_say_what_to_do(backend: Backend) -> None:
    stored = teacher_of([[(7, 0.5), (7, 0.2)]], "bucket", backend)
    with fastkd.checked(), pytest.raises(ValueError, match=r"second time.*-1.*-inf"):
        fastkd.kl_div(at(backend, torch.randn(1, 10)), stored)


def test_other_indices_say_what_to_do(backend: Backend) -> None:
    student = at(backend, torch.randn(1, 10))
    stored = teacher_of([[(7, 0.5), (10, 0.2)]], "drop", backend)
    with fastkd.checked(), pytest.raises(ValueError, match=r"tail='bucket', .*indices >= 10, -1\)"):
        fastkd.kl_div(student, stored)
    stored = teacher_of([[(7, 0.5), (-100, 0.2)]], "bucket", backend)
    with fastkd.checked(), pytest.raises(ValueError, match=r"-1 for padding.*clamp\(min=-1\)"):
        fastkd.kl_div(student, stored)


@each_tail
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("index", [-1, 0])
def test_a_row_without_a_column(backend: Backend, tail: str, measured: bool, index: int) -> None:
    rest = at(backend, torch.zeros(2)) if measured else None
    logprobs = at(backend, torch.tensor([[-INF, -INF], [-0.5, -2.0]]))
    ids = at(backend, torch.tensor([[index, index], [3, 4]]))
    stored = fastkd.TopK(logprobs, ids, tail_logprob=rest, tail=tail)
    student = at(backend, torch.randn(2, 10))
    labels = at(backend, torch.tensor([1, 2]))
    with fastkd.checked(), pytest.raises(ValueError, match=r"no column .* in row 0"):
        fastkd.kl_div(student, stored, labels=labels)
    labels[0] = -100
    with fastkd.checked():
        assert fastkd.kl_div(student, stored, labels=labels).isfinite()


def test_a_row_without_a_column_that_nobody_looks_at(monkeypatch: Any, backend: Backend) -> None:
    monkeypatch.setattr("fastkd.engine.topk_rows.reads_values", lambda device: False)
    logprobs = at(backend, torch.tensor([[-INF, -INF], [-0.5, -2.0]]))
    for tail in TAILS:
        stored = fastkd.TopK(logprobs, at(backend, torch.tensor([[-1, 0], [3, 4]])), tail=tail)
        for name, loss in NAMED.items():
            got = loss(at(backend, torch.randn(2, 10)), stored, reduction="none")
            assert got.isnan().tolist() == [True, False], (tail, name)


# ---- other temperatures


@pytest.mark.parametrize("name", NAMED)
def test_restrict_at_another_temperature(backend: Backend, name: str) -> None:
    torch.manual_seed(0)
    logprobs, ids = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[4, 1]])
    student = torch.randn(1, 5)
    stored = fastkd.TopK(at(backend, logprobs), at(backend, ids), tail="restrict", temperature=1.5)
    got = NAMED[name](at(backend, student), stored, temperature=2.0)
    want = NAMED[name](
        student.double().gather(1, ids) / 2.0, logprobs.double() * (1.5 / 2.0), temperature=1.0
    )
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-6)


@each_tail
def test_all_columns_at_another_temperature(backend: Backend, tail: str) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 7)
    stored = fastkd.topk_from_logits(at(backend, teacher), 7, tail=tail)
    x = at(backend, student).requires_grad_()
    got = fastkd.kl_div(x, stored, temperature=3.0)
    (grad,) = torch.autograd.grad(got, x)
    y = student.double().requires_grad_()
    want = F.kl_div(
        (y / 3).log_softmax(-1), (teacher.double() / 3).softmax(-1), reduction="batchmean"
    )
    (want_grad,) = torch.autograd.grad(want, y)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double().cpu(), want_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_some_columns_at_another_temperature(backend: Backend, tail: str) -> None:
    teacher, student = torch.randn(2, 3, 7)
    for stored in (
        fastkd.topk_from_logits(at(backend, teacher), 3, tail=tail),
        fastkd.TopK(
            at(backend, teacher.log_softmax(-1)),
            at(backend, torch.arange(7).repeat(3, 1)),
            tail=tail,
        ),
    ):
        stored.indices[1, 0] = -1
        with fastkd.checked(), pytest.raises(ValueError, match=r"temperature.*'restrict'"):
            fastkd.kl_div(at(backend, student), stored, temperature=3.0)


# ---- in a cache


@each_tail
def test_a_cache_takes_what_the_losses_take(tmp_path: Path, tail: str) -> None:
    """The bound of the mass and the sense of -inf are the losses' own."""
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log().bfloat16()
    stored = fastkd.TopK(half, torch.tensor([[3, 1, 0, 0]]), tail=tail)
    with store.Writer(tmp_path, vocab_size=9, k=4, tail=tail, encoding="plain") as writer:
        writer.add(stored)
        wrong = fastkd.TopK(torch.tensor([[-0.1, -0.1, -3.0, -4.0]]), stored.indices + 1, tail=tail)
        wrong.indices[0] = torch.arange(4)
        if tail in ("bucket", "drop"):
            with pytest.raises(ValueError, match=r"mass: got 1\.8"):
                writer.add(wrong)
        else:
            writer.add(wrong)
    back = store.Reader(tmp_path)[0]
    student = torch.randn(1, 9)
    torch.testing.assert_close(fastkd.kl_div(student, back), fastkd.kl_div(student, stored))
