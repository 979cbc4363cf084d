"""From a batch's labels to one label for each row of logits, and what no label can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.integrations.families import IGNORED, Family
from fastkd.integrations.problems import Problem, labels_of_each


def rows_of(
    labels: Tensor | None, shifted: Tensor | None, student: Any, family: Family, problem: Problem
) -> Tensor:
    """Labels of the student's logits [..., V], one for each row of them, or for each logit.

    Those of a causal model are the next position's, -100 where there is none; all others stand
    where they are.
    """
    if labels is None:
        like = "input_ids with -100 where a token does not count, as "
        like += "DataCollatorForLanguageModeling(mlm=False) gives them"
        expected = like if family.shift else f"a column 'labels' {family.form}"
        expected += "; with alpha=0 DistillationTrainer trains without"
        raise ValueError(f"labels: got none in the batch, expected {expected}")
    labels = shifted_labels(labels, shifted, family)
    if family.form == "[B]" and labels.shape == (student.size(0), 1):
        labels = labels.squeeze(-1)  # as the models themselves take them
    if problem.each:
        return labels_of_each(problem, labels, student)
    of_classes = labels.is_floating_point() and family.form == "[B]"  # probabilities of them
    if labels.shape == (student.shape if of_classes else student.shape[:-1]):
        return labels
    more = student.size(-2) - labels.size(-1) if student.dim() == 3 and labels.dim() else 0
    hint = ""
    if more > 0 and family.form == "[B, L]":
        hint = f" ({more} virtual tokens of prompt tuning are before the batch's own?"
        hint += " Adapters that add none, as LoRA, are taken)"
    each = "one label for each position" if family.form == "[B, L]" else "one label for each row"
    if family.form == "[B]" and labels.shape == student.shape:
        hint = "; several labels of a row are floats, or of a config with problem_type "
        hint += "'multi_label_classification'"
    raise ValueError(
        f"labels: got {list(labels.shape)} for logits {list(student.shape)}, expected "
        f"{family.form}, {each}" + hint
    )


def shifted_labels(labels: Tensor, shifted: Tensor | None, family: Family) -> Tensor:
    """A batch's labels, each in the row that predicts it."""
    if shifted is not None:
        return shifted
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED) if family.shift else labels


def counting(batch: Mapping[str, Any], config: Any, family: Family, problem: Problem) -> Any:
    """Labels for a batch that needs none (alpha=0) but to say which rows count; None: not known.

    A token counts where its attention_mask is not 0, every sample of a classifier.
    """
    if family.form == "[B]":
        first = next((x for x in batch.values() if isinstance(x, Tensor)), None)
        if first is None:
            return None
        if problem.each:
            return torch.zeros(first.size(0), config.num_labels, device=first.device)
        return torch.zeros(first.size(0), dtype=torch.int64, device=first.device)
    side = "decoder_" if family.decoder else ""
    ids, mask = batch.get(f"{side}input_ids"), batch.get(f"{side}attention_mask")
    if not isinstance(ids, Tensor):
        return None
    labels = ids.clone() if family.shift else torch.zeros_like(ids)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        labels[mask == 0] = IGNORED
    for _, token in _placeholders(config):
        labels[ids == token] = IGNORED
    return labels


def _placeholders(config: Any) -> Iterator[tuple[str, int]]:
    """(field, id) of tokens that stand for a part of a picture or a sound."""
    for field in ("image_token_id", "video_token_id", "audio_token_id", "image_token_index"):
        if isinstance(token := getattr(config, field, None), int):
            yield field, token


def check_first(labels: Tensor, inputs: dict[str, Any], student: Any, family: Family) -> None:
    """Raise for the labels of a first batch that its family's loss does not mean."""
    if not family.shift:
        return
    _check_unshifted(labels, inputs.get("input_ids"))
    for field, token in _placeholders(student.config):
        if bool((labels == token).any()):
            raise ValueError(
                f"labels: got {int((labels == token).sum())} of {field} {token}, which stands for "
                "a part of a picture or a sound, expected -100 there: text alone is learned "
                f"(labels[labels == {token}] = -100 in the collator)"
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
