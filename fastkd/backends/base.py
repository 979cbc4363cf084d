"""The interface of the passes over rows, and the choice of who runs them.

A backend is a module with the functions of `Passes`. It sees rows, not losses: operands of shape
[A, B, V] (row r is [r // B, r % B], columns contiguous, any strides in front), a keep mask, a
column of the hard label and a scale per row. It never sees a reduction or a process group.

    fused   loss of each row and, where asked, its gradient: the fast form, one trip
    topk  the same against a teacher that gives some columns of each row
    stats   (max, sum of exp((x - max) / T), sum of x - max) of each row
    loss    (sum of value, sum of centred slope) of each row, given both sides' stats
    grad    the gradient, given both sides' stats and the sum of slopes

`stats`, `loss`, `grad` are the split form of `fused`: what a split vocabulary needs, with an
all-reduce between each two. A backend may have `staged` beside them, the fused trip cut at the
exchanges (see `StagedPasses`). Accumulation is float32, float64 where either operand is float64.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd.arguments.messages import shown
from fastkd.operands import Operand, Teacher

NAMES = ("reference", "cpu", "gpu")


class LossSpec(NamedTuple):
    """What a row costs: soft * D(p, q) + hard * CE(label, student at T = 1).

    Only the first `vocab` columns are used. `classes` is the size of the whole vocabulary (more
    than `vocab` where it is split over ranks); label smoothing spreads over it.
    """

    divergence: str
    param: float
    temperature: float
    soft: float
    hard: float
    smoothing: float
    vocab: int
    classes: int


class TopKRows(NamedTuple):
    """A teacher that gives K columns of each row.

    logprobs: [N, K] acc, contiguous: log p of the columns, -inf in padding.
    indices: [N, K] int64, contiguous: a column below spec.vocab, at most once in a row, or -1.
    tail: [N] acc, contiguous: log p of one more outcome, the columns that are not named; or None.
    restrict: the student's softmax is one over the named columns too.

    Without a tail and unless restricted, the loss is that of the named columns alone.
    """

    logprobs: Tensor
    indices: Tensor
    tail: Tensor | None
    restrict: bool

    def take(self, at: Any) -> TopKRows:
        """The rows `at`, a slice or an index."""
        logprobs, indices, tail = self.logprobs[at], self.indices[at], self.tail
        return TopKRows(logprobs, indices, None if tail is None else tail[at], self.restrict)


class Trips(Protocol):
    """What the drivers ask for. N = A * B rows; acc is float32 or float64 (see `acc_dtype`).

    keep [N] bool or None: rows that are False are never read; their loss and gradient are 0.
    label [N] int64 or None (when spec.hard is 0): the column of the hard label. A column outside
    0 <= label < spec.vocab is no column here (it stands on another rank, or the caller has made
    the row NaN through `scale`).
    scale [N] acc or None, factor float: the gradient of a row is multiplied by scale * factor.
    grad [A, B, W] with W >= vocab, any float dtype, may share the student's memory: columns from
    vocab to W are written 0.
    """

    def fused(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: LossSpec,
        keep: Tensor | None,
        label: Tensor | None,
        scale: Tensor | None,
        factor: float,
        grad: Tensor | None,
    ) -> Tensor:
        """Loss [N] acc of each row (not scaled); writes the scaled gradient where grad is given."""

    def topk(
        self,
        student: Tensor,
        teacher: TopKRows,
        spec: LossSpec,
        keep: Tensor | None,
        label: Tensor | None,
        scale: Tensor | None,
        factor: float,
        grad: Tensor | None,
    ) -> Tensor:
        """As `fused`; of the teacher's rows, too, those that are not kept may hold anything."""

    def total(self, loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
        """0-d acc: factor * sum of scale * loss, the same bits whatever the number of threads."""

    def empty_gradient(self, like: Tensor) -> Tensor:
        """Memory for a gradient: a contiguous tensor of like's shape and dtype, not initialised."""

    def multiply(self, grad: Tensor, by: Tensor) -> None:
        """grad *= by (0-d, acc) in place, leaving at once where `by` is 1; no synchronisation."""


class Passes(Trips, Protocol):
    """What a backend module provides: the trips, and the split form of `fused`."""

    def stats(self, x: Tensor, temperature: float, vocab: int, keep: Tensor | None) -> Tensor:
        """[N, 3] acc: max of x, sum of exp((x - max) / temperature), sum of x - max.

        All 0 where not kept. Two shards of a row merge as sum exp(..) * exp((max - top) / T) and
        sum + columns * (max - top), top being the larger maximum.
        """

    def loss(
        self,
        student: Tensor,
        teacher: Tensor,
        stats_s: Tensor,
        stats_t: Tensor,
        spec: LossSpec,
        keep: Tensor | None,
    ) -> Tensor:
        """[N, 2] acc: sum of the value, sum of the centred slope; 0 where not kept."""

    def grad(
        self,
        student: Tensor,
        teacher: Tensor,
        stats_s: Tensor,
        stats_t: Tensor,
        stats_hard: Tensor | None,
        slope: Tensor,
        spec: LossSpec,
        keep: Tensor | None,
        label: Tensor | None,
        scale: Tensor | None,
        factor: float,
        grad: Tensor,
    ) -> None:
        """Writes the gradient; slope [N] sum of centred slopes, stats_hard the stats at T = 1."""


class HostPasses(Passes, Protocol):
    """What a backend on the host adds: a small loss costs the calls that it takes."""

    def fused_total(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: LossSpec,
        keep: Tensor | None,
        label: Tensor | None,
        scale: Tensor | None,
        factor: float,
        grad: Tensor | None,
    ) -> Tensor:
        """`total` of `fused`, of operands and gradient in any shape [..., V]."""

    def count(
        self, labels: Tensor, ignore_index: int, vocab: int
    ) -> tuple[Tensor | None, Tensor, int, int]:
        """(keep or None where all are kept, label, rows kept, first row out of range or -1)."""

    def admit(
        self, logprobs: Tensor, indices: Tensor, keep: Tensor | None, vocab: int
    ) -> tuple[str, int, int]:
        """(fault, row, place) of the first kept row [N, K] that is no teacher's, or ("", -1, -1).

        Faults: "index" out of range, "twice" named, "value" (above 0 or NaN).
        """

    def weigh(self, keep: Tensor | None, weight: Tensor, mean: bool, acc: torch.dtype) -> Tensor:
        """scale [N] acc: weight where kept, else 0; for the mean divided by its sum, if not 0."""


class Staged(NamedTuple):
    """`fused` of some columns of each row, cut where the ranks exchange sums.

    loss: [N] acc, and redo: [N] bool, once all trips are over. Rows with redo set have no loss and
    an untouched gradient: they take the general form, on every rank alike.
    trips: over some rows each; yields what every rank must have, is sent [R, ...] in their order.
    waiting: how many trips may be under way at a time, one more than each has exchanges.
    """

    loss: Tensor
    redo: Tensor
    trips: Iterator[Generator[Tensor, Tensor, None]]
    waiting: int


class StagedPasses(Passes, Protocol):
    """What a backend on the host adds: the stages of `fused` over a split vocabulary."""

    def staged(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: LossSpec,
        keep: Tensor | None,
        label: Tensor | None,
        scale: Tensor | None,
        factor: float,
        grad: Tensor | None,
        ranks: int,
        rank: int,
        widest: int,
    ) -> Staged | None:
        """As `fused` with spec.vocab >= 0 own columns of at most `widest` on any rank.

        None, on every rank alike, where operands of such a dtype or width take the general form.
        The bits depend on neither the rows of a trip nor the number of threads.
        """


def staged_passes(passes: Trips) -> StagedPasses | None:
    """The same passes, if they have the stages."""
    return cast(StagedPasses, passes) if hasattr(passes, "staged") else None


def host_passes(passes: Trips) -> HostPasses | None:
    """The same passes, if they have what the host's add."""
    return cast(HostPasses, passes) if hasattr(passes, "fused_total") else None


def trip(
    passes: Trips,
    student: Tensor,
    teacher: Tensor | TopKRows,
    spec: LossSpec,
    folded: tuple[Tensor | None, Tensor | None, Tensor | None, float],
    grad: Tensor | None,
) -> Tensor:
    """`fused` or `topk`, of rows [A, B, V]; folded: keep, label, scale, factor."""
    if isinstance(teacher, TopKRows):
        return passes.topk(student, teacher, spec, *folded, grad)
    return passes.fused(student, teacher, spec, *folded, grad)


def acc_dtype(student: Operand, teacher: Teacher | TopKRows) -> torch.dtype:
    """float64 if either side is, else float32."""
    wide = torch.float64
    other = teacher.logprobs.dtype if isinstance(teacher, TopKRows) else teacher.dtype
    return wide if student.dtype is wide or other is wide else torch.float32


def rows(x: Tensor) -> Tensor:
    """A [A, B, V] view of x [..., V]; copies only where three or more strides do not merge."""
    if x.dim() == 2:
        return x.unsqueeze(0)
    n, vocab = x.numel() // max(x.size(-1), 1), x.size(-1)
    if x.is_contiguous():
        return x.view(1, n, vocab)
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2 or n == 0:
        return x.reshape(1, n, vocab)
    while len(sizes) < 2:
        sizes.insert(0, 1)
        strides.insert(0, 0)
    return x.as_strided((*sizes, vocab), (*strides, 1))


def _valid(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{source}: got {shown(name)}, expected one of {', '.join(NAMES)}")
    return name


# read once: at every call it would cost as much as a small loss's arithmetic
_environment = os.environ.get("FASTKD_BACKEND")
_forced: ContextVar[str | None] = ContextVar(
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
    token = _forced.set(_valid(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend chosen by hand, if one is."""
    return _forced.get()


@cache
def _load(name: str) -> Passes | None:
    """The backend's module, or None (said once) where it cannot run on this machine."""
    try:
        return cast(Passes, importlib.import_module(f"fastkd.backends.{name}"))
    except ImportError as error:
        warnings.warn(
            f"fastkd: the {name!r} backend is not available ({error}); its losses run on the "
            "reference, in plain torch: the same values, slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def interpreted() -> bool:
    """True where Triton kernels run through the interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_host(device: torch.device) -> bool:
    """True where reading a value costs no synchronisation."""
    return device.type == "cpu"


@cache
def _own(device: torch.device) -> str:
    """The backend of a device when none is chosen by hand."""
    return "gpu" if device.type in ("cuda", "xpu") else "cpu" if on_host(device) else "reference"


class Chunks(NamedTuple):
    """Sizes of a linear loss's chunks on a device: bytes of all buffers, (least, most) rows."""

    budget: int
    rows: tuple[int, int]


# GPU: 1 GiB for each of two buffers is 4096 rows of a bfloat16 vocabulary of 128 256. From 512 rows
# a product keeps the device busy, and beyond 8192 it gains nothing by more.
# CPU: what stays in memory that is used again and again (`buffer_pool`). In smaller chunks, which
# the caches would hold, each product packs the weight anew and is up to twice as slow.
_GPU_CHUNKS = Chunks(2**31, (512, 8192))
_HOST_CHUNKS = Chunks(2**28, (16, 2**31))


def chunks(device: torch.device) -> Chunks:
    """What a linear loss may use on a device."""
    return _HOST_CHUNKS if on_host(device) else _GPU_CHUNKS


def adds_wide(device: torch.device) -> bool:
    """True where torch adds a product of 16-bit matrices to a float32 one in one go."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and hasattr(torch.ops.aten.addmm, "dtype_out")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products inside run in their operands' dtype."""
    return torch.autocast(device.type, enabled=False)


def pick_name(device: torch.device) -> str:
    """The backend for a device: the forced one where it can run there, else the device's own."""
    name = forced()
    if name is None:
        return _own(device)
    if name == "cpu" and not on_host(device):
        raise RuntimeError(f"backend 'cpu' was asked for, but the tensors are on {device}")
    if name == "gpu" and _own(device) != "gpu" and not (on_host(device) and interpreted()):
        raise RuntimeError(
            f"backend 'gpu' was asked for, but the tensors are on {device} (Triton runs CPU "
            "tensors only through its interpreter: set TRITON_INTERPRET=1 before Python starts)"
        )
    return name


def transformed(upstream: Tensor | None = None) -> bool:
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


def _recorded() -> bool:
    """Whether torch.jit.trace or make_fx writes down what is done here."""
    if torch._C._get_tracing_state() is not None:
        return True
    return _mode(torch._C._TorchDispatchModeKey.PROXY)


def valueless(x: Tensor) -> bool:
    """Whether x has no values to look at here, or other ones when this is done again.

    Under torch.compile and torch.export, transforms of torch.func (vmap has no one value), make_fx,
    torch.jit.trace and FakeTensorMode.
    """
    if torch.compiler.is_compiling() or transformed() or _recorded():
        return True
    return hasattr(x, "fake_mode") or _mode(torch._C._TorchDispatchModeKey.FAKE)


def pick(device: torch.device) -> Passes:
    """The passes for tensors on a device; the reference where a transform is at work.

    Raises:
        RuntimeError: a backend was chosen by hand that cannot run there or is not built.
    """
    name = pick_name(device)
    if name != "reference" and _recorded():
        raise RuntimeError(
            "torch.jit.trace and make_fx write down torch's own operations, of which a kernel is "
            "none; torch.compile and torch.export trace the losses, or use "
            'fastkd.use_backend("reference")'
        )
    if name != "reference" and transformed():
        if forced() == name:
            raise RuntimeError(
                f"backend {name!r} was asked for, but torch.func and forward-mode AD follow plain "
                'torch only; use fastkd.use_backend("reference") inside them, or leave the '
                "backend open"
            )
        name = "reference"
    passes = _load(name)
    if passes is None:
        if forced() == name:
            raise RuntimeError(f"backend {name!r} was asked for, but is not available here")
        passes = _load("reference")
    assert passes is not None
    return passes
