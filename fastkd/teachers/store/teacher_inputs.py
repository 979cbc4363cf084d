"""What a teacher is asked, a loader's batch, and which rows of its answer are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.distill.batch import IGNORED, Batch, forward, mapped, tensors

LABELS = ("shifted", "input_ids", None)
NOT_ASKED = ("labels", "teacher", "index")  # of a dict that holds the model's arguments themselves


@dataclass(frozen=True)
class TeacherInputs:
    """inputs: a tensor, or a dict of the model's keyword arguments; labels [B, L], [B] or None."""

    inputs: Any
    labels: Tensor | None

    def __len__(self) -> int:
        return next(tensors(self.inputs)).size(0)

    @property
    def ids(self) -> Tensor | None:
        """Token ids [B, L], where the inputs are such."""
        ids = self.inputs.get("input_ids") if isinstance(self.inputs, Mapping) else self.inputs
        whole = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        return ids if whole else None

    def mask(self, shape: list[int]) -> Tensor | None:
        """attention_mask [B, L] as booleans, where there is one of this shape."""
        mask = self.inputs.get("attention_mask") if isinstance(self.inputs, Mapping) else None
        return mask != 0 if isinstance(mask, Tensor) and list(mask.shape) == shape else None

    def part(self, start: int, stop: int | None = None) -> TeacherInputs:
        """Samples start to stop of the batch."""
        size = len(self)

        def cut(x: Tensor) -> Tensor:
            return x[start:stop] if x.dim() and x.size(0) == size else x

        return replace(self, inputs=mapped(self.inputs, cut), labels=mapped(self.labels, cut))


def teacher_inputs(given: Any) -> TeacherInputs:
    """A loader's batch: inputs, (inputs, labels), {"inputs", "labels"}, a model's own arguments
    with "labels" among them, or a `Batch`."""
    if isinstance(given, Batch):
        made = TeacherInputs(given.inputs, given.labels)
    elif isinstance(given, Mapping):
        inputs = given["inputs"] if "inputs" in given else None
        if inputs is None:
            inputs = {name: x for name, x in given.items() if name not in NOT_ASKED}
        made = TeacherInputs(inputs, given.get("labels"))
    else:
        parts = list(given) if isinstance(given, (tuple, list)) else [given]
        made = TeacherInputs(parts[0] if parts else None, parts[1] if len(parts) > 1 else None)
        if len(parts) > 2:
            made = TeacherInputs(None, None)
    kinds = isinstance(made.inputs, (Tensor, Mapping)) and isinstance(
        made.labels, (Tensor, type(None))
    )
    first = next(tensors(made.inputs), None) if kinds else None
    if first is None or not first.dim():
        many = given if isinstance(given, (tuple, list)) else [given]
        got = ", ".join(type(part).__name__ for part in many[:8])
        raise TypeError(
            f"loader: got a batch ({got}), expected (inputs, labels) or inputs, tensors or the "
            "inputs a dict of the teacher's arguments (input_ids, attention_mask, ...), or one "
            "dict of these and labels"
        )
    return made


def answer(teacher: Any, inputs: Any) -> Any:
    """The teacher's logits of inputs, called by name where they are a dict."""
    try:
        said = forward(teacher, inputs)
    except IndexError as error:
        if (beyond := _beyond(teacher, inputs)) is None:
            raise
        raise ValueError(beyond) from error
    if isinstance(said, Mapping) and "logits" in said:
        return said["logits"]
    return getattr(said, "logits", said)


def _beyond(teacher: Any, inputs: Any) -> str | None:
    """Which ids have no row in the teacher's embedding."""
    if not isinstance(teacher, nn.Module):
        return None
    tables = [part for part in teacher.modules() if isinstance(part, nn.Embedding)]
    if callable(get := getattr(teacher, "get_input_embeddings", None)):
        tables = [get()]
    sizes = [table.num_embeddings for table in tables if hasattr(table, "num_embeddings")]
    named = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.is_floating_point() or not x.numel():
            continue
        low, high = int(x.min()), int(x.max())
        for size in sizes:
            if low < 0 or high >= size:
                return (
                    f"{name}: got ids from {low} to {high}, expected 0 to {size - 1}, the rows of "
                    "the teacher's embedding: are they of another tokenizer?"
                )
    return None


