"""Losses that are not finite, bad options, mixed precision and noise."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_runs import equal, mlp, quiet, weights

from fastkd import distill
from fastkd.distill import Batch, Outputs, Term


def test_loss_that_is_not_finite_names_its_term_and_batch(loader: Any, tmp_path: Path) -> None:
    count = 0

    def sometimes(s: Outputs, t: Outputs, b: Batch) -> Tensor:
        nonlocal count
        count += 1
        return s.logits.mean() * (math.nan if count == 10 else 1.0)

    student = mlp()
    kept: list[dict[str, Tensor]] = []
    points = distill.Checkpoints(tmp_path, every=1, keep=1)
    message = r"epoch 0, step 4 .*batches 8 to 9 of the epoch, by term 'odd' = nan"
    with pytest.raises(FloatingPointError, match=message):
        quiet(
            student,
            [*loader, *loader],
            [distill.hard(), Term("odd", sometimes, 0.1)],
            accumulate=2,
            checkpoint=points,
            on_step=lambda *_: kept.append(weights(student)),
        )
    assert [p.name for p in points.files()] == ["step-00000004.safetensors"]
    assert len(kept) == 4 and equal(weights(student), kept[-1])
    assert not any("tmp" in path.name for path in tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(loader: Any, tmp_path: Path) -> None:
    student = mlp()

    def poison(epoch: int, step: int, loss: Tensor) -> None:
        if step == 3:
            with torch.no_grad():
                student[3].bias[0] = math.inf

    points = distill.Checkpoints(tmp_path, every=2)
    with pytest.raises(FloatingPointError, match=r"student: '3.bias' is not finite after step 3"):
        quiet(student, loader, distill.hard(), checkpoint=points, on_step=poison)
    assert [p.name for p in points.files()] == ["step-00000002.safetensors"]


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ([], TypeError, "loss: got no term"),
        ([distill.hard(), 3], TypeError, "loss: got int in it"),
        ([distill.hard(), distill.hard()], ValueError, "expected different names"),
        (Term("flat", lambda s, t, b: s.logits), ValueError, "from term 'flat'"),
        (Term("cut", lambda s, t, b: s.logits.mean().detach()), ValueError, "require grad"),
    ],
)
def test_bad_losses(loader: Any, loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quiet(mlp(), loader, loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"amp": torch.float64}, "amp: got torch.float64"),
    ],
)
def test_bad_options(loader: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(mlp(), loader, distill.hard(), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns(loader: Any, dtype: torch.dtype) -> None:
    student, teacher = mlp(), mlp(16)
    seen: set[torch.dtype] = set()

    def note(s: Outputs, t: Outputs, b: Batch) -> Tensor:
        seen.update((s.logits.dtype, t.logits.dtype))
        return s.logits.float().mean() * 0

    terms = [distill.hard(), distill.soft(0.1), Term("note", note)]
    steps = quiet(
        student, loader, terms, teacher=teacher, amp=dtype, epochs=20, lr=1e-2, clip_norm=1.0
    )
    assert seen == {dtype} and student[0].weight.dtype == torch.float32
    assert steps[-1].terms["hard"] < 0.7 * steps[0].terms["hard"]


def test_input_noise_is_the_students_alone_unless_asked() -> None:
    x = torch.zeros(2000, 5)
    seen: list[Tensor] = []

    def look(s: Outputs, t: Outputs, b: Batch) -> Tensor:
        seen.extend((b.inputs, b.inputs if b.teacher_inputs is None else b.teacher_inputs))
        return s.logits.mean()

    for teacher in ("clean", "noisy"):
        seen.clear()
        transform = distill.input_noise(0.5, teacher=teacher)
        quiet(mlp(), [x], Term("look", look), transform=transform)
        mine, theirs = seen
        assert mine.std().item() == pytest.approx(0.5, rel=0.05)
        assert torch.equal(mine, theirs) if teacher == "noisy" else not theirs.any()
    assert not x.any()


def test_weight_noise_is_gone_after_the_gradient(loader: Any) -> None:
    student = mlp()
    before = weights(student)
    with distill.weight_noise(student, 0.1):
        ratio = (student[0].weight - before["0.weight"]).std() / before["0.weight"].std()
        assert ratio.item() == pytest.approx(0.1, rel=0.5)
    assert equal(weights(student), before)
    steps = [
        quiet(copy.deepcopy(student), loader, distill.hard(), weight_noise=std)[0].loss
        for std in (0.0, 0.5, 0.5)
    ]
    assert len(set(steps)) == 3
    frozen = torch.optim.SGD(student.parameters(), lr=0.0)
    quiet(student, loader, distill.hard(), weight_noise=0.5, optimizer=frozen)
    assert equal(weights(student), before)
