"""The families of models that a student may be of, one row each.

A row says how a model is found, whether its own loss shifts labels, which of its outputs holds the
logits, how many columns they have, and whether they are worth not building. A new family is a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.distill.heads import _config, _name, vocabulary
from fastkd.integrations.convention import unwrapped

IGNORED = -100  # torch's own label for a row that does not count


def _labels(model: Any) -> int | None:
    return getattr(model.config, "num_labels", None)


class Family(NamedTuple):
    """How the models of a family are found, and what their logits and labels are.

    Args:
        name: as a message says it.
        classes: endings of the name of a model's class, or of one that it is derived from.
        decoder: whether the model must be an encoder-decoder; None: it may be.
        form: shape of the labels, and of the logits but for their last dimension.
        shift: whether the label of a token is found at the next position.
        logits: the output that holds the logits.
        columns: of a model, how many columns its logits have.
        linear: whether logits are not built where nobody says; never, where it is False.
    """

    name: str
    classes: tuple[str, ...]
    decoder: bool | None = None
    form: str = "[B, L]"
    shift: bool = False
    logits: str = "logits"
    columns: Callable[[Any], int | None] = vocabulary
    linear: bool = False


ONE_LABEL: tuple[str, ...] = ("ForSequenceClassification", "ForAudioClassification")
ONE_LABEL += ("ForImageClassification", "ForImageClassificationWithTeacher")
ONE_LABEL += ("ForVideoClassification",)
CAUSAL = Family("a causal language model", ("ForCausalLM",), False, shift=True, linear=True)
FAMILIES = (
    CAUSAL,
    Family(
        "a sequence-to-sequence model",
        ("ForConditionalGeneration", "EncoderDecoderModel", "MTModel"),
        True,
        linear=True,
    ),
    Family(
        "a language model that sees or hears",
        ("ForConditionalGeneration",),
        False,
        shift=True,
        linear=True,
    ),
    Family("a masked language model", ("ForMaskedLM",), linear=True),
    Family("a classifier of tokens", ("ForTokenClassification",), columns=_labels),
    Family("a classifier", ONE_LABEL, form="[B]", columns=_labels),
    Family(
        "a model of multiple choice",
        ("ForMultipleChoice",),
        form="[B]",
        columns=lambda model: None,
    ),
)


def family_of(model: Any, name: str = "model") -> Family:
    """The family of a model, found by its class's name; an error where it is of none."""
    if not callable(getattr(model, "forward", None)):
        raise TypeError(f"{name}: got {model!r:.80}, expected a model of transformers")
    base = unwrapped(model)
    decodes = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    for base_class in type(base).__mro__:
        ending = base_class.__name__
        for family in FAMILIES:
            if family.decoder in (None, decodes) and ending.endswith(family.classes):
                return family
        if "For" in ending and _is_model(base_class):
            break  # of a family that is in no row
    else:
        if not decodes:
            return CAUSAL  # GPT2LMHeadModel, or a class of one's own: the model answers for itself
    raise ValueError(
        f"{name}: got {_name(base)}, which is in none of the families that can be distilled here: "
        f"{', '.join(family.name for family in FAMILIES)}; for another, override "
        "Trainer.compute_loss and call fastkd.distillation_loss on its logits"
    )


def _is_model(base_class: type) -> bool:
    return base_class.__module__.startswith("transformers.models.")


def is_classifier(family: Family) -> bool:
    """Whether its models' config says what their logits are (problem_type)."""
    return family.form == "[B]" and family.columns is _labels


def check_pair(student: Any, teacher: Any, columns: int | None) -> None:
    """Raise unless two models' logits are of one form and of the same columns."""
    family, other = family_of(student, "student"), family_of(teacher, "teacher")
    if (family.form, family.shift, family.columns) != (other.form, other.shift, other.columns):
        raise ValueError(
            f"teacher: got {_name(teacher)}, {other.name}, expected {family.name} as the student "
            f"{_name(student)} is"
        )
    sizes = [family.columns(unwrapped(model)) for model in (student, teacher)]
    words = family.columns is vocabulary
    check_sizes(sizes[0], sizes[1], columns, words=words)
    if not words:
        _check_names(student, teacher)


