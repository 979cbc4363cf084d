"""Follows tensors from the models to the loss: what each function makes of what it is given."""

from __future__ import annotations

import inspect
import weakref
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import operands, places, stored, sums
from .flow import (
    TRANSPARENT,
    Origin,
    Run,
    Source,
    Tag,
    kept_rows,
    moved,
    take,
    tensors,
)
from .sums import ADD, DIV, MUL, SUB

if TYPE_CHECKING:
    from .watch import Watch

PAIRS = {
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "cosine_similarity"),
    *("cosine_embedding_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy"),
}
REDUCED = {"sum", "mean", "nansum", "nanmean"}
EDGES = {"batch_norm", "dropout", "alpha_dropout", "feature_alpha_dropout"}


def version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def copied(tag: Tag) -> Tag:
    return replace(tag)


def before(watch: Watch, name: str, args: Any, named: Any) -> None:
    """What would fail, or can no longer be seen afterwards."""
    if name == "embedding" and len(args) > 1:
        operands.ids_in_table(watch, args[0], args[1])
    elif name in ("kl_div", "mse_loss") and len(args) > 1:
        operands.same_columns(watch, args[0], args[1])
    elif name == "backward" and args and isinstance(args[0], Tensor):
        watch.backward(args[0])
    elif name == "backward" and args and isinstance(args[0], (list, tuple)):
        for x in args[0]:
            watch.backward(x)


def after(watch: Watch, name: str, func: Any, args: Any, named: Any, out: Any) -> None:
    """Tags what a function returned."""
    first = args[0] if args else named.get("input")
    if not isinstance(out, Tensor):
        if isinstance(out, (tuple, list)):
            for x in out:
                if isinstance(x, Tensor) and x.is_floating_point():
                    _tagged(watch, name, func, args, named, x)
        elif name in ("item", "__float__", "tolist") and isinstance(out, float):
            tag = watch.book.get(first)
            if tag is not None and tag.terms:
                watch.items += [(out, part.term) for part in tag.terms]
        return
    if not out.is_floating_point() or out.is_complex():
        return
    if isinstance(first, Tensor) and first.dtype == torch.float16:
        operands.half(watch, name, args, named, out)
    _tagged(watch, name, func, args, named, out)


def _tagged(watch: Watch, name: str, func: Any, args: Any, named: Any, out: Tensor) -> None:
    book = watch.book
    if id(out) in book.bits and book.bit(out):
        return  # a parameter that is written in place stays one
    first = args[0] if args else named.get("input")
    given = [x for x in tensors((args, named))]
    tags = [(x, book.get(x) or (Tag(mask=bit) if (bit := book.bit(x)) else None)) for x in given]
    rest = tuple(args[1:])
    if name in TRANSPARENT and isinstance(first, Tensor):
        tag = book.get(first)
        if tag is None and first.numel() > 1 and first.is_floating_point():
            tag = book.of(first)
        if tag is not None:
            if tag.source is None:
                tag.source = Source(None if tag.kind else first)
            new = moved(tag, name, func, first, out, rest, named)
            if name in ("detach", "data", "detach_") and tag.terms:
                new.terms = tuple(part._replace(detached=True) for part in tag.terms)
            book.put(out, new)
        return
    new = Tag()
    for x, tag in tags:
        if tag is None:
            continue
        new.mask |= tag.mask
        new.noisy |= tag.noisy
        if x.dim() and tag.rows is not None and new.rows is None:
            new.rows = kept_rows(tag.rows, out)
            new.run = tag.run if new.rows is not None else None
        if new.axis is None and x.shape == out.shape:
            new.axis = tag.axis
        new.scale = new.scale or tag.scale
        if name in (*ADD, *SUB, *MUL, *DIV) and x.shape == out.shape:
            new.columns = new.columns or tag.columns
            new.mapped |= tag.mapped
            new.origins = new.origins or tag.origins
    special = SPECIAL.get(name)
    if special is not None:
        special(watch, name, args, named, out, new)
    if new.mask or new.terms or new.kind or new.source or new.rows is not None:
        book.put(out, new)


