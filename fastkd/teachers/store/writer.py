"""Writing a teacher's outputs: checked, encoded, and put away a shard at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.arguments.messages import MadeOf, shown
from fastkd.arguments.numbers import integer
from fastkd.distill.batch import in_rows
from fastkd.teachers.files import CacheError, locked, write_whole
from fastkd.teachers.heads import head_facts
from fastkd.teachers.same import tokenizer_name

from . import format as fmt
from .codec import LOGITS, encode, encode_numbers, encode_tail, pack
from .format import CacheSpec, Shard


class Writer(MadeOf, AbstractContextManager["Writer"]):
    """Writes a teacher's outputs to a folder, a shard at a time; a context manager.

    A kill loses at most the samples since the last shard; one opened there again goes on behind it.

    Args:
        path: the cache's folder; made if it is not there.
        vocab_size: V, columns of the teacher's logits.
        k: columns or draws kept of each row, K of the `TopK`s to come; None: all logits.
        model, tokenizer, data: names for a reader to ask for; or a tokenizer with get_vocab().
        method: how the K were chosen, "top" or "sample"; "hidden": hidden states and the head of
            the `LinearLogits`s to come, no K.
        temperature, tail: those of the `TopK`s to come.
        encoding: see `fastkd.teachers.store`; of logits a dtype's name, of hidden states that or
            "int8". None: by k and method, and of hidden states the head's own dtype.
        rank: this writer among others; those beside rank 0 give their samples' numbers.
        total: samples of the whole cache, where it is known.
        shard_bytes: a shard is put away when it has this many bytes.

    Raises:
        CacheError: the folder's cache is damaged, or another one than this.
        BlockingIOError: another writer of this rank lives (as far as the system's locks tell).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        k: int | None = None,
        model: str = "",
        tokenizer: Any = "",
        data: str = "",
        method: str = "top",
        temperature: float = 1.0,
        tail: str = "bucket",
        encoding: str | None = None,
        rank: int = 0,
        total: int | None = None,
        shard_bytes: int = 2**25,
    ) -> None:
        kind: Any = (method, temperature, tail, encoding, total)
        spec = CacheSpec(model, tokenizer_name(tokenizer), data, vocab_size, k, *kind)
        self.spec = spec.checked()
        for name, number, low in (("rank", rank, 0), ("shard_bytes", shard_bytes, 1)):
            if integer(number) is None or not low <= number < 2**31:
                raise ValueError(f"{name}: got {shown(number)}, expected {low} to {2**31 - 1}")
        fmt.needed("pyarrow")  # said now, and not when the first shard is written
        self.path, self._shard_bytes, self._rank = Path(path), shard_bytes, rank
        self.path.mkdir(parents=True, exist_ok=True)
        self._process, self._pieces = os.getpid(), list[dict[str, Tensor]]()
        self._counts, self._size, self._first = list[int](), 0, 0
        self._seen: Any = None  # of the head that was given last
        self._release = locked(self.path.resolve() / f".lock-{rank:05d}")
        try:
            for file in self.path.glob(f".teacher-{rank:05d}-*.tmp"):
                file.unlink()
            there = fmt.listed(self.path)
            for shard in there[:1]:  # says whether this is the same cache
                own = fmt.opened(shard.file)[0]
                if difference := own.other(self.spec):
                    raise CacheError(f"{shard.file}: another cache is there; {difference}")
                self.spec = own
        except BaseException:
            self._release()
            raise
        self.shards = [shard for shard in there if shard.rank == rank]
        self._open = True

    @property
    def done(self) -> int:
        """Samples of this rank in whole shards: where a writer that starts again goes on."""
        return sum(shard.last + 1 - shard.first for shard in self.shards)

    def add(self, output: Any, *, sample: int | None = None) -> None:
        """Add one sample: a `TopK` [L, K] or [K], or logits [L, V] or [V]; see `add_batch`."""
        one = in_rows(output, lambda x: x[None])
        self.add_batch(one, samples=None if sample is None else [sample])

    def add_batch(
        self, outputs: Any, *, lengths: Any = None, samples: list[int] | None = None
    ) -> None:
        """Add samples of a batch; nothing of it is added if anything is wrong with it.

        Args:
            outputs: a `TopK` [B, L, K] or [B, K], logits [B, L, V] or [B, V], or `LinearLogits` of
                those shapes where hidden states are stored; on any device.
            lengths: B numbers of rows from 0 to L, those that a sample has; None: all L.
            samples: B numbers of samples, rising by 1; None: the next in turn.

        Raises:
            TypeError, ValueError: outputs that are not the cache's or hold NaN, a mass above 1, an
                index twice, ... Names the sample and the row. OSError: see `flush`.
        """
        self._alive()
        made = self._encoded(outputs, lengths, lambda size: self._number(samples, size))
        spec, piece, counts, first = made
        if not counts:
            return
        if self._counts and first != self._first + len(self._counts):
            self.flush()  # what others have lies between
        self._first, self.spec = (self._first if self._counts else first), spec
        self._pieces.append(piece)
        self._counts += counts
        self._size += sum(x.numel() * x.element_size() for x in piece.values()) + 16 * len(counts)
        if self._size >= self._shard_bytes:
            self.flush()

    def table(self, outputs: Any, lengths: Any = None) -> Any:
        """The pyarrow Table that `add_batch` would write."""
        spec, piece, counts, _ = self._encoded(outputs, lengths, lambda _: 0)
        data = fmt.shard_bytes(spec, piece, 0, counts)
        return fmt.needed("pyarrow.ipc").open_stream(data).read_all()

    def _encoded(
        self, outputs: Any, lengths: Any, number: Callable[[int], int]
    ) -> tuple[CacheSpec, dict[str, Tensor], list[int], int]:
        """Checked and encoded: the spec, the columns, rows of each sample, the first's number."""
        spec, hidden = self.spec, self.spec.method == "hidden"
        kind: Any = fastkd.TopK if spec.k else fastkd.LinearLogits if hidden else Tensor
        if not isinstance(outputs, kind):
            expected = f"{kind.__name__} of {spec.k or 'all'} columns"
            raise TypeError(f"outputs: got {type(outputs).__name__}, expected {expected}")
        if hidden:
            spec, outputs = self._with_head(outputs), outputs.hidden
        many, size = outputs.dim() == 3, outputs.size(0)
        if spec.sequences is None:
            measured = getattr(outputs, "tail_logprob", None) is not None
            spec = replace(spec, sequences=many, measured=measured)
        if outputs.dim() != 2 + bool(spec.sequences) or not (many or lengths is None):
            wanted = "[B, L, ...]" if spec.sequences else "[B, ...], without lengths"
            raise ValueError(f"outputs: got {list(outputs.shape)}, expected {wanted} as before")
        longest = outputs.size(1) if many else 1
        counts = torch.as_tensor([longest] * size if lengths is None else lengths).cpu().long()
        if counts.shape != (size,) or bool(((counts < 0) | (counts > longest)).any()):
            raise ValueError(f"lengths: got {shown(lengths)}, expected {size}, from 0 to {longest}")
        first = number(size)
        keep = torch.arange(longest) < counts[:, None]
        rows = topk_rows if spec.k else number_rows
        piece = rows(outputs if many else outputs[:, None], keep, spec, _where(first, keep))
        return spec, piece, counts.tolist(), first

    def _with_head(self, given: fastkd.LinearLogits) -> CacheSpec:
        """The spec with the head, written where there is none; CacheError: another is there."""
        seen = (given.weight.data_ptr(), given.weight.shape, given.head.scale, given.head.softcap)
        if self.spec.head is not None and seen == self._seen:
            return self.spec
        facts, data = head_facts(given, self.spec.vocab_size)
        if self.spec.head is None:
            file = self.path / f"head-{facts['sha256']}.safetensors"
            if not file.exists():
                write_whole(file, data)
            exact = facts["dtype"] if facts["dtype"] in LOGITS else "float32"
            self.spec = replace(self.spec, head=facts, encoding=self.spec.encoding or exact)
        elif wrong := [name for name, new in facts.items() if new != self.spec.head[name]]:
            raise CacheError(
                f"{str(self.path)[:200]}: another head is there, or it was changed since: got "
                f"another {wrong[0]}, expected {self.spec.head[wrong[0]]}"
            )
        self._seen = seen
        return self.spec

    def _number(self, samples: list[int] | None, size: int) -> int:
        """The first sample's number of a batch, of which this rank has none."""
        mine = [(shard.first, shard.last) for shard in self.shards]
        mine += [(self._first, self._first + len(self._counts) - 1)] if self._counts else []
        if samples is None:
            if self._rank:
                raise ValueError(f"samples: got None of rank {self._rank}, expected numbers")
            return max((last + 1 for _, last in mine), default=0)
        first, stop = min(samples, default=0), self.spec.total or 2**40
        if list(samples) != list(range(first, first + size)) or not 0 <= first <= stop - size:
            got = f"{shown(samples)} for {size} samples"
            raise ValueError(f"samples: got {got}, expected as many, rising by 1, below {stop}")
        if any(one < first + size and first <= other for one, other in mine):
            got = f"{first} to {first + size - 1}"
            raise ValueError(f"samples: got {got}, expected none of those which this rank has")
        return first

    def flush(self) -> None:
        """Put away what was added as a shard, however small; nothing if there is nothing.

        OSError names the file; what was added is kept here for another `flush`.
        """
        self._alive()
        if not self._counts:
            return
        stored = {name: torch.cat([x[name] for x in self._pieces]) for name in self._pieces[0]}
        data = fmt.shard_bytes(self.spec, stored, self._first, self._counts)
        last, digest = self._first + len(self._counts) - 1, hashlib.sha256(data).hexdigest()
        file = self.path / fmt.shard_name(self._rank, self._first, last, digest)
        write_whole(file, data)
        self.shards.append(Shard(self._first, last, self._rank, digest, file))
        self._pieces, self._counts, self._size = [], [], 0

    def close(self) -> None:
        """`flush`, name all shards in `state.json`, and let others write to this rank."""
        self.__exit__(None, None, None)

    def _alive(self) -> None:
        if not self._open or os.getpid() != self._process:
            raise ValueError(f"{self.path}: the writer is closed, or of another process")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._open:
            return
        try:
            if not isinstance(error, OSError):  # interrupted: what was added is sound
                self.flush()
            if error is None and self.shards:
                fmt.merge(self.path)
        finally:
            self._open = False
            self._release()