def check_sizes(own: int | None, other: int | None, columns: int | None, words: bool) -> None:
    """Raise where the teacher has other columns than the student and no one says how many count."""
    if columns is not None or None in (own, other) or own == other:
        return
    got, hint = f"{other} labels", "the same labels in both"
    if words:
        got = f"a vocabulary of {other}"
        hint = "where both begin with the same tokens and the rest is padding, say how many: "
        hint += "vocab_size="
    raise ValueError(f"teacher: got {got}, expected the student's {own}; {hint}")


def check_columns(models: list[Any], columns: int | None) -> None:
    """Raise where `vocab_size` passes the columns of one of the models."""
    sizes = [family_of(model).columns(unwrapped(model)) for model in models]
    known = [size for size in sizes if size is not None]
    if columns is not None and known and min(known) < columns:
        raise ValueError(
            f"vocab_size: got {columns}, expected at most {min(known)}, the smaller of the models' "
            "vocabularies"
        )


def _check_names(student: Any, teacher: Any) -> None:
    """Raise where both models name the same labels in another order."""
    own, other = (
        {i: str(label).lower() for i, label in (model.config.id2label or {}).items()}
        for model in (student, teacher)
    )
    if own != other and sorted(own.values()) == sorted(other.values()):
        i = next(i for i in own if own[i] != other.get(i))
        raise ValueError(
            f"teacher: got the student's labels in another order (id {i} is {other.get(i)!r:.40}, "
            f"expected {own[i]!r:.40} as in the student's config.id2label)"
        )


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What an encoder-decoder's decoder reads for labels [B, L]: those before each of them."""
    base = unwrapped(model)
    make = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        return make(labels)
    config = base.config
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    before = torch.cat((start, labels[:, :-1]), 1)
    return before.masked_fill(before == IGNORED, config.pad_token_id)


def auxiliary(outputs: Any, model: Any) -> Any:
    """What a mixture of experts adds to its loss, as its own forward adds it, or None."""
    config, terms = _config(model), []
    for part in ("aux_loss", "z_loss"):
        values = [getattr(outputs, side + part, None) for side in ("", "encoder_", "decoder_")]
        for value in (x for x in values if x is not None):
            fields = (f"router_{part}_coef", f"{part}_coef")
            terms.append(next(getattr(config, x) for x in fields if hasattr(config, x)) * value)
    field = "output_router_logits"
    option = inspect.signature(unwrapped(model).forward).parameters.get(field)
    of_config = option is None or option.default is None  # else the config's is not read
    if not terms and of_config and getattr(config, field, False) is True:
        raise ValueError(
            f"student: got {_name(model)} with output_router_logits=True, whose forward gives no "
            "balance of experts unless it is given labels, expected output_router_logits=False"
        )
    total = sum(terms)
    return total if isinstance(total, Tensor) else None


def check_decoder(inputs: Mapping[str, Any]) -> None:
    """Raise where an encoder-decoder is not told what its decoder reads."""
    if not {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & inputs.keys():
        raise ValueError(
            "decoder_input_ids: got none in the batch of an encoder-decoder, which a Trainer with "
            "a loss function does not give its labels; expected a collator that makes them, as "
            "DataCollatorForSeq2Seq(tokenizer, model=student), or DistillationTrainer, which does"
        )


def named(model: Any) -> list[str]:
    """Arguments of a model's forward; behind a forward(*args, **kwargs), of what it overrides."""
    base = unwrapped(model)
    found = [*inspect.signature(base.forward).parameters]
    for base_class in type(base).__mro__:
        if getattr(base, "main_input_name", None) in (None, *found):
            break
        if "forward" in vars(base_class):
            found = [*inspect.signature(vars(base_class)["forward"]).parameters]
    return found


def encoder_of_both(student: Any, teacher: Any) -> Any:
    """The frozen encoder that two encoder-decoders share, or None."""
    find = [getattr(unwrapped(model), "get_encoder", None) for model in (student, teacher)]
    encoder, other = (f() if callable(f) else None for f in find)
    learns = encoder is None or any(p.requires_grad for p in encoder.parameters())
    return None if learns or encoder is not other else encoder


def is_noisy(encoder: Any) -> bool:
    """Whether an encoder may answer otherwise now than in eval mode: dropout is at work."""
    if not any(module.training for module in encoder.modules()):
        return False
    config = encoder.config.to_dict()
    noise = [x for name, x in config.items() if "drop" in name or "jitter" in name]
    rates = [x for x in noise if isinstance(x, (int, float))]
    return any(rates) or bool(config.get("apply_spec_augment"))
