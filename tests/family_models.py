"""A tiny model, and rows of data, of each family that transformers' students are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from causal_models import hf
from torch import Tensor

VOCAB, CLASSES, LENGTH, ROWS = 30, 3, 6, 8
BERT = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 2, "num_labels": CLASSES}
LLAMA = BERT | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
DISTIL = {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
BART |= {"encoder_ffn_dim": 16, "max_position_embeddings": 16, "pad_token_id": 0}
BART |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WHISPER = BART | {"num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 16}
PICTURE = {"image_size": 4, "patch_size": 2, "num_labels": CLASSES}
VIT = {**PICTURE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VIT |= {"num_attention_heads": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES}
RESNET |= {"layer_type": "basic"}
MAMBA = {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
MIXTRAL = LLAMA | {"num_local_experts": 2, "output_router_logits": True}
MIXTRAL |= {"router_aux_loss_coef": 0.5}
SWITCH = T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
SWITCH |= {"num_layers": 2, "num_decoder_layers": 2}  # every second one has experts
SWITCH |= {"router_aux_loss_coef": 0.5, "expert_capacity": 8}
IMAGE = 29  # the token that stands for a picture's patch


def llava() -> Any:
    vision = {k: v for k, v in VIT.items() if k != "num_labels"} | {
        "model_type": "clip_vision_model"
    }
    return hf.LlavaConfig(
        vision_config=vision | {"projection_dim": 16},
        text_config={k: v for k, v in LLAMA.items() if k != "num_labels"} | {"model_type": "llama"},
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )


def tokens() -> dict[str, Tensor]:
    mask = torch.arange(LENGTH) < int(torch.randint(3, LENGTH + 1, ()))
    return {"input_ids": torch.randint(3, 28, (LENGTH,)) * mask, "attention_mask": mask.long()}


def each(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels of tokens, of which some do not count."""
    return row | {"labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)}


def one(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return row | {"labels": torch.randint(CLASSES, ())}


def masked() -> dict[str, Tensor]:
    row = tokens()
    labels = row["input_ids"].masked_fill(torch.rand(LENGTH) < 0.5, -100)
    labels[0] = row["input_ids"][0]
    return row | {"labels": labels}


def tagged() -> dict[str, Tensor]:
    row = masked()
    return row | {"labels": torch.where(row["labels"] == -100, -100, row["labels"] % CLASSES)}


def translated(source: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    target = tokens()
    return source() | {"labels": each(target)["labels"]}


def heard() -> dict[str, Tensor]:
    return {"input_features": torch.randn(4, 8)}


def picture(size: int = 4) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, size, size)}


def told() -> dict[str, Tensor]:
    """A picture of 4 patches and text behind it."""
    ids = torch.cat((torch.full((4,), IMAGE), torch.randint(3, 28, (4,))))
    labels = ids.masked_fill(ids == IMAGE, -100)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return row | picture()


def several(labels: int = CLASSES) -> dict[str, Tensor]:
    """Some of the classes at once."""
    return tokens() | {"labels": (torch.rand(labels) < 0.5).float()}


def measured(row: dict[str, Tensor], *size: int) -> dict[str, Tensor]:
    return row | {"labels": torch.randn(size)}


def chosen() -> dict[str, Tensor]:
    options = [tokens() for _ in range(2)]
    row = {name: torch.stack([x[name] for x in options]) for name in options[0]}
    return row | {"labels": torch.randint(2, ())}


class Case(NamedTuple):
    """A class of models, its config, a row of data, and whether labels shift and a head is read.

    Args:
        size: factor of the first weights, so that logits tell rows apart; where experts are chosen,
            small ones keep two runs from choosing otherwise.
    """

    model: str
    config: Callable[[], Any]
    row: Callable[[], dict[str, Tensor]]
    shift: bool = False
    linear: bool = False
    size: float = 3.0


CASES = {
    "distilbert": Case(
        "DistilBertForSequenceClassification",
        lambda: hf.DistilBertConfig(**DISTIL, num_labels=CLASSES),
        lambda: one(tokens()),
    ),
    "bert": Case(
        "BertForSequenceClassification", lambda: hf.BertConfig(**BERT), lambda: one(tokens())
    ),
    "llama-classifier": Case(
        "LlamaForSequenceClassification", lambda: hf.LlamaConfig(**LLAMA), lambda: one(tokens())
    ),
    "several": Case(
        "BertForSequenceClassification",
        lambda: hf.BertConfig(**BERT, problem_type="multi_label_classification"),
        several,
    ),
    "one-logit": Case(
        "DistilBertForSequenceClassification",
        lambda: hf.DistilBertConfig(
            **DISTIL, num_labels=1, problem_type="multi_label_classification"
        ),
        lambda: several(1),
    ),
    "number": Case(
        "ViTForImageClassification",
        lambda: hf.ViTConfig(**VIT | {"num_labels": 1}),
        lambda: measured(picture()),
    ),
    "numbers": Case(
        "BertForSequenceClassification",
        lambda: hf.BertConfig(**BERT, problem_type="regression"),
        lambda: measured(tokens(), CLASSES),
    ),
    "choice": Case("BertForMultipleChoice", lambda: hf.BertConfig(**BERT), chosen),
    "tokens": Case("BertForTokenClassification", lambda: hf.BertConfig(**BERT), tagged),
    "masked": Case("BertForMaskedLM", lambda: hf.BertConfig(**BERT), masked, linear=True),
    "t5": Case(
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(**T5),
        lambda: translated(tokens),
        linear=True,
    ),
    "bart": Case(
        "BartForConditionalGeneration",
        lambda: hf.BartConfig(**BART),
        lambda: translated(tokens),
        linear=True,
    ),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        lambda: hf.WhisperConfig(**WHISPER),
        lambda: translated(heard),
        linear=True,
    ),
    "switch": Case(
        "SwitchTransformersForConditionalGeneration",
        lambda: hf.SwitchTransformersConfig(**SWITCH),
        lambda: translated(tokens),
        linear=True,
        size=1.0,
    ),
    "vit": Case("ViTForImageClassification", lambda: hf.ViTConfig(**VIT), lambda: one(picture())),
    "resnet": Case(
        "ResNetForImageClassification", lambda: hf.ResNetConfig(**RESNET), lambda: one(picture(16))
    ),
    "llava": Case("LlavaForConditionalGeneration", llava, told, shift=True, linear=True),
    "mixtral": Case(
        "MixtralForCausalLM",
        lambda: hf.MixtralConfig(**{k: v for k, v in MIXTRAL.items() if k != "num_labels"}),
        lambda: each(tokens()),
        shift=True,
        linear=True,
    ),
    "mamba": Case(
        "MambaForCausalLM",
        lambda: hf.MambaConfig(**MAMBA),
        lambda: each(tokens()),
        shift=True,
        linear=True,
    ),
}


