"""A Trainer's teachers by sample, of the student itself, and under another prompt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import (
    LOSS,
    VOCAB,
    arguments,
    curve,
    eager_loss,
    llama,
    loss_of,
    ours,
    ragged,
    run,
    together,
    trainer_of,
)
from torch import Tensor

from fastkd import distill
from fastkd.distill.self_teachers import without_adapter

STEPS: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": 2}
STEPS |= {"per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}


def in_order(folder: Path, student: Any, teacher: Any, data: Any, **options: Any) -> Any:
    """A Trainer that reads the samples in their order, by SGD."""

    class InOrder(ours.DistillationTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    args = arguments(folder, **STEPS | options.pop("args", {}))
    more = {"optimizers": (optimizer, None), "train_dataset": data, "loss": LOSS, **options}
    return InOrder(student, args, teacher=teacher, **more)


def by_hand(student: Any, data: Any, said: Any, follow: Any = lambda: None) -> list[float]:
    """Steps of two micro-batches of two samples, each sample alone; returns the losses."""
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    found = []
    for step in range(3):
        rows = data[4 * step : 4 * step + 4]
        total = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
        losses = []
        for row in rows:
            inputs = {name: row[name][None] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                t = said(row, inputs)
            losses.append(eager_loss(student(**inputs).logits, t, row["labels"][None], total))
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        follow()
        found.append(sum(float(x.detach()) for x in losses))
    return found


@pytest.mark.parametrize("linear", [True, False])
def test_a_teacher_for_each_sample(tmp_path: Path, linear: bool) -> None:
    teachers = {"math": llama(1), "code": llama(2, hidden_size=24)}
    names = ["math", "code", "code", "code"] * 3
    data = [{**row, "teacher_id": name} for row, name in zip(ragged(12), names, strict=True)]
    student = llama()
    expected = by_hand(
        copy.deepcopy(student), data, lambda row, x: teachers[row["teacher_id"]].eval()(**x).logits
    )
    trainer = run(in_order(tmp_path, student, teachers, data, linear=linear))
    assert curve(trainer) == pytest.approx(expected, rel=1e-4)
    batch: dict[str, Any] = {**together(ragged(2)), "teacher_id": torch.tensor([5, 5])}
    with pytest.raises(ValueError, match="teacher_id: got 5 in sample 0 of the batch"):
        loss_of(student, teachers, batch)
    one = loss_of(student, {5: teachers["math"], 6: teachers["code"]}, batch)
    del batch["teacher_id"]
    torch.testing.assert_close(one, loss_of(student, teachers["math"], batch))


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    modules = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    config = peft.LoraConfig(r=2, init_lora_weights=False, **modules)
    return peft.get_peft_model(model, config)


def test_a_trainers_student_without_its_adapter(tmp_path: Path) -> None:
    base, data = llama(4), ragged(12)
    student = lora(copy.deepcopy(base))
    next(p for n, p in student.named_parameters() if "lora_A" in n).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    twin = copy.deepcopy(student).eval()
    expected = by_hand(twin, data, lambda _, x: base.eval()(**x).logits)
    trainer = run(in_order(tmp_path, student, "base", data))
    assert curve(trainer) == pytest.approx(expected, rel=1e-4)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    assert student.training and all(part.training for part in student.modules())
    batch = together(ragged(3))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = lora(copy.deepcopy(base))
    function = ours.compute_loss_func(plain, "base", **LOSS)  # in the plain Trainer
    s = plain(**inputs)
    logits, loss = s.logits, function(s, batch["labels"])
    assert logits.size(1) == 0  # and those of the student were not built
    function.detach()
    expected_ = eager_loss(plain(**inputs).logits, base(**inputs).logits, batch["labels"])
    torch.testing.assert_close(loss, expected_, rtol=1e-4, atol=1e-5)
    teacher = distill.BaseTeacher()
    teacher.bind(plain)
    said = teacher(distill.Batch(inputs)).logits
    torch.testing.assert_close(said, base(**inputs).logits)
    with pytest.raises(ValueError, match="teacher: got 'base' for LlamaForCausalLM, which has no"):
        trainer_of(tmp_path, llama(), "base")


def test_an_adapter_of_transformers_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`model.add_adapter`, one of two at work: the base, and everything as it was."""
    peft = pytest.importorskip("peft")
    # transformers asks for a PEFT that may not be released yet
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    base, student, data = llama(4).eval(), llama(4), ragged(12)
    torch.manual_seed(3)
    for name in ("first", "second"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        student.add_adapter(config, name)
    student.set_adapter("first")
    inputs = {"input_ids": data[0]["input_ids"][None]}
    with without_adapter(student.eval()):
        torch.testing.assert_close(student(**inputs).logits, base(**inputs).logits)
    assert student.active_adapters() == ["first"]
    assert float((student(**inputs).logits - base(**inputs).logits).detach().abs().max()) > 1e-3
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    expected = by_hand(copy.deepcopy(student), data, lambda _, x: base(**x).logits)
    assert curve(run(in_order(tmp_path, student, "base", data))) == pytest.approx(
        expected, rel=1e-4
    )
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags


def test_the_moving_average_and_its_checkpoint(tmp_path: Path) -> None:
    data, student = ragged(12), llama()
    twin, average = copy.deepcopy(student), distill.EMATeacher(decay=0.5)
    average.bind(twin)
    expected = by_hand(
        twin, data, lambda _, x: average.model(**x).logits, lambda: average.step(twin)
    )
    own = distill.EMATeacher(decay=0.5)
    saves = {"save_strategy": "steps", "save_steps": 2}
    trainer = run(in_order(tmp_path, student, own, data, args=saves))
    assert curve(trainer) == pytest.approx(expected, rel=1e-4)
    again = in_order(tmp_path, llama(), distill.EMATeacher(decay=0.5), data, args=saves)
    run(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert curve(again) == curve(trainer)
    (tmp_path / "checkpoint-2" / "ema-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 without ema-0\.safetensors"):
        run(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(TypeError, match="teacher: got a moving average"):
        ours.compute_loss_func(llama(), "ema")
    with pytest.raises(ValueError, match="teacher: got 'emma', expected a model, 'base' or 'ema'"):
        trainer_of(tmp_path, llama(), "emma")


@pytest.mark.parametrize("replace", [True, False])
def test_another_prompt(tmp_path: Path, replace: bool) -> None:
    """Prompts of their own lengths, the student's padded on the right."""
    teacher, student = llama(1), llama()
    prompts = [[3, 4], [5], [6, 7, 8]] * 4
    data = [{**row, "p": p} for row, p in zip(ragged(12), prompts, strict=True)]

    def said(row: dict[str, Any], _: Any) -> Tensor:
        size = int(row["attention_mask"].sum())
        cut = int((row["labels"][1:] != -100).nonzero()[0]) + 1 if replace else 0
        reads = torch.cat([torch.tensor(row["p"]), row["input_ids"][cut:size]])
        logits = teacher.eval()(input_ids=reads[None]).logits[0]
        made = torch.zeros(1, len(row["labels"]), VOCAB)
        kept = logits[len(row["p"]) - (1 if replace else 0) :]
        start = cut - 1 if replace else 0
        made[0, start : start + len(kept)] = kept
        return made

    expected = by_hand(copy.deepcopy(student), data, said)
    prompted = distill.PromptedTeacher(teacher, "p", replace=replace)
    assert curve(run(in_order(tmp_path, student, prompted, data))) == pytest.approx(
        expected, rel=1e-4
    )
