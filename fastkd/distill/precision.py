"""How a training step is taken: with torch's own autocast and gradient scaler, or accelerate's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import PLAINLY, Ranks

VERSIONS = (1, 2)  # of accelerate: from the first, below the second
KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU")  # a whole model in every process


class Stepping:
    """Autocast, backward and the optimizer's step in plain torch.

    Args:
        device: where the models are.
        amp: dtype of autocast, or None; float16 comes with a gradient scaler.
        ranks: those that train together, whose shards of gradients are clipped as one.
    """

    speaks = True  # whether this process shows progress
    accumulate = 1  # micro-batches of a step, where the trainer's caller does not say

    def __init__(self, device: torch.device, amp: torch.dtype | None, ranks: Ranks) -> None:
        self.device, self._amp, self._ranks = device, amp, ranks
        self.scaler: Any = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self._amp) if self._amp else PLAINLY

    def prepared(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer to step with."""
        return optimizer

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Any, weights: Sequence[Tensor], clip_norm: float | None) -> None:
        if clip_norm is not None:
            self.scaler.unscale_(optimizer)
            self._ranks.clip_(weights, clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()


class Accelerated(Stepping):
    """The same by an `accelerate.Accelerator`: its precision, its processes, its gradient scaler.

    The loss of a step is normalised by the trainer, over micro-batches and processes, so that
    accelerate's own division by its number of micro-batches is undone.

    >>> import torch, accelerate
    >>> from fastkd import distill
    >>> data = torch.utils.data.TensorDataset(torch.randn(8, 5), torch.randint(3, (8,)))
    >>> student, teacher = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    >>> accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    >>> student, optimizer, loader = accelerator.prepare(
    ...     student,
    ...     torch.optim.AdamW(student.parameters()),
    ...     torch.utils.data.DataLoader(data, 2),
    ... )
    >>> steps = distill.train(
    ...     student,
    ...     loader,
    ...     [distill.hard(0.5), distill.soft(0.5)],
    ...     teacher=teacher,
    ...     optimizer=optimizer,
    ...     accelerator=accelerator,
    ...     progress=False,
    ... )
    >>> len(steps)
    2

    Raises:
        TypeError, ValueError, RuntimeError: no accelerator, one that splits the model over its
            processes, accelerate in a version that is not known.
    """

    def __init__(self, accelerator: Any) -> None:
        _check(accelerator)
        self.accelerator, self.device = accelerator, accelerator.device
        if self.device.type == "cpu":
            self.device = torch.device("cpu")  # which it numbers by process
        self.accumulate = accelerator.gradient_accumulation_steps
        self.speaks = accelerator.is_local_main_process
        off = torch.amp.GradScaler(self.device.type, enabled=False)
        self.scaler = off if accelerator.scaler is None else accelerator.scaler

    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def prepared(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """As a rule both have come from `accelerator.prepare`; an optimizer made here has not."""
        alone = self.accelerator.num_processes == 1
        if not alone and not isinstance(student, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"student: got a {type(student).__name__} in one of "
                f"{self.accelerator.num_processes} processes, expected what accelerator.prepare "
                "gives: its gradients would never meet those of the others"
            )
        from accelerate.optimizer import AcceleratedOptimizer

        if isinstance(optimizer, AcceleratedOptimizer):
            return optimizer
        return self.accelerator.prepare_optimizer(optimizer)

    def backward(self, loss: Tensor) -> None:
        # of the whole process: a Trainer that ended within a step has left it False, and without it
        # the optimizer neither steps nor clears gradients
        self.accelerator.sync_gradients = True
        self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)

    def step(self, optimizer: Any, weights: Sequence[Tensor], clip_norm: float | None) -> None:
        if clip_norm is not None:
            self.accelerator.clip_grad_norm_(weights, clip_norm)
        optimizer.step()


def stepping(
    accelerator: Any, device: torch.device, amp: torch.dtype | None, ranks: Ranks
) -> Stepping:
    """The `Stepping` of a run on `device`."""
    if accelerator is None:
        return Stepping(device, amp, ranks)
    if amp is not None:
        raise ValueError(
            f"amp: got {amp} with an accelerator, expected None: Accelerator(mixed_precision=...) "
            "says it"
        )
    return Accelerated(accelerator)


def _check(accelerator: Any) -> None:
    try:
        import accelerate
    except ImportError:
        accelerate = None
    if accelerate is None or not isinstance(accelerator, accelerate.Accelerator):
        raise TypeError(
            f"accelerator: got {type(accelerator).__name__}, expected an accelerate.Accelerator"
        )
    found = re.match(r"\d+", accelerate.__version__)
    least, below = VERSIONS
    if found is None or not least <= int(found.group()) < below:
        raise RuntimeError(
            f"accelerate: got version {accelerate.__version__}, expected {least}.x"
            + (f" to {below - 1}.x" if below - least > 1 else "")
        )
    if (distributed_type := accelerator.distributed_type.name) not in KINDS:
        raise ValueError(
            f"accelerator: got distributed type {distributed_type}, expected one of "
            f"{', '.join(KINDS)}, where "
            "every process holds the whole model"
        )
