"""The kernels as PTX, through the public face, against the float64 oracle.

`test_ptx.py` runs a sample of these cases and `make ptx` all of them, in a process of their own
under FASTKD_TEST_PTX.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import stored_teachers
import torch
from common import DTYPES, TABLE
from oracle import assert_as_good_as_torch
from torch import Tensor

import fastkd
from fastkd.backends import base
from fastkd.backends.base import LossSpec, Stats
from fastkd.backends.gpu import BACKEND as gpu
from fastkd.backends.gpu import cooperative, launch
from fastkd.backends.gpu.arguments import constants_of
from fastkd.backends.gpu.tune import Tile
from fastkd.backends.reference import BACKEND as reference
from fastkd.divergence import Divergence
from ptx.launcher import Driver
from ptx.layouts import ROWS, Layout, each_layout, random, two_layouts

each = pytest.mark.parametrize("divergence", TABLE, ids=lambda entry: entry.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
pytestmark = pytest.mark.filterwarnings("error:.*computes each wide row")


@pytest.fixture(autouse=True)
def backend(ptx: Driver) -> Iterator[None]:
    with fastkd.use_backend("gpu"):
        yield
    # a row is read as it is computed: no tile goes through shared memory to change its layout
    through = ("ldmatrix", "stmatrix", "st.shared.v")
    assert not [op for run in ptx.runs for op in run.counts if op.startswith(through)]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 threads, whatever the width: small rows are several of them."""
    monkeypatch.setattr(launch, "tile", lambda vocab, size, *_: Tile(64, 16 // size, 64))


def kernels(ptx: Driver) -> set[str]:
    return {run.kernel.removesuffix("_kernel") for run in ptx.runs}


@pytest.mark.interpreted(4)
@each
@each_dtype
@each_layout
def test_divergences(
    divergence: Divergence,
    dtype: torch.dtype,
    layout: Layout,
    narrow: None,
    ptx: Any,
) -> None:
    assert_as_good_as_torch(layout(dtype), layout(dtype), divergence=divergence, temperature=2.0)
    assert kernels(ptx) >= {"fused", "total"}


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("name", ["kl", "js", "tv", "topk"])
@each_dtype
@pytest.mark.parametrize("vocab", [331, 704])
def test_batch_invariance(
    name: str, dtype: torch.dtype, vocab: int, narrow: None, ptx: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Wherever its rows begin and however many there are: the same layouts, the same bits."""
    monkeypatch.setattr(base, "_INVARIANT", True)

    def run(student: Tensor, teacher: Any) -> Tensor:
        leaf, labels = student.detach().requires_grad_(), torch.full((student.size(0),), 7)
        divergence, temperature = ("kl", 1.0) if name == "topk" else (name, 2.0)
        if name == "topk":
            teacher = fastkd.topk_from_logits(teacher.float(), 9)
        loss = fastkd.distillation_loss(
            leaf, teacher, labels, divergence=divergence, temperature=temperature,
            label_smoothing=0.1, reduction="none",
        )  # fmt: skip
        loss.sum().backward()
        assert leaf.grad is not None
        return torch.cat((loss.detach()[:, None], leaf.grad.float()), 1)

    padded = torch.zeros(2, ROWS, vocab + 48 - vocab % 16, dtype=dtype)[..., :vocab]
    shifted = random(dtype, 2, ROWS, vocab + 1)[..., 1:]
    expected = run(*padded.copy_(shifted).unbind())
    assert torch.equal(run(*shifted.unbind()), expected)
    assert torch.equal(run(padded[0, 1:], shifted[1, 1:]), expected[1:])
    assert torch.equal(run(*shifted[:, 1:].contiguous().unbind()), expected[1:])
    seen = {constants_of(run.args).get("UNALIGNED") for run in ptx.runs}
    assert seen - {None} == {2, 3}


@pytest.mark.interpreted(1)
@each
@each_dtype
def test_tiles_of_the_table(divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = random(dtype, ROWS, 1100), random(dtype, ROWS, 1100)
    assert_as_good_as_torch(student, teacher, divergence=divergence)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "tv"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@two_layouts
def test_labels(name: str, smoothing: float, z_loss: float, layout: Layout, narrow: None) -> None:
    student, teacher = layout(torch.bfloat16), layout(torch.bfloat16)
    assert_as_good_as_torch(
        student, teacher, torch.tensor([student.size(1) - 1, -100]),
        divergence=fastkd.divergences[name], temperature=2.0, alpha=0.3, t_squared=True,
        label_smoothing=smoothing, z_loss=z_loss,
    )  # fmt: skip


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("name", ["kl", "js"])
@pytest.mark.parametrize("pair", [("fp32", "bf16"), ("fp16", "fp32"), ("fp64", "fp64")])
def test_dtypes_that_differ(name: str, pair: tuple[str, str], narrow: None) -> None:
    student, teacher = (random(DTYPES[x], ROWS, 300) for x in pair)
    assert_as_good_as_torch(student, teacher, divergence=fastkd.divergences[name])


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("name", ["kl", "js", "skew_kl"])
def test_impossible_columns_and_rows(name: str, narrow: None) -> None:
    student, teacher = random(torch.float32, 3, 300), random(torch.float32, 3, 300)
    student[:2, 7:200], teacher[:2, 7:200] = -torch.inf, -torch.inf
    teacher[2, 1:] = -torch.inf
    assert_as_good_as_torch(student, teacher, divergence=fastkd.divergences[name])


@pytest.mark.interpreted(1)
@each
@each_layout
def test_in_place(divergence: Divergence, layout: Layout, narrow: None, ptx: Any) -> None:
    """The gradient lies in the student's memory, and is multiplied there by what comes later."""
    student, teacher = layout(torch.bfloat16), layout(torch.bfloat16)

    def run(inplace: bool) -> Tensor:
        leaf = student.clone().requires_grad_()
        computed = leaf * 1
        loss = fastkd.distillation_loss(
            computed, teacher, alpha=0.0, divergence=divergence, inplace=inplace
        )
        (2 * loss).backward()
        assert leaf.grad is not None
        return leaf.grad

    apart = run(False)
    assert torch.equal(run(True), apart)
    assert "multiply" in kernels(ptx)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("name", ["kl", "js", "topk"])
def test_one_rounding(name: str, narrow: None, ptx: Any) -> None:
    """Backward's kernel leaves at once where the remembered factor holds; the bits are the same."""

    def step(vocab: int, factor: float) -> tuple[int, Tensor]:
        """(instructions of backward's kernel, gradient) of one step of a loop."""
        torch.manual_seed(vocab)
        student, teacher = random(torch.bfloat16, 2, ROWS, vocab).unbind()
        given: Any = fastkd.topk_from_logits(teacher.float(), 9) if name == "topk" else teacher
        leaf = student.requires_grad_()
        divergence = "kl" if name == "topk" else name
        loss = fastkd.distillation_loss(
            leaf, given, alpha=0.0, temperature=1.0, divergence=divergence
        )
        begun = len(ptx.runs)
        (factor * loss).backward()
        (run,) = ptx.runs[begun:]
        assert run.kernel == ("topk_kernel" if name == "topk" else "fused_kernel")
        assert leaf.grad is not None
        with fastkd.use_backend("reference"):
            exact = student.detach().double().requires_grad_()
            (
                factor
                * fastkd.distillation_loss(
                    exact, given, alpha=0.0, temperature=1.0, divergence=divergence
                )
            ).backward()
        assert exact.grad is not None
        # one rounding: nearly every element is the exact one's nearest
        assert (leaf.grad == exact.grad.to(torch.bfloat16)).double().mean() > 0.98
        return sum(run.counts.values()), leaf.grad

    counted = []
    for vocab, factor in ((512, 21845.3), (1536, 0.37)):
        # a loss is known again by the lines that call it
        (missed, first), (held, second) = [step(vocab, factor) for _ in range(2)]
        assert torch.equal(first, second)
        counted.append((missed, held))
    (missed, held), (missed_wide, held_wide) = counted
    assert held == held_wide < missed / 20 and missed_wide > 1.2 * missed


@pytest.mark.interpreted(2)
@each
@stored_teachers.each_tail
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, 331), (torch.bfloat16, 512)])
def test_topk(
    divergence: Divergence, tail: str, dtype: torch.dtype, vocab: int, narrow: None, ptx: Any
) -> None:
    student, teacher = random(dtype, ROWS, vocab), random(torch.float32, ROWS, vocab)
    stored = stored_teachers.stored(teacher, 9, tail)
    labels = torch.tensor([3, vocab - 1])
    stored_teachers.assert_as_good_as_torch(
        student, stored, labels, divergence=divergence, temperature=1.0, alpha=0.3
    )
    assert "topk" in kernels(ptx)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("name", ["kl", "js"])
