"""The table of divergences: mathematics in float64, no kernels."""

from __future__ import annotations

import math

import pytest
import torch
from common import DIVERGENCES, TABLE, each_divergence, each_name, label_of
from oracle import PLAIN
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import fastkd
from fastkd.backends import formulas
from fastkd.backends.base import LossSpec
from fastkd.divergence import Divergence

DOUBLE = {"dtype": torch.float64}


def _sides(n: int = 6, v: int = 23) -> tuple[Tensor, Tensor]:
    """log p, log q."""
    return (2 * torch.randn(n, v, **DOUBLE)).log_softmax(-1), torch.randn(
        n, v, **DOUBLE
    ).log_softmax(-1)


def _sum(divergence: Divergence, logp: Tensor, logq: Tensor) -> Tensor:
    return divergence.row_loss(divergence.value(logp, logq, divergence.param).sum(-1))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return kl_divergence(Categorical(p), Categorical(q))


# the table of the design in probabilities, by torch.distributions where it has the function
IN_PROBABILITIES = {
    "kl": lambda p, q, _: _kl(p, q),
    "reverse_kl": lambda p, q, _: _kl(q, p),
    "js": lambda p, q, b: b * _kl(p, b * p + (1 - b) * q) + (1 - b) * _kl(q, b * p + (1 - b) * q),
    "skew_kl": lambda p, q, a: _kl(p, a * p + (1 - a) * q),
    "skew_reverse_kl": lambda p, q, a: _kl(q, (1 - a) * p + a * q),
    "tv": lambda p, q, _: 0.5 * torch.cdist(p.unsqueeze(1), q.unsqueeze(1), p=1.0).flatten(),
    "acceptance": lambda p, q, _: -torch.log1p(-0.5 * (p - q).abs().sum(-1)),
}


IN_TABLE = [each for each in DIVERGENCES if each.name in IN_PROBABILITIES]
SYMMETRIC = [fastkd.divergences[name] for name in ("js", "tv", "acceptance")]
EXPECTATIONS = [entry for entry in TABLE if entry.expectation]


