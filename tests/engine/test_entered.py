"""How many files of fastkd a call goes through on its way to a kernel.

A reader who follows a call opens as many files, and a small loss pays for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import require
from torch import Tensor

import fastkd

ROOT = Path(fastkd.__file__).parent


def entered(call: Callable[[], Any]) -> list[str]:
    """The files whose functions run in a second call, in order; warm, as all but the first are."""
    call()
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(ROOT)):
            found.setdefault(str(Path(name).relative_to(ROOT)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(found)


def operands(n: int = 4, v: int = 50) -> tuple[Tensor, Tensor]:
    return torch.randn(n, v).requires_grad_(), torch.randn(n, v)


@pytest.mark.parametrize("shape", [(1, 10), (64, 20_000)], ids=["small", "large"])
def test_logits_on_the_cpu(shape: tuple[int, int]) -> None:
    require("cpu")
    student, teacher = operands(*shape)
    files = entered(lambda: fastkd.kl_div(student, teacher))
    assert files[:2] == ["losses.py", "engine/dispatch.py"] and files[3] == "backends/cpu.py"
    assert len(files) <= 5, files


def test_logits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    require("gpu")
    from fastkd.backends.gpu import launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (x.detach().to(device).requires_grad_() for x in operands())
    with fastkd.use_backend("gpu"):
        # up to the launch: what runs there is the kernel, in Python where it is interpreted
        monkeypatch.setattr(launch, "launch", lambda *_: None)
        files = entered(lambda: fastkd.kl_div(student, teacher.detach()))
    assert "backends/gpu/launch.py" in files
    assert len(files) <= 7, files


@pytest.mark.parametrize("linear", ["student", "both"])
def test_linear_logits_on_the_cpu(linear: str) -> None:
    require("cpu")
    hidden, weight = torch.randn(4, 8).requires_grad_(), torch.randn(50, 8).requires_grad_()
    teacher: Any = operands()[1]
    if linear == "both":
        teacher = fastkd.LinearLogits(hidden.detach(), weight.detach())
    student = fastkd.LinearLogits(hidden, weight)
    files = entered(lambda: fastkd.kl_div(student, teacher))
    assert "backends/cpu.py" in files
    assert len(files) <= 9, files


@pytest.fixture
def group() -> Iterator[Any]:
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("torch.distributed is not to be had here")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_on_the_cpu(group: Any) -> None:
    require("cpu")
    student, teacher = operands()
    files = entered(lambda: fastkd.kl_div(student, teacher, group=group))
    assert "parallel/collectives.py" in files and "backends/cpu.py" in files
    assert len(files) <= 8, files
