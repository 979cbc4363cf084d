"""The doctor's checks on one batch, without a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.doctor.checks import judged
from fastkd.doctor.findings import Findings
from fastkd.doctor.source import Program
from fastkd.doctor.watch import Watch

from .batch import Outputs, as_batch, forward, in_eval
from .hooks import Hooks
from .objective import Objective
from .terms import Term


def diagnose(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Any,
    loss: Callable[..., Tensor] | Term | Sequence[Term],
) -> Findings:
    """What is wrong with a loss on one batch: the checks of `python -m fastkd doctor`.

    Args:
        student: the model that is trained.
        teacher: the model that teaches, run as it stands: in its mode, with its gradients; None
            where the batch holds what the loss needs.
        batch: (inputs, ...), a dictionary of the models' arguments, or the inputs themselves.
        loss: called as loss(student_output, teacher_output, batch), returns a 0-d tensor. Or terms
            of `distill.train`, one or a list; batch and models are then read as it reads them, the
            teacher in eval mode.

    Returns:
        A list of `Finding`, printed as a table; empty where nothing was found. Gradients, buffers
        and the random state are put back.

    Raises:
        TypeError: loss is neither callable nor terms, or returns no tensor.
    """
    terms = isinstance(loss, (Term, list, tuple))
    if not callable(loss) and not terms:
        raise TypeError(f"loss: got {type(loss).__name__}, expected a callable, a Term or several")
    models = [x for x in (student, teacher) if x is not None]
    buffers = [(x, x.detach().clone()) for model in models for x in model.buffers()]
    gradients = [(x, x.grad) for model in models for x in model.parameters()]
    watch = Watch(Program(), None)
    with torch.random.fork_rng(), watch.watching():
        try:
            for x, _ in gradients:
                x.grad = None
            watch.given = watch.book.of_parameters(student.parameters())
            value = (_of_terms if terms else _of_call)(student, teacher, batch, loss)
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


def _of_call(student: nn.Module, teacher: nn.Module | None, batch: Any, loss: Any) -> Any:
    first = _call(student, batch)
    return loss(first, None if teacher is None else _call(teacher, batch), batch)


def _of_terms(student: nn.Module, teacher: nn.Module | None, batch: Any, loss: Any) -> Tensor:
    """The loss of one step of `distill.train`."""
    objective, batch = Objective(loss), as_batch(batch)
    with ExitStack() as stack:
        hooks = stack.enter_context(Hooks(student, objective.student_layers))
        second = Outputs(batch.teacher)
        if teacher is not None:
            others = stack.enter_context(Hooks(teacher, objective.teacher_layers))
            seen = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
            with in_eval(teacher), torch.no_grad():
                second = Outputs(forward(teacher, seen), role="teacher")
            second.features = others.take()
        first = Outputs(forward(student, batch.inputs), role="student")
        first.features = hooks.take()
        return objective(first, second, batch)[0]


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)
