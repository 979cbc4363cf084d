"""What a backend is: passes over rows of logits, and the records that they take.

A backend sees rows, not losses: operands of shape [A, B, V] (row r is [r // B, r % B], columns
contiguous, any strides in front) and, as one record, what goes with each row. It never sees a
reduction or a process group. `fastkd.backends.choice` says which one runs.

    fused   loss of each row and, if requested, its gradient: the fast form, one pass
    topk    the same against a teacher that gives some columns of each row
    stats   (max, sum of exp((x - max) / T), sum of x - max) of each row
    loss    (sum of value, sum of centred slope) of each row, given both sides' stats
    grad    the gradient, given both sides' stats and the sum of slopes

`stats`, `loss`, `grad` are the split form of `fused`: what vocabulary parallelism needs, with an
all-reduce between each two. A backend may have `stepwise` as well: `fused`, cut at the exchanges.
Accumulation is float32, float64 where either operand is float64.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.operands import Operand, Teacher

#: what a pass may tell of a row beside its loss, in this order; `fastkd.engine.outputs` says what
OUTPUTS = (
    *("soft", "hard", "student_entropy", "teacher_entropy"),
    *("student_logsumexp", "teacher_logsumexp", "label_logprob"),
)


class LossSpec(NamedTuple):
    """What a row costs: soft * D(p, q) + hard * CE(label, student) + z_loss * lse(student)^2.

    Cross-entropy and log-sum-exp (lse) are of the student at T = 1.

    Only the first `vocab` columns are used. `classes` is the size of the whole vocabulary (more
    than `vocab` where ranks share it); label smoothing spreads over it.
    """

    divergence: str
    param: float
    temperature: float
    soft: float
    hard: float
    smoothing: float
    vocab: int
    classes: int
    z_loss: float = 0.0

    @property
    def at_one(self) -> bool:
        """Whether the loss needs the student at T = 1."""
        return self.hard != 0.0 or self.z_loss != 0.0


class Rows(NamedTuple):
    """What goes with each of N rows.

    keep: [N] bool or None: rows that are False are never read; their loss and gradient are 0.
    label: [N] int64 or None: the column of the hard label. A column outside
        0 <= label < spec.vocab is no column here (it stands on another rank, or the caller has
        made the row NaN through `scale`).
    scale: [N] acc or None, factor: the gradient of a row is multiplied by scale * factor.
    skip: 0-d bool on the device, or None: where it is true, nothing is written.
    outputs: [N, 7] acc, contiguous, or None: memory for OUTPUTS. `hard` and `label_logprob` are
        written where spec.hard is not 0.
    """

    keep: Tensor | None = None
    label: Tensor | None = None
    scale: Tensor | None = None
    factor: float = 1.0
    skip: Tensor | None = None
    outputs: Tensor | None = None

    def times(self, by: float | Tensor, n: int) -> Rows:
        """The rows with their gradients times `by`: a number, or a 0-d tensor that nobody reads."""
        if isinstance(by, float):
            return self._replace(factor=self.factor * by)
        scale = by.expand(n).contiguous() if self.scale is None else self.scale * by
        return self._replace(scale=scale)


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


class Stats(NamedTuple):
    """`Backend.stats` of both sides' rows; hard: the student's at T = 1 (spec.at_one)."""

    student: Tensor
    teacher: Tensor
    hard: Tensor | None = None


class Stepwise(NamedTuple):
    """`fused` of some columns of each row, cut where the ranks exchange sums.

    loss: [N] acc, and redo: [N] bool, once all passes are over. Rows with redo set have no loss
    and an untouched gradient: they take the general form, on every rank alike.
    passes: over some rows each; yields what every rank must have, is sent [R, ...] in their order.
    waiting: how many passes may be under way at a time, one more than each has exchanges.
    """

    loss: Tensor
    redo: Tensor
    passes: Iterator[Generator[Tensor, Tensor, None]]
    waiting: int


class Backend:
    """The passes that the drivers ask for. N = A * B rows; acc is float32 or float64.

    A gradient is written into grad [A, B, W] with W >= vocab, of any float dtype, which may share
    the student's memory: columns from vocab to W are written 0.
    """

    #: values can be read without waiting for a device, and there is `count` and `weigh`
    on_host = False
    #: where forward may compute a gradient with a guess of its factor (`fastkd.engine.autograd`):
    #: "host", "device", or "" for nowhere
    guesses = ""
    #: there is `stepwise`
    has_steps = False
    #: the process group over which a vocabulary is divided, and the most columns of any rank
    group: Any = None
    widest: int | None = None
    #: [spec.vocab or more] int64, the teacher's columns that are compared where it has more (-1
    #: spoils all rows); None for the first ones
    teacher_columns: Tensor | None = None

    #: passes over single logits, if there are: `cpu_elements.py`, or on a device `gpu/bernoulli.py`
    bernoulli: Any = None
    count_elements: Any = None

    def transposed(self, x: Tensor) -> Tensor:
        """A copy [A, C, B] of a contiguous tensor [A, B, C]."""
        return x.transpose(1, 2).contiguous()

    def fused(
        self, student: Tensor, teacher: Tensor, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        """Loss [N] acc of each row (not scaled); writes the scaled gradient where grad is given."""
        raise NotImplementedError

    def topk(
        self, student: Tensor, teacher: TopKRows, spec: LossSpec, rows: Rows, grad: Tensor | None
    ) -> Tensor:
        """As `fused`; of the teacher's rows, too, those that are not kept may hold anything."""
        raise NotImplementedError

    def fused_total(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor | None,
        upstream: float | Tensor,
    ) -> Tensor:
        """`total` of `fused`, of operands and gradient in any shape [..., V].

        upstream: one more factor of the gradient.
        """
        into = None if grad is None else rows_of(grad)
        s = rows_of(student)
        by = rows if grad is None else rows.times(upstream, s.shape[0] * s.shape[1])
        loss = self.fused(s, rows_of(teacher), spec, by, into)
        return self.total(loss, rows.scale, rows.factor)

    def agreed(self, right: bool) -> bool:
        """Whether a guess was right on every rank."""
        return right

    def stats(self, x: Tensor, temperature: float, vocab: int, keep: Tensor | None) -> Tensor:
        """[N, 3] acc: max of x, sum of exp((x - max) / temperature), sum of x - max.

        All 0 where not kept. Two shards of a row merge as sum exp(..) * exp((max - top) / T) and
        sum + columns * (max - top), top being the larger maximum.
        """
        raise NotImplementedError

    def loss(
        self, student: Tensor, teacher: Tensor, stats: Stats, spec: LossSpec, rows: Rows
    ) -> Tensor:
        """[N, 2] acc: sum of the value, sum of the centred slope; 0 where not kept."""
        raise NotImplementedError

    def grad(
        self,
        student: Tensor,
        teacher: Tensor,
        stats: Stats,
        pairs: Tensor,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor,
    ) -> None:
        """Writes the gradient; pairs: [N, 2] acc, what `loss` returns of the whole row."""
        raise NotImplementedError

    def stepwise(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: LossSpec,
        rows: Rows,
        grad: Tensor | None,
        ranks: int,
        rank: int,
        widest: int,
    ) -> Stepwise | None:
        """As `fused` with spec.vocab >= 0 own columns of at most `widest` on any rank.

        None, on every rank alike, where operands of such a dtype or width take the general form.
        The bits depend on neither the rows of a pass nor the number of threads.
        """
        return None

    def total(self, loss: Tensor, scale: Tensor | None, factor: float) -> Tensor:
        """0-d acc: factor * sum of scale * loss, the same bits whatever the number of threads."""
        raise NotImplementedError

    def empty_gradient(self, like: Tensor) -> Tensor:
        """Memory for a gradient: a contiguous tensor of like's shape and dtype, not initialised."""
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def multiply(self, grad: Tensor, by: Tensor) -> None:
        """grad *= by (0-d, acc) in place, leaving at once where `by` is 1; no synchronisation."""
        grad.mul_(by)

    def count(
        self, labels: Tensor, ignore_index: int, vocab: int
    ) -> tuple[Tensor | None, Tensor, int, int]:
        """(keep or None where all are kept, label, rows kept, first row out of range or -1)."""
        raise NotImplementedError

    def weigh(self, keep: Tensor | None, weight: Tensor, mean: bool, acc: torch.dtype) -> Tensor:
        """scale [N] acc: weight where kept, else 0; for the mean divided by its sum, if not 0."""
        raise NotImplementedError

    def first_fault(
        self, logprobs: Tensor, indices: Tensor, keep: Tensor | None, vocab: int
    ) -> tuple[str, int, int]:
        """(fault, row, place) of the first kept row [N, K] that is no teacher's, or ("", -1, -1).

        Faults: "index" out of range, "twice" named, "value" (above 0 or NaN). Waits for a device.
        """
        named = indices >= 0
        order = indices.sort(-1)
        again = (order.values[:, 1:] == order.values[:, :-1]) & (order.values[:, 1:] >= 0)
        twice = torch.zeros_like(named).scatter_(-1, order.indices[:, 1:], again)
        for fault, wrong in (
            ("index", (indices < -1) | (indices >= vocab)),
            ("twice", twice),
            ("value", named & ~(logprobs <= 0.0)),
        ):
            wrong = wrong if keep is None else wrong & keep.unsqueeze(-1)
            if bool(wrong.any()):
                row, place = wrong.nonzero()[0]
                return fault, int(row), int(place)
        return "", -1, -1


