"""Linear logits: bad input, the size of a chunk, and how much memory a loss takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import imported_anew
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd import LinearLogits
from fastkd.backends import base
from fastkd.backends.base import ALIGN, chunk_rows, chunks
from fastkd.backends.products import multiplied_in
from fastkd.demo.memory import allocated_peak
from fastkd.engine.linear import WEIGHT

sys.path.append(str(Path(__file__).parents[2]))  # bench is no part of the installed package


N, V, H = 4, 9, 5
INF = float("inf")
CPU = torch.device("cpu")


BAD: dict[str, tuple[type[Exception], list[str], dict[str, Any]]] = {
    "hidden-a-list": (TypeError, ["hidden", "list", r"[..., H]"], {"hidden": [1.0]}),
    "weight-a-module": (
        TypeError,
        ["weight", "Linear", "[V, H]"],
        {"weight": torch.nn.Linear(H, V)},
    ),
    "bias-a-bool": (TypeError, ["bias", "bool True", "[V]"], {"bias": True}),
    "hidden-integers": (
        TypeError,
        ["hidden", "torch.int64", "float32"],
        {"hidden": torch.ones(N, H).long()},
    ),
    "weight-float8": (
        TypeError,
        ["weight", "float8"],
        {"weight": torch.ones(V, H).to(torch.float8_e4m3fn)},
    ),
    "weight-sparse": (
        TypeError,
        ["weight", "sparse", "dense"],
        {"weight": torch.eye(V, H).to_sparse()},
    ),
    "hidden-0-d": (ValueError, ["hidden", "[]", "H >= 1"], {"hidden": torch.tensor(1.0)}),
    "hidden-of-no-size": (ValueError, ["hidden", "[4, 0]", "H >= 1"], {"hidden": torch.ones(N, 0)}),
    "weight-1-d": (ValueError, ["weight", "[5]", "[V, H]"], {"weight": torch.ones(H)}),
    "weight-of-another-size": (
        ValueError,
        ["weight", "[9, 6]", "[V, 5]", "[4, 5]"],
        {"weight": torch.ones(V, 6)},
    ),
    "weight-transposed": (ValueError, ["weight", "[5, 9]", "[V, 5]"], {"weight": torch.ones(H, V)}),
    "bias-of-another-size": (
        ValueError,
        ["bias", "[5]", "[9]", "[9, 5]"],
        {"bias": torch.ones(H)},
    ),
    "weight-elsewhere": (
        ValueError,
        ["weight", "meta", "cpu"],
        {"weight": torch.ones(V, H, device="meta")},
    ),
    "bias-elsewhere": (ValueError, ["bias", "meta", "cpu"], {"bias": torch.ones(V, device="meta")}),
    "two-dtypes": (
        TypeError,
        ["weight", "torch.bfloat16", "torch.float32", "autocast"],
        {"weight": torch.ones(V, H).bfloat16()},
    ),
    "scale-zero": (ValueError, ["scale", "0.0", "other than 0"], {"scale": 0.0}),
    "scale-infinite": (ValueError, ["scale", "inf"], {"scale": INF}),
    "scale-nan": (ValueError, ["scale", "nan"], {"scale": float("nan")}),
    "scale-a-tensor": (
        TypeError,
        ["scale", "a tensor", "multiply hidden"],
        {"scale": torch.tensor(2.0)},
    ),
    "softcap-zero": (ValueError, ["softcap", "0", "positive"], {"softcap": 0}),
    "softcap-negative": (ValueError, ["softcap", "-30.0", "positive"], {"softcap": -30.0}),
    "softcap-text": (TypeError, ["softcap", "'30'", "number"], {"softcap": "30"}),
    "chunk-size-zero": (ValueError, ["chunk_size", "0", "at least 1"], {"chunk_size": 0}),
    "chunk-size-negative": (ValueError, ["chunk_size", "-1", "at least 1"], {"chunk_size": -1}),
    "chunk-size-a-float": (TypeError, ["chunk_size", "4.0", "rows"], {"chunk_size": 4.0}),
    "chunk-size-a-bool": (TypeError, ["chunk_size", "True", "rows"], {"chunk_size": True}),
}


@pytest.mark.parametrize(("error", "says", "arguments"), BAD.values(), ids=BAD.keys())
def test_refused_when_it_is_made(
    error: type[Exception], says: list[str], arguments: dict[str, Any]
) -> None:
    good = {"hidden": torch.ones(N, H), "weight": torch.ones(V, H)}
    with pytest.raises(error) as caught:
        LinearLogits(**{**good, **arguments})
    for part in (*says, "expected"):
        assert part in str(caught.value)


def _made(n: int = N, v: int = V, device: str = "cpu") -> LinearLogits:
    return LinearLogits(torch.ones(n, H, device=device), torch.ones(v, H, device=device))


PAIRS = {
    "vocabularies": (_made(v=10), ["10 columns", "student's 9", "vocab_size"]),
    "rows": (_made(n=3), ["[3, 9]", "[4, 9]"]),
    "devices": (_made(device="meta"), ["meta", "student's cpu"]),
    "given-vocabulary": (torch.ones(N, 10), ["10 columns", "student's 9"]),
    "given-rows": (torch.ones(3, V), ["[3, 9]", "[4, 9]"]),
}


@pytest.mark.parametrize(("teacher", "says"), PAIRS.values(), ids=PAIRS.keys())
def test_refused_beside_the_other_side(teacher: Any, says: list[str]) -> None:
    for loss in (fastkd.kl_div, fastkd.distillation_loss):
        with pytest.raises(ValueError, match="teacher") as caught:
            loss(_made(), teacher, **({} if loss is fastkd.kl_div else {"alpha": 0.0}))
        for part in says:
            assert part in str(caught.value)


def test_no_vocabulary_is_refused_unless_other_ranks_have_one() -> None:
    empty = fastkd.LinearLogits(torch.ones(2, H), torch.ones(0, H))
    with pytest.raises(ValueError, match=r"student.weight: got \[0, 5\], expected V >= 1"):
        fastkd.kl_div(empty, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"vocab_size": 10}, ValueError, "vocab_size: got 10.*student has 9 columns"),
        ({"labels": torch.ones(3).long()}, ValueError, r"labels: got shape \[3\], expected \[4\]"),
        ({"labels": torch.full((N,), 9)}, ValueError, "labels: got 9 in row 0"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"group": object()}, RuntimeError, "group"),
        ({"chunk_size": 3}, TypeError, "unexpected option 'chunk_size'"),
    ],
    ids=["vocab_size", "labels", "label", "temperature", "group", "chunk_size"],
)
def test_options_are_checked_as_ever(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        fastkd.kl_div(_made(), _made(), **options)


def test_repr_says_what_it_stands_for() -> None:
    head = LinearLogits(torch.ones(2, 3, H), torch.ones(V, H), torch.ones(V), scale=0.5, softcap=30)
    assert (
        repr(head) == "LinearLogits([2, 3, 9] of torch.float32, H=5, bias, scale=0.5, softcap=30)"
    )
    assert head.shape == (2, 3, 9) and head.dim() == 3 and head.numel() == 54 and head.size(-1) == 9


# ---- the size of a chunk


def test_rows_of_a_chunk() -> None:
    budget, (least, _) = chunks(CPU)
    row = 1024
    fits = budget // row
    assert chunk_rows(10, row, CPU, None) == 10  # all in one
    assert chunk_rows(0, row, CPU, None) == 1
    assert chunk_rows(fits, row, CPU, None) == fits
    assert chunk_rows(10**9, budget, CPU, None) == least
    assert chunk_rows(1000, row, CPU, 7) == 7 and chunk_rows(5, row, CPU, 7) == 5
    # more than fits is cut evenly: no short last chunk
    size = chunk_rows(fits + 1, row, CPU, None)
    assert fits // 2 < size <= fits // 2 + ALIGN and size % ALIGN == 0
    # up to twice the budget, so as not to pass 8 chunks
    assert -(-12 * fits // chunk_rows(12 * fits, row, CPU, None)) == 8
    assert chunk_rows(1000 * fits, row, CPU, None) <= 2 * fits
    # narrow rows on a GPU: no more of them than a product gains by
    gpu = torch.device("cuda", 0)
    most = chunks(gpu).rows[1]
    assert chunk_rows(10 * most, 1, gpu, None) == most


def test_the_smaller_chunk_of_two_sides_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.engine import dispatch

    made = [
        LinearLogits(torch.ones(N, H), torch.ones(V, H), chunk_size=size) for size in (3, None, 2)
    ]
    assert dispatch._chunk((made[0], made[2])) == 2
    assert dispatch._chunk((made[0], made[1])) == 3
    assert dispatch._chunk((None, made[1])) is None


@pytest.mark.parametrize(
    ("text", "said"), [("3", 3), ("0", "FASTKD_CHUNK: got '0'"), ("many", "'many'")]
)
def test_chunk_in_the_environment(
    text: str, said: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read as the package is imported."""
    monkeypatch.setenv("FASTKD_CHUNK", text)
    if isinstance(said, str):
        with pytest.raises(ValueError, match=said):
            base._in_environment()
        return
    assert base._in_environment() == said
    anew = imported_anew("fastkd.backends.base")
    assert anew.chunk_rows(100, 8, torch.device("cpu"), None) == said


