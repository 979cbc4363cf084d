"""Logits of hidden states whose head stays on disk, until somebody asks for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

import fastkd
from fastkd.arguments.messages import shown
from fastkd.distill import serialization
from fastkd.teachers.files import CacheError, fault

USER = "a store of hidden states"
ROWS = 4096  # of a head that are made float64 at a time
_heads: WeakValueDictionary[Path, StoredHead] = WeakValueDictionary()  # of this process


class StoredHead:
    """A store's head: read, and compared with its hash, once a process; copied once a device."""

    def __init__(self, file: Path, vocab_size: int, facts: dict[str, Any]) -> None:
        self.file, self.vocab_size, self.facts = file, vocab_size, facts
        self._on: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def fault(self) -> str | None:
        """What is wrong with the file."""
        return fault(self.file, self.facts["sha256"])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Weight and bias there; CacheError: not as they were written."""
        if not self._on:
            if wrong := self.fault():
                raise CacheError(wrong)
            tensors = serialization.read(self.file, USER)[0]
            self._on[torch.device("cpu")] = tensors["weight"], tensors.get("bias")
        if device not in self._on:
            weight, bias = self._on[torch.device("cpu")]
            self._on[device] = weight.to(device), None if bias is None else bias.to(device)
        return self._on[device]

    def __reduce__(self) -> tuple[Any, ...]:
        return head_in, (self.file.parent, self.vocab_size, self.facts)


def head_in(folder: Path, vocab_size: int, facts: dict[str, Any]) -> StoredHead:
    """The one of this process, whoever asks for it: a batch of a worker, too.

    Args:
        facts: sha256, scale, softcap and dtype of a head.
    """
    file = (folder / f"head-{facts['sha256']}.safetensors").resolve()
    return _heads.get(file) or _heads.setdefault(file, StoredHead(file, vocab_size, facts))


def head_facts(given: fastkd.LinearLogits, vocab_size: int) -> tuple[dict[str, Any], bytes]:
    """What a store says of a head of V columns, and the head's file.

    row_norm = |scale| max_v sum_i |w_vi|

    Raises:
        ValueError: fewer columns, NaN or infinity.
    """
    if given.size(-1) < vocab_size:
        got = f"got {vocab_size}, expected at most the head's {given.size(-1)}"
        raise ValueError(f"vocab_size: {got}")
    tensors = {"weight": given.weight, **({} if given.bias is None else {"bias": given.bias})}
    tensors = {name: x[:vocab_size].detach().cpu().contiguous() for name, x in tensors.items()}
    data = serialization.needed("safetensors.torch", USER).save(tensors)
    sums = [x.double().abs().sum(-1).amax() for x in tensors["weight"].split(ROWS)]
    facts: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest()}
    facts |= {"hidden_size": given.weight.size(1), "dtype": str(given.weight.dtype)[6:]}
    facts |= {"scale": given.head.scale, "softcap": given.head.softcap}
    facts["row_norm"] = norm = abs(given.head.scale) * float(torch.stack(sums).amax())
    if not norm < float("inf"):
        raise ValueError(f"head: got weights whose largest row sums up to {norm}, expected numbers")
    return facts, data


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
        return torch.Size((*self.hidden.shape[:-1], self.stored.vocab_size))

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
