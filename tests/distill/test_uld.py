"""ULD: values, gradients and what holds by definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INF, INPUTS, Backend
from oracle import FLOORS, assert_gradients, assert_values, oracle, row_factor
from pairwise import pairwise
from sorted_losses import classes, plain, run, uld
from torch import Tensor

import fastkd
from fastkd.distill.losses import sorted_probabilities

WIDTHS = [(10, 14), (14, 10), (10, 10)]


def reduced(s: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Of the rows that count."""
    names = ("weight", "reduction", "normalizer")
    rows = {"reduction": "mean"} | {k: options.pop(k) for k in names if k in options}
    keep, factor = row_factor(s, y, **rows)
    value = plain(s[keep], t[keep], **options)
    value = value.new_zeros(keep.shape).masked_scatter(keep, value) * factor.to(value.dtype)
    return value if rows["reduction"] == "none" else value.sum()


def assert_right(s: Tensor, t: Tensor, y: Tensor, **options: Any) -> None:
    """The tolerance rule of all tests, for the value and the student's gradient."""
    value, grad = run(uld, s, t, y, **options)
    assert grad.dtype == s.dtype and grad.shape == s.shape
    theirs = run(reduced, s.to(value.dtype), t.to(value.dtype), y, **options)
    true = run(reduced, oracle(s), oracle(t), y, **options)
    assert_values(value, theirs[0], true[0])
    rounding = FLOORS[value.dtype] * 2 / options.get("temperature", 1.0)
    assert_gradients(grad, theirs[1], true[1], rounding)
    assert (grad[y == -100] == 0).all()


@pairwise
@pytest.mark.parametrize("name", [name for name in INPUTS if name != "ties"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("top", [None, 1, 4, 12, 99])
def test_value_and_gradient(
    backend: Backend, in_chunks: bool, name: str, widths: tuple[int, int], top: int | None
) -> None:
    s, t = (x.to(backend.device) for x in INPUTS[name](7, max(widths)))
    y = classes(7, 10).to(backend.device)
    for temperature in (1.0, 4.0, 1000.0):
        s, t = s[:, : widths[0]], t[:, : widths[1]]
        assert_right(s, t, y, temperature=temperature, top=top)


@pytest.mark.parametrize("vocab", [1, 2, 40_000])
@pytest.mark.parametrize("top", [None, 50])
def test_few_and_many_columns(vocab: int, top: int | None) -> None:
    s, t = INPUTS["random"](9, vocab)
    assert_right(s, t[:, : max(1, vocab - 7)], classes(9, 10) * 0 + 0, top=top)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(in_chunks: bool, dtype: torch.dtype) -> None:
    # far enough apart for no two logits of a row to be equal once rounded
    s, t = (x.argsort(-1).to(dtype) / 4 for x in INPUTS["random"](7, 10))
    t = t * 1.5
    value, grad = run(uld, s, t.float(), classes(7, 10))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_right(s, t.float(), classes(7, 10))


def test_equal_logits_take_the_ranks_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without NumPy's sort: the first of them is the lowest; either is a subgradient."""
    s, t = INPUTS["ties"](64, 33)
    s[0, :5] = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0])
    fast = run(uld, s, t)
    monkeypatch.setattr(sorted_probabilities, "_numpy", lambda: None)
    slow = run(uld, s, t)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-7)
    assert_values(fast[0], fast[0], reduced(oracle(s), oracle(t), torch.arange(64)))
    assert (fast[1].sum(-1).abs() < 1e-6).all()


def test_more_threads_change_no_bit() -> None:
    s, t = INPUTS["random"](7, 30_000)
    one = run(uld, s, t[:, :20_000])
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            several = run(uld, s, t[:, :20_000])
            assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(in_chunks: bool, reduction: str, weighted: bool) -> None:
    s, t = INPUTS["random"](7, 10)
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(7)
    elif reduction == "mean":
        options["normalizer"] = torch.tensor(3)
    assert_right(s, t[:, :8], classes(7, 10), **options)


