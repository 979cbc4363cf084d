"""A large stored teacher, streamed: `datasets` reads what fastkd wrote, with several readers.

Writes --tokens synthetic rows (a few top-k teachers, over and over), then streams the whole folder
through `datasets.load_from_disk(...).shard(...).to_iterable_dataset()` in the processes of a
DataLoader, decodes every row, and watches the memory that each of them has of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import fastkd
from bench.harness.cli import positive
from bench.harness.family import Family, Input
from bench.harness.result import Group, Result
from bench.harness.timing import Say, summarise
from fastkd.teachers import store

SIZES = {"tokens": 10**6, "length": 2048, "vocab": 128_256, "k": 32, "readers": 4, "mib": 32}
HELP = {
    **{"tokens": "rows in the store", "length": "rows of a sample", "vocab": "columns"},
    **{"k": "columns kept of a row", "readers": "processes that read", "mib": "MiB of a shard"},
}
TOY = {"tokens": 4000, "length": 16, "vocab": 500, "k": 4, "readers": 2, "mib": 1}
SAMPLES = 16  # decoded at a time
ROOM = (
    64e6  # bytes that a reader may grow by after its first tenth: an allocator's, not the store's
)


def write(folder: Path, a: argparse.Namespace, say: Say) -> int:
    """Bytes of a store of so many rows."""
    generator = torch.Generator().manual_seed(0)
    few = [
        fastkd.topk_from_logits(4 * torch.randn(a.length, a.vocab, generator=generator), a.k)
        for _ in range(4)
    ]
    count, told = -(-a.tokens // a.length), time.monotonic()
    with store.Writer(folder, vocab_size=a.vocab, k=a.k, shard_bytes=a.mib * 2**20) as writer:
        for i in range(count):
            writer.add(few[i % len(few)])
            if time.monotonic() > told + 10:
                told = time.monotonic()
                say(f"writing, {i * a.length:.2e} rows")
    store.merge(folder)
    return sum(file.stat().st_size for file in folder.rglob("*.arrow"))


def own_memory() -> int:
    """Bytes of this process that no file stands behind; mapped shards are the system's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Stream(IterableDataset[Any]):
    """(reader, rows, bytes of its own) of each piece of this process's share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        import datasets

        info: Any = get_worker_info()
        reader = store.Reader(self.folder)
        share = datasets.load_from_disk(str(self.folder)).shard(info.num_workers, info.id)
        stream = share.to_iterable_dataset().with_format("arrow")
        for table in stream.iter(SAMPLES):
            rows = sum(len(output.logprobs) for output in reader.decode(table))
            yield info.id, rows, own_memory()


class StoreStream(Family):
    name = "store-stream"
    about = "store-stream: a large store, streamed by datasets through several readers."
    cases = {"stream": "writing rows, and streaming them back"}
    times = ("write", "read")
    threads = 1
    key = "shape"
    legend = '"memory" is what a reader has of its own: after a tenth of its rows, and at most.'

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        for name in SIZES:
            told = f"{HELP[name]} (default: {SIZES[name]})"
            parser.add_argument(f"--{name}", type=positive(int, "size"), help=told)
        told = "where the store is made (default: a temporary folder)"
        parser.add_argument("--folder", type=Path, help=told)

    def settle(self, parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
        for name, size in (TOY if a.toy else SIZES).items():
            if getattr(a, name) is None:
                setattr(a, name, size)

    def inputs(self, a: argparse.Namespace) -> Iterator[Input]:
        yield Input("stream", torch.uint8, None, self.name)

    def measure(self, one: Input, a: argparse.Namespace, say: Say) -> list[Result]:
        say("writing")
        with tempfile.TemporaryDirectory(dir=a.folder) as name:
            start = time.perf_counter()
            size = write(Path(name), a, say)
            written = time.perf_counter()
            loader = DataLoader(Stream(Path(name)), batch_size=None, num_workers=a.readers)
            rows, memory = 0, dict[int, list[int]]()
            for of, count, own in loader:
                rows += count
                memory.setdefault(of, []).append(own)
            end = time.perf_counter()
        early = max(of[len(of) // 10] for of in memory.values())
        most = max(max(of[len(of) // 10 :]) for of in memory.values())
        label = f"{rows:.2e} rows, k {a.k}, V {a.vocab}, {a.readers} readers"
        result = Result("stream", "", label, "uint8", "arrow, datasets", ours=True)
        took = {"write": written - start, "read": end - written}
        result.times = {what: summarise([1e3 * of]) for what, of in took.items()}
        if rows != -(-a.tokens // a.length) * a.length:
            result.status, result.note = "wrong", f"{rows} rows came back"
        result.figures = {"rows": rows, "bytes": size, "memory_early": early, "memory_most": most}
        result.figures |= {f"{what}_rows_per_s": rows / of for what, of in took.items()}
        return [result]

    def counted(self, result: Result) -> dict[str, str]:
        figures = result.figures
        return {
            "bytes/row": f"{figures['bytes'] / figures['rows']:.1f}",
            "rows/s written": f"{figures['write_rows_per_s']:.2e}",
            "rows/s read": f"{figures['read_rows_per_s']:.2e}",
            "memory": f"{figures['memory_early'] / 1e6:.0f}, {figures['memory_most'] / 1e6:.0f} MB",
        }

    def complaints(self, groups: Sequence[Group], a: argparse.Namespace) -> list[str]:
        grown = [
            one.figures["memory_most"] - one.figures["memory_early"] for g in groups for one in g
        ]
        return [f"a reader grew by {x / 1e6:.0f} MB" for x in grown if x > ROOM]


FAMILY = StoreStream()
