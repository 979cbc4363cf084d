"""What a stored teacher is like at the size of a large run: 10^12 tokens from 1 024 ranks.

Bytes and files follow from the format alone. Times and memory are measured on the real indexes of
stores of --shards shards (their payload is not made: neither merging nor opening looks at it; the
tests hold that), a line through them is fitted by least squares, and what it gives at the full size
is marked as extrapolated. "unmerged" opens the ranks' JSON indexes, "merged" the one made of them.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.cli import positive
from bench.harness.family import Family, Input
from bench.harness.result import Group, Result, named
from bench.harness.timing import Say, summarise
from fastkd.teachers import store
from fastkd.teachers.store.format import CacheSpec, Part, Shard, index_name, save_part, shard_name
from fastkd.teachers.store.merged_index import MERGED

SIZES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}
BATCH = 8  # samples looked up at a time


def plan_of(a: argparse.Namespace, total: int) -> CacheSpec:
    """The identity of a cache of top-k rows."""
    return CacheSpec(
        model="teacher",
        tokenizer="sha256:" + "0" * 64,
        data="data",
        vocab_size=a.vocab,
        k=a.k,
        method="top",
        temperature=1.0,
        tail="bucket",
        encoding="uint8",
        ranks=None,
        sequences=True,
        measured=True,
        total=total,
    )


def row_bytes(plan: CacheSpec, length: int) -> float:
    """Bytes of a token, with its part of what a sample of `length` has."""
    sizes = {name: SIZES[kind] * math.prod(shape) for name, (kind, shape) in plan.shapes.items()}
    of_sample = sizes.pop("ends") + sizes.pop("samples")
    return sum(sizes.values()) + of_sample / length


def indexes(folder: Path, count: int, ranks: int, per_shard: int, a: Any) -> int:
    """Write the indexes of `count` shards; the number of samples they speak of."""
    plan = plan_of(a, count * per_shard)
    tokens = per_shard * a.length
    size = int(tokens * row_bytes(plan, a.length))
    number = 0
    for rank in range(ranks):
        shards = []
        for at in range((rank + 1) * count // ranks - rank * count // ranks):
            first, last = number * per_shard, (number + 1) * per_shard - 1
            file, digest = shard_name(rank, at, folder=True), f"{number:064x}"
            shards.append(Shard(file, per_shard, tokens, size, digest, first, last, 1))
            number += 1
        save_part(folder, Part(plan, rank, shards, complete=True))
    return count * per_shard


def _anonymous() -> int:
    """Bytes of memory that are this process's own; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _opened(folder: str, end: Any) -> None:
    torch.set_num_threads(1)
    store.Reader(folder)  # what it imports is not of the index
    before, start = _anonymous(), time.perf_counter()
    reader = store.Reader(folder)
    places = reader.check()
    elapsed, memory = time.perf_counter() - start, _anonymous() - before
    requested = torch.randint(len(reader), (BATCH,))
    places.find(requested)
    start = time.perf_counter()
    for _ in range(20):
        places.find(requested)
    end.send((elapsed, memory, (time.perf_counter() - start) / 20))


def opened(folder: Path) -> tuple[float, int, float]:
    """Seconds and bytes of a reader opened by a fresh process, seconds to find a batch."""
    known = multiprocessing.get_all_start_methods()
    # not a fork of this process, whose freed memory it would take first
    kind = "forkserver" if "forkserver" in known else "spawn"
    context: Any = multiprocessing.get_context(kind)
    context.set_forkserver_preload(["fastkd.distill"])
    end, other = context.Pipe(duplex=False)
    child = context.Process(target=_opened, args=(str(folder), other))
    child.start()
    other.close()
    try:
        found: tuple[float, int, float] = end.recv()
    finally:
        child.join()
    return found


def measured(count: int, per_shard: int, a: argparse.Namespace, say: Say) -> list[Result]:
    """One size of store, opened before and after its indexes are merged."""
    ranks = min(a.ranks, count)
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder = Path(name)
        indexes(folder, count, ranks, per_shard, a)
        size = sum((folder / index_name(rank)).stat().st_size for rank in range(ranks))
        found = []
        for provider in ("unmerged", "merged"):
            say(f"opening it {provider}")
            times: dict[str, float] = {}
            if provider == "merged":
                start = time.perf_counter()
                store.merge(folder)
                times["merge"] = time.perf_counter() - start
                size = (folder / MERGED).stat().st_size
            times["open"], memory, times["lookup"] = opened(folder)
            result = Result("index", "", f"{count} shards", "uint8", provider, ours=True)
            result.times = {what: summarise([1e3 * of]) for what, of in times.items()}
            result.figures = {"shards": count, "ranks": ranks, "index_bytes": size}
            result.figures["memory_bytes"] = memory
            found.append(result)
    return found


