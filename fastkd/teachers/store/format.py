"""A cache's folder: its files, their names, and how each appears whole or not at all.

    index-RRRRR.json                what rank R has written: the teacher, its shards, their hashes
    teacher-RRRRR/NNNNNN.safetensors  shard N of rank R; a cache of one rank has no such folders:
    teacher-RRRRR-NNNNNN.safetensors  shard N of rank R there, and in version 1
    index.safetensors               all indexes in columns, where they were merged (`merged_index`)
    .lock-RRRRR                     empty; locked while a writer of rank R lives
    .job-RRRRR, .failed             of ranks that capture as a group (`rank_watch`)

No rank writes another's files: a cache is the union of its indexes, merged or not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastkd.arguments.messages import shown

from .atomic_io import write_whole
from .codec import LOGITS, MOST_DRAWS, bound_facts, index_bits
from .limits import shard_fault, size_faults, spec_fault

FORMAT, VERSION = "fastkd teacher cache", 2
READABLE = (1, VERSION)
INDEXES = "index-*.json"
METHODS, TAILS = ("top", "sample"), ("bucket", "renormalize", "restrict", "drop")
Spelled = dict[str, tuple[str, tuple[int, ...]]]  # of tensors: dtype in safetensors' words, shape


class CacheError(ValueError):
    """A cache that is damaged, of another version, or made for something else; names the file."""


@dataclass(frozen=True)
class CacheSpec:
    """What a cache holds: equal in all of its indexes."""

    model: str
    tokenizer: str
    data: str
    vocab_size: int
    k: int | None  # None: all logits
    method: str
    temperature: float
    tail: str | None
    encoding: str
    ranks: int | None  # None: any number, each sample of `total` by whoever has it to do
    sequences: bool | None = None  # a sample has rows [L, ...], not one; None before the first
    measured: bool | None = None  # with tail_logprob
    total: int | None = None  # samples of all ranks, where they share them

    def other(self, spec: CacheSpec) -> str | None:
        """The first difference, as "name: got this, expected that"; what is None is not known."""
        for name in (field.name for field in fields(self)):
            got, wanted = getattr(spec, name), getattr(self, name)
            unknown = name in ("sequences", "measured") and None in (got, wanted)
            if got != wanted and not unknown:
                return f"{name}: got {shown(got)}, expected {wanted!r}"
        return None

    @property
    def shapes(self) -> Spelled:
        """dtype, as safetensors spells it, and shape behind the first dimension of each tensor."""
        always: dict[str, tuple[str, tuple[int, ...]]] = {
            "ends": ("I64", ()),
            "samples": ("I64", ()),
        }
        if self.k is None:
            spelled = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[self.encoding]
            return {**always, "logits": (spelled, (self.vocab_size,))}
        size = -(-self.k * index_bits(self.vocab_size) // 8)
        of_gaps = "F16" if self.encoding == "float16" else "U8"
        return {
            **always,
            "indices": ("U8", (size,)),
            "logprobs": (of_gaps, (self.k,)),
            **({} if self.encoding == "counts" else {"level": ("F32", ())}),
            **({"tail_logprob": ("F16", ())} if self.measured else {}),
        }


@dataclass(frozen=True)
class Shard:
    """One file of a rank. Its samples are first, first + step, ...; step 0: as the file lists."""

    file: str
    samples: int
    tokens: int
    bytes: int
    sha256: str
    first: int
    last: int
    step: int


@dataclass
class Part:
    """An index: what one rank has written. complete: its writer was closed, and not stopped."""

    spec: CacheSpec
    rank: int
    shards: list[Shard]
    complete: bool = False
    size: int = 0  # bytes of its file, as it was read; they grow with each shard
    sha256: str = ""  # the same of its hash

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def document(self) -> dict[str, Any]:
        """An index, but for its hash."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "rank": self.rank,
            "complete": self.complete,
            "teacher": asdict(self.spec),
            "bound": bound_facts(self.spec.encoding, self.spec.k),
            "shards": [asdict(shard) for shard in self.shards],
        }


def settled(
    k: int | None, method: str, temperature: float, tail: str, encoding: str | None
) -> dict[str, Any]:
    """The fields of a `CacheSpec` that depend on each other, checked, defaults filled in."""
    if method not in METHODS:
        raise ValueError(f"method: got {shown(method)}, expected one of {', '.join(METHODS)}")
    if tail not in TAILS:
        raise ValueError(f"tail: got {shown(tail)}, expected one of {', '.join(TAILS)}")
    if not 1e-18 <= temperature <= 1e18:
        raise ValueError(
            f"temperature: got {shown(temperature)}, expected a positive finite number"
        )
    if k is None:
        if temperature != 1.0 or method != "top":
            got = f"temperature={temperature:g}, method={shown(method)}"
            raise ValueError(f"k: got None with {got}; all logits have no temperature or method")
        if encoding is None:
            encoding = "float32"
    elif encoding is None:
        encoding = "counts" if method == "sample" and k <= MOST_DRAWS else "uint8"
    known = tuple(LOGITS) if k is None else ("uint8", "float16", "counts")
    if encoding not in known:
        what = "of all logits" if k is None else "of log-probabilities"
        raise ValueError(
            f"encoding: got {shown(encoding)}, expected {what} one of {', '.join(known)}"
        )
    if encoding == "counts" and (method != "sample" or k is None or k > MOST_DRAWS):
        raise ValueError(
            f"encoding: got 'counts' with method={shown(method)}, k={k}, expected method='sample' "
            f"with k <= {MOST_DRAWS}"
        )
    of_logits = {"method": "logits", "tail": None}
    made = {"method": method, "temperature": temperature, "tail": tail, "encoding": encoding}
    return {**made, **of_logits} if k is None else made


