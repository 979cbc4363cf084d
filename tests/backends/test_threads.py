"""Threads: the same bits whatever their number, one pool with torch's, several callers, forks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ranks
import torch
from common import require
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd.divergence import divergences

CHUNK = 8192  # columns; a row of fewer is one thread's
SHAPES = [(1, 5 * CHUNK), (1, 3 * CHUNK + 17), (5, 2 * CHUNK + 1), (7, 40_000), (64, 1000)]


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    require("cpu")
    before = torch.get_num_threads()
    with fastkd.use_backend("cpu"):
        yield
    torch.set_num_threads(before)


def _loss(name: str, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x = student.detach().requires_grad_()
    loss = fastkd.distillation_loss(
        x, teacher, labels, divergence=name, alpha=0.3, label_smoothing=0.1, reduction="none"
    )
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


@pairwise
@pytest.mark.parametrize("name", list(divergences))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_threads(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    student, teacher = (6 * torch.randn(*shape)).to(dtype), (6 * torch.randn(*shape)).to(dtype)
    # maxima that rise along the row: every chunk starts from another one
    student += torch.linspace(-90, 90, shape[1]).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1])
    torch.set_num_threads(1)
    loss, grad = _loss(name, student, teacher, labels)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        again = _loss(name, student, teacher, labels)
        assert torch.equal(again[0], loss) and torch.equal(again[1], grad), threads


def test_a_shared_row_agrees_with_the_reference() -> None:
    torch.manual_seed(4)
    student, teacher = torch.randn(1, 3 * CHUNK + 17), torch.randn(1, 3 * CHUNK + 17)
    student[0, CHUNK : 2 * CHUNK] = -torch.inf  # a chunk that is impossible on one side
    teacher[0, CHUNK : 2 * CHUNK] = -torch.inf
    labels = torch.tensor([3 * CHUNK])
    torch.set_num_threads(2)
    for name in divergences:
        x, y = student.clone().requires_grad_(), student.double().requires_grad_()
        ours = fastkd.distillation_loss(x, teacher, labels, divergence=name)
        with fastkd.use_backend("reference"):
            exact = fastkd.distillation_loss(y, teacher.double(), labels, divergence=name)
        ours.backward()
        exact.backward()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=2e-7)


def test_several_python_threads_at_once() -> None:
    torch.manual_seed(5)
    inputs = [
        (torch.randn(16, 3000), torch.randn(16, 3000), torch.randint(0, 3000, (16,)))
        for _ in range(12)
    ]
    names = list(divergences)
    torch.set_num_threads(2)
    alone = [_loss(names[i % 6], *x) for i, x in enumerate(inputs)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            jobs = [pool.submit(_loss, names[i % 6], *x) for i, x in enumerate(inputs)]
            for job, (loss, grad) in zip(jobs, alone, strict=True):
                assert torch.equal(job.result()[0], loss) and torch.equal(job.result()[1], grad)


POOL = """
import json, os, sys, torch
torch.set_num_threads(int(os.environ["THREADS"]))
import fastkd
x = torch.randn(512, 4000, requires_grad=True)
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
fastkd.kl_div(x, torch.randn(512, 4000)).backward()
after = tasks()
(torch.randn(2000, 2000) + 1).exp().sum()
pools = {line.split()[-1] for line in open("/proc/self/maps")
         if "libgomp" in line or "libomp" in line or "libiomp" in line}
print(json.dumps([before, after, tasks(), sorted(pools)]), flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc here")
def test_threads_are_torch_s_own() -> None:
    """As many as torch was told to use; one pool where torch brings its OpenMP by its own name."""
    if not fastkd.info()["cpu"]["openmp"]:
        pytest.skip("built without OpenMP")
    library = os.path.join(os.path.dirname(torch.__file__), "lib")
    plain = os.path.exists(os.path.join(library, "libgomp.so.1"))
    for threads in (1, 3):
        ran = ranks.python(POOL, THREADS=str(threads))
        assert ran.returncode == 0, ran.stderr
        before, after, later, pools = json.loads(ran.stdout)
        # torch's autograd may start one thread of its own beside
        assert threads - 1 <= after - before <= threads, (before, after, later)
        if plain:
            assert len(pools) == 1 and later - after <= 1, (pools, after, later)


WORKERS = """
import torch, fastkd
from torch.utils.data import DataLoader, Dataset

class Scores(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(4, 30_000, generator=g, requires_grad=True)
        loss = fastkd.kl_div(x, torch.randn(4, 30_000, generator=g))
        loss.backward()
        return torch.stack((loss.detach(), x.grad.square().sum()))

torch.set_num_threads(2)
here = torch.stack([Scores()[i] for i in range(8)])
loader = DataLoader(Scores(), 1, num_workers=2, multiprocessing_context="fork", timeout=60)
there = torch.cat(list(loader))
assert torch.allclose(there, here, rtol=1e-5, atol=0), (there, here)
print("same", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork here")
def test_a_dataloader_s_workers_compute_losses() -> None:
    """Forks of a process that has computed; a spawned one is a process like any other."""
    ran = ranks.python(WORKERS)
    assert ran.returncode == 0 and ran.stdout.split() == ["same"], ran.stderr
