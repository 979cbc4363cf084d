"""From a teacher and its data to a cache."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

import fastkd
from fastkd.distill.batch import Batch, Outputs, device_of, forward, in_eval, to
from fastkd.distill.heads import Head, head_of, linear_logits, uncached, vocabulary
from fastkd.distill.logging import progress_bar
from fastkd.distill.sample_order import check_order, watched
from fastkd.teachers.inputs import check_labels, part, teacher_inputs, trimmed
from fastkd.teachers.views import check_views

from .codec import decode_hidden, encode_hidden, logprob_bound
from .format import listed
from .reader import Reader
from .writer import Writer

SAMPLES, ROWS = 4, 16  # of a cache that is there already: asked for again, at most
NO_HEAD = "a causal language model (get_output_embeddings) or LinearLogits, as hidden=True"
SLACK, SLACK_16 = 0.02, 0.15  # nats: what another batch size or 16 bits may move a mean by


@torch.no_grad()
def capture(
    teacher: Callable[[Any], Any],
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    labels: str | None = None,
    order: str | None = "dataset",
    generator: torch.Generator | None = None,
    progress: bool = True,
    rank: int = 0,
    world_size: int | None = None,
    samples: range | None = None,
    hidden: bool = False,
    **options: Any,
) -> int:
    """Run a teacher over its data into a cache, or go on; returns this rank's number of samples.

    Sample i of the cache is sample i of the loader and must be sample i of its dataset, by which
    `Paired` reads it: a loader that shuffles is refused, and so is one whose first samples are
    others when they are read a second time. Row i of a sample is stored where its label counts;
    other rows are not stored where they end a sample, and elsewhere as rows of padding. Without
    labels an attention_mask says which rows count; padding in front of a sample is left out.

    Where a cache is there already, its first samples are asked for again, and must be the same.
    Many ranks share a dataset with `world_size`: each captures what is missing of its part.

    Args:
        teacher: inputs -> logits [B, L, V] or [B, V], a `LinearLogits`, an object with logits, or a
            `TopK` of the cache's k, temperature and tail (`Served`); a module runs in eval mode, on
            its own device.
        loader: gives inputs, (inputs, labels [B, L] or [B]), or one dict of the teacher's arguments
            and labels. Its first samples are read twice, but of an iterator.
        labels: "shifted": row i counts where label i is not -100, as the losses here read it.
            "input_ids": where label i + 1 is not, transformers' own. None: "shifted", and labels
            that equal the inputs are refused.
        order: "dataset": as above. "loader": another that stays, by whose count the cache is read.
            None: nothing is checked.
        generator: for the draws of method="sample". A resumed capture makes new draws.
        progress: show a tqdm bar.
        rank, world_size: this rank among how many that share the loader's samples.
        samples: the numbers this rank has, in place of an equal share.
        hidden: store the last hidden states of a causal language model, or of a teacher that gives
            `LinearLogits`, and the head once: all columns, exact at any temperature. No k then;
            vocab_size is the model's unless it is given; encoding="int8" takes a byte an element.
        path, options: of `Writer`: vocab_size, k (None stores all logits), method, encoding, ...

    Raises:
        TypeError, ValueError: a loader, samples or a teacher that are not as above.
        CacheError, OSError: see `Writer`.
    """
    if labels not in ("shifted", "input_ids", None):
        raise ValueError(f"labels: got {labels!r:.60}, expected 'shifted', 'input_ids' or None")
    head = _head(teacher, options) if hidden else None
    check_order(loader, order)
    numbers: Iterable[list[int] | None] = repeat(None)
    shared, data = world_size is not None or samples is not None, loader
    if shared:
        ranks = {"rank": rank, "world_size": world_size or rank + 1, "samples": samples}
        loader, numbers, options["total"] = _only(path, loader, **ranks)
    with (
        Writer(path, rank=rank, **options) as writer,
        progress_bar(progress, desc="capture", unit="sample") as bar,
        in_eval(teacher) if isinstance(teacher, nn.Module) else nullcontext(),
    ):
        ask = _Ask(teacher, writer, labels, generator, head)
        if order == "dataset":
            check_views(getattr(data, "dataset", None), path, begin=not listed(Path(path)))
        start, seen = 0 if shared else writer.done, 0
        if shared and order is not None and (there := listed(Path(path))):
            known = range(there[0].first, there[0].last + 1)[:SAMPLES]
            ask.again(path, data.collate_fn([data.dataset[i] for i in known]), known)  # type: ignore[attr-defined]
        for item, named in zip(watched(loader, order), numbers, strict=False):
            batch = teacher_inputs(item)
            check_labels(batch, labels)
            old = min(max(start - seen, 0), batch.samples)
            if old and not seen and order is not None:
                ask.again(path, item, range(old))
            if old < batch.samples:
                output, lengths = ask(part(batch, old))
                named = named or [*range(seen + old, seen + batch.samples)]
                writer.add_batch(output, lengths=lengths, samples=named)
            seen += batch.samples
            bar.update(batch.samples)
        if seen < start:
            raise ValueError(f"loader: got {seen} samples, expected the {start} stored, and more")
    return writer.done


def _head(teacher: Any, options: dict[str, Any]) -> Head | None:
    """A causal language model's head, of a function None; says in `options` what is stored."""
    options["method"] = "hidden" if options.get("method") is None else options["method"]
    if options["method"] != "hidden":
        got = f"{options['method']!r:.60} with hidden=True"
        raise ValueError(f"method: got {got}, expected no method: no columns are chosen")
    if not hasattr(teacher, "get_output_embeddings"):
        return None
    try:
        head = head_of(teacher)
    except (ValueError, TypeError) as error:
        why = str(error).replace("linear=False (dense logits)", "k=, its largest columns")
        raise type(error)(f"hidden: got True for a teacher without a head to read: {why}") from None
    options.setdefault("vocab_size", vocabulary(teacher))
    return head


