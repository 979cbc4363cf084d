"""Models: heads of families, hooks, checkpoints of gradients, what is refused."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import (
    LOSS,
    SIZES,
    VOCAB,
    curve,
    distilled,
    eager_loss,
    hf,
    llama,
    loss_of,
    make,
    ragged,
    together,
    trainer_of,
)
from torch import nn

from fastkd.distill import heads
from fastkd.integrations import transformers as ours
from fastkd.operands import build

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
    ],
    ids=["other", "twice", "none", "sequential", "meta", "no-model"],
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
        ({"linear": False}, TypeError, "linear: got False in loss, expected it beside loss"),
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


@pytest.mark.parametrize("teacher", ["gpt2", [1]])
def test_a_teacher_that_is_no_model(teacher: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"teacher: got .*expected a model"):
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
