"""Version, and what the losses run on here."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from typing import Any

import torch

from fastkd.backends.base import batch_invariant
from fastkd.backends.choice import forced

__version__ = "0.1.0"


def info() -> dict[str, Any]:
    """Versions, backends, instruction set, threads and GPU of this process.

    Returns:
        A JSON-ready dict: fastkd, python, torch, triton (version or None), backend (the one chosen
        by hand, or "auto"), batch_invariant (whether a row's bits are the same in every batch on
        a GPU, too: FASTKD_BATCH_INVARIANT=1 or torch.use_deterministic_algorithms), cpu (None where
        the extension is not built, else isa, isas, openmp, compiler, threads), gpu (None or name,
        capability, memory_gib, driver-independent facts; cooperative: "proven", "untried" or why
        programs do not share a row).
    """
    return {
        "fastkd": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "backend": forced() or "auto",
        "batch_invariant": batch_invariant(),
        "cpu": _cpu(),
        "gpu": _gpu(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any] | None:
    if importlib.util.find_spec(f"{__package__}._C") is None:
        return None
    from fastkd.backends import cpu

    return {**cpu.build(), "threads": torch.get_num_threads()}


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_gib": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "runtime": torch.version.cuda or torch.version.hip,
        "cooperative": _cooperative(),
    }


def _cooperative() -> str:
    try:
        from fastkd.backends.gpu import proof
    except ImportError as error:  # no Triton, or too old a one
        return str(error)

    return proof.state(torch.device("cuda", torch.cuda.current_device()))
