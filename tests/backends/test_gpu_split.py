"""Several programs to a row, through the interpreter or on a GPU: as good as one, every time."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

from common import EXACT, TABLE
from oracle import FLOORS, assert_as_good_as_torch, differentiate, oracle, plain
from told import assert_told

import fastkd
from fastkd.divergence import Divergence

pytest.importorskip("triton")
from fastkd.backends.gpu import cooperative, launch, split_rows
from fastkd.backends.gpu.tune import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = math.inf, math.nan

each_number = pytest.mark.parametrize("parts", [2, 3, 7], indirect=True)
each = pytest.mark.parametrize("divergence", TABLE, ids=lambda entry: entry.name)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that a test starts, by name; tiles have 128 columns."""
    seen: list[str] = []
    real = launch.launch

    def note(kernel: Any, *rest: Any) -> None:
        seen.append(kernel.__name__)
        real(kernel, *rest)

    monkeypatch.setattr(launch, "launch", note)
    monkeypatch.setattr(launch, "tile", lambda vocab, size, *_: Tile(8 * size, 16 // size, 32))
    return seen


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend in force, with tiles of 128 columns: small rows are many of them."""
    # which a GPU would rather use
    monkeypatch.setattr(cooperative, "capacity", lambda *device: None)
    with fastkd.use_backend("gpu"):
        yield launches(monkeypatch)


@pytest.fixture
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many programs to a row, whatever its size: some of them may be left without a column."""
    number = int(getattr(request, "param", 3))
    monkeypatch.setattr(split_rows, "programs_per_row", lambda *shape: number)
    return number


@pytest.fixture
def steps() -> Any:
    """The kernels of a loss and its gradient, by its divergence."""

    def of(divergence: Divergence) -> list[str]:
        pairs = ["split_pairs_kernel"] if divergence.expectation is None else []
        return ["split_sums_kernel", *pairs, "split_finish_kernel", "split_grad_kernel"]

    return of


def make(n: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (3 * torch.randn(2, n, vocab)).to(DEVICE, dtype).unbind()
    return student, teacher, torch.randint(0, vocab, (n,)).to(DEVICE)


# ---- how many


def test_rows_enough_for_the_device_are_not_split() -> None:
    assert split_rows.programs_per_row(264, 128_000, 4096, 132) == 1
    assert split_rows.programs_per_row(10_000, 128_000, 4096, 132) == 1
    assert split_rows.programs_per_row(1, 128_000, 4096, 0) == 1  # nothing known of the device


def test_a_part_keeps_two_tiles() -> None:
    assert split_rows.programs_per_row(1, 8191, 4096, 132) == 1
    assert split_rows.programs_per_row(1, 4 * 4096 - 1, 4096, 132) == 1
    assert split_rows.programs_per_row(1, 4 * 4096, 4096, 132) == 2
    for vocab in (20_000, 50_257, 128_256, 256_000):
        for rows in (1, 7, 64, 200):
            tiles = -(-vocab // 4096)
            assert tiles // split_rows.programs_per_row(rows, vocab, 4096, 132) >= split_rows.TILES


def test_a_few_rows_fill_the_device() -> None:
    assert (
        split_rows.programs_per_row(64, 128_256, 4096, 132) == 5
    )  # 320 programs for 132 multiprocessors
    assert split_rows.programs_per_row(200, 128_256, 4096, 132) == 2
    assert split_rows.programs_per_row(1, 10**7, 4096, 132) == split_rows.MOST


def test_the_device_is_asked_for_its_size(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    real = split_rows.programs_per_row
    monkeypatch.setattr(split_rows, "HOST_PROCESSORS", 3)
    monkeypatch.setattr(
        split_rows, "programs_per_row", lambda *shape: asked.append(shape) or real(*shape)
    )
    student, teacher, _ = make(2, 600)
    fastkd.kl_div(student, teacher)
    rows, vocab, columns, processors = asked[0]
    assert (rows, vocab, columns) == (2, 600, 128) and processors == split_rows.processors(
        DEVICE
    ) > 0
    assert "split_sums_kernel" in launched and "fused_kernel" not in launched


def test_the_interpreter_does_not_split(launched: list[str]) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("a GPU splits two rows")
    student, teacher, _ = make(2, 300)
    fastkd.kl_div(student, teacher)
    assert launched[0] == "fused_kernel"


# ---- the same losses


@pytest.mark.interpreted(9)
@each
@pytest.mark.parametrize(
    ("parts", "dtype"),
    [(2, torch.float32), (3, torch.bfloat16), (7, torch.float32)],
    ids=["2-fp32", "3-bf16", "7-fp32"],
    indirect=["parts"],
)
def test_values_and_gradients(
    divergence: Divergence, dtype: torch.dtype, parts: int, launched: list[str], steps: Any
) -> None:
    student, teacher, labels = make(2, 400, dtype)
    labels[1] = -100
    options = dict(temperature=2.0, alpha=0.4, label_smoothing=0.1, t_squared=True)
    call = dict(divergence=divergence, reduction="none", **options)
    assert_as_good_as_torch(student, teacher, labels, **call)
    expected = steps(divergence)
    assert launched[-len(expected) :] == expected
    # the bare divergence, and rows that end with a tile
    assert_as_good_as_torch(*make(1, 256, dtype)[:2], divergence=divergence)


@pytest.mark.interpreted(3)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hard_labels(temperature: float, smoothing: float, parts: int) -> None:
    student, teacher, labels = make(4, 333)
    labels[:2] = torch.tensor([0, 332])  # the first and the last column
    assert_as_good_as_torch(
        student, teacher, labels, divergence=fastkd.divergences["kl"], alpha=0.6,
        temperature=temperature, label_smoothing=smoothing,
    )  # fmt: skip


@pytest.mark.interpreted(3)
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js"])
def test_outputs_of_rows(name: str, parts: int, launched: list[str], steps: Any) -> None:
    student, teacher, labels = make(4, 700)
    labels[1], student[1] = -100, NAN
    student[2, 600:] += 30.0
    entry = fastkd.divergences[name]
    found: list[Any] = []
    for wanted in (False, True):
        leaf = student.clone().requires_grad_()
        result = fastkd.distillation_loss(
            leaf, teacher, labels, divergence=entry, label_smoothing=0.1, return_outputs=wanted
        )
        loss: Any = result[0] if wanted else result
        loss.backward()
        found.append((loss.detach(), leaf.grad, result[1] if wanted else None))
    expected = steps(entry)
    assert launched[-len(expected) :] == expected
    assert all(torch.equal(x, y) for x, y in zip(*(one[:2] for one in found), strict=True))
    options: dict[str, Any] = dict(divergence=entry, temperature=2.0, label_smoothing=0.1)
    assert_told(found[1][2], student, teacher, labels, **options)


def test_real_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(split_rows, "HOST_PROCESSORS", 1)
    student, teacher, labels = make(1, 9000)
    with fastkd.use_backend("gpu"):
        for name in ("kl", "js"):
            entry = fastkd.divergences[name]
            assert_as_good_as_torch(student, teacher, labels, divergence=entry, alpha=0.3)


@pytest.mark.interpreted(1)
@each_number
def test_columns_past_the_vocabulary(parts: int) -> None:
    """Never read as a value, and their gradient is 0: they may be many tiles."""
    student, teacher, labels = make(2, 400)
    student[:, 176:], teacher[:, 176:] = NAN, INF
    labels %= 176
    for name in ("reverse_kl", "tv"):
        entry = fastkd.divergences[name]
        leaf = student.clone().requires_grad_()
        loss = fastkd.distillation_loss(
            leaf, teacher, labels, divergence=entry, alpha=0.3, vocab_size=176
        )
        loss.backward()
        assert leaf.grad is not None and not leaf.grad[:, 176:].any()
        narrow = student[:, :176].clone().requires_grad_()
        alone = fastkd.distillation_loss(
            narrow, teacher[:, :176].contiguous(), labels, divergence=entry, alpha=0.3
        )
        alone.backward()
        assert torch.equal(loss, alone) and torch.equal(leaf.grad[:, :176], narrow.grad)


@pytest.mark.interpreted(2)
@each_number
def test_rows_left_out_are_not_read(parts: int) -> None:
    student, teacher, labels = make(3, 400)
    labels[1] = -100
    student[1], teacher[1] = NAN, INF
    for name in ("kl", "js"):
        leaf = student.clone().requires_grad_()
        loss = fastkd.distillation_loss(leaf, teacher, labels, divergence=name, vocab_size=390)
        loss.backward()
        assert loss.isfinite() and leaf.grad is not None
        assert leaf.grad.isfinite().all() and not leaf.grad[1].any()


@pytest.mark.interpreted(3)
@each
def test_in_place(divergence: Divergence, parts: int) -> None:
    student, teacher, labels = make(2, 300)
    labels %= 290
    call = dict(divergence=divergence, alpha=0.4, label_smoothing=0.1, vocab_size=290)
    apart = differentiate(fastkd.distillation_loss, student, teacher, labels, **call)
    leaf = student.clone().requires_grad_()
    memory = leaf * 1.0  # no leaf may be overwritten
    loss = fastkd.distillation_loss(memory, teacher, labels, inplace=True, **call)
    loss.backward()
    assert torch.equal(loss, apart.value) and torch.equal(leaf.grad, apart.student)


@pytest.mark.interpreted(3)
@each
def test_the_bits_are_the_same_from_run_to_run(divergence: Divergence, parts: int) -> None:
    student, teacher, labels = make(2, 300)
    call = dict(divergence=divergence, alpha=0.4)
    first, second = (
        differentiate(fastkd.distillation_loss, student, teacher, labels, **call) for _ in range(2)
    )
    assert torch.equal(first.value, second.value) and torch.equal(first.student, second.student)


# ---- edges


@pytest.mark.interpreted(3)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_identical_logits_give_exactly_nothing(name: str, dtype: torch.dtype, parts: int) -> None:
    student, _, _ = make(2, 333, dtype)
    student[1] *= 100
    for temperature in (0.3, 1.0, 7.0):
        out = differentiate(
            fastkd.distillation_loss, student, student.clone(), alpha=0.0,
            divergence=name, temperature=temperature,
        )  # fmt: skip
        assert not out.value.any() and out.student is not None and not out.student.any()


@pytest.mark.interpreted(3)
@each
def test_impossible_columns(divergence: Divergence, parts: int) -> None:
    """Some, and all that one program has, on both sides: worth 0 to every divergence."""
    student, teacher, _ = make(2, 384)
    dead = torch.rand(384, device=DEVICE) < 0.3
    dead[:256], dead[-1] = True, False
    student, teacher = (x.masked_fill(dead, -INF) for x in (student, teacher))
    out = assert_as_good_as_torch(student, teacher, divergence=divergence, temperature=2.0)
    assert out.student is not None and not out.student[:, dead].any()


@pytest.mark.interpreted(3)
@each
def test_a_row_of_nothing_and_a_row_of_nan(divergence: Divergence, parts: int) -> None:
    student, teacher, _ = make(4, 320)
    student[0], teacher[0] = -INF, -INF
    student[1, 300] = NAN
    teacher[2, 5] = INF
    out = differentiate(
        fastkd.distillation_loss, student, teacher, alpha=0.0, divergence=divergence,
        reduction="none",
    )  # fmt: skip
    assert out.student is not None and out.value[0] == 0 and not out.student[0].any()
    assert out.value[1:3].isnan().all() and out.student[1:3].isnan().all()
    exact = differentiate(
        plain, oracle(student[3:]), oracle(teacher[3:]), divergence=divergence, temperature=2.0,
        t_squared=True, reduction="none",
    )  # fmt: skip
    assert (out.value[3] - exact.value[0]).abs() <= FLOORS[torch.float32] * exact.value.clamp(min=4)


@pytest.mark.interpreted(2)
@each_number
def test_kl_of_a_probability_that_underflows_is_nothing(parts: int) -> None:
    """An impossible student under one part's maximum that another part's buries."""
    student, teacher, _ = make(1, 900)
    teacher[:, :800] -= 300.0
    student[0, 17] = -INF
    assert fastkd.kl_div(student, teacher).isfinite()
    # and where it does not underflow the loss is infinite, wherever the column lies
    student, teacher, _ = make(1, 900)
    student[0, 890] = -INF
    assert fastkd.kl_div(student, teacher) == INF
