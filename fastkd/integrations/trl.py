"""TRL's distillation losses, fused: one line before the trainer is built.

    from fastkd.integrations import trl as fused
    fused.patch(GKDTrainer)                    # or GOLDTrainer, IWOPDTrainer, MiniLLMTrainer

which checks TRL's version and the trainer, and then does no more than

    GKDTrainer.generalized_jsd_loss = staticmethod(fused.generalized_jsd_loss)

The trainer's own code is what computes logits, shifts labels and counts tokens; what changes is the
loss between them, which equals TRL's in value and gradient. Here as there, p is the teacher, q the
student, and there is no factor T^2.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

import fastkd
from fastkd.arguments.messages import shown
from fastkd.arguments.numbers import within
from fastkd.distill.serialization import absent

VERSIONS = ((1, 0), (2, 0))  # from the first to before the second: those that have these losses
REDUCTIONS = ("batchmean", "mean", "sum", "none")
FLOOR = 1e-8  # TRL's, under which a probability that is given as one does not fall
Trainer = TypeVar("Trainer")


def generalized_jsd_loss(
    student_logits: fastkd.LinearLogits | Tensor,
    teacher_logits: fastkd.LinearLogits | Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
    *,
    logits_are_probs: bool = False,
    top_k: int = 0,
    add_tail: bool = True,
    inplace: bool = False,
) -> Tensor:
    """TRL's generalised Jensen-Shannon loss of each token, reduced as TRL does.

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q,   0 < beta < 1
        KL(p || q) at beta = 0,   KL(q || p) at beta = 1

    p = softmax(teacher_logits / T), q = softmax(student_logits / T).

    >>> student, teacher = torch.randn(2, 2, 3, 5)
    >>> labels = torch.tensor([[-100, 1, 2], [-100, -100, 4]])  # shifted already: 3 tokens count
    >>> generalized_jsd_loss(student, teacher, labels, beta=0.5, num_items_in_batch=3).shape
    torch.Size([])

    Args:
        student_logits: [..., V], or a `fastkd.LinearLogits`.
        teacher_logits: [..., V], likewise.
        labels: int [...], shifted already; rows at -100 are left out. None for all rows.
        beta: 0 <= beta <= 1, the teacher's weight; 0 and 1 are the two KL, not limits.
        temperature: T > 0.
        reduction: "batchmean": mean over the kept rows (over size(0) without labels); "mean": the
            same over V; "sum"; "none": [..., V] ([kept, V] with labels), in plain torch.
        num_items_in_batch: the sum over rows is divided by it, whatever `reduction` says.
        logits_are_probs: GOLD's: the two are probabilities, not necessarily of sum 1, of at least
            1e-8; in plain torch.
        top_k: IW-OPD's: only the teacher's best k columns (beta = 0), the student's (beta = 1) or
            both count; 0 for all.
        add_tail: with top_k, the rest is one more outcome; otherwise both sides are renormalised.
        inplace: the gradient may overwrite student_logits, which must not be read after.

    Returns:
        0-d float32 (float64 for float64 logits), 0 where no row is kept.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Agarwal et al. 2023 (GKD), arXiv 2306.13649.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: got {shown(reduction)}, expected one of {', '.join(REDUCTIONS)}"
        )
    if isinstance(num_items_in_batch, bool):
        raise TypeError(f"num_items_in_batch: got {num_items_in_batch}, expected a number or None")
    entry = _entry(beta)
    columns = student_logits.size(-1), teacher_logits.size(-1)
    if columns[0] != columns[1]:
        raise ValueError(
            f"teacher_logits: got {columns[1]} columns, expected the student's {columns[0]}; where "
            "one vocabulary is padded further, cut both: logits[..., :n] of the columns in use"
        )
    in_top_k = 0 < top_k < student_logits.size(-1)
    if logits_are_probs or (reduction == "none" and num_items_in_batch is None):
        if isinstance(student_logits, fastkd.LinearLogits):
            raise TypeError("student_logits: got LinearLogits, expected a tensor [..., V]")
        if in_top_k:
            raise ValueError(f"top_k: got {top_k} with reduction='none' or probabilities; use 0")
        side = partial(_log_probs, are_probabilities=logits_are_probs, temperature=temperature)
        cells = entry.value(side(teacher_logits), side(student_logits), entry.param)
        kept = cells if labels is None else cells[labels != -100]
        return _reduced(kept, labels, reduction, num_items_in_batch)
    teacher: Any = teacher_logits
    if in_top_k:
        teacher = _support(student_logits, teacher_logits, beta, temperature, top_k, add_tail)
    loss = partial(
        fastkd.distillation_loss,
        student_logits,
        teacher,
        labels,
        alpha=0.0,
        divergence=entry,
        temperature=temperature,
        t_squared=False,
        inplace=inplace,
    )
    if num_items_in_batch is not None:
        return loss(normalizer=num_items_in_batch)
    if reduction == "sum":
        return loss(reduction="sum")
    if reduction == "batchmean" and labels is None:
        return loss(reduction="batchmean")
    if reduction == "mean" and not in_top_k:
        return loss() / student_logits.size(-1)
    if reduction == "mean":
        raise ValueError("reduction: got 'mean' with top_k, expected 'batchmean' or 'sum'")
    return loss()


