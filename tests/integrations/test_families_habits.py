"""What people do with students of other families: it is right, or it is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family_models as models
import pytest
import torch
from causal_models import arguments, curve, hf
from family_models import CASES
from torch import Tensor

import fastkd
from fastkd.integrations import transformers as ours

LOSS = {"temperature": 2.0, "alpha": 0.3}
ARGS = {"max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd"}
ARGS |= {"train_sampling_strategy": "sequential"}


def pair(name: str, **changed: Any) -> tuple[Any, Any]:
    return models.build(CASES[name], 1, **changed), models.build(CASES[name], 2)


def trained(folder: Path, name: str, student: Any, teacher: Any, **options: Any) -> Any:
    args = arguments(folder, **ARGS | options.pop("args", {}))
    options = {"loss": LOSS, "train_dataset": models.rows(CASES[name])} | options
    trainer = ours.DistillationTrainer(student, args, teacher=teacher, **options)
    trainer.train()
    return trainer


def expected(name: str, student: Any, teacher: Any, count: int = 4) -> float:
    """The eager loss of the first rows."""
    case = CASES[name]
    batch = models.stacked(models.rows(case)[:count])
    total = models.count(case, [batch])
    loss = models.eager(case, student.train(), teacher.eval(), batch, total, 2.0, 0.3)
    return float(loss.detach())


# ---- the plain Trainer, as people have it


@pytest.mark.parametrize("name", ["distilbert", "vit", "masked"])
def test_the_plain_trainer(name: str, tmp_path: Path) -> None:
    student, teacher = pair(name)
    first = expected(name, student, teacher)
    trainer = hf.Trainer(
        student,
        arguments(tmp_path, **ARGS),
        train_dataset=models.rows(CASES[name]),
        compute_loss_func=ours.compute_loss_func(student, teacher, **LOSS),
    )
    trainer.train()
    assert curve(trainer)[0] == pytest.approx(first, rel=1e-4)


class Tokenizer:
    """Of DataCollatorForSeq2Seq, which asks it to pad rows."""

    padding_side = "right"

    def pad(self, rows: list[dict[str, Any]], **_: Any) -> dict[str, Tensor]:
        return {k: torch.as_tensor([[*row[k]] for row in rows]) for k in rows[0]}


def test_the_plain_trainer_with_a_sequence_to_sequence_model(tmp_path: Path) -> None:
    student, teacher = pair("t5")
    first = expected("t5", student, teacher)
    data = [{k: v.tolist() for k, v in row.items()} for row in models.rows(CASES["t5"])]
    collators = hf.DataCollatorForSeq2Seq(Tokenizer(), model=student), None
    for collator in collators:
        trainer = hf.Seq2SeqTrainer(
            student,
            hf.Seq2SeqTrainingArguments(
                **arguments(tmp_path, **ARGS).to_dict() | {"report_to": []}
            ),
            train_dataset=data,
            data_collator=collator,
            compute_loss_func=ours.compute_loss_func(student, teacher, **LOSS),
        )
        if collator is None:
            with pytest.raises(
                ValueError, match=r"decoder_input_ids: got none.*CollatorForSeq2Seq"
            ):
                trainer.train()
        else:
            trainer.train()
            assert curve(trainer)[0] == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_evaluate_predict_resume(name: str, tmp_path: Path) -> None:
    student, teacher = pair(name)
    data = models.rows(CASES[name])
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(tmp_path, name, student, teacher, args=saving, eval_dataset=data[:4])
    truth = expected(name, student.eval(), teacher)
    assert whole.evaluate()["eval_loss"] == pytest.approx(truth, rel=1e-4)
    predicted = whole.predict(data[:4])
    logits = predicted.predictions
    logits = logits if name == "bert" else logits[0]
    with torch.no_grad():
        own = student.eval()(**models.stacked(data[:4])).logits
    torch.testing.assert_close(torch.tensor(logits), own)
    resumed = models.build(CASES[name], 3)
    trainer = ours.DistillationTrainer(
        resumed,
        arguments(tmp_path / "more", **ARGS | saving),
        train_dataset=data,
        teacher=teacher,
        loss=LOSS,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(resumed.state_dict(), student.state_dict(), rtol=0, atol=0)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from models.rows(CASES["bert"])


def test_a_stream_and_smoothed_labels(tmp_path: Path) -> None:
    student, teacher = pair("bert")
    args = {"label_smoothing_factor": 0.1, "max_steps": 2}
    runs = [
        trained(tmp_path, "bert", copy.deepcopy(student), teacher, args=args, **options)
        for options in ({"train_dataset": Stream()}, {})
    ]
    assert curve(runs[0]) == curve(runs[1])
    assert runs[0].distillation.options["label_smoothing"] == 0.1
    assert curve(runs[0]) != curve(trained(tmp_path, "bert", student, teacher))


# ---- what the teacher is given


def test_segments_that_only_the_teacher_reads(tmp_path: Path) -> None:
    """A DistilBERT has no token_type_ids, and its BERT does."""
    student, teacher = models.build(CASES["distilbert"], 1), models.build(CASES["bert"], 2)
    data = models.rows(CASES["distilbert"])
    for row in data:
        row["token_type_ids"] = torch.tensor([0, 0, 0, 1, 1, 1])
    batch = models.stacked(data[:4])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        said = teacher.eval()(**inputs).logits
        own = student.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    soft = torch.nn.functional.kl_div(
        own.logits.log_softmax(-1), said.softmax(-1), reduction="batchmean"
    )
    loss = {"temperature": 1.0, "alpha": 0.0}
    trainer = trained(tmp_path, "distilbert", student, teacher, loss=loss, train_dataset=data)
    assert curve(trainer)[0] == pytest.approx(float(soft), rel=1e-4)
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in data]
    assert trainer.predict(unlabelled).predictions.shape == (models.ROWS, models.CLASSES)


def test_a_forward_that_passes_on_what_it_gets(tmp_path: Path) -> None:
    class Passing(hf.DistilBertForSequenceClassification):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    student, teacher = pair("distilbert")
    first = expected("distilbert", student, teacher)
    student.__class__ = Passing
    trainer = trained(tmp_path, "distilbert", student, teacher)
    assert curve(trainer)[0] == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize(("dropout", "calls"), [(0.0, 1), (0.1, 2)])
def test_a_frozen_encoder_of_both(dropout: float, calls: int, tmp_path: Path) -> None:
    """Its states are computed once, unless the student's dropout makes them others."""
    student, teacher = pair("whisper")
    student.model.encoder = teacher.model.encoder.requires_grad_(False)
    first = expected("whisper", student, teacher)
    seen: list[int] = []
    student.model.encoder.config.dropout = dropout
    student.model.encoder.register_forward_hook(lambda *_: seen.append(1))
    trainer = trained(tmp_path, "whisper", student, teacher, args={"max_steps": 1})
    assert sum(seen) == calls and curve(trainer) == pytest.approx([first], rel=1e-4)


