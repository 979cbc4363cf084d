"""A user has a vLLM server and transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

from causal_models import arguments, curve, llama, ragged
from served_model import serving

from fastkd.integrations.transformers import DistillationTrainer
from fastkd.teachers import Served


def test_ten_lines_with_a_vllm_server_and_a_trainer(tmp_path: Path) -> None:
    local, student, data = llama(9), llama(1), ragged()
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2)
    with serving(local) as server:
        # what a user writes
        with Served(server.url, k=8, keep=tmp_path / "answers") as teacher:
            loss = {"temperature": 1.0, "alpha": 0.1}
            trainer = DistillationTrainer(
                student, args, train_dataset=data, teacher=teacher, loss=loss
            )
            trainer.train()
        losses = curve(trainer)
        assert len(losses) == 6 and losses[-1] < losses[0]
        assert teacher.asked == len(server.requests) == len(data)
