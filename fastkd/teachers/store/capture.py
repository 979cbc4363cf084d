"""From a teacher and its data to a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.distill.batch import Batch, device_of, in_eval, moved
from fastkd.distill.heads import Head, head_of, linear_logits, uncached, vocabulary
from fastkd.distill.logging import progress_bar
from fastkd.distill.sample_order import check_order, watched
from fastkd.distill.teacher_routes import samples as samples_of
from fastkd.distill.teachers import Teacher, as_teacher, expected
from fastkd.teachers import inputs
from fastkd.teachers.same import apart
from fastkd.teachers.views import check_views

from .format import listed
from .reader import Reader
from .writer import Writer

SAMPLES = 4  # of a cache that is there already: asked for again, at most
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
    others when they are read a second time. Row i of a sample is stored where its label counts, or,
    without labels, its attention_mask; padding in front of a sample is left out. Samples that are
    there already are not asked for but a few, which must be the same.

    Args:
        teacher: inputs -> logits [B, L, V] or [B, V], a `LinearLogits`, an object with logits, or a
            `TopK` of the cache's k, temperature and tail; a module runs in eval mode, on its own
            device. Or a `distill.Teacher`: a `Served` one is asked ahead, for the rows that count.
        loader: gives inputs, (inputs, labels [B, L] or [B]), or one dict of the teacher's arguments
            and labels. Its first samples are read twice, but of an iterator.
        labels: "shifted": row i counts where label i is not -100, as the losses here read it.
            "input_ids": where label i + 1 is not, transformers' own. None: "shifted", and labels
            that equal the inputs are refused.
        order: "dataset": as above. "loader": another that stays, by whose count the cache is read.
            None: nothing is checked.
        generator: for the draws of method="sample". A resumed capture makes new draws.
        progress: show a tqdm bar.
        rank, world_size: this rank among how many that share the loader's samples: each captures
            what is missing of its part, or of `samples`, a range of their numbers.
        hidden: store the last hidden states of a causal language model, or of a teacher that gives
            `LinearLogits`, and the head once: all columns, exact at any temperature. No k then.
        path, options: of `Writer`: vocab_size, k (None stores all logits), method, encoding, ...

    Raises:
        TypeError, ValueError: a loader or a teacher that is not as above.
        CacheError, OSError: see `Writer`.
    """
    if labels not in ("shifted", "input_ids", None):
        raise ValueError(f"labels: got {labels!r:.60}, expected 'shifted', 'input_ids' or None")
    inputs.check_teacher(teacher)
    source = as_teacher(teacher)
    head = _head(teacher, options) if hidden else None
    check_order(loader, order)
    numbers: Iterable[list[int] | None] = repeat(None)
    shared, data = world_size is not None or samples is not None, loader
    if shared:
        options["total"] = total = inputs.shareable(loader)
        mine = share(path, total, rank=rank, world_size=world_size or rank + 1, samples=samples)
        loader, numbers = inputs.only(loader, mine)
    with (
        Writer(path, rank=rank, **options) as writer,
        progress_bar(progress, desc="capture", unit="sample") as bar,
        in_eval(nn.ModuleList(source.models)),
    ):
        ask = _Ask(source, writer, generator, head)
        if order == "dataset":
            check_views(getattr(data, "dataset", None), path, begin=not listed(Path(path)))
        start = 0 if shared else writer.done
        if shared and order is not None and (there := listed(Path(path))):
            known = range(there[0].first, there[0].last + 1)[:SAMPLES]
            first = data.collate_fn([data.dataset[i] for i in known])  # type: ignore[attr-defined]
            ask.again(path, inputs.asked(first, labels), known)

        def missing() -> Iterator[tuple[Batch, list[int]]]:
            """What is not stored yet, and its numbers."""
            seen = 0
            for item, named in zip(watched(loader, order), numbers, strict=False):
                batch = inputs.asked(item, labels)
                old = min(max(start - seen, 0), batch.samples)
                if old and not seen and order is not None:
                    ask.again(path, batch, range(old))
                if old < batch.samples:
                    rest = samples_of(batch, range(old, batch.samples)) if old else batch
                    yield rest, named or [*range(seen + old, seen + batch.samples)]
                seen += batch.samples
                bar.update(old)
            if seen < (start or not shared):  # an empty one, too
                wanted = f"the {start} stored, and more"
                raise ValueError(f"loader: got {seen} samples, expected {wanted}")

        told = expected(missing(), lambda x: source.expect(x[0]), source.ahead_by or 0)
        for batch, own in told:
            output, lengths = ask(batch)
            writer.add_batch(output, lengths=lengths, samples=own)
            bar.update(batch.samples)
    return writer.done


