"""Response losses: wrong arguments, and as terms of a loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from common import (
    INF,
    INPUTS,
)
from response_losses import BY_NAME, LOSSES, PER_ROW, Loss, Made, classes, each, run

from fastkd import distill
from fastkd.distill.batch import Batch, Outputs
from fastkd.distill.objective import Objective

HEATED = [loss for loss in LOSSES if loss.temperature]


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_missing_labels(name: str) -> None:
    with pytest.raises(ValueError, match="labels: got None, expected"):
        BY_NAME[name].ours(torch.randn(2, 3), torch.randn(2, 3), None)


S, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@each(LOSSES)
@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        ((S, S[:, :2], Y), ValueError, r"teacher: got shape \[2, 2\], expected the student's"),
        ((S, S[:1], Y), ValueError, r"teacher: got shape \[1, 3\], expected the student's"),
        ((S.long(), S, Y), TypeError, "student: got torch.int64, expected logits in"),
        ((S, None, Y), TypeError, "teacher: got NoneType, expected a tensor of logits"),
        ((S[:, :0], S[:, :0], Y), ValueError, r"student: got shape \[2, 0\]"),
        ((S, S.to("meta"), Y), ValueError, "teacher: got a tensor on meta"),
        ((S, S, Y.float()), TypeError, "labels: got torch.float32, expected integers"),
        ((S, S, Y[:1]), ValueError, r"labels: got shape \[1\], expected \[2\]"),
        ((S, S, Y + 3), ValueError, "labels: got 3 in row 0, expected 0 <= label < 3"),
    ],
)
def test_wrong_operands(
    loss: Loss, operands: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss.ours(*operands)


@each(HEATED)
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, INF, True, "4"])
def test_wrong_temperature(loss: Loss, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="temperature: got"):
        loss.ours(S, S, Y, temperature=value)


@pytest.mark.parametrize(
    ("name", "option"),
    [("dkd", "alpha"), ("dkd", "beta"), ("nkd", "gamma"), ("dist", "beta"), ("dist", "gamma")],
)
@pytest.mark.parametrize("value", [-1.0, INF, "1"])
def test_wrong_coefficient(name: str, option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{option}: got"):
        BY_NAME[name].ours(S, S, Y, **{option: value})


@each(PER_ROW)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction: got 'max', expected one of mean"),
        ({"weight": Y}, "weight: got torch.int64, expected floats"),
        ({"weight": S}, r"weight: got shape \[2, 3\], expected \[2\]"),
        ({"normalizer": -1}, "normalizer: got -1, expected"),
        ({"normalizer": S}, r"normalizer: got shape \[2, 3\], expected 0-d"),
        ({"normalizer": 2, "reduction": "sum"}, "normalizer: got one with reduction='sum'"),
        ({"vocab_size": 4}, "vocab_size: got 4, expected 1 <= vocab_size <= 3"),
        ({"vocab_size": 2.0}, "vocab_size: got 2.0, expected an integer"),
        ({"wieght": S}, r"unexpected options \['wieght'\], has .* mean 'weight'\?"),
    ],
)
def test_wrong_options(loss: Loss, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        loss.ours(S, S, Y, **options)


@each(LOSSES)
def test_term(loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    s.requires_grad_()
    term = distill.response(loss.ours, 2.0, rows="labelled")
    total, (value,) = Objective([term])(Outputs(s), Outputs(t), Batch(s, y, samples=7))
    assert term.name == loss.name and value == loss.ours(s, t, y) and total == 2 * value


def test_term_of_all_rows_and_a_schedule() -> None:
    s, t = INPUTS["random"](7, 10)
    term = distill.response(distill.zscore, temperature=lambda step: 1.0 + step, name="soft")
    batch = Batch(s, classes(7, 10), samples=7, step=3)
    assert term.name == "soft" and term.mean == "samples"
    assert term.function(Outputs(s), Outputs(t), batch) == distill.zscore(s, t, temperature=4.0)
    with pytest.raises(ValueError, match="term 'soft': got no teacher"):
        term.function(Outputs(s), Outputs(None), batch)


def test_term_with_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"dkd: .* options \['gamma'\], has alpha, beta, "):
        distill.response(distill.dkd, gamma=1.0)
    with pytest.raises(TypeError, match=r"dkd: .*\['tempreature'\].* mean 'temperature'\?$"):
        distill.response(distill.dkd, tempreature=1.0)
    with pytest.raises(ValueError, match="rows: got 'all' for nkd, expected 'labelled'"):
        distill.response(distill.nkd, rows="all")
    with pytest.raises(ValueError, match="rows: got 'some' for cosine, expected 'all' or"):
        distill.response(distill.cosine, rows="some")


@each([BY_NAME["dkd"], BY_NAME["logit_mse"]])
def test_term_is_exact_over_micro_batches(loss: Loss) -> None:
    """Ragged masks: the gradient of a step is that of the whole batch."""
    inputs, teacher = torch.randn(8, 5), torch.nn.Linear(5, 4)
    y = torch.tensor([0, -100, -100, 1, 2, 3, -100, 0])
    first = torch.nn.Linear(5, 4)
    ends = []
    for size in (8, 2):
        student = torch.nn.Linear(5, 4)
        student.load_state_dict(first.state_dict())
        distill.train(
            student,
            list(zip(inputs.split(size), y.split(size), strict=True)),
            distill.response(loss.ours, rows="labelled"),
            teacher=teacher,
            accumulate=8 // size,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            epochs=1,
            progress=False,
        )
        ends.append(student.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(ends[0], first.weight)


def test_compiled() -> None:
    """One graph: torch sees the formula, not the chunks."""
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    for loss in LOSSES:
        whole = torch.compile(loss.ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(whole, s, t, y), run(loss.ours, s, t, y))


def test_memory_of_a_trip_is_one_gradient() -> None:
    """Beside the gradient nothing of the operands' size is made."""
    s, t = INPUTS["random"](64, 16_384)
    for loss in PER_ROW:
        with Made() as made:
            run(loss.ours, s, t, torch.zeros(64, dtype=torch.long))
        assert sum(size >= s.numel() for size in made.sizes) == 1, loss.name
