"""What people do with the Trainer by habit: it is right, or it is refused by name."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
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


@pairwise
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
    args = {"gradient_checkpointing": checkpointing, "max_steps": 1}
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


# ---- options, by habit


@pytest.mark.parametrize(("loss", "said"), [("kl", "'kl'"), ([1, 2], "list"), (abs, "builtin")])
def test_a_loss_that_is_no_dict(loss: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"loss: got {said}.*expected a dict of options"):
        distilled(tmp_path, llama(1), llama(2), loss=loss)


def test_a_teacher_that_is_not_read_is_named_once(tmp_path: Path) -> None:
    rows = [row | {"teacher": torch.randn(6, VOCAB)} for row in ROWS]
    for teacher, data in ((llama(2), ROWS), (None, rows)):
        trainer = distilled(tmp_path, llama(1), teacher, loss={"alpha": 1.0}, train_dataset=data)
        with pytest.warns(UserWarning, match="teacher: given .*alpha=1") as caught:
            trainer.train()
        assert sum("alpha=1" in str(one.message) for one in caught) == 1


def test_smoothing_that_the_plain_trainer_does_not_read(tmp_path: Path) -> None:
    student = llama(1)
    loss = ours.compute_loss_func(student, llama(2))
    with pytest.warns(UserWarning, match=r"label_smoothing_factor: got 0\.1") as caught:
        plain(tmp_path, student, loss, label_smoothing_factor=0.1).train()
    assert sum("label_smoothing_factor" in str(one.message) for one in caught) == 1


def test_schedules_of_the_step(tmp_path: Path) -> None:
    def curve(loss: dict[str, Any], steps: int) -> list[float]:
        args = {"logging_steps": 1, "max_steps": steps, "learning_rate": 0.0}
        trainer = distilled(tmp_path, llama(1), llama(2), loss=loss, args=args)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    both = {"temperature": lambda step: 2.0 + step, "alpha": lambda step: step / 2}
    first, second = curve(both, 2)
    assert first == pytest.approx(curve({"temperature": 2.0, "alpha": 0.0}, 1)[0])
    assert second == pytest.approx(curve({"temperature": 3.0, "alpha": 0.5}, 2)[1])
    with pytest.raises(TypeError, match="alpha: got a function, expected a number"):
        ours.compute_loss_func(llama(1), llama(2), alpha=lambda step: 0.5)


def test_a_stored_column_that_the_plain_trainer_drops(tmp_path: Path) -> None:
    student = llama(1)
    loss = ours.compute_loss_func(student, None)
    trainer = plain(tmp_path, student, loss)
    trainer.train_dataset = [row | {"teacher": torch.randn(6, VOCAB)} for row in ROWS]
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


def test_a_ragged_stored_column(tmp_path: Path) -> None:
    rows = [row | {"teacher": torch.randn(3 + i, VOCAB)} for i, row in enumerate(ROWS)]
    trainer = distilled(tmp_path, llama(1), None, train_dataset=rows)
    with pytest.raises(ValueError, match=r"teacher: got a stored column .*data_collator="):
        trainer.train()


def test_virtual_tokens_are_named() -> None:
    student, tokens = llama(1), torch.stack([row["labels"] for row in ROWS])
    loss = ours.compute_loss_func(student, llama(2))
    outputs = student(input_ids=torch.cat((tokens[:, :3], tokens), 1))
    with pytest.raises(ValueError, match=r"\[8, 6\] for logits \[8, 9, 40\].*3 virtual tokens"):
        loss(outputs, tokens)


def test_weights_that_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "linear: got True with weights that are sharded.*linear=False"
    tokens = torch.stack([row["labels"] for row in ROWS])
    student = llama(1)
    loss = ours.compute_loss_func(student, llama(2))
    outputs = student(input_ids=tokens)
    student.lm_head.weight.untyped_storage().resize_(0)  # as FSDP does behind a forward
    with pytest.raises(ValueError, match=words):
        loss(outputs, tokens)
    student = llama(1)
    ours.compute_loss_func(student, llama(2))
    student.lm_head.weight.data = torch.empty(0)  # as under ZeRO-3
    with pytest.raises(ValueError, match=words):
        student(input_ids=tokens)
    monkeypatch.setattr(ours, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=words):
        ours.compute_loss_func(llama(1), llama(2))
    ours.compute_loss_func(llama(1), llama(2), linear=False)


def tokenizer(*words: str) -> Any:
    from tokenizers import Tokenizer, models

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="a")


def test_tokenizers_of_one_width_and_other_tokens(tmp_path: Path) -> None:
    def trainer(*words: str, **options: Any) -> Any:
        return distilled(
            *(tmp_path, llama(1), llama(2)),
            processing_class=tokenizer("a", "b", "c"),
            teacher_tokenizer=tokenizer(*words),
            **options,
        )

    trainer("a", "b", "c")
    with pytest.raises(ValueError, match=r"other tokens .* 2 of 3 ids \(id 1 is 'c' .* 'b'"):
        trainer("a", "c", "b")
    trainer("a", "b", "d", loss={"vocab_size": 2})
    with pytest.raises(ValueError, match="teacher_tokenizer: got one without processing_class"):
        distilled(tmp_path, llama(1), llama(2), teacher_tokenizer=tokenizer("a"))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("temprature", r"did you mean 'temperature'\?$"),
        ("pos_weight", r"in the loss of a causal language model, whose options are .*outputs$"),
        ("kind", r"in the loss of a causal language model, whose options are .*outputs$"),
        ("class_weight", r"fastkd\.distillation_loss takes it, in a loop of your own$"),
    ],
)
def test_an_option_that_is_none_of_a_language_model(tmp_path: Path, option: str, says: str) -> None:
    loss = {option: "l1" if option == "kind" else torch.ones(VOCAB)}
    with pytest.raises(TypeError, match=says):
        ours.compute_loss_func(llama(1), llama(0), **loss)
    with pytest.raises(TypeError, match=says) as error:
        ours.DistillationTrainer(llama(1), arguments(tmp_path), teacher=llama(0), loss=loss)
    assert "problem_type" not in str(error.value)
