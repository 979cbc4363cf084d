"""Rows off a 16-byte boundary on the GPU's kernels: as good as others, and nothing beside them."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

from common import EXACT, TABLE
from oracle import assert_as_good_as_torch
from pairwise import pairwise

import fastkd
from fastkd.backends.base import LossSpec, Rows, Stats
from fastkd.backends.base import rows_of as rows
from fastkd.divergence import Divergence

pytest.importorskip("triton")
from fastkd.backends.gpu import BACKEND as gpu
from fastkd.backends.gpu import alignment, launch, split_rows
from fastkd.backends.gpu.tune import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")

each = pytest.mark.parametrize("divergence", TABLE, ids=lambda entry: entry.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_number = pytest.mark.parametrize("parts", [1, 3])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def skews(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What each pass was told of its rows, in turn; tiles have 128 columns.

    Rows of any width are shifted, within a tile too.
    """
    seen: list[int | None] = []
    real = alignment.align_offset

    def note(group: int, *operands: Tensor) -> int | None:
        seen.append(real(group, *operands))
        return seen[-1]

    monkeypatch.setattr(alignment, "align_offset", note)
    monkeypatch.setattr(alignment, "UNALIGNED_TILES", 0)
    monkeypatch.setattr(launch, "tile", lambda vocab, size, *_: Tile(8 * size, 16 // size, 32))
    return seen


def odd(n: int, vocab: int, dtype: torch.dtype, at: int = 0, between: int = 0) -> Tensor:
    """Rows [n, vocab] that start `at` elements into a NaN-filled memory, `between` apart."""
    step = vocab + between
    memory = torch.full((at + n * step + 16,), NAN, device=DEVICE, dtype=dtype)
    view = memory[at:].as_strided((n, vocab), (step, 1), at)
    return view.copy_(3 * torch.randn(n, vocab))


def around(x: Tensor) -> Tensor:
    """The memory of a view, with 0 where its own elements are: NaN everywhere else."""
    memory = x.new_empty(0).set_(x.untyped_storage()).clone()
    memory.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
    return memory


def untouched(x: Tensor) -> bool:
    return int(around(x).isnan().sum()) == around(x).numel() - x.numel()


@pairwise
@each
@each_dtype
@each_number
def test_an_odd_vocabulary(
    divergence: Divergence,
    dtype: torch.dtype,
    parts: int,
    skews: list[int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(split_rows, "programs_per_row", lambda *shape: parts)
    labels = torch.tensor([0, -100, 256, 128]).to(DEVICE)
    with fastkd.use_backend("gpu"):
        assert_as_good_as_torch(
            odd(4, 257, dtype), odd(4, 257, dtype), labels, divergence=divergence,
            alpha=0.3, temperature=2.0, label_smoothing=0.1,
        )  # fmt: skip
    assert skews and set(skews) == {0}


@pairwise
@each_dtype
@each_number
@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in-place"])
@pytest.mark.parametrize("vocab", [5, 130, 257, 641])
@pytest.mark.parametrize(("name", "at", "between"), [("kl", 3, 4), ("js", 1, 0)])
def test_nothing_beside_a_row_is_used_or_written(
    dtype: torch.dtype,
    parts: int,
    inplace: bool,
    vocab: int,
    name: str,
    at: int,
    between: int,
    skews: list[int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bits of the loss do not depend on what lies between the rows, nor does it change."""
    monkeypatch.setattr(split_rows, "programs_per_row", lambda *shape: parts)
    label = torch.tensor([0, vocab - 1, vocab // 2]).to(DEVICE)
    keep = torch.tensor([True, True, False]).to(DEVICE)
    student, teacher, grad = (odd(3, vocab, dtype, at, between) for _ in range(3))
    spec = LossSpec(name, 0.4, 2.0, 0.7, 0.3, 0.1, vocab, vocab)
    out = student if inplace else grad
    aligned, dense = (student.new_empty(3, -(-vocab // 16) * 16) for _ in range(2))
    aligned[:, :vocab], dense[:, :vocab] = student, teacher
    options = Rows(keep, label, None, 0.5)
    loss = gpu.fused(rows(student), rows(teacher), spec, options, rows(out))
    assert skews[-1] == at
    assert untouched(student) and untouched(teacher) and untouched(grad)
    true_grad = torch.empty_like(aligned)
    operands = (rows(aligned[:, :vocab]), rows(dense[:, :vocab]), spec, options)
    true = gpu.fused(*operands, rows(true_grad[:, :vocab]))
    assert skews[-1] is None
    assert not loss[2] and not out[2].any()
    # other columns share a lane, so sums round differently: by some units in the last place
    torch.testing.assert_close(loss, true, rtol=2e-6, atol=2e-6)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    largest = float(true_grad[:, :vocab].abs().max())
    torch.testing.assert_close(out, true_grad[:, :vocab], rtol=unit, atol=2e-6 * largest)


@each_dtype
@pytest.mark.interpreted(4)
@pytest.mark.parametrize("vocab", [5, 130, 257, 641])
def test_the_passes_one_by_one(dtype: torch.dtype, vocab: int, skews: list[int | None]) -> None:
    """stats, loss and grad, as of the rows' aligned copies, and nothing beside the rows."""
    keep = torch.tensor([True, False, True]).to(DEVICE)
    label = torch.tensor([vocab - 1, 1, -100]).to(DEVICE)
    spec = LossSpec("js", 0.4, 2.0, 0.7, 0.3, 0.1, vocab, vocab)
    shifted = [odd(3, vocab, dtype, 3, 4) for _ in range(3)]
    aligned = [x.new_empty(3, -(-vocab // 16) * 16)[:, :vocab].copy_(x) for x in shifted]
    found = []
    for student, teacher, grad in (shifted, aligned):
        s, t = rows(student), rows(teacher)
        stats_s, stats_t = (gpu.stats(x, 2.0, vocab, keep) for x in (s, t))
        hard = gpu.stats(s, 1.0, vocab, keep)
        loss = gpu.loss(s, t, Stats(stats_s, stats_t), spec, Rows(keep))
        stats, options = Stats(stats_s, stats_t, hard), Rows(keep, label, None, 0.5)
        gpu.grad(s, t, stats, loss, spec, options, rows(grad))
        found.append((stats_s, stats_t, hard, loss, grad))
    assert skews == [3] * 5 + [None] * 5
    assert all(untouched(x) for x in shifted) and not shifted[2][1].any()
    for mine, true in zip(*found, strict=True):
        unit = 2.0**-8 if mine.dtype == torch.bfloat16 else 2e-6
        largest = float(true.abs().max())
        torch.testing.assert_close(mine, true, rtol=unit, atol=2e-6 * largest)


@pairwise
@each_dtype
@each_number
@pytest.mark.parametrize("name", EXACT)
def test_identical_logits_give_exactly_nothing(
    name: str,
    dtype: torch.dtype,
    parts: int,
    skews: list[int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(split_rows, "programs_per_row", lambda *shape: parts)
    student = odd(2, 387, dtype, 1)
    teacher = odd(2, 387, dtype, 1).copy_(student)
    spec = LossSpec(name, 0.0, 0.7, 1.0, 0.0, 0.0, 387, 387)
    loss = gpu.fused(rows(student), rows(teacher), spec, Rows(), rows(student))
    assert skews[-1] == 1 and not loss.any() and not student.any() and untouched(student)


def test_columns_past_the_vocabulary(skews: list[int | None]) -> None:
    student, teacher, grad = (odd(3, 401, torch.bfloat16, 5) for _ in range(3))
    student[:, 300:], teacher[:, 300:] = NAN, NAN
    spec = LossSpec("kl", 0.0, 2.0, 0.7, 0.0, 0.0, 300, 300)
    loss = gpu.fused(rows(student), rows(teacher), spec, Rows(), rows(grad))
    assert skews == [5] and loss.isfinite().all() and untouched(grad)
    assert grad.isfinite().all() and not grad[:, 300:].any() and grad[:, :300].any(1).all()


# ---- who is shifted


def test_two_strides(skews: list[int | None]) -> None:
    """Rows of two dimensions, whose starts are no multiple of one step."""
    student, teacher, grad = (
        torch.randn(2, 3, 261).to(DEVICE)[:, :2, :257] for _ in range(3)
    )  # starts at 0, 261, 783, 1044
    spec = LossSpec("kl", 0.0, 2.0, 0.7, 0.0, 0.0, 257, 257)
    loss = gpu.fused(rows(student), rows(teacher), spec, Rows(), rows(grad))
    assert skews == [0]
    for i in range(2):
        for j in range(2):
            one = [rows(x[i, j].clone().unsqueeze(0)) for x in (student, teacher, grad)]
            alone = gpu.fused(one[0], one[1], spec, Rows(), one[2])
            torch.testing.assert_close(loss[2 * i + j], alone[0], rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(grad[i, j], one[2][0, 0], rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("shapes", "skew", "later"),
    [
        (((9, 32), (9, 32), (9, 32)), None, 1),  # every row starts on a boundary, or none does
        (((9, 33), (9, 33), (9, 33)), 0, 1),
        (((9, 33), (9, 65), (9, 97)), 0, 1),  # other strides, the same starts
        (((9, 33), (9, 34), (9, 33)), None, None),
        (((9, 33), (9, 36), (9, 33)), None, None),  # the teacher's rows are padded
        (((1, 33), (1, 34), (1, 36)), None, 1),  # a single row has no stride
    ],
)
def test_operands_share_their_starts_or_nothing(
    shapes: tuple[tuple[int, int], ...], skew: int | None, later: int | None
) -> None:
    """Seen from their first element on, and all from their second."""
    wide = [torch.zeros(n * w + 1, device=DEVICE) for n, w in shapes]
    first, second = (
        [
            rows(x[i : len(x) - 1 + i].view(shape)[:, :32])
            for x, shape in zip(wide, shapes, strict=True)
        ]
        for i in (0, 1)
    )
    assert alignment.align_offset(4, *first) == skew
    assert alignment.align_offset(4, *second) == later
    assert alignment.align_offset(4, second[0], *first[1:]) is None


def test_narrow_rows_are_not_shifted() -> None:
    """The bits of a row of less than two tiles do not depend on where it starts."""
    for vocab in (39, 1001):
        student, teacher = (odd(3, vocab, torch.float32, 1) for _ in range(2))
        spec = LossSpec("kl", 0.0, 2.0, 0.7, 0.0, 0.0, vocab, vocab)
        loss, copied = (
            gpu.fused(rows(s), rows(t), spec, Rows(), rows(torch.empty_like(s)))
            for s, t in ((student, teacher), (student.clone(), teacher.clone()))
        )
        assert torch.equal(loss, copied)


def test_other_dtypes_do_not_share() -> None:
    student, teacher = torch.zeros(1, 9, 33, device=DEVICE), torch.zeros(1, 9, 33, device=DEVICE)
    assert alignment.align_offset(4, student, teacher.bfloat16(), student) is None
    assert alignment.align_offset(4, student, teacher, student) == 0


def test_memory_that_begins_off_a_boundary_is_not_named_before_it() -> None:
    """Nothing says what lies before the first byte of a storage."""
    buffer = bytearray(4 * 200 + 32)
    whole = torch.frombuffer(buffer, dtype=torch.float32)
    first = (-whole.data_ptr() % 16) // 4 + 1  # one element after a boundary
    memory = torch.frombuffer(buffer, dtype=torch.float32, offset=4 * first)
    assert memory.data_ptr() % 16 == 4 and memory.storage_offset() == 0
    assert alignment.align_offset(4, memory[:99].view(1, 3, 33)) is None
    assert alignment.align_offset(4, memory[4:103].view(1, 3, 33)) == 1
