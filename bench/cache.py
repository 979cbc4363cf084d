"""What a teacher on disk costs a training step: reading it against the loss that eats it.

Writes a cache of top-k teachers of random logits to a folder of its own, then times in turns a
batch of it read through a DataLoader (decoded and padded) and the fused loss of as many rows,
forward and backward. The tokens read per second over those consumed must be at least --limit: below
1 the loss would wait for the disk.

    python -m bench.cache --json cache.json

Exit status: 0, or 1 where reading is slower than --limit times the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from bench.cli import device, output, positive
from bench.timing import Clock, no_collection, summarise
from fastkd.teachers import store

LIMIT = 5.0
BATCH = 4  # samples


def write(folder: str, options: argparse.Namespace) -> tuple[int, float]:
    """Bytes on disk and tokens per second of a writer; the top-k themselves are made before."""
    length, k, vocab = options.length, options.k, options.vocab
    torch.manual_seed(0)
    few = [fastkd.topk_from_logits(4 * torch.randn(length, vocab), k) for _ in range(4)]
    start = time.perf_counter()
    with store.Writer(folder, vocab_size=vocab, k=k, encoding=options.encoding) as writer:
        for i in range(options.samples):
            writer.add(few[i % len(few)])
    elapsed = time.perf_counter() - start
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return size, options.samples * length / elapsed


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median times of a batch read and of its loss, and the figures that follow."""
    tokens = BATCH * options.length
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size, written = write(folder, options)
        reader = store.Reader(folder, vocab_size=options.vocab)
        labels = torch.zeros(options.samples, options.length, dtype=torch.int64)
        workers: dict[str, Any] = {"num_workers": options.workers}
        if options.workers:
            workers["persistent_workers"] = True
        loader = DataLoader(
            store.Paired(TensorDataset(labels, labels), reader),
            batch_size=BATCH,
            shuffle=True,
            drop_last=True,
            collate_fn=store.collate,
            **workers,
        )
        dtype = getattr(torch, options.dtype)
        logits = torch.randn(tokens, options.vocab).to(options.device, dtype).requires_grad_()
        _, _, teacher = next(iter(loader))
        flat = fastkd.TopK(
            teacher.logprobs.flatten(0, 1).to(options.device),
            teacher.indices.flatten(0, 1).to(options.device),
            tail_logprob=teacher.tail_logprob.flatten(0, 1).to(options.device),
        )

        def loss() -> Any:
            value = fastkd.kl_div(logits, flat)
            logits.grad = None
            value.backward()
            return value

        clock, times = Clock(options.device), ([], [])  # type: ignore[var-annotated]
        batches = len(loader)
        with no_collection():
            loss()
            ends = time.perf_counter() + options.seconds
            while len(times[0]) < 3 or time.perf_counter() < ends:
                start = time.perf_counter()
                for _ in loader:
                    pass
                times[0].append((time.perf_counter() - start) * 1e3 / batches)
                for _ in range(5):
                    times[1].append(clock(loss))
    read, eaten = (summarise(x) for x in times)
    return {
        "vocab": options.vocab,
        "k": options.k,
        "encoding": options.encoding,
        "dtype": options.dtype,
        "tokens_per_batch": tokens,
        "bytes_per_token": size / (options.samples * options.length),
        "written_tokens_per_s": written,
        "read_ms": read._asdict(),
        "loss_ms": eaten._asdict(),
        "read_tokens_per_s": tokens / read.median * 1e3,
        "consumed_tokens_per_s": tokens / eaten.median * 1e3,
        "ratio": eaten.median / read.median,
        "workers": options.workers,
    }


def as_text(row: dict[str, Any]) -> str:
    """The table for a terminal."""
    return "\n".join(
        (
            f"vocabulary {row['vocab']}, k = {row['k']}, {row['encoding']}, "
            f"{row['tokens_per_batch']} tokens a batch, loss in {row['dtype']}, "
            f"{row['workers']} workers",
            f"{row['bytes_per_token']:10.1f}  bytes a token",
            f"{row['written_tokens_per_s']:10.0f}  tokens/s written",
            f"{row['read_tokens_per_s']:10.0f}  tokens/s read through a DataLoader",
            f"{row['consumed_tokens_per_s']:10.0f}  tokens/s consumed by the loss alone",
            f"{row['ratio']:10.1f}  times as many read as consumed",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it as JSON where asked."""
    whole = positive(int, "size")
    parser = argparse.ArgumentParser("python -m bench.cache", description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=whole, default=128256, help="(default 128256)")
    parser.add_argument("--k", type=whole, default=32, help="(default 32)")
    parser.add_argument("--length", type=whole, default=64, help="tokens a sample (default 64)")
    parser.add_argument("--samples", type=whole, default=512, help="in the cache (default 512)")
    parser.add_argument("--encoding", default="uint8", choices=("uint8", "float16"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", type=device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader (default 0)")
    parser.add_argument("--threads", type=whole, default=None, help="of torch")
    parser.add_argument("--seconds", type=float, default=10.0, help="(default 10)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"(default {LIMIT:g})")
    parser.add_argument("--folder", type=Path, help="where the cache is made; a temporary one")
    parser.add_argument("--json", type=output, help="write the figures there")
    options = parser.parse_args(argv)
    if options.samples < BATCH:
        parser.error(f"--samples: got {options.samples}, expected at least {BATCH}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    row = measure(options)
    row |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    row["machine"] = platform.machine()
    print(as_text(row))
    if options.json is not None:
        options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    if row["ratio"] < options.limit:
        print(f"below the limit of {options.limit:g}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
