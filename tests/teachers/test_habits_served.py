"""A user has a vLLM server and transformers' Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import VOCAB, arguments, curve, hf, llama, ragged, run, together
from served_model import Server

import fastkd
from fastkd import distill
from fastkd.integrations.transformers import DistillationTrainer, compute_loss_func
from fastkd.teachers import Served

LOSS = {"temperature": 1.0, "alpha": 0.1}


def test_ten_lines_with_a_vllm_server_and_a_trainer(server: Server, tmp_path: Path) -> None:
    student, data = llama(1), ragged()
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2)
    # what a user writes
    with Served(server.url, k=8, keep=tmp_path / "answers") as teacher:
        trainer = DistillationTrainer(student, args, train_dataset=data, teacher=teacher, loss=LOSS)
        trainer.train()
    losses = curve(trainer)
    assert len(losses) == 6 and losses[-1] < losses[0]
    # three epochs, and each text is paid for once
    assert teacher.asked == len(server.requests) == len(data)


class Waiting(hf.TrainerCallback):  # type: ignore[misc]
    """How many texts have been asked for, and not used yet, behind each step."""

    def __init__(self, teacher: Served) -> None:
        self.teacher, self.seen = teacher, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(len(self.teacher._waiting))


@pytest.mark.parametrize("plain", ["", "plain", "collator"])
def test_the_curve_is_that_of_the_models_own_columns(
    plain: str, server: Server, tmp_path: Path
) -> None:
    """Beside batches that bring a `TopK` of the same model; dense, linear and packed students."""
    student, local, data = llama(1), server.score.model, ragged()

    class Stored:
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = together(rows)
            with torch.no_grad():
                logits = local(batch["input_ids"], batch["attention_mask"]).logits
            return {**batch, "teacher": fastkd.topk_from_logits(logits, 8)}

    own = llama(1)
    args = arguments(tmp_path, max_steps=4)
    expected = run(
        DistillationTrainer(own, args, train_dataset=data, loss=LOSS, data_collator=Stored())
    )
    with Served(server.url, k=8, ahead=2) as teacher:
        if plain:
            loss = compute_loss_func(student, teacher, **LOSS)
            trainer = hf.Trainer(student, args, train_dataset=data, compute_loss_func=loss)
            if plain == "collator":  # accelerate's loader makes the batch behind this one, too
                trainer.data_collator = loss.collator(trainer.data_collator)
        else:
            trainer = DistillationTrainer(
                student, args, train_dataset=data, teacher=teacher, loss=LOSS
            )
        waiting = Waiting(teacher)
        trainer.add_callback(waiting)
        run(trainer)
    ahead = {"": [8, 8, 4, 0], "plain": [0] * 4, "collator": [4, 4, 4, 0]}[plain]
    assert waiting.seen == ahead[: len(waiting.seen)]
    assert curve(trainer) == pytest.approx(curve(expected), rel=1e-3)
    torch.testing.assert_close(student.state_dict(), own.state_dict(), rtol=0, atol=1e-3)


def test_what_a_user_meets_first(server: Server, tmp_path: Path) -> None:
    student, data = llama(1), ragged()
    args = arguments(tmp_path, max_steps=1)
    with Served(server.url, k=8, vocab_size=120) as teacher:
        with pytest.raises(ValueError, match=r"teacher: got a vocabulary of 120.*vocab_size="):
            DistillationTrainer(student, args, train_dataset=data, teacher=teacher, loss=LOSS)
    with Served(server.url, k=8) as teacher:
        # the Trainer's usual temperature is not what a server says
        loss = {"temperature": 2.0, "alpha": 0.1}
        trainer = DistillationTrainer(student, args, train_dataset=data, teacher=teacher, loss=loss)
        with pytest.raises(ValueError, match="temperature"):
            trainer.train()
    with Served(server.url, k=8, tail="renormalize") as teacher:
        trainer = DistillationTrainer(student, args, train_dataset=data, teacher=teacher, loss=loss)
        assert run(trainer).state.global_step == 1
        ids = torch.tensor([[3, 4, 5]])
        with pytest.raises(TypeError, match=r"input_ids: got \[1, 3\] of torch.bool"):
            teacher.score(ids != 4)
        labels = torch.tensor([[4, 5, -100]])
        with pytest.raises(TypeError, match=r"dict of input_ids, labels.*'inputs': them"):
            distill.train(
                student, [{"input_ids": ids, "labels": labels}], distill.hard(), teacher=teacher
            )
        batch = [(ids, labels)]
        with pytest.raises(ValueError, match="rows='labelled'"):
            distill.train(student, batch, distill.soft(temperature=1.0), teacher=teacher)


@pytest.mark.parametrize("how", ["routed", "prompted", "plain"])
def test_a_served_teacher_within_another(how: str, server: Server, tmp_path: Path) -> None:
    """All columns of a server are the model itself; texts are asked for ahead of their step."""
    data = [{**row, "teacher_id": "ab"[i % 2]} for i, row in enumerate(ragged())]
    model, other = server.score.model, llama(8)

    def teacher(one: Any) -> Any:
        return distill.PromptedTeacher(one, [5, 6]) if how == "prompted" else {"a": one, "b": other}

    def curve_of(one: Any, seen: Any = None) -> list[float]:
        student, args = llama(1), arguments(tmp_path, max_steps=4)
        if how == "plain":
            loss = compute_loss_func(student, teacher(one), **LOSS)
            args.remove_unused_columns = False
            trainer = hf.Trainer(student, args, train_dataset=data, compute_loss_func=loss)
            trainer.data_collator = loss.collator(trainer.data_collator)
        else:
            options = {"train_dataset": data, "teacher": teacher(one), "loss": LOSS}
            trainer = DistillationTrainer(student, args, **options)
        trainer.add_callback(seen) if seen else None
        return curve(run(trainer))

    with Served(server.url, k=VOCAB, ahead=1) as served:
        seen = Waiting(served)
        found = curve_of(served, seen)
    assert found == pytest.approx(curve_of(copy.deepcopy(model)), rel=1e-3)
    assert all(seen.seen[:3]) and seen.seen[3] == 0
    assert {len(x["prompt"]) for x in server.requests} <= set(range(2, 11))


def test_a_batchs_teacher_of_another_shape_or_kind(tmp_path: Path) -> None:
    """Whatever operand stands in the batch: its argument, what came, what was expected."""
    data, width = ragged(), torch.randn(VOCAB, 5)
    shape = r"teacher: got shape \[4, {}\], expected the leading dimensions of the student's \[4, 8"
    cases: list[tuple[Any, str]] = [
        (lambda x: fastkd.topk_from_logits(x, 3)[:, 1:], shape.format("7, 3")),
        (lambda x: fastkd.LinearLogits(x[:, 1:, :5], width), shape.format("7, 99")),
        (lambda x: x[..., 0], shape.format("8")),
        (lambda x: [1, 2], r"teacher: got list \[1, 2\], expected a tensor of logits"),
        (lambda x: fastkd.LinearLogits(x[..., :5], width), ""),
    ]
    for made, text in cases:

        def collated(rows: list[dict[str, Any]], made: Any = made) -> dict[str, Any]:
            batch = together(rows)
            return {**batch, "teacher": made(torch.randn(*batch["input_ids"].shape, VOCAB))}

        args = arguments(tmp_path, max_steps=1)
        options = {"train_dataset": data, "loss": LOSS, "data_collator": collated}
        trainer = DistillationTrainer(llama(1), args, **options)
        if not text:
            assert run(trainer).state.global_step == 1
            continue
        with pytest.raises((ValueError, TypeError), match=text):
            trainer.train()
