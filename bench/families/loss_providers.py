"""Who computes a case: plain torch, torch.compile, fastkd (two ways) and Liger-Kernel.

All have one contract: logits in, a 0-d loss out that autograd can differentiate down to the
student's logits. Softmax, temperature and reduction are inside it for everyone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench.families.loss_cases import Case, TopKCase, WrittenCase
from bench.harness.gate import Unavailable, first_line

Call = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Provider:
    """A way to compute a case.

    Args:
        name: as given to `--providers`.
        about: one line for `--list`.
        build: makes the callable (student, teacher, labels) -> loss; raises Unavailable.
        ours: its failure fails the run.
        inplace: its gradient overwrites the student's logits.
    """

    name: str
    about: str
    build: Callable[[Case, torch.device], Call]
    ours: bool = False
    inplace: bool = False


# ---- plain torch, as users write it today. Not the table's formulas: those guard 0 * inf and cost
# up to twice as much, and a slow baseline flatters. For the same reason the tempered logits have no
# name: they are freed as soon as their softmax is taken.


def _log(x: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(x / temperature, -1)


def _soft(x: Tensor, temperature: float) -> Tensor:
    return F.softmax(x / temperature, -1)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return F.kl_div(logq, logp, reduction="batchmean", log_target=True)


def _mixture(loga: Tensor, logb: Tensor, a: float) -> Tensor:
    return torch.logaddexp(loga + math.log(a), logb + math.log1p(-a))


def _js(s: Tensor, t: Tensor, temperature: float, beta: float) -> Tensor:
    logq, logp = _log(s, temperature), _log(t, temperature)
    logm = _mixture(logp, logq, beta)
    return beta * _kl(logp, logm) + (1 - beta) * _kl(logq, logm)


def _skew_kl(s: Tensor, t: Tensor, temperature: float, alpha: float) -> Tensor:
    logq, logp = _log(s, temperature), _log(t, temperature)
    return _kl(logp, _mixture(logp, logq, alpha))


Formula = Callable[[Tensor, Tensor, float, float], Tensor]  # student, teacher, T, parameter
PLAIN: dict[str, Formula] = {
    "kl": lambda s, t, at, _: F.kl_div(_log(s, at), _soft(t, at), reduction="batchmean"),
    "reverse_kl": lambda s, t, at, _: _kl(_log(s, at), _log(t, at)),
    "js": _js,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": lambda s, t, at, alpha: _skew_kl(t, s, at, alpha),
    "tv": lambda s, t, at, _: 0.5 * (_soft(t, at) - _soft(s, at)).abs().sum(-1).mean(),
}


def eager(case: Case, device: torch.device) -> Call:
    """The case in torch's own functions, in the operands' dtype."""
    entry, temperature = case.divergence, case.temperature
    formula = None if isinstance(case, TopKCase) else PLAIN.get(entry.name)
    if formula is None:  # a stored teacher, or a divergence that is new in the table
        return lambda s, t, _: entry.value(*case.outcomes(s, t), entry.param).sum(-1).mean()
    return _with_labels(case, lambda s, t: formula(s, t, temperature, entry.param))


def _with_labels(case: Case, soft: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """The divergence, and the hard term in torch where the case has one."""
    factor, alpha = case.soft, case.alpha

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        value = soft(student, teacher)
        if alpha is None or labels is None:
            return value
        return alpha * F.cross_entropy(student, labels) + factor * value

    return loss


def compiled(case: Case, device: torch.device) -> Call:
    """torch.compile of `eager`, for one fixed shape."""
    return torch.compile(eager(case, device), dynamic=False)


def compiled_max(case: Case, device: torch.device) -> Call:
    """As `compiled`, with inductor's search for the best kernel; without CUDA graphs, which would
    take away launches that every provider could be rid of in the same way."""
    return torch.compile(eager(case, device), dynamic=False, mode="max-autotune-no-cudagraphs")


# ---- fastkd


def _fastkd(case: Case, inplace: bool) -> Call:
    function, options = case.function, {**case.options, "inplace": inplace}
    if inplace and isinstance(case, WrittenCase) and case.alpha is not None:
        raise Unavailable("the cross-entropy beside it needs the student's logits")
    if case.alpha is None:
        return lambda student, teacher, _: function(student, teacher, **options)
    return lambda student, teacher, labels: function(student, teacher, labels, **options)


def reference(case: Case, device: torch.device) -> Call:
    """fastkd's plain torch fallback, whatever the device."""
    call = _fastkd(case, inplace=False)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        with fastkd.use_backend("reference"):
            return call(student, teacher, labels)

    return loss


# ---- Liger-Kernel: its losses take (log-)probabilities, so the softmaxes are torch's and counted


def liger(case: Case, device: torch.device) -> Call:
    """Liger-Kernel end to end from logits, for the divergences it has."""
    if device.type == "cpu":
        raise Unavailable("Liger-Kernel needs a GPU, this run is on the CPU")
    if isinstance(case, TopKCase):
        raise Unavailable("Liger-Kernel has no loss against a stored teacher")
    try:
        from liger_kernel.transformers.jsd import LigerJSD
        from liger_kernel.transformers.kl_div import LigerKLDIVLoss
        from liger_kernel.transformers.tvd import LigerTVDLoss
    except Exception as error:  # its import runs device code of its own, which may raise anything
        raise Unavailable(f"Liger-Kernel does not import ({first_line(error)})") from None
    name, parameter, at = case.divergence.name, case.divergence.param, case.temperature
    if name == "kl":
        kl = LigerKLDIVLoss(reduction="batchmean")
        return _with_labels(case, lambda s, t: kl(_log(s, at), _soft(t, at)))
    if name in ("js", "reverse_kl"):
        # its beta = 1 stands for the reverse KL; in between beta weighs the teacher, as ours does
        jsd = LigerJSD(beta=1.0 if name == "reverse_kl" else parameter)
        return _with_labels(case, lambda s, t: jsd(_log(s, at), _log(t, at)))
    if name == "tv":
        tv = LigerTVDLoss(reduction="batchmean")
        return _with_labels(case, lambda s, t: tv(_soft(s, at), _soft(t, at)))
    raise Unavailable(f"Liger-Kernel has no {name}")


def _ours(inplace: bool) -> Callable[[Case, torch.device], Call]:
    return lambda case, device: _fastkd(case, inplace)


_OVER = "the gradient written over the student's logits"
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("eager", "plain torch, as written by hand", eager),
        Provider("compile", "torch.compile of the same", compiled),
        Provider("compile-max", "torch.compile with max-autotune", compiled_max),
        Provider("liger", "Liger-Kernel from logits, softmax included (GPU)", liger),
        Provider("reference", "fastkd on its plain torch reference", reference, ours=True),
        Provider("fastkd", "fastkd, a new gradient", _ours(False), ours=True),
        Provider("fastkd-inplace", f"fastkd, {_OVER}", _ours(True), ours=True, inplace=True),
    )
}
# The reference is a fallback and an oracle, and by far the slowest: in the rounds of all it would
# leave the others few. It is measured where it is asked for.
DEFAULT_PROVIDERS = ("eager", "compile", "liger", "fastkd", "fastkd-inplace")
TOY_PROVIDERS = tuple(name for name in PROVIDERS if not name.startswith("compile"))
DEMO_PROVIDERS = ("eager", "compile", "fastkd", "fastkd-inplace")