def test_columns_in_use(in_chunks: bool) -> None:
    s, t = (x.view(2, 3, 14) for x in INPUTS["random"](6, 14))
    s[..., 8:], t[..., 11:] = math.nan, math.nan
    value, grad = run(uld, s, t, vocab_size=(8, 11), reduction="none")
    alone, its = run(uld, s[..., :8], t[..., :11], reduction="none")
    assert value.shape == (2, 3) and torch.equal(value, alone)
    assert torch.equal(grad[..., :8], its) and (grad[..., 8:] == 0).all()
    both = run(uld, s, t, vocab_size=8)[0]
    assert both == uld(s[..., :8], t[..., :8])


@pytest.mark.parametrize("vocab", [1, 7, 1000, 4099])
@pytest.mark.parametrize(
    ("dtype", "top"),  # with `top` a sum in float64 depends on its order
    [(torch.float64, None)]
    + [(dtype, top) for dtype in (torch.float32, torch.bfloat16) for top in (None, 3, 20)],
    ids=str,
)
def test_exactly_zero_between_permuted_vocabularies(
    vocab: int, dtype: torch.dtype, top: int | None
) -> None:
    s = INPUTS["random"](5, vocab)[0].to(dtype)
    t = s[:, torch.randperm(vocab)]
    for other in (t, F.pad(t, (3, 6), value=-INF)):
        for temperature in (0.1, 1.0, 3.0):
            value, grad = run(uld, s, other, temperature=temperature, top=top)
            assert value == 0 and (grad == 0).all()


def test_top_is_short_by_at_most_twice_the_smaller_rest(in_chunks: bool) -> None:
    s, t = (x.double() for x in INPUTS["random"](200, 50))
    q, p = (x.softmax(-1).sort(-1, descending=True).values for x in (s, t))
    whole = uld(s, t, reduction="none")
    for top in (1, 5, 25, 49):
        some = uld(s, t, top=top, reduction="none")
        short = 2 * torch.minimum(q[:, top:].sum(-1), p[:, top:].sum(-1))
        assert (some <= whole + 1e-12).all() and (whole <= some + short + 1e-12).all()
        assert (whole - some).max() > 0


@pytest.mark.parametrize("measured", [False, True])
def test_stored_teacher_is_the_teachers_top(in_chunks: bool, measured: bool) -> None:
    s, t = (x.double() for x in INPUTS["random"](7, 12))
    log, at = (t / 2).log_softmax(-1).topk(5)
    tail = torch.log1p(-log.exp().sum(-1)) if measured else None
    order = torch.randperm(5)
    stored = fastkd.TopK(log[:, order], at[:, order], tail_logprob=tail, temperature=2.0)
    for top in (None, 3, 9):
        ours = run(uld, s[:, :9], stored, classes(7, 9), temperature=2.0, top=top)
        true = run(uld, s[:, :9], t, classes(7, 9), temperature=2.0, top=min(top or 5, 5))
        torch.testing.assert_close(ours, true)


def test_stored_teacher_that_is_renormalized() -> None:
    """Padding has no mass, and another temperature is known."""
    s, t = (x.double() for x in INPUTS["random"](7, 12))
    log, at = t.log_softmax(-1).topk(5)
    at[:, 4] = -1
    stored = fastkd.TopK(log, at, tail="renormalize")
    true = run(uld, s, log[:, :4], temperature=3.0)
    torch.testing.assert_close(run(uld, s, stored, temperature=3.0), true)


@pytest.mark.parametrize(
    ("options", "temperature", "message"),
    [
        ({"tail": "drop"}, 1.0, "tail='drop', expected 'bucket' or 'renormalize'"),
        ({"tail": "restrict"}, 1.0, "tail='restrict', expected"),
        ({"temperature": 2.0}, 1.0, "temperature: got 1 with a teacher stored at 2"),
    ],
)
def test_stored_teacher_that_says_too_little(
    options: dict[str, Any], temperature: float, message: str
) -> None:
    stored = fastkd.TopK(torch.full((2, 1), -1.0), torch.zeros(2, 1, dtype=torch.long), **options)
    with pytest.raises(ValueError, match=message):
        uld(torch.zeros(2, 5), stored, temperature=temperature)


def test_stored_teacher_with_more_than_everything() -> None:
    """But in a row that is not read."""
    stored = fastkd.TopK(torch.tensor([[-1.0], [0.5]]), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logprobs: got a mass of 1.6\d* in row 1, expected"):
        uld(torch.zeros(2, 5), stored)
    assert uld(torch.zeros(2, 5), stored, torch.tensor([0, -100])).isfinite()
