"""The parts of the loss in the Trainer's log_history, from the pass that computed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from test_habits_transformers import ROWS, distilled, llama

from fastkd.integrations import transformers as ours

LOSS: dict[str, Any] = {"temperature": 2.0, "alpha": 0.3}


def test_the_log_of_a_run(tmp_path: Path) -> None:
    """One option, and each log of the training loss holds the means since the last one."""
    teacher, student = llama(1), llama(2)
    tokens = torch.stack([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        s, t = (model(tokens).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
    p, q = ((x / 2).log_softmax(-1) for x in (t, s))
    true = {
        "soft": F.kl_div(q, p, reduction="batchmean", log_target=True),
        "hard": F.cross_entropy(s, tokens[:, 1:].flatten()),
        "student_entropy": -(q.exp() * q).sum(-1).mean(),
        "teacher_entropy": -(p.exp() * p).sum(-1).mean(),
    }
    # two steps of two micro-batches see all rows once; nothing moves
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
    args |= {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    loss = {**LOSS, "return_outputs": True}
    trainer = distilled(tmp_path, student, teacher, loss=loss, args=args, eval_dataset=ROWS)
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in true.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-4), name
    total = 0.3 * log["hard"] + 0.7 * 4 * log["soft"]
    assert log["loss"] == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("linear", [True, False])
def test_the_run_is_the_same_without(linear: bool, tmp_path: Path) -> None:
    found = []
    for wanted in (False, True):
        student = llama(2)
        loss = {**LOSS, "return_outputs": wanted}
        args = {"logging_steps": 1}
        trainer = distilled(tmp_path, student, llama(1), loss=loss, args=args, linear=linear)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(("student_entropy" in entry) == wanted for entry in logs)
        found.append(([entry["loss"] for entry in logs], student.lm_head.weight))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_a_loss_function_cannot_log() -> None:
    with pytest.raises(TypeError, match=r"return_outputs: got True.*DistillationTrainer"):
        ours.compute_loss_func(llama(1), llama(2), return_outputs=True)