def _where(first: int, keep: Tensor) -> Any:
    """A check that names the first row that is wrong, by its sample and place."""

    def check(wrong: Tensor, values: Tensor, name: str, expected: str) -> None:
        for place in wrong.nonzero()[:1]:
            sample, row = keep.nonzero()[int(place[0])].tolist()
            got = f"{values[tuple(place)].item():g} in row {row} of sample {first + sample}"
            raise ValueError(f"{name}: got {got}, expected {expected}")

    return check


def topk_rows(outputs: Any, keep: Tensor, spec: CacheSpec, check: Any) -> dict[str, Tensor]:
    """Rows of a `TopK` [B, L, K] for a shard."""
    measured, vocab = outputs.tail_logprob is not None, spec.vocab_size
    kind = (outputs.size(-1), outputs.temperature, outputs.tail, measured)
    wanted = (spec.k, spec.temperature, spec.tail, spec.measured)
    if kind != wanted:
        names = "(K, temperature, tail, with tail_logprob)"
        raise ValueError(f"outputs: got {names} = {kind}, expected {wanted} as before")
    indices = outputs.indices.detach().cpu()[keep].long()
    logprobs = outputs.logprobs.detach().cpu()[keep].double()
    indices = indices.masked_fill(logprobs == -torch.inf, -1)  # absent, as for the losses
    named = indices >= 0
    check((indices < -1) | (indices >= vocab), indices, "indices", f"-1 to {vocab - 1}")
    order = indices.sort(-1).values
    again = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
    check(again, order, "indices", "each column once, -1 for padding")
    check(named & ~(logprobs <= 0.0), logprobs, "logprobs", "a log-probability, at most 0")
    mass = logprobs = torch.where(named, logprobs, -torch.inf)
    packed = indices.int() if spec.encoding == "plain" else pack(indices, vocab)
    made = {"indices": packed, **encode(logprobs, spec.encoding)}
    if outputs.tail_logprob is not None:
        tail = outputs.tail_logprob.detach().cpu()[keep].double()
        check(~(tail <= 0.0), tail, "tail_logprob", "a log-probability, at most 0")
        made["tail_logprob"] = encode_tail(tail, spec.encoding)
        mass = torch.cat((logprobs, tail.unsqueeze(-1)), -1) if spec.tail == "bucket" else mass
    if spec.tail in ("bucket", "drop"):  # the others divide by the mass, whatever it is
        total = mass.exp().sum(-1)
        check(total > fastkd.TopK.most_mass(mass), total, "mass", "at most 1 but for rounding")
    return made


def number_rows(outputs: Any, keep: Tensor, spec: CacheSpec, check: Any) -> dict[str, Tensor]:
    """Rows of logits [B, L, V] or of hidden states [B, L, H] for a shard."""
    hidden = spec.head is not None
    if not hidden and (outputs.size(-1) != spec.vocab_size or not outputs.is_floating_point()):
        got = f"{list(outputs.shape)} of {outputs.dtype}"
        raise ValueError(f"outputs: got {got}, expected floats [..., {spec.vocab_size}]")
    given, name = outputs.detach().cpu()[keep], "hidden" if hidden else "logits"
    wrong = ~given.isfinite() if hidden else given.isnan() | (given == torch.inf)
    check(wrong, given, name, "a finite number" if hidden else "a number or -inf")
    made = encode_numbers(given, spec.encoding, name)
    what = f"what {spec.encoding} holds; encoding='float32' holds more"
    check(made[name].isinf() & ~given.isinf(), given, name, what)
    return made