def test_packed_rows_are_those_apart(tmp_path: Path) -> None:
    """DataCollatorWithFlattening: one row, position_ids that begin again, -100 at each border."""
    config = hf.LlamaConfig(**{k: v for k, v in models.LLAMA.items() if k != "num_labels"})
    torch.manual_seed(0)
    student, teacher = (hf.LlamaForCausalLM(config) for _ in range(2))
    data = [{"input_ids": torch.randint(3, 28, (n,)).tolist()} for n in (5, 3, 6, 4)]
    pad = [{"input_ids": x["input_ids"] + [0] * (6 - len(x["input_ids"]))} for x in data]
    for row, whole in zip(pad, data, strict=True):
        count = len(whole["input_ids"])
        row["labels"] = row["input_ids"][:count] + [-100] * (6 - count)
        row["attention_mask"] = [1] * count + [0] * (6 - count)
    losses = []
    for rows, collator in ((data, hf.DataCollatorWithFlattening()), (pad, None)):
        options = {"train_dataset": rows, "data_collator": collator}
        run = trained(tmp_path, "mamba", copy.deepcopy(student), teacher, **options)
        losses.append(curve(run))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "targets"),
    [
        ("bert", "SEQ_CLS", ["query"]),
        ("llama-classifier", "SEQ_CLS", ["q_proj"]),
        ("tokens", "TOKEN_CLS", ["query"]),
        ("t5", "SEQ_2_SEQ_LM", ["q"]),
        ("masked", None, ["query"]),
        ("vit", None, ["q_proj", "query"]),
        ("llava", None, "all-linear"),
    ],
)
def test_students_with_adapters(name: str, kind: Any, targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student, teacher = pair(name)
    first = expected(name, student, teacher)
    config = peft.LoraConfig(r=2, task_type=kind, target_modules=targets)
    adapted = peft.get_peft_model(student, config)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    trainer = trained(tmp_path, name, adapted, teacher, args={"learning_rate": 0.1})
    assert curve(trainer)[0] == pytest.approx(first, rel=1e-4)
    moved = [n for n, p in adapted.named_parameters() if n in before and not p.equal(before[n])]
    assert moved and all(p.grad is None for p in teacher.parameters())


# ---- what is refused, before the first step


def refused(folder: Path, student: Any, teacher: Any, words: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=words):
        ours.DistillationTrainer(student, arguments(folder), teacher=teacher, **options)
    with pytest.raises(ValueError, match=words):
        ours.compute_loss_func(student, teacher, **options)


def test_other_problems_refused(tmp_path: Path) -> None:
    student, teacher = pair("several")
    words = "problem_type 'multi_label_classification', whose options are alpha, divergence"
    for name, value in {"label_smoothing": 0.1, "kind": "l1"}.items():
        with pytest.raises(TypeError, match=f"{name}: got it in the loss.*{words}"):
            ours.compute_loss_func(student, teacher, **{name: value})
    with pytest.raises(ValueError, match="divergence: got 'tv'"):
        ours.compute_loss_func(student, teacher, divergence="tv")
    with pytest.raises(ValueError, match=r"pos_weight: got shape \[2\]"):
        ours.compute_loss_func(student, teacher, pos_weight=torch.ones(2))
    other = models.build(CASES["bert"], 2, problem_type="single_label_classification")
    refused(tmp_path, student, other, "teacher: got Bert.*'single_label_classification', expected")
    with pytest.raises(TypeError, match=r"temperature: got it in.*'regression'.*are alpha, kind"):
        ours.compute_loss_func(*pair("numbers"), temperature=2.0)
    alone = models.build(CASES["one-logit"], 1, problem_type="single_label_classification")
    refused(tmp_path, alone, None, "and num_labels 1, expected for a yes or no 'multi_label")
    data = [row | {"labels": torch.tensor(1)} for row in models.rows(CASES["number"])]
    with pytest.raises(ValueError, match=r"labels: got int64 \[4, 1\].*'multi_label_class"):
        trained(tmp_path, "number", *pair("number"), loss={}, train_dataset=data)


def test_labels_say_what_the_logits_are(tmp_path: Path) -> None:
    """Where the config does not; -100 is left out, and a plain Trainer has the same loss."""
    student, teacher = pair("several")
    data = models.rows(CASES["several"])
    data[0]["labels"][1] = -100
    student.config.problem_type = teacher.config.problem_type = None
    ask = {"pos_weight": torch.tensor([1.0, 2.0, 3.0]), "temperature": 3.0, "divergence": "js"}
    losses = []
    batch = models.stacked(data[:4])
    y = batch.pop("labels")
    with torch.no_grad():
        s, t = (m.eval()(**batch).logits for m in (student, teacher))
        want = fastkd.binary_distillation_loss(s, t, y, **ask)  # type: ignore[arg-type]
    for kind in (ours.DistillationTrainer, hf.Trainer):
        own = copy.deepcopy(student)
        options = {"teacher": teacher, "loss": ask}
        if kind is hf.Trainer:
            options = {"compute_loss_func": ours.compute_loss_func(own, teacher, **ask)}
        trainer = kind(own, arguments(tmp_path, **ARGS), train_dataset=data, **options)
        trainer.train()
        losses.append(curve(trainer))
        assert own.config.problem_type == "multi_label_classification"  # for pipelines
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(float(want), rel=1e-4)


def test_probabilities_of_one_label(tmp_path: Path) -> None:
    """Mixup: where the config says that one label counts, floats are probabilities."""
    student, teacher = pair("vit", problem_type="single_label_classification")
    data = models.rows(CASES["vit"])
    whole = curve(trained(tmp_path, "vit", copy.deepcopy(student), teacher, train_dataset=data))
    for row in data:
        row["labels"] = torch.nn.functional.one_hot(row["labels"], models.CLASSES).float()
    found = curve(trained(tmp_path, "vit", student, teacher, train_dataset=data))
    assert found == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("BertForQuestionAnswering", lambda: hf.BertConfig(**models.BERT)),
        ("BertForPreTraining", lambda: hf.BertConfig(**models.BERT)),
        ("BartModel", lambda: hf.BartConfig(**models.BART)),
    ],
)
def test_models_of_no_family(model: str, config: Any, tmp_path: Path) -> None:
    student = getattr(hf, model)(config())
    refused(tmp_path, student, None, rf"student: got {model}.*a causal language model, .*compute_l")


