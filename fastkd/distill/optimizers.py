"""The optimizer of a run: over what learns and over nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastkd.arguments.messages import shown

from .objective import Objective
from .teachers import Teacher


def optimizer_of(
    optimizer: torch.optim.Optimizer | None,
    student: nn.Module,
    objective: Objective,
    followers: Sequence[Teacher],
    lr: float,
) -> torch.optim.Optimizer:
    """One over the student and what the terms learn, and over no teacher."""
    learnt = {p for p in objective.modules.parameters() if p.requires_grad}
    if optimizer is None:
        student_parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([{"params": student_parameters}], lr=lr)
    else:
        check_optimizer(optimizer, [*student.parameters(), *learnt])
    in_optimizer = {p for group in optimizer.param_groups for p in group["params"]}
    if missing := {
        n: p for n, p in objective.modules.named_parameters() if p in learnt - in_optimizer
    }:
        _join(optimizer, missing)
    frozen = {p for follower in followers for m in follower.models for p in m.parameters()}
    if shared := len(in_optimizer & frozen):
        inside = frozen <= set(student.parameters())
        which = ", which is the student or a part of it (give a copy)" if inside else ""
        raise ValueError(
            f"optimizer: got {shared} parameters of the teacher{which}, expected none: what both "
            "models use has requires_grad False and is not in the optimizer"
        )
    return optimizer


def check_optimizer(optimizer: Any, weights: Sequence[nn.Parameter]) -> None:
    """TypeError or ValueError for an optimizer that cannot step, or of nothing that learns here."""
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer: got {shown(optimizer)}, expected a torch optimizer over the model's "
            "parameters, such as torch.optim.AdamW(student.parameters())"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer: got LBFGS, whose step computes the loss again; expected one that steps "
            "once on a gradient"
        )
    here = {p for group in optimizer.param_groups for p in group["params"]}
    if here.isdisjoint(weights):
        raise ValueError(
            f"optimizer: got {len(here)} parameters, none of them the model's, which would not "
            "learn; expected an optimizer made over this very model (a copy of it, and one that "
            "fully_shard has put in shards since, has other parameters)"
        )


def _join(optimizer: Any, missing: dict[str, nn.Parameter]) -> None:
    """Add parameters to the first group: a new one would break a scheduler made before."""
    bare = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
    if type(bare).add_param_group is not torch.optim.Optimizer.add_param_group:
        bare.add_param_group({"params": list(missing.values())})  # it keeps books of its own
        return
    first = bare.param_groups[0]
    first["params"].extend(missing.values())
    if "param_names" in first:
        first["param_names"].extend(f"terms.{name}" for name in missing)
