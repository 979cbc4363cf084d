"""Habits at the losses' face: numbers of numpy, soft and multi-hot labels, losses that are 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from common import NAMED, require
from torch import Tensor

import fastkd
from fastkd import nn

each_loss = pytest.mark.parametrize("loss", NAMED.values(), ids=lambda loss: loss.__name__)
LABELS = torch.tensor([0, 1, 2])


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape or (3, 5)), torch.randn(shape or (3, 5))


# ---- numbers

NUMBERS: dict[str, Callable[[float], Any]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "array": np.array,
    "fraction": Fraction,
}


@pytest.mark.parametrize("kind", NUMBERS)
@each_loss
def test_a_temperature_is_any_real_number(loss: Any, kind: str) -> None:
    s, t = pair()
    got = loss(s, t, temperature=NUMBERS[kind](4), normalizer=NUMBERS[kind](2))
    assert float(got) == float(loss(s, t, temperature=4.0, normalizer=2.0))


@pytest.mark.parametrize("kind", ["float32", "float16", "array", "fraction"])
def test_shares_are_any_real_number(kind: str) -> None:
    s, t = pair()
    half = NUMBERS[kind](0.5)
    options: dict[str, Any] = dict(alpha=half, label_smoothing=half, temperature=half)
    plain: dict[str, Any] = dict.fromkeys(options, 0.5)
    want = float(fastkd.distillation_loss(s, t, LABELS, **plain))
    assert float(fastkd.distillation_loss(s, t, LABELS, **options)) == want
    module = nn.DistillationLoss(**options)
    assert float(module(s, t, LABELS)) == want and "T=0.5" in repr(module)
    assert fastkd.divergences.js(beta=half).param == 0.5
    stored = fastkd.topk_from_logits(t, np.int64(3), temperature=half)
    assert stored.temperature == 0.5 and stored.size(-1) == 3
    assert fastkd.TopK(*stored.tensors[:1], stored.indices, temperature=half).temperature == 0.5
    linear = fastkd.LinearLogits(s, t, scale=half, softcap=half, chunk_size=np.int32(2))
    assert "scale=0.5, softcap=0.5" in repr(linear) and linear.chunk_size == 2


def test_whole_numbers_are_any_of_them() -> None:
    s, t = pair()
    got = fastkd.kl_div(s, t, labels=LABELS, ignore_index=np.int32(1), vocab_size=np.int64(4))
    assert got == fastkd.kl_div(s, t, labels=LABELS, ignore_index=1, vocab_size=4)


@pytest.mark.parametrize("x", [True, np.bool_(True), "2", torch.tensor(2.0), np.ones(2), None, 1j])
def test_what_is_no_number(x: Any) -> None:
    s, t = pair()
    for name in ("temperature", "alpha", "label_smoothing"):
        with pytest.raises(TypeError, match=rf"^{name}: got .*expected a .*number"):
            fastkd.distillation_loss(s, t, LABELS, **{name: x})
    with pytest.raises(TypeError, match=r"^beta: got .*expected a number"):
        fastkd.js_div(s, t, beta=x)


# ---- labels


def refused(labels: Tensor, *shape: int) -> str:
    s, t = pair(*shape)
    errors = []
    for call in (
        lambda: fastkd.distillation_loss(s, t, labels),
        lambda: fastkd.kl_div(s, t, labels=labels),
        lambda: nn.KLDiv()(s, t, labels),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^labels: got") as error:
            call()
        errors.append(str(error.value))
    assert len(set(errors)) == 1 and len(errors[0]) <= 500
    return errors[0]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("dtype", "ignore_index"), [(torch.uint8, -100), (torch.uint8, 300), (torch.int32, 2**32 + 2)]
)
def test_ignore_index_is_not_wrapped_to_the_dtype_of_labels(
    backend: str, reduction: Any, dtype: torch.dtype, ignore_index: int
) -> None:
    s, t = pair(4, 200)
    labels = torch.tensor([156, 44, 2, 3], dtype=dtype)
    for loss in (fastkd.kl_div, torch.compile(fastkd.kl_div, fullgraph=True, backend="eager")):
        with nullcontext() if backend == "auto" else fastkd.use_backend(backend):
            got = loss(s, t, labels=labels, ignore_index=ignore_index, reduction=reduction)
            torch.testing.assert_close(got, fastkd.kl_div(s, t, reduction=reduction))
    assert fastkd.token_count(labels, ignore_index=ignore_index) == 4


def test_soft_labels_are_refused_with_what_to_write() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=r"^labels: got .* probabilities are labels of"):
            fastkd.kl_div(*pair(), labels=torch.rand(3, 5).softmax(-1).to(dtype))


def test_multi_hot_labels_are_refused_with_what_to_write() -> None:
    for dtype in (torch.bool, torch.int64, torch.uint8):
        said = refused(torch.randint(2, (3, 5)).to(dtype))
        assert "fastkd.binary_distillation_loss" in said
        assert "argmax(-1)" in said


@pytest.mark.parametrize("dense", [(4, 6), (7,), (2, 3, 4)])
def test_a_class_axis_in_dimension_1_is_refused_with_what_to_write(dense: tuple[int, ...]) -> None:
    said = refused(torch.randint(5, (3, *dense)), 3, 5, *dense)
    assert "give class_dim=1" in said


# ---- silence


def said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            call()
    assert all(w.category is UserWarning and w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


@each_loss
def test_one_column_is_said_once(loss: Any) -> None:
    s, t = pair(4, 1)
    wide, head = torch.randn(4, 3), torch.randn(1, 3)
    for call in (
        lambda: loss(s, t),
        lambda: loss(s.requires_grad_(), t, reduction="none"),
        lambda: loss(*pair(), vocab_size=1),
        lambda: loss(fastkd.LinearLogits(wide, head), t),
        lambda: loss(s, fastkd.TopK(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.long))),
    ):
        (text,) = said(call)
        assert "one column" in text and "sigmoid" in text and loss.__name__ in text
        assert float(call().sum()) == 0.0


def test_one_column_of_the_modules_and_of_the_hard_term() -> None:
    s, t = pair(4, 1)
    labels = torch.zeros(4, dtype=torch.long)
    assert len(said(lambda: nn.KLDiv()(s, t))) == 1
    for alpha in (0.5, 1.0):
        call = lambda a=alpha: fastkd.distillation_loss(s, t, labels, alpha=a)  # noqa: E731
        assert len(said(call)) == 1


@each_loss
def test_the_same_tensor_twice_is_said_once(loss: Any) -> None:
    s, t = pair()
    (text,) = said(lambda: loss(s, s))
    assert "the same tensor" in text and loss.__name__ in text
    linear = fastkd.LinearLogits(s, t)
    assert len(said(lambda: loss(linear, linear))) == 1
    assert not said(lambda: loss(s, t)) and not said(lambda: loss(s, s.clone()))


def test_a_teacher_that_nothing_reads_is_no_fault() -> None:
    s, _ = pair()
    assert not said(lambda: fastkd.distillation_loss(s, s, LABELS, alpha=1.0))


def test_a_warning_breaks_no_graph() -> None:
    compiled = torch.compile(fastkd.kl_div, fullgraph=True, backend="eager")
    s, t = pair(4, 1)
    assert float(compiled(s, t)) == 0.0


# ---- vocabularies


def test_other_widths_name_a_way_that_every_caller_has() -> None:
    s, _ = pair()
    with pytest.raises(ValueError, match=r"\[\.\.\., :n\].*vocab_size=n where the function takes"):
        fastkd.kl_div(s, torch.randn(3, 7))


@pytest.mark.parametrize("loss", [fastkd.kl_div, fastkd.binary_kl_div])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_mask_is_written_into_a_loss_per_row(loss: Any, backend: str) -> None:
    """As many loops do, which must not hear of a view that a function has made."""
    require(backend)
    s, t = torch.randn(2, 2, 3, 5).unbind()
    s.requires_grad_()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    grads = []
    with fastkd.use_backend(backend):
        for write in (True, False):
            found = loss(s, t, reduction="none")
            if write:
                found[~mask] = 0.0
            else:
                found = found * (mask if found.dim() == 2 else mask[..., None])
            grads += torch.autograd.grad(found.sum(), s)
    assert torch.equal(*grads) and not grads[0][~mask].any()
