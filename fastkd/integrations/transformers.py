"""Distillation in transformers' Trainer.

`DistillationTrainer` is the Trainer with a teacher; `compute_loss_func` puts the same loss into the
plain one, or into a subclass of one's own. Both leave the Trainer's conventions as they are: labels
are those that the model itself takes, with -100 where one does not count; a causal model's are
shifted here, once, and no others; the loss is summed over the kept labels and divided by
`num_items_in_batch`, those of all micro-batches of a step. `families.FAMILIES` is what can be
distilled.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd.arguments.messages import shown
from fastkd.distill.heads import head_of, linear_logits
from fastkd.distill.serialization import absent, load, save
from fastkd.distill.teachers import EMATeacher, expected
from fastkd.integrations.collate import Collate, check_tokenizers
from fastkd.integrations.convention import unwrapped
from fastkd.integrations.families import CAUSAL, decoder_inputs, named
from fastkd.integrations.live import Live
from fastkd.integrations.trainer_loss import SCHEDULED, DistillationLoss

try:
    import transformers
    from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
except ImportError as error:
    raise ImportError(absent("transformers", __name__, "hf", error)) from error

__all__ = ["DistillationLoss", "DistillationTrainer", "compute_loss_func", "head_of"]
__all__ += ["linear_logits"]

# from 5.0 on a loss function's result is never divided by the accumulation steps again, and tokens
# are counted for it whatever the model's forward accepts
OLDEST = (5, 0)


SHARDED = (
    "linear: got True with weights that are sharded outside of a model's forward (FSDP, ZeRO-3), "
    "expected linear=False (dense logits)"
)


def _check_version(version: str = transformers.__version__) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"transformers: got version {version}, expected {'.'.join(map(str, OLDEST))} or newer: "
            "earlier ones divide a loss by the accumulation steps in ways of their own"
        )


_check_version()


def compute_loss_func(
    student: Any,
    teacher: Any = None,
    *,
    linear: bool | None = None,
    pack: bool = False,
    **loss: Any,
) -> DistillationLoss:
    """The distillation loss as `compute_loss_func` of a plain transformers Trainer.

    The Trainer hands a loss function only outputs, labels and the count of tokens, so hooks stay on
    the student: they keep what its forward got, for the teacher. In training the student's own
    logits are then [B, 0, V], of no position, except without gradient (`generate`). A batch with a
    stored `teacher` needs remove_unused_columns=False, and a sequence-to-sequence model a collator
    that makes decoder_input_ids. `label_smoothing_factor` is not read by the
    Trainer beside a loss function (a warning says so): give label_smoothing here. Made a second
    time for a student, the newer function takes the place of the older.

    Args:
        student: the model that is given to the Trainer.
        teacher, linear, pack, **loss: as in `DistillationLoss`.

    Returns:
        A callable (outputs, labels, num_items_in_batch) -> 0-d loss; `.detach()` takes the hooks
        off the student, `.collator(collator)` asks a served teacher ahead of the step. To be made
        before the Trainer, which reads how the student's labels count.

    Raises:
        TypeError, ValueError: a head that cannot be read, another vocabulary, a refused option.

    >>> import torch, tempfile
    >>> from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
    >>> from fastkd.integrations.transformers import compute_loss_func
    >>> size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    >>> config = ViTConfig(image_size=8, patch_size=4, num_attention_heads=2, num_labels=5, **size)
    >>> teacher, student = ViTForImageClassification(config), ViTForImageClassification(config)
    >>> pictures = torch.randn(8, 3, 8, 8)
    >>> data = [{"pixel_values": x, "labels": torch.tensor(i % 5)} for i, x in enumerate(pictures)]
    >>> folder = tempfile.mkdtemp()
    >>> args = TrainingArguments(folder, max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    >>> loss = compute_loss_func(student, teacher, temperature=2.0, alpha=0.1)
    >>> trainer = Trainer(student, args, train_dataset=data, compute_loss_func=loss)
    >>> output = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    >>> output.global_step
    2
    """
    function = _SmoothingUnread(teacher, linear=linear, pack=pack, **loss)
    for name in SCHEDULED:
        if callable(loss.get(name)):
            raise TypeError(
                f"{name}: got a {type(loss[name]).__name__}, expected a number: a function of the "
                "step is taken by DistillationTrainer, which knows the step"
            )
    if loss.get("return_outputs"):
        raise TypeError(
            "return_outputs: got True, expected no such option: a loss function cannot log; "
            "DistillationTrainer(loss={'return_outputs': True}) does"
        )
    if function.live is not None and function.live.averages:
        raise TypeError(
            "teacher: got a moving average of the student, which a loss function cannot keep up to "
            "date, expected another teacher; DistillationTrainer knows the steps"
        )
    function.choose(student)
    if function.linear and _sharded():
        raise ValueError(SHARDED)
    function.detach = function.attach(student, _unnamed)
    base = unwrapped(student)
    if function.family.shift and getattr(base, "loss_type", "") is None:  # GPT2LMHeadModel
        # the loss that transformers takes for want of a name; without it the Trainer would count
        # the first label of each row, which nothing predicts
        base.loss_type = _Named(CAUSAL.classes[0])
    return function


class _SmoothingUnread(DistillationLoss):
    """A plain Trainer's, which reads no label_smoothing_factor beside a loss function."""

    _looked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._looked:
            self._looked = True
            # a loss function is told nothing of the arguments; who calls it has them
            trainer = sys._getframe(1).f_locals.get("self")
            factor = getattr(getattr(trainer, "args", None), "label_smoothing_factor", 0)
            if factor and isinstance(trainer, transformers.Trainer):
                warnings.warn(
                    f"label_smoothing_factor: got {factor}, which the Trainer does not read beside "
                    "a loss function; give compute_loss_func(..., label_smoothing=)",
                    stacklevel=2,
                )
        return super().__call__(*args, **kwargs)


def _sharded() -> bool:
    return is_deepspeed_zero3_enabled() or is_fsdp_enabled()


class _Follow(transformers.TrainerCallback):  # type: ignore[misc]
    """Moving averages of a Trainer's student: a step each, and a file in each checkpoint."""

    def __init__(self, averages: Sequence[EMATeacher], student: Any) -> None:
        self.averages, self.student = averages, student

    def on_step_end(self, *_: Any, **__: Any) -> None:
        for average in self.averages:
            average.step(self.student)

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            for at, average in enumerate(self.averages):
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                save(average.model, folder / f"ema-{at}.safetensors", {"steps": average.steps})

    def load(self, folder: str) -> None:
        for at, average in enumerate(self.averages):
            if not (file := Path(folder) / f"ema-{at}.safetensors").exists():
                raise ValueError(
                    f"resume_from_checkpoint: got {folder} without {file.name}, expected one of a "
                    "run with the same teacher, the student's moving average"
                )
            average.steps = load(average.model, file)["steps"]


class _Named(str):
    """A name that was given to a model without one."""


def _unnamed(model: Any) -> None:
    if isinstance(getattr(model, "loss_type", None), _Named):
        model.loss_type = None


class DistillationTrainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer whose loss is that of distillation; everything else is the Trainer's.

        alpha CE(labels, q) + (1 - alpha) T^2 D(p, q),   p = softmax(teacher / T), q of the student

    Labels of causal models are shifted once, -100 is left out, and the sum over labels is divided
    by those of all micro-batches of the step (`num_items_in_batch`). Evaluation gives the same loss
    as eval_loss, and `compute_metrics` whole logits. The teacher is frozen, in eval mode, on the
    student's device, and not a part of the checkpoints. `label_smoothing_factor` smooths the hard
    labels. An encoder-decoder's decoder_input_ids are made of the labels, for both models.

    Args:
        *args, **kwargs: the Trainer's own.
        teacher: a `PreTrainedModel` of the student's family (`families.FAMILIES`) and of any
            architecture, "base" (the student without its adapter), "ema" (its moving average, in
            the checkpoints), a dict of them (each sample's by its "teacher_id"), a
            `fastkd.teachers.Served`, which is asked for batches ahead of their step, ...; None
            where batches hold `teacher`, see `DistillationLoss`.
        loss: options of `fastkd.distillation_loss`, as {"temperature": 2.0, "alpha": 0.1}:
            temperature, alpha, divergence, t_squared, label_smoothing, z_loss, vocab_size; of a
            classifier with several labels {"temperature": 2.0, "pos_weight": tensor}, with
            regression {"alpha": 0.5, "kind": "l2"}: see `problems`. Temperature and alpha may be
            functions of the step: {"alpha": lambda step: min(1.0, step / 1000)}.
            With return_outputs=True each log of the training loss holds the means of
            `fastkd.LossOutputs` over the tokens since the last one, from the same pass:
            log_history gets "soft", "hard", "student_entropy", "teacher_entropy" and so on.
            With alpha=0 batches need no labels: every token counts that attention_mask leaves.
        linear: logits of both models by `LinearLogits`, never built; False: dense ones; None: the
            former for language models, the latter for classifiers, whose logits are few.
        pack: leave ignored tokens out of the head's products, see `LinearLogits`.
        teacher_tokenizer: its ids are compared with those of `processing_class`, the student's:
            vocabularies of one width may hold other tokens. None: not compared.

    Raises:
        TypeError, ValueError: before the first step: a head that cannot be read, another
            vocabulary without vocab_size, other labels, a model of no family, another problem_type
            than the student's, a refused option, several GPUs in one process, weights that are
            sharded with linear=True; on the first batch: labels that are shifted already, or of
            pictures.

    >>> import torch, tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    >>> from fastkd.integrations.transformers import DistillationTrainer
    >>> size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
    >>> config = LlamaConfig(vocab_size=99, **size, **heads)
    >>> teacher, student = LlamaForCausalLM(config), LlamaForCausalLM(config)
    >>> tokens = torch.randint(99, (8, 12))
    >>> data = [{"input_ids": row, "labels": row} for row in tokens]
    >>> folder = tempfile.mkdtemp()
    >>> args = TrainingArguments(folder, max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    >>> trainer = DistillationTrainer(
    ...     student,
    ...     args,
    ...     train_dataset=data,
    ...     teacher=teacher,
    ...     loss={"temperature": 2.0, "alpha": 0.1},
    ... )
    >>> output = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    >>> output.global_step
    2
    """

    _columns: Sequence[str] = ()  # of the dataset, for the teacher alone

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        loss: Mapping[str, Any] | None = None,
        linear: bool | None = None,
        pack: bool = False,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise TypeError("compute_loss_func: got one, expected none: the loss is set by loss=")
        if loss is not None and not isinstance(loss, Mapping):
            got = f"{loss!r:.40}" if isinstance(loss, str) else type(loss).__name__
            raise TypeError(
                f"loss: got {got}, expected a dict of options of fastkd.distillation_loss, as "
                '{"divergence": "kl", "temperature": 2.0}; terms are of fastkd.distill.train'
            )
        options = dict(loss or {})
        for name in ("teacher", "linear", "pack"):
            if name in options:
                got = shown(options[name])
                raise TypeError(f"{name}: got {got} in loss, expected it beside loss: {name}=")
        function = DistillationLoss(teacher, linear=linear, pack=pack, **options)
        super().__init__(*args, **{**kwargs, "compute_loss_func": function})
        self.distillation = function
        self._ahead: tuple[Any, Any] = (None, None)
        function.step = lambda: self.state.global_step
        collator: Any = self.data_collator
        self._columns = () if function.live is None else function.live.columns
        self.data_collator: Any = Collate(collator, self._columns)
        if teacher_tokenizer is not None:
            if self.processing_class is None:
                raise ValueError(
                    "teacher_tokenizer: got one without processing_class, expected the student's "
                    "tokenizer beside it: their ids are compared"
                )
            check_tokenizers(self.processing_class, teacher_tokenizer, options.get("vocab_size"))
        function.choose(self.model)
        # the Trainer would count the first label of each row too where it knows no loss of the
        # model's class (GPT2LMHeadModel)
        self._loss_shifts_labels = function.family.shift
        if self.args.label_smoothing_factor:
            if "label_smoothing" in options:
                raise ValueError(
                    f"label_smoothing: got {shown(options['label_smoothing'])} in loss beside "
                    f"label_smoothing_factor={self.args.label_smoothing_factor}, expected one"
                )
            function.options["label_smoothing"] = self.args.label_smoothing_factor
        if self.args.n_gpu > 1:
            raise ValueError(
                f"args: got {self.args.n_gpu} GPUs in one process, expected one process for each: "
                "start with torchrun or accelerate launch"
            )
        if function.linear and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(SHARDED)
        function.prepare(self.model)
        if function.live is not None and (averages := function.live.averages):
            self.add_callback(_Follow(averages, self.model))

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        most = getattr(self.distillation.live, "ahead_by", None)
        batches = map(self.distillation.labelled, epoch_iterator)
        if most is not None:  # one look ahead for each epoch
            if self._ahead[0] is not epoch_iterator:
                told = expected(batches, self.distillation.expect, most)
                self._ahead = epoch_iterator, told
            batches = self._ahead[1]
        return super().get_batch_samples(batches, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        family = self.distillation.family
        if family.decoder and "labels" in inputs:
            reads = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
            if not reads:  # the model itself makes them of labels, which it is not given here
                inputs = {
                    **inputs,
                    "decoder_input_ids": decoder_inputs(self.model, inputs["labels"]),
                }
        # hooks for this call alone: whoever else calls the student finds it as it was
        with self.distillation.watching(self.model):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # the Trainer's own log of a training interval, on every process
            logs = {**logs, **self._outputs()}
        super().log(logs, *args, **kwargs)

    def _outputs(self) -> dict[str, float]:
        """Means of the loss's outputs over the tokens of all processes since the last log."""
        told = self.distillation.told()
        if not told:
            return {}
        sums = torch.stack([x.float() for x in told.values()])
        all_sums = self.accelerator.gather(sums.unsqueeze(0)).sum(0).tolist()
        found = dict(zip(told, all_sums, strict=True))
        tokens = max(found.pop("tokens"), 1.0)
        return {name: value / tokens for name, value in found.items()}

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if "labels" not in inputs:  # no loss, and no hooks: what is the teacher's goes here
            inputs = self.distillation.students_own(inputs)
        self.distillation.trims = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self.distillation.trims = False

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        live = self.distillation.live
        reads = named(live.model) if type(live) is Live else []
        more = [x for x in ("teacher", *self._columns, *reads) if x not in self._signature_columns]
        self._signature_columns += more

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, _Follow):
                callback.load(resume_from_checkpoint)