def index_name(rank: int) -> str:
    return f"index-{rank:05d}.json"


def lock_name(rank: int) -> str:
    return f".lock-{rank:05d}"


def shard_name(rank: int, number: int | str, *, folder: bool) -> str:
    """A shard's file; in a folder of its rank, or beside those of all."""
    name = number if isinstance(number, str) else f"{number:06d}"
    return f"teacher-{rank:05d}{'/' if folder else '-'}{name}.safetensors"


def _text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def _signed(plain: bytes) -> tuple[bytes, str]:
    """An index's text with its own hash as the last entry, and the hash."""
    digest = hashlib.sha256(plain).hexdigest()
    return plain.removesuffix(b"\n}\n") + f',\n "sha256": "{digest}"\n}}\n'.encode(), digest


def save_part(folder: Path, part: Part) -> None:
    """Replace a rank's index by one with its own hash in it."""
    write_whole(folder / index_name(part.rank), _signed(_text(part.document()))[0])


def load_part(path: Path) -> Part:
    """Read an index, every byte of which must be as it was written.

    Raises:
        CacheError: another format or version, or an altered file.
    """
    data = path.read_bytes()
    try:
        document = json.loads(data)
        version = document["version"] if document["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(f"{path}: got no index of a teacher cache ({str(error)[:100]})") from None
    if version is None:
        raise CacheError(f"{path}: got format {document['format']!r:.60}, expected {FORMAT!r}")
    if type(version) is not int or version not in READABLE:
        raise CacheError(f"{path}: got a cache of version {version!r:.60}, expected {VERSION}")
    # its own bytes, not its fields written once more: of many ranks that took most of the time
    signed, digest = _signed(data[: data.rfind(b",\n")] + b"\n}\n")
    if signed != data:
        raise CacheError(f"{path}: the index was altered after it was written (its hash differs)")
    try:
        shards = [Shard(**shard) for shard in document["shards"]]
        spec, rank = CacheSpec(**document["teacher"]), document["rank"]
        part = Part(spec, rank, shards, document["complete"], len(data), digest)
    except (KeyError, TypeError) as error:
        why = str(error)[:100]
        raise CacheError(f"{path}: got fields that version {version} has not ({why})") from None
    if type(rank) is not int or not 0 <= rank < 2**31 or type(part.complete) is not bool:
        got = f"{type(rank).__name__} and {type(part.complete).__name__}"
        raise CacheError(
            f"{path}: rank, complete: got {got}, expected an integer and true or false"
        )
    if path.name != index_name(rank):
        raise CacheError(f"{path}: got the index of rank {rank}, expected {index_name(rank)!r}")
    for number, shard in enumerate(part.shards):  # a name leads nowhere else
        expected = [shard_name(rank, number, folder=folder) for folder in (False, True)]
        if shard.file not in expected:
            raise CacheError(f"{path}: got a shard {shard.file!r:.60}, expected {expected[0]!r}")
    check_parts(path, spec, part.shards)
    return part


def check_parts(path: Path, spec: CacheSpec, shards: Iterable[Shard]) -> None:
    """Raise CacheError for what cannot be so; nothing of the sizes named is made."""
    if fault := spec_fault(spec):
        raise CacheError(f"{path}: {fault}")
    sizes = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}
    row = sum(
        sizes[kind] * math.prod(shape)
        for name, (kind, shape) in spec.shapes.items()
        if name not in ("ends", "samples")
    )
    shards = list(shards)
    for number, shard in enumerate(shards):
        if fault := shard_fault(shard, row):
            raise CacheError(f"{path}: shard {number}: {fault}")
        if not spec.sequences and shard.tokens != shard.samples:
            got = f"{shard.tokens} tokens of {shard.samples} samples of one row each"
            raise CacheError(f"{path}: shard {number}: sequences: got {spec.sequences!r}, {got}")
    for fault in size_faults(path.parent, iter(shards)):
        raise CacheError(fault)


def tokenizer_name(tokenizer: Any) -> str:
    """A tokenizer's name in a cache: a string as it is; an object by its vocabulary's hash.

    Args:
        tokenizer: str, or an object with get_vocab() -> dict[str, int].
    """
    if isinstance(tokenizer, str):
        return tokenizer
    if not hasattr(tokenizer, "get_vocab"):
        got = type(tokenizer).__name__
        raise TypeError(f"tokenizer: got {got}, expected a name or an object with get_vocab()")
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return "sha256:" + hashlib.sha256(json.dumps(entries).encode()).hexdigest()
