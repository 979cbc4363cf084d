"""Which backend runs: the one chosen by hand, else the device's own, else the reference."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd.arguments.messages import shown
from fastkd.backends.base import Backend, interpreted, on_host

NAMES = ("reference", "cpu", "gpu")


def _valid(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{source}: got {shown(name)}, expected one of {', '.join(NAMES)}")
    return name


# read once: at every call it would cost as much as a small loss's arithmetic
_environment = os.environ.get("FASTKD_BACKEND")
chosen: ContextVar[str | None] = ContextVar(
    "fastkd_backend", default=_valid(_environment, "FASTKD_BACKEND") if _environment else None
)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the losses called inside on the named backend.

    Args:
        name: "reference" (plain torch, any device), "cpu" (C++), "gpu" (Triton; on CPU tensors
            only through Triton's interpreter). FASTKD_BACKEND, set before fastkd is imported, does
            the same for a whole process.

    Raises:
        ValueError: another name.
        RuntimeError: at the loss, if that backend cannot run on the tensors' device.
    """
    token = chosen.set(_valid(name, "use_backend"))
    try:
        yield
    finally:
        chosen.reset(token)


def forced() -> str | None:
    """The backend chosen by hand, if one is."""
    return chosen.get()


@cache
def _load(name: str) -> Backend | None:
    """The backend, or None (said once) where it cannot run on this machine."""
    try:
        backend: Backend = importlib.import_module(f"{__package__}.{name}").BACKEND
        return backend
    except ImportError as error:
        warnings.warn(
            f"fastkd: the {name!r} backend is not available ({error}); its losses run on the "
            "reference, in plain torch: the same values, slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@cache
def _own(device: torch.device) -> str:
    """The backend of a device when none is chosen by hand."""
    return "gpu" if device.type in ("cuda", "xpu") else "cpu" if on_host(device) else "reference"


def pick_name(device: torch.device) -> str:
    """The backend for a device: the forced one where it can run there, else the device's own."""
    name = forced()
    if name is None:
        return _own(device)
    if name == "cpu" and not on_host(device):
        raise RuntimeError(f"backend 'cpu' was requested, but the tensors are on {device}")
    if name == "gpu" and _own(device) != "gpu" and not (on_host(device) and interpreted()):
        raise RuntimeError(
            f"backend 'gpu' was requested, but the tensors are on {device} (Triton runs CPU "
            "tensors only through its interpreter: set TRITON_INTERPRET=1 before Python starts)"
        )
    return name


def in_functorch(upstream: Tensor | None = None) -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work here.

    Both follow torch's own operations and nothing else: a kernel reads the numbers beneath what it
    is given, and the derivative or the further dimension that they carry would be lost.

    upstream: of a backward, where `torch.autograd.grad(is_grads_batched=True)` shows in it alone.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return upstream is not None and torch._C._functorch.is_legacy_batchedtensor(upstream)


def _mode(key: torch._C._TorchDispatchModeKey) -> bool:
    return bool(torch._C._len_torch_dispatch_stack()) and (
        torch._C._get_dispatch_mode(key) is not None
    )


def traced() -> bool:
    """Whether torch.jit.trace or make_fx writes down what is done here."""
    if torch._C._get_tracing_state() is not None:
        return True
    return _mode(torch._C._TorchDispatchModeKey.PROXY)


def valueless(x: Tensor) -> bool:
    """Whether x has no values to look at here, or other ones when this is done again.

    Under torch.compile and torch.export, transforms of torch.func (vmap has no one value), make_fx,
    torch.jit.trace and FakeTensorMode.
    """
    if torch.compiler.is_compiling() or in_functorch() or traced():
        return True
    return hasattr(x, "fake_mode") or _mode(torch._C._TorchDispatchModeKey.FAKE)


def pick(device: torch.device) -> Backend:
    """The backend for tensors on a device; the reference where a transform is at work.

    Raises:
        RuntimeError: a backend was chosen by hand that cannot run there or is not built.
    """
    name = pick_name(device)
    if name != "reference" and traced():
        raise RuntimeError(
            "torch.jit.trace and make_fx write down torch's own operations, of which a kernel is "
            "none; torch.compile and torch.export trace the losses, or use "
            'fastkd.use_backend("reference")'
        )
    if name != "reference" and in_functorch():
        if forced() == name:
            raise RuntimeError(
                f"backend {name!r} was requested, but torch.func and forward-mode AD follow plain "
                'torch only; use fastkd.use_backend("reference") inside them, or leave the '
                "backend open"
            )
        name = "reference"
    backend = _load(name)
    if backend is None:
        if forced() == name:
            raise RuntimeError(f"backend {name!r} was requested, but is not available here")
        backend = _load("reference")
    assert backend is not None
    return backend
