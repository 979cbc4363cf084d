"""Attention losses: edges, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_scores import SCORES, mask_of, pair, scores
from common import unreadable
from feature_losses import assert_low_precision_only_at_the_ends
from oracle import FLOORS
from torch import Tensor

from fastkd.distill.losses import attention


@scores
@pytest.mark.parametrize("n", [1, 2])
def test_finite_at_the_edges(name: str, n: int) -> None:
    some = torch.randn(n, 2, 3, 3)
    kinds = (some, some[:1].expand(n, 2, 3, 3), some * 0, some * 1e4)
    for values in kinds:
        for t in kinds:
            s = values.clone().requires_grad_()
            value = SCORES[name](s, t)
            value.backward()
            assert value.isfinite() and s.grad is not None and s.grad.isfinite().all()


@pytest.mark.parametrize("n", [1, 2])
def test_dead_layers_have_finite_gradients(n: int) -> None:
    zero, some = torch.zeros(n, 4, 4, requires_grad=True), torch.randn(n, 4, 4)
    for value in (
        attention.minilm([zero] * 3, [some] * 3, heads=2),
        attention.at(zero.unsqueeze(1), some.unsqueeze(1)),
        attention.at(zero.unsqueeze(1), zero.unsqueeze(1)),
        attention.tinybert_hidden(zero, some),
    ):
        (grad,) = torch.autograd.grad(value, zero)
        assert value.isfinite() and grad.isfinite().all()


def test_order_of_samples_does_not_matter() -> None:
    s, t = pair(4, 3, 5, 5)
    order = torch.randperm(4)
    mask = mask_of("both", 4, 5)
    assert mask is not None
    for call in SCORES.values():
        expected = call(s, t, mask=mask)
        torch.testing.assert_close(call(s[order], t[order], mask=mask[order]), expected)
    torch.testing.assert_close(attention.at(s[order], t[order]), attention.at(s, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_only_at_the_ends(dtype: torch.dtype) -> None:
    calls: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = [
        (attention.attention_kl, (2, 3, 4, 4)),
        (attention.tinybert, (2, 3, 4, 4)),
        (attention.at, (2, 3, 4, 4)),
        (attention.tinybert_hidden, (2, 3, 4)),
        (lambda s, t: attention.minilm([s] * 3, [t] * 3, heads=2), (2, 3, 4)),
    ]
    for call, shape in calls:
        # three gradients of [s] * 3 are stored and added in the dtype
        floors = 4 * FLOORS[dtype] + FLOORS[torch.float32]
        assert_low_precision_only_at_the_ends(call, *pair(*shape, dtype=dtype), floors)


def test_no_value_is_read() -> None:
    """`kl_div` itself looks at labels on the host, so a mask is left out there."""
    with unreadable():
        mask = torch.ones(2, 4)
        for value in (
            attention.attention_kl(a := torch.randn(2, 3, 4, 4, requires_grad=True), a.detach()),
            attention.tinybert(a, a.detach(), mask=mask),
            attention.at(a, a.detach()),
            attention.tinybert_hidden(a[0], a[1].detach(), mask=torch.ones(3, 4)),
            attention.minilm([a[0]] * 3, [a[1].detach()] * 3, heads=2),
        ):
            value.backward()


def test_compiles_whole() -> None:
    a, b = pair(2, 3, 4, 4, dtype=torch.float32)
    mask = mask_of("both", 2, 4)

    def all_of_them(a: Tensor, b: Tensor) -> Tensor:
        return (
            attention.attention_kl(a, b, mask=mask)
            + attention.tinybert(a, b, mask=mask)
            + attention.at(a, b)
            + attention.minilm([a[0]] * 3, [b[0]] * 3, heads=2)
        )

    compiled = torch.compile(all_of_them, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(a, b), all_of_them(a, b))


def test_what_cannot_be_compared_is_named() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    x, y = torch.randn(2, 4, 6), torch.randn(2, 4, 9)
    both = r"\[2, 3, 4, 4\] of the student and \[2, 5, 4, 4\] of the teacher"
    for call, message in (
        (lambda: attention.attention_kl(a, b), both),
        (lambda: attention.tinybert(a, b), both),
        (lambda: attention.tinybert(a, b, heads=(0, 1)), both),
        (lambda: attention.tinybert(a, b, heads=(0, 1, 5)), both),
        (lambda: attention.tinybert(x, x), r"expected \[N, H, queries, keys\]"),
        (lambda: attention.attention_kl(x, x), r"expected \[N, H, queries, keys\]"),
        (lambda: attention.tinybert_hidden(x, y), r"\[2, 4, 6\].*\[2, 4, 9\]"),
        (lambda: attention.at(a, x), r"\[2, 3, 4, 4\].*\[2, 4, 6\]"),
        (lambda: attention.at(a, b[:1]), r"\[2, 3, 4, 4\].*\[1, 5, 4, 4\]"),
        (lambda: attention.attention_map(x), r"\[2, 4, 6\], expected \[N, C, H, W\]"),
        (lambda: attention.attention_map(a, power=0.5), "power: got 0.5"),
        (lambda: attention.minilm([x] * 3, [x] * 3, heads=4), "heads=4"),
        (lambda: attention.minilm([x] * 3, [x] * 3, heads=2, relations=()), "relations: got"),
        (lambda: attention.minilm([x] * 3, [x] * 3, heads=2, relations=("qx",)), "relations: got"),
        (lambda: attention.minilm([x, y, x], [x] * 3, heads=3), "a head of 2 with one of 3"),
        (
            lambda: attention.minilm([x] * 3, [x[:, :3]] * 3, heads=2),
            r"\[2, 2, 4, 4\].*\[2, 2, 3, 3\]",
        ),
        (lambda: attention.attention_kl(a, a, mask=torch.ones(2, 3)), r"mask: got \[2, 3\]"),
        (lambda: attention.tinybert_hidden(x, x, mask=torch.ones(4)), r"mask: got \[4\]"),
        (lambda: attention.tinybert([a, a], [a] * 3), "layers: got None for 2"),
        (lambda: attention.tinybert([a], [a], layers=(1,)), "from 0 to 0"),
        (lambda: attention.tinybert([a, a], [a] * 3, layers=(1,)), "expected 2 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: attention.minilm(x, x, heads=2),
        lambda: attention.minilm([x] * 2, [x] * 3, heads=2),
        lambda: attention.at(a, (a, a)),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"got (one tensor|2 tensors|tuple)"):
            call()
