"""With documented switches, fastkd is what others compute; and where they fail, it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from common import INF
from oracle import Result, assert_gradients, assert_values
from peers import (
    PEERS,
    Options,
    Peer,
    Side,
    decoupled,
    distillm_js,
    distillm_skew,
    entropy,
    truncated,
)
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


# ---- what others take in the place of logits: log-probabilities, probabilities


@pytest.mark.parametrize(
    ("handed", "theirs", "ours"),
    [
        (
            lambda x: x.log_softmax(-1),
            lambda q, p: torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True),
            fastkd.kl_div,
        ),
        (
            lambda x: x.softmax(-1),
            lambda q, p: 0.5 * (p - q).abs().sum(-1).mean(),
            lambda q, p: fastkd.tv_distance(q.log(), p.log()),
        ),
    ],
    ids=["F.kl_div", "LigerTVDLoss"],
)
def test_probabilities_and_their_logarithms_are_logits(
    handed: Callable, theirs: Callable, ours: Callable
) -> None:
    """The same value and the same gradient behind the softmax, but not before it."""
    x, t = logits()
    x.requires_grad_()
    mine, its = [], []
    for side, out in ((ours, mine), (theirs, its)):
        given = handed(x)
        value = side(given, handed(t))
        out += [value, *torch.autograd.grad(value, (x, given))]
    torch.testing.assert_close(mine[:2], its[:2], rtol=1e-9, atol=1e-12)
    assert (mine[2] - its[2]).abs().max() > 1e-3
    if ours is fastkd.kl_div:
        assert mine[2].sum(-1).abs().max() < 1e-12 < 1e-3 < its[2].sum(-1).abs().max()


def test_a_temperature_for_each_row_is_a_division_before() -> None:
    s, t = logits()
    T = torch.rand(6, dtype=torch.float64) + 0.5
    ours = fastkd.kl_div(s / T[..., None], t / T[..., None], reduction="none")
    apart = [fastkd.kl_div(s[i], t[i], temperature=float(T[i])) for i in range(6)]
    torch.testing.assert_close(ours, torch.stack(apart), rtol=1e-9, atol=0)


# ---- losses of each row: of draft models, and Liger's cosine


def overlap(s: Tensor, t: Tensor) -> Tensor:
    return torch.minimum(s.softmax(-1), t.softmax(-1)).sum(-1)


def _kl_rows(s: Tensor, t: Tensor) -> Tensor:
    return (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)


def _linear(x: Tensor) -> fastkd.LinearLogits:
    return fastkd.LinearLogits(x, torch.eye(x.size(-1), dtype=x.dtype))


def _hybrid(s: Tensor, t: Tensor) -> Tensor:
    weight = torch.exp(-3.0 * overlap(s, t).detach())
    return weight * _kl_rows(s, t) + (1 - weight) * (1 - overlap(s, t))


def _our_hybrid(s: Tensor, t: Tensor) -> Tensor:
    tv = fastkd.tv_distance(s, t, reduction="none")
    w = torch.exp(3.0 * (tv.detach() - 1))
    return w * fastkd.kl_div(s, t, reduction="none") + (1 - w) * tv


def _reverse_of_five(s: Tensor, t: Tensor) -> Tensor:
    """The best five columns, and of the others -entropy and a hundred times their mass."""
    (best, at), log_q = t.topk(5, -1), s.log_softmax(-1)
    own = log_q.gather(-1, at)
    rest = (log_q.exp() * (log_q + 100)).sum(-1) - (own.exp() * (own + 100)).sum(-1)
    return (own.exp() * (own - best.log_softmax(-1))).sum(-1) + rest


def _floored(t: Tensor) -> Tensor:
    """log p over the best five columns alone, -100 elsewhere."""
    best, at = t.topk(5, -1)
    return torch.full_like(t, -100.0).scatter(-1, at, best.log_softmax(-1))


MASK = torch.tensor([-100, 0, 0, -100, 0, 0])
BY_ROWS: dict[str, tuple[Callable, Callable]] = {
    "speculators nla": (
        lambda s, t: -overlap(s, t).clamp_min(1e-5).log(),
        lambda s, t: fastkd.acceptance_loss(s, t, reduction="none"),
    ),
    "speculators lk_hybrid": (_hybrid, _our_hybrid),
    "SpecForge LogSoftmaxLoss": (
        lambda s, t: -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)[MASK == 0].sum() / 6,
        lambda s, t: (
            fastkd.kl_div(s, t, labels=MASK, normalizer=6) + entropy(t, labels=MASK) * 4 / 6
        ),
    ),
    "Liger cosine": (
        lambda s, t: 1 - torch.cosine_similarity(s, t, -1),
        lambda s, t: distill.cosine(s, t, reduction="none"),
    ),
    "fla FusedKLDivLoss": (
        lambda s, t: _kl_rows(s, t).sum() / 6,
        lambda s, t: fastkd.kl_div(*(_linear(x) for x in (s, t)), reduction="batchmean"),
    ),
    "NeMo-RL zero_outside_topk": (
        _reverse_of_five,
        lambda s, t: fastkd.reverse_kl_div(s, _floored(t), reduction="none"),
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), BY_ROWS.values(), ids=BY_ROWS.keys())
def test_losses_by_rows(theirs: Callable, ours: Callable) -> None:
    x, t = logits()
    x.requires_grad_()
    sides = [side(x, t) for side in (ours, theirs)]
    torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(side.sum(), x)[0] for side in sides]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_speculators_nothing_is_learnt_below_its_floor() -> None:
    """A draft model that is sure of another token than its target."""
    s, t = torch.zeros(2, 1, 8, dtype=torch.float64)
    s[:, 0] = t[:, 1] = 20
    for side, learns in zip(BY_ROWS["speculators nla"], (False, True), strict=True):
        x = s.clone().requires_grad_()
        side(x, t).sum().backward()
        assert bool(x.grad.any()) is learns


# ---- where a peer is wrong: its formula beside ours


def slope(loss: Callable[[Tensor], Tensor], s: Tensor) -> tuple[float, float]:
    """How fast the loss changes along a direction, by its gradient and by its values."""
    along, x = torch.randn_like(s), s.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    step = 1e-6 * along
    ahead, behind = (float(loss(s + h).detach()) for h in (step, -step))
    return float((grad * along).sum()), (ahead - behind) / 2e-6


def logits(n: int = 6, v: int = 40, count: int = 2) -> Tensor:
    return 3 * torch.randn(count, n, v, dtype=torch.float64)


@pytest.mark.parametrize("T", [2.0, 4.0])
def test_axolotl_a_value_with_t_squared_and_a_gradient_without(T: float) -> None:
    s, t = logits()

    def theirs(s: Tensor) -> Tensor:
        kl = PEERS["F.kl_div"].theirs(s, t, s, Options(T, 0, 0, 0, 0))
        return kl + (T**2 - 1) * kl.detach()

    def ours(s: Tensor) -> Tensor:
        return fastkd.distillation_loss(s, t, alpha=0.0, temperature=T)

    assert float(theirs(s)) == pytest.approx(float(ours(s)), rel=1e-12)
    by_gradient, by_value = slope(theirs, s)
    assert by_gradient == pytest.approx(by_value / T**2, rel=1e-5)
    by_gradient, by_value = slope(ours, s)
    assert by_gradient == pytest.approx(by_value, rel=1e-5)


def test_liger_chunked_padding_has_mass() -> None:
    """Two equal models, of which the teacher's logits have columns more, as 151 936 and 152 064."""
    s = logits(count=1)[0] / 3
    t = torch.cat((s, torch.full((6, 8), -30.0, dtype=torch.float64)), -1)

    def theirs(s: Tensor) -> Tensor:  # the missing columns are logits of 0
        padded = torch.cat((s, torch.zeros(6, 8, dtype=torch.float64)), -1)
        return fastkd.kl_div(padded, t)

    x = s.clone().requires_grad_()
    loss = theirs(x)
    loss.backward()
    assert loss > 0.01 and float(x.grad.abs().max()) > 1e-4
    x = s.clone().requires_grad_()
    loss = fastkd.kl_div(x, t, vocab_size=s.size(-1))
    loss.backward()
    assert loss == 0 and not x.grad.any()


