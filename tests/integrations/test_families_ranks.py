"""Two processes of a Trainer take the steps of one: with logits that are built, and not."""

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
NAMES = ["masked", "bert"]


def _run(name: str, **args: Any) -> tuple[list[float], dict[str, list[float]]]:
    student, teacher = models.build(CASES[name], 1), models.build(CASES[name], 2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ours.DistillationTrainer(
            student,
            arguments(Path(folder), **ARGS | args),
            train_dataset=models.rows(CASES[name]),
            teacher=teacher,
            loss=LOSS,
        )
        trainer.train()
    weights = {n: x.flatten().tolist() for n, x in student.state_dict().items()}
    return curve(trainer), weights


def _rank() -> list[Any]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # of a group that there is already
    return [_run(name, per_device_train_batch_size=2) for name in NAMES]


def test_two_processes_take_the_steps_of_one() -> None:
    expected = [_run(name, per_device_train_batch_size=4) for name in NAMES]
    for found in ranks.run(2, _rank):
        for (losses, weights), (own, theirs) in zip(found, expected, strict=True):
            assert losses == pytest.approx(own, rel=1e-4)
            for name, value in weights.items():
                assert value == pytest.approx(theirs[name], abs=1e-5), name
