"""A frozen teacher beside any LightningModule, or in a loop of Lightning Fabric.

A teacher that is an attribute of a LightningModule is a part of it: its weights go into every
checkpoint and, from `self.parameters()`, into the optimizer, and `fit` puts it into train mode. A
callback holds it instead.

    >>> import torch, lightning
    >>> from fastkd.integrations.lightning import Distillation
    >>> class Student(lightning.LightningModule):
    ...     def __init__(self, distillation):
    ...         super().__init__()
    ...         self.net, self.distillation = torch.nn.Linear(5, 3), distillation
    ...
    ...     def training_step(self, batch, _):
    ...         inputs, labels = batch
    ...         return self.distillation.distillation_step(self.net(inputs), inputs, labels)
    ...
    ...     def configure_optimizers(self):
    ...         return torch.optim.AdamW(self.parameters())
    >>> distillation = Distillation(torch.nn.Linear(5, 3), temperature=2.0, alpha=0.5)
    >>> student = Student(distillation)
    >>> data = torch.utils.data.TensorDataset(torch.randn(8, 5), torch.randint(3, (8,)))
    >>> trainer = lightning.Trainer(
    ...     max_epochs=1, callbacks=[distillation], accelerator="cpu", logger=False,
    ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ... )
    >>> trainer.fit(student, torch.utils.data.DataLoader(data, 4))
    >>> sorted(student.state_dict())
    ['net.bias', 'net.weight']

In a loop of Fabric `distillation_step` is the same line; `check` does what `fit` would:

    >>> fabric = lightning.Fabric(accelerator="cpu")
    >>> net = torch.nn.Linear(5, 3)
    >>> model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    >>> distillation.check(model, [optimizer])
    >>> for inputs, labels in fabric.setup_dataloaders(torch.utils.data.DataLoader(data, 4)):
    ...     loss = distillation.distillation_step(model(inputs), inputs, labels)
    ...     fabric.backward(loss)
    ...     optimizer.step()
    ...     optimizer.zero_grad()
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import MadeOf
from fastkd.distill.batch import Outputs, forward, mapped, tensors, to
from fastkd.distill.serialization import absent
from fastkd.integrations.hooks import answering, shared

VERSIONS = (2, 3)  # of Lightning: from the first, below the second

try:
    _lightning: Any = importlib.import_module("lightning")
    _callbacks: Any = importlib.import_module("lightning.pytorch")
except ImportError as error:  # the same under its older name
    try:
        _lightning = _callbacks = importlib.import_module("pytorch_lightning")
    except ImportError:
        raise ImportError(absent("lightning", __name__, "lightning", error)) from error


class Distillation(MadeOf, _callbacks.Callback):  # type: ignore[misc]
    """Freezes a teacher, keeps it in eval mode and out of the student, and gives the loss.

        alpha CE(labels, softmax(student)) + (1 - alpha) T^2 D(p, q)

    Give it to `Trainer(callbacks=[...])` and to the LightningModule, which calls
    `distillation_step`. A mean runs over the batch at hand: with `accumulate_grad_batches` or
    several processes, give `normalizer` for one over all labels of a step.

    The teacher keeps the dtype it came in, whatever the Trainer's precision ("bf16-true" is of the
    student): inputs of floats are cast to it. `teacher.bfloat16()` makes it as cheap.

    Args:
        teacher: a module, inputs -> logits [..., V] or an output with `logits`. Frozen here: eval
            mode, no parameter requires grad; frozen modules that the student has, too, keep their
            own mode there. None where each step is given the teacher's outputs.
        **options: of `fastkd.distillation_loss` (temperature, alpha, divergence, ...); those of
            `distillation_step` come on top.

    Raises:
        TypeError: a teacher that is no module.
        RuntimeError: a version of Lightning that is not known.
        ValueError: when training starts: a teacher that is a part of the student, is in train mode
            or requires grad again, that shares parameters with the student which would learn, or
            whose parameters are in an optimizer.

    Hinton et al. 2015, arXiv 1503.02531.
    """

    def __init__(self, teacher: nn.Module | None, **options: Any) -> None:
        super().__init__()
        _check_version(_lightning.__version__)
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher: got {type(teacher).__name__}, expected a module")
        self.teacher, self.options = teacher, options
        self._student: nn.Module | None = None
        self._trained: list[nn.Module] = []  # what the teacher took out of train mode
        self._frozen: set[int] = set()  # and, by id, what would learn without it
        self._warned = False
        if teacher is not None:
            self._trained = [module for module in teacher.modules() if module.training]
            self._frozen = {id(p) for p in teacher.parameters() if p.requires_grad}
            teacher.requires_grad_(False).eval()

    def distillation_step(
        self,
        student: Any,
        inputs: Any,
        labels: Tensor | None = None,
        *,
        teacher: Tensor | fastkd.TopK | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student: the student's logits [..., V], an output with `logits`, or a
                `fastkd.LinearLogits`.
            inputs: what the teacher sees: a tensor, or a dict of its keyword arguments.
            labels: [...] integers; may be None with alpha=0.
            teacher: with `Distillation(None)`, the outputs of a cached teacher: logits [..., V] or
                a `fastkd.TopK` [..., K].
            **options: of `fastkd.distillation_loss`, before those of the constructor.

        Raises:
            ValueError: a teacher twice, as a module and stored, or none at all.
        """
        if (self.teacher is None) == (teacher is None):
            got = "neither a module nor" if teacher is None else "a module and also"
            raise ValueError(
                f"teacher: got {got} the outputs of a cached one, expected one of them: "
                "Distillation(teacher), or Distillation(None) and distillation_step(..., teacher=)"
            )
        options = {**self.options, **options}
        if options.get("alpha") == 1 and not self._warned:
            self._warned = True
            warnings.warn(
                "teacher: given, but with alpha=1 the loss is that of the labels alone and does "
                "not read it",
                stacklevel=2,
            )
        student_logits = (
            student
            if isinstance(student, fastkd.LinearLogits)
            else Outputs(student, role="student").logits
        )
        teacher_logits = (
            self._teacher_output(inputs) if teacher is None else to(teacher, student_logits.device)
        )
        return fastkd.distillation_loss(student_logits, teacher_logits, labels, **options)

    def _teacher_output(self, inputs: Any) -> Any:
        assert self.teacher is not None
        first = next(tensors(inputs), None)
        if first is not None:
            self.teacher.to(first.device)
        with torch.no_grad(), answering(self.teacher, self._student):
            return Outputs(forward(self.teacher, self._as_teacher(inputs)), role="teacher").logits

    def _as_teacher(self, inputs: Any) -> Any:
        """Floats in the dtype of the teacher's weights, where they have one and autocast is off."""
        assert self.teacher is not None
        dtypes = {p.dtype for p in self.teacher.parameters() if p.is_floating_point()}
        first = next(tensors(inputs), None)
        if len(dtypes) != 1 or first is None or torch.is_autocast_enabled(first.device.type):
            return inputs
        (dtype,) = dtypes
        return mapped(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.check(pl_module, ())

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.check(pl_module, trainer.optimizers)

    def check(self, student: nn.Module, optimizers: Iterable[Any]) -> None:
        """Raise ValueError for a teacher that would be trained or saved with the student."""
        self._student = student
        if self.teacher is None:
            return
        inside = {id(part): name for name, part in student.named_modules()}
        if id(self.teacher) in inside:
            raise ValueError(
                f"teacher: got {inside[id(self.teacher)]!r}, a part of the student, which would "
                "train and save it; keep it in this callback alone"
            )
        weights = {id(weight): name for name, weight in student.named_parameters()}
        learnt = [name for one, name in weights.items() if one in self._frozen]
        if learnt:
            raise ValueError(
                f"teacher: got {len(learnt)} parameters of the student ({learnt[0]!r} is one), "
                "which would be frozen with it, expected a module of its own (copy.deepcopy)"
            )
        for part in shared(self._trained, student):
            part.training = True
        self._trained = []
        for name, part in self.teacher.named_modules():
            if part.training and id(part) not in inside:
                where = f"{name!r} of it" if name else "it"
                raise ValueError(f"teacher: got {where} in train mode, expected eval mode")
        own = list(self.teacher.named_parameters())
        for name, weight in own:
            if weight.requires_grad:
                raise ValueError(f"teacher: got {name!r} that requires grad, expected it frozen")
        known = {id(weight) for _, weight in own} - weights.keys()
        for optimizer in optimizers:
            taken = sum(id(p) in known for g in optimizer.param_groups for p in g["params"])
            if taken:
                raise ValueError(f"optimizer: got {taken} parameters of the teacher, expected none")


def _check_version(version: str) -> None:
    found, (least, below) = re.match(r"\d+", version), VERSIONS
    if found is None or not least <= int(found.group()) < below:
        raise RuntimeError(f"lightning: got version {version}, expected {least}.x")
