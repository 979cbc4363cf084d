"""What other libraries compute, from the definition of each in torch, beside the call of fastkd.

Every entry of `PEERS` holds the two for logits [N, V] of a student and a teacher, labels [N] and an
`Options` of drawn numbers: `theirs` is the peer's formula, `ours` the call that the README's table
tells its users to write. A peer that averages over all rows gets labels without -100 (`masks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import distill


class Options(NamedTuple):
    """What a peer's user chooses."""

    temperature: float
    share: float  # of the hard labels, of a mixture, or of one of two terms; 0 < share < 1
    beta: float  # of a generalised Jensen-Shannon divergence; 0 and 1 among them
    items: int  # tokens of the whole batch, of which these are a part
    k: int


Side = Callable[[Tensor, Tensor, Tensor, Options], Tensor]


class Peer(NamedTuple):
    """A peer's formula and the call of fastkd that equals it."""

    theirs: Side
    ours: Side
    masks: bool = True  # whether the peer leaves out rows at -100


# ---- pieces of their formulas: p and q, the reductions, the sums


def _kept(rows: Tensor, y: Tensor) -> Tensor:
    return rows[y != -100].mean()


def _soft(x: Tensor, T: float = 1.0) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms at temperature T."""
    return torch.softmax(x / T, -1), torch.log_softmax(x / T, -1)


def _cross(p: Tensor, log_q: Tensor) -> Tensor:
    return -(p * log_q).sum(-1)


def _kl(s: Tensor, t: Tensor, T: float = 1.0) -> Tensor:
    (p, log_p), (_, log_q) = _soft(t, T), _soft(s, T)
    return (p * (log_p - log_q)).sum(-1)


def _reverse(s: Tensor, t: Tensor, T: float = 1.0) -> Tensor:
    return _kl(t, s, T)


def _jsd(s: Tensor, t: Tensor, beta: float, T: float = 1.0) -> Tensor:
    """Of GKD: 0 and 1 mean the two KL."""
    if beta in (0.0, 1.0):
        return _reverse(s, t, T) if beta else _kl(s, t, T)
    (p, log_p), (q, log_q) = _soft(t, T), _soft(s, T)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def _tvd(s: Tensor, t: Tensor, T: float = 1.0) -> Tensor:
    return 0.5 * (_soft(t, T)[0] - _soft(s, T)[0]).abs().sum(-1)


def _mean_kl(s: Tensor, t: Tensor, T: float) -> Tensor:
    return F.kl_div(_soft(s, T)[1], _soft(t, T)[0], reduction="batchmean") * T**2


def _ce(s: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(s, y)


# ---- pieces of ours


def entropy(teacher: Tensor, **rows: object) -> Tensor:
    """H(p) = log V - KL(p || uniform): what a cross-entropy is above its KL."""
    uniform = torch.zeros_like(teacher)
    return math.log(teacher.size(-1)) - fastkd.kl_div(uniform, teacher, **rows)


def _any_js(s: Tensor, t: Tensor, beta: float, **rows: object) -> Tensor:
    """For those to whom 0 and 1 mean the two KL."""
    if beta in (0.0, 1.0):
        return (fastkd.reverse_kl_div if beta else fastkd.kl_div)(s, t, **rows)
    return fastkd.js_div(s, t, beta=beta, **rows)


# ---- top-k: the teacher's best columns, and what is made of the rest


def _best(t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    log_p, at = _soft(t)[1].topk(k, -1)
    return log_p, at


def _ghost(s: Tensor, t: Tensor, k: int) -> Tensor:
    """Megatron-LM: the mass off the support is one more token on either side."""
    log_p, at = _best(t, k)
    p, q = log_p.exp(), _soft(s)[0].gather(-1, at)
    p, q = (torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1) for x in (p, q))
    return (p * (p.log() - q.log())).sum(-1)


def _both_renormalised(s: Tensor, t: Tensor, k: int) -> Tensor:
    """ms-swift, axolotl, NeMo-RL: both over the support alone."""
    at = t.topk(k, -1).indices
    return _kl(s.gather(-1, at), t.gather(-1, at))


def _teacher_renormalised(s: Tensor, t: Tensor, k: int) -> Tensor:
    """DistillKit's "zero": the teacher's rest is nothing, the student's softmax is whole."""
    log_p, at = _best(t, k)
    p, log_p = _soft(log_p)
    return (p * (log_p - _soft(s)[1].gather(-1, at))).sum(-1)


