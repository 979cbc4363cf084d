"""What a teacher is asked, which rows of its answer are kept, and is it the teacher of before?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.distill.batch import IGNORED, Batch, as_batch, mapped, tensors
from fastkd.teachers.pairs import rows_at, without

from .codec import logprob_bound

NOT_ASKED = ("labels", "teacher", "index")  # of a dict that holds the model's arguments themselves
SAMPLES, ROWS = 4, 16  # asked for again, at most
SLACK, SLACK_16 = 0.02, 0.15  # nats: what another batch size or 16 bits may move a mean by


def teacher_inputs(item: Any) -> Batch:
    """A loader's batch: inputs, (inputs, labels), {"inputs", "labels"}, a model's own arguments
    with "labels" among them, or a `Batch`."""
    if isinstance(item, Mapping) and "inputs" not in item:
        own = {name: x for name, x in item.items() if name not in NOT_ASKED}
        made = Batch(own, item.get("labels"))
    else:
        made = as_batch(item)
    first = next(tensors(made.inputs), None)
    if first is None or not first.dim() or not isinstance(made.labels, (Tensor, type(None))):
        raise TypeError(
            f"loader: got a batch ({type(item).__name__}), expected (inputs, labels), inputs, or "
            "one dict of the teacher's arguments and labels; all of tensors"
        )
    made.samples = first.size(0)
    return made


def part(batch: Batch, start: int, stop: int | None = None) -> Batch:
    """Samples start to stop of a batch."""
    size = batch.samples

    def cut(x: Tensor) -> Tensor:
        return x[start:stop] if x.dim() and x.size(0) == size else x

    rows = len(range(size)[start:stop])
    return Batch(mapped(batch.inputs, cut), mapped(batch.labels, cut), samples=rows)


def check_labels(batch: Batch, labels: str | None) -> None:
    """Refuse labels that are the inputs themselves, unless it was said what they are."""
    ids = batch.inputs.get("input_ids") if isinstance(batch.inputs, Mapping) else batch.inputs
    own = batch.labels
    if labels is not None or own is None or not isinstance(ids, Tensor):
        return
    if ids.is_floating_point() or ids.dim() != 2 or ids.shape != own.shape:
        return
    kept, ids = own != IGNORED, ids.to(own.device)
    same = bool(((own == ids) | ~kept).all()) and bool(kept[:, 1:].any())
    if same and not bool(((own[:, :-1] == ids[:, 1:]) | ~kept[:, :-1]).all()):
        raise ValueError(
            "labels: got input_ids themselves (-100 where a token does not count), which "
            "transformers shifts within its loss: labels='input_ids' keeps the rows that predict "
            "them; expected the label of row i in place i, or labels='shifted' if it is"
        )


def trimmed(output: Any, batch: Batch, labels: str | None) -> tuple[Any, Tensor | None]:
    """A teacher's output with nothing in the rows that do not count, and rows of each sample.

    Padding in front of a sample, by its attention_mask, is left out: its row 0 is that of its
    first token.
    """
    lead, own = list(output.shape[:-1]), batch.labels
    if len(lead) == 1:
        return (output if own is None else without(output, own == IGNORED)), None
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    mask = mask.cpu() != 0 if isinstance(mask, Tensor) and list(mask.shape) == lead else None
    if own is None and mask is None:
        return output, None
    kept = torch.ones(lead, dtype=torch.bool) if mask is None else mask
    if own is not None:
        counts = (own != IGNORED).cpu()
        if labels == "input_ids":
            counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], 1)
        kept = kept & counts
    place = torch.arange(lead[1])
    if mask is not None and not bool(mask[:, 0].all()):
        at = place + mask.int().argmax(1, keepdim=True)
        inside, at = at < lead[1], at.clamp_max(lead[1] - 1)
        kept, output = kept.gather(1, at) & inside, rows_at(output, at)
    lengths = ((place + 1) * kept).amax(-1) if lead[1] else torch.zeros(lead[0], dtype=torch.int64)
    return without(output, ~kept), lengths


def check_same(path: Any, spec: Any, stored: list[Any], said: Any, dtype: Any) -> None:
    """Compare samples of the cache with what the teacher says of them now.

    Args:
        path, spec: of the cache.
        stored: its samples, `TopK` [L, K] or [K], or logits.
        said: the same of the teacher at work: the k best columns where the cache has draws.
        dtype: of the teacher's logits.

    Raises:
        ValueError: they are apart by more than encoding and rounding explain.
    """
    slack = SLACK if dtype in (torch.float32, torch.float64) else SLACK_16
    for old, new in zip(stored, said, strict=True):
        apart = (_logits if isinstance(old, Tensor) else _topk)(spec, old, new)
        if apart > slack:
            raise ValueError(
                f"teacher: got outputs {apart:.3g} nats off what is stored of the same samples in "
                f"{str(path)[:150]}, expected the same teacher and the same data in the same order "
                "to go on with; write another's outputs to a folder of their own (model= and "
                "data= name whose they are)"
            )


def _logits(_: Any, old: Tensor, new: Tensor) -> float:
    """Mean distance beyond the rounding of 16 bits."""
    one, two = old.float(), new[: len(old)].float().cpu()
    rows = (one != 0) & one.isfinite() & two.isfinite()
    one, two = one[rows], two[rows]
    return float((one - two).abs().mean() - 2.0**-8 * one.abs().mean()) if len(one) else 0.0


def _topk(spec: Any, old: Any, new: fastkd.TopK) -> float:
    """Mean distance of the log-probabilities of columns that both have; 1 where few are."""
    if old.dim() == 1:
        old, new = old[None], new[None]
    some = (old.indices >= 0).any(-1).nonzero().flatten()[:ROWS]
    if not len(some):
        return 0.0
    new = new.to("cpu")
    columns, given = old.indices[some].long(), old.logprobs[some].double()
    there, now = new.indices[some].long(), new.logprobs[some].double()
    both = (columns[:, :, None] == there[:, None, :]) & (columns >= 0)[:, :, None]
    if spec.method == "sample":  # are as many draws among the best columns as these have mass?
        share = float(torch.where(both.any(-1), given.exp(), 0.0).sum(-1).mean())
        mass = float(now.exp().sum(-1).mean())
        noise = math.sqrt(max(mass * (1 - mass), 0.0) / (spec.k * len(some)))
        return max(abs(share - mass) - 6 * noise, 0.0)
    if float(both.sum()) < 0.5 * float((columns >= 0).sum()):
        return 1.0
    apart = (given[:, :, None] - now[:, None, :]).abs()
    apart = (apart - logprob_bound(spec.encoding, spec.k, given)[:, :, None])[both]
    apart = apart[apart.isfinite()]
    return float(apart.mean()) if len(apart) else 1.0