def test_verl_truncated_divergence_falls_below_zero() -> None:
    """A student surer than the teacher of all that was stored."""
    t = torch.zeros(1, 8, dtype=torch.float64)
    s = t.clone()
    s[:, :2] = 5
    t[:, :2] = 0.1
    assert truncated(s, t, 2) < -0.1
    for tail, least in (("drop", -INF), ("bucket", 0.0), ("renormalize", 0.0), ("restrict", 0.0)):
        loss = fastkd.kl_div(s, fastkd.topk_from_logits(t, 2, tail=tail))
        assert loss >= least
        if tail == "drop":
            torch.testing.assert_close(loss, truncated(s, t, 2)[0])
    own = fastkd.kl_div(t, fastkd.topk_from_logits(t, 2))  # of the teacher itself
    assert float(own.abs()) < 1e-15
    assert truncated(t, t, 2) == 0
    # and with a full softmax on one side, the teacher itself is not the best student
    assert fastkd.kl_div(t, fastkd.topk_from_logits(t, 2, tail="renormalize")) > 0.5


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (distillm_js, lambda s, t, lam: fastkd.js_div(s, t, beta=1 - lam)),
        (distillm_skew, lambda s, t, lam: fastkd.skew_kl_div(s, t, alpha=lam)),
    ],
    ids=["js", "skewed_forward_kl"],
)
def test_distillm_nan_on_finite_logits(theirs: Callable, ours: Callable) -> None:
    """A peak of 200 that both share: every other probability is 0 in float32, and 0 log 0 NaN."""
    s, t = logits().float()
    s[:, 3] += 200
    t[:, 3] += 200
    y = torch.zeros(6, dtype=torch.long)
    x = s.clone().requires_grad_()
    loss = theirs(x, t, y, 0.1)
    loss.backward()
    assert loss.isnan() and x.grad.isnan().any()
    x = s.clone().requires_grad_()
    loss = ours(x, t, 0.1)
    loss.backward()
    assert abs(loss.item()) < 1e-30 and x.grad.isfinite().all()


