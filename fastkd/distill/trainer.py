"""A minimal trainer: read `train` from top to bottom, the loss is one line of `_micro_batch`.

A loader is anything that, once per epoch, gives batches: (inputs, labels), inputs alone,
(inputs, labels, the teacher's outputs), or a `Batch`. A model is any module that turns inputs into
logits [..., V]. Only safetensors and JSON are read or written.

Under torchrun a student in DistributedDataParallel, or one that `fully_shard` has put in shards, is
trained by all ranks together, each with batches of its own (as many as the others): the weights are
those of one process with all of them. A teacher may lie in shards too; `processes` is
what they tell each other.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.arguments.messages import shown
from fastkd.arguments.numbers import integer

from .batch import Batch, Outputs, device_of, forward, moved, restored_modes
from .checkpoint import Checkpoints, Parts, Position, epoch_batches
from .distributed import PLAINLY, Ranks
from .hooks import Hooks
from .logging import Log, Record, Step
from .noise import weight_noise as noisy_weights
from .objective import Objective
from .optimizers import optimizer_of
from .precision import Stepping, stepping
from .run_warnings import RunWarnings
from .schedules import Rates, applied
from .teachers import EMATeacher, Teacher, as_teacher, check_device, check_one_source
from .terms import Term

# steps between looks at the loss; elsewhere 50: a look makes the host wait
CHECK_EVERY = {"cpu": 1}


def train(
    student: nn.Module,
    loader: Iterable[Any],
    loss: Callable[[Tensor, Any, Any], Tensor] | Term | Sequence[Term],
    *,
    teacher: Teacher | nn.Module | Sequence[Any] | Mapping[Any, Any] | str | Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = 1,
    lr: float = 1e-3,
    device: torch.device | str | None = None,
    accumulate: int | None = None,
    ahead: int | None = None,
    clip_norm: float | None = None,
    schedule: Callable[[int], float] | None = None,
    amp: torch.dtype | None = None,
    accelerator: Any = None,
    ema: EMATeacher | None = None,
    transform: Callable[[Batch], Batch] | None = None,
    weight_noise: float = 0.0,
    validate: Callable[[nn.Module], float] | None = None,
    checkpoint: Checkpoints | str | os.PathLike[str] | None = None,
    log: Log | Sequence[Log] | None = None,
    progress: bool = True,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[Step]:
    """Train `student` in place, beside a frozen `teacher` or alone, and return every `Step`.

        loss of a step = sum over terms and micro-batches, weight * share * term

    Args:
        student: module, inputs -> logits [..., V]; moved to `device`.
        loader: gives (inputs, labels), inputs, (inputs, labels, teacher's logits or `TopK`), or a
            `Batch`; iterated once per epoch.
        loss: terms (see `Term`), or (student logits, teacher logits or None, labels or None) ->
            scalar tensor.
        teacher: a module (runs in eval mode without gradient, leaves as it came), a list of them,
            a dict of them (each sample's by its "teacher_id", see `RoutedTeacher`), "base" (the
            student without its adapter), "ema" (its moving average), a function of the inputs, a
            cache's `Reader`, or a `Teacher`. None: outputs that come with the batches.
        optimizer: over the student's parameters; None makes AdamW at `lr`. Parameters that terms
            learn join the optimizer's first group where they are missing. A torch scheduler is
            stepped by `on_step`, `validate` or `log`: without `schedule` no rate is written here.
        epochs: passes over `loader`, at least 1.
        lr: learning rate of the AdamW made here; not used when an optimizer is given.
        device: where to run; None means where the student is, or where `accelerator` runs.
        accumulate: batches to one optimizer step; the last step of an epoch may have fewer. None:
            what `accelerator` says, else 1.
        ahead: batches that a served teacher may take from the loader before their step; None: what
            it was made with. Other teachers take none.
        clip_norm: upper bound of the gradient's 2-norm, above 0; None leaves it as it is.
        schedule: step (from 0) -> factor on each group's learning rate; undone on return. Beside a
            torch scheduler it is refused at the first rate that has been changed under it.
        amp: dtype of autocast for models and loss, bfloat16 or float16 (with a gradient scaler).
        accelerator: an `accelerate.Accelerator` that has prepared the student, the optimizer and
            the loader: its device, precision, gradient scaler and processes. The loss stays
            normalised by the whole step's tokens, over micro-batches and processes.
        ema: an `EMATeacher` of the student, kept up to date.
        transform: changes each micro-batch, on the device, before the models see it.
        weight_noise: as a share of each weight tensor's own deviation; 0 for none.
        validate: student -> metric, the higher the better, after each epoch; logged, and with
            `checkpoint` the best student is kept. On several ranks the metric is their mean.
        checkpoint: a `Checkpoints`, or a folder for one with its defaults.
        log: called as ({"loss", "lr", "samples_per_s", "term/NAME"}, step), and with
            "term/NAME/METRIC" of terms that have metrics; one or several; of several ranks by the
            first alone, as with `progress`, with the values of all.
        progress: show a tqdm bar.
        on_step: called as (epoch, step, detached loss) after each step.

    Returns:
        Every step made here; a resumed run counts on from where it was.

    Raises:
        TypeError, ValueError: a loader without batches or with others, an argument out of range, a
            loss that is no scalar of the student, an optimizer with parameters of the teacher, a
            checkpoint of another run.
        FloatingPointError: the loss is NaN or infinite; names step, batch and term. On the CPU this
            is seen before the step is taken; elsewhere every 50 steps, at the end of an epoch and
            before a checkpoint.

    Warns (UserWarning, once): a teacher or a stored column that no term reads, a term without
    gradient, a loss of exactly 0 throughout the first epoch, labels that are the inputs' ids.

    Paper: Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
    """
    _check_numbers(epochs, amp, accumulate, ahead, clip_norm)
    _check_functions(log, schedule=schedule, transform=transform, validate=validate)
    parts, stepper, followers, weights = _set_up(
        *(student, loader, loss, teacher, optimizer, lr, schedule, ema),
        *(device, accumulate, amp, accelerator, weight_noise),
    )
    objective, soft, optimizer = parts.objective, parts.teacher, parts.optimizer
    where, ranks, plain = parts.device, parts.ranks, objective.plain is not None
    checkpoint, position = _begun(checkpoint, parts)
    run_warnings = RunWarnings(student, soft, objective)
    record = _record(parts, position.step, log)
    with ExitStack() as stack:
        hooks = _enter(stack, parts, followers, record)
        if progress and stepper.speaks and ranks.first:
            record.draw(_steps(loader, epochs, parts.accumulate))
        for epoch in range(position.epoch, epochs):
            soft.begin()
            student.train()  # after it: what the two share is in the student's mode
            objective.modules.train()
            batches = epoch_batches(loader, position, where, exact=checkpoint is not None)
            batches = soft.ahead(batches, ahead)
            for group in ranks.groups(batches, parts.accumulate, where, plain=plain):
                step = position.step
                parts.rates.at(step)
                optimizer.zero_grad(set_to_none=True)
                values: list[Tensor] = []  # the loss of the step, then its terms
                with noisy_weights(student, weight_noise) if weight_noise else PLAINLY:
                    for at, batch in enumerate(group):
                        batch = _placed(batch, where, epoch, step, transform)
                        last = at + 1 == len(group)
                        found = _micro_batch(batch, parts, stepper, hooks, run_warnings, last=last)
                        values = list(map(torch.add, values, found)) if at else found
                first, position.used = position.used, position.used + len(group)
                seen = sum(batch.samples for batch in group) * ranks.size
                values = ranks.means(values)
                record.add(epoch, first, position.used - 1, applied(optimizer), seen, values)
                ranks.average_gradients(objective.modules)
                stepper.step(optimizer, weights, clip_norm)
                for follower in followers:
                    follower.step(student)
                position.step += 1
                record.advance()
                if on_step is not None:
                    on_step(epoch, step, values[0])
                if checkpoint and position.step % checkpoint.every == 0:
                    record.read()
                    checkpoint.write(position, parts)
            record.read()
            run_warnings.epoch(record.steps)
            position.epoch, position.used = epoch + 1, 0
            if validate is not None:
                _keep_best(validate(student), epoch, position, parts, checkpoint, record)
        if checkpoint:
            checkpoint.write(position, parts)
    return record.steps


def _set_up(
    student: nn.Module,
    loader: Iterable[Any],
    loss: Any,
    teacher: Any,
    optimizer: torch.optim.Optimizer | None,
    lr: float,
    schedule: Callable[[int], float] | None,
    ema: EMATeacher | None,
    device: torch.device | str | None,
    accumulate: int | None,
    amp: torch.dtype | None,
    accelerator: Any,
    weight_noise: float,
) -> tuple[Parts, Stepping, list[Teacher], list[Tensor]]:
    """The parts of a run on their device and ranks, its stepper, who follows steps, and weights."""
    where = device_of(student) if device is None else torch.device(device)
    ranks = Ranks(student)
    stepper = stepping(accelerator, where, amp, ranks)
    where, accumulate = stepper.device, stepper.accumulate if accumulate is None else accumulate
    if weight_noise and ranks.sharded:
        raise ValueError("weight_noise: got a student of shards, expected one whole on every rank")
    objective, soft = Objective(loss), as_teacher(teacher)
    followers = [soft] if ema is None or ema is soft else [soft, ema]
    for follower in followers:
        follower.bind(student)
    for model in (student, objective.modules, *(m for f in followers for m in f.models)):
        model.to(where)
    soft.beside(student)
    objective.connects = ranks.wrapped
    ranks.share(objective.modules)
    optimizer = stepper.prepared(
        student, optimizer_of(optimizer, student, objective, followers, lr)
    )
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    rates = Rates([optimizer], schedule)
    parts = Parts(
        *(student, objective, optimizer, rates, soft, ema, stepper.scaler, loader, where),
        *(ranks, accumulate),
    )
    return parts, stepper, followers, weights


def _enter(stack: ExitStack, parts: Parts, followers: Sequence[Teacher], record: Record) -> Hooks:
    """The student's hooks in place and the log open; modes, rates and hooks end as they came."""
    student, objective, soft = parts.student, parts.objective, parts.teacher
    stack.enter_context(restored_modes(student, *(m for f in followers for m in f.models)))
    stack.enter_context(parts.rates)
    hooks = stack.enter_context(Hooks(student, (*objective.student_layers, *soft.student_layers)))
    stack.enter_context(soft.hooked(objective.teacher_layers))
    stack.enter_context(record)
    return hooks


def _begun(
    checkpoint: Checkpoints | str | os.PathLike[str] | None, parts: Parts
) -> tuple[Checkpoints | None, Position]:
    """The checkpoints of a run, and where it begins."""
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = Checkpoints(checkpoint)
    return checkpoint, checkpoint.start(parts) if checkpoint else Position()


def _record(parts: Parts, step: int, log: Log | Sequence[Log] | None) -> Record:
    """What the steps have to tell, from `step` on."""
    objective, every = parts.objective, CHECK_EVERY.get(parts.device.type, 50)
    logs = log if parts.ranks.first else None
    return Record(objective.names, step, every, logs, objective.metrics)


def _placed(
    batch: Batch,
    where: torch.device,
    epoch: int,
    step: int,
    transform: Callable[[Batch], Batch] | None,
) -> Batch:
    """A micro-batch on the device, told its epoch and step, and transformed."""
    batch = moved(batch, where)
    batch.epoch, batch.step = epoch, step
    return batch if transform is None else transform(batch)


def _micro_batch(
    batch: Batch,
    parts: Parts,
    stepper: Stepping,
    hooks: Hooks,
    run_warnings: RunWarnings,
    *,
    last: bool,
) -> list[Tensor]:
    """Forward of both models, loss and backward: this part of the step's loss and of its terms."""
    teacher, ranks = parts.teacher, parts.ranks
    check_one_source(teacher, batch)
    with ranks.no_sync(last=last):
        with stepper.autocast():
            teacher_outputs = check_device(teacher(batch), parts.device)
            raw = forward(parts.student, batch.inputs)
            student_outputs = Outputs(raw, hooks.take(), role="student")
            teacher_outputs, batch = run_warnings.watch(student_outputs, teacher_outputs, batch)
            loss, terms = parts.objective(student_outputs, teacher_outputs, batch)
            run_warnings.read(teacher_outputs, batch)
        stepper.backward(loss)
    with stepper.autocast():
        teacher.follow(student_outputs, batch)
    return [loss.detach(), *terms]


def _keep_best(
    value: Any,
    epoch: int,
    position: Position,
    parts: Parts,
    checkpoint: Checkpoints | None,
    record: Record,
) -> None:
    """Log what `validate` has given, and keep the student where that is the best."""
    metric = parts.ranks.number(_metric(value), parts.device)
    record.tell({"metric": metric})
    if not math.isfinite(metric):  # NaN would stay the best: nothing is above it
        warnings.warn(
            f"validate: got {metric} after epoch {epoch}, which is never the best; expected a "
            "finite number",
            stacklevel=3,
        )
    elif position.best is None or metric > position.best:
        position.best = metric
        if checkpoint:
            checkpoint.write_best(parts, metric, position.step)


def _check_count(name: str, value: Any) -> None:
    if integer(value) is None or value < 1:
        raise ValueError(f"{name}: got {shown(value)}, expected an integer >= 1")


def _check_functions(log: Any, **functions: Any) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}: got {shown(function)}, expected a function or None")
    for logger in (log,) if callable(log) or isinstance(log, str) else log or ():
        if not callable(logger):
            raise TypeError(
                f"log: got {shown(logger)}, expected a function of (values, step), such as "
                "distill.CSVLogger('run.csv')"
            )


def _metric(value: Any) -> float:
    """The result of `validate` as a number."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"validate: got {shown(value)} from it, expected a number") from error


def _check_numbers(
    epochs: int,
    amp: torch.dtype | None,
    accumulate: int | None,
    ahead: int | None,
    clip_norm: float | None,
) -> None:
    _check_count("epochs", epochs)
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp: got {shown(amp)}, expected torch.bfloat16, torch.float16 or None")
    if accumulate is not None:
        _check_count("accumulate", accumulate)
    if ahead is not None and (integer(ahead) is None or ahead < 0):
        raise ValueError(f"ahead: got {shown(ahead)}, expected an integer >= 0 or None")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm: got {shown(clip_norm)}, expected > 0 or None")


def _steps(loader: Any, epochs: int, accumulate: int) -> int | None:
    return epochs * -(-len(loader) // accumulate) if hasattr(loader, "__len__") else None
