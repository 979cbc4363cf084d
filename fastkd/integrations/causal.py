"""The loss of a causal language model's distillation, as a Trainer calls it.

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
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import shown
from fastkd.distill.batch import in_rows
from fastkd.distill.heads import Head, check_causal, head_of, output_embeddings, vocabulary
from fastkd.distill.hooks import Hook
from fastkd.integrations.convention import check_convention, unwrapped
from fastkd.integrations.live import live

SCHEDULED = ("temperature", "alpha")  # options that may be functions of the step
IGNORED = -100  # torch's own label for a row that does not count
# of the student's arguments, those that say how it answers: the teacher does not get them
ANSWER_OPTIONS = {"labels", "num_items_in_batch", "past_key_values", "use_cache", "logits_to_keep"}
ANSWER_OPTIONS |= {"return_dict", "output_hidden_states", "output_attentions", "return_loss"}
# what takes the hooks off each student that has some: a second loss takes the first one's place
_HOOKED: WeakKeyDictionary[Any, Callable[[], None]] = WeakKeyDictionary()


class DistillationLoss:
    """The loss function that `DistillationTrainer` and `compute_loss_func` call.

        alpha CE(labels, q) + (1 - alpha) T^2 D(p, q),   summed over the kept tokens of a
        micro-batch, over `num_items_in_batch`

    While it watches a student, it sees the inputs of its forward and, with linear=True, the hidden
    states at its head. In training the student's own logits are then [B, 0, V], of no position;
    without gradient (`generate`) and in eval mode they are whole.

    Args:
        teacher: a `PreTrainedModel`, which is frozen; "base": the student without its adapter;
            "ema": its moving average; {name: teacher}: one for each sample, by the batch's
            "teacher_id"; or `distill`'s `EMATeacher`, `RoutedTeacher`, `PromptedTeacher`. None
            where each batch holds `teacher`: logits [B, L, V], a `TopK` [B, L, K] or a store's
            `LinearLogits`, row i for the token behind position i.
        linear: logits of both models by `LinearLogits`; False: those that they build themselves.
        pack: leave ignored tokens out of the head's products, see `LinearLogits`.
        **options: of `fastkd.distillation_loss`: temperature, alpha, divergence, t_squared,
            label_smoothing, z_loss, vocab_size. With `DistillationTrainer` temperature and alpha
            may be functions of the step (global_step), as lambda step: max(1.0, 4.0 - step / 100).
            return_outputs=True, with `DistillationTrainer` only: sums of `fastkd.LossOutputs` over
            the kept tokens wait for its log.

    Raises:
        TypeError, ValueError: an option that the loss refuses or that is the Trainer's.
    """

    def __init__(
        self, teacher: Any = None, *, linear: bool = True, pack: bool = False, **options: Any
    ) -> None:
        for name in ("labels", "ignore_index", "weight", "reduction", "normalizer", "group"):
            if name in options:
                raise TypeError(
                    f"{name}: got {shown(options[name])}, expected no such option: it is set here"
                )
        nothing = torch.zeros(1, 2)
        options = dict(options)
        self._schedules = {k: options[k] for k in SCHEDULED if callable(options.get(k))}
        options |= {k: at(0) for k, at in self._schedules.items()}
        trial = {k: v for k, v in options.items() if k != "vocab_size"}
        fastkd.distillation_loss(nothing, nothing + 1, torch.zeros(1, dtype=torch.long), **trial)
        self.teacher, self.linear, self.pack, self.options = teacher, bool(linear), pack, options
        self.step: Callable[[], int] | None = None  # the Trainer's, for a schedule
        self._warned = False
        self.trims = False  # also in eval mode: nobody wants these logits
        self.detach: Callable[[], None] = lambda: None
        self._student: Any = None
        self._head: Head | None = None
        self._seen = _Seen()
        self._told: dict[str, Tensor] = {}  # sums over tokens, and their count, since the last log
        self._checked = False
        self.live = None if teacher is None else live(teacher)
        self._answering = False  # a teacher that is the student; no forward of the student's own

    def prepare(self, student: Any) -> None:
        """Read and compare the heads of student and teacher; the errors before the first step."""
        if student is self._student and not self._replaced():
            return
        requested = self.options.get("vocab_size")
        check_causal(student, "student")
        if self.live is not None:
            self.live.check(student)
        check_convention(student, "student", loss=True)
        if self.live is not None:
            self.live.prepare(student, self.linear, requested)
        elif requested is not None and (vocabulary(student) or requested) < requested:
            raise ValueError(
                f"vocab_size: got {requested}, expected at most {vocabulary(student)}, the "
                "smaller of the models' vocabularies"
            )
        self._head = head_of(student) if self.linear else None
        self._student, self._checked = student, False

    def _replaced(self) -> bool:
        """Whether a head is not the one that was read (resize_token_embeddings makes a new one)."""
        head, other = self._head, self.live is not None and self.live.replaced()
        return other or (head is not None and head.module is not output_embeddings(self._student))

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

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module is not student or self._answering:
                return None
            seen.clear()
            kwargs = dict(kwargs)
            seen.stored, seen.shifted = (
                kwargs.pop("teacher", None),
                kwargs.pop("shift_labels", None),
            )
            seen.extra = {name: kwargs.pop(name, None) for name in columns}
            named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
            seen.inputs = {k: v for k, v in named.items() if k not in ANSWER_OPTIONS}
            return args, kwargs

        def inside(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._answering:
                return
            device_type = args[0].device.type if args and isinstance(args[0], Tensor) else "cpu"
            seen.autocast = (
                device_type,
                torch.get_autocast_dtype(device_type),
                torch.is_autocast_enabled(device_type),
            )

        def with_head(hidden: Tensor) -> None:
            # made here, where the logits would be made: accelerate's autocast ends with the forward
            assert head is not None
            if self._answering:
                return
            _check_whole(head.module.weight)
            seen.logits = head.logits(hidden, pack=pack)

        def trim() -> bool:
            training = student.training and torch.is_grad_enabled()
            return not self._answering and (self.trims or training)

        hooks = [student.register_forward_pre_hook(Hook(before), with_kwargs=True)]
        hooks.append(student.get_input_embeddings().register_forward_pre_hook(Hook(inside)))
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
        if not self.linear:
            student = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        elif student is not None:
            _check_whole(student.weight)
        labels = self._targets(labels, shifted, inputs)
        if student is None:
            raise RuntimeError(
                "student: got a forward in which the head that was read was not called; was it "
                "replaced since (resize_token_embeddings)? Make the loss function after that"
            )
        if labels.dim() < 2 or student.shape[:-1] != labels.shape:
            more = student.size(-2) - labels.size(-1) if student.dim() == 3 and labels.dim() else 0
            hint = f" ({more} virtual tokens of prompt tuning are before the batch's own?"
            hint += " Adapters that add none, as LoRA, are taken)"
            raise ValueError(
                f"labels: got {list(labels.shape)} for logits {list(student.shape)}, expected "
                "[B, L], one label for each position" + (hint if more > 0 else "")
            )
        options = self._now()
        self._check_source(stored)
        if self.live is None:
            parts: Any = [(None, stored.to(student.device, non_blocking=True))]
        else:
            parts = self.live.parts(inputs, labels, extra, autocast, student.device)
        losses = []
        for rows, teacher in self._alone(parts):
            s, y = student, labels
            if rows is not None:
                s, y = in_rows(student, lambda x: x[rows]), labels[rows]  # noqa: B023
                if num_items_in_batch is None:  # of all parts
                    num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
            loss: Any = fastkd.distillation_loss(
                s, teacher, y, normalizer=num_items_in_batch, **options
            )
            if options.get("return_outputs"):
                loss, told = loss
                if torch.is_grad_enabled():  # not of an evaluation
                    self._tell(told, y)
            losses.append(loss)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        aux = getattr(outputs, "aux_loss", None)
        if aux is not None:  # a mixture of experts' load balance, as its own forward adds it
            loss = loss + self._student.config.router_aux_loss_coef * aux.to(loss.device)
        return loss

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

    def _targets(
        self, labels: Tensor | None, shifted: Tensor | None, inputs: dict[str, Any]
    ) -> Tensor:
        """Labels [B, L] of the token behind each position, -100 where there is none to count."""
        if labels is None:
            raise ValueError(
                "labels: got none in the batch, expected input_ids with -100 where a token does "
                "not count, as DataCollatorForLanguageModeling(mlm=False) gives them"
            )
        if shifted is not None:
            return shifted
        if not self._checked:
            _check_unshifted(labels, inputs.get("input_ids"))
            self._checked = True
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED)

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


class _Seen:
    """The student's last forward as its hooks saw it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.inputs: dict[str, Any] | None = None
        self.stored: Any = None
        self.shifted: Tensor | None = None
        self.extra: dict[str, Any] = {}
        self.logits: fastkd.LinearLogits | None = None
        self.autocast: tuple[str, torch.dtype, bool] | None = None


def _check_whole(weight: Tensor) -> None:
    sharded = hasattr(weight, "placements")
    if sharded or not weight.numel() or not weight.untyped_storage().size():
        raise ValueError(
            "linear: got True with weights that are sharded outside of a model's forward (FSDP, "
            "ZeRO-3), expected linear=False (dense logits)"
        )


def _check_unshifted(labels: Tensor, tokens: Tensor | None) -> None:
    if tokens is None or tokens.shape != labels.shape:
        return
    kept, own = labels != IGNORED, labels == tokens
    ahead = (labels[..., :-1] == tokens[..., 1:]) | ~kept[..., :-1]
    if bool(ahead.all() & (kept[..., :-1] & ~own[..., :-1]).any()):
        raise ValueError(
            "labels: got input_ids shifted by one already, expected input_ids themselves (-100 "
            "where a token does not count): they are shifted here, once"
        )
