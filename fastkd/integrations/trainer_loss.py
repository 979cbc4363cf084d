"""The loss of a model's distillation, as a Trainer calls it.

A Trainer hands its loss function the student's outputs, the labels and a count of tokens. What else
the loss needs, it sees by hooks on the student: the inputs, for the teacher, and the hidden states
at the head, from which the logits are never built.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import MadeOf, shown
from fastkd.distill.batch import in_rows, to
from fastkd.distill.heads import Head, encoded, head_of, output_embeddings
from fastkd.distill.hooks import Hook
from fastkd.integrations.collate import Collate
from fastkd.integrations.convention import check_convention, unwrapped
from fastkd.integrations.families import (
    CAUSAL,
    IGNORED,
    Family,
    auxiliary,
    check_columns,
    check_decoder,
    encoder_of_both,
    family_of,
    is_classifier,
    is_noisy,
    named,
)
from fastkd.integrations.labels import check_first, counting, rows_of, shifted_labels
from fastkd.integrations.live import Live, live
from fastkd.integrations.problems import (
    PROBLEMS,
    Problem,
    check_teacher,
    fitting,
    problem_by_labels,
    problems_of,
)
from fastkd.integrations.seen import ANSWER_OPTIONS, Seen, check_whole

SCHEDULED = ("temperature", "alpha")  # options that may be functions of the step
# what takes the hooks off each student that has some: a second loss takes the first one's place
_HOOKED: WeakKeyDictionary[Any, Callable[[], None]] = WeakKeyDictionary()


class DistillationLoss(MadeOf):
    """The loss function that `DistillationTrainer` and `compute_loss_func` call.

        alpha CE(labels, q) + (1 - alpha) T^2 D(p, q),   summed over the kept tokens of a
        micro-batch, over `num_items_in_batch`

    While it watches a student, it sees the inputs of its forward and, with linear=True, the hidden
    states at its head. In training the student's own logits are then [B, 0, V], of no position;
    without gradient (`generate`) and in eval mode they are whole.

    Args:
        teacher: a `PreTrainedModel`, which is frozen; "base": the student without its adapter;
            "ema": its moving average; {name: teacher}: one for each sample, by the batch's
            "teacher_id"; `distill`'s `EMATeacher`, `RoutedTeacher`, `PromptedTeacher`; or a
            `fastkd.teachers.Served`. None where each batch holds `teacher`: logits [B, L, V], a
            `TopK` [B, L, K] or a store's `LinearLogits`, row i for the token behind position i (of
            a classifier [B, C], of other models row i for position i).
        linear: logits of both models by `LinearLogits`; False: those that they build themselves;
            None: the former for language models, the latter for classifiers.
        pack: leave ignored tokens out of the head's products, see `LinearLogits`.
        **options: of `fastkd.distillation_loss`: temperature, alpha, divergence, t_squared,
            label_smoothing, z_loss, vocab_size. Of a classifier with several labels: those of
            `fastkd.binary_distillation_loss` (pos_weight, too), with regression: alpha and kind of
            `fastkd.distill.regression_loss`. With `DistillationTrainer` temperature and alpha
            may be functions of the step (global_step), as lambda step: max(1.0, 4.0 - step / 100).
            return_outputs=True, with `DistillationTrainer` only: sums of `fastkd.LossOutputs` over
            the kept tokens wait for its log.

    Raises:
        TypeError, ValueError: an option that the loss refuses or that is the Trainer's.
    """

    def __init__(
        self, teacher: Any = None, *, linear: bool | None = None, pack: bool = False, **options: Any
    ) -> None:
        for name in ("labels", "ignore_index", "weight", "reduction", "normalizer", "group"):
            if name in options:
                raise TypeError(
                    f"{name}: got {shown(options[name])}, expected no such option: it is set here"
                )
        options = dict(options)
        self._schedules = {k: options[k] for k in SCHEDULED if callable(options.get(k))}
        options |= {k: at(0) for k, at in self._schedules.items()}
        self.problem = fitting(PROBLEMS.values(), options, None)
        self.teacher, self.linear, self.pack, self.options = teacher, linear, pack, options
        self.family: Family = CAUSAL  # the student's, once it is known
        self.step: Callable[[], int] | None = None  # the Trainer's, for a schedule
        self._warned = False
        self.trims = False  # also in eval mode: nobody wants these logits
        self.detach: Callable[[], None] = lambda: None
        self._student: Any = None
        self._head: Head | None = None
        self._seen = Seen()
        self._told: dict[str, Tensor] = {}  # sums over tokens, and their count, since the last log
        self._checked = False
        self._undecided = False  # what the student's logits are: the first labels say so
        self._common_encoder: Any = None
        self._teachers_own: set[str] = set()  # arguments of its forward, none of the student's
        self.live = None if teacher is None else live(teacher)
        self._answering = False  # a teacher that is the student; no forward of the student's own

    def choose(self, student: Any) -> None:
        """Find the student's family, and whether its logits are built."""
        self.family = family = family_of(student, "student")
        if self.linear is None:
            self.linear = family.linear
        if self.linear and not family.linear:
            raise ValueError(
                f"linear: got True for {type(unwrapped(student)).__name__}, {family.name}, "
                "expected linear=False or none: its logits are few, and are built"
            )

        columns = family.columns(unwrapped(student)) if is_classifier(family) else None
        self.settle(problems_of(student, family), columns)

    def settle(self, problems: list[Problem], columns: int | None = None) -> None:
        """Check options and teacher against what the student's logits are, or may be."""
        self.problem = fitting(problems, self.options, columns, self.family)
        self._undecided = len(problems) > 1
        if type(self.live) is Live and not self._undecided:
            check_teacher(self.problem, self.live.model)

    def prepare(self, student: Any) -> None:
        """Read and compare the heads of student and teacher; the errors before the first step."""
        if student is self._student and not self._replaced():
            return
        requested = self.options.get("vocab_size")
        self.choose(student)
        if self.live is not None:
            self.live.check(student)
        if self.family.shift:
            check_convention(student, "student", loss=True)
        if self.live is not None:
            self.live.prepare(student, bool(self.linear), requested)
        if type(self.live) is Live:
            self._common_encoder = encoder_of_both(student, self.live.model)
            self._teachers_own = {*named(self.live.model)} - {*named(student)} - ANSWER_OPTIONS
        check_columns([student], requested)
        self._head = head_of(student) if self.linear else None
        self._student, self._checked = student, False

    def _replaced(self) -> bool:
        """Whether a head is not the one that was read (resize_token_embeddings makes a new one)."""
        head, other = self._head, self.live is not None and self.live.replaced()
        return other or (head is not None and head.module is not output_embeddings(self._student))

    def students_own(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch without what is the teacher's alone."""
        other = {"teacher", *self._teachers_own, *(() if self.live is None else self.live.columns)}
        return {k: v for k, v in inputs.items() if k not in other}

    def labelled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch; at alpha=0 one without labels gets those that say which rows count."""
        if "alpha" in self._schedules or self.options.get("alpha") != 0 or "labels" in batch:
            return batch
        if self._undecided:
            raise ValueError(
                "labels: got none in the batch, of a student whose config has no problem_type; "
                "expected one, as student.config.problem_type = 'single_label_classification'"
            )
        config = unwrapped(self._student).config
        labels = counting(batch, config, self.family, self.problem)
        return batch if labels is None else {**batch, "labels": labels}

    def expect(self, batch: Mapping[str, Any]) -> None:
        """Tell a served teacher of a Trainer's batch that will come; returns at once."""
        labels, shifted = batch.get("labels"), batch.get("shift_labels")
        if self.live is None or self.live.ahead_by is None or labels is None:
            return
        inputs = self.students_own(batch)
        inputs = {k: x for k, x in inputs.items() if k not in {"shift_labels", *ANSWER_OPTIONS}}
        extra = {name: batch.get(name) for name in self.live.columns}
        self.live.expect(inputs, shifted_labels(labels, shifted, self.family), extra)

    def collator(self, collator: Any) -> Collate:
        """A plain Trainer's `data_collator`, by which a served teacher is asked ahead of the step.

        `trainer.data_collator = loss.collator(trainer.data_collator)`: what it makes is asked for
        at once. The Trainer makes a batch, and all micro-batches of a step, before it needs them;
        with dataloader_num_workers=0, as a worker cannot ask. It also hands on the batch's columns
        that are the teacher's alone, as "teacher_id". `DistillationTrainer` needs no such line.
        """
        columns = () if self.live is None else self.live.columns
        return Collate(collator, columns, self.expect)

    @contextmanager
    def watching(self, student: Any) -> Iterator[None]:
        """Hooks on `student` for one call of its forward and of this loss."""
        remove = self.attach(student)
        try:
            yield
        finally:
            remove()

    def attach(
        self, student: Any, undo: Callable[[Any], None] = lambda base: None
    ) -> Callable[[], None]:
        """Put hooks on `student`; returns what removes them and calls undo(the model within it)."""
        base = unwrapped(student)
        _HOOKED.pop(base, _nothing)()
        self.prepare(student)
        seen, head, pack = self._seen, self._head, self.pack
        columns = () if self.live is None else self.live.columns
        arguments, family = named(base), self.family

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module is not student or self._answering:
                return None
            seen.clear()
            given = dict(zip(arguments, args, strict=False)) | kwargs
            if family.decoder and student.training:
                check_decoder(given)
            seen.arguments(given, columns)
            kwargs = self.students_own(kwargs)
            kwargs.pop("shift_labels", None)
            return args, kwargs

        def inside(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._answering:
                seen.inside((*args, *kwargs.values()))

        def with_head(hidden: Tensor) -> None:
            # made here, where the logits would be made: accelerate's autocast ends with the forward
            assert head is not None
            if self._answering:
                return
            check_whole(head.module.weight)
            seen.logits = head.logits(hidden, pack=pack)

        def trim() -> bool:
            training = student.training and torch.is_grad_enabled()
            return not self._answering and (self.trims or training)

        hooks = [student.register_forward_pre_hook(Hook(before), with_kwargs=True)]
        for child in base.children():
            hooks.append(child.register_forward_pre_hook(Hook(inside), with_kwargs=True))
        if head is not None:
            hooks.append(head.watch(with_head, trim=trim))

        within = ref(base)  # no more than that: the student is this function's key in a table

        def remove() -> None:
            for hook in hooks:
                hook.remove()
            seen.clear()
            undo(within())

        _HOOKED[base] = remove
        return remove

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """The loss of the forward that the student has just run."""
        seen = self._seen
        inputs, stored, shifted = seen.inputs, seen.stored, seen.shifted
        student, autocast, extra = seen.logits, seen.autocast, seen.extra
        seen.clear()
        if inputs is None:
            raise RuntimeError(
                "student: got outputs of a forward that was not seen; is it the model given to the "
                "Trainer, in one process per device, and no newer loss function made for it?"
            )
        family = self.family
        if family.decoder:
            check_decoder(inputs)
        if not self.linear:
            mapped = isinstance(outputs, Mapping)
            student = outputs[family.logits] if mapped else outputs[0]
        elif student is not None:
            check_whole(student.weight)
        if student is None:
            raise RuntimeError(
                "student: got a forward in which the head that was read was not called; was it "
                "replaced since (resize_token_embeddings)? Make the loss function after that"
            )
        if self._undecided and labels is not None:
            problem = problem_by_labels(self._student, labels)
            self.settle([problem], student.size(-1))
        if not self._checked and labels is not None and shifted is None:
            check_first(labels, inputs, unwrapped(self._student), family)
            self._checked = True
        labels = rows_of(labels, shifted, student, family, self.problem)
        states = getattr(outputs, "encoder_last_hidden_state", None)
        if states is not None and self._common_encoder is not None:
            inputs = self._encoded(inputs, states)
        options = self._now()
        self._check_source(stored)
        if self.live is None:
            parts: Any = [(None, to(stored, student.device))]
        else:
            parts = self.live.parts(inputs, labels, extra, autocast, student.device)
        losses = []
        for rows, teacher in self._alone(parts):
            s, y = student, labels
            if rows is not None:
                s, y = in_rows(student, lambda x: x[rows]), labels[rows]  # noqa: B023
                if num_items_in_batch is None:  # of all parts
                    num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
            loss: Any = self.problem.loss(s, teacher, y, num_items_in_batch, options)
            if options.get("return_outputs"):
                loss, told = loss
                if torch.is_grad_enabled():  # not of an evaluation
                    self._tell(told, y)
            losses.append(loss)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        aux = auxiliary(outputs, unwrapped(self._student))
        return loss if aux is None else loss + aux.to(loss.device)

    def _encoded(self, inputs: dict[str, Any], states: Tensor) -> dict[str, Any]:
        """The teacher's inputs, with what the encoder of both models has just given the student."""
        encoder = self._common_encoder
        if "encoder_outputs" in inputs or is_noisy(encoder):
            return inputs
        read = {*named(encoder)} - {"attention_mask"}
        rest = {name: x for name, x in inputs.items() if name not in read}
        return rest | {"encoder_outputs": encoded(states.detach())}

    def _tell(self, rows: fastkd.LossOutputs, labels: Tensor) -> None:
        sums = {name: x.sum() for name, x in rows._asdict().items() if x is not None}
        sums["tokens"] = (labels != IGNORED).sum()
        for name, value in sums.items():
            self._told[name] = self._told[name] + value if name in self._told else value

    def told(self) -> dict[str, Tensor]:
        """The sums since the last time: of each output, and of "tokens" that they are over."""
        found, self._told = self._told, {}
        return found

    def _now(self) -> dict[str, Any]:
        """The options of this step."""
        if self._schedules and self.step is None:
            name, at = next(iter(self._schedules.items()))
            raise TypeError(
                f"{name}: got a {type(at).__name__}, expected a number: a function of the step is "
                "taken by DistillationTrainer, which knows the step"
            )
        step = self.step() if self.step is not None else 0
        if not self._warned and self.options.get("alpha") == 1 and "alpha" not in self._schedules:
            self._warned = True
            warnings.warn(
                "teacher: given (teacher= or the batch's key 'teacher'), but with alpha=1 the loss "
                "is that of the labels alone and does not read it",
                stacklevel=3,
            )
        return self.options | {name: at(step) for name, at in self._schedules.items()}

    def _check_source(self, stored: Any) -> None:
        if (self.live is None) == (stored is None):
            got = "neither a model nor" if self.live is None else "a model and also"
            raise ValueError(
                f"teacher: got {got} a batch with its outputs, expected one of them: teacher=, "
                "or the batch's key 'teacher' (logits [B, L, V] or a TopK; the plain Trainer drops "
                "such a column unless TrainingArguments(remove_unused_columns=False))"
            )

    def _alone(self, parts: Iterable[Any]) -> Iterator[Any]:
        """The parts; while one is made, the hooks on the student see nothing."""
        parts = iter(parts)
        while True:
            self._answering = True
            try:
                part = next(parts, None)
            finally:
                self._answering = False
            if part is None:
                return
            yield part


def _nothing() -> None:
    """Of a student without hooks."""