# ---- memory


def _width(v: int) -> int:
    return -(-v // ALIGN) * ALIGN


@pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 32])
@pytest.mark.parametrize("ignored", [False, True], ids=["all-rows", "some-rows"])
def test_memory_is_two_chunks_and_the_gradients(
    dtype: torch.dtype, chunk_size: int | None, ignored: bool
) -> None:
    """Measured, of a training step: 5 % above them at most, and far from the logits' own size."""
    n, v, hs, ht = 128, 24_001, 32, 24
    hidden = torch.randn(n, hs).to(dtype).requires_grad_()
    weight = torch.randn(v, hs).to(dtype).requires_grad_()
    hidden_t, weight_t = torch.randn(n, ht).to(dtype), torch.randn(v, ht).to(dtype)
    labels = torch.randint(v, (n,)).masked_fill(torch.rand(n) < 0.3, -100) if ignored else None

    def step() -> tuple[Tensor, ...]:
        student = LinearLogits(hidden, weight, chunk_size=chunk_size)
        loss = fastkd.kl_div(student, LinearLogits(hidden_t, weight_t), labels=labels)
        return torch.autograd.grad(loss, (hidden, weight))

    step()
    rows = chunk_size or n
    products = multiplied_in(dtype, hidden.device)
    buffers = 2 * rows * _width(v) * products.itemsize
    if products != dtype:
        buffers += min(WEIGHT, weight.numel()) * products.itemsize  # a part of it, converted
    gradients = (hidden.numel() + weight.numel()) * dtype.itemsize
    if dtype.itemsize < 4 and rows < n:
        gradients += weight.numel() * 4  # the sum over chunks in float32, before it is rounded
    peak = allocated_peak(step)
    assert peak <= 1.05 * (buffers + gradients)
    if chunk_size is not None:
        assert peak < 2 * n * v * dtype.itemsize  # what the logits alone would take


def test_nothing_is_kept_of_frozen_parts() -> None:
    n, v, h = 256, 20_001, 128
    hidden = torch.randn(n, h).requires_grad_()
    weight = torch.randn(v, h)

    def step() -> tuple[Tensor, ...]:
        sides = (LinearLogits(x, weight, chunk_size=32) for x in (hidden, hidden.detach()))
        return torch.autograd.grad(fastkd.kl_div(*sides), hidden)

    step()
    assert allocated_peak(step) <= 1.05 * 4 * (2 * 32 * _width(v) + hidden.numel())
