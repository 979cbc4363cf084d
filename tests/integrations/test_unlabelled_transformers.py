"""Where alpha leaves the labels no weight, a Trainer's batches come without them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hf = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from fastkd.integrations import transformers as ours  # noqa: E402

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "initializer_range": 0.3}
TEXTS = torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(6) < torch.tensor([6, 4, 5, 6, 3, 6, 2, 6])[:, None]


def causal(seed: int) -> Any:
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, **SIZES))


def masked(seed: int) -> Any:
    torch.manual_seed(seed)
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=40, **SIZES)).eval()


def classifier(seed: int, problem: str | None) -> Any:
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_labels": 5, "problem_type": problem}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=40, **sizes))


def curve(folder: Path, make: Any, rows: list[dict[str, Any]], **loss: Any) -> list[float]:
    """Losses of two steps of two micro-batches, of other numbers of tokens."""
    args = hf.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=1, seed=1,
    )  # fmt: skip
    student = make(1)
    for module in student.modules():  # the same losses whatever was drawn before
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = {"alpha": 0.0, **loss}
    trainer = ours.DistillationTrainer(
        student, args, train_dataset=rows, teacher=make(0), loss=loss
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CASES: dict[str, Any] = {
    "causal": (causal, TEXTS.where(MASK, -100)),
    "masked": (masked, torch.zeros_like(TEXTS).where(MASK, -100)),
    "one": (lambda seed: classifier(seed, "single_label_classification"), torch.arange(8) % 5),
    "several": (
        lambda seed: classifier(seed, "multi_label_classification"),
        torch.eye(5)[torch.arange(8) % 5],
    ),
    "numbers": (lambda seed: classifier(seed, "regression"), torch.ones(8, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_with_labels(name: str, tmp_path: Path) -> None:
    make, labels = CASES[name]
    rows = [
        {"input_ids": row, "attention_mask": mask.long()}
        for row, mask in zip(TEXTS, MASK, strict=True)
    ]
    known = [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    assert curve(tmp_path, make, rows) == curve(tmp_path, make, known)


def test_what_still_wants_labels(tmp_path: Path) -> None:
    rows = [{"input_ids": row} for row in TEXTS]
    for loss in ({"alpha": 0.5}, {"alpha": lambda step: 0.0}):
        with pytest.raises(ValueError, match=r"labels: got none.*alpha=0 DistillationTrainer"):
            curve(tmp_path, causal, rows, **loss)
    with pytest.raises(ValueError, match="config has no problem_type; expected one, as student"):
        curve(tmp_path, lambda seed: classifier(seed, None), rows)
