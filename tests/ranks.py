"""Several processes of one group on this machine, for tests of what is split over ranks.

They begin with the environment of the first of them: a test that sets a variable for its ranks
hands it over and sets it there.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds; a rank that waits for a dead one gives up then at the latest
# by one process, once for all the ranks of a test process
PRELOADED = ["numpy", "pytest", "torch.distributed.tensor", "torch.distributed.fsdp"]
# torch._dynamo: a second in every process, imported by the first step of an optimizer
PRELOADED += ["torch._dynamo", "common", "fastkd.distill"]


def context() -> Any:
    """Of multiprocessing: processes that are forks of one which has imported torch and fastkd."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(PRELOADED)
    _serve()
    return start


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) on each of `world` ranks (gloo); what they return, or AssertionError.

    Where gloo could not connect two ranks, all of them begin again, once: a pair of its sockets is
    closed now and then while a new group is made, before any code of ours has run on it.
    """
    results = _run(world, function, *args)
    if any(not good and "connectFullMesh failed" in what for good, what in results):
        results = _run(world, function, *args)
    failed = [f"rank {rank}: {what}" for rank, (good, what) in enumerate(results) if not good]
    assert not failed, "\n".join(failed)
    return [what for _, what in results]


def _run(world: int, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
    start = context()
    with tempfile.TemporaryDirectory() as folder:
        pipes = [start.Pipe(duplex=False) for _ in range(world)]
        ends = [end for _, end in pipes]
        group = start.Process(target=_group, args=(folder, function, args, ends))
        group.start()
        for end in ends:
            end.close()
        results: list[tuple[bool, Any]] = []
        for end, _ in pipes:
            try:
                results.append(end.recv())
            except EOFError:
                results.append((False, "died"))
        group.join()
    return results


def _group(folder: str, function: Callable[..., Any], args: Any, ends: list[Any]) -> None:
    """The ranks are forks of this process, which has imported what the function's module does."""
    fork = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    processes = [
        fork.Process(target=_rank, args=(rank, folder, function, args, ends))
        for rank in range(len(ends))
    ]
    for process in processes:
        process.start()
    for end in ends:
        end.close()
    for process in processes:
        process.join()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `python -c code` would run where fastkd is imported already, and no loss computed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("out", "err")]
        process = context().Process(target=_python, args=(code, environment, files))
        process.start()
        process.join(2 * TIMEOUT)
        said = [Path(file).read_text() for file in files]
        return subprocess.CompletedProcess([code], process.exitcode, *said)


def _python(code: str, environment: dict[str, str], files: list[str]) -> None:
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    exec(code, {"__name__": "__main__"})


def _serve() -> None:
    """Starts the process that ranks are forks of, which looks for modules where this one does."""
    from multiprocessing import forkserver

    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if kept is not None:
            os.environ["PYTHONPATH"] = kept


def _rank(rank: int, folder: str, function: Callable[..., Any], args: Any, ends: list[Any]) -> None:
    world, end = len(ends), ends.pop(rank)
    for other in ends:  # a dead rank's is at its end only when no other process has it
        other.close()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    # of the groups that a DeviceMesh makes, which takes no timeout: 30 minutes else
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        end.send((True, function(*args)))
    except BaseException:
        end.send((False, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