def check_labels(asked: TeacherInputs, labels: str | None) -> None:
    """Refuse labels that are the inputs themselves, unless it was said what they are."""
    ids, own = asked.ids, asked.labels
    if labels is not None or ids is None or own is None or ids.shape != own.shape:
        return
    kept = own != IGNORED
    same = bool(((own == ids.to(own.device)) | ~kept).all()) and bool(kept[:, 1:].any())
    ahead = (own[:, :-1] == ids.to(own.device)[:, 1:]) | ~kept[:, :-1]
    if same and not bool(ahead.all()):
        raise ValueError(
            "labels: got input_ids themselves (-100 where a token does not count), which "
            "transformers shifts within its loss: labels='input_ids' keeps the rows that predict "
            "them; expected the label of row i in place i, or labels='shifted' if it is"
        )


def kept_rows(asked: TeacherInputs, lead: list[int], labels: str | None) -> Tensor | None:
    """Which rows [B, L] count; None: all, or logits are not of sequences."""
    own, mask = asked.labels, asked.mask(lead)
    if own is None or own.dim() != 2:
        return mask
    kept = own != IGNORED
    if labels == "input_ids":
        kept = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], 1)
    return kept if mask is None else kept & mask.to(kept.device)


def trimmed(output: Any, asked: TeacherInputs, labels: str | None) -> tuple[Any, Tensor | None]:
    """A teacher's output with nothing in the rows that do not count, and rows of each sample.

    Padding in front of a sample, by its attention_mask, is left out: its row 0 is that of its
    first token.
    """
    lead = list(output.shape[:-1])
    if len(lead) == 1:
        own = asked.labels
        return (output if own is None else without(output, own == IGNORED)), None
    kept = kept_rows(asked, lead, labels)
    if kept is None:
        return output, None
    mask = asked.mask(lead)
    if mask is not None and not bool(mask[:, 0].all()):
        place = torch.arange(lead[1], device=mask.device)
        front = mask.int().argmax(1, keepdim=True)
        at = (place + front).clamp_max(lead[1] - 1)
        behind = place + front >= lead[1]
        kept = kept.gather(1, at.to(kept.device)) & ~behind.to(kept.device)
        output = rows_at(output, at)
    return without(output, ~kept), _lengths(kept)


def rows_at(output: Any, at: Tensor) -> Any:
    """output[b, at[b, l]] in place of output[b, l]."""

    def moved(x: Tensor) -> Tensor:
        wide = at.to(x.device).reshape(*at.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, wide)

    if isinstance(output, Tensor):
        return moved(output)
    tail = output.tail_logprob
    return fastkd.TopK(
        moved(output.logprobs),
        moved(output.indices),
        tail_logprob=None if tail is None else moved(tail),
        temperature=output.temperature,
        tail=output.tail,
    )


def without(output: Any, ignored: Tensor) -> Any:
    """The same with nothing in the rows ignored, whatever they held."""
    ignored = ignored.to(output.device)
    if isinstance(output, Tensor):
        return output.masked_fill(ignored.unsqueeze(-1), 0.0)
    tail = output.tail_logprob
    return fastkd.TopK(
        output.logprobs.masked_fill(ignored.unsqueeze(-1), -torch.inf),
        output.indices.masked_fill(ignored.unsqueeze(-1), -1),
        tail_logprob=None if tail is None else tail.masked_fill(ignored, 0.0),
        temperature=output.temperature,
        tail=output.tail,
    )


def _lengths(kept: Tensor) -> Tensor:
    """Rows of each sample up to the last that is kept, of kept [B, L]."""
    place = torch.arange(1, kept.size(1) + 1, device=kept.device)
    return (place * kept).amax(-1) if kept.size(1) else place.new_zeros(kept.size(0))
