"""Reverse KL from one sampled token a row, where nobody tells the rest of the teacher's row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

import fastkd
from fastkd import rows as row_options
from fastkd.arguments.messages import describe, shown

from .chunked import Rows, known_options

ESTIMATORS = ("k1", "k3")


def sampled_reverse_kl(
    student: Tensor | fastkd.LinearLogits,
    teacher: Tensor | fastkd.TopK,
    labels: Tensor,
    *,
    estimator: str = "k1",
    sampled_logprob: Tensor | None = None,
    **rows: Unpack[Rows],
) -> Tensor:
    """An estimate of KL(q || p) of each row from its token y, which the student q has sampled.

        k1 = log q_y - log p_y                       gradient k1 d log q_y
        k3 = p_y / q_y - 1 - log(p_y / q_y) >= 0     gradient (1 - p_y / q_y) d log q_y

    On average over y ~ q both values are KL(q || p); k3's varies less. Their gradients are not of
    one kind:

    * "k1" is the score-function form (REINFORCE with the reward -k1, which gets no gradient of its
      own): on average d KL(q || p), exactly. The plain gradient of its value would be 0 on average.
    * "k3" is a differentiable value: on average d KL(p || q), the *forward* KL's gradient; with the
      teacher's whole row `fastkd.kl_div` has it without the noise.

    Texts that an older student wrote (rows of log r_y) are reweighted by q_y / r_y, without
    gradient: exact on average over y ~ r.

    Args:
        student: logits [..., V] at the temperature that sampled, or `LinearLogits`.
        teacher: log p_y [...], or a `TopK` that names every label (`Served(k=0)`, or own=True).
        labels: int [...], y; -100 where a row does not count.
        estimator: "k1" or "k3".
        sampled_logprob: log r_y [...] floats of the student that wrote; None: this one.
        **rows: ignore_index, weight, reduction, normalizer and vocab_size, see `fastkd.losses`.

    Returns:
        0-d float32 (float64 where the student is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, a `TopK` without a label.

    Schulman 2020, "Approximating KL divergence"; Williams 1992 (REINFORCE); on-policy: Gu et al.
    2023 (MiniLLM), arXiv 2306.08543.
    """
    known_options(rows)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: got {shown(estimator)}, expected 'k1' or 'k3'")
    leading, ignored = list(student.shape[:-1]), rows.get("ignore_index", row_options.IGNORED)
    row_options.check(rows, leading)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {describe(labels)}, expected the sampled tokens, {leading}")
    # at alpha=1 this is -log q_y, in one pass, of every operand; it checks the labels too. The
    # teacher is one that costs nothing
    nothing = torch.zeros(*leading, 1, device=student.device)
    log_q = -fastkd.distillation_loss(
        student,
        fastkd.TopK(nothing, nothing.int(), tail="renormalize"),
        labels,
        alpha=1.0,
        reduction="none",
        ignore_index=ignored,
        vocab_size=rows.get("vocab_size"),
    ).flatten()
    several = [ignored] if isinstance(ignored, int) else list(ignored)
    kept = ~torch.isin(labels, torch.tensor(several, device=labels.device))
    keep = kept.flatten()
    log_p = _of_tokens("teacher", teacher, labels, kept, leading).to(log_q)
    value, fixed = log_q - log_p, log_q.detach()
    if estimator == "k1":
        loss = value.detach() * (1.0 + log_q - fixed)
    else:  # in float64: what is left of two near ratios would be rounding
        wide = -value.double()
        loss = (torch.expm1(wide) - wide).to(value)
    if sampled_logprob is not None:
        wrote = _of_tokens("sampled_logprob", sampled_logprob, labels, kept, leading)
        loss = loss * (fixed - wrote.to(fixed)).exp()
    weight: Any = rows.get("weight")
    weight = torch.ones_like(fixed) if weight is None else weight.flatten().to(fixed)
    factor = row_options.factors(weight, keep, None, leading[0] if leading else 1, rows)
    loss = torch.where(keep, loss, 0.0) * factor
    return loss.view(leading) if rows.get("reduction") == "none" else loss.sum()


def _of_tokens(name: str, given: Any, labels: Tensor, kept: Tensor, leading: list[int]) -> Tensor:
    """Log-probabilities of the labels, [N] without gradient, 0 in rows that are not kept."""
    if isinstance(given, fastkd.TopK):
        if list(given.shape[:-1]) != leading:
            got = f"{list(given.shape)}"
            raise ValueError(f"{name}: got {got}, expected {[*leading, 'K']}")
        its = given.indices == labels.unsqueeze(-1)
        lacking = kept & ~its.any(-1)
        if lacking.device.type == "cpu" and bool(lacking.any()):
            at = lacking.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: got a TopK that does not name the label {int(labels[tuple(at)])} of row "
                f"{at}, expected every sampled token: Served(k=0), or own=True"
            )
        # elsewhere a row without its label becomes infinite
        given = torch.where(its, given.logprobs.detach(), -torch.inf).amax(-1)
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(f"{name}: got {describe(given)}, expected log-probabilities {leading}")
    if list(given.shape) != leading:
        raise ValueError(f"{name}: got {list(given.shape)}, expected {leading}, one for each label")
    return torch.where(kept, given.detach(), 0.0).flatten()
