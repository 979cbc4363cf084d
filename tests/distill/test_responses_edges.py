"""Response losses: what holds by definition, and edges."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from common import INF, INPUTS
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from oracle import FLOORS, assert_gradients, assert_values, oracle
from response_losses import (
    BY_NAME,
    LOSSES,
    Loss,
    assert_right,
    classes,
    each,
    plain_mse,
    reduced,
    run,
)

import fastkd
from fastkd import distill


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_infinite_temperature_kl_is_centred_mse(dtype: torch.dtype) -> None:
    """T^2 KL(p_T || q_T) -> logit_mse, to 1e-2 at T = 1000."""
    s, t = (x.to(dtype) for x in INPUTS["random"](16, 100))
    T = 1000.0
    kl, slope = run(lambda s, t: T * T * fastkd.kl_div(s, t, temperature=T), s, t)
    mse, grad = run(distill.logit_mse, s, t)
    assert (slope - grad).norm() <= 1e-2 * grad.norm()
    if dtype == torch.float64:  # in float32, T^2 times a unit in the last place is 0.1
        assert abs(kl - mse) <= 1e-2 * mse
    assert abs(distill.logit_mse(s, t, centred=False) - mse) > 1e-2 * mse


def test_uncentred_mse() -> None:
    s, t = INPUTS["random"](7, 10)
    value, grad = run(distill.logit_mse, s, t, classes(7, 10), centred=False)
    plain = Loss(distill.logit_mse, lambda s, t, y: plain_mse(s, t, y, centred=False))
    true = run(lambda *a: reduced(plain, *a), oracle(s), oracle(t), classes(7, 10))
    assert_values(value, true[0], true[0])
    assert_gradients(grad, true[1], true[1])


@each([loss for loss in LOSSES if loss.zero])
def test_zero_where_student_and_teacher_agree(in_chunks: bool, loss: Loss) -> None:
    s, _ = INPUTS["random"](7, 10)
    value, grad = run(loss.ours, s, s.clone(), classes(7, 10))
    assert abs(value) <= FLOORS[value.dtype]
    assert grad.abs().max() <= 8 * FLOORS[value.dtype]


def test_dkd_is_kl_where_beta_is_the_teachers_rest() -> None:
    s, t = (x.double() for x in INPUTS["random"](5, 10))
    y, T = torch.arange(5), 2.0
    for row in range(5):
        one = slice(row, row + 1)
        beta = 1 - float((t[row] / T).softmax(-1)[row])
        ours = distill.dkd(s[one], t[one], y[one], alpha=1.0, beta=beta, temperature=T)
        kl = T * T * fastkd.kl_div(s[one], t[one], temperature=T)
        torch.testing.assert_close(ours, kl)


@each([BY_NAME[name] for name in ("zscore", "cosine", "dist", "logit_mse")])
def test_a_shift_of_the_logits(loss: Loss) -> None:
    """What a softmax does not see; a cosine does."""
    s, t = (x.double() for x in INPUTS["random"](6, 10))
    same = torch.allclose(loss.ours(s + 7.0, t), loss.ours(s, t))
    assert same is (loss.name != "cosine")


@each([BY_NAME[name] for name in ("zscore", "cosine", "logit_mse")])
def test_a_scale_of_the_logits(loss: Loss) -> None:
    s, t = (x.double() for x in INPUTS["random"](6, 10))
    same = torch.allclose(loss.ours(2.5 * s, t), loss.ours(s, t))
    assert same is (loss.name != "logit_mse")


@each(LOSSES)
def test_ignored_rows_are_never_read(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    bad_s, bad_t = s.clone(), t.clone()
    bad_s[0], bad_t[0], bad_s[-2], bad_t[-2] = math.nan, INF, -INF, math.nan
    clean, dirty = run(loss.ours, s, t, y), run(loss.ours, bad_s, bad_t, y)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert (dirty[1][y == -100] == 0).all()


@each(LOSSES)
def test_all_rows_ignored(in_chunks: bool, loss: Loss) -> None:
    s = torch.full((4, 9), math.nan, requires_grad=True)
    value = loss.ours(s, s.detach(), torch.full((4,), -100))
    value.backward()
    assert value == 0 and s.grad is not None and (s.grad == 0).all()


@each(LOSSES)
def test_no_rows(loss: Loss) -> None:
    s = torch.empty(0, 9, requires_grad=True)
    value = loss.ours(s, torch.empty(0, 9), torch.empty(0, dtype=torch.long))
    value.backward()
    assert value == 0 and s.grad is not None and s.grad.shape == (0, 9)


@each(LOSSES)
def test_one_class(loss: Loss) -> None:
    """Nothing to learn but the logit itself."""
    s, t = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    value, grad = run(loss.ours, s, t, torch.zeros(2, dtype=torch.long))
    assert value == 0 and (grad == 0).all()


@each(LOSSES)
def test_one_row(loss: Loss) -> None:
    s, t = INPUTS["random"](1, 10)
    assert_right(
        loss, s, t, torch.tensor([3]), **({"temperature": 2.0} if loss.temperature else {})
    )


def test_dist_over_one_row_is_that_over_classes() -> None:
    s, t = INPUTS["random"](1, 10)
    assert distill.dist(s, t) == distill.dist(s, t, gamma=0.0) > 0
    assert distill.dist(s, t, beta=0.0) == 0


def test_constant_rows() -> None:
    s, t = torch.full((1, 10), 12345.678), INPUTS["random"](1, 10)[1]
    uniform = run(distill.zscore, torch.zeros(1, 10), t)
    assert uniform[0] > 0 and (uniform[1] == 0).all()
    assert run(distill.zscore, s, t)[0] == uniform[0] and (run(distill.zscore, s, t)[1] == 0).all()
    assert distill.zscore(s, 2 * s) == 0
    assert distill.dist(s, s + 1) == 0 and distill.dist(s, t, gamma=0.0) == 1
    zero = torch.zeros(1, 10)
    value, grad = run(distill.cosine, zero, t)
    assert abs(value - 1) < 1e-6 and (grad == 0).all()
    assert distill.cosine(zero, zero) == 0


@each([BY_NAME["dkd"], BY_NAME["nkd"]])
def test_label_that_is_impossible(in_chunks: bool, loss: Loss) -> None:
    """At -inf on both sides it costs nothing; where the teacher allows it, infinitely much."""
    s, t = INPUTS["random"](4, 10)
    y = torch.full((4,), 2)
    both_s, both_t = s.clone(), t.clone()
    both_s[:, 2] = both_t[:, 2] = -INF
    value, grad = run(loss.ours, both_s, both_t, y)
    assert value.isfinite() and grad.isfinite().all()
    assert loss.ours(both_s, t, y) == INF
    assert run(loss.ours, s, both_t, y)[1].isfinite().all()


@settings(max_examples=150, deadline=None, database=None)
@seed(1)
@given(
    loss=st.sampled_from(LOSSES),
    rows=st.integers(1, 5),
    vocab=st.integers(1, 6),
    values=st.lists(
        st.one_of(
            st.floats(-1e4, 1e4, width=32),
            st.sampled_from([0.0, 1.0, -1e4, 1e4, 200.0, 1e-30, 1e-7]),
        ),
        min_size=60,
        max_size=60,
    ),
    temperature=st.sampled_from([0.01, 1.0, 4.0, 1000.0]),
)
def test_nothing_is_nan_on_finite_logits(
    loss: Loss, rows: int, vocab: int, values: list[float], temperature: float
) -> None:
    s, t = torch.tensor(values).view(2, -1)[:, : rows * vocab].view(2, rows, vocab)
    y = torch.arange(rows) % vocab
    options = {"temperature": temperature} if loss.temperature else {}
    value, grad = run(loss.ours, s, t, y, **options)
    assert value.isfinite() and grad.isfinite().all()
    assert value >= -9e-6 * max(1.0, temperature**2)


@pytest.mark.parametrize("kind", [np.float32, Fraction])
def test_numbers_as_people_pass_them(kind: Any) -> None:
    s, t, y = torch.randn(5, 7), torch.randn(5, 7), torch.arange(5)
    cases: dict[Any, dict[str, float]] = {
        distill.dkd: {"alpha": 2.0, "beta": 0.5, "temperature": 4.0, "normalizer": 4.0},
        distill.nkd: {"gamma": 0.5, "temperature": 2.0},
        distill.zscore: {"temperature": 2.0},
        distill.dist: {"beta": 0.5, "gamma": 2.0, "temperature": 4.0},
        distill.uld_loss: {"temperature": 2.0},
    }
    for loss, options in cases.items():
        for name, value in options.items():
            plain = loss(s, t, labels=y, **{name: value})
            assert torch.equal(loss(s, t, labels=y, **{name: kind(value)}), plain), (loss, name)