@pytest.mark.parametrize("form", ["linear-student", "linear"])
def test_linear(name: str, form: str, narrow: None) -> None:
    """Chunks of rows, of which the last is short."""
    student, teacher = random(torch.float32, 3, 300), random(torch.float32, 3, 300)
    assert_as_good_as_torch(student, teacher, form=form, divergence=fastkd.divergences[name])


@pytest.mark.interpreted(2)
@pytest.mark.parametrize(
    ("name", "dtype", "start"),
    [("kl", "bf16", 0), ("reverse_kl", "fp32", 1), ("js", "bf16", 3), ("kl", "fp64", 0)],
)
def test_logits_one_by_one(name: str, dtype: str, start: int, ptx: Any) -> None:
    """Two tiles: of the second a few logits, or all of them off a boundary and with factors."""
    n, own = 2048 + (40 if start else 3), DTYPES[dtype]
    s, t = (random(own, n + start)[start:].view(-1, 8 if start else 1) for _ in range(2))
    y = torch.rand(n + start, dtype=torch.float64 if dtype == "fp64" else torch.float32)
    y[::5], y[7] = -100.0, torch.nan
    options: dict[str, Any] = dict(divergence=name, temperature=3.0)
    if start:
        options |= dict(weight=torch.rand(s.size(0), 1), pos_weight=torch.rand(8))
    results = []
    for backend in ("gpu", "reference"):
        of = [x.detach().double() if backend == "reference" else x.detach() for x in (s, t)]
        leaves = [x.requires_grad_() for x in of]
        with fastkd.use_backend(backend):
            for _ in range(2):  # a wrong guess of the factor, and a right one
                loss = fastkd.binary_distillation_loss(*leaves, y[start:].view_as(s), **options)
                grads = torch.autograd.grad(1.7 * loss, leaves)
                results.append((loss.detach(), *grads))
    for first, again, true in zip(*results[:3], strict=True):
        assert torch.equal(first, again)
        at = {torch.bfloat16: 2.0**-8, torch.float32: 2e-6, torch.float64: 1e-13}[first.dtype]
        bound = float(true.abs().max()) * 2e-6
        torch.testing.assert_close(first.double(), true.double(), rtol=at, atol=bound)
    assert kernels(ptx) == {"bernoulli", "count_elements", "total"}
    runs = [sum(run.counts.values()) for run in ptx.runs if run.kernel == "bernoulli_kernel"]
    assert len(runs) == 4 and runs[3] < runs[1] / 20


