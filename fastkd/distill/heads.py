"""The head of a language model: what turns its last hidden states into logits.

Config fields say how logits are scaled and capped, but two families use one field's name for
opposite things (Granite divides by `logits_scaling`, HyperCLOVA X multiplies). So fields are only
candidates, and the model's own forward decides: it is given hidden states of known sizes at its
head, once, and a reading that does not give its logits is refused by the model's name.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import shown

from .batch import in_eval
from .hooks import Hook

# fields that multiply logits, or divide them; which of the two, the model's forward says
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap")
# sizes of the logits shown to the model: small ones tell scales, large ones tell caps, and a cap
# bends what lies between
SIZES = (1.0, 10.0, 100.0)
# of the largest logit; in half precision a family may scale, cap and cast in any order
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Head(NamedTuple):
    """A language model's head, as its own forward was found to use it.

        logits = cap(scale * (hidden @ weight.T + bias)),   cap(z) = softcap * tanh(z / softcap)

    Args:
        module: the `nn.Linear` that the model's forward calls once on its last hidden states.
        scale: factor of what it gives.
        softcap: cap of the result, or None.
    """

    module: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, *, pack: bool = False) -> fastkd.LinearLogits:
        """The logits [..., V] of hidden states [..., H], never built."""
        weight, bias = self.module.weight, self.module.bias
        return fastkd.LinearLogits(
            hidden, weight, bias, scale=self.scale, softcap=self.softcap, pack=pack
        )

    def watch(
        self, see: Callable[[Tensor], None], *, trim: Callable[[], bool] = lambda: True
    ) -> Any:
        """Register a hook that hands over the head's input; returns what removes it.

        Where `trim()`, the head itself goes on with no position at all: its output [B, 0, V] costs
        nothing, yet all parameters stay on the way to the model's output, which
        DistributedDataParallel asks for.
        """

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            see(args[0])
            return (args[0][:, :0], *args[1:]) if trim() else None

        return self.module.register_forward_pre_hook(Hook(hook))


def head_of(model: Any) -> Head:
    """Read a language model's head: its module, logit scale and soft-cap.

    The model's forward runs once or twice, on three tokens, without gradient and in eval mode; its
    modes are put back. transformers' causal, masked and sequence-to-sequence language models of any
    family are read, also inside a PEFT model.

    Args:
        model: a `PreTrainedModel` with `get_output_embeddings`.

    Returns:
        The `Head`, which has given the model's own logits.

    Raises:
        ValueError, TypeError: a head that is not there, not a plain `nn.Linear`, or whose output
            is made into logits in another way; the message names the model.
    """
    name, module = _name(model), output_embeddings(model)
    if module is None:
        raise ValueError(
            f"model: got {name}, whose get_output_embeddings() gives no head, expected a language "
            "model"
        )
    weight = getattr(module, "weight", None)
    if (
        not isinstance(module, nn.Linear)
        or not isinstance(weight, Tensor)
        or weight.shape != (module.out_features, module.in_features)
    ):
        raise TypeError(
            f"model: got {name} with the head {shown(module)}, expected a plain nn.Linear; use "
            "linear=False (dense logits)"
        )
    if weight.is_meta or hasattr(weight, "placements"):
        raise ValueError(
            f"model: got {name}, whose head's weight is sharded or offloaded, expected it whole; "
            "use linear=False (dense logits)"
        )
    hidden = _probe(module)
    logits, calls = _forward(model, module, hidden)
    if calls != 1 or logits.shape != (*hidden.shape[:2], module.out_features):
        raise ValueError(
            f"model: got {name}, whose forward calls its head {calls} times and gives logits "
            f"{list(logits.shape)} for {hidden.size(1)} tokens, expected one call and "
            f"{[1, hidden.size(1), module.out_features]}; use linear=False (dense logits)"
        )
    readings = [Head(module, *numbers) for numbers in _readings(model)]
    found = [(_difference(head, hidden, logits), head) for head in readings]
    error, head = min(found, key=lambda pair: pair[0])
    limit = CLOSE[logits.dtype if logits.dtype in (torch.bfloat16, torch.float16) else weight.dtype]
    if not error <= limit:
        raise ValueError(
            f"model: got {name}, which makes something else of its head's output: its own logits "
            f"differ by {error:.2g} of the largest one (expected at most {limit:g}) from every "
            f"reading of its config ({', '.join(_describe(reading) for reading in readings)}); use "
            "linear=False (dense logits)"
        )
    return head


def linear_logits(model: Any, inputs: Mapping[str, Any], head: Head | None = None) -> Any:
    """A language model's logits that are never built, and the rest of its output.

    Args:
        model: a `PreTrainedModel`, or a wrapper of it where `head` is given.
        inputs: its forward's keyword arguments, [B, L] each.
        head: of an earlier `head_of`; None: read now.

    Returns:
        (`LinearLogits` [B, L, V], the model's own output, whose logits are [B, 0, V]).

    Raises:
        ValueError, TypeError: a head that cannot be read, as in `head_of`.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from fastkd.integrations.transformers import linear_logits
    >>> size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **size, **heads))
    >>> logits, output = linear_logits(model, {"input_ids": torch.arange(12).view(2, 6)})
    >>> logits
    LinearLogits([2, 6, 99] of torch.float32, H=16)
    """
    head = head_of(model) if head is None else head
    seen: list[fastkd.LinearLogits] = []
    # made inside the forward: what autocast says there is what the model's own logits hear
    hook = head.watch(lambda hidden: seen.append(head.logits(hidden)))
    try:
        output = model(**inputs)
    finally:
        hook.remove()
    return seen[-1], output


def output_embeddings(model: Any) -> Any:
    """The model's head as it is now, or None."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def vocabulary(model: Any) -> int | None:
    """Columns of a model's logits; None where neither head nor config says."""
    rows = getattr(output_embeddings(model), "out_features", None)
    return rows if rows is not None else getattr(_config(model), "vocab_size", None)


