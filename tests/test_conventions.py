"""With documented switches, fastkd is what others compute; and where they fail, it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from common import INF, Result, assert_gradients, assert_values
from peers import PEERS, Options, Peer, Side, decoupled, distillm_js, distillm_skew, truncated
from torch import Tensor

import fastkd
from fastkd import distill

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
DRAWS = 20

each_peer = pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS.keys())
each_width = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def draws(peer: Peer, dtype: torch.dtype, count: int = DRAWS) -> Iterator[tuple]:
    """Random logits, labels and options: shapes, temperatures, masks, shares, tokens elsewhere."""
    number = torch.rand(count, 3).tolist()
    for i, (a, b, c) in enumerate(number):
        n, v = int(1 + 8 * a), int(2 + 60 * b**2)
        s, t = 3 * torch.randn(n, v), 3 * torch.randn(n, v)
        y = torch.randint(v, (n,))
        if peer.masks:
            y[torch.rand(n) < 0.4] = -100
            y[0] = 0  # of no row at all, some peers make NaN
        options = Options(
            temperature=0.5 + 5 * c,
            share=0.05 + 0.9 * a,
            beta=BETAS[i % len(BETAS)],
            items=int((y != -100).sum()) + int(20 * b),
            k=max(1, v // 3),
        )
        yield s.to(dtype), t.to(dtype), y, options


def result(side: Side, s: Tensor, t: Tensor, y: Tensor, options: Options) -> Result:
    s = s.detach().requires_grad_()
    value = side(s, t, y, options)
    (grad,) = torch.autograd.grad(value, s)
    return Result(value.detach(), grad, None)


def assert_agree(peer: Peer, call: Side, s: Tensor, t: Tensor, y: Tensor, options: Options) -> None:
    """The tolerance rule: ours, beside `call` in the same dtype, against their formula in float64.

    Their rounding is no excuse for a gradient of terms that nearly cancel, so there is no third
    allowance here.
    """
    mine = result(peer.ours, s, t, y, options)
    its = result(call, s, t, y, options)
    exact = result(peer.theirs, s.double(), t.double(), y, options)
    assert mine.value.dtype == s.dtype
    assert_values(mine.value, its.value, exact.value)
    assert_gradients(mine.student, its.student, exact.student)


@each_width
@each_peer
def test_the_call_equals_their_formula(peer: Peer, dtype: torch.dtype) -> None:
    for s, t, y, options in draws(peer, dtype):
        assert_agree(peer, peer.theirs, s, t, y, options)


def test_halves_of_a_batch_add_up_to_it_by_the_tokens_of_both() -> None:
    peer = PEERS["TRL GKD, accumulated"]
    for s, t, y, options in draws(peer, torch.float64):
        options = options._replace(items=int((y != -100).sum()))
        whole = result(PEERS["TRL GKD"].ours, s, t, y, options._replace(temperature=1.0))
        cut = len(y) // 2
        for side in (peer.ours, peer.theirs):
            parts = [
                result(side, s[at], t[at], y[at], options)
                for at in (slice(cut), slice(cut, None))
                if len(y[at])
            ]
            total = sum(part.value for part in parts)
            torch.testing.assert_close(total, whole.value, rtol=1e-12, atol=1e-12)
            grad = torch.cat([part.student for part in parts])
            torch.testing.assert_close(grad, whole.student, rtol=1e-9, atol=1e-12)
