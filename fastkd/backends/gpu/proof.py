"""Whether programs of a device may wait for each other.

Cooperative programs (`cooperative.py`) rest on what no test without a GPU can show: that another
program's numbers are seen, and that enough programs run at a time. So a device proves itself once
in a process: a small loss by cooperative programs, twice, beside the same by one program to a row.
Where the numbers differ, something fails, or it takes longer than LIMIT, programs do not cooperate,
and one warning says so. Nothing is tried where the environment is known to break it: tools that run
programs in another order, and other processes on the same multiprocessors.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastkd.backends.base import LossSpec, Rows, on_host
from fastkd.backends.gpu import split_rows

# Of the small loss: columns, programs to a row, programs to a multiprocessor, more than run at a
# time. Its programs exchange numbers twice, as those of a divergence without an expectation do.
VOCAB, SPLITS, PROGRAMS = 6292, 3, 16
JS = LossSpec("js", 0.5, 1.0, 1.0, 0.0, 0.0, VOCAB, VOCAB)
LIMIT = 1.0  # seconds on the device; it takes less than a thousandth of that
# the daemon's pipe where no variable names another one
MPS_PIPE = Path("/tmp/nvidia-mps/control")
# what holds of the host: its programs are those of an interpreter; None: it must prove itself
HOST: bool | None = True

_verdicts: dict[torch.device, str] = {}  # "" where proven, else why not
_lock = threading.Lock()


@cache
def hindrance() -> str:
    """What in this process's environment forbids programs to wait; "" for nothing."""
    for name, value in os.environ.items():
        injected = name in ("CUDA_INJECTION64_PATH", "LD_PRELOAD") and "sanitizer" in value.lower()
        if name.startswith(("NV_SANITIZER_", "NV_COMPUTE_SANITIZER")) or injected:
            return f"compute-sanitizer ({name} is set)"
        if name.startswith("CUDA_MPS_") and value:
            return f"a multi-process service ({name} is set)"
    return f"a multi-process service ({MPS_PIPE} is there)" if MPS_PIPE.exists() else ""


def refuse(device: torch.device, why: str) -> None:
    """Programs do not cooperate on this device any more."""
    _verdicts[device] = why
    warnings.warn(
        f"fastkd: programs do not cooperate on {device}: {why}; from now on one program computes "
        "each wide row, and reads it twice (FASTKD_GPU_COOPERATIVE=0 says so without a trial)",
        RuntimeWarning,
        stacklevel=2,
    )


def refused(device: torch.device) -> bool:
    return bool(_verdicts.get(device)) or bool(hindrance())


def state(device: torch.device) -> str:
    """For `fastkd.info`: "proven", "untried", or why not."""
    return hindrance() or _verdicts.get(device, "untried") or "proven"


def proven(device: torch.device, fused: Callable[..., Tensor]) -> bool:
    """Whether programs may wait for each other on a device. The first call waits for it.

    While a graph is captured, and under torch.compile's eyes, nothing can be tried: False then, and
    nothing is remembered.

    Args:
        fused: the pass of that name, which also takes whether programs cooperate.
    """
    if refused(device):
        return False
    if device in _verdicts:
        return True
    if HOST is not None and device.index is None:
        return HOST
    if torch.compiler.is_compiling() or _capturing(device):
        return False
    with _lock:
        if device not in _verdicts:
            why = _trial(device, fused)
            if why:
                refuse(device, why)
            else:
                _verdicts[device] = ""
    return not _verdicts[device]


def _capturing(device: torch.device) -> bool:
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is not None and capturing()


def _trial(device: torch.device, fused: Callable[..., Tensor]) -> str:
    """What has gone wrong; "" for nothing."""

    def compute(cooperating: bool) -> Tensor:
        rows = PROGRAMS * split_rows.processors(device) // SPLITS + 2
        x = torch.arange(rows * VOCAB, device=device, dtype=torch.float32)
        student, teacher = ((3.0 * (x * by).sin()).view(1, rows, VOCAB) for by in (0.7, 1.1))
        grad = torch.empty_like(student)
        loss = fused(student, teacher, JS, Rows(), grad, cooperating)
        return torch.cat((loss, grad.flatten()))

    try:
        alone, first = compute(False), compute(True)  # compiled by now
        again, took = timed(device, lambda: compute(True))
        if not torch.allclose(first, alone, rtol=1e-3, atol=1e-5) or not torch.equal(first, again):
            return "a small loss came out otherwise than by one program to a row"
    except Exception as error:  # whatever it is: the loss itself does not need this
        return f"a small loss failed ({type(error).__name__}: {str(error)[:200]})"
    return "" if took <= LIMIT else f"a small loss took {took:.1f} seconds"


def timed(device: torch.device, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """(result, seconds on the device); the host's, an interpreter's, are none."""
    if on_host(device):
        return run(), 0.0
    module = torch.get_device_module(device)
    begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    begin.record()
    out = run()
    end.record()
    deadline = time.monotonic() + 60.0
    while not end.query() and time.monotonic() < deadline:
        time.sleep(1e-4)
    if not end.query():
        raise TimeoutError("it did not end within a minute")
    return out, begin.elapsed_time(end) / 1e3
