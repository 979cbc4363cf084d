"""The Trainer: its curve is that of the eager loss, at any precision and accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from causal_models import (
    LOSS,
    VOCAB,
    T,
    arguments,
    curve,
    distilled,
    eager_loss,
    hf,
    llama,
    loss_of,
    make,
    ragged,
    run,
    together,
    trainer_of,
)
from torch import Tensor

import fastkd
from fastkd.integrations import transformers as ours

CURVE = {"gradient_accumulation_steps": 2, "max_steps": 6}


class Eager(hf.Trainer):  # type: ignore[misc]
    """A Trainer as people write it: logits of both models, and the formula."""

    teacher: Any = None
    smoothing = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        with torch.no_grad(), self.accelerator.autocast():
            teacher = self.teacher(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            )
        loss = eager_loss(
            outputs.logits, teacher.logits, labels, num_items_in_batch, self.smoothing
        )
        return (loss, outputs) if return_outputs else loss


def eager_run(folder: Path, student: Any, smoothing: float = 0.0, **extra: Any) -> Any:
    trainer = Eager(student, arguments(folder, **extra), train_dataset=ragged())
    trainer.teacher, trainer.smoothing = llama(9).eval(), smoothing
    return run(trainer)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    student = llama(1)
    run = eager_run(tmp_path_factory.mktemp("eager"), student, **CURVE)
    losses = curve(run)
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    return losses, student.state_dict()


@pytest.mark.parametrize("how", ["linear", "packed", "dense", "adapter"])
def test_the_curve_is_that_of_the_eager_loss(how: str, eager: Any, tmp_path: Path) -> None:
    losses, weights = eager
    student = llama(1)
    run = distilled(tmp_path, student, how, **CURVE)
    assert curve(run) == pytest.approx(losses, rel=1e-4)  # logged with 4 to 7 digits
    torch.testing.assert_close(student.state_dict(), weights, rtol=0, atol=2e-4)


@pytest.mark.parametrize("how", ["linear", "dense"])
def test_under_autocast(how: str, tmp_path: Path) -> None:
    students = [llama(1), llama(1)]
    losses = curve(eager_run(tmp_path, students[0], bf16=True, max_steps=4))
    run = distilled(tmp_path, students[1], how, bf16=True, max_steps=4)
    assert curve(run) == pytest.approx(losses, rel=2e-2)


@pytest.mark.parametrize("how", ["linear", "adapter"])
def test_accumulation_changes_nothing(how: str, tmp_path: Path) -> None:
    """Ragged micro-batches of a step weigh as in one batch: by their tokens."""
    weights = []
    for steps in (1, 4):
        student = llama(1)
        size = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        distilled(tmp_path, student, how, max_steps=2, optim="sgd", learning_rate=0.1, **size)
        weights.append(student.state_dict())
    start = llama(1).state_dict()
    moved = max(float((weights[0][k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-3
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)


def test_resuming_ends_in_the_same_weights(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = llama(1)
    distilled(tmp_path, whole, "linear", **saving)
    saved = tmp_path / "checkpoint-2"
    resumed = llama(5)
    trainer = ours.DistillationTrainer(
        resumed,
        arguments(tmp_path / "more", **saving),
        train_dataset=ragged(),
        teacher=llama(9),
        loss=LOSS,
    )
    run(trainer, resume_from_checkpoint=str(saved))
    assert trainer.state.global_step == 4
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)

    from safetensors import safe_open

    with safe_open(str(saved / "model.safetensors"), "pt") as file:
        assert set(file.keys()) == set(whole.state_dict())  # and nothing of the teacher
    trainer.save_model(str(tmp_path / "out"))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded.state_dict(), resumed.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("linear", [True, False])
def test_evaluation(linear: bool, tmp_path: Path) -> None:
    student, teacher = llama(1), llama(9)
    shapes: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"seen": float(len(prediction.label_ids))}

    batch = together(ragged(6, seed=3))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, t = student.eval()(**inputs).logits, teacher.eval()(**inputs).logits
    truth = float(eager_loss(s, t, batch["labels"]))
    for compute in (None, metrics):
        trainer = trainer_of(
            *(tmp_path, student, teacher),
            linear=linear,
            compute_metrics=compute,
            args={"per_device_eval_batch_size": 6},
        )
        teacher.train()
        result = trainer.evaluate()
        assert result["eval_loss"] == pytest.approx(truth, rel=1e-5)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert shapes == [((6, 8, VOCAB), (6, 8))] and result["eval_seen"] == 6
    torch.testing.assert_close(torch.tensor(trainer.predict(ragged(6, seed=3)).predictions), s)


def test_label_smoothing_of_the_arguments(tmp_path: Path) -> None:
    students = [llama(1), llama(1)]
    losses = curve(eager_run(tmp_path, students[0], smoothing=0.2, max_steps=3))
    run = distilled(tmp_path, students[1], "linear", label_smoothing_factor=0.2, max_steps=3)
    assert curve(run) == pytest.approx(losses, rel=1e-4)
    with pytest.raises(ValueError, match=r"label_smoothing: got 0\.1 in loss beside"):
        both = {"label_smoothing_factor": 0.2}
        trainer_of(tmp_path, llama(1), llama(9), args=both, loss=LOSS | {"label_smoothing": 0.1})


@pytest.mark.parametrize("linear", [True, False])
def test_labels_are_shifted_once(linear: bool) -> None:
    """[-100, 5, 2] counts 2 tokens: 5 behind position 0, and 2 behind position 1."""
    student, tokens = llama(1).eval(), torch.tensor([[7, 5, 2]])
    labels = torch.tensor([[-100, 5, 2]])
    batch = {"input_ids": tokens, "labels": labels}
    hard = loss_of(student, llama(9), batch, alpha=1.0, linear=linear)
    logp = student(input_ids=tokens).logits.log_softmax(-1)
    torch.testing.assert_close(hard, -(logp[0, 0, 5] + logp[0, 1, 2]) / 2)
    torch.testing.assert_close(hard, student(input_ids=tokens, labels=labels).loss)
    given = {"input_ids": tokens, "labels": labels, "shift_labels": torch.tensor([[5, 2, -100]])}
    torch.testing.assert_close(loss_of(student, llama(9), given, alpha=1.0, linear=linear), hard)


def test_labels_that_are_shifted_already(tmp_path: Path) -> None:
    data = ragged()
    for row in data:
        row["labels"] = F.pad(row["labels"][1:], (0, 1), value=-100)
    student, before = llama(1), llama(1).state_dict()
    trainer = trainer_of(tmp_path, student, llama(9), train_dataset=data)
    with pytest.raises(ValueError, match="labels: got input_ids shifted by one already"):
        trainer.train()
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)


def test_one_token_repeated_is_not_taken_for_shifted_labels() -> None:
    tokens = torch.full((2, 4), 7)
    assert loss_of(llama(1), llama(9), {"input_ids": tokens, "labels": tokens}).isfinite()


@pytest.mark.parametrize("linear", [True, False])
def test_padded_vocabularies(linear: bool, tmp_path: Path) -> None:
    student, teacher = llama(1, vocab_size=104), llama(9, vocab_size=112)
    with pytest.raises(ValueError, match=r"teacher: got a vocabulary of 112, .*104.*vocab_size="):
        trainer_of(tmp_path, student, teacher, linear=linear)
    with pytest.raises(ValueError, match="vocab_size: got 105, expected at most 104"):
        trainer_of(tmp_path, student, teacher, loss=LOSS | {"vocab_size": 105}, linear=linear)
    first = LOSS | {"vocab_size": VOCAB}
    trainer = trainer_of(tmp_path, student, teacher, loss=first, linear=linear)
    trainer.args.per_device_eval_batch_size = 6
    batch = together(ragged(6, seed=3))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, t = (model.eval()(**inputs).logits[..., :VOCAB] for model in (student, teacher))
    truth = float(eager_loss(s, t, batch["labels"]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("form", ["logits", "topk"])
def test_stored_teacher(form: str, eager: Any, tmp_path: Path) -> None:
    """A collator that adds the teacher's outputs stands in for the teacher itself."""
    teacher, data = llama(9).eval(), ragged()
    for row in data:
        inputs = {k: row[k][None] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            row["said"] = teacher(**inputs).logits[0]

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch: dict[str, Any] = together(
            [{k: v for k, v in r.items() if k != "said"} for r in rows]
        )
        logits = torch.stack([row["said"] for row in rows])
        if form == "topk":  # of all columns: the same teacher
            logprobs, indices = (logits / T).log_softmax(-1).topk(VOCAB)
            batch["teacher"] = fastkd.TopK(logprobs, indices, temperature=T)
        else:
            batch["teacher"] = logits
        return batch

    losses, weights = eager
    student = llama(1)
    args = CURVE | {"remove_unused_columns": False}
    trainer = trainer_of(
        tmp_path, student, None, train_dataset=data, data_collator=collate, args=args
    )
    run(trainer)
    assert curve(trainer) == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(student.state_dict(), weights, rtol=0, atol=2e-4)


def test_stored_teacher_of_a_dataset_stays_in_the_batch(tmp_path: Path) -> None:
    data = [row | {"teacher": torch.randn(8, VOCAB)} for row in ragged(4)]
    trainer = trainer_of(tmp_path, llama(1), None, train_dataset=data, args={"max_steps": 1})
    assert trainer.train().global_step == 1


def test_tokens_are_counted_as_the_labels_are_shifted(tmp_path: Path) -> None:
    """For a class whose loss the Trainer does not know, it would count each row's first label."""
    data = [row | {"labels": row["input_ids"]} for row in ragged()[:4]]
    args = {"max_steps": 1, "save_strategy": "no"}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    student, teacher = make("GPT2", 1, **still), make("GPT2", 9)
    expected = float(loss_of(student, teacher, together(data), **LOSS).detach())
    trainer = trainer_of(tmp_path, student, teacher, train_dataset=data, args=args)
    trainer.train()
    assert curve(trainer) == pytest.approx([expected], rel=1e-5)
    student = make("GPT2", 1, **still)
    loss = ours.compute_loss_func(student, teacher, **LOSS)
    plain = hf.Trainer(
        student, arguments(tmp_path, **args), train_dataset=data, compute_loss_func=loss
    )
    plain.train()
    assert curve(plain) == pytest.approx([expected], rel=1e-5)
    loss.detach()
    assert student.loss_type is None