def truncated(s: Tensor, t: Tensor, k: int) -> Tensor:
    """verl: the support's terms as they are."""
    log_p, at = _best(t, k)
    return (log_p.exp() * (log_p - _soft(s)[1].gather(-1, at))).sum(-1)


def _top(tail: str) -> Side:
    def ours(s: Tensor, t: Tensor, y: Tensor, o: Options) -> Tensor:
        return fastkd.kl_div(s, fastkd.topk_from_logits(t, o.k, tail=tail), labels=y)

    return ours


def _nemo(s: Tensor, best: fastkd.TopK, y: Tensor, share: float) -> Tensor:
    forward, reverse = (f(s, best, labels=y) for f in (fastkd.kl_div, fastkd.reverse_kl_div))
    return share * forward + (1 - share) * reverse


# ---- mdistiller's decoupled distillation


def decoupled(
    s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """The label against the rest by probabilities, the rest by a logit lowered by 1000."""
    at = F.one_hot(y, s.size(-1)).to(s.dtype)
    (p, _), (q, _) = _soft(t, T), _soft(s, T)
    p_y, q_y = (torch.stack(((x * at).sum(-1), (x * (1 - at)).sum(-1)), -1) for x in (p, q))
    target = F.kl_div(q_y.log(), p_y, reduction="batchmean")
    rest = F.kl_div(
        _soft(s / T - 1000.0 * at)[1], _soft(t / T - 1000.0 * at)[0], reduction="batchmean"
    )
    return T**2 * (alpha * target + beta * rest)


# ---- DistiLLM's mixtures, by probabilities, as it has them; its lambda is GKD's 1 - beta


def distillm_js(s: Tensor, t: Tensor, y: Tensor, lam: float) -> Tensor:
    (p, log_p), (q, log_q) = _soft(t), _soft(s)
    log_m = ((1 - lam) * p + lam * q).log()
    return _kept((1 - lam) * (p * (log_p - log_m)).sum(-1) + lam * (q * (log_q - log_m)).sum(-1), y)


def distillm_skew(s: Tensor, t: Tensor, y: Tensor, lam: float) -> Tensor:
    """Without the teacher's entropy."""
    p, q = _soft(t)[0], _soft(s)[0]
    return _kept(_cross(p, (lam * p + (1 - lam) * q).log()), y)


def _distillm_skew_reverse(s: Tensor, t: Tensor, y: Tensor, lam: float) -> Tensor:
    p, (q, log_q) = _soft(t)[0], _soft(s)
    return _kept((q * (log_q - ((1 - lam) * p + lam * q).log())).sum(-1), y)


# ---- the table

PEERS: dict[str, Peer] = {
    "F.kl_div": Peer(
        lambda s, t, y, o: F.kl_div(
            _soft(s, o.temperature)[1], _soft(t, o.temperature)[0], reduction="batchmean"
        ),
        lambda s, t, y, o: fastkd.kl_div(s, t, temperature=o.temperature, reduction="batchmean"),
        masks=False,
    ),
    "TRL GKD": Peer(
        lambda s, t, y, o: _kept(_jsd(s, t, o.beta, o.temperature), y),
        lambda s, t, y, o: _any_js(s, t, o.beta, temperature=o.temperature, labels=y),
    ),
    "TRL GKD, accumulated": Peer(
        lambda s, t, y, o: _jsd(s, t, o.beta)[y != -100].sum() / o.items,
        lambda s, t, y, o: _any_js(s, t, o.beta, labels=y, normalizer=o.items),
    ),
    "torchtune ForwardKLLoss": Peer(
        lambda s, t, y, o: _kept(_cross(_soft(t)[0], _soft(s)[1]), y),
        lambda s, t, y, o: fastkd.kl_div(s, t, labels=y) + entropy(t, labels=y),
    ),
    "torchtune ForwardKLLoss, mixed": Peer(
        lambda s, t, y, o: (
            o.share * F.cross_entropy(s, y, ignore_index=-100)
            + (1 - o.share) * _kept(_cross(_soft(t)[0], _soft(s)[1]), y)
        ),
        lambda s, t, y, o: (
            fastkd.distillation_loss(s, t, y, alpha=o.share, temperature=1.0)
            + (1 - o.share) * entropy(t, labels=y)
        ),
    ),
    "torchtune ReverseKLLoss": Peer(
        lambda s, t, y, o: _kept(_reverse(s, t), y),
        lambda s, t, y, o: fastkd.reverse_kl_div(s, t, labels=y),
    ),
    "torchtune SymmetricKLLoss": Peer(
        lambda s, t, y, o: (
            o.share * _kept(_cross(_soft(t)[0], _soft(s)[1]), y)
            + (1 - o.share) * _kept(_reverse(s, t), y)
        ),
        lambda s, t, y, o: (
            o.share * (fastkd.kl_div(s, t, labels=y) + entropy(t, labels=y))
            + (1 - o.share) * fastkd.reverse_kl_div(s, t, labels=y)
        ),
    ),
    "DistillKit kl": Peer(
        lambda s, t, y, o: (
            (
                2.0 * _ce(s[y != -100], y[y != -100])
                + 3.0 * o.temperature**2 * _kept(_kl(s, t, o.temperature), y)
            )
            / 5.0
        ),
        lambda s, t, y, o: fastkd.distillation_loss(s, t, y, alpha=0.4, temperature=o.temperature),
    ),
    "DistillKit tvd": Peer(
        lambda s, t, y, o: o.temperature**2 * _kept(_tvd(s, t, o.temperature), y),
        lambda s, t, y, o: fastkd.distillation_loss(
            s, t, y, alpha=0.0, divergence="tv", temperature=o.temperature
        ),
    ),
    "DistillKit top-k": Peer(
        lambda s, t, y, o: _kept(_teacher_renormalised(s, t, o.k), y), _top("renormalize")
    ),
    "DistiLLM forward_kl": Peer(
        lambda s, t, y, o: _kept(_cross(_soft(t)[0], _soft(s)[1]), y),
        lambda s, t, y, o: fastkd.kl_div(s, t, labels=y) + entropy(t, labels=y),
    ),
    "DistiLLM reverse_kl": Peer(
        lambda s, t, y, o: _kept(_reverse(s, t), y),
        lambda s, t, y, o: fastkd.reverse_kl_div(s, t, labels=y),
    ),
    "DistiLLM js_distance": Peer(
        lambda s, t, y, o: distillm_js(s, t, y, o.share),
        lambda s, t, y, o: fastkd.js_div(s, t, beta=1 - o.share, labels=y),
    ),
    "DistiLLM tv_distance": Peer(
        lambda s, t, y, o: _kept(_tvd(s, t), y),
        lambda s, t, y, o: fastkd.tv_distance(s, t, labels=y),
    ),
    "DistiLLM skewed_forward_kl": Peer(
        lambda s, t, y, o: distillm_skew(s, t, y, o.share),
        lambda s, t, y, o: fastkd.skew_kl_div(s, t, alpha=o.share, labels=y) + entropy(t, labels=y),
    ),
    "DistiLLM skewed_reverse_kl": Peer(
        lambda s, t, y, o: _distillm_skew_reverse(s, t, y, o.share),
        lambda s, t, y, o: fastkd.skew_reverse_kl_div(s, t, alpha=o.share, labels=y),
    ),
    "timm LogitDistillationTask": Peer(
        lambda s, t, y, o: o.share * _ce(s, y) + (1 - o.share) * _mean_kl(s, t, o.temperature),
        lambda s, t, y, o: fastkd.distillation_loss(
            s, t, y, alpha=o.share, temperature=o.temperature
        ),
        masks=False,
    ),
    "torchdistill KDLoss": Peer(
        lambda s, t, y, o: o.share * _ce(s, y) + (1 - o.share) * _mean_kl(s, t, o.temperature),
        lambda s, t, y, o: fastkd.distillation_loss(
            s, t, y, alpha=o.share, temperature=o.temperature
        ),
        masks=False,
    ),
    "torchdistill KDLoss, rows left out": Peer(
        lambda s, t, y, o: o.share * _ce(s, y) + 0.5 * _mean_kl(s, t, o.temperature),
        lambda s, t, y, o: (
            o.share * _ce(s, y)
            + 0.5
            * o.temperature**2
            * fastkd.kl_div(s, t, temperature=o.temperature, reduction="batchmean")
        ),
    ),
    "torchdistill KDLoss, no alpha": Peer(
        lambda s, t, y, o: _mean_kl(s, t, o.temperature) / o.temperature**2,
        lambda s, t, y, o: fastkd.kl_div(s, t, temperature=o.temperature),
        masks=False,
    ),
    "mdistiller KD": Peer(
        lambda s, t, y, o: 0.1 * _ce(s, y) + 0.9 * _mean_kl(s, t, 4.0),
        lambda s, t, y, o: fastkd.distillation_loss(s, t, y, alpha=0.1, temperature=4.0),
        masks=False,
    ),
    "mdistiller DKD": Peer(
        lambda s, t, y, o: decoupled(s, t, y, o.temperature),
        lambda s, t, y, o: distill.dkd(s, t, y, alpha=1.0, beta=8.0, temperature=o.temperature),
        masks=False,
    ),
    "TextBrewer kd_ce_loss": Peer(
        lambda s, t, y, o: _cross(_soft(t, o.temperature)[0], _soft(s, o.temperature)[1]).mean(),
        lambda s, t, y, o: (
            fastkd.kl_div(s, t, temperature=o.temperature) + entropy(t, temperature=o.temperature)
        ),
        masks=False,
    ),
    "TextBrewer kd_mse_loss": Peer(
        lambda s, t, y, o: F.mse_loss(s / o.temperature, t / o.temperature),
        lambda s, t, y, o: 2 / o.temperature**2 * distill.logit_mse(s, t, centred=False),
        masks=False,
    ),
    "Megatron-LM": Peer(lambda s, t, y, o: _kept(_ghost(s, t, o.k), y), _top("bucket")),
    "ms-swift top-k": Peer(
        lambda s, t, y, o: _kept(_both_renormalised(s, t, o.k), y), _top("restrict")
    ),
    "NeMo-RL, mixed": Peer(
        lambda s, t, y, o: (
            o.share * _kept(_both_renormalised(s, t, o.k), y)
            + (1 - o.share) * _kept(_kl(*(x.gather(-1, _best(t, o.k)[1]) for x in (t, s))), y)
        ),
        lambda s, t, y, o: _nemo(s, fastkd.topk_from_logits(t, o.k, tail="restrict"), y, o.share),
    ),
    "verl top-k": Peer(lambda s, t, y, o: _kept(truncated(s, t, o.k), y), _top("drop")),
    "Model-Optimizer": Peer(
        lambda s, t, y, o: (
            F.kl_div(_soft(s, o.temperature)[1], _soft(t, o.temperature)[0], reduction="mean")
            * o.temperature**2
        ),
        lambda s, t, y, o: (
            fastkd.distillation_loss(s, t, alpha=0.0, temperature=o.temperature) / s.size(-1)
        ),
        masks=False,
    ),
    "Liger LigerKLDIVLoss": Peer(
        lambda s, t, y, o: F.kl_div(_soft(s)[1], _soft(t)[0], reduction="batchmean"),
        lambda s, t, y, o: fastkd.kl_div(s, t, reduction="batchmean"),
        masks=False,
    ),
    "Liger LigerFusedLinearJSD": Peer(
        lambda s, t, y, o: _kept(_jsd(s, t, o.beta, o.temperature), y),
        lambda s, t, y, o: _any_js(s, t, o.beta, temperature=o.temperature, labels=y),
    ),
    "Liger LigerFusedLinearJSDLoss": Peer(
        lambda s, t, y, o: (
            2.0 * _ce(s[y != -100], y[y != -100]) + 3.0 * _kept(_jsd(s, t, 0.3, o.temperature), y)
        ),
        lambda s, t, y, o: (
            5.0
            * fastkd.distillation_loss(
                s,
                t,
                y,
                alpha=0.4,
                divergence=fastkd.divergences.js(beta=0.3),
                temperature=o.temperature,
                t_squared=False,
            )
        ),
    ),
    "AberHu SoftTarget": Peer(
        lambda s, t, y, o: _ce(s, y) + 3.0 * _mean_kl(s, t, o.temperature),
        lambda s, t, y, o: (
            4.0 * fastkd.distillation_loss(s, t, y, alpha=0.25, temperature=o.temperature)
        ),
        masks=False,
    ),
    "torch tutorial": Peer(
        lambda s, t, y, o: 0.25 * _mean_kl(s, t, 2.0) + 0.75 * _ce(s, y),
        lambda s, t, y, o: fastkd.distillation_loss(s, t, y, alpha=0.75, temperature=2.0),
        masks=False,
    ),
    "Hinton, weight of the soft side": Peer(
        lambda s, t, y, o: o.share * _mean_kl(s, t, o.temperature) + (1 - o.share) * _ce(s, y),
        lambda s, t, y, o: fastkd.distillation_loss(
            s, t, y, alpha=1 - o.share, temperature=o.temperature
        ),
        masks=False,
    ),
}
