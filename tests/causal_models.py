"""Small models of transformers, batches and the eager loss that the tests share.

Models are randomly initialised from configs; nothing is downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hf = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from fastkd.integrations import trainer_loss  # noqa: E402
from fastkd.integrations import transformers as ours  # noqa: E402

T, ALPHA, VOCAB = 2.0, 0.3, 99
LOSS = {"temperature": T, "alpha": ALPHA}
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def make(family: str, seed: int = 0, **extra: Any) -> Any:
    """A tiny model with weights large enough that scales and caps show in its logits."""
    torch.manual_seed(seed)
    config = getattr(hf, f"{family.replace('Gemma3', 'Gemma3Text')}Config")(**SIZES | extra)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(hf, name)(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def llama(seed: int = 0, **extra: Any) -> Any:
    return make("Llama", seed, **{"num_hidden_layers": 1} | extra)


def ragged(rows: int = 16, length: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sequences of 3 to `length` tokens, padded on the right, with a prompt that does not count."""
    torch.manual_seed(seed)
    data = []
    for _ in range(rows):
        size, prompt = int(torch.randint(3, length + 1, ())), int(torch.randint(0, 2, ()))
        tokens = torch.randint(3, VOCAB, (length,))
        mask = torch.arange(length) < size
        tokens[~mask] = 0
        labels = tokens.masked_fill(~mask, -100)
        labels[:prompt] = -100
        data.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return data


def arguments(folder: Path, kind: Any = hf.TrainingArguments, **extra: Any) -> Any:
    default: dict[str, Any] = {
        **{"per_device_train_batch_size": 4, "max_steps": 10, "logging_steps": 1, "seed": 1},
        **{"learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": []},
        **{"disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_grad_norm": 0.0},
    }
    return kind(str(folder), **default | extra)


def eager_loss(
    s: Tensor, t: Tensor, labels: Tensor, total: Any = None, smoothing: float = 0.0
) -> Tensor:
    """The definition, in plain torch on logits that exist."""
    s, t, labels = s[:, :-1].float(), t[:, :-1].float(), labels[:, 1:]
    keep = labels != -100
    s, t, labels = s[keep], t[keep], labels[keep]
    hard = F.cross_entropy(s, labels, reduction="sum", label_smoothing=smoothing)
    soft = F.kl_div(
        (s / T).log_softmax(-1), (t / T).log_softmax(-1), log_target=True, reduction="sum"
    )
    return (ALPHA * hard + (1 - ALPHA) * T * T * soft) / (keep.sum() if total is None else total)


def curve(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def run(trainer: Any, **options: Any) -> Any:
    hf.set_seed(1)  # of the order of the samples, whatever was made before
    trainer.train(**options)
    return trainer


def distilled(folder: Path, student: Any, how: str, **extra: Any) -> Any:
    args = arguments(folder, **extra)
    if how == "adapter":
        loss = ours.compute_loss_func(student, llama(9), **LOSS)
        trainer = hf.Trainer(student, args, train_dataset=ragged(), compute_loss_func=loss)
    else:
        trainer = ours.DistillationTrainer(
            student,
            args,
            train_dataset=ragged(),
            teacher=llama(9),
            loss=LOSS,
            linear=how != "dense",
            pack=how == "packed",
        )
    return run(trainer)


def trainer_of(folder: Path, student: Any, teacher: Any, **options: Any) -> Any:
    args = options.pop("args", {})
    options = {"loss": LOSS, "train_dataset": ragged(), "eval_dataset": ragged(6, seed=3)} | options
    return ours.DistillationTrainer(student, arguments(folder, **args), teacher=teacher, **options)


def together(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def loss_of(student: Any, teacher: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    function = trainer_loss.DistillationLoss(teacher, **LOSS | options)
    inputs = dict(batch)
    labels = inputs.pop("labels")
    with function.watching(student):
        return function(student(**inputs), labels)
