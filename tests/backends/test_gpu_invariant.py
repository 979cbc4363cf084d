"""A row's bits on the GPU's kernels, under deterministic algorithms: the row's own, nothing else's.

What only compiled code can show, that a tile's layout stays, is `tests/ptx/ptx_cases.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

import fastkd

pytest.importorskip("triton")
from fastkd.backends import base
from fastkd.backends.gpu import alignment, cooperative, launch, split_rows
from fastkd.backends.gpu.tune import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, HIDDEN = 150, 8
FORMS = ["kl", "js", "topk", "linear"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The backend in force on a device that is made to share rows, and the kernels that ran."""
    seen: set[str] = set()
    real = launch.launch

    def note(kernel: Any, *rest: Any) -> None:
        seen.add(kernel.__name__)
        real(kernel, *rest)

    monkeypatch.setattr(launch, "launch", note)
    monkeypatch.setattr(launch, "tile", lambda vocab, size, *_: Tile(8 * size, 16 // size, 32))
    monkeypatch.setattr(alignment, "UNALIGNED_TILES", 0)
    monkeypatch.setattr(split_rows, "programs_per_row", lambda rows, *of: 3 if rows < 4 else 1)
    monkeypatch.setattr(cooperative, "capacity", lambda *of: None)
    with fastkd.use_backend("gpu"):
        yield seen


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(form: str, student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [N], gradient [N, ...]) of rows whose label is 7."""
    leaf = student.detach()[:, :HIDDEN].clone() if form == "linear" else student.detach()
    leaf.requires_grad_()
    operand: Any = fastkd.LinearLogits(leaf, head) if form == "linear" else leaf
    given: Any = teacher
    if form == "topk":
        given = fastkd.topk_from_logits(teacher.float(), 5, temperature=2.0)
    labels = torch.full((student.size(0),), 7, device=DEVICE)
    loss = fastkd.distillation_loss(
        operand, given, labels, divergence="js" if form == "js" else "kl", label_smoothing=0.1,
        reduction="none",
    )  # fmt: skip
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def bits(form: str, rows: int = 6) -> list[bool]:
    """Whether some rows are those of a batch: alone, three of them, and begun a column later."""
    student, teacher = (3 * torch.randn(2, rows, VOCAB + 1)).to(DEVICE).unbind()
    head = torch.randn(VOCAB, HIDDEN, device=DEVICE)
    off = student[:, 1:], teacher[:, 1:]
    loss, grad = run(form, *(x.contiguous() for x in off), head)
    one, some = slice(1, 2), slice(3, 6)
    found = [(at, run(form, *(x[at].contiguous() for x in off), head)) for at in (one, some)]
    found.append((one, run(form, off[0][one], off[1][one].contiguous(), head)))
    found.append((some, run(form, *(x[some] for x in off), head)))
    return [torch.equal(a, loss[at]) and torch.equal(b, grad[at]) for at, (a, b) in found]


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_its_bits_in_every_batch(
    form: str, deterministic: None, kernels: set[str]
) -> None:
    assert all(bits(form, 64 if form == "kl" else 6))
    assert kernels <= {"fused_kernel", "topk_kernel", "stats_kernel"}


def test_it_has_not_otherwise(monkeypatch: pytest.MonkeyPatch, kernels: set[str]) -> None:
    """These rows would show it; and a switch of our own does what torch's does."""
    assert not all(bits("kl")) and "split_grad_kernel" in kernels
    assert fastkd.info()["batch_invariant"] is False
    monkeypatch.setattr(base, "_INVARIANT", True)
    kernels.clear()
    assert all(bits("kl")) and kernels == {"fused_kernel"}
    assert fastkd.info()["batch_invariant"] is True