@pytest.mark.parametrize("divergence", IN_TABLE, ids=label_of)
def test_value_is_its_definition(divergence: Divergence) -> None:
    logp, logq = _sides()
    exact = IN_PROBABILITIES[divergence.name](logp.exp(), logq.exp(), divergence.param)
    torch.testing.assert_close(_sum(divergence, logp, logq), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("divergence", IN_TABLE, ids=label_of)
def test_oracle_is_its_definition(divergence: Divergence) -> None:
    """The plain formula of the tests, against the same definition."""
    logp, logq = _sides()
    exact = IN_PROBABILITIES[divergence.name](logp.exp(), logq.exp(), divergence.param)
    ours = PLAIN[divergence.name](logp, logq, divergence.param)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


@each_divergence
def test_is_never_negative(divergence: Divergence) -> None:
    assert (_sum(divergence, *_sides(200)) > 0).all()


@each_divergence
def test_is_zero_where_the_sides_agree(divergence: Divergence) -> None:
    logp, _ = _sides()
    assert _sum(divergence, logp, logp).abs().max() < 1e-15


@each_divergence
def test_centre_is_the_slope_per_unit_of_q_at_agreement(divergence: Divergence) -> None:
    logp, _ = _sides()
    logq = logp.clone().requires_grad_()
    (slope,) = torch.autograd.grad(_sum(divergence, logp, logq).sum(), logq)
    centre = divergence.centre(divergence.param) * logp.exp()
    torch.testing.assert_close(slope, centre, rtol=1e-12, atol=1e-14)


@each_divergence
def test_gradient_is_slope_minus_q_times_sum_of_slopes(divergence: Divergence) -> None:
    """The identity that everything stands on: dL/ds_j = (g_j - q_j sum g) / T."""
    temperature = 3.0
    s = (4 * torch.randn(5, 31, **DOUBLE)).requires_grad_()
    logp = torch.randn(5, 31, **DOUBLE).log_softmax(-1)
    logq = (s / temperature).log_softmax(-1)
    loss = _sum(divergence, logp, logq).sum()
    grad, slope = torch.autograd.grad(loss, (s, logq))
    q = logq.detach().exp()
    for g in (slope, slope - divergence.centre(divergence.param) * q):
        identity = (g - q * g.sum(-1, keepdim=True)) / temperature
        torch.testing.assert_close(identity, grad, rtol=1e-12, atol=1e-15)


WITH_DUAL = ("kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl", "tv", "acceptance")


@each_divergence
def test_dual_is_the_same_with_the_sides_exchanged(divergence: Divergence) -> None:
    logp, logq = _sides()
    dual = divergence.exchanged()
    if dual is None:  # may be so of a new one
        assert divergence.name not in WITH_DUAL
        return
    torch.testing.assert_close(
        _sum(dual, logq, logp), _sum(divergence, logp, logq), rtol=1e-12, atol=1e-15
    )
    again = dual.exchanged()
    assert again is not None and again.name == divergence.name
    assert again.param == pytest.approx(divergence.param, abs=1e-15)


@pytest.mark.parametrize("divergence", EXPECTATIONS, ids=label_of)
def test_expectation_is_the_mean_of_the_log_ratio(divergence: Divergence) -> None:
    logp, logq = _sides()
    of_teacher = divergence.expectation == "teacher"
    weight, ratio = (logp.exp(), logp - logq) if of_teacher else (logq.exp(), logq - logp)
    torch.testing.assert_close(_sum(divergence, logp, logq), (weight * ratio).sum(-1))


@pytest.mark.parametrize(
    ("small", "per", "limit"),
    [
        ("js", "beta", "kl"),
        ("skew_kl", None, "kl"),
        ("skew_reverse_kl", None, "reverse_kl"),
    ],
)
def test_limit_of_a_small_parameter(small: str, per: str | None, limit: str) -> None:
    logp, logq = _sides()
    tiny = 1e-7
    entry = fastkd.divergences[small]
    value = _sum(entry(**{str(entry.parameter): tiny}), logp, logq)
    value = value / tiny if per else value
    torch.testing.assert_close(
        value, _sum(fastkd.divergences[limit], logp, logq), rtol=1e-4, atol=0
    )


def test_limit_of_js_at_one_is_reverse_kl() -> None:
    logp, logq = _sides()
    value = _sum(fastkd.divergences.js(beta=1 - 1e-7), logp, logq) / 1e-7
    torch.testing.assert_close(
        value, _sum(fastkd.divergences.reverse_kl, logp, logq), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("divergence", SYMMETRIC, ids=label_of)
def test_symmetry(divergence: Divergence) -> None:
    logp, logq = _sides()
    torch.testing.assert_close(_sum(divergence, logp, logq), _sum(divergence, logq, logp))


@pytest.mark.parametrize(
    ("divergence", "bound"),
    [
        (fastkd.divergences.tv, 1.0),
        (fastkd.divergences.acceptance, 100 * math.log(2)),
        (fastkd.divergences.js, math.log(2)),
        (fastkd.divergences.skew_kl(alpha=0.1), -math.log(0.1)),
        (fastkd.divergences.skew_reverse_kl(alpha=0.1), -math.log(0.1)),
    ],
    ids=lambda value: label_of(value) if isinstance(value, Divergence) else f"{value:.2f}",
)
def test_bound_is_reached_on_disjoint_supports(divergence: Divergence, bound: float) -> None:
    logp = torch.tensor([0.0, -math.inf], **DOUBLE)
    value = divergence.row_loss(formulas.pointwise(divergence, logp, logp.flip(0)).sum())
    assert value.item() == pytest.approx(bound, rel=1e-14)


def test_table_is_read_by_name_and_by_attribute() -> None:
    assert list(fastkd.divergences) == [entry.name for entry in TABLE]
    for name in fastkd.divergences:
        assert fastkd.divergences[name] is getattr(fastkd.divergences, name)
        assert name in fastkd.divergences and name in dir(fastkd.divergences)
    assert "nonsense" not in fastkd.divergences


@each_name
def test_entry_names_its_source(divergence: Divergence) -> None:
    assert "arXiv" in divergence.source


@pytest.mark.parametrize("name", [entry.name for entry in TABLE if entry.parameter])
def test_call_sets_the_parameter_of_a_copy(name: str) -> None:
    entry = fastkd.divergences[name]
    given = entry(**{str(entry.parameter): 0.25})
    assert given.param == 0.25 and entry.param == entry.default and 0 < entry.default < 1


@each_divergence
def test_reference_finds_the_entry_of_a_spec(divergence: Divergence) -> None:
    spec = LossSpec(divergence.name, divergence.param, 1.0, 1.0, 0.0, 0.0, 7, 7)
    assert label_of(formulas.entry(spec)) == label_of(divergence)
