"""Two processes of a Trainer take the steps of one, and a student's weights may be sharded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import family_models as models
import pytest
import ranks
import torch
from causal_models import arguments, curve
from family_models import CASES

from fastkd.integrations import transformers as ours

LOSS = {"temperature": 2.0, "alpha": 0.3}
ARGS = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05}
ARGS |= {"train_sampling_strategy": "sequential"}


def _replicated(size: int) -> tuple[list[float], dict[str, list[float]]]:
    """Losses and weights of a masked language model, whose logits are never built."""
    case = CASES["masked"]
    student, teacher = models.build(case, 1), models.build(case, 2)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(Path(folder), per_device_train_batch_size=size, **ARGS)
        data = models.rows(case)
        trainer = ours.DistillationTrainer(
            student, args, train_dataset=data, teacher=teacher, loss=LOSS
        )
        trainer.train()
    return curve(trainer), {n: x.flatten().tolist() for n, x in student.state_dict().items()}


def _sharded() -> tuple[float, dict[str, list[float]]]:
    """Loss and gradients of a classifier of tokens under FSDP2; its Trainer needs a GPU for it."""
    from torch.distributed.fsdp import fully_shard

    case = CASES["tokens"]
    student, teacher = models.build(case, 1), models.build(case, 2)
    batch = models.stacked(models.rows(case))
    loss = ours.compute_loss_func(student, teacher, **LOSS)
    for layer in student.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(student)
    labels = batch.pop("labels")
    value = loss(student(**batch), labels)
    value.backward()
    grads = {n: p.grad.full_tensor() for n, p in student.named_parameters()}
    return value.item(), {n: x.flatten().tolist() for n, x in grads.items()}


def _rank() -> tuple[Any, Any]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # of a group that there is already
    return _replicated(2), _sharded()


def test_two_processes_take_the_steps_of_one() -> None:
    case = CASES["tokens"]
    student, teacher = models.build(case, 1), models.build(case, 2).eval()
    batch = models.stacked(models.rows(case))
    whole = models.eager(case, student, teacher, batch, models.count(case, [batch]), 2.0, 0.3)
    whole.backward()
    losses, weights = _replicated(4)
    for replicated, sharded in ranks.run(2, _rank):
        assert replicated[0] == pytest.approx(losses, rel=1e-4)
        for name, value in weights.items():
            assert replicated[1][name] == pytest.approx(value, abs=1e-5), name
        assert sharded[0] == pytest.approx(whole.item(), rel=1e-4)
        for name, p in student.named_parameters():
            assert sharded[1][name] == pytest.approx(p.grad.flatten().tolist(), abs=1e-5), name