def fitted(groups: Sequence[Group], provider: str, what: str, shards: int) -> float:
    """A time in seconds or a figure at `shards` shards, by a line of least squares."""
    results = [one for group in groups if (one := named(group, provider))]
    xs = torch.tensor([one.figures["shards"] for one in results], dtype=torch.float64)
    ys = [1e-3 * x.times[what].median if what in x.times else x.figures[what] for x in results]
    sides = torch.stack([torch.ones_like(xs), xs], 1)
    fit = torch.linalg.lstsq(sides, torch.tensor(ys, dtype=torch.float64)[:, None]).solution
    return max(float(fit[0]) + float(fit[1]) * shards, 0.0)


class StoreScale(Family):
    name = "store-scale"
    about = "store-scale: the indexes of a store of 10^12 tokens, measured and extrapolated."
    cases = {"index": "opening, merging and looking up in the indexes of many shards"}
    times = ("merge", "lookup", "open")
    threads = 1
    key = "shape"
    legend = (
        '"memory" is what a fresh process takes to open the store, "lookup" the time of a batch.'
    )

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        whole = positive(int, "size")
        shards, mib = [1000, 10_000, 100_000], [32, 256]
        parser.add_argument(
            "--shards", type=whole, nargs="+", default=shards, help="sizes measured"
        )
        for name, size in (("ranks", 1024), ("tokens", 10**12), ("length", 2048)):
            parser.add_argument(f"--{name}", type=whole, default=size, help=f"(default: {size})")
        for name, size in (("vocab", 128_256), ("k", 32)):
            parser.add_argument(f"--{name}", type=whole, default=size, help=f"(default: {size})")
        parser.add_argument("--mib", type=whole, nargs="+", default=mib, help="MiB of a shard")
        told = "where stores are made (default: a temporary folder)"
        parser.add_argument("--folder", type=Path, help=told)

    def settle(self, parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
        a.shards = [20, 60] if a.toy else sorted(set(a.shards))
        if len(a.shards) < 2:
            parser.error(f"--shards: got {a.shards}, expected two sizes at least: for a line")

    def inputs(self, a: argparse.Namespace) -> Iterator[Input]:
        for count in a.shards:
            yield Input(f"{count} shards", torch.uint8, None, self.name)

    def measure(self, one: Input, a: argparse.Namespace, say: Say) -> list[Result]:
        per_shard = max(1, a.mib[-1] * 2**20 // (a.length * 100))
        return measured(int(one.case.split()[0]), per_shard, a, say)

    def counted(self, result: Result) -> dict[str, str]:
        names = {"index": "index_bytes", "memory": "memory_bytes"}
        cells = {name: f"{result.figures[of] / 1e6:.2f} MB" for name, of in names.items()}
        return {"ranks": str(result.figures["ranks"]), **cells}

    def extra(self, groups: Sequence[Group], a: argparse.Namespace) -> str:
        samples, lines = -(-a.tokens // a.length), []
        of_token = row_bytes(plan_of(a, samples), a.length)
        for mib in a.mib:
            shards = max(a.ranks, -(-int(a.tokens * of_token) // (mib * 2**20)))
            lines += [
                f"{a.tokens:.3g} tokens, {a.ranks} ranks, shards of {mib} MiB, by the format: "
                f"{of_token:.1f} bytes a token, {a.tokens * of_token / 1e12:.1f} TB, {shards} "
                f"shards, {-(-shards // a.ranks)} in a rank's folder",
                f"  extrapolated: merged in {fitted(groups, 'merged', 'merge', shards):.1f} s",
            ]
            for who in ("unmerged", "merged"):
                names = ("index_bytes", "memory_bytes", "open")
                index, memory, opening = (fitted(groups, who, name, shards) for name in names)
                lines.append(
                    f"  extrapolated, {who}: indexes of {index / 1e6:.0f} MB, opened in "
                    f"{opening:.2f} s and {memory / 1e6:.0f} MB"
                )
        return "\n".join(lines)


FAMILY = StoreScale()
