"""The benchmark's gate: what is wrong, raises or is too slow gets no number and fails the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_runs import CPU, KL, results_in, spoil, tables
from torch import Tensor

from bench.__main__ import main
from bench.families import communication, linear, responses, trainer, vocab_parallel
from bench.families.loss_cases import CASES, Case
from bench.families.loss_providers import PROVIDERS, Call
from bench.harness import gate
from bench.harness.family import Shape


def scaled_gradient(call: Call) -> Call:
    """The right loss, its gradient off by a factor."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        value = call(student, teacher, labels)
        return value.detach() + 1.001 * (value - value.detach())

    return loss


def overwriting(call: Call) -> Call:
    """Overwrites the logits that it was not to touch."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        value = call(student, teacher, labels)
        student.data.add_(1.0)
        return value

    return loss


WRONG: dict[str, Callable[[Call], Call]] = {
    "loss": lambda call: lambda s, t, labels: call(s, t, labels) + 1e-4,
    "gradient": scaled_gradient,
    "nan": lambda call: lambda s, t, labels: call(s, t, labels) * math.nan,
    "overwrites": overwriting,
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_fastkd_gets_no_number_and_fails_the_run(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spoil(monkeypatch, "fastkd", WRONG[how])
    file = tmp_path / "wrong.json"
    arguments = ["kl_div", "--toy", "--providers", "eager,fastkd,reference", "--device", "cpu"]
    assert main([*arguments, "--json", str(file)]) == 1
    text = capsys.readouterr().out
    rows = {row[1]: row for row in tables(text)[0][2:]}
    assert set(rows["fastkd"]) == {"3x37", "fastkd", "WRONG", "-"}
    assert "WRONG" not in rows["reference"] and "fastkd WRONG at 3x37: " in text
    (ours,) = (one for one in results_in(file) if one["provider"] == "fastkd")
    assert ours["status"] == "wrong" and ours["note"]
    assert ours["forward_backward_ms"] is None and ours["peak_extra_bytes"] is None


@pytest.mark.parametrize(
    ("name", "status", "code"), [("fastkd", "FAILED", 1), ("eager", "SKIPPED", 0)]
)
def test_a_provider_that_raises(
    name: str,
    status: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(call: Call) -> Call:
        raise ArithmeticError("no ground to stand on")

    spoil(monkeypatch, name, broken)
    arguments = ["kl_div", "--toy", "--providers", "eager,fastkd", "--device", "cpu"]
    assert main(arguments) == code
    text = capsys.readouterr().out
    assert status in text and "ArithmeticError: no ground to stand on" in text


@pytest.mark.parametrize("spoilt", [0, 1, 2], ids=["loss", "hidden", "weight"])
def test_a_wrong_linear_loss_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoilt: int
) -> None:
    def build(case: Case, device: torch.device) -> linear.Step:
        right = linear.linear(case, device)

        def step(inputs: linear.Inputs) -> Any:
            return tuple(x * (1.3 if i == spoilt else 1) for i, x in enumerate(right(inputs)))

        return step

    monkeypatch.setitem(linear.PROVIDERS, "fastkd", build)
    of = ["linear", "kl_div", "--toy", "--providers", "eager,fastkd"]
    assert main([*of, "--dtype", "float32", "--device", "cpu"]) == 1
    assert "fastkd WRONG" in capsys.readouterr().out


def test_what_other_families_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = responses.CASES["logit_mse"]
    wrong = case._replace(ours=lambda s, t, y: 1.01 * case.plain(s, t, y))
    monkeypatch.setitem(responses.CASES, "logit_mse", wrong)
    assert main(["responses", "logit_mse", "--toy", "--device", "cpu"]) == 1
    real = trainer.distill.train
    clipped = lambda *given, **more: real(*given, **more, clip_norm=1e-3)  # noqa: E731
    monkeypatch.setattr(trainer.distill, "train", clipped)
    assert main(["trainer", "--toy"]) == 1
    counted = {name: communication.expected(of) + 1 for name, of in communication.LOSSES.items()}
    monkeypatch.setattr(communication, "count", lambda world, vocab: [counted] * world)
    assert main(["communication", "dense"]) == 1
    text = capsys.readouterr().out
    assert "fastkd WRONG at logit_mse 5x50: error of the loss 1.00e-02" in text
    assert "trainer WRONG at tiny: the losses differ" in text
    assert "fastkd WRONG at dense: counted [3634], by the formula 3633" in text


def test_what_is_too_slow_or_too_much_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = trainer.CASES["tiny"]._replace(counts=True)
    monkeypatch.setitem(trainer.CASES, "tiny", tiny)
    assert main(["trainer", "--toy", "--limit", "-1"]) == 1
    assert "tiny: " in capsys.readouterr().out
    assert main(["communication", "dense", "--limit", "30"]) == 1
    assert main(["store", "--toy", "--device", "cpu", "--limit", "1e9"]) == 1
    assert "below the limit of 1e+09" in capsys.readouterr().out


def test_a_parallel_loss_that_is_wrong_has_no_ratio() -> None:
    sizes = vocab_parallel.Sizes(2, 10, 100, 3, "float32", ("kl",))
    rank = {"ms": [[2.0, 4.0, 3.0]] * 3, "error": 0.0, "bytes": communication.CALL + 640}
    *_, right = vocab_parallel.to_results("kl", [rank | {"calls": 2}] * 2, sizes)
    assert right.figures["ratio"] == 2.0 and right.figures["bytes_per_row"] == 64
    bad = rank | {"calls": 2, "error": math.nan}
    *_, wrong = vocab_parallel.to_results("kl", [rank | {"calls": 2}, bad], sizes)
    assert wrong.status == "wrong" and not wrong.times and wrong.figures["ratio"] is None


def test_truth_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case, toy = CASES["distillation_loss"], linear.SHAPES["toy"][0]
    inputs = case.make_inputs(Shape(7, 11), torch.float32, CPU, 0)
    products = linear.make_inputs(toy, torch.float32, CPU)
    whole, split = gate.truth(case, inputs), linear.truth(KL, products)
    monkeypatch.setattr(gate, "CHUNK", 75)  # some rows at a time, and some left over
    parts, cut = gate.truth(case, inputs), linear.truth(KL, products)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-14)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-13, atol=0)
    torch.testing.assert_close(cut.weight.grad, split.weight.grad)
    wide = [x.double() if x.is_floating_point() else x for x in inputs if x is not None]
    plain = PROVIDERS["eager"].build(case, CPU)(wide[0], wide[1], wide[2])
    assert whole.loss == pytest.approx(plain.item(), rel=1e-12)


def test_error_is_relative_to_the_largest_gradient_and_nan_is_never_within() -> None:
    true = gate.Truth(4.0, torch.tensor([[0.0, -2.0]], dtype=torch.float64))
    found = gate.errors(torch.tensor(5.0), torch.tensor([[0.5, -2.0]]), true)
    assert found == gate.Errors(0.25, 0.25)
    for bad in ([[math.nan, -2.0]], [[0.0, math.nan]]):
        lost = gate.errors(torch.tensor(4.0), torch.tensor(bad), true)
        assert not lost.within(gate.Errors(math.inf, math.inf))
    assert gate.bound(gate.Errors(1.0, 2.0), torch.float32) == gate.Errors(2 + 1e-6, 4 + 1e-6)
    with pytest.raises(ValueError, match="expected \\(1, 2\\)"):
        gate.errors(torch.tensor(4.0), torch.zeros(2), true)
