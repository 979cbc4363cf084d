"""Stored teachers made of logits: the best columns, their tail, and samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INF, Backend
from stored_teachers import kept_of

import fastkd

# ---- from logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_topk_from_logits(backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    logits = (4 * torch.randn(2, 5, 700, device=backend.device)).to(dtype)
    kept = fastkd.topk_from_logits(logits, 11, temperature=temperature)
    full = F.log_softmax(logits.double() / temperature, -1)
    best = full.topk(11, -1)
    assert kept.shape == (2, 5, 11) and kept.indices.dtype == torch.int32
    torch.testing.assert_close(kept.logprobs.double(), best.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        full.gather(-1, kept.indices.long()), best.values, rtol=0.0, atol=1e-12
    )
    rest = full.scatter(-1, best.indices, -INF).logsumexp(-1)
    assert kept.tail_logprob is not None
    torch.testing.assert_close(kept.tail_logprob.double(), rest, rtol=1e-5, atol=1e-5)


def test_tail_is_measured_without_cancellation() -> None:
    logits = torch.full((1, 1000), -60.0)
    logits[0, 7] = 0.0
    kept = fastkd.topk_from_logits(logits, 1)
    assert kept.tail_logprob is not None
    assert float(kept.tail_logprob) == pytest.approx(-60 + math.log(999), rel=1e-6)
    everything = fastkd.topk_from_logits(logits, 1000)
    assert everything.tail_logprob is not None and float(everything.tail_logprob) == -INF


@pytest.mark.parametrize("method", ["top", "sample"])
def test_from_linear_logits(method: str) -> None:
    hidden, weight, bias = torch.randn(9, 6), torch.randn(50, 6), torch.randn(50)
    linear = fastkd.LinearLogits(hidden, weight, bias, scale=0.7, softcap=9.0)
    dense = torch.tanh(0.7 * F.linear(hidden, weight, bias) / 9.0) * 9.0
    made = [
        fastkd.topk_from_logits(x, 4, method=method, generator=torch.Generator().manual_seed(3))
        for x in (linear, dense)
    ]
    torch.testing.assert_close(made[0].logprobs, made[1].logprobs)
    assert torch.equal(made[0].indices, made[1].indices)


def test_samples_are_unbiased() -> None:
    """The mean of many draws' shares is p, and of kl_div's gradients (q - p)."""
    torch.manual_seed(11)
    p_logits, student = torch.randn(1, 12), torch.randn(1, 12).requires_grad_(True)
    many = p_logits.expand(20_000, 12)
    kept = fastkd.topk_from_logits(many, 6, method="sample")
    shares = torch.zeros(20_000, 13).scatter_add_(
        1, kept.indices.long().where(kept.indices >= 0, 12), kept.logprobs.exp()
    )[:, :12]
    torch.testing.assert_close(shares.sum(1), torch.ones(20_000))
    p = p_logits.softmax(-1)[0]
    error = (p * (1 - p) / 6 / 20_000).sqrt()
    assert bool(((shares.mean(0) - p).abs() < 5 * error).all())
    loss = fastkd.kl_div(student.expand(20_000, 12), kept)
    (grad,) = torch.autograd.grad(loss, student)
    exact = student.detach().softmax(-1)[0] - p
    assert bool(((grad[0] - exact).abs() < 5 * error + 1e-6).all())


@pytest.mark.parametrize(("vocab", "k"), [(7, 3), (64, 2), (101, 3), (1000, 4), (1000, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_draws_have_the_probabilities_of_the_columns(
    vocab: int, k: int, dtype: torch.dtype
) -> None:
    """chi^2 over the columns, in pieces of a row that do and do not divide it, and without them."""
    generator = torch.Generator().manual_seed(vocab + k)
    logits = (2 * torch.randn(vocab, generator=generator)).to(dtype)
    logits[::5] = -INF
    rows = 60_000 // k
    kept = fastkd.topk_from_logits(
        logits.expand(rows, vocab), k, method="sample", temperature=1.5, generator=generator
    )
    assert torch.equal(
        (kept.logprobs.double().exp() * k).round().sum(-1), torch.full((rows,), float(k)).double()
    )
    columns = kept.indices.long()
    counts = torch.zeros(vocab + 1, dtype=torch.float64)
    shares = kept.logprobs.double().exp() * k
    counts.index_add_(0, columns.where(columns >= 0, vocab).flatten(), shares.flatten())
    p = (logits.double() / 1.5).softmax(-1)
    assert not counts[:vocab][p == 0].any() and not counts[vocab]
    expected = p * rows * k
    often = expected > 5  # and what is rarer as one
    found, wanted = (
        torch.cat([x[often], x[~often].sum().view(1)]) for x in (counts[:vocab], expected)
    )
    degrees = int(often.sum()) - int(p[~often].sum() == 0)
    chi = float(((found - wanted).square() / wanted.clamp_min(1e-30)).sum())
    # Wilson and Hilferty's normal approximation; 4.5 of it is 3e-6
    normal = ((chi / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
    assert abs(normal) < 4.5, f"chi^2 {chi:.1f} of {degrees} degrees"


def test_draws_are_those_of_the_generator_alone() -> None:
    """Not of the threads, nor of the other rows; pieces or not, they invert one function."""
    x = torch.randn(40, 999, generator=torch.Generator().manual_seed(1))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        draw = torch.Generator().manual_seed(7)
        found.append(fastkd.topk_from_logits(x, 5, method="sample", generator=draw))
    torch.set_num_threads(threads)
    assert torch.equal(found[0].indices, found[1].indices)
    assert torch.equal(found[0].logprobs, found[1].logprobs)
    uniform = torch.rand(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    below = x.double().softmax(-1).cumsum(-1)
    for row, drawn in enumerate(torch.searchsorted(below, uniform, right=True)):
        assert found[0].indices[row][found[0].indices[row] >= 0].tolist() == sorted(
            {*drawn.tolist()}
        )


def test_a_row_without_probabilities_is_nan_when_sampled() -> None:
    for vocab in (5, 100):
        x = torch.zeros(3, vocab)
        x[0, 2], x[1] = math.nan, -INF
        kept = fastkd.topk_from_logits(x, 2, method="sample")
        assert kept.logprobs.isnan().all(-1).tolist() == [True, True, False]
        assert int(kept.indices.max()) < vocab


def test_samples_of_a_certain_teacher() -> None:
    logits = torch.full((2, 5), -INF)
    logits[:, 3] = 1.0
    kept = fastkd.topk_from_logits(logits, 4, method="sample")
    assert kept.indices.tolist() == [[3, -1, -1, -1]] * 2
    assert kept.logprobs[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("k: got 0", ValueError, {"k": 0}),
        ("k: got 6, expected 1 <= k <= 5", ValueError, {"k": 6}),
        ("k: got bool", TypeError, {"k": True}),
        ("method: got 'best'", ValueError, {"k": 2, "method": "best"}),
        ("temperature: got -1", ValueError, {"k": 2, "temperature": -1}),
        ("vocab_size: got 9", ValueError, {"k": 2, "vocab_size": 9}),
    ],
)
def test_topk_from_logits_refuses(
    message: str, error: type[Exception], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        fastkd.topk_from_logits(torch.randn(2, 5), **options)


def test_moves_slices_and_says_what_it_is() -> None:
    kept = kept_of(tail_logprob=[-2.0, -3.0])
    row = kept[1]
    assert row.shape == (2,) and row.tail_logprob is not None and float(row.tail_logprob) == -3.0
    assert kept.to("cpu").tail == "bucket" and kept.detach().dtype == torch.float32
    assert repr(kept) == (
        "TopK([2, 2] of torch.float32, temperature=1, tail='bucket', tail_logprob)"
    )
    with pytest.raises(IndexError):
        kept[:, :1]
