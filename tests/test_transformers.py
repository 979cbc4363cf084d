"""transformers' Trainer with the distillation loss, and heads of causal language models.

Models are randomly initialised from configs; nothing is downloaded.
"""

from __future__ import annotations

import copy
import doctest
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hf = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import fastkd  # noqa: E402
from fastkd.integrations import causal, heads  # noqa: E402
from fastkd.integrations import transformers as ours  # noqa: E402
from fastkd.operands import build  # noqa: E402

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


FAMILIES: list[tuple[str, dict[str, Any], float, float | None, bool]] = [
    ("Llama", {}, 1.0, None, False),
    ("Llama", {"tie_word_embeddings": True}, 1.0, None, False),
    ("Qwen2", {}, 1.0, None, False),
    ("Qwen3", {}, 1.0, None, False),
    ("Mistral", {}, 1.0, None, False),
    ("GPT2", {}, 1.0, None, False),
    ("GPTNeoX", {}, 1.0, None, False),
    ("Phi", {}, 1.0, None, True),
    ("Gemma", {}, 1.0, None, False),
    ("Gemma2", {"final_logit_softcapping": 5.0}, 1.0, 5.0, False),
    ("Gemma2", {"final_logit_softcapping": None}, 1.0, None, False),
    ("Gemma3", {"final_logit_softcapping": 7.0}, 1.0, 7.0, False),
    ("Cohere", {"logit_scale": 0.25}, 0.25, None, False),
    ("Cohere2", {"logit_scale": 0.5}, 0.5, None, False),
    ("Granite", {"logits_scaling": 8.0}, 0.125, None, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "family", FAMILIES, ids=lambda family: "-".join(map(str, (family[0], *family[1].values())))
)
def test_heads_of_families(family: Any, dtype: torch.dtype) -> None:
    name, extra, scale, cap, bias = family
    model = make(name, vocab_size=104, **extra).to(dtype)  # five columns of padding
    if bias:
        nn.init.normal_(model.get_output_embeddings().bias)
    head = ours.head_of(model)
    assert head.scale == pytest.approx(scale) and head.softcap == cap
    inputs = {"input_ids": torch.randint(3, VOCAB, (2, 5)), "attention_mask": torch.ones(2, 5)}
    model.eval()
    logits, output = ours.linear_logits(model, inputs)
    assert output.logits.shape == (2, 0, 104) and logits.shape == (2, 5, 104)
    assert (logits.bias is not None) is bias
    whole = model(**inputs).logits.float()
    tolerance = heads.CLOSE[dtype] * float(whole.detach().abs().max())
    built = build(logits.hidden, logits.weight, logits.bias, logits.head, 104).float()
    torch.testing.assert_close(built, whole, rtol=0, atol=tolerance)


class Tripled(hf.LlamaForCausalLM):  # type: ignore[misc]
    """A family whose forward does something to its logits that no config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.size(-1))
        return output


class Twice(hf.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


def wrapped_head(model: Any) -> Any:
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    return model


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: Tripled(llama().config), ValueError, "Tripled .*'llama'.*makes something else"),
        (lambda: Twice(llama().config), ValueError, "Twice .*calls its head 2 times"),
        (lambda: hf.LlamaModel(llama().config), ValueError, "LlamaModel .*gives no head"),
        (
            lambda: wrapped_head(llama()),
            TypeError,
            r"(?s)LlamaForCausalLM.*expected a plain nn\.Linear",
        ),
        (lambda: llama().to("meta"), ValueError, "LlamaForCausalLM .*sharded or offloaded"),
        (lambda: nn.Linear(2, 2), ValueError, "got Linear, whose"),
        (
            lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            ValueError,
            "T5ForConditionalGeneration .*encoder-decoder",
        ),
    ],
    ids=["other", "twice", "none", "sequential", "meta", "no-model", "t5"],
)
def test_heads_that_are_refused(model: Callable[[], Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        ours.head_of(model())


def test_a_head_is_read_without_a_trace() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.norm.eval()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ours.head_of(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model.lm_head.training and not model.model.norm.training
    assert not model.lm_head._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


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


def arguments(folder: Path, **extra: Any) -> Any:
    default: dict[str, Any] = {
        **{"per_device_train_batch_size": 4, "max_steps": 10, "logging_steps": 1, "seed": 1},
        **{"learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": []},
        **{"disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_grad_norm": 0.0},
    }
    return hf.TrainingArguments(str(folder), **default | extra)


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


def curve(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def run(trainer: Any, **options: Any) -> Any:
    hf.set_seed(1)  # of the order of the samples, whatever was made before
    trainer.train(**options)
    return trainer


def eager_run(folder: Path, student: Any, smoothing: float = 0.0, **extra: Any) -> Any:
    trainer = Eager(student, arguments(folder, **extra), train_dataset=ragged())
    trainer.teacher, trainer.smoothing = llama(9).eval(), smoothing
    return run(trainer)


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


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    student = llama(1)
    run = eager_run(tmp_path_factory.mktemp("eager"), student, gradient_accumulation_steps=2)
    losses = curve(run)
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    return losses, student.state_dict()


@pytest.mark.parametrize("how", ["linear", "packed", "dense", "adapter"])
def test_the_curve_is_that_of_the_eager_loss(how: str, eager: Any, tmp_path: Path) -> None:
    losses, weights = eager
    student = llama(1)
    run = distilled(tmp_path, student, how, gradient_accumulation_steps=2)
    assert curve(run) == pytest.approx(losses, rel=1e-4)  # logged with 4 to 7 digits
    torch.testing.assert_close(student.state_dict(), weights, rtol=0, atol=2e-4)


@pytest.mark.parametrize("how", ["linear", "dense"])
def test_under_autocast(how: str, tmp_path: Path) -> None:
    students = [llama(1), llama(1)]
    losses = curve(eager_run(tmp_path, students[0], bf16=True))
    run = distilled(tmp_path, students[1], how, bf16=True)
    assert curve(run) == pytest.approx(losses, rel=2e-2)


@pytest.mark.parametrize("how", ["linear", "adapter"])
def test_accumulation_changes_nothing(how: str, tmp_path: Path) -> None:
    """Ragged micro-batches of a step weigh as in one batch: by their tokens."""
    weights = []
    for steps in (1, 2, 4):
        student = llama(1)
        size = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        distilled(tmp_path, student, how, max_steps=4, optim="sgd", learning_rate=0.1, **size)
        weights.append(student.state_dict())
    start = llama(1).state_dict()
    moved = max(float((weights[0][k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-3
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-5)


def test_resuming_ends_in_the_same_weights(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = llama(1)
    distilled(tmp_path, whole, "linear", **saving)
    saved = tmp_path / "checkpoint-3"
    resumed = llama(5)
    trainer = ours.DistillationTrainer(
        resumed,
        arguments(tmp_path / "more", **saving),
        train_dataset=ragged(),
        teacher=llama(9),
        loss=LOSS,
    )
    run(trainer, resume_from_checkpoint=str(saved))
    assert trainer.state.global_step == 6
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)

    from safetensors import safe_open

    with safe_open(str(saved / "model.safetensors"), "pt") as file:
        assert set(file.keys()) == set(whole.state_dict())  # and nothing of the teacher
    trainer.save_model(str(tmp_path / "out"))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def trainer_of(folder: Path, student: Any, teacher: Any, **options: Any) -> Any:
    args = options.pop("args", {})
    options = {"loss": LOSS, "train_dataset": ragged(), "eval_dataset": ragged(6, seed=3)} | options
    return ours.DistillationTrainer(student, arguments(folder, **args), teacher=teacher, **options)


def together(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


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


def loss_of(student: Any, teacher: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    function = causal.DistillationLoss(teacher, **LOSS | options)
    inputs = dict(batch)
    labels = inputs.pop("labels")
    with function.watching(student):
        return function(student(**inputs), labels)


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
    """A collator that adds what the teacher said stands in for the teacher itself."""
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
    args = {"gradient_accumulation_steps": 2, "remove_unused_columns": False}
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


def test_where_the_teacher_comes_from() -> None:
    batch = together(ragged(2))
    with pytest.raises(ValueError, match="teacher: got neither a model nor"):
        loss_of(llama(1), None, batch)
    with pytest.raises(ValueError, match="teacher: got a model and also"):
        loss_of(llama(1), llama(9), batch | {"teacher": torch.randn(2, 8, VOCAB)})
    student = llama(1)
    with pytest.raises(ValueError, match="teacher: got the student itself"):
        loss_of(student, student, batch)


def test_a_mixture_of_experts_keeps_its_balance() -> None:
    extra = {"output_router_logits": True, "num_local_experts": 4, "router_aux_loss_coef": 0.5}
    student, batch = make("Mixtral", 1, **extra).eval(), together(ragged(2))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = student(**inputs)
    truth = eager_loss(output.logits, llama(9).eval()(**inputs).logits, batch["labels"])
    torch.testing.assert_close(
        loss_of(student, llama(9), batch), truth + 0.5 * output.aux_loss, rtol=1e-5, atol=1e-5
    )


def test_nothing_stays_on_the_students_of_the_trainer(tmp_path: Path) -> None:
    student = llama(1)
    run = distilled(tmp_path, student, "linear", max_steps=1)
    assert not any(m._forward_pre_hooks for m in student.modules())
    assert run.distillation._seen.inputs is None and run.distillation._seen.logits is None


def test_hooks_of_the_adapter() -> None:
    student, tokens = llama(1), torch.randint(3, VOCAB, (2, 6))
    loss = ours.compute_loss_func(student, llama(9), **LOSS)
    assert student(input_ids=tokens).logits.shape == (2, 0, VOCAB)  # training: never built
    with torch.no_grad():
        assert student(input_ids=tokens).logits.shape == (2, 6, VOCAB)
    assert student.eval()(input_ids=tokens).logits.shape == (2, 6, VOCAB)
    twin = copy.deepcopy(student.train())
    loss.detach()
    assert student(input_ids=tokens).logits.shape == (2, 6, VOCAB)
    assert not any(p is q for p in twin.parameters() for q in student.parameters())
    with pytest.raises(RuntimeError, match="student: got outputs of a forward that was not seen"):
        loss(None, tokens)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    students = [llama(1), llama(1)]
    plain = distilled(tmp_path, students[0], "linear", max_steps=3)
    less = distilled(tmp_path, students[1], "linear", max_steps=3, gradient_checkpointing=True)
    assert curve(less) == pytest.approx(curve(plain), rel=1e-6)


def test_a_model_made_by_model_init(tmp_path: Path) -> None:
    made: list[Any] = []

    def init() -> Any:
        made.append(llama(1))
        return made[-1]

    trainer = trainer_of(
        *(tmp_path, None, llama(9)), model_init=init, args={"max_steps": 2, "save_strategy": "no"}
    )
    trainer.train()
    assert trainer.model is made[-1] and len(curve(trainer)) == 2


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"divergence": "kk"}, (ValueError, KeyError), "kk"),
        ({"betta": 0.1}, TypeError, "betta"),
        ({"normalizer": 3}, TypeError, "normalizer: got 3, expected no such option"),
        ({"reduction": "sum"}, TypeError, "reduction: got 'sum'"),
    ],
)
def test_options_that_are_refused(loss: Any, error: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        trainer_of(tmp_path, llama(1), llama(9), loss=loss)


def test_what_the_trainer_refuses(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="compute_loss_func: got one"):
        trainer_of(tmp_path, llama(1), llama(9), compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match=r"Tripled.*linear=False"):
        trainer_of(tmp_path, Tripled(llama(1).config), llama(9))
    trainer_of(tmp_path, Tripled(llama(1).config), llama(9), linear=False)
    data = [{k: v for k, v in row.items() if k != "labels"} for row in ragged()]
    with pytest.raises(ValueError, match="labels: got none in the batch"):
        trainer_of(tmp_path, llama(1), llama(9), train_dataset=data).train()


BERT = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}


def bert(kind: str) -> Any:
    return getattr(hf, f"BertFor{kind}")(hf.BertConfig(**BERT))


def t5() -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: bert("MaskedLM"), "BertForMaskedLM.*whose loss is 'ForMaskedLM'"),
        (lambda: bert("TokenClassification"), ".*whose loss is 'ForTokenClassification'"),
        (lambda: bert("SequenceClassification"), ".*whose loss is 'ForSequenceClassification'"),
        (t5, "T5ForConditionalGeneration.*an encoder-decoder"),
    ],
)
def test_models_whose_labels_are_not_shifted(
    model: Callable[[], Any], words: str, linear: bool, tmp_path: Path
) -> None:
    for name, pair in (("student", (model(), llama(9))), ("teacher", (llama(1), model()))):
        with pytest.raises(ValueError, match=f"{name}: got {words}"):
            trainer_of(tmp_path, *pair, linear=linear)


@pytest.mark.parametrize("teacher", ["gpt2", [1]])
def test_a_teacher_that_is_no_model(teacher: Any) -> None:
    with pytest.raises(TypeError, match=r"teacher: got .*expected a causal language model"):
        ours.DistillationLoss(teacher)


def test_a_teacher_that_shares_the_students_weights(tmp_path: Path) -> None:
    student, teacher = llama(1), llama(9)
    teacher.set_input_embeddings(student.get_input_embeddings())
    with pytest.raises(ValueError, match=r"got 1 parameters of the student \('model.embed_tokens"):
        trainer_of(tmp_path, student, teacher)
    frozen = llama(1)
    teacher = copy.copy(frozen)  # one set of weights, none of which learns
    for p in frozen.parameters():
        p.requires_grad_(False)
    trainer_of(tmp_path, frozen, teacher)


def test_a_head_that_was_replaced(tmp_path: Path) -> None:
    """resize_token_embeddings makes a new head, behind the back of what read the first."""
    data = ragged()[:4]
    trainer = trainer_of(tmp_path, llama(1), llama(9, vocab_size=110), loss={"vocab_size": VOCAB})
    trainer.model.resize_token_embeddings(110)
    loss = trainer.compute_loss(trainer.model, together(data))
    twin = trainer_of(tmp_path, trainer.model, llama(9, vocab_size=110), loss={"vocab_size": VOCAB})
    torch.testing.assert_close(loss, twin.compute_loss(twin.model, together(data)), rtol=0, atol=0)

    student = llama(1)
    function = ours.compute_loss_func(student, llama(9), vocab_size=VOCAB)
    student.resize_token_embeddings(110)
    batch = together(data)
    with pytest.raises(RuntimeError, match=r"student: .*was it replaced since"):
        function(student(input_ids=batch["input_ids"]), batch["labels"])


def test_labels_of_another_form() -> None:
    student = llama(1)
    function = ours.compute_loss_func(student, llama(9))
    outputs = student(input_ids=torch.arange(6).view(2, 3))
    with pytest.raises(ValueError, match=r"labels: got \[2\] for logits \[2, 3, 99\]"):
        function(outputs, torch.tensor([1, 2]))


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


def test_embeddings_of_another_width_than_the_teachers() -> None:
    student, teacher = llama(1), llama(9, hidden_size=SIZES["hidden_size"] * 2)
    function = ours.compute_loss_func(student, teacher, **LOSS)
    tokens = torch.arange(6).view(2, 3)
    vectors = student.get_input_embeddings()(tokens)
    width = vectors.size(-1)
    outputs = student(inputs_embeds=vectors)
    with pytest.raises(ValueError, match=f"inputs_embeds: got vectors of {width} for a teacher of"):
        function(outputs, tokens)


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="args: got 2 GPUs in one process"):
        trainer_of(tmp_path, llama(1), llama(9))


def test_sharded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="linear: got True with weights that are sharded"):
        trainer_of(tmp_path, llama(1), llama(9))
    trainer_of(tmp_path, llama(1), llama(9), linear=False)


def test_versions() -> None:
    with pytest.raises(ImportError, match=r"transformers: got version 4\.57\.1, expected 5\.0"):
        ours._check_version("4.57.1")
    ours._check_version("5.0.0")
    ours._check_version("5.23.0.dev0")


@pytest.mark.parametrize("module", [ours, heads], ids=lambda m: m.__name__)
def test_examples(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 5
