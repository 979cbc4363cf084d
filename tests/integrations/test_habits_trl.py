"""What people do with TRL's trainers by habit: it is right, or a warning or an error names it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.integrations import trl as fused


class GOLDTrainer:
    use_uld_loss = False

    @staticmethod
    def generalized_jsd_loss(student_logits: Any, teacher_logits: Any, beta: float = 0.5) -> None:
        raise NotImplementedError


class IWOPDTrainer:
    @staticmethod
    def generalized_jsd_loss(student_logits: Any, teacher_logits: Any, beta: float = 0.5) -> None:
        raise NotImplementedError


class Derived(IWOPDTrainer):
    pass


def made(kind: type, **attributes: Any) -> Any:
    trainer = kind()
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        (made(GOLDTrainer, use_uld_loss=True), "GOLDTrainer .*use_uld_loss=True"),
        (made(IWOPDTrainer, distillation_objective="iw_opd"), "objective='jsd' alone"),
        (type("Own", (Derived,), {}), "Own calls the fused loss with .*objective='jsd' alone"),
    ],
    ids=["gold", "iw-opd", "class"],
)
def test_a_patch_that_changes_nothing_says_so(
    trainer: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "check_version", lambda: None)
    with pytest.warns(UserWarning, match=words):
        fused.patch(trainer)


def test_a_patch_that_serves_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "check_version", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trainer in (
            type("Own", (GOLDTrainer,), {}),
            made(GOLDTrainer),
            made(IWOPDTrainer, distillation_objective="jsd"),
        ):
            assert fused.patch(trainer) is trainer


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"reduction": "none"}])
def test_vocabularies_of_two_widths(options: Any) -> None:
    with pytest.raises(ValueError, match=r"teacher_logits: got 7 columns.*logits\[\.\.\., :n\]"):
        fused.generalized_jsd_loss(torch.randn(2, 5), torch.randn(2, 7), **options)


@pytest.mark.filterwarnings("ignore")
def test_sft_with_logits_that_are_never_built(tmp_path: Path) -> None:
    """The installed TRL's SFTTrainer takes the loss function as it is."""
    sft = pytest.importorskip("trl", minversion="1.15")
    datasets = pytest.importorskip("datasets")
    from test_trl import language_model, tokenizer

    from fastkd.integrations.transformers import compute_loss_func

    words = tokenizer()
    student = language_model(len(words), 16, seed=0)
    before = student.lm_head.weight.detach().clone()
    loss = compute_loss_func(student, language_model(len(words), 32, seed=1), alpha=0.3)
    options: dict[str, Any] = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
    arguments = sft.SFTConfig(str(tmp_path), save_strategy="no", disable_tqdm=True, **options)
    trainer = sft.SFTTrainer(
        student,
        arguments,
        train_dataset=datasets.Dataset.from_list([{"text": "what is the cat"}] * 4),
        processing_class=words,
        compute_loss_func=loss,
    )
    assert trainer.train().global_step == 1
    assert not torch.equal(student.lm_head.weight, before)
