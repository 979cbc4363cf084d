"""Stored teachers that no loss can take: refused with what is wrong, or NaN in their row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import TABLE, Backend, label_of
from stored_teachers import kept_of
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence
from fastkd.operands import TAILS

# ---- bad input


def test_refused_operands() -> None:
    p, i = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    for what, error, build in (
        ("logprobs: got list", TypeError, lambda: fastkd.TopK([0.0], i)),
        ("logprobs: got a tensor", TypeError, lambda: fastkd.TopK(i, i)),
        ("logprobs: got shape", ValueError, lambda: fastkd.TopK(p[:, :0], i[:, :0])),
        ("indices: got a tensor", TypeError, lambda: fastkd.TopK(p, i.float())),
        ("indices: got a tensor", TypeError, lambda: fastkd.TopK(p, i.to(torch.int16))),
        ("indices: got shape", ValueError, lambda: fastkd.TopK(p, i[:1])),
        ("tail_logprob: got shape", ValueError, lambda: fastkd.TopK(p, i, tail_logprob=p)),
        ("tail: got 'rest'", ValueError, lambda: fastkd.TopK(p, i, tail="rest")),
        ("temperature: got 0", ValueError, lambda: fastkd.TopK(p, i, temperature=0)),
        ("temperature: got str", TypeError, lambda: fastkd.TopK(p, i, temperature="1")),
    ):
        with pytest.raises(error, match=what):
            build()


REFUSED: dict[str, tuple[str, Callable[[], fastkd.TopK]]] = {
    "index": (
        "indices: got 5 in row 1, place 0",
        lambda: kept_of(indices=torch.tensor([[0, 3], [5, 1]]), tail="drop"),
    ),
    "negative": ("indices: got -2", lambda: kept_of(indices=torch.tensor([[0, 3], [4, -2]]))),
    "twice": ("for the second time", lambda: kept_of(indices=torch.tensor([[0, 3], [4, 4]]))),
    "positive": (
        "got 0.5 in row 1, place 1, expected a log-probability",
        lambda: kept_of(logprobs=torch.tensor([[-1.0, -2.0], [-9.0, 0.5]])),
    ),
    "nan": (
        "got nan in row 0",
        lambda: kept_of(logprobs=torch.tensor([[-1.0, torch.nan], [-1.0, -2.0]])),
    ),
    "mass": ("a mass of 1.2", lambda: kept_of(logprobs=torch.tensor([[-1.0, -2.0], [-0.1, -1.1]]))),
    "tail": (
        "tail_logprob: got 0.5 in row 0",
        lambda: kept_of(tail_logprob=torch.tensor([0.5, -1.0])),
    ),
    "empty": (
        "no column with a probability above 0 in row 1",
        lambda: kept_of(indices=torch.tensor([[0, 3], [-1, -1]]), tail="restrict"),
    ),
    "rows": ("teacher: got shape", lambda: kept_of()[:1]),
    "temperature": (
        "temperature: got 1 with a teacher stored at 2",
        lambda: kept_of(temperature=2.0),
    ),
}


@pytest.mark.interpreted(len(REFUSED))
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_loss(backend: Backend, name: str) -> None:
    message, make = REFUSED[name]
    student = torch.randn(2, 5, device=backend.device)
    before = student.clone()
    with fastkd.checked(), pytest.raises(ValueError, match=message):
        fastkd.kl_div(student, make().to(backend.device), inplace=True)
    assert torch.equal(student, before)


@pytest.mark.interpreted(24)
@pytest.mark.parametrize("divergence", TABLE, ids=label_of)
@pytest.mark.parametrize("tail", TAILS)
def test_unchecked_indices_make_their_row_nan(
    backend: Backend, divergence: Divergence, tail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: nothing is read out of bounds."""
    monkeypatch.setattr("fastkd.engine.topk_rows.reads_values", lambda device: False)
    student = torch.randn(2, 5, device=backend.device, requires_grad=True)
    # the good row names all that it may not exclude: reverse_kl has no +inf
    indices = [[0, 1, 2, 3, 4], [-2 if tail == "bucket" else 5, 1, 0, 2, 3]]
    logprobs = torch.full((2, 5), 0.15).log()
    bad = fastkd.TopK(logprobs, torch.tensor(indices), tail=tail).to(backend.device)
    loss = fastkd.distillation_loss(
        student, bad, alpha=0.0, temperature=1.0, divergence=divergence, reduction="none"
    )
    assert loss[0].isfinite() and loss[1].isnan()
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad[0].isfinite().all() and grad[1].isnan().all()


def test_unchecked_indices_make_their_row_nan_compiled() -> None:
    student = torch.randn(2, 5, requires_grad=True)
    bad = kept_of(indices=[[0, 3], [-2, 1]])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return fastkd.reverse_kl_div(x, bad, reduction="none")

    loss = step(student)
    assert loss[0].isfinite() and loss[1].isnan()
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad[0].isfinite().all() and grad[1].isnan().all()


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_another_temperature_is_refused(tail: str) -> None:
    kept = kept_of(temperature=2.0, tail=tail)
    with pytest.raises(ValueError, match="stored at 2 and tail="):
        fastkd.kl_div(torch.randn(2, 5), kept, temperature=1.5)


def test_renormalized_at_another_temperature_is_exact(backend: Backend) -> None:
    teacher = 3 * torch.randn(4, 30, device=backend.device)
    student = torch.randn(4, 30, device=backend.device)
    kept = fastkd.topk_from_logits(teacher, 5, temperature=2.0, tail="renormalize")
    again = fastkd.topk_from_logits(teacher, 5, temperature=0.7, tail="renormalize")
    ours, expected = (fastkd.kl_div(student, x, temperature=0.7) for x in (kept, again))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_vocab_size_bounds_the_indices(backend: Backend) -> None:
    student = torch.randn(2, 9, device=backend.device, requires_grad=True)
    kept = kept_of().to(backend.device)
    padded = fastkd.kl_div(student, kept, vocab_size=5)
    torch.testing.assert_close(padded, fastkd.kl_div(student[:, :5].contiguous(), kept))
    (grad,) = torch.autograd.grad(padded, student)
    assert not grad[:, 5:].any()
    with pytest.raises(ValueError, match="vocab_size: got 10"):
        fastkd.kl_div(student, kept, vocab_size=10)