def _name(model: Any) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")


def _config(model: Any) -> Any:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _number(config: Any, field: str) -> float | None:
    x = getattr(config, field, None)
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return float(x) if number and x != 0 else None  # type: ignore[arg-type]


def _readings(model: Any) -> Iterator[tuple[float, float | None]]:
    """(scale, softcap): what the config's fields may mean, the plainest first."""
    config = _config(model)
    scales, caps = [1.0], [None, *(_number(config, field) for field in CAPS)]
    for x in (_number(config, field) for field in SCALES):
        scales += [] if x is None else [x, 1 / x]
    return itertools.product(dict.fromkeys(scales), dict.fromkeys(caps))


def _describe(head: Head) -> str:
    return f"scale {head.scale:g}" + (f", softcap {head.softcap:g}" if head.softcap else "")


def _probe(module: nn.Linear) -> Tensor:
    """Hidden states [1, 3, H] whose logits have the standard deviations SIZES."""
    weight = module.weight.detach()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(SIZES), weight.size(1), generator=generator)
    hidden = hidden.to(weight.device)
    size = F.linear(hidden.to(weight.dtype), weight).float().std(-1, keepdim=True).clamp_min(1e-6)
    sizes = torch.tensor(SIZES, device=weight.device).view(1, -1, 1)
    return (hidden * (sizes / size)).to(weight.dtype)


def _forward(model: Any, module: nn.Linear, hidden: Tensor) -> tuple[Tensor, int]:
    """The model's own logits where its head is given `hidden`, and how often it called the head."""
    calls = 0

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        return (hidden, *args[1:])

    hook = module.register_forward_pre_hook(replace)
    try:
        with torch.no_grad(), in_eval(model):
            return model(**_three_tokens(model), **uncached(model)).logits, calls
    except Exception as error:
        raise ValueError(
            f"model: got {_name(model)}, whose forward fails on three tokens "
            f"({type(error).__name__}: {error!s:.200}); use linear=False (dense logits)"
        ) from error
    finally:
        hook.remove()


def _three_tokens(model: Any) -> dict[str, Any]:
    """Inputs of a forward; beside an encoder of pictures or sound, tokens of the decoder alone."""
    tokens = torch.arange(len(SIZES), device=_device(model)).view(1, -1)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return inputs
    if model.main_input_name == "input_ids":
        return inputs | {"decoder_input_ids": tokens}
    encoder = model.get_encoder()
    width, dtype = encoder.config.hidden_size, next(encoder.parameters()).dtype
    states = torch.zeros(1, len(SIZES), width, dtype=dtype, device=tokens.device)
    return {"encoder_outputs": encoded(states), "decoder_input_ids": tokens}


def encoded(states: Tensor) -> Any:
    """The states [B, L, H] of an encoder, as an encoder-decoder's forward takes them."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


def _difference(head: Head, hidden: Tensor, logits: Tensor) -> float:
    """Largest difference of a reading's logits from the model's own, of the row's largest logit."""
    z = F.linear(hidden, head.module.weight.detach(), _detached(head.module.bias))
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    own = logits.to(z.device, z.dtype)
    error = ((z - own).abs().amax(-1) / own.abs().amax(-1).clamp_min(1e-6)).amax()
    return float(error.nan_to_num(nan=float("inf")))


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _device(model: Any) -> torch.device:
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # of pictures
        module = None
    return next((module or model).parameters()).device


def uncached(model: Any) -> dict[str, Any]:
    """Options that keep a forward from building a cache of keys and values for more tokens."""
    takes = inspect.signature(model.forward).parameters.values()
    named = any(p.name == "use_cache" for p in takes)
    swallowed = any(p.kind is p.VAR_KEYWORD for p in takes) and hasattr(_config(model), "use_cache")
    return {"use_cache": False} if named or swallowed else {}
