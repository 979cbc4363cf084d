"""The C++ extension: every instruction set by name, its arithmetic, its tails, its choice."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from types import ModuleType

import pytest
import ranks
import torch
from common import (
    EXACT,
    INPUTS,
    Backend,
    each_divergence,
    each_name,
    each_pair,
    logits,
    require,
)
from oracle import assert_as_good_as_torch, differentiate
from told import assert_told
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

CPU = Backend("cpu", torch.device("cpu"))
LANES = 16  # of the widest instruction set in float32
BLOCK = 2048
KNOWN = ["baseline", "avx2", "avx512"]


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    require("cpu")
    from fastkd import _C

    return _C


@pytest.fixture(params=KNOWN)
def isa(request: pytest.FixtureRequest, extension: ModuleType) -> Iterator[str]:
    """Every instruction set that this processor runs, in force for the test."""
    if request.param not in extension.isas():
        pytest.skip(f"this processor has no {request.param}")
    before = extension.isa()
    extension.use_isa(request.param)
    try:
        with fastkd.use_backend("cpu"):
            assert extension.isa() == request.param
            yield request.param
        assert extension.isa() == request.param
    finally:
        extension.use_isa(before)


# ---- every instruction set computes the losses


@each_divergence
@each_pair
def test_losses(isa: str, divergence: Divergence, pair: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = logits(CPU, 3, 1100, pair)
    labels = torch.tensor([0, 1023, 1099])
    assert_as_good_as_torch(
        student,
        teacher,
        labels,
        divergence=divergence,
        alpha=0.3,
        temperature=2.0,
        label_smoothing=0.1,
        reduction="none",
        wrt="both",
    )


@each_name
@each_pair
def test_outputs(isa: str, divergence: Divergence, pair: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = logits(CPU, 3, 2 * BLOCK + 17, pair)
    student[1, 3 * BLOCK // 2 :] += 9.0
    labels = torch.tensor([2 * BLOCK + 16, -100, 0])
    options = {"divergence": divergence, "temperature": 2.0, "label_smoothing": 0.1}
    _, outputs = fastkd.distillation_loss(student, teacher, labels, return_outputs=True, **options)
    assert_told(outputs, student, teacher, labels, **options)


@each_name
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_inputs(isa: str, divergence: Divergence, make: object) -> None:
    student, teacher = logits(CPU, 4, 75, make=make)
    assert_as_good_as_torch(student, teacher, divergence=divergence, reduction="none")


@pytest.mark.parametrize("name", EXACT)
def test_identical_logits_give_exactly_nothing(isa: str, name: str) -> None:
    for vocab in (*range(1, 2 * LANES + 2), 1023, 1025, 5000):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            student = (5 * torch.randn(2, vocab)).to(dtype)
            ours = differentiate(
                fastkd.distillation_loss,
                student,
                student.clone(),
                alpha=0.0,
                divergence=name,
                temperature=1.7,
            )
            assert ours.value == 0 and not ours.student.any(), (vocab, dtype)


TAILS = [*range(1, 2 * LANES + 2), *(at + i for at in (1024, BLOCK) for i in (-17, -1, 0, 1, 2))]


@each_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_tails(isa: str, divergence: Divergence, dtype: torch.dtype) -> None:
    for vocab in TAILS:
        student, teacher = logits(CPU, 2, vocab, (dtype, dtype))
        assert_as_good_as_torch(student, teacher, divergence=divergence, reduction="none")


def _guarded(rows: int, vocab: int, dtype: torch.dtype, start: int) -> tuple[Tensor, Tensor]:
    """(storage full of NaN, a view in its middle that starts `start` elements late)."""
    storage = torch.full((rows * (vocab + 5) + 64 + start,), float("nan"), dtype=dtype)
    view = storage[32 + start :].as_strided((rows, vocab), (vocab + 5, 1), 32 + start)
    view.copy_(3 * torch.randn(rows, vocab))
    return storage, view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("start", [0, 1, 3, 7])
def test_nothing_is_read_or_written_beside_unaligned_rows(
    isa: str, dtype: torch.dtype, start: int
) -> None:
    """In place, between guards of NaN: they neither reach the result nor are they overwritten."""
    for vocab in (1, 7, LANES, LANES + 1, 1025):
        storage, view = _guarded(3, vocab, dtype, start)
        _, teacher = _guarded(3, vocab, dtype, start + 1)
        usual = differentiate(fastkd.js_div, view.clone(), teacher.clone())
        owner = storage.requires_grad_() * 1
        inside = owner.as_strided(view.shape, view.stride(), view.storage_offset())
        loss = fastkd.js_div(inside, teacher, inplace=True)
        assert torch.equal(loss, usual.value)
        loss.backward()
        kept = owner.detach().as_strided(view.shape, view.stride(), view.storage_offset())
        assert torch.equal(kept, usual.student)
        kept.fill_(float("nan"))
        assert owner.isnan().all()


# ---- exp2 and log


def _ulp(ours: Tensor, exact: Tensor) -> float:
    """Largest error in units in the last place of the exact result, rounded to float32."""
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), exponent - 24)
    return float(((ours.double() - exact).abs() / unit).max())


EXP2_RANGES = [(-1.0, 1.0), (-24.0, 1.0), (-126.0, 1.0), (-1e-6, 1e-6)]
LOG_RANGES = [(0.5, 2.0), (1 - 1e-4, 1 + 1e-4), (1.2e-38, 1e-30), (1.0, 1e30), (1e-3, 10.0)]


@pytest.mark.parametrize("ends", EXP2_RANGES, ids=str)
def test_ulp_of_exp2(isa: str, extension: ModuleType, ends: tuple[float, float]) -> None:
    from fastkd.backends import cpu

    x = torch.cat((torch.linspace(*ends, 400_000), torch.empty(400_000).uniform_(*ends)))
    error = _ulp(cpu.exp2(x), x.double().exp2())
    assert error <= extension.math_error_bounds()["exp2"]


@pytest.mark.parametrize("ends", LOG_RANGES, ids=str)
def test_ulp_of_log(isa: str, extension: ModuleType, ends: tuple[float, float]) -> None:
    from fastkd.backends import cpu

    low, high = (torch.tensor(end, dtype=torch.float64).log() for end in ends)
    even, odd = torch.linspace(*ends, 400_000), torch.empty(400_000).double().uniform_(low, high)
    x = torch.cat((even, odd.exp().float()))
    x = x[(x >= torch.finfo(torch.float32).tiny) & (x != 1)]
    assert _ulp(cpu.log(x), x.double().log()) <= extension.math_error_bounds()["log"]


def test_math_at_its_ends(isa: str) -> None:
    from fastkd.backends import cpu

    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, 1.0, -1.0, -126.0, -128.0, -1e9, -inf, nan])
    expected = torch.tensor([1.0, 2.0, 0.5, 2.0**-126, 0.0, 0.0, 0.0, nan])
    torch.testing.assert_close(cpu.exp2(x), expected, rtol=0, atol=0, equal_nan=True)
    logs = cpu.log(torch.tensor([1.0, 0.0, 1e-40]))
    assert logs[0] == 0 and logs.isfinite().all()


def test_bounds_are_few_ulp(extension: ModuleType) -> None:
    bounds = extension.math_error_bounds()
    assert set(bounds) >= {"exp2", "log"} and all(0.5 <= ulp <= 4 for ulp in bounds.values())


# ---- half precision, bit by bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_half_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    """All 65536 patterns: stats of single columns are (x, 1, 0)."""
    from fastkd.backends import cpu

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    stats = cpu.BACKEND.stats(every.view(1, -1, 1), 1.0, 1, None)
    assert torch.equal(stats[:, 0], every.float())
    assert (stats[:, 1] == 1).all() and (stats[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_half_is_written_rounded_to_nearest(isa: str, dtype: torch.dtype) -> None:
    """x * k over all patterns, as torch rounds it (ties to even, overflow to inf)."""
    from fastkd.backends import cpu

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for k in (0.7, 1.0009765625, 3.0):
        ours = every.clone().view(1, 1, -1)
        cpu.BACKEND.multiply(ours, torch.tensor(k))
        expected = (every.float() * torch.tensor(k)).to(dtype)
        assert torch.equal(ours.flatten(), expected)


# ---- which one runs


def test_isas_are_the_best_last(extension: ModuleType) -> None:
    isas = extension.isas()
    assert isas[0] == "baseline" and isas == [name for name in KNOWN if name in isas]


def test_unknown_isa(extension: ModuleType) -> None:
    running = extension.isa()
    with pytest.raises(ValueError, match=r"'sse9'.*baseline"):
        extension.use_isa("sse9")
    assert extension.isa() == running


@pytest.mark.parametrize("name", KNOWN)
def test_isa_from_the_environment(extension: ModuleType, name: str) -> None:
    if name not in extension.isas():
        pytest.skip(f"this processor has no {name}")
    code = (
        "import torch, fastkd; x = torch.randn(2, 5); fastkd.kl_div(x, x + 1);"
        "from fastkd import _C; print(_C.isa(), fastkd.info()['cpu']['isa'])"
    )
    ran = ranks.python(code, FASTKD_ISA=name)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [name, name]


def test_bad_isa_in_the_environment(extension: ModuleType) -> None:
    code = "import torch, fastkd; fastkd.kl_div(torch.ones(2, 5), torch.ones(2, 5))"
    ran = ranks.python(code, FASTKD_ISA="sse9")
    assert ran.returncode != 0
    for part in ("FASTKD_ISA", "'sse9'", *extension.isas()):
        assert part in ran.stderr.splitlines()[-1]


def test_unavailable_extension_is_said_and_the_reference_runs() -> None:
    """As on a machine without a compiler: one warning, the same values; by name an error."""
    code = (
        "import sys, warnings; sys.modules['fastkd._C'] = None\n"
        "import torch, fastkd\n"
        "x = torch.randn(3, 7, requires_grad=True)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): fastkd.kl_div(x, torch.ones(3, 7)).backward()\n"
        "print(len(said), said[0].message)\n"
        "try:\n"
        "    with fastkd.use_backend('cpu'): fastkd.kl_div(x, x)\n"
        "except RuntimeError as error: print(error)\n"
    )
    ran = ranks.python(code)
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.splitlines()
    assert first.startswith("1 ") and "reference" in first and "'cpu'" in second


def test_symbols_of_one_instruction_set_are_no_others(extension: ModuleType) -> None:
    """No weak symbol of the kernels: the linker must not choose between instruction sets."""
    try:
        listed = subprocess.run(
            ["nm", "-C", "--defined-only", extension.__file__], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no nm here")
    weak = [line for line in listed.stdout.splitlines() if line.split()[1:2] in (["W"], ["V"])]
    assert not [
        line for line in weak if "fastkd::" in line and any(f"::{n}::" in line for n in KNOWN)
    ]


FORK = """
import os, signal, torch, fastkd
torch.set_num_threads(2)
student, teacher = torch.randn(64, 4000), torch.randn(64, 4000)
def loss():
    x = student.detach().requires_grad_()
    value = fastkd.kl_div(x, teacher)
    value.backward()
    # bytes: torch's own parallel comparison would not end in a child either
    return value.detach().numpy().tobytes(), x.grad.numpy().tobytes()
parents = loss()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if loss() == parents else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_the_same() -> None:
    """A DataLoader's worker: OpenMP's threads are not there, and waiting for them has no end."""
    require("cpu")
    done = ranks.python(FORK)
    assert done.returncode == 0
