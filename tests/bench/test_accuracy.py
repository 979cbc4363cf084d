"""The report of accuracy: its truth, its statistics and its verdict can all find a fault."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.backends.products import multiplied_in

# bench is no part of the installed package; last, so that an installed fastkd stays the one tested
sys.path.append(str(Path(__file__).parents[2]))

from bench.accuracy import oracle
from bench.accuracy.__main__ import main
from bench.accuracy.points import (
    DISTRIBUTIONS,
    FLOOR,
    Errors,
    Target,
    above,
    batches,
    compare,
    target,
)
from bench.families.loss_cases import DENSE as CASES
from bench.families.loss_cases import Case
from bench.families.loss_providers import PROVIDERS, Call, Provider
from bench.harness import gate

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)


def run(*arguments: str) -> int:
    """The command line in this process, on as little as shows something."""
    small = ["--vocab", "10", "--temperature", "2", "--distributions", "normal"]
    return main([*small, *arguments])


def ldexp(significand: float, exponent: int) -> Any:
    return np.ldexp(np.longdouble(significand), exponent)


# ---- the truth


@each_case
@pytest.mark.parametrize("temperature", [0.5, 2.0, 30.0])
def test_truth_is_the_tables_formula_in_float64(case: Case, temperature: float) -> None:
    assert set(oracle.PAIRS) == set(fastkd.divergences)
    case = case.at(temperature)
    (batch, *_) = batches("normal", 100, torch.float32, CPU)
    x = oracle.sides(batch.student, batch.teacher, temperature)
    ours = oracle.truth(case, batch.student, batch.labels, x)
    table = gate.truth(case, batch)  # type: ignore[arg-type]
    assert float(ours.loss) == pytest.approx(table.loss, rel=1e-11)
    largest = table.grad.abs().max().item()
    np.testing.assert_allclose(ours.grad, table.grad.numpy(), rtol=0, atol=1e-12 * largest)


@pytest.mark.skipif(not oracle.WIDER_THAN_FLOAT64, reason="long double is no wider than float64")
def test_truth_has_digits_where_float64_has_none() -> None:
    student = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    x = oracle.sides(student, student + torch.tensor([[0.0, 1.0]]), 1.0)
    grad = oracle.truth(CASES["kl_div"].at(1.0), student, None, x).grad
    true = np.exp(np.longdouble(-40)) * (np.e - 1)  # to a relative exp(-40)
    assert float(grad[0, 0]) == pytest.approx(float(true), rel=1e-2)
    q, p = (torch.softmax(z, -1) for z in (student, student + torch.tensor([[0.0, 1.0]])))
    assert (q - p)[0, 0] == 0


# ---- what a dtype can hold


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_rounding_is_torchs(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-12, 4, (4000,), generator=generator)
    x = torch.randn(4000, generator=generator) * 10.0**powers
    special = [
        0.0,
        1.0,
        info.tiny,
        1.5 * info.tiny,
        0.5 * info.tiny,
        info.max,
        info.tiny * info.eps,
    ]
    x = torch.cat([x, torch.tensor(special)]).clamp(-info.max, info.max)
    np.testing.assert_array_equal(oracle.rounded(oracle.exact(x), dtype), oracle.exact(x.to(dtype)))


def test_rounding_is_done_once() -> None:
    """1 + 2^-8 + 2^-40 is above the tie of a bfloat16; through a float32 it would be the tie."""
    x = np.array([1 + ldexp(1, -8) + ldexp(1, -40), 1 + ldexp(1, -8)])
    assert oracle.rounded(x, torch.bfloat16).tolist() == [1 + 2**-7, 1.0]
    assert torch.tensor(float(x[0]), dtype=torch.float64).bfloat16().item() == 1.0  # torch's way


# ---- the statistics, on hand-made arrays


def hand_made(dtype: torch.dtype = torch.bfloat16) -> Target:
    """Two batches of one row; gradients 1, 2^-3, 2^-30 (not counted) and 0, 2^-5, -2^-4."""
    grad = np.array([[1.0, 2.0**-3, 2.0**-30], [0.0, 2.0**-5, -(2.0**-4)]], dtype=np.longdouble)
    losses = np.array([2.0, 0.25], dtype=np.longdouble)
    truths = [oracle.Truth(losses[i], grad[i : i + 1]) for i in range(2)]
    even = np.full((2, 3), np.log(np.longdouble(1) / 3))
    x = oracle.Sides(even, even, np.exp(even), np.exp(even))
    return target(CASES["kl_div"].at(1.0), dtype, truths, x)


def judged(
    change: Callable[[Any, Any], None] = lambda losses, grads: None,
    dtype: torch.dtype = torch.bfloat16,
) -> Errors:
    true = hand_made(dtype)
    losses, grads = true.loss.copy(), true.grad.copy()
    change(losses, grads)
    return compare(list(losses), [grads[:1], grads[1:]], true)


def off(row: int, column: int, by: float) -> Callable[[Any, Any], None]:
    def change(losses: Any, grads: Any) -> None:
        grads[row, column] += by

    return change


def test_exact_results_have_no_error() -> None:
    assert judged() == Errors(0, 0, 0, 0, right=4)
    assert hand_made().counted.tolist() == [[True, True, False], [False, True, True]]


def test_a_gradient_is_judged_by_the_largest_of_its_row() -> None:
    found = judged(off(1, 1, 2.0**-9))
    assert found.grad == 2.0**-9 / 2.0**-4
    assert found.grad_ulp == 2.0**-9 / 2.0**-11  # a bfloat16 has 8 bits: 2^-4 * 2^-7
    assert judged(off(0, 1, 2.0**-9)).grad == 2.0**-9
    assert judged(off(1, 1, 2.0**-9), torch.float32).grad_ulp == 2.0**-9 / 2.0**-27


def test_a_gradient_rounded_wrongly_is_counted() -> None:
    assert judged(off(0, 1, 2.0**-10)).right == 3  # the next bfloat16 after 2^-3
    small = judged(off(0, 2, 2.0**-30))  # of no weight, and still not the right one
    assert small.right == 4 and small.grad > 0


def test_a_loss_is_judged_by_itself_or_a_nat() -> None:
    def change(losses: Any, grads: Any) -> None:
        losses += (0.5, 0.5)

    found = judged(change)
    assert found.loss == 0.5  # the worse of 0.5 / 2 and 0.5 / 1 nat
    assert found.loss_ulp == 0.5 / 2.0**-23
    case = CASES["distillation_loss"].at(10.0)
    true = oracle.Truth(np.longdouble(1e-3), np.ones((1, 1), np.longdouble))
    one = oracle.Sides(*(np.ones((1, 1), np.longdouble),) * 4)
    assert target(case, torch.float32, [true], one).scale == [0.5 + 0.5]  # alpha + (1 - alpha)
    bare = target(CASES["kl_div"].at(10.0), torch.float32, [true], one)
    assert float(bare.scale[0]) == pytest.approx(0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_infinite_error(bad: float) -> None:
    assert judged(off(0, 0, bad)).grad_ulp == np.inf

    def change(losses: Any, grads: Any) -> None:
        losses[1] = bad

    assert judged(change).loss == judged(change).loss_ulp == np.inf
    assert above(np.inf, 1e9) and not above(np.inf, np.inf) and not above(1.0, np.inf)


def test_the_floor() -> None:
    assert not above(FLOOR, 0.0) and above(1.01 * FLOOR, 0.0)
    assert above(3.0, 2.9) and not above(3.0, 3.0) and not above(3.0, 2.9, floor=4.0)


def test_where_p_is_q_tv_has_two_right_gradients() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 2.0]])
    other = torch.tensor([[0.0, 1.0, 2.5, 1.0]])  # p = q nowhere
    case = CASES["tv_distance"].at(1.0)
    for teacher, decided in ((logits, False), (other, True)):
        x = oracle.sides(logits, teacher, 1.0)
        true = target(case, torch.float32, [oracle.truth(case, logits, None, x)], x)
        assert true.decided.tolist() == [[decided] * 4]
        flipped = compare(list(true.loss), [-true.grad - 1], true)
        assert (flipped.grad > 0) is decided


def test_where_p_is_q_in_a_heavy_column_the_whole_row_has_two_right_gradients() -> None:
    """The overlap is that column's alone: whether it has a slope decides about every gradient."""
    student, teacher = torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[3.0, 2.0, 0.0]])
    case = CASES["acceptance_loss"].at(1.0)
    x = oracle.sides(student, teacher, 1.0)
    truth = [oracle.truth(case, student, None, x)]
    for logq, decided in ((x.logq, [True] * 3), (x.logp, [False] * 3)):
        heavy = x._replace(logq=np.where([[False, True, False]], logq, x.logq))
        assert target(case, torch.float32, truth, heavy).decided.tolist() == [decided]