def test_mdistiller_dkd_inf_on_a_sure_student() -> None:
    s, t = logits().float()
    y = torch.full((6,), 3)
    s[:, 3] = 200
    x = s.clone().requires_grad_()
    loss = decoupled(x, t, y, 1.0)
    loss.backward()
    assert not loss.isfinite() and not x.grad.isfinite().all()
    x = s.clone().requires_grad_()
    loss = distill.dkd(x, t, y, temperature=1.0)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    # of the label against the rest, what is left in plain logarithms: (1 - p_y) (z_y - lse rest)
    rest = ~torch.nn.functional.one_hot(y, 40).bool()
    odds = s.double()[:, 3] - s.double()[rest].view(6, -1).logsumexp(-1)
    p_y = t.double().softmax(-1)[:, 3]
    target = (p_y * p_y.log() + (1 - p_y) * ((1 - p_y).log() + odds)).mean()
    mine = distill.dkd(s, t, y, temperature=1.0, beta=0.0)
    assert float(mine) == pytest.approx(float(target), rel=1e-5)


def test_lmops_nan_and_torchtune_nothing_where_no_token_counts() -> None:
    s, t = logits()
    y = torch.full((6,), -100)
    x = s.clone().requires_grad_()
    peer = PEERS["DistiLLM forward_kl"]
    assert peer.theirs(x, t, y, Options(1, 0, 0, 0, 0)).isnan()
    loss = fastkd.kl_div(x, t, labels=y)
    assert loss == 0 and loss.requires_grad  # connected: every rank runs the same backward
    loss.backward()
    assert not x.grad.any()


def test_kd_lib_a_divergence_of_probabilities() -> None:
    """F.kl_div of probabilities, teacher first: negative, and not at rest where the two agree."""
    s, t = logits()

    def theirs(s: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(t.softmax(-1), s.softmax(-1), reduction="mean")

    x = s.clone().requires_grad_()
    assert theirs(s, t) < 0
    (grad,) = torch.autograd.grad(theirs(x, s), x)
    assert grad.abs().max() > 1e-5
    (grad,) = torch.autograd.grad(fastkd.kl_div(x, s), x)
    assert fastkd.kl_div(x, t) > 0 and not grad.any()


def test_gkd_s_ends_are_no_limits() -> None:
    s, t = logits()
    near = [float(fastkd.js_div(s, t, beta=beta)) for beta in (1e-6, 1 - 1e-6)]
    ends = [float(fastkd.kl_div(s, t)), float(fastkd.reverse_kl_div(s, t))]
    assert max(near) < 1e-3 < 1 < min(ends)
    # divided by what it goes to 0 with, it has them for limits
    assert near[0] / 1e-6 == pytest.approx(ends[0], rel=1e-3)
    assert near[1] / 1e-6 == pytest.approx(ends[1], rel=1e-3)


def test_a_divergence_over_rows_and_columns_is_v_times_too_small() -> None:
    s, t = logits()
    by_cells = PEERS["Model-Optimizer"].theirs(s, t, s, Options(2.0, 0, 0, 0, 0))
    by_rows = fastkd.distillation_loss(s, t, alpha=0.0, temperature=2.0)
    assert float(by_rows / by_cells) == pytest.approx(s.size(-1), rel=1e-12)


def test_logit_mse_is_the_limit_only_when_centred() -> None:
    s, t = logits()
    t = t + 3  # which a softmax does not see
    warm = fastkd.distillation_loss(s, t, alpha=0.0, temperature=1e4)
    centred, plain = (float(distill.logit_mse(s, t, centred=c)) for c in (True, False))
    assert float(warm) / centred == pytest.approx(1.0, rel=1e-2)
    assert plain > 1.2 * centred
