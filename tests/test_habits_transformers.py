"""What people do with the Trainer by habit: it is right, or it is refused by name."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hf = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from fastkd.integrations import transformers as ours  # noqa: E402

VOCAB = 40
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB, (8, 6))]


def llama(seed: int = 0, **extra: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=VOCAB, **sizes | heads | extra))


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = hf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
    )
    return hf.GPT2LMHeadModel(config)


def arguments(folder: Path, **extra: Any) -> Any:
    options: dict[str, Any] = {"max_steps": 2, "report_to": [], "disable_tqdm": True, "seed": 1}
    options |= {"use_cpu": True, "save_strategy": "no", "per_device_train_batch_size": 4}
    return hf.TrainingArguments(str(folder), **options | extra)


def distilled(folder: Path, student: Any, teacher: Any, **options: Any) -> Any:
    options = {"train_dataset": ROWS} | options
    args = arguments(folder, **options.pop("args", {}))
    return ours.DistillationTrainer(student, args, teacher=teacher, **options)


def plain(folder: Path, student: Any, loss: Any, **extra: Any) -> Any:
    args = arguments(folder, **extra)
    return hf.Trainer(student, args, train_dataset=ROWS, compute_loss_func=loss)


# ---- modes of what student and teacher share


def sharing() -> tuple[Any, Any]:
    """A student with the teacher's first block, frozen; dropout 0.1 in it."""
    student, teacher = gpt2(1), gpt2(2)
    block = teacher.transformer.h[0].requires_grad_(False)
    student.transformer.h[0] = block
    return student, teacher


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("how", ["trainer", "function"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_shared_modules_keep_the_students_mode(
    how: str, linear: bool, checkpointing: bool, tmp_path: Path
) -> None:
    student, teacher = sharing()
    modes: dict[str, set[bool]] = {"student": set(), "teacher": set()}
    asked = []
    teacher.register_forward_pre_hook(lambda *_: asked.append("teacher"))
    teacher.register_forward_hook(lambda *_: asked.append("student"))
    dropout = teacher.transformer.h[0].mlp.dropout
    args = {"gradient_checkpointing": checkpointing}
    if how == "trainer":
        trainer = distilled(tmp_path, student, teacher, linear=linear, args=args)
    else:
        loss = ours.compute_loss_func(student, teacher, linear=linear)
        trainer = plain(tmp_path, student, loss, **args)
    asked[:] = ["student"]
    dropout.register_forward_pre_hook(lambda *_: modes[asked[-1]].add(dropout.training))
    trainer.train()
    assert modes == {"student": {True}, "teacher": {False}}


def test_a_part_of_the_teacher_in_train_mode(tmp_path: Path) -> None:
    student, teacher = gpt2(1), gpt2(2)
    trainer = distilled(tmp_path, student, teacher)
    teacher.transformer.h[1].train()
    modes = set()
    dropout = teacher.transformer.h[1].mlp.dropout
    dropout.register_forward_pre_hook(lambda *_: modes.add(dropout.training))
    trainer.train()
    assert modes == {False} and not any(m.training for m in teacher.modules())


# ---- one student, loss functions one after the other; copies of it


def test_a_cell_that_is_run_again(tmp_path: Path) -> None:
    student, teacher = gpt2(1), gpt2(2)
    for _ in range(2):
        loss = ours.compute_loss_func(student, teacher)
        assert plain(tmp_path, student, loss).train().global_step == 2
    assert distilled(tmp_path, student, teacher).train().global_step == 2
    loss = ours.compute_loss_func(student, teacher)
    loss.detach()
    assert not any(m._forward_pre_hooks for m in student.modules())
    assert student.loss_type is None


def test_the_older_function_says_that_it_was_replaced() -> None:
    student, tokens = llama(1), torch.stack([row["labels"] for row in ROWS])
    older = ours.compute_loss_func(student, llama(2))
    ours.compute_loss_func(student, llama(2))
    with pytest.raises(RuntimeError, match="no newer loss function"):
        older(student(input_ids=tokens), tokens)


def test_a_student_with_hooks_is_saved_and_copied() -> None:
    student, tokens = llama(1), torch.stack([row["labels"] for row in ROWS])
    loss = ours.compute_loss_func(student, llama(2))
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(student)):
        output = student(input_ids=tokens)
        whole = twin.train()(input_ids=tokens).logits  # sees nothing, trims nothing
        assert whole.shape == (8, 6, VOCAB) and output.logits.shape == (8, 0, VOCAB)
        assert loss(output, tokens).isfinite()


# ---- who shifts the labels


def bert(**extra: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return sizes | {"vocab_size": VOCAB, "num_attention_heads": 2} | extra


BART = {"vocab_size": VOCAB, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
BART |= {"decoder_ffn_dim": 16, "is_decoder": True, "is_encoder_decoder": False}
XLM = {"vocab_size": VOCAB, "emb_dim": 16, "n_layers": 1, "n_heads": 2}
REFUSED: dict[str, Any] = {
    "XLNetLMHeadModel": lambda: hf.XLNetConfig(
        vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=16
    ),
    "XLMWithLMHeadModel": lambda: hf.XLMConfig(**XLM),
    "FlaubertWithLMHeadModel": lambda: hf.FlaubertConfig(**XLM),
    "BertLMHeadModel": lambda: hf.BertConfig(**bert()),
    "RobertaForCausalLM": lambda: hf.RobertaConfig(**bert()),
    "ElectraForCausalLM": lambda: hf.ElectraConfig(**bert(embedding_size=16)),
    "BertGenerationDecoder": lambda: hf.BertGenerationConfig(**bert()),
    "BartForCausalLM": lambda: hf.BartConfig(**BART),
    "MBartForCausalLM": lambda: hf.MBartConfig(**BART),
    "ProphetNetForCausalLM": lambda: hf.ProphetNetConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_decoder_layers=1,
        num_decoder_attention_heads=2,
        decoder_ffn_dim=16,
        is_decoder=True,
        is_encoder_decoder=False,
        add_cross_attention=False,
    ),
    "CpmAntForCausalLM": lambda: hf.CpmAntConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_attention_heads=2,
        dim_head=8,
        dim_ff=16,
        num_hidden_layers=1,
        prompt_length=2,
    ),
}
TAKEN: dict[str, Any] = {
    "GPT2LMHeadModel": lambda: gpt2().config,
    "OpenAIGPTLMHeadModel": lambda: hf.OpenAIGPTConfig(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2
    ),
    "CTRLLMHeadModel": lambda: hf.CTRLConfig(
        vocab_size=VOCAB, n_embd=16, dff=16, n_layer=1, n_head=2
    ),
    "BertLMHeadModel": lambda: hf.BertConfig(**bert(is_decoder=True)),
    "RobertaForCausalLM": lambda: hf.RobertaConfig(**bert(is_decoder=True)),
    "BertGenerationDecoder": lambda: hf.BertGenerationConfig(**bert(is_decoder=True)),
    "ReformerModelWithLMHead": lambda: hf.ReformerConfig(
        vocab_size=VOCAB, hidden_size=16, attention_head_size=8, num_attention_heads=2,
        feed_forward_size=16, attn_layers=["local"], is_decoder=True, axial_pos_embds=False,
    ),
}  # fmt: skip


def made(name: str, table: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = getattr(hf, name)(table[name]())
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_not_taken_for_gpt2(name: str, tmp_path: Path) -> None:
    student = made(name, REFUSED)
    with pytest.raises(ValueError, match=rf"student: got {name}"):
        distilled(tmp_path, student, None, linear=False)
    with pytest.raises(ValueError, match=rf"student: got {name}"):
        ours.compute_loss_func(student, None, linear=False)


def test_a_teacher_that_looks_ahead(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher: got RobertaForCausalLM.*is_decoder=True"):
        distilled(tmp_path, gpt2(), made("RobertaForCausalLM", REFUSED), linear=False)


@pytest.mark.parametrize("name", TAKEN)
def test_models_whose_labels_are_shifted(name: str, tmp_path: Path) -> None:
    student = made(name, TAKEN).eval()
    trainer = distilled(tmp_path, student, gpt2(), linear=False, loss={"alpha": 1.0})
    batch = {k: torch.stack([row[k] for row in ROWS]) for k in ROWS[0]}
    with torch.no_grad():
        own = student(**batch).loss
        torch.testing.assert_close(trainer.compute_loss(student, batch), own)


class Own(hf.GPT2LMHeadModel):  # type: ignore[misc]
    """A class of one's own, whose name says nothing."""


class Unshifted(Own):
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(
                output.logits.flatten(0, -2), labels.flatten()
            )
        return output


def test_a_class_of_ones_own_answers_for_itself(tmp_path: Path) -> None:
    distilled(tmp_path, Own(gpt2().config), gpt2())
    with pytest.raises(ValueError, match=r"student: got Unshifted .*does not shift its labels"):
        distilled(tmp_path, Unshifted(gpt2().config), gpt2())