def single_step_decomposition_loss(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """MiniLLM's regulariser, KL(q || p) of each token, reduced as TRL does.

    A log-softmax is its own log-softmax, in value and, behind one, in gradient: this is
    `generalized_jsd_loss` at beta = 1.

    Args:
        student_log_probs: log q [..., V], a log-softmax of the student's logits.
        teacher_log_probs: log p [..., V].
        mask: bool [...], the rows that count. None for all rows.
        reduction: as in `generalized_jsd_loss`.

    Returns:
        0-d float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """
    labels = None if mask is None else mask.long() - 1  # 0 or -1
    labels = None if labels is None else labels.masked_fill(labels < 0, -100)
    return generalized_jsd_loss(
        student_log_probs, teacher_log_probs, labels, beta=1.0, reduction=reduction
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "generalized_jsd_loss": generalized_jsd_loss,
    "_single_step_decomposition_loss": single_step_decomposition_loss,
}


def patch(trainer: Trainer, *, inplace: bool = False) -> Trainer:
    """Puts the fused loss in the place of the trainer's own.

    >>> from fastkd.integrations import trl as fused
    >>> class GKDTrainer:  # from trl.experimental.gkd import GKDTrainer
    ...     @staticmethod
    ...     def generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5): ...
    >>> fused.patch(GKDTrainer).generalized_jsd_loss is fused.generalized_jsd_loss
    True

    IW-OPD's trainer asks for it with distillation_objective="jsd" alone, which is not its default,
    and GOLD's not with use_uld_loss: a warning says where the trainer will not call it.

    Args:
        trainer: a class of TRL that has `generalized_jsd_loss` (GKD, GOLD, IW-OPD) or
            `_single_step_decomposition_loss` (MiniLLM), a class derived from one, or one trainer.
        inplace: let the gradient overwrite the student's logits: nothing else may read them after
            the loss, neither a metric nor `return_outputs`.

    Returns:
        The trainer.

    Raises:
        ImportError: no TRL, or one whose version is out of range.
        TypeError: a trainer without such a loss, or whose loss takes what this one does not.
    """
    check_version()
    found = [name for name in LOSSES if callable(getattr(trainer, name, None))]
    if not found:
        raise TypeError(
            f"trainer: got {_name(trainer)}, which has none of {', '.join(LOSSES)}; expected "
            "GKDTrainer, GOLDTrainer, IWOPDTrainer or MiniLLMTrainer"
        )
    for name in found:
        loss = LOSSES[name]
        known = inspect.signature(loss).parameters
        unknown = [
            parameter
            for parameter in inspect.signature(getattr(trainer, name)).parameters
            if parameter not in known and parameter != "self"
        ]
        if unknown:
            raise TypeError(
                f"trainer: {_name(trainer)}.{name} takes {', '.join(unknown)}, which fastkd does "
                "not know; leave this trainer as it is, or use an older trl"
            )
    for name in found:
        loss = LOSSES[name]
        if inplace and "inplace" in inspect.signature(loss).parameters:
            loss = partial(loss, inplace=True)
        setattr(trainer, name, staticmethod(loss) if isinstance(trainer, type) else loss)
    unused = _unused(trainer)
    if unused:
        warnings.warn(f"trainer: {_name(trainer)} {unused}", stacklevel=2)
    return trainer


def _unused(trainer: object) -> str:
    """Why a trainer would go on without the loss that it was given, or nothing."""
    if getattr(trainer, "use_uld_loss", False):
        return "does not call the fused loss for use_uld_loss=True: nothing changes there"
    class_names = {base.__name__ for base in _class(trainer).__mro__}
    default = "iw_opd" if "IWOPDTrainer" in class_names else "jsd"
    if getattr(trainer, "distillation_objective", default) != "jsd":
        return (
            "calls the fused loss with distillation_objective='jsd' alone, and its default is "
            "'iw_opd', for which nothing changes"
        )
    return ""


def check_version(version: str | None = None) -> None:
    """Raises ImportError, naming what was found and what is expected, if TRL does not fit.

    Args:
        version: as in "1.16.0"; None for that of the installed package.
    """
    from importlib import metadata

    expected = "expected trl >={}.{}, <{}.{}".format(*VERSIONS[0], *VERSIONS[1])
    if version is None:
        try:
            version = metadata.version("trl")
        except metadata.PackageNotFoundError:
            raise ImportError(f"{absent('trl', __name__, 'trl')}; {expected}") from None
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        raise ImportError(f"trl: got {version}, {expected}")


def _name(trainer: object) -> str:
    return _class(trainer).__name__


def _class(trainer: object) -> type:
    return trainer if isinstance(trainer, type) else type(trainer)


def _entry(beta: float) -> Any:
    beta = within("beta", beta, 0.0, 1.0, "a number from 0 to 1")
    if beta in (0, 1):
        return fastkd.divergences["reverse_kl" if beta else "kl"]
    return fastkd.divergences.js(beta=float(beta))


def _log_probs(x: Any, are_probabilities: bool, temperature: float) -> Tensor:
    if are_probabilities:
        return torch.as_tensor(x).clamp_min(FLOOR).log()
    return (x / temperature).log_softmax(-1)


def _reduced(
    kept: Tensor, labels: Tensor | None, reduction: str, items: float | Tensor | None
) -> Tensor:
    if items is not None:
        return kept.sum() / torch.as_tensor(items, device=kept.device)
    if reduction == "none":
        return kept
    if reduction == "sum":
        return kept.sum()
    # rows kept, or with "mean" cells
    count = kept.numel() if reduction == "mean" else kept.size(0)
    return kept.sum() / max(count, 1)


@torch.no_grad()
def _support(
    student: Any, teacher: Any, beta: float, temperature: float, k: int, add_tail: bool
) -> fastkd.TopK:
    """The columns that count as a stored teacher; one named twice is padding, -1."""
    tail: Literal["bucket", "restrict"] = "bucket" if add_tail else "restrict"
    if beta == 0:
        return fastkd.topk_from_logits(teacher, k, temperature=temperature, tail=tail)
    own = student.topk(k).indices
    if beta == 1:
        columns = own
    else:
        best = teacher.topk(k).indices
        twice = (own.unsqueeze(-1) == best.unsqueeze(-2)).any(-1)
        columns = torch.cat((best, own.masked_fill(twice, -1)), -1)
    scaled = (teacher / temperature).to(torch.promote_types(teacher.dtype, torch.float32))
    logprobs = scaled.gather(-1, columns.clamp_min(0)) - scaled.logsumexp(-1, keepdim=True)
    return fastkd.TopK(logprobs.clamp_max(0.0), columns, temperature=temperature, tail=tail)
