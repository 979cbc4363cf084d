"""The benchmark of linear losses: it runs, a wrong provider is caught, its arithmetic is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # bench is no part of the installed package

from bench import linear

CPU = torch.device("cpu")
TOY = linear.SHAPES["toy"][0]


def _run(*arguments: str) -> int:
    return linear.main([*arguments, "--device", "cpu", "--toy"])


def test_every_case_runs_and_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "linear.json"
    assert _run(*linear.SOFT, "--dtype", "float32,bfloat16", "--json", str(file)) == 0
    records = json.loads(file.read_text())["results"]
    cases = {(record["case"], record["dtype"]) for record in records}
    assert cases == {(name, dtype) for name in linear.SOFT for dtype in ("float32", "bfloat16")}
    for record in records:
        timed = record["provider"] != "liger"
        assert (record["time"] is not None) == timed and (record["status"] == "ok") == timed
    said = capsys.readouterr().out
    assert "| products " in said and "liger SKIPPED: Liger-Kernel needs a GPU" in said


@pytest.mark.parametrize("spoilt", ["loss", "hidden", "weight"])
def test_a_wrong_provider_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoilt: str
) -> None:
    def build(case: linear.Case, device: torch.device) -> linear.Step:
        right = linear.linear(case, device)

        def step(inputs: linear.Inputs) -> tuple[Tensor, Tensor, Tensor]:
            loss, hidden, weight = right(inputs)
            by = {name: 1.3 if name == spoilt else 1.0 for name in ("loss", "hidden", "weight")}
            return loss * by["loss"], hidden * by["hidden"], weight * by["weight"]

        return step

    monkeypatch.setitem(linear.PROVIDERS, "fastkd", build)
    assert _run("--dtype", "float32") == 1
    said = capsys.readouterr().out
    assert "fastkd WRONG" in said and "\n| fastkd  " not in said


def test_a_failing_provider_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(case: linear.Case, device: torch.device) -> linear.Step:
        raise ZeroDivisionError("no")

    monkeypatch.setitem(linear.PROVIDERS, "eager-2", build)
    assert _run("--providers", "eager-2,fastkd") == 0  # somebody else's
    monkeypatch.setitem(linear.PROVIDERS, "fastkd", build)
    assert _run("--providers", "fastkd") == 1


def test_the_products_are_those_of_the_flop() -> None:
    """Counted by torch itself."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        linear.bare_products(linear.make_inputs(TOY, torch.float32, CPU))()
    assert counter.get_total_flops() == TOY.flop


def test_truth_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = linear.make_inputs(TOY, torch.float32, CPU)
    whole = linear.truth(linear.SOFT["js_div"], inputs)
    monkeypatch.setattr(linear.gate, "CHUNK", 2 * TOY.vocab)
    cut = linear.truth(linear.SOFT["js_div"], inputs)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
    torch.testing.assert_close(cut.weight.grad, whole.weight.grad)
    torch.testing.assert_close(cut.hidden.grad, whole.hidden.grad)


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "linear.png"
    shapes = "2x9:4x4,4x9:4x4,4x17:4x4"
    assert _run("--shapes", shapes, "--providers", "eager,fastkd", "--plot", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shapes", ["512", "512x100", "0x9:4x4", "", "huge"])
def test_shapes_of_another_form(shapes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _run("--shapes", shapes)
    assert "shapes: got" in capsys.readouterr().err


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _run("distillation_loss")
    assert "'distillation_loss'" in capsys.readouterr().err