# ---- what makes logits, probabilities and their logarithms


def _linear(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    weight = args[1] if len(args) > 1 else named.get("weight")
    if isinstance(weight, Tensor) and watch.book.bit(weight):
        new.axis = -1
    elif isinstance(weight, Tensor) and name != "linear":
        tag = watch.book.get(weight)  # hidden @ weight.T
        if tag is not None and not tag.origins and isinstance(tag.mask, int) and tag.mask:
            new.axis = -1 if bin(tag.mask).count("1") == 1 else None
        elif name != "linear":
            new.mapped = True  # columns are mixed


def _conv(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    new.axis = 1 - out.dim() if out.dim() > 2 else None


def _embedding(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    ids = args[0]
    new.axis = -1
    if ids.dim() == 2 and ids.shape[1] > 1 and ids.shape[0] * ids.shape[1] > 3:
        new.run = Run(ids.detach().clone())
        new.rows = torch.arange(ids.numel(), device=ids.device).view(*ids.shape, 1)
        pad = named.get("padding_idx", args[2] if len(args) > 2 else None)
        if pad is not None and watch.program.owns(watch.program.place().file):
            places.padded(new.run, pad)


def _noise(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    training = named.get("training", args[2] if len(args) > 2 and "dropout" in name else False)
    if name == "batch_norm":
        training = named.get("training", args[5] if len(args) > 5 else False)
        if (named.get("running_mean") if "running_mean" in named else args[1]) is None:
            training = False  # instance statistics at all times
        chance = 1.0
    elif name == "scaled_dot_product_attention":
        chance = float(named.get("dropout_p", args[4] if len(args) > 4 else 0.0) or 0.0)
        training = chance > 0
    else:
        chance = float(named.get("p", args[1] if len(args) > 1 else 0.5) or 0.0)
    if training and chance > 0 and (new.mask or watch.stack):
        new.noisy = True


def _softmax(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    x = args[0] if args else named["input"]
    tag = watch.book.of(x)
    dim = named.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:
        dim = 0 if x.dim() in (0, 1, 3) else 1
    faults = set(tag.faults)
    if tag.kind == "prob" and tag.pair is None:
        faults.add("twice")
    at = dim - x.dim() if dim >= 0 else dim
    if tag.axis is not None and at != tag.axis and x.dim() > 1:
        faults.add(f"axis {dim} {x.dim() + tag.axis if dim >= 0 else tag.axis} {tuple(x.shape)}")
    kind = "logprob" if "log" in name else "prob"
    copy = replace(tag, kind=kind, faults=frozenset(faults), pair=None)
    copy.axis = at
    take(new, copy)


def _sigmoid(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    tag = watch.book.of(args[0])
    new.origins, new.rows, new.run, new.squashed = tag.origins, tag.rows, tag.run, True


def _log(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    tag = watch.book.get(args[0])
    if tag is None:
        return
    kinds = {"prob": "logprob", "ratio": "logratio", "sorted": "sorted"}
    if tag.kind in kinds:
        take(new, replace(tag, kind=kinds[tag.kind]))


def _exp(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    tag = watch.book.get(args[0])
    if tag is not None and tag.kind == "logprob":
        take(new, replace(tag, kind="prob"))


def _logsumexp(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    tag = watch.book.of(args[0])
    if args[0].dim() > 1 and not tag.kind:
        new.source, new.temperature, new.kind = tag.source, tag.temperature, "lse"


def _sorted(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    tag = watch.book.get(args[0])
    if tag is not None:
        take(new, replace(tag, mapped=True, axis=tag.axis, rows=None, run=None))
        new.kind = "sorted" if name == "sort" else tag.kind


def _gathered(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    """Probabilities, or their logarithms, one behind the other."""
    tags = [watch.book.get(x) for x in tensors(args[:1])]
    kinds = {"" if tag is None else tag.kind for tag in tags}
    first = tags[0] if tags else None
    if first is not None and kinds in ({"prob"}, {"logprob"}):
        new.kind, new.temperature, new.faults = first.kind, first.temperature, first.faults
        new.source = Source(None)


# ---- the losses


def _loss(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    operands.loss(watch, name, args, named, out, new)


def wrapped(watch: Watch, loss: Any) -> Any:
    """fastkd's own losses, which come through one function."""

    def watched(name: str, student: Any, teacher: Any, *args: Any, **options: Any) -> Any:
        if watch.busy:
            return loss(name, student, teacher, *args, **options)
        with watch._quiet(), torch.no_grad():
            operands.fastkd_before(watch, name, student, teacher, args, options)
        watch.busy += 1
        try:
            out = loss(name, student, teacher, *args, **options)
        finally:
            watch.busy -= 1
        with watch._quiet(), torch.no_grad():
            operands.fastkd_after(watch, name, student, teacher, args, options, out)
        return out

    return watched


def wrapped_binary(watch: Watch, loss: Any) -> Any:
    """The losses of one logit each."""

    def watched(what: Any, student: Any, teacher: Any, **options: Any) -> Any:
        if watch.busy:
            return loss(what, student, teacher, **options)
        watch.busy += 1
        try:
            out = loss(what, student, teacher, **options)
        finally:
            watch.busy -= 1
        with watch._quiet(), torch.no_grad():
            operands.binary_after(watch, what, student, teacher, options, out)
        return out

    return watched


def left(
    watch: Watch, module: nn.Module, origin: Origin, fed: int, args: Any, kwargs: Any, out: Any
) -> None:
    """A module has returned: its outputs know it, and know the ids that it read."""
    given = [x for x in tensors((args, kwargs))]
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        with suppress(ValueError, TypeError):  # a forward that is not Python's
            named = zip(inspect.signature(module.forward).parameters, args, strict=False)
            mask = dict(named).get("attention_mask")
    found = list(tensors(dict(out) if hasattr(out, "keys") else out))
    for x in found:
        if not x.is_floating_point():
            continue
        tag = watch.book.get(x)
        if tag is None:
            continue
        tag.origins = (*tag.origins, origin) if origin not in tag.origins else tag.origins
        if tag.rows is None and x.dim() == 3:
            for ids in given:
                if not ids.is_floating_point() and ids.dim() == 2 and ids.shape == x.shape[:2]:
                    tag.run = Run(ids.detach().clone())
                    tag.rows = torch.arange(ids.numel(), device=ids.device).view(*ids.shape, 1)
                    break
        if tag.run is not None and tag.rows is not None and tag.rows.shape[:-1] == x.shape[:-1]:
            if x.dim() == 3 and not tag.terms:
                tag.run.latest = weakref.ref(x)
                key = (*[id(held[0]) for held in watch.stack], id(module))[:2]
                watch.recent[key] = x  # the program may have dropped it when its loss is computed
                places.given_mask(tag.run, mask)
    if not watch.stack and found and given and not fed:
        stored.remember(watch, module, given, found)
    if len(watch.stack) < 2:
        for x in found:
            operands.half_gradient(watch, x)


SPECIAL: dict[str, Any] = {
    **dict.fromkeys(("linear", "matmul", "addmm", "__matmul__", "mm"), _linear),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(EDGES, _noise),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d", "dropout_"), _noise),
    **dict.fromkeys(("scaled_dot_product_attention", "rrelu"), _noise),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("sigmoid", "logsigmoid"), _sigmoid),
    **dict.fromkeys(("log", "log_", "xlogy"), _log),
    **dict.fromkeys(("exp", "exp_"), _exp),
    **dict.fromkeys(("sort", "topk"), _sorted),
    **dict.fromkeys(MUL, sums.product),
    **dict.fromkeys(DIV, sums.quotient),
    **dict.fromkeys(ADD | SUB, sums.joined),
    **dict.fromkeys(REDUCED, sums.reduced),
    **dict.fromkeys(PAIRS | {"kl_div", "cross_entropy", "nll_loss"}, _loss),
    **dict.fromkeys(("cat", "stack", "concat", "concatenate", "vstack"), _gathered),
    "embedding": _embedding,
    "logsumexp": _logsumexp,
}
