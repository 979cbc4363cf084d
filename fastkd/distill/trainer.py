"""A minimal trainer: read `train` from top to bottom, the loss is one line of it.

A loader is anything that, once per epoch, gives batches (inputs, labels), or inputs alone. A model
is any module that turns inputs into logits [..., V]. Only safetensors and JSON are read or written.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # torch's own label for a row that does not count
CHECK_EVERY = {
    "cpu": 1
}  # steps between looks at the loss; elsewhere 50: a look makes the host wait


class Step(NamedTuple):
    """One optimizer step; `epoch` and `step` (of the whole run) count from 0, `lr` as applied."""

    epoch: int
    step: int
    loss: float
    lr: float


class Evaluation(NamedTuple):
    """Share of right answers in [0, 1] and mean cross-entropy in nats, over `rows` rows."""

    accuracy: float
    cross_entropy: float
    rows: int


def train(
    student: nn.Module,
    loader: Iterable[Any],
    loss: Callable[[Tensor, Any, Any], Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    teacher: nn.Module | None = None,
    epochs: int = 1,
    lr: float = 1e-3,
    device: torch.device | str | None = None,
    clip_norm: float | None = None,
    schedule: Callable[[int], float] | None = None,
    progress: bool = True,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[Step]:
    """Train `student` in place, beside a frozen `teacher` or alone, and return every `Step`.

    Args:
        student: module, inputs -> logits [..., V]; moved to `device`.
        loader: gives (inputs, labels) or inputs; iterated once per epoch.
        loss: (student logits, teacher logits or None, labels or None) -> scalar tensor.
        optimizer: over the student's parameters; None makes AdamW at `lr`.
        teacher: module, inputs -> logits; runs in eval mode without gradient, leaves as it came.
        epochs: passes over `loader`, at least 1.
        lr: learning rate of the AdamW made here; not used when an optimizer is given.
        device: where to run; None means where the student is.
        clip_norm: upper bound of the gradient's 2-norm, above 0; None leaves it as it is.
        schedule: step (from 0) -> factor on each group's learning rate; undone on return.
        progress: show a tqdm bar.
        on_step: called as (epoch, step, detached loss) after each step.

    Raises:
        TypeError, ValueError: a loader without batches or with others, an argument out of range, a
            loss that is no scalar of the student, an optimizer with parameters of the teacher.
        FloatingPointError: the loss is NaN or infinite. On the CPU this is seen before the step is
            taken; elsewhere every 50 steps and at the end of an epoch.

    Paper: Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
    """
    if epochs < 1:
        raise ValueError(f"epochs: got {epochs!r}, expected an integer >= 1")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm: got {clip_norm!r}, expected > 0 or None")
    where = _device(student) if device is None else torch.device(device)
    student.to(where)
    frozen = set() if teacher is None else set(teacher.to(where).parameters())
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr)
    groups = optimizer.param_groups
    weights = [p for group in groups for p in group["params"]]
    if shared := sum(p in frozen for p in weights):
        raise ValueError(f"optimizer: got {shared} parameters of the teacher, expected none")

    every = CHECK_EVERY.get(where.type, 50)
    steps: list[Step] = []
    unread: list[tuple[int, float, Tensor]] = []
    kept = _restored(student, teacher, groups=groups)
    with kept as rates, _bar(epochs, loader, progress) as bar:
        for epoch in range(epochs):
            student.train()
            for inputs, labels in _batches(loader, where, f"in epoch {epoch}"):
                step = len(steps) + len(unread)
                for group, rate in rates:
                    group["lr"] = rate * schedule(step) if schedule else rate

                soft = None
                if teacher is not None:
                    teacher.eval()  # every step: whoever else holds the teacher may switch it
                    with torch.no_grad():
                        soft = teacher(inputs)
                value = loss(student(inputs), soft, labels)

                if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
                    got = f"{type(value).__name__} of shape {getattr(value, 'shape', '()')}"
                    raise ValueError(f"loss: got {got}, expected a 0-d tensor that requires grad")
                unread.append((epoch, groups[0]["lr"], value.detach()))
                if len(unread) >= every:
                    _read(unread, steps)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(weights, clip_norm)
                optimizer.step()
                if bar is not None:
                    bar.update()
                if on_step is not None:
                    on_step(epoch, step, value.detach())
            _read(unread, steps)
            if bar is not None:
                bar.set_postfix(epoch=epoch, loss=f"{steps[-1].loss:.4g}")
    return steps


def evaluate(model: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Accuracy and mean cross-entropy of `model` in eval mode; rows labelled -100 do not count.

    Args:
        model: module, inputs -> logits [..., V]; its mode is restored.
        loader: gives (inputs, labels [...] int).

    Raises:
        ValueError: no batch, a batch without labels, or no row that counts.
    """

    def count(labels: Tensor | None, logits: Tensor) -> list[Tensor]:
        if labels is None:
            raise ValueError("loader: got inputs alone, expected (inputs, labels)")
        flat = logits.flatten(0, -2).float()
        nats = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return [(logits.argmax(-1) == labels).sum(), nats]

    rows, right, nats = _totals([model], loader, count)
    return Evaluation(right / rows, nats / rows, int(rows))


