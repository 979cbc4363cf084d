"""Can what an index says be so? Looked at before anything of the sizes it names is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST = 2**60  # of numbers, sizes and steps: sums of two stay in 64 bits
LEAST_BYTES = 16  # of a shard for each sample: its number, and where its rows end
LOOKED_UP = 2**16  # samples: a shard that names more must be there, as large as it says
TEXT = 2**12  # characters of a name
STATED = ("bucket", "renormalize", "restrict", "drop")


def _whole(x: Any, low: int, high: int) -> bool:
    return type(x) is int and low <= x <= high


def _quoted(x: Any) -> str:
    if type(x) in (int, float, bool, type(None)):
        return f"{x!r:.60}" if type(x) is not int or abs(x) < 2**200 else "a huge integer"
    return f"{type(x).__name__} {x!r:.60}" if isinstance(x, str) else type(x).__name__


def spec_fault(spec: Any) -> str | None:
    """What of a `CacheSpec` cannot be so, as "name: got this, expected that"."""
    known = 2**31
    wanted: dict[str, tuple[bool, str]] = {
        name: (type(x := getattr(spec, name)) is str and len(x) <= TEXT, "a short text")
        for name in ("model", "tokenizer", "data", "encoding", "method")
    }
    wanted["vocab_size"] = (_whole(spec.vocab_size, 1, known - 1), "1 to 2**31 - 1")
    wanted["k"] = (spec.k is None or _whole(spec.k, 1, known - 1), "1 to 2**31 - 1, or null")
    heat = type(spec.temperature) in (int, float) and 1e-18 <= spec.temperature <= 1e18
    wanted["temperature"] = (heat, "a positive finite number")
    of_k = ("uint8", "float16", "counts") if spec.k is not None else ("float32",)
    of_logits = () if spec.k is not None else ("bfloat16", "float16")
    encodings = (*of_k, *of_logits)
    good = type(spec.encoding) is str and spec.encoding in encodings
    wanted["encoding"] = (good, f"one of {', '.join(encodings)}")
    methods = ("logits",) if spec.k is None else ("top", "sample")
    good = type(spec.method) is str and spec.method in methods
    wanted["method"] = (good, f"one of {', '.join(methods)}")
    tails: tuple[Any, ...] = (None,) if spec.k is None else STATED
    good = type(spec.tail) in (str, type(None)) and spec.tail in tails
    wanted["tail"] = (good, f"one of {', '.join(map(str, tails))}")
    for name, low, high in (("ranks", 1, known), ("total", 0, MOST)):
        x = getattr(spec, name)
        wanted[name] = (x is None or _whole(x, low, high), f"{low} to {high}, or null")
    for name in ("sequences", "measured"):
        wanted[name] = (type(getattr(spec, name)) in (bool, type(None)), "true, false or null")
    for name, (sound, expected) in wanted.items():
        if not sound:
            return f"{name}: got {_quoted(getattr(spec, name))}, expected {expected}"
    return None


def shard_fault(shard: Any, row_bytes: int) -> str | None:
    """What of a `Shard` cannot be so.

    Args:
        shard: a `Shard`.
        row_bytes: what each row of the cache takes of a shard.
    """
    for name, low in (("bytes", 1), ("samples", 1), ("tokens", 0), ("first", 0), ("last", 0)):
        if not _whole(getattr(shard, name), low, MOST):
            got = _quoted(getattr(shard, name))
            return f"{name}: got {got}, expected an integer from {low} to 2**60"
    if not _whole(shard.step, 0, MOST):
        return f"step: got {_quoted(shard.step)}, expected an integer from 0 to 2**60"
    digest = shard.sha256
    if type(digest) is not str or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        return f"sha256: got {_quoted(digest)}, expected 64 hexadecimal digits"
    needs = shard.samples * LEAST_BYTES + shard.tokens * row_bytes
    if needs > shard.bytes:
        what = f"{shard.samples} samples and {shard.tokens} tokens in {shard.bytes} bytes"
        return f"samples: got {what}, expected {needs} bytes at least"
    between = shard.last - shard.first
    steps = shard.samples - 1
    if (shard.step and between != steps * shard.step) or between < steps:
        what = f"{shard.samples} of step {shard.step} from {shard.first} to {shard.last}"
        return f"samples: got {what}, expected as many as lie there"
    return None


def size_faults(folder: Path, shards: Iterator[Any]) -> Iterator[str]:
    """Shards of so many samples that their files must be looked at first."""
    for shard in shards:
        if shard.samples > LOOKED_UP:
            file = folder / shard.file
            size = file.stat().st_size if file.exists() else 0
            if size != shard.bytes:
                got = f"{size} bytes" if size else "no such file"
                yield f"{file}: got {got}, expected the {shard.bytes} bytes written"
