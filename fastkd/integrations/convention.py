"""Does a model's own loss shift the labels? Its forward and its loss are the answer.

A class's name does not tell: BERT-like decoders look ahead unless config.is_decoder, BART-like ones
want labels that are shifted already, XLNet neither. So the model answers for itself, on four
tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distill.heads import _config, _device, _name, uncached, vocabulary
from fastkd.integrations.hooks import evaluating

# classes that transformers finds no loss for by their names, and whose labels it shifts; asked only
# where a model cannot answer (weights that are sharded)
KNOWN = {"GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "CTRLLMHeadModel", "ReformerModelWithLMHead"}
KNOWN |= {"BertLMHeadModel", "BertGenerationDecoder"}
CLOSE = 1e-2  # of the largest logit, or of the loss; one that looks ahead differs by much more


def check_convention(model: Any, name: str, *, loss: bool) -> None:
    """Raise for a model that looks ahead, or (loss=True) whose own loss does not shift labels."""
    base = unwrapped(model)
    if not hasattr(base, "loss_type"):
        return  # not one of transformers: no loss of its own to go by
    ahead, shifts = _probe(base, loss)
    if ahead:
        raise ValueError(
            f"{name}: got {_name(base)}, whose logits at a token depend on tokens behind it, "
            "expected a causal language model (for BERT-like ones: config.is_decoder=True)"
        )
    if shifts is None and base.loss_type is None:
        shifts = bool(KNOWN & {base_class.__name__ for base_class in type(base).__mro__})
    if shifts is False:
        raise ValueError(
            f"{name}: got {_name(base)}, whose own loss does not shift its labels, or is not "
            "known to, expected a causal language model whose loss does: labels are shifted here"
        )


def unwrapped(model: Any) -> Any:
    """The model itself, not what torch.compile or PEFT made around it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _probe(model: nn.Module, loss: bool) -> tuple[bool, bool | None]:
    """(whether it looks ahead, whether its loss shifts labels); None where it cannot say."""
    columns = vocabulary(model) or 0
    parts = _config(model) is not getattr(model, "config", None)  # images may be seen as a whole
    if parts or columns < 6 or not all(map(_is_whole, model.parameters())):
        return False, None
    tokens = torch.arange(1, 5, device=_device(model)).view(1, -1)
    other = tokens.clone()
    other[:, -1] = 5
    ahead = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
            both = torch.cat((tokens, other))
            x = _call(model, both).logits[:, :-1].float()
            ahead = bool((x[0] - x[1]).abs().max() > CLOSE * x.abs().max())
            if ahead or not loss:
                return ahead, None
            # a loss that shifts reads no label at the first place
            first = tokens.clone()
            first[:, 0] = 5
            values = [_call(model, tokens, labels).loss.float() for labels in (tokens, first)]
            difference = abs(float(values[0] - values[1]))
            known = torch.stack(values).isfinite().all()
            return False, difference <= CLOSE * abs(float(values[0])) if known else None
    except Exception:  # whatever a forward raises that wants more than tokens
        return ahead, None


def _call(model: Any, tokens: Tensor, labels: Tensor | None = None) -> Any:
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if labels is not None:
        inputs["labels"] = labels
    return model(**inputs, **uncached(model))


def _is_whole(weight: Tensor) -> bool:
    meta = weight.device.type == "meta"
    return bool(weight.numel()) and not meta and not hasattr(weight, "placements")
