"""What of a batch is sent: of each text its tokens, up to the last row that somebody wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments.messages import listed, shown
from fastkd.distill.batch import IGNORED, Batch, tensors

from .apis import Question


def questions(
    inputs: Any, labels: Tensor | None
) -> tuple[Tensor, list[tuple[int, Question] | None]]:
    """The ids [B, L]; and of each text the place of its first token, and what is asked."""
    ids, mask = _ids(inputs)
    if labels is not None and labels.shape != ids.shape:
        got = f"{list(labels.shape)} for input_ids {list(ids.shape)}"
        raise ValueError(f"labels: got {got}, expected one for each")
    if labels is not None and labels.is_floating_point():
        raise TypeError(f"labels: got {labels.dtype}, expected the ids behind each position, -100")
    wanted = [None] * len(ids) if labels is None else [*labels.cpu()]
    return ids, [_question(*x) for x in zip(ids.tolist(), mask.cpu(), wanted, strict=True)]


def asked_of(batch: Batch) -> tuple[Any, Tensor | None]:
    """Inputs and labels of a trainer's batch."""
    if batch.teacher_inputs is not None:  # another prompt: the labels are not its
        return batch.teacher_inputs, None
    return batch.inputs, batch.labels


def _ids(inputs: Any) -> tuple[Tensor, Tensor]:
    """input_ids [B, L], and bool [B, L], where a text is."""
    named = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids = named.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not _whole(ids):
        got = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else shown(ids)
        raise TypeError(f"input_ids: got {got}, expected int [B, L]: a server reads tokens")
    others = {name: x for name, x in named.items() if name != "attention_mask"}
    more = [name for name, x in others.items() if any(y.is_floating_point() for y in tensors(x))]
    if more:
        raise TypeError(f"inputs: got {listed(more)} beside input_ids, expected tokens alone")
    places = named.get("position_ids")
    mask = named.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        got = f"{list(mask.shape)} for input_ids {list(ids.shape)}"
        raise ValueError(f"attention_mask: got {got}, expected one for each")
    mask = mask != 0
    # a mask of 1s with a hole, or positions that start again: several texts in a row
    steps = mask.int().diff(dim=-1)
    holes = (steps == 1).sum(-1) + mask[:, :1].sum(-1) > 1
    if places is not None:
        again = places.expand_as(ids).diff(dim=-1) != 1
        holes = holes | (again & mask[:, 1:] & mask[:, :-1]).any(-1)
    if bool(holes.any()):
        raise ValueError(
            f"input_ids: got several texts in row {int(holes.int().argmax())} (packed), expected "
            "one in each, padded"
        )
    return ids, mask


def _whole(ids: Tensor) -> bool:
    return not ids.is_floating_point() and ids.dtype != torch.bool


def _question(ids: list[int], mask: Tensor, labels: Tensor | None) -> tuple[int, Question] | None:
    """(the place of a text's first token, what is asked of it); None where nothing is wanted."""
    wanted = mask if labels is None else mask & (labels != IGNORED)
    rows = wanted.nonzero().flatten().tolist()
    if not rows:
        return None
    first, last = int(mask.int().argmax()), rows[-1]
    # without labels nobody knows the last: what is said of it does not depend on it, and what
    # stands there is padding, by which a text would have other names in other batches
    then = ids[last] if labels is None else int(labels[last])
    tokens = (*ids[first : last + 1], then)
    if min(tokens) < 0:
        got, name = min(tokens), "input_ids" if min(tokens[:-1]) < 0 else "labels"
        hint = "attention_mask says which tokens are padding" if name == "input_ids" else "or -100"
        raise ValueError(f"{name}: got {got}, expected ids from 0; {hint}")
    return first, Question(tokens, tuple(row - first for row in rows))
