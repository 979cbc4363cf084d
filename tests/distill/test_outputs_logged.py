"""Soft loss and entropies in the trainer's logs, from the pass that computed the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.distill.batch import Batch, Outputs

METRICS = ["soft", "student_entropy", "teacher_entropy"]


def models() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(4, 9), nn.Linear(4, 9)


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("rows", ["all", "labelled"])
def test_the_logs_of_a_run(rows: str) -> None:
    """The habit: one more option, and the entropies stand beside the loss in the log."""
    student, teacher = models()
    x, labels = torch.randn(12, 4), torch.randint(9, (12,))
    labels[::3] = -100
    with torch.no_grad():
        s, t = student(x) / 2, teacher(x) / 2
    history: list[dict[str, float]] = []
    loss = [distill.hard(0.5), distill.soft(0.5, temperature=2.0, rows=rows, return_outputs=True)]
    steps = distill.train(
        *(student, [(x[:8], labels[:8]), (x[8:], labels[8:])], loss),
        teacher=teacher,
        log=lambda values, step: history.append(values),
        accumulate=2,  # of 8 and 4 rows: the means are those of all 12
        progress=False,
        lr=0.0,
    )
    assert {f"term/soft/{name}" for name in METRICS} <= set(history[0])
    kept = slice(None) if rows == "all" else labels != -100
    true = {
        "soft": F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)[kept].mean(),
        "student_entropy": entropy(s)[kept].mean(),
        "teacher_entropy": entropy(t)[kept].mean(),
    }
    for name, value in true.items():
        assert history[0][f"term/soft/{name}"] == pytest.approx(value.item(), rel=1e-5)
        assert steps[0].metrics[f"soft/{name}"] == history[0][f"term/soft/{name}"]
    assert steps[0].terms["soft"] == pytest.approx(4 * steps[0].metrics["soft/soft"], rel=1e-6)


def test_the_run_is_the_same_without() -> None:
    """Losses, weights and the names of the terms, bit by bit; no metrics where none are wanted."""
    found: list[Any] = []
    for wanted in (False, True):
        torch.manual_seed(0)
        student, teacher = models()
        batches = [torch.randn(6, 4) for _ in range(5)]
        loss = distill.soft(return_outputs=wanted)
        steps = distill.train(
            student, batches, loss, teacher=teacher, epochs=2, lr=0.1, progress=False
        )
        assert bool(steps[0].metrics) == wanted
        found.append(([(step.loss, step.terms) for step in steps], student.weight))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_a_step_without_labels() -> None:
    student, teacher = models()
    batch = torch.randn(3, 4), torch.full((3,), -100)
    loss = distill.soft(rows="labelled", return_outputs=True)
    steps = distill.train(student, [batch], loss, teacher=teacher, progress=False, accumulate=1)
    assert steps[0].loss == 0 and set(steps[0].metrics.values()) == {0.0}


def test_a_term_of_ones_own() -> None:
    def function(s: Outputs, t: Outputs, batch: Batch) -> Any:
        loss, outputs = fastkd.js_div(s.logits, t.logits, return_outputs=True)
        return loss, {"student_entropy": outputs.student_entropy.mean()}

    student, teacher = models()
    term = distill.Term("js", function, mean="samples", metrics=("student_entropy",))
    steps = distill.train(student, [torch.randn(3, 4)], term, teacher=teacher, progress=False)
    assert steps[0].metrics["js/student_entropy"] > 0
    other = distill.Term("js", function, mean="samples", metrics=("entropy",))
    with pytest.raises(ValueError, match=r"term 'js': got \['student_entropy'\].*\['entropy'\]"):
        distill.train(student, [torch.randn(3, 4)], other, teacher=teacher, progress=False)
    bare = distill.Term("js", lambda s, *_: s.logits.sum(), metrics=("entropy",))
    with pytest.raises(ValueError, match=r"term 'js': got Tensor.*expected \(loss"):
        distill.train(student, [torch.randn(3, 4)], bare, teacher=teacher, progress=False)
