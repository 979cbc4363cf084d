"""What a stored teacher is like at the size of a large run: 10^12 tokens from 1 024 ranks.

Bytes and files follow from the format alone. Times and memory are measured on folders of --shards
shards by name (they are empty: neither merging nor finding a sample opens them), and are, but for
the reading of a folder itself, linear in their number.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.cli import positive
from bench.harness.family import Family, Input
from bench.harness.result import Group, Result
from bench.harness.timing import Say, summarise
from fastkd.teachers import store
from fastkd.teachers.store.format import listed, shard_name

TOKEN = 106.0  # bytes of a row of k = 32 at V = 128 256; the tests count them


def folder_of(folder: Path, count: int, ranks: int, per_shard: int) -> None:
    """Empty files with the names of `count` shards of `ranks` ranks."""
    for number in range(count):
        first, digest = number * per_shard, f"{number:064x}"
        name = shard_name(number * ranks // count, first, first + per_shard - 1, digest)
        (folder / name).touch()


def measured(count: int, a: argparse.Namespace) -> Result:
    """A folder of so many shards, listed, merged, and listed in a process that counts memory."""
    per_shard = max(1, int(a.mib[-1] * 2**20 / (a.length * TOKEN)))
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder = Path(name)
        folder_of(folder, count, min(a.ranks, count), per_shard)
        times: dict[str, float] = {}
        for what, run in (("open", listed), ("merge", store.merge)):
            start = time.perf_counter()
            run(folder)
            times[what] = time.perf_counter() - start
        index = (folder / "state.json").stat().st_size
        tracemalloc.start()
        kept = listed(folder)
        memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    result = Result("index", "", f"{count} shards", "uint8", "arrow", ours=True)
    result.times = {what: summarise([1e3 * of]) for what, of in times.items()}
    result.figures = {"shards": len(kept), "index_bytes": index, "memory_bytes": memory}
    return result


class StoreScale(Family):
    name = "store-scale"
    about = "store-scale: a folder with as many shards as a store of 10^12 tokens."
    cases = {"index": "opening and merging a folder of many shards"}
    times = ("merge", "open")
    threads = 1
    key = "shape"
    legend = '"memory" is what a reader keeps of the shards\' names.'

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        whole = positive(int, "size")
        parser.add_argument("--shards", type=whole, nargs="+", default=[1000, 10_000, 100_000])
        for name, size in (("ranks", 1024), ("tokens", 10**12), ("length", 2048)):
            parser.add_argument(f"--{name}", type=whole, default=size, help=f"(default: {size})")
        told = "MiB of a shard (default: 32 256)"
        parser.add_argument("--mib", type=whole, nargs="+", default=[32, 256], help=told)
        told = "where stores are made (default: a temporary folder)"
        parser.add_argument("--folder", type=Path, help=told)

    def settle(self, parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
        a.shards = [20, 60] if a.toy else sorted(set(a.shards))

    def inputs(self, a: argparse.Namespace) -> Iterator[Input]:
        for count in a.shards:
            yield Input(f"{count} shards", torch.uint8, None, self.name)

    def measure(self, one: Input, a: argparse.Namespace, say: Say) -> list[Result]:
        say("making its folder")
        return [measured(int(one.case.split()[0]), a)]

    def counted(self, result: Result) -> dict[str, str]:
        names = {"state.json": "index_bytes", "memory": "memory_bytes"}
        return {name: f"{result.figures[of] / 1e6:.2f} MB" for name, of in names.items()}

    def extra(self, groups: Sequence[Group], a: argparse.Namespace) -> str:
        lines = []
        for mib in a.mib:
            size: Any = a.tokens * (TOKEN + 24 / a.length)
            shards = max(a.ranks, -(-int(size) // (mib * 2**20)))
            lines.append(
                f"{a.tokens:.3g} tokens, {a.ranks} ranks, shards of {mib} MiB, by the format: "
                f"{size / 1e12:.1f} TB, {shards} shards"
            )
        return "\n".join(lines)


FAMILY = StoreScale()