def test_teachers_of_another_form(tmp_path: Path) -> None:
    student, teacher = pair("bert")
    words = "teacher: got BertForTokenClassification.*a classifier of tokens, expected a classifier"
    refused(tmp_path, student, models.build(CASES["tokens"], 2), words)
    teacher = models.build(CASES["bert"], 2, num_labels=5)
    refused(tmp_path, student, teacher, "teacher: got 5 labels, expected the student's 3")
    student.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    teacher = models.build(CASES["bert"], 2)
    teacher.config.id2label = {0: "Yes", 1: "No", 2: "Maybe"}
    refused(tmp_path, student, teacher, r"teacher: got the student's labels in another order \(id")
    masked = models.build(CASES["masked"], 1), models.build(CASES["masked"], 2, vocab_size=31)
    refused(tmp_path, *masked, "teacher: got a vocabulary of 31, expected the student's 30.*vocab_")


def test_logits_that_are_always_built(tmp_path: Path) -> None:
    words = "linear: got True for BertForTokenClassification, a classifier of tokens"
    refused(tmp_path, *pair("tokens"), words, linear=True)


def test_labels_of_a_picture(tmp_path: Path) -> None:
    data = [row | {"labels": row["input_ids"]} for row in models.rows(CASES["llava"])]
    with pytest.raises(ValueError, match=r"labels: got 16 of image_token_id 29.*expected -100"):
        trained(tmp_path, "llava", *pair("llava"), train_dataset=data)


def test_a_balance_of_experts_that_needs_labels(tmp_path: Path) -> None:
    student, teacher = pair("mixtral")
    trainer = trained(tmp_path, "mixtral", student, teacher, args={"max_steps": 1})
    student.register_forward_hook(lambda _, inputs, output: setattr(output, "aux_loss", None))
    batch = models.stacked(models.rows(CASES["mixtral"]))
    with pytest.raises(ValueError, match=r"student: got Mixtral.*output_router_logits=False"):
        trainer.compute_loss(student, batch)
