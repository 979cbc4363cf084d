"""A student that is its own teacher: the one that it was before its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .batch import Batch, Outputs, unwrap
from .teachers import OF_STUDENT, ModelTeacher


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """A context in which a PEFT model, or a transformers' model with adapters, is its base.

    PEFT sets requires_grad of adapters on the way back; here every parameter gets its own back.

    Raises:
        ValueError: no adapter.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        if callable(off := getattr(model, "disable_adapter", None)):
            with off():
                yield
        elif getattr(model, "_hf_peft_config_loaded", False):
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()
        else:
            raise ValueError(
                f"teacher: got 'base' for {type(model).__name__}, which has no adapter to leave "
                "out, expected a student of PEFT (get_peft_model or add_adapter)"
            )
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class BaseTeacher(ModelTeacher):
    """The student without its adapter, in eval mode and without gradient: `teacher="base"`.

    No second model is held. Modes, requires_grad and the adapter are put back after each forward,
    also where it fails.
    """

    def __init__(self) -> None:
        self.models = ()

    def bind(self, student: nn.Module) -> None:
        self._student = student
        with without_adapter(unwrap(student)):
            pass  # says now that there is none
        super().__init__(unwrap(student))
        self.models = ()  # which are kept out of the optimizer

    def begin(self) -> None:
        self._student_modules = {id(part) for part in self.model.modules()}
        self._sort_modules()

    def __call__(self, batch: Batch) -> Outputs:
        with without_adapter(self.model):
            return super().__call__(batch)

    @contextmanager
    def hooked(self, names: tuple[str, ...]) -> Iterator[None]:
        if names:  # the student's own forward would fill them, too
            raise ValueError(f"layer: got {list(names)} of the student itself, expected none")
        yield

    def identity(self) -> Any:
        return ["BaseTeacher", type(self.model).__name__]


OF_STUDENT["base"] = BaseTeacher
