"""A teacher's last hidden states, and its head, which is stored once: logits that nobody built.

    head-SHA256.safetensors    weight [V, H] and, where there is one, bias [V]

The hash, scale, softcap and `row_norm` of the head are in every shard's schema. The logits of what
was read are those of the teacher, but for the products' own rounding, within

    row_norm * (step * max |hidden| of the row + floor),   row_norm = |scale| max_v sum_i |w_vi|

with step and floor of the encoding (`codec.hidden_step`): 0 where it is the teacher's own dtype. A
softcap takes nothing away from that. A log-probability at T is within 2 / T of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

import fastkd
from fastkd.arguments.messages import shown
from fastkd.distill import serialization

from . import format as fmt
from .codec import LOGITS, encode_hidden, hidden_step
from .format import CacheError, CacheSpec

USER = "a store of hidden states"
ROWS = 4096  # of a head that are made float64 at a time
_heads: WeakValueDictionary[Path, StoredHead] = WeakValueDictionary()  # of this process


class StoredHead:
    """A store's head: read, and compared with its hash, once a process; copied once a device."""

    def __init__(self, file: Path, spec: CacheSpec) -> None:
        assert spec.head is not None
        self.file, self.spec, self.facts = file, spec, spec.head
        self._on: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def fault(self) -> str | None:
        """What is wrong with the file."""
        digest = hashlib.sha256()
        try:
            with self.file.open("rb") as file:
                while piece := file.read(2**22):
                    digest.update(piece)
        except OSError as error:
            return f"{self.file}: cannot be read ({error.strerror})"
        same = digest.hexdigest() == self.facts["sha256"]
        return None if same else f"{self.file}: altered after it was written (its hash differs)"

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Weight and bias there; CacheError: not as they were written."""
        if not self._on:
            if fault := self.fault():
                raise CacheError(fault)
            tensors = serialization.read(self.file, USER)[0]
            self._on[torch.device("cpu")] = tensors["weight"], tensors.get("bias")
        if device not in self._on:
            weight, bias = self._on[torch.device("cpu")]
            self._on[device] = weight.to(device), None if bias is None else bias.to(device)
        return self._on[device]

    def __reduce__(self) -> tuple[Any, ...]:
        return head_in, (self.file.parent, self.spec)


def head_in(folder: Path, spec: CacheSpec) -> StoredHead:
    """The one of this process, whoever asks for it: a batch of a worker, too."""
    assert spec.head is not None
    file = (folder / f"head-{spec.head['sha256']}.safetensors").resolve()
    found = _heads.get(file)
    if found is None:
        found = _heads[file] = StoredHead(file, spec)
    return found


class StoredLogits(fastkd.LinearLogits):
    """A `fastkd.LinearLogits` of stored hidden states, whose head stays where it is.

    What goes from a worker to the loop, or to another device, are hidden states alone: the head is
    read in the process that asks for logits, once, and once copied to each device.

    Args:
        hidden: [..., H], in the head's dtype.
        stored: the store's head.
    """

    def __init__(self, hidden: Tensor, stored: StoredHead) -> None:
        self.hidden, self.stored = hidden, stored
        self.chunk_size, self.pack = None, False
        self._made: fastkd.LinearLogits | None = None

    @property
    def _whole(self) -> fastkd.LinearLogits:
        if self._made is None:
            of = {name: self.stored.facts[name] for name in ("scale", "softcap")}
            self._made = fastkd.LinearLogits(self.hidden, *self.stored.on(self.device), **of)
        return self._made

    weight = property(lambda self: self._whole.weight)
    bias = property(lambda self: self._whole.bias)
    head = property(lambda self: self._whole.head)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.stored.spec.vocab_size))

    def with_hidden(self, hidden: Tensor) -> StoredLogits:
        return StoredLogits(hidden, self.stored)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> StoredLogits:
        """The same with its hidden states changed, for `distill.batch.mapped`."""
        return self.with_hidden(change(self.hidden))

    def to(self, *args: Any, **kwargs: Any) -> StoredLogits:
        """The same on another device, as `Tensor.to(device, non_blocking=...)`."""
        return self.map_tensors(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> StoredLogits:
        """The same in pinned memory, which a DataLoader asks for."""
        return self.map_tensors(lambda x: x.pin_memory())

    def detach(self) -> StoredLogits:
        return self

    def __getitem__(self, at: Any) -> StoredLogits:
        """The rows hidden[at]; H stays as it is."""
        taken = self.map_tensors(lambda x: x[at])
        if not taken.hidden.dim() or taken.hidden.size(-1) != self.hidden.size(-1):
            raise IndexError(f"got {shown(at)}, expected an index of {[*self.shape[:-1]]} rows")
        return taken

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredLogits, (self.hidden, self.stored)


def with_head(
    folder: Path, spec: CacheSpec, given: fastkd.LinearLogits, known: Tensor | None
) -> CacheSpec:
    """The spec with the head of `given`, which is written if it is not there.

    Args:
        known: the head's weight of the last time, if there was one.

    Raises:
        CacheError: the store's head is another one.
        ValueError: a head of fewer columns, or one with NaN or infinity.
    """
    made, vocab = given.head, spec.vocab_size
    numbers = {"scale": made.scale, "softcap": made.softcap}
    same = known is not None and known.shape == given.weight.shape
    same = same and known.data_ptr() == given.weight.data_ptr()  # type: ignore[union-attr]
    if same and spec.head is not None and numbers.items() <= spec.head.items():
        return spec
    if given.size(-1) < vocab:
        raise ValueError(f"vocab_size: got {vocab}, expected at most the head's {given.size(-1)}")
    tensors = {"weight": given.weight[:vocab]}
    tensors |= {} if given.bias is None else {"bias": given.bias[:vocab]}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    if spec.head is not None:
        if differs := _differs(head_in(folder, spec), tensors, numbers):
            raise CacheError(
                f"{str(folder)[:200]}: another head is there, or it was changed since; {differs}"
            )
        return spec
    data = serialization.needed("safetensors.torch", USER).save(tensors)
    sums = [x.double().abs().sum(-1).amax() for x in tensors["weight"].split(ROWS)]
    size, dtype = given.weight.size(1), str(given.weight.dtype)[6:]
    facts: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "hidden_size": size}
    facts |= {"dtype": dtype, **numbers}
    facts["row_norm"] = norm = abs(made.scale) * float(torch.stack(sums).amax())
    if not norm < float("inf"):
        raise ValueError(f"head: got weights whose largest row sums up to {norm}, expected numbers")
    exact = dtype if dtype in LOGITS else "float32"
    file = folder / f"head-{facts['sha256']}.safetensors"
    if not file.exists():
        fmt.write_whole(file, data)
    return replace(spec, head=facts, encoding=spec.encoding or exact)


def _differs(stored: StoredHead, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> str | None:
    """The first difference of a head from the stored one, as "name: got this, expected that"."""
    for name, value in numbers.items():
        if value != stored.facts[name]:
            return f"{name}: got {value}, expected {stored.facts[name]}"
    there = dict(zip(("weight", "bias"), stored.on(torch.device("cpu")), strict=True))
    for name, old in there.items():
        new = tensors.get(name)
        kinds = [None if x is None else (x.dtype, list(x.shape)) for x in (new, old)]
        if kinds[0] != kinds[1]:
            return f"{name}: got {kinds[0]}, expected {kinds[1]}"
        if new is not None and old is not None and not torch.equal(new, old):
            return f"{name}: got {int((new != old).sum())} other numbers than there, expected none"
    return None


def hidden_rows(hidden: Tensor, keep: Tensor, spec: CacheSpec, check: Any) -> dict[str, Tensor]:
    """Rows of hidden states [B, L, H] for a shard."""
    given = hidden.detach().cpu()[keep]
    check(~given.isfinite(), given, "hidden", "a finite number")
    made = encode_hidden(given, spec.encoding)
    what = f"what {spec.encoding} holds; encoding='float32' holds more"
    check(made["hidden"].isinf(), given, "hidden", what)
    return made


def logit_bound(spec: CacheSpec, hidden: Tensor) -> Tensor:
    """The largest error [...] of a logit of rows hidden [..., H] in a store of this spec.

        row_norm * (step * max |hidden| + floor)

    The products' own rounding, here and in the teacher, comes on top.
    """
    assert spec.head is not None
    step, floor = hidden_step(spec.encoding, spec.head["dtype"])
    most = hidden.detach().double().abs().amax(-1)
    return spec.head["row_norm"] * (step * most + floor)
