"""What a teacher on disk costs a training step: reading it against the loss that eats it.

Writes a store of top-k teachers of random logits to a folder of its own, then times in turns a
batch of it read through a DataLoader (decoded and padded) and the fused loss of as many rows,
forward and backward.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from bench.harness import table
from bench.harness.cli import positive
from bench.harness.family import DTYPES, Family, Input, spelled
from bench.harness.measure import Comparison, Provider, Ready
from bench.harness.result import Group, Result
from bench.harness.timing import Clock, Say
from fastkd.teachers import store

LIMIT = 5.0  # tokens read for each one consumed; below 1 the loss would wait for the disk
BATCH = 4  # samples
CALLS = 5  # of the loss, timed as one
READ, LOSS = "read", "loss"
TOY = {"vocab": 500, "k": 4, "length": 8, "samples": 9}
HELP = {
    **{"vocab": "columns of the logits", "k": "columns stored of each row"},
    **{"length": "tokens of a sample", "samples": "samples in the store"},
}
SIZES = {"vocab": 128_256, "k": 32, "length": 64, "samples": 512}


def write(folder: str, a: argparse.Namespace) -> tuple[int, float]:
    """Bytes on disk and tokens per second of a writer; the top-k themselves are made before."""
    generator = torch.Generator().manual_seed(0)
    size = (a.length, a.vocab)
    logits = (4 * torch.randn(size, generator=generator) for _ in range(4))
    few = [fastkd.topk_from_logits(one, a.k) for one in logits]
    start = time.perf_counter()
    with store.Writer(folder, vocab_size=a.vocab, k=a.k, encoding=a.encoding) as writer:
        for i in range(a.samples):
            writer.add(few[i % len(few)])
    elapsed = time.perf_counter() - start
    written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return written, a.samples * a.length / elapsed


def batches(folder: str, a: argparse.Namespace) -> Any:
    """A loader of (inputs, labels, stored teacher)."""
    labels = torch.zeros(a.samples, a.length, dtype=torch.int64)
    reader = store.Reader(folder, vocab_size=a.vocab)
    return DataLoader(
        store.Paired(TensorDataset(labels, labels), reader),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        collate_fn=store.collate,
        num_workers=a.workers,
        persistent_workers=a.workers > 0,
    )


def comparison(folder: str, a: argparse.Namespace, dtype: torch.dtype) -> Comparison:
    """Reading a batch, and the loss of one."""
    size, written = write(folder, a)
    loader, tokens, device = batches(folder, a), BATCH * a.length, a.device
    clock = Clock(device)

    def read() -> float:
        start = time.perf_counter()
        for _ in loader:
            pass
        return (time.perf_counter() - start) * 1e3 / len(loader)

    def loss() -> Ready:
        logits = torch.randn(tokens, a.vocab).to(device, dtype).requires_grad_()
        stored = next(iter(loader))[2]
        flat = fastkd.TopK(
            stored.logprobs.flatten(0, 1).to(device),
            stored.indices.flatten(0, 1).to(device),
            tail_logprob=stored.tail_logprob.flatten(0, 1).to(device),
        )

        def run() -> Any:
            value = fastkd.kl_div(logits, flat)
            logits.grad = None
            value.backward()
            return value.detach()

        return Ready({"batch": lambda: clock(*[run] * CALLS)})

    figures = {"vocab": a.vocab, "k": a.k, "encoding": a.encoding}
    figures |= {"tokens_per_batch": tokens, "workers": a.workers}
    figures |= {
        "bytes_per_token": size / (a.samples * a.length),
        "written_tokens_per_s": written,
    }
    label = f"V {a.vocab}, k {a.k}, {a.encoding}"
    return Comparison(
        *("topk", "", label, spelled(dtype), device),
        [
            Provider(READ, lambda: Ready({"batch": read}), ours=True),
            Provider(LOSS, loss, ours=True),
        ],
        figures=figures,
    )


class Store(Family):
    name = "store"
    about = "store: reading a stored teacher against the loss that eats it."
    cases = {"topk": "top-k teachers, read through a DataLoader"}
    devices = True
    dtypes = DTYPES
    limit = LIMIT
    rounds = (3, 1000)
    times = ("batch",)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        whole = positive(int, "size")
        for name, size in SIZES.items():
            told = f"{HELP[name]} (default: {size})"
            parser.add_argument(f"--{name}", type=whole, help=told)
        parser.add_argument("--encoding", default="uint8", choices=("uint8", "plain"))
        told = "of the DataLoader (default: 0)"
        parser.add_argument("--workers", type=int, default=0, help=told)
        told = "where the store is made (default: a temporary folder)"
        parser.add_argument("--folder", type=Path, help=told)

    def settle(self, parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
        for name, size in (TOY if a.toy else SIZES).items():
            setattr(a, name, getattr(a, name) or size)
        if a.toy and a.limit == LIMIT:
            a.limit = 0.0  # one cold run says nothing about speed
        if a.samples < BATCH:
            parser.error(f"--samples: got {a.samples}, expected at least {BATCH}")

    def measure(self, one: Input, a: argparse.Namespace, say: Say) -> list[Result]:
        with tempfile.TemporaryDirectory(dir=a.folder) as folder:
            a.made = folder
            return super().measure(one, a, say)

    def comparison(self, one: Input, a: argparse.Namespace) -> Comparison:
        return comparison(a.made, a, one.dtype)

    def finish(self, results: list[Result]) -> None:
        for result in results:
            time, tokens = result.times.get("batch"), result.figures["tokens_per_batch"]
            result.figures["tokens_per_s"] = time and tokens / time.median * 1e3

    def heading(self, case: str, dtype: torch.dtype, shape: Any, a: argparse.Namespace) -> str:
        return f"store, V {a.vocab}, k {a.k}, {a.encoding}, loss in {spelled(dtype)}"

    def counted(self, result: Result) -> dict[str, str]:
        rate = result.figures.get("tokens_per_s")
        return {
            "tokens/s": "-" if rate is None else f"{rate:.0f}",
            "written tokens/s": f"{result.figures['written_tokens_per_s']:.0f}",
            "bytes a token": table.number(result.figures["bytes_per_token"]),
        }

    def _ratios(self, groups: Sequence[Group]) -> list[tuple[str, float]]:
        found = []
        for group in groups:
            rate = {one.provider: one.figures.get("tokens_per_s") for one in group}
            read, loss = rate[READ], rate[LOSS]
            if read and loss:
                found.append((group[0].dtype, read / loss))
        return found

    def extra(self, groups: Sequence[Group], a: argparse.Namespace) -> str:
        text = "{:.1f} times as many tokens are read as the loss consumes ({})"
        return "\n".join(text.format(ratio, dtype) for dtype, ratio in self._ratios(groups))

    def complaints(self, groups: Sequence[Group], a: argparse.Namespace) -> list[str]:
        low = [one for one in self._ratios(groups) if one[1] < a.limit]
        return [f"{dtype}: {ratio:.1f} is below the limit of {a.limit:g}" for dtype, ratio in low]


FAMILY = Store()