# ---- several programs to a row


@pytest.mark.interpreted(1)
@each
@each_dtype
@two_layouts
def test_split_rows(
    divergence: Divergence, dtype: torch.dtype, layout: Layout, narrow: None, ptx: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(launch.split_rows, "programs_per_row", lambda *of: 3)
    student, teacher = layout(dtype), layout(dtype)
    labels = torch.tensor([2, student.size(1) - 1])
    assert_as_good_as_torch(
        student, teacher, labels, divergence=divergence, temperature=2.0, alpha=0.3
    )
    assert kernels(ptx) >= {"split_sums", "split_finish", "split_grad"}


@pytest.mark.interpreted(1)
@each
@each_dtype
@two_layouts
def test_cooperative(
    divergence: Divergence, dtype: torch.dtype, layout: Layout, narrow: None, ptx: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cooperative, "programs_per_row", lambda *of: 3)
    labels = torch.tensor([2, -100])
    for seed, resident in ((0, 4), (1, 3)):
        ptx.seed, ptx.resident = seed, resident
        assert_as_good_as_torch(
            layout(dtype), layout(dtype), labels, divergence=divergence, temperature=2.0, alpha=0.3
        )
    assert "cooperative" in kernels(ptx)


# ---- the passes apart, as ranks that share a vocabulary run them


@pytest.mark.interpreted(1)
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@two_layouts
def test_unfused(
    divergence: Divergence,
    dtype: torch.dtype,
    layout: Layout,
    narrow: None,
    ptx: Any,
) -> None:
    student, teacher = layout(dtype)[None], layout(dtype)[None]
    vocab = student.size(2)
    spec = LossSpec(divergence.name, divergence.param, 2.0, 0.7, 0.3, 0.1, vocab, vocab)
    rows = base.Rows(None, torch.tensor([1, vocab - 1]), torch.tensor([0.5, 2.0]))

    def run(passes: Any, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        stats = Stats(
            *(passes.stats(x, at, vocab, None) for x, at in ((s, 2.0), (t, 2.0), (s, 1.0)))
        )
        sums = passes.loss(s, t, stats, spec, rows)
        grad = torch.empty_like(s)
        passes.grad(s, t, stats, sums, spec, rows, grad)
        return sums, grad

    sums, grad = run(gpu, student, teacher)
    true, true_grad = run(reference, student.double(), teacher.double())
    torch.testing.assert_close(sums.double(), true, rtol=1e-5, atol=1e-5)
    bound = float(true_grad.abs().max()) * (2**-7 if dtype == torch.bfloat16 else 1e-5)
    torch.testing.assert_close(grad.double(), true_grad, rtol=0, atol=bound)
    assert kernels(ptx) >= {"stats", "loss", "grad"}


# ---- the order in which `bench.l2` simulates the cache


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("divergence", [fastkd.divergences.kl, fastkd.divergences.js])
def test_the_order_of_tiles_is_what_the_cache_is_simulated_with(
    divergence: Divergence, narrow: None, ptx: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row, as one program takes it: tiles of 512 columns, the last of which is partial."""
    from bench.l2 import GRAD, STUDENT, TEACHER, order
    from ptx.memory import Global

    def runs(tiles: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Without what repeats: several loads of a tile, or a loop that begins where one ends."""
        return [x for i, x in enumerate(tiles) if x not in tiles[max(0, i - 2) : i]]

    seen: list[tuple[int, int]] = []
    size = 64 * 16
    operands = {"student.pointer": STUDENT, "teacher.pointer": TEACHER, "grad.pointer": GRAD}

    def count(memory: Global, offset: Any, warp: Any, kind: str) -> None:
        for name, start, stop in zip(memory.names, memory.starts, memory.stops, strict=True):
            if name in operands and start <= offset[0] < stop:
                seen.append((operands[name], int((offset.min() - start) // size)))

    monkeypatch.setattr(Global, "count", count)
    student, teacher = (random(torch.bfloat16, 1, 4 * size // 2 + 64) for _ in range(2))
    fastkd.distillation_loss(student.requires_grad_(), teacher, alpha=0, divergence=divergence)
    expected = [
        (one.operand, one.tile)
        for step in order(0, 4, 5, divergence.expectation is not None)
        for one in step
    ]
    assert runs(seen) == runs(expected)
