"""k1 and k3: over all tokens of a tiny vocabulary, their means are the divergences, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import distill

N, V = 3, 6


def operands(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(N, V, dtype=torch.float64, generator=generator) for _ in range(2))
    return s.requires_grad_(), t


def over_all_tokens(s: Tensor, t: Tensor, wrote: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Mean of value and gradient over y ~ softmax(wrote): every token once, by its probability."""
    rows, labels = s[:, None].expand(N, V, V), torch.arange(V).expand(N, V)
    loss = distill.sampled_reverse_kl(
        rows, t.log_softmax(-1), labels, weight=wrote.softmax(-1), reduction="none", **options
    ).sum()
    return loss.detach(), torch.autograd.grad(loss, s)[0]


def exact(function: Any, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    loss = function(s, t, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("older", [False, True])
def test_k1_is_reverse_kl_on_average_value_and_gradient(older: bool) -> None:
    s, t = operands()
    wrote = operands(seed=1)[0].detach() if older else s.detach()
    options = {"sampled_logprob": wrote.log_softmax(-1)} if older else {}
    found = over_all_tokens(s, t, wrote, estimator="k1", **options)
    torch.testing.assert_close(found, exact(fastkd.reverse_kl_div, s, t))


@pytest.mark.parametrize("older", [False, True])
def test_k3_has_the_value_of_reverse_kl_and_the_gradient_of_forward_kl(older: bool) -> None:
    s, t = operands()
    wrote = operands(seed=1)[0].detach() if older else s.detach()
    options = {"sampled_logprob": wrote.log_softmax(-1)} if older else {}
    value, gradient = over_all_tokens(s, t, wrote, estimator="k3", **options)
    torch.testing.assert_close(value, exact(fastkd.reverse_kl_div, s, t)[0])
    torch.testing.assert_close(gradient, exact(fastkd.kl_div, s, t)[1])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_formulas_rows_and_operands(estimator: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 4, 5), torch.randn(V, 5)
    labels = torch.randint(V, (2, 4))
    labels[0, 1] = labels[1, 3] = -100
    log_p = torch.randn(2, 4, V).log_softmax(-1)
    at = labels.clamp_min(0)[..., None]
    own = log_p.gather(-1, at)[..., 0]
    own[0, 1] = torch.nan  # of a row that does not count
    logits = (hidden @ weight.T).requires_grad_()
    log_q = logits.log_softmax(-1).gather(-1, at)[..., 0]
    ratio = (own - log_q).exp()
    rows = log_q - own if estimator == "k1" else ratio - 1 - ratio.log()
    expected = rows[labels != -100].mean()
    indices = torch.stack((labels, (labels + 1) % V), -1).masked_fill(labels[..., None] < 0, -1)
    named = fastkd.TopK(torch.stack((own.nan_to_num(), own.nan_to_num() - 1), -1), indices)
    for student in (logits, fastkd.LinearLogits(hidden, weight)):
        for teacher in (own, named):
            found = distill.sampled_reverse_kl(student, teacher, labels, estimator=estimator)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    distill.sampled_reverse_kl(logits, own, labels, estimator=estimator).backward()
    assert logits.grad is not None and not logits.grad[labels == -100].any()
    assert logits.grad[labels != -100].abs().sum(-1).min() > 0
    several = labels.clone()  # two labels that do not count
    several[1, 3] = V + 5
    call = {"estimator": estimator, "ignore_index": (-100, V + 5)}
    found = distill.sampled_reverse_kl(logits, own, several, **call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # k3 of two near rows is small and not below 0
    near = log_q.detach() + 1e-5
    small = distill.sampled_reverse_kl(logits, near, labels, estimator="k3", reduction="none")
    assert 0 <= small.min() and small.max() < 1e-8


def test_what_is_no_sampled_token() -> None:
    s, labels = torch.randn(2, V), torch.tensor([1, 2])
    lacking = fastkd.TopK(torch.zeros(2, 1) - 1, torch.tensor([[1], [3]]))
    for teacher, options, kind, text in [
        (torch.zeros(2), {"estimator": "k2"}, ValueError, "estimator: got 'k2'"),
        (torch.zeros(2, V), {}, ValueError, r"teacher: got \[2, 6\], expected \[2\]"),
        (torch.zeros(2).long(), {}, TypeError, "teacher: got a tensor"),
        (lacking, {}, ValueError, r"does not name the label 2 of row \[1\]"),
        (torch.zeros(2), {"sampled_logprob": torch.zeros(3)}, ValueError, "sampled_logprob: got"),
        (torch.zeros(2), {"temperature": 2.0}, TypeError, "temperature"),
    ]:
        with pytest.raises(kind, match=text):
            distill.sampled_reverse_kl(s, teacher, labels, **options)  # type: ignore[arg-type]