def acc_dtype(student: Operand, teacher: Teacher | TopKRows) -> torch.dtype:
    """float64 if either side is, else float32."""
    wide = torch.float64
    other = teacher.logprobs.dtype if isinstance(teacher, TopKRows) else teacher.dtype
    return wide if student.dtype is wide or other is wide else torch.float32


def rows_of(x: Tensor) -> Tensor:
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


def interpreted() -> bool:
    """True where Triton kernels run through the interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_INVARIANT = os.environ.get("FASTKD_BATCH_INVARIANT", "0") not in ("", "0")


def batch_invariant() -> bool:
    """Whether a row's bits may depend on nothing but the row, on a GPU too (the CPU's never do)."""
    return _INVARIANT or torch.are_deterministic_algorithms_enabled()


def on_host(device: torch.device) -> bool:
    """True where reading a value costs no synchronisation."""
    return device.type == "cpu"


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


MOST_CHUNKS = 8  # what a chunk costs beyond its products is paid so often, where memory allows it
ALIGN = 64  # columns: rows start at multiples of 128 bytes, whatever the vocabulary


def _in_environment() -> int | None:
    text = os.environ.get("FASTKD_CHUNK")
    if text is None:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"FASTKD_CHUNK: got {text!r}, expected a number of rows, at least 1")
    return int(text)


default_rows = _in_environment()


@lru_cache(256)
def chunk_rows(n: int, row_bytes: int, device: torch.device, requested: int | None) -> int:
    """Rows of a chunk; row_bytes of all buffers together."""
    requested = default_rows if requested is None else requested
    if requested is not None:
        return min(requested, max(n, 1))
    budget, (least, most) = chunks(device)
    size = budget // max(row_bytes, 1)
    size = max(size, min(2 * size, -(-n // MOST_CHUNKS)))
    size = min(max(size, least), most)
    even = -(-n // max(1, -(-n // size)))  # no short last chunk
    return max(1, min(size, -(-even // ALIGN) * ALIGN, n))