def share(
    path: Any, total: int, *, rank: int, world_size: int, samples: range | None = None
) -> list[range]:
    """What a rank has to write to `path`, in ranges: of its n-th of all, or of `samples`."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of {world_size} ranks, expected 0 to {world_size - 1}")
    mine = samples or range(rank * total // world_size, (rank + 1) * total // world_size)
    return inputs.left(total, [(x.first, x.last) for x in listed(Path(path))], mine)


def _head(teacher: Any, options: dict[str, Any]) -> Head | None:
    """A causal language model's head, of a function None; says in `options` what is stored."""
    if options.setdefault("method", "hidden") != "hidden":
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

    def __init__(self, source: Teacher, writer: Writer, generator: Any, head: Head | None) -> None:
        self._source, self._writer, self._head, spec = source, writer, head, writer.spec
        self._made = {"method": spec.method, "generator": generator, "vocab_size": spec.vocab_size}
        self._made |= {"temperature": spec.temperature, "tail": spec.tail}
        self._device = device_of(source.models[0]) if source.models else None

    def __call__(self, batch: Batch, **other: Any) -> tuple[Any, Tensor | None]:
        """Outputs of a batch, and how many rows each sample has."""
        spec, own, hidden = self._writer.spec, batch.labels, self._writer.spec.method == "hidden"
        batch = batch if self._device is None else moved(batch, self._device)
        if self._head is None:
            logits = self._source(batch).logits
        else:
            ids, model = batch.inputs, self._source.models[0]
            named = ids if isinstance(ids, Mapping) else {"input_ids": ids}
            logits = linear_logits(model, {**named, **uncached(model)}, self._head)[0]
        kinds: Any = fastkd.LinearLogits if hidden else Tensor
        kinds = (Tensor, fastkd.LinearLogits, fastkd.TopK) if spec.k else kinds
        if not isinstance(logits, kinds):
            more = ", LinearLogits or TopK" if spec.k else ", as k is None"
            names = NO_HEAD if hidden else f"a tensor of logits{more}"
            raise TypeError(f"teacher: got {type(logits).__name__}, expected {names}")
        lead = list(logits.shape[:-1])
        good = len(lead) in (1, 2) and lead[0] == batch.samples
        if not (good if own is None else lead == list(own.shape)):
            wanted = f"[{batch.samples}, ..., V]" if own is None else f"{[*own.shape]} and V"
            raise ValueError(f"teacher: got logits {list(logits.shape)}, expected {wanted}")
        self.dtype = logits.dtype
        if spec.k is None and not hidden:
            logits = logits[..., : spec.vocab_size]
        elif spec.k and not isinstance(logits, fastkd.TopK):
            logits = fastkd.topk_from_logits(logits, spec.k, **(self._made | other))
        return inputs.trimmed(logits, batch)

    def again(self, path: Any, batch: Batch, numbers: Sequence[int]) -> None:
        """Ask for some samples that are stored, and compare."""
        numbers, spec = numbers[:SAMPLES], self._writer.spec
        draws = spec.k if spec.k and spec.method == "sample" else 0
        if draws > spec.vocab_size:
            return  # more draws than there are columns to compare them with
        output, lengths = self(samples_of(batch, range(len(numbers))), method="top")
        reader = Reader(path)
        old = reader.__getitems__(numbers)
        if lengths is not None and (got := [x.size(0) for x in old]) != lengths.tolist():
            raise ValueError(
                f"loader: got samples of {lengths.tolist()} rows, expected the {got} stored in "
                f"{str(path)[:150]}: other data or labels"
            )
        # as it would be read: what the encoding takes away is the same on both sides
        new = output if draws else reader.decode(self._writer.table(output, lengths))
        slack = SLACK if self.dtype in (torch.float32, torch.float64) else SLACK_16
        for one, other in zip(old, [new[i] for i in range(len(old))], strict=True):
            if (nats := apart(one, other, draws=draws)) > slack:
                raise ValueError(
                    f"teacher: got outputs {nats:.3g} nats off what is stored of the same samples "
                    f"in {str(path)[:150]}, expected the same teacher and the same data in the "
                    "same order to go on with; write another's outputs to a folder of their own "
                    "(model= and data= name whose they are)"
                )
