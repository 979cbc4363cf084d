"""What a teacher cache is like at the size of a large training run: 10^12 tokens from 1 024 ranks.

Bytes and files follow from the format alone. Times and memory are measured on the real indexes of
caches of --shards shards (their payload is not made: neither merging nor opening looks at it; the
tests hold that), a line through them is fitted by least squares, and what it gives at the full size
is marked as extrapolated. "unmerged" opens the ranks' JSON indexes, "merged" the one made of them.

    python -m bench.cache_scale --json cache_scale.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cli import output, positive
from fastkd.teachers import store
from fastkd.teachers.store.format import Part, Plan, Shard, index_name, save_part, shard_name
from fastkd.teachers.store.merge import MERGED

SIZES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}
BATCH = 8  # samples looked up at a time
TIMES = ("merge_s", "open_unmerged_s", "open_merged_s", "lookup_s")
MEMORY = ("memory_unmerged", "memory_merged")
SPACE = ("json_bytes", "merged_bytes")


def plan_of(options: argparse.Namespace, total: int) -> Plan:
    """The identity of a cache of top-k rows."""
    return Plan(
        model="teacher",
        tokenizer="sha256:" + "0" * 64,
        data="data",
        vocab_size=options.vocab,
        k=options.k,
        method="top",
        temperature=1.0,
        tail="bucket",
        encoding="uint8",
        ranks=None,
        sequences=True,
        measured=True,
        total=total,
    )


def row_bytes(plan: Plan, length: int) -> float:
    """Bytes of a token, with its part of what a sample of `length` has."""
    sizes = {name: SIZES[kind] * math.prod(shape) for name, (kind, shape) in plan.shapes.items()}
    of_sample = sizes.pop("ends") + sizes.pop("samples")
    return sum(sizes.values()) + of_sample / length


def indexes(folder: Path, count: int, ranks: int, per_shard: int, options: Any) -> int:
    """Write the indexes of `count` shards; the number of samples they speak of."""
    plan = plan_of(options, count * per_shard)
    tokens = per_shard * options.length
    size = int(tokens * row_bytes(plan, options.length))
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
    asked = torch.randint(len(reader), (BATCH,))
    places.find(asked)
    start = time.perf_counter()
    for _ in range(20):
        places.find(asked)
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


def measured(count: int, per_shard: int, options: argparse.Namespace) -> dict[str, Any]:
    """One size of cache."""
    ranks = min(options.ranks, count)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        indexes(folder, count, ranks, per_shard, options)
        json_bytes = sum((folder / index_name(rank)).stat().st_size for rank in range(ranks))
        unmerged = opened(folder)
        start = time.perf_counter()
        store.merge(folder)
        merge_s = time.perf_counter() - start
        start = time.perf_counter()
        store.merge(folder)
        again_s = time.perf_counter() - start
        merged = opened(folder)
        return {
            "shards": count,
            "ranks": ranks,
            "json_bytes": json_bytes,
            "merged_bytes": (folder / MERGED).stat().st_size,
            "merge_s": merge_s,
            "merge_again_s": again_s,
            "open_unmerged_s": unmerged[0],
            "open_merged_s": merged[0],
            "lookup_s": merged[2],
            "memory_unmerged": unmerged[1],
            "memory_merged": merged[1],
        }


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least squares: y = a + b x, as (a, b)."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (xs, ys))
    solved = torch.linalg.lstsq(torch.stack([torch.ones_like(x), x], 1), y[:, None]).solution
    return float(solved[0]), float(solved[1])


def model(rows: list[dict[str, Any]], shard_bytes: int, options: Any) -> dict[str, Any]:
    """The full size: what follows from the format, and what the fitted lines give there."""
    samples = -(-options.tokens // options.length)
    plan = plan_of(options, samples)
    of_token = row_bytes(plan, options.length)
    payload = int(options.tokens * of_token)
    shards = max(options.ranks, -(-payload // shard_bytes))
    per_rank = -(-shards // options.ranks)
    xs = [row["shards"] for row in rows]
    fits = {name: line(xs, [row[name] for row in rows]) for name in (*TIMES, *MEMORY, *SPACE)}
    entry = fits["json_bytes"][1]
    return {
        "shard_bytes": shard_bytes,
        "samples": samples,
        "bytes_per_token": of_token,
        "payload_bytes": payload,
        "bytes_per_rank": payload / options.ranks,
        "shards": shards,
        "files_per_folder": per_rank,
        "files_on_top": 3 * options.ranks + 1,  # index, lock and folder of each; the merged index
        "json_bytes_per_rank": entry * per_rank,
        "json_rewritten_per_rank": entry * per_rank * (per_rank + 1) / 2,
        "tokens_lost_by_a_kill": shard_bytes / of_token,
        "place_table_bytes": 12 * samples,  # what one number and one shard of each sample took
        "extrapolated": {
            name: max(a + b * shards, 0.0) for name, (a, b) in fits.items() if name != "lookup_s"
        },
    }


def as_text(result: dict[str, Any]) -> str:
    """The tables for a terminal."""
    lines = [
        "measured: shards, ranks, MB of JSON indexes, MB merged; seconds to merge, again, open"
    ]
    lines[0] += " unmerged, open merged, us to find a batch; MB of memory unmerged, merged"
    for row in result["measured"]:
        lines.append(
            f"{row['shards']:9d} {row['ranks']:5d} {row['json_bytes'] / 1e6:9.2f} "
            f"{row['merged_bytes'] / 1e6:8.2f} {row['merge_s']:8.3f} {row['merge_again_s']:7.3f} "
            f"{row['open_unmerged_s']:8.3f} {row['open_merged_s']:7.3f} "
            f"{row['lookup_s'] * 1e6:7.0f} {row['memory_unmerged'] / 1e6:8.1f} "
            f"{row['memory_merged'] / 1e6:7.1f}"
        )
    for at in result["models"]:
        of = at["extrapolated"]
        lines += [
            f"{result['tokens']:.3g} tokens, {result['ranks']} ranks, shards of "
            f"{at['shard_bytes'] / 2**20:g} MiB, by the format:",
            f"  {at['bytes_per_token']:.1f} bytes a token, {at['payload_bytes'] / 1e12:.1f} TB, "
            f"{at['bytes_per_rank'] / 1e9:.1f} GB a rank",
            f"  {at['shards']} shards, {at['files_per_folder']} in a rank's folder, "
            f"{at['files_on_top']} files and folders on top",
            f"  a kill loses at most {at['tokens_lost_by_a_kill']:.3g} tokens; a rank rewrites "
            f"{at['json_rewritten_per_rank'] / 1e6:.0f} MB of index while it captures",
            f"  extrapolated: JSON indexes {of['json_bytes'] / 1e6:.0f} MB, merged index "
            f"{of['merged_bytes'] / 1e6:.0f} MB, merged in {of['merge_s']:.1f} s",
            f"  extrapolated: opened unmerged in {of['open_unmerged_s']:.1f} s and "
            f"{of['memory_unmerged'] / 1e6:.0f} MB, merged in {of['open_merged_s']:.2f} s and "
            f"{of['memory_merged'] / 1e6:.0f} MB (a table by sample: "
            f"{at['place_table_bytes'] / 1e9:.1f} GB)",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write them as JSON where asked."""
    whole = positive(int, "size")
    parser = argparse.ArgumentParser("python -m bench.cache_scale", description=__doc__)
    parser.add_argument("--shards", type=whole, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--ranks", type=whole, default=1024, help="(default 1024)")
    parser.add_argument("--tokens", type=whole, default=10**12, help="(default 10**12)")
    parser.add_argument("--length", type=whole, default=2048, help="tokens a sample")
    parser.add_argument("--vocab", type=whole, default=128256, help="(default 128256)")
    parser.add_argument("--k", type=whole, default=32, help="(default 32)")
    parser.add_argument("--mib", type=whole, nargs="+", default=[32, 256], help="of a shard")
    parser.add_argument("--folder", type=Path, help="where caches are made; a temporary one")
    parser.add_argument("--json", type=output, help="write the figures there")
    options = parser.parse_args(argv)
    if len(set(options.shards)) < 2:
        parser.error(f"--shards: got {options.shards}, expected two numbers at least: for a line")
    torch.set_num_threads(1)
    per_shard = max(1, options.mib[-1] * 2**20 // (options.length * 100))
    rows = [measured(count, per_shard, options) for count in sorted(set(options.shards))]
    result: dict[str, Any] = {
        "ranks": options.ranks,
        "tokens": options.tokens,
        "measured": rows,
        "models": [model(rows, mib * 2**20, options) for mib in options.mib],
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }
    print(as_text(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
