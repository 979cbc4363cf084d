"""Modes of a teacher's modules, and of those that it shares with the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each of its modules gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def answering(teacher: nn.Module, student: nn.Module | None) -> Iterator[None]:
    """A teacher in eval mode throughout, whatever was done to it or to a module of it since.

    It stays so; but what it shares with the student has a mode of its own there (dropout, and the
    same again when gradient checkpointing computes a part anew), which is put back. Where the
    student is not known, any part of a teacher that is itself in eval mode may be shared.
    """
    training = [module for module in teacher.modules() if module.training]
    if training:
        if student is not None:
            training = shared(training, student)
        elif teacher.training:
            training = []
        teacher.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def shared(modules: list[nn.Module], student: nn.Module) -> list[nn.Module]:
    """Those of `modules` that are in the student, too."""
    own = {id(module) for module in student.modules()} if modules else set()
    return [module for module in modules if id(module) in own]