class _Ask:
    """A teacher's outputs as they are stored."""

    def __init__(
        self, teacher: Any, writer: Writer, labels: str | None, generator: Any, head: Head | None
    ) -> None:
        self._teacher, self._spec, self._labels = teacher, writer.spec, labels
        self._hidden, self._head, self._writer = writer.spec.method == "hidden", head, writer
        self._draws = {"method": writer.spec.method, "generator": generator}
        self._device = device_of(teacher) if isinstance(teacher, nn.Module) else None
        self._off = {} if head is None else uncached(teacher)

    def __call__(self, batch: Batch, **other: Any) -> tuple[Any, Tensor | None]:
        """Outputs of a batch, and how many rows each sample has."""
        spec, own = self._spec, batch.labels
        inputs = batch.inputs if self._device is None else to(batch.inputs, self._device)
        if self._head is None:
            logits = Outputs(forward(self._teacher, inputs), role="teacher").logits
        else:
            named = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
            logits = linear_logits(self._teacher, {**named, **self._off}, self._head)[0]
        kinds: Any = (Tensor, fastkd.LinearLogits, fastkd.TopK) if spec.k else Tensor
        kinds = fastkd.LinearLogits if self._hidden else kinds
        if not isinstance(logits, kinds):
            expected = "a tensor of logits" + (
                ", LinearLogits or TopK" if spec.k else ", as k is None"
            )
            expected = NO_HEAD if self._hidden else expected
            raise TypeError(f"teacher: got {type(logits).__name__}, expected {expected}")
        lead = list(logits.shape[:-1])
        good = len(lead) in (1, 2) and lead[0] == batch.samples
        if not (good if own is None else lead == list(own.shape)):
            wanted = f"[{batch.samples}, ..., V]" if own is None else f"{[*own.shape]} and V"
            raise ValueError(f"teacher: got logits {list(logits.shape)}, expected {wanted}")
        self.dtype = logits.dtype
        if self._hidden:
            states, lengths = trimmed(logits.hidden, batch, self._labels)
            return logits.with_hidden(states), lengths
        if isinstance(logits, fastkd.TopK):  # a server's
            return trimmed(logits, batch, self._labels)
        if spec.k is None:
            return trimmed(logits[..., : spec.vocab_size], batch, self._labels)
        made: dict[str, Any] = {"temperature": spec.temperature, "tail": spec.tail, **self._draws}
        made |= {"vocab_size": spec.vocab_size, **other}
        return trimmed(fastkd.topk_from_logits(logits, spec.k, **made), batch, self._labels)

    def again(self, path: Any, item: Any, numbers: Sequence[int]) -> None:
        """Ask for some samples that are stored, and compare."""
        numbers, spec = numbers[:SAMPLES], self._spec
        if spec.k is not None and spec.k > spec.vocab_size:
            return  # more draws than there are columns to compare them with
        output, lengths = self(part(teacher_inputs(item), 0, len(numbers)), method="top")
        stored = Reader(path).__getitems__(numbers)
        if lengths is not None and (got := [x.size(0) for x in stored]) != lengths.tolist():
            raise ValueError(
                f"loader: got samples of {lengths.tolist()} rows, expected the {got} stored in "
                f"{str(path)[:150]}: other data or labels"
            )
        if self._hidden:
            self._writer.with_head(output)
            output = output.hidden
        check_same(path, spec, stored, [output[i] for i in range(len(stored))], self.dtype)


