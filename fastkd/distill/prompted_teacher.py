"""A teacher that reads another prompt than its student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.arguments.messages import shown

from .batch import IGNORED, Batch, Outputs, rows_at
from .teachers import Teacher, as_teacher


class PromptedTeacher(Teacher):
    """A teacher that reads another prompt than the student: its rows are put beside the student's.

        teacher reads  x[:keep] + prompt + x[cut:]      of a sample's tokens x, padding left out
        student row i  <-  teacher row i + keep + len(prompt) - cut

    keep = cut = `after` for a prompt that is put in front; keep = 0 and cut behind the last token
    without a label in front of the first answer, where it takes the place of the student's own. The
    teacher's sequences are padded behind their ends, whatever side the student's are padded on.

    Args:
        teacher: what `train(teacher=)` takes: a module, "base", "ema", ...; it is asked with a dict
            of input_ids and attention_mask where the student is, and with ids where it is not.
        prompt: ids of one for all samples, or the name of an entry of the batch, as
            "teacher_prompt": a list of ids for each sample, or a tensor [B, P], -100 for padding.
        after: tokens that stay in front of the prompt: 1 for a <bos>.
        replace: the prompt takes the place of the student's own: labels say where that ends.

    Paper: Askell et al. 2021, context distillation, arXiv 2112.00861.
    """

    reads_batch = False

    def __init__(self, teacher: Any, prompt: Any, *, after: int = 0, replace: bool = False) -> None:
        if type(after) is not int or after < 0 or (after and replace):
            got = f"{shown(after)} with replace={replace}"
            raise ValueError(f"after: got {got}, expected an integer >= 0, 0 with replace=True")
        self.teacher, self.after, self.replace = as_teacher(teacher), after, bool(replace)
        self.prompt = prompt if isinstance(prompt, str) else ids_of(prompt, "prompt")
        self.models = self.teacher.models

    def bind(self, student: nn.Module) -> None:
        self.teacher.bind(student)
        self.models = self.teacher.models

    def beside(self, student: nn.Module) -> None:
        self.teacher.beside(student)

    def begin(self) -> None:
        self.teacher.begin()

    def step(self, student: nn.Module) -> None:
        self.teacher.step(student)

    def state_dict(self) -> dict[str, Any]:
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state)

    def identity(self) -> Any:
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt.tolist()
        return ["PromptedTeacher", self.teacher.identity(), prompt, self.after, self.replace]

    @property
    def ahead_by(self) -> int | None:  # type: ignore[override]
        return self.teacher.ahead_by

    def expect(self, batch: Batch) -> None:
        if self.ahead_by is not None:
            self.teacher.expect(self._asked(batch)[0])

    def __call__(self, batch: Batch) -> Outputs:
        asked, at = self._asked(batch)
        return Outputs(rows_at(self.teacher(asked).logits, at), role="teacher")

    def _asked(self, batch: Batch) -> tuple[Batch, Tensor]:
        inputs, labels, at = self.inputs(batch.inputs, batch.labels, batch.extra)
        return Batch(inputs, labels, extra=batch.extra, samples=batch.samples), at

    def inputs(self, given: Any, labels: Any, extra: Mapping[str, Any]) -> tuple[Any, Any, Tensor]:
        """What the teacher reads, its labels, and its row [B, L] of each of the student's."""
        named = isinstance(given, Mapping)
        ids, mask = (
            (given.get("input_ids"), given.get("attention_mask")) if named else (given, None)
        )
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(
                f"inputs: got {shown(type(ids).__name__)}, expected ids [B, L] or a dict with "
                "input_ids, of which the teacher's prompt can be a part"
            )
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        at = given.get("position_ids") if named else None
        if isinstance(at, Tensor) and at.shape == ids.shape:
            if bool(((at.diff(dim=-1) <= 0) & mask[:, 1:] & mask[:, :-1]).any()):
                raise ValueError("position_ids: got packed samples, expected one in each row")
        if self.replace and (not isinstance(labels, Tensor) or labels.shape != ids.shape):
            raise ValueError("labels: got none of the ids' shape, expected them with replace=True")
        prompts = self._prompts(extra, ids)
        rows, shifts = [], []
        for b, prompt in enumerate(prompts):
            own, keep, cut = ids[b][mask[b]], self.after, self.after
            if self.replace:
                first = (labels[b][mask[b]] != IGNORED).nonzero().flatten()[:1]
                keep, cut = 0, int(first[0]) + 1 if len(first) else len(own)
            rows.append(torch.cat([own[:keep], prompt, own[cut:]]))
            shifts.append(min(keep, len(own)) + len(prompt) - cut)
        sizes = torch.tensor([len(row) for row in rows], device=ids.device)
        made = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        place = torch.arange(ids.size(1), device=ids.device) - mask.int().argmax(1, keepdim=True)
        at = place + torch.tensor(shifts, device=ids.device)[:, None]
        at = torch.where(place < self.after - 1, place, at)  # in front of the prompt
        at = at.clamp_min(0).minimum((sizes - 1).clamp_min(0)[:, None])
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            kept = labels != IGNORED
            moved = torch.full_like(made, IGNORED)
            moved[kept.nonzero()[:, 0], at[kept]] = labels[kept].to(made.dtype)
            labels = moved
        else:
            labels = None
        if not named:
            return made, labels, at
        rest = {k: x for k, x in given.items() if getattr(x, "shape", ())[:2] != ids.shape}
        behind = torch.arange(made.size(1), device=ids.device) < sizes[:, None]
        return {**rest, "input_ids": made, "attention_mask": behind.to(torch.int64)}, labels, at

    def _prompts(self, extra: Mapping[str, Any], ids: Tensor) -> list[Tensor]:
        name, size = self.prompt, ids.size(0)
        if not isinstance(name, str):
            return [name.to(ids.device, ids.dtype)] * size
        found = extra.get(name)
        if found is None or len(found) != size:
            got = "none" if found is None else f"{len(found)}"
            raise ValueError(
                f"{name}: got {got} for {size} samples, expected an entry {name!r} of the batch, "
                "the ids of each sample's prompt"
            )
        prompts = [ids_of(prompt, name).to(ids.device, ids.dtype) for prompt in found]
        return [prompt[prompt != IGNORED] for prompt in prompts]


def ids_of(prompt: Any, name: str) -> Tensor:
    """A prompt's ids as a tensor; TypeError, ValueError for what is none."""
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {shown(prompt)}, expected ids, [P] integers") from None
    if ids.dim() != 1 or (ids.numel() and ids.is_floating_point()):
        raise ValueError(f"{name}: got {ids.dtype} {list(ids.shape)}, expected ids, [P] integers")
    return ids.long()
