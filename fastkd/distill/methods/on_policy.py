"""On-policy distillation: the teacher scores what the student itself wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import shown

from ..batch import IGNORED, Batch, as_batch, device_of, restored_modes, to, unwrap
from ..logging import Step
from ..teachers import as_teacher
from ..terms import Term, soft
from ..trainer import train

Generate = Callable[[nn.Module, Any], Tensor]


def on_policy(
    student: nn.Module,
    loader: Iterable[Any],
    loss: Term | Sequence[Term] | None = None,
    *,
    teacher: Any,
    generate: Generate,
    student_share: float = 0.5,
    teacher_share: float = 0.0,
    end: int | Sequence[int] | None = None,
    seed: int = 0,
    ahead: int = 0,
    **options: Any,
) -> list[Step]:
    """Train a language model in place on the dataset's answers, its own and the teacher's.

        a batch is  written by the student  with probability student_share,
                    by the teacher          with probability teacher_share,
                    the dataset's           otherwise

    With transformers, `generate` is
    `lambda model, prompts: model.generate(**prompts, max_new_tokens=64)`.

    A text that was written is ids [B, L]: logits at i are compared for the token at i + 1, labels
    are -100 in the prompt and behind the first `end`, and `batch.extra["origin"]` says who wrote
    it. Nothing is differentiated through the writing. A resumed run writes and draws what one that
    was never interrupted would have.

    Args:
        student: module, ids [B, L] or their keyword arguments -> logits [B, L, V].
        loader: gives dicts: inputs and labels (already shifted, -100 in the prompt) as the
            trainer's, and prompts, int [B, P] or {"input_ids", "attention_mask"}, of one length
            (padded on the left).
        loss: terms; None: `soft(temperature=1, divergence=js(beta=0.5), rows="labelled")`, GKD's.
        teacher: as the trainer's; a module where teacher_share is above 0.
        generate: (module in eval mode, prompts on its device) -> ids [B, P + A], prompts first.
        student_share: lambda in GKD's paper (`lmbda` in TRL), in [0, 1].
        teacher_share: in [0, 1 - student_share]; sequence-level distillation as it goes.
        end: token that ends an answer, or several of which each does, itself counted; None: all of
            the answer counts.
        seed: of the draws; `generate` has torch's own random state.
        ahead: batches that a served teacher (`fastkd.teachers.Served`) may score while the next are
            written. Each is then written by the student of so many steps before, without
            checkpoints. With accumulate=n a step's n texts are written by one student anyway, and
            those before are scored meanwhile, at ahead=0 too.
        options: of `train`.

    Returns:
        Every step.

    Raises:
        TypeError, ValueError: a share out of range, a teacher that cannot write, a batch without
            prompts, ids that do not start with them, or what `train` raises.

    Paper: Agarwal et al. 2023 (GKD), arXiv 2306.13649.
    """
    for name, share in (("student_share", student_share), ("teacher_share", teacher_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: got {shown(share)}, expected a number from 0 to 1")
    if student_share + teacher_share > 1:
        raise ValueError(
            f"teacher_share: got {shown(teacher_share)} beside a student_share of "
            f"{shown(student_share)}, expected a sum of at most 1"
        )
    if ahead and options.get("checkpoint") is not None:
        raise ValueError(
            f"ahead: got {shown(ahead)} with a checkpoint, expected 0: a resumed run would write "
            "those batches anew, by another student (accumulate= scores while the next is written)"
        )
    soft_teacher = as_teacher(teacher)
    if teacher_share and not isinstance(teacher, nn.Module):
        got = type(teacher).__name__
        raise TypeError(f"teacher: got {got} with a teacher_share, expected a module to write")
    if loss is None:
        js = fastkd.divergences.js(beta=0.5)
        loss = soft(temperature=1.0, divergence=js, rows="labelled")
    ends = torch.as_tensor([] if end is None else end).flatten()
    if end is not None and (ends.is_floating_point() or ends.dtype == torch.bool):
        raise TypeError(f"end: got {ends.dtype} or none, expected an id or several")
    writers = {"student": (student, student_share), "teacher": (teacher, teacher_share)}
    loader_class = _Sized if hasattr(loader, "__len__") else _Written
    written = loader_class(loader, partial(_text, generate=generate, end=ends), writers, seed)
    return train(student, written, loss, teacher=soft_teacher, ahead=ahead, **options)


class _Written:
    """The loader's batches, some of them written anew; each is made when the trainer takes it."""

    def __init__(
        self,
        loader: Iterable[Any],
        text: Callable[[nn.Module, Any], Batch],
        writers: Mapping[str, tuple[Any, float]],
        seed: int,
    ) -> None:
        self.loader, self.text, self.writers = loader, text, writers
        self.generator = torch.Generator().manual_seed(seed)  # kept in checkpoints

    def __iter__(self) -> Iterator[Callable[[], Batch]]:
        for item in self.loader:
            yield partial(self._made, item)

    def _made(self, item: Any) -> Batch:
        drawn = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        batch = as_batch(item)
        prompts = batch.extra.pop("prompts", None)
        for origin, (model, share) in self.writers.items():
            if drawn < share:
                if prompts is None:
                    raise ValueError("loader: got a batch without prompts, expected a dict of them")
                batch = self.text(model, prompts)
                batch.extra["origin"] = origin
                return batch
            drawn -= share
        batch.extra["origin"] = "dataset"
        return batch


class _Sized(_Written):
    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


@torch.no_grad()
def _text(model: nn.Module, prompts: Any, generate: Generate, end: Tensor) -> Batch:
    """The text that the model writes behind the prompts, as a batch; its labels are the answers."""
    model = unwrap(model)  # what writes is a method of the model's own class
    prompts = to(prompts, device_of(model))
    first = prompts["input_ids"] if isinstance(prompts, Mapping) else prompts
    with restored_modes(model):
        ids = generate(model.eval(), prompts)
    if not isinstance(ids, Tensor) or not _continues(ids, first):
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"generate: got {got}, expected ids [B, P + A] that start with the prompts, "
            f"{tuple(first.shape)}"
        )
    answer = ids[:, first.size(1) :]
    counts = torch.ones_like(answer, dtype=torch.bool)
    if end.numel():
        is_end = torch.isin(answer, end.to(answer.device))
        counts = is_end.cumsum(1) - is_end.long() == 0  # none before it
    labels = torch.cat((torch.full_like(first, IGNORED), answer.where(counts, IGNORED)), 1)[:, 1:]
    if not isinstance(prompts, Mapping):
        return Batch(ids[:, :-1], labels)
    seen = prompts.get("attention_mask", torch.ones_like(first))
    seen = torch.cat((seen, counts.to(seen.dtype)), 1)
    return Batch({"input_ids": ids[:, :-1], "attention_mask": seen[:, :-1]}, labels)


def _continues(ids: Tensor, prompts: Tensor) -> bool:
    rows, length = prompts.shape
    fits = ids.dim() == 2 and ids.size(0) == rows and ids.size(1) > length
    return fits and bool((ids[:, :length] == prompts).all())