def agreement(model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any]) -> float:
    """Share of rows, in [0, 1], where both models (in eval mode) predict the same class.

    Args:
        model_a, model_b: modules on one device, inputs -> logits [..., V]; modes are restored.
        loader: gives inputs, or (inputs, labels [...]) whose rows labelled -100 do not count.

    Raises:
        ValueError: no batch, or no row that counts.
    """

    def count(labels: Tensor | None, a: Tensor, b: Tensor) -> list[Tensor]:
        same = a.argmax(-1) == b.argmax(-1)
        return [(same if labels is None else same & (labels != IGNORED)).sum()]

    rows, same = _totals([model_a, model_b], loader, count)
    return same / rows


def save(model: nn.Module, path: str | os.PathLike[str], metadata: Any = None) -> None:
    """Write a model's state as safetensors, with `metadata` as JSON in its header.

    The file appears complete or not at all; one that was there stays until then.

    Args:
        model: module whose state dict holds tensors only; tied weights are written once per name.
        path: file to write, in an existing folder.
        metadata: anything JSON can hold (NaN and infinity it cannot).

    Raises:
        TypeError, ValueError: metadata or a state that the format cannot hold.
    """
    header = {"format": "pt", "fastkd": json.dumps(metadata, allow_nan=False)}
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: got {type(value).__name__} as {name!r}, expected a tensor")
        state[name] = value.detach().to("cpu", copy=True).contiguous()  # a copy: unties weights
    part = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}.tmp")
    try:
        part.touch()
        mode = part.stat().st_mode
        _needed("safetensors.torch", "save").save_file(state, part, metadata=header)
        part.chmod(mode)  # safetensors may make the file its owner's alone, whatever the umask
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the bytes
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike[str]) -> Any:
    """Read a safetensors file into `model` and return its metadata (None in a file not by `save`).

    Args:
        model: module with exactly the names and shapes of the file; keeps its dtypes and device.
        path: file to read.

    Raises:
        ValueError: names or shapes differ; the model is untouched then.
    """
    with _needed("safetensors", "load").safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        header = file.metadata() or {}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(theirs | ours):
        if (got := theirs.get(name)) != (wanted := ours.get(name)):
            raise ValueError(f"path: got {path} with {name!r} of shape {got}, expected {wanted}")
    model.load_state_dict(state)
    return json.loads(header.get("fastkd", "null"))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _batches(loader: Iterable[Any], device: torch.device, when: str) -> Iterator[tuple[Any, Any]]:
    batch = None
    for batch in loader:
        parts = batch if isinstance(batch, (tuple, list)) else [batch]
        if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
            got = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(f"loader: got a batch ({got}), expected (inputs, labels) or inputs")
        yield parts[0].to(device), parts[1].to(device) if len(parts) == 2 else None
    if batch is None:
        raise ValueError(f"loader: got no batch {when}; a generator lasts one pass only")


def _totals(
    models: list[nn.Module], loader: Iterable[Any], count: Callable[..., Any]
) -> list[float]:
    """[rows that count, *count(labels, *logits)], each summed over the loader; one host sync."""
    parts = []
    with torch.no_grad(), _restored(*models):
        for inputs, labels in _batches(loader, _device(models[0]), "to evaluate"):
            logits = [model.eval()(inputs) for model in models]
            shape = logits[0].shape[:-1]
            rows = torch.tensor(shape.numel()) if labels is None else (labels != IGNORED).sum()
            parts.append(torch.stack([rows.to(logits[0].device), *count(labels, *logits)]))
    totals = [math.fsum(column) for column in zip(*torch.stack(parts).tolist(), strict=True)]
    if totals[0] == 0:
        raise ValueError(f"loader: got only rows labelled {IGNORED}, expected others too")
    return totals


@contextmanager
def _restored(*models: nn.Module | None, groups: Any = ()) -> Iterator[list[tuple[Any, float]]]:
    """Give submodules their train/eval modes back, and groups the learning rates it yields."""
    modes = [(part, part.training) for m in models if m is not None for part in m.modules()]
    rates = [(group, group["lr"]) for group in groups]
    try:
        yield rates
    finally:
        for part, training in modes:
            part.training = training
        for group, rate in rates:
            group["lr"] = rate


def _read(unread: list[tuple[int, float, Tensor]], steps: list[Step]) -> None:
    """Bring the losses to the host in one sync and stop at the first that is not finite."""
    values = torch.stack([value for _, _, value in unread]).tolist() if unread else []
    for (epoch, lr, _), value in zip(unread, values, strict=True):
        if not math.isfinite(value):
            at = f"at epoch {epoch}, step {len(steps)} (counted from 0)"
            raise FloatingPointError(f"loss: got {value} {at}, expected a finite number")
        steps.append(Step(epoch, len(steps), value, lr))
    unread.clear()


def _bar(epochs: int, loader: Any, shown: bool) -> Any:
    if not shown:
        return nullcontext()
    bar = _needed("tqdm.auto", "progress=True").tqdm
    return bar(total=epochs * len(loader) if hasattr(loader, "__len__") else None, unit="step")


def _needed(module: str, user: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs {module}: pip install 'fastkd[train]'") from error