def build(case: Case, seed: int, **changed: Any) -> Any:
    """A model without dropout, whose weights are large enough that its logits tell rows apart."""
    torch.manual_seed(seed)
    config = case.config()
    for part in (config, *(getattr(config, x, None) for x in ("text_config", "vision_config"))):
        for name in vars(part) if part is not None else ():
            if ("drop" in name or "jitter" in name) and isinstance(getattr(part, name), float):
                setattr(part, name, 0.0)
    for name, value in changed.items():
        setattr(config, name, value)
    model = getattr(hf, case.model)(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(case.size)
    return model


def rows(case: Case, count: int = ROWS) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    return [case.row() for _ in range(count)]


def stacked(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


# of problem types; all others have a cross-entropy
LOSSES: dict[Any, Any] = {
    "regression": F.mse_loss,
    "multi_label_classification": F.binary_cross_entropy_with_logits,
}


def eager(
    case: Case, student: Any, teacher: Any, batch: dict[str, Tensor], total: Any, t: float, a: float
) -> Tensor:
    """alpha * hard + (1 - alpha) T^2 KL, summed over the rows that count, over `total`."""
    with torch.no_grad():
        said = teacher(**batch).logits
    output = student(**batch)
    logits, labels = output.logits, batch["labels"]
    if case.shift:
        logits, said, labels = logits[:, :-1], said[:, :-1], labels[:, 1:]
    by = LOSSES.get(getattr(student.config, "problem_type", None), F.cross_entropy)
    if by is not F.cross_entropy:
        labels = labels.view(said.shape)
    keep = labels != -100
    s, p, labels = logits[keep], said[keep], labels[keep]
    hard = by(s, labels, reduction="sum")
    if by is F.cross_entropy:
        soft = t * t * F.kl_div((s / t).log_softmax(-1), (p / t).softmax(-1), reduction="sum")
    elif by is F.mse_loss:
        soft = F.mse_loss(s, p, reduction="sum")
    else:
        yes, no = (p / t).sigmoid(), (-p / t).sigmoid()
        soft = F.kl_div(F.logsigmoid(s / t), yes, reduction="sum")
        soft = t * t * (soft + F.kl_div(F.logsigmoid(-s / t), no, reduction="sum"))
    loss = (a * hard + (1 - a) * soft) / total
    own = by(s, labels)
    return loss + (output.loss - own)  # what the model adds to its own: the balance of experts


def count(case: Case, batches: list[dict[str, Tensor]]) -> int:
    first = 1 if case.shift else 0
    return int(
        sum((b["labels"][..., first:] if first else b["labels"]).ne(-100).sum() for b in batches)
    )