def test_an_overlap_too_small_is_a_constant() -> None:
    student, teacher = torch.tensor([[0.0, 80.0]]), torch.tensor([[80.0, 0.0]])
    x = oracle.sides(student, teacher, 1.0)
    true = oracle.truth(CASES["acceptance_loss"].at(1.0), student, None, x)
    assert true.loss == pytest.approx(100 * np.log(2)) and not true.grad.any()


# ---- everything in its place


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[[Tensor], Tensor]) -> None:
    """Replaces a provider by one whose loss goes through `how`."""
    right = PROVIDERS[name]

    def build(case: Case, device: torch.device) -> Call:
        call = right.build(case, device)
        return lambda s, t, labels: how(call(s, t, labels))

    monkeypatch.setitem(PROVIDERS, name, Provider(name, right.about, build, right.ours))


def no_json_extensions(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def document(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(), parse_constant=no_json_extensions)


WORSE: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "loss": (lambda value: value + (0.01 * value).detach(), {"loss"}),
    "gradient": (lambda value: value + 0.01 * (value - value.detach()), {"gradient"}),
    "nan": (lambda value: value * torch.nan, {"loss", "gradient"}),
}


@pytest.mark.parametrize("how", WORSE)
def test_a_provider_made_worse_is_reported(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    change, wrong = WORSE[how]
    # plain torch in the place of ours: it is never above itself
    fair = Provider("fastkd", "", PROVIDERS["eager"].build, ours=True)
    monkeypatch.setitem(PROVIDERS, "fastkd", fair)
    file = tmp_path / "accuracy.json"
    arguments = ["--dtype", "float32", "--providers", "eager,fastkd", "--json", str(file)]
    assert run(*arguments) == 0
    assert "The statement holds." in capsys.readouterr().out
    assert document(file)["violations"] == [] and document(file)["holds"] is True
    spoil(monkeypatch, "fastkd", change)
    assert run(*arguments) == 1
    text = capsys.readouterr().out
    assert "The statement does NOT hold." in text
    found = document(file)
    assert {v["of"] for v in found["violations"]} == wrong
    assert {v["case"] for v in found["violations"]} == set(CASES) and found["holds"] is False
    for case in CASES:
        assert f"- {case} float32, normal, V 10, T 2: " in text


def test_gradients_rounded_wrongly_fail_the_run_though_not_above_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fair = Provider("fastkd", "", PROVIDERS["eager"].build, ours=True)
    monkeypatch.setitem(PROVIDERS, "fastkd", fair)
    arguments = ["--cases", "kl_div", "--providers", "eager,fastkd"]
    assert run(*arguments, "--dtype", "float32") == 0
    assert run(*arguments, "--dtype", "bfloat16") == 1
    text = capsys.readouterr().out
    assert "above torch in 0 of 1 points" in text and "below 99.900 % in kl_div" in text


def test_ours_that_raises_fails_the_run_and_another_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(value: Tensor) -> Tensor:
        raise ArithmeticError("no ground to stand on")

    arguments = ["--cases", "kl_div", "--dtype", "float32", "--providers", "eager,reference"]
    spoil(monkeypatch, "eager", broken)
    assert run(*arguments) == 0
    told = "ArithmeticError: no ground to stand on"
    assert f"eager SKIPPED: kl_div, float32: {told}" in capsys.readouterr().out
    spoil(monkeypatch, "reference", broken)
    assert run(*arguments) == 1
    assert (
        f"reference FAILED: kl_div, float32, normal, V 10, T 2: {told}" in capsys.readouterr().out
    )


def test_a_gradient_rounded_before_its_factor_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a driver would that multiplies what forward has rounded already."""
    kl_div = fastkd.kl_div

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, student: Tensor) -> Tensor:
            return student.view_as(student)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return (grad * 3).to(grad.dtype) / 3 if grad.dtype.itemsize == 2 else grad

    def late(student: Any, *operands: Any, **options: Any) -> Any:
        moved = Late.apply(student) if isinstance(student, Tensor) else student
        return kl_div(moved, *operands, **options)

    arguments = ["--cases", "kl_div", "--dtype", "bfloat16", "--providers", "fastkd"]
    arguments += ["--factors", "0.3,65536"]
    # plain torch, the measure of products in 16 bits, is written for half of the reductions
    exact = multiplied_in(torch.bfloat16, torch.device("cpu")) == torch.float32
    linear = 8 if exact else 4
    assert run(*arguments) == 0
    told = capsys.readouterr().out
    assert "same bits" in told and f"{16 + linear} of {16 + linear} steps within 1.1" in told
    monkeypatch.setattr(fastkd, "kl_div", late)
    assert run(*arguments) == 1
    assert f"{linear} of {16 + linear} steps within 1.1" in capsys.readouterr().out


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "accuracy.json"
    ended = main(["--quick", "--vocab", "10", "--json", str(file)])
    found, said = document(file), capsys.readouterr()
    assert ended == int(not found["holds"]) and found["failures"] == []
    assert found["verdict"] in said.out and len(said.out.splitlines()) < 100
    assert {(r["case"], r["distribution"]) for r in found["results"]} == {
        (case, distribution) for case in CASES for distribution in DISTRIBUTIONS
    }
    assert {r["dtype"] for r in found["results"]} == {"float32", "bfloat16"}
    assert all(set(r["errors"]) == {"eager", "fastkd"} for r in found["results"])
    assert found["settings"]["floor_ulp"] == FLOOR == 0.5
    assert found["settings"]["share"] == {"bfloat16": 0.999}
    assert "wide V 10 bfloat16" in said.err  # progress, away from the tables
