"""The same checks on one batch, without a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import judged
from .findings import Findings
from .source import Program
from .watch import Watch


def diagnose(
    student: nn.Module, teacher: nn.Module | None, batch: Any, loss: Callable[..., Tensor]
) -> Findings:
    """What is wrong with a loss on one batch: the checks of `python -m fastkd doctor`.

    Args:
        student: the model that is trained.
        teacher: the model that teaches, run as it stands: in its mode, with its gradients; None
            where the batch holds what the loss needs.
        batch: (inputs, ...), a dictionary of the models' arguments, or the inputs themselves.
        loss: called as loss(student_output, teacher_output, batch), returns a 0-d tensor.

    Returns:
        A list of `Finding`, printed as a table; empty where nothing was found. Gradients, buffers
        and the random state are put back.

    Raises:
        TypeError: loss is not callable, or returns no tensor.
    """
    if not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a callable")
    models = [x for x in (student, teacher) if x is not None]
    buffers = [(x, x.detach().clone()) for model in models for x in model.buffers()]
    gradients = [(x, x.grad) for model in models for x in model.parameters()]
    watch = Watch(Program(), None)
    with torch.random.fork_rng(), watch.watching():
        try:
            for x, _ in gradients:
                x.grad = None
            watch.given = watch.book.of_parameters(student.parameters())
            first = _call(student, batch)
            second = None if teacher is None else _call(teacher, batch)
            value = loss(first, second, batch)
            if not isinstance(value, Tensor):
                raise TypeError(f"loss: got a {type(value).__name__} from it, expected a tensor")
            if value.requires_grad:
                value.backward()
            else:
                watch.backward(value)
            watch.grade()
            moved = any(x.grad is not None and bool(x.grad.any()) for x in student.parameters())
        finally:
            for x, gradient in gradients:
                x.grad = gradient
            with torch.no_grad():
                for buffer, held in buffers:
                    buffer.copy_(held)
    if not moved and value.requires_grad:
        watch.mark("gradient", watch.program.site(), "no parameter of the student has a gradient")
    return judged(watch)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)