def share(
    path: Any, total: int, *, rank: int, world_size: int, samples: range | None = None
) -> list[range]:
    """What is left to a rank, in ranges: of its n-th of all samples, or of `samples`, those that
    nobody has written to the folder `path` yet."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of {world_size} ranks, expected 0 to {world_size - 1}")
    mine = samples or range(rank * total // world_size, (rank + 1) * total // world_size)
    if mine.step != 1 or mine.start < 0 or mine.stop > total:
        raise ValueError(f"samples: got {samples}, expected a range of step 1 in {range(total)}")
    left, at = [], mine.start
    for shard in listed(Path(path)):
        left.append(range(at, min(shard.first, mine.stop)))
        at = max(at, shard.last + 1)
    return [gap for gap in (*left, range(at, mine.stop)) if gap]


def _only(path: Any, loader: Any, **ranks: Any) -> tuple[Any, list[list[int]], int]:
    """The same loader for a rank's samples alone, their numbers by batches, and those of all."""
    whole = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
    if not whole or loader.batch_size is None:
        expected = "a DataLoader of a map-style dataset in its own order, with batch_size"
        raise ValueError(f"loader: got one that ranks cannot share, expected {expected}")
    total, size = len(loader.dataset), loader.batch_size
    left = share(path, total, **ranks)
    numbers = [list(of[i : i + size]) for of in left for i in range(0, len(of), size)]
    names = ("collate_fn", "num_workers", "prefetch_factor", "multiprocessing_context", "timeout")
    kept = {name: getattr(loader, name) for name in (*names, "pin_memory", "worker_init_fn")}
    return DataLoader(loader.dataset, batch_sampler=numbers, **kept), numbers, total


def check_same(path: Any, spec: Any, stored: list[Any], said: Any, dtype: Any) -> None:
    """ValueError where samples of the cache (of draws: their k best columns) and what the teacher
    says of them now, in `dtype`, are apart by more than encoding and rounding explain."""
    slack = SLACK if dtype in (torch.float32, torch.float64) else SLACK_16
    for old, new in zip(stored, said, strict=True):
        dense = _logits if isinstance(old, Tensor) else _hidden
        apart = (_topk if spec.k else dense)(spec, old, new)
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


def _hidden(spec: Any, old: Any, new: Any) -> float:
    """Mean distance of logits of what is stored and of what would be."""
    rows = (old.hidden != 0).any(-1).nonzero().flatten()[:ROWS] if old.dim() > 1 else ...
    if not (one := old.hidden[rows]).numel():
        return 0.0
    made = encode_hidden(new.cpu()[rows].reshape(-1, new.size(-1)), spec.encoding)
    two = decode_hidden(made["hidden"], made.get("row_scale"), spec.head["dtype"])
    apart = nn.functional.linear(one - two.view(one.shape), old.weight)
    return abs(spec.head["scale"]) * float(apart.float().abs().mean())


def _topk(spec: Any, old: Any, new: Any) -> float:
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
