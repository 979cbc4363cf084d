"""The operands of a loss: what they hold, in which order, and at which places it has a gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn._reduction import legacy_get_string

import fastkd
from fastkd.scan import rules

from . import places, stored
from .flow import Part, Side, Tag, Term, number
from .places import IGNORED

if TYPE_CHECKING:
    from .watch import Watch

TINY = 2.0**-25  # what rounds to 0 in float16
SMALLEST = 2.0**-14  # of float16 at full precision


def side(watch: Watch, x: Any) -> Side:
    """One operand: logits, probabilities, or an operand of fastkd."""
    if isinstance(x, fastkd.LinearLogits):
        found, weight = side(watch, x.hidden), side(watch, x.weight)
        head = replace(found.tag, mask=found.tag.mask | weight.tag.mask, axis=-1, columns=0)
        grad, shape = found.grad or weight.grad, (*found.shape[:-1], weight.shape[0])
        return Side(head, grad, shape, found.dtype)
    if not isinstance(x, Tensor):
        x = next((v for v in vars(x).values() if isinstance(v, Tensor)), None)
        if x is None or not x.is_floating_point():
            return Side(Tag(), False, (), torch.float32)
        return Side(Tag(mapped=True), x.requires_grad, tuple(x.shape), x.dtype)
    tag = watch.book.get(x)
    if tag is None:
        tag = watch.book.of(x) if x.is_floating_point() else Tag()
    elif tag.source is None:
        tag.source = watch.book.of(x).source
    return Side(tag, x.requires_grad, tuple(x.shape), x.dtype)


def two_models(watch: Watch, a: Tag, b: Tag, by_hand: bool = False) -> bool:
    """Whether two tensors are outputs of two models."""
    if by_hand and not (a.origins and b.origins) and watch.stack:
        return False  # arithmetic within a model
    return bool(a.mask and b.mask and not a.mask & b.mask)


def term(
    watch: Watch,
    new: Tag,
    kind: str,
    name: str,
    student: Any,
    teacher: Any,
    factor: float,
    rows: float,
    student_tag: Tag | None = None,
    temperature: float | None = None,
) -> Term:
    """Records a loss, and says in the tag of its value that it is one."""
    first, second = side(watch, student), None if teacher is None else side(watch, teacher)
    if student_tag is not None:
        first.tag = student_tag
    if temperature is None:
        found = [x.tag.temperature for x in (second, first) if x is not None]
        temperature = next((x for x in found if abs(x - 1.0) > 1e-6), 1.0)
    site = watch.program.site()
    if watch.stale:
        watch.stale = watch.kd_since = False
    step = sum(x.count for x in watch.optimizers.values())
    one = Term(kind, name, site, first, second, temperature, rows, grad_mode=watch.grad_mode)
    one.step, one.place = step, watch.program.place()
    one.files = tuple({f.f_code.co_filename for f in watch.program.frames()})
    watch.files.update(one.files)
    if second is not None:
        one.reverse = kind != "pair" and watch.program.means_reverse()
        if kind != "pair" or two_models(watch, first.tag, second.tag):
            watch.kd_since = True
            _versions(watch, second.tag.mask)
    watch.terms.append(one)
    (watch.seen_hard if second is None else watch.seen)[site] += 1
    new.terms = (Part(one, factor),)
    if second is not None and kind != "pair":
        _look(watch, one, student, teacher)
    elif second is not None:
        places.shared(watch, one)
        stored.order(watch, one, teacher)
    places.follow(watch, one)
    return one


def _versions(watch: Watch, mask: int) -> None:
    """Whether a teacher's parameters change from loss to loss."""
    lowest = mask & -mask
    if lowest:
        now = float(watch.book.within(lowest)[0].detach().flatten()[:64].float().sum())
        watch.changed[lowest] = (watch.changed.get(lowest, (now, now))[0], now)


def _look(watch: Watch, one: Term, student: Any, teacher: Any) -> None:
    """What two operands show at once."""
    first, second = one.student, one.teacher
    assert second is not None
    a, b, site = first.tag, second.tag, one.site
    for tag, who in ((a, "the first operand"), (b, "the second operand")):
        for fault in tag.faults:
            if fault == "twice":
                watch.mark("probabilities", site, f"{who}: {rules.TWICE.seen}", "logits")
            elif fault.startswith("axis"):
                _, dim, axis, shape = fault.split(" ", 3)
                text = f"{who}: a softmax over dim {dim} of shape {shape}, classes are dim {axis}"
                watch.mark("axis", site, text, f"dim={axis}")
        source = tag.source.tensor() if tag.source is not None else None
        if tag.kind in ("prob", "logprob") and source is not None and not a.pair:
            if is_probabilities(source, tag.axis):
                text = f"{who}: softmax of values that are probabilities: rows sum to 1"
                watch.mark("probabilities", site, text, "logits")
    if a.source is not None and a.source is b.source and a.temperature == b.temperature:
        if a.kind != "" or one.kind == "fastkd":
            watch.mark("shared", site, rules.SAME.seen)
    places.shared(watch, one)
    places.aligned(watch, one)
    stored.order(watch, one, teacher)
    stored.tokenizers(watch, one)


def is_probabilities(x: Tensor, axis: int | None) -> bool:
    """Whether rows lie in [0, 1] and sum to one."""
    if not x.is_floating_point() or x.dim() < 1 or x.numel() < 4 or x.shape[-1] < 2:
        return False
    values = x.detach().float()
    if float(values.min()) < 0.0 or float(values.max()) > 1.0:
        return False
    sums = values.sum(axis if axis is not None and -axis <= x.dim() else -1)
    return bool((sums - 1.0).abs().max() < 4e-3)


def loss(watch: Watch, name: str, args: Any, named: Any, out: Tensor, new: Tag) -> None:
    """A loss of torch.nn.functional."""
    given = list(args[:2]) + [named[x] for x in ("input", "target") if x in named]
    if len(given) < 2 or not all(isinstance(x, Tensor) for x in given[:2]):
        return
    a, b = given[0], given[1]
    reduction = _reduction(named)
    if name == "kl_div":
        rows = a.numel() / side(watch, a).columns
        by = 1.0 / max(rows, 1) if reduction in ("mean", "batchmean") else 1.0
        one = term(watch, new, "kl", "F.kl_div", a, b, by, rows)
        over = {"mean": float(one.student.columns), "batchmean": len(a) * by if a.dim() else 1.0}
        columns, whole = over.get(reduction, 1.0), reduction == "none"
        new.terms = (new.terms[0]._replace(columns=columns, whole=whole),)
        _kl_values(watch, a, b, bool(named.get("log_target", False)))
    elif name in ("cross_entropy", "nll_loss"):
        if b.is_floating_point():
            rows = a.numel() / a.shape[1 if a.dim() > 1 else 0]
            by = 1.0 / rows if reduction == "mean" else 1.0
            term(watch, new, "soft", "F.cross_entropy", a, b, by, rows)
        else:
            ignored = named.get("ignore_index", IGNORED)
            kept = int((b != ignored).sum())
            by = 1.0 / max(kept, 1) if reduction == "mean" else 1.0
            one = term(watch, new, "hard", f"F.{name}", a, None, by, kept)
            watch.labels = b
            places.labels(watch, one, a, b, ignored)
        _hard_values(watch, name, a)
    else:
        factor = 1.0 if reduction == "mean" else 1.0 / max(a.shape[0] if a.dim() else 1, 1)
        one = term(watch, new, "pair", f"F.{name}", a, b, factor, 1.0)
        if name == "binary_cross_entropy_with_logits":
            _no_sigmoid(watch, one, a, f"F.{name}(logits, labels)")


def _reduction(named: Any) -> str:
    """The reduction that torch makes of its arguments, the two old ones among them."""
    old = named.get("size_average"), named.get("reduce")
    if old == (None, None):
        return str(named.get("reduction", "mean"))
    return legacy_get_string(*old, emit_warning=False)


def _kl_values(watch: Watch, a: Tensor, b: Tensor, log_target: bool) -> None:
    tags, site = (watch.book.get(a), watch.book.get(b)), watch.program.site()
    first = tags[0].kind if tags[0] is not None else ""
    second = tags[1].kind if tags[1] is not None else ""
    fix = "F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), ...)"
    if first == "prob" or (first == "" and is_probabilities(a, None)):
        watch.mark("probabilities", site, rules.INPUT.seen, fix)
    elif first == "" and a.numel() and float(a.max()) > 1e-3:
        text = f"the first operand of F.kl_div has values up to {float(a.max()):.3g}: logits"
        watch.mark("probabilities", site, text, fix)
    least = float(b.min()) if b.numel() else 0.0
    if not log_target and (second == "logprob" or least < -1e-6):
        text = f"{rules.TARGET.seen}: False, and values down to {least:.3g}"
        watch.mark("probabilities", site, text, fix + " or log_target=True")
    elif log_target and b.numel() and (second == "prob" or is_probabilities(b, None)):
        text = f"{rules.TARGET.seen}: True, and rows that sum to 1"
        watch.mark("probabilities", site, text, "F.log_softmax(teacher / T, -1)")
    elif log_target and second == "" and b.numel() and float(b.max()) > 1e-3:
        text = f"{rules.TARGET.seen}: True, and logits up to {float(b.max()):.3g}"
        watch.mark("probabilities", site, text, "F.log_softmax(teacher / T, -1)")


def _hard_values(watch: Watch, name: str, a: Tensor) -> None:
    tag, site = watch.book.get(a), watch.program.site()
    kind = tag.kind if tag is not None else ""
    axis = -1 if a.dim() < 3 else 1 - a.dim()
    if kind == "prob" or (kind == "" and is_probabilities(a, axis)):
        what = "logits" if name == "cross_entropy" else "log-probabilities"
        text = f"F.{name} takes {what}, its first operand holds probabilities: rows sum to 1"
        watch.mark("probabilities", site, text, "F.cross_entropy(logits, labels)")
    elif name == "nll_loss" and kind == "" and a.numel() and float(a.max()) > 1e-3:
        text = (
            f"F.nll_loss takes log-probabilities, its input has values up to {float(a.max()):.3g}"
        )
        watch.mark("probabilities", site, text, "F.cross_entropy(logits, labels)")


# ---- fastkd's own losses


def fastkd_before(
    watch: Watch, name: str, student: Any, teacher: Any, args: Any, options: Any
) -> None:
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        if not options.get("vocab_size"):
            same_columns(watch, student, teacher)


def fastkd_after(
    watch: Watch, name: str, student: Any, teacher: Any, args: Any, options: Any, out: Any
) -> None:
    """A call of fastkd: one soft term, perhaps a hard one."""
    value = out[0] if isinstance(out, tuple) else out
    temperature = float(args[1])
    soft, hard = (float(args[i]) if len(args) > i else usual for i, usual in ((3, 1.0), (4, 0.0)))
    labels, ignored = options.get("labels"), options.get("ignore_index", IGNORED)
    shape = student.hidden.shape if isinstance(student, fastkd.LinearLogits) else student.shape
    rows = math.prod(shape[:-1])
    kept = int((labels != ignored).sum()) if isinstance(labels, Tensor) else rows
    reduction = options.get("reduction", "mean")
    denominator = number(options.get("normalizer")) or max(kept, 1)
    factor = {"mean": 1.0 / denominator, "batchmean": 1.0 / max(kept, 1)}.get(reduction, 1.0)
    first = shape[0] if len(shape) > 1 else 1
    columns = max(first, 1) * factor if reduction == "batchmean" else 1.0
    new, tag = watch.book.of(value), Tag()
    tag.mask = side(watch, student).tag.mask | side(watch, teacher).tag.mask
    one = term(
        watch, tag, "fastkd", f"fastkd.{name}", student, teacher, factor, kept,
        temperature=temperature,
    )  # fmt: skip
    if isinstance(labels, Tensor):
        watch.labels = labels
    squared = temperature * temperature
    if name == "distillation_loss" or name == "DistillationLoss":
        weight = 1.0 - hard
        if temperature != 1.0 and abs(soft - weight * squared) <= 1e-6 * max(soft, 1.0):
            one.power = 2
        elif soft:
            one.power = -9  # left out on purpose: t_squared=False
    else:
        one.reverse = one.reverse or name not in ("kl_div", "KLDiv")
    tag.terms = (Part(one, factor * soft, columns=columns),)
    for x in (student, teacher):
        if isinstance(x, Tensor):
            _logits(watch, one, x, options.get("vocab_size"))
    if hard and isinstance(labels, Tensor):
        second = term(watch, Tag(), "hard", one.name, student, None, factor, kept)
        tag.terms = (*tag.terms, Part(second, factor * hard, columns=columns))
        logits = student.hidden if isinstance(student, fastkd.LinearLogits) else student
        places.labels(watch, second, logits, labels, ignored)
    elif isinstance(labels, Tensor):
        places.all_ignored(watch, one, labels, ignored)
    new.terms, new.mask = tag.terms, tag.mask


def binary_after(
    watch: Watch, what: Any, student: Tensor, teacher: Tensor, options: Any, out: Tensor
) -> None:
    """A call of a loss of one logit each: a soft term, a hard one, or both."""
    labels = options.get("labels")
    kept = student.numel()
    if isinstance(labels, Tensor) and labels.dtype != torch.bool:
        ignored = options.get("ignore_index", IGNORED)
        left_out = torch.isin(labels, torch.tensor(ignored, device=labels.device)) | labels.isnan()
        kept -= int(left_out.sum())
    mean = options.get("reduction", "mean") == "mean"
    factor = 1.0 / (number(options.get("normalizer")) or max(kept, 1)) if mean else 1.0
    divergence, T = what.divergence.name, what.temperature
    own = what.hard == 0.0 and what.soft == 1.0
    name = f"fastkd.binary_{divergence}_div" if own else "fastkd.binary_distillation_loss"
    new, tag = watch.book.of(out), Tag()
    tag.mask = side(watch, student).tag.mask | side(watch, teacher).tag.mask
    if what.soft:
        one = term(
            watch, tag, "fastkd", name, student, teacher, factor, kept, temperature=T
        )  # fmt: skip
        one.reverse = one.reverse or divergence != "kl"
        squared = abs(what.soft - (1.0 - what.hard) * T * T) <= 1e-6 * max(what.soft, 1.0)
        if not own and T != 1.0:
            one.power = 2 if squared else -9  # left out on purpose: t_squared=False
        tag.terms = (Part(one, factor * what.soft),)
        for x in (student, teacher):
            _no_sigmoid(watch, one, x, f"{name}(student_logits, teacher_logits)")
    if what.hard:
        second = term(watch, Tag(), "hard", name, student, None, factor, kept)
        tag.terms = (*(tag.terms if what.soft else ()), Part(second, factor * what.hard))
    new.terms, new.mask = tag.terms, tag.mask


def _no_sigmoid(watch: Watch, one: Term, x: Tensor, fix: str) -> None:
    """Logits that went through a sigmoid or a softmax before."""
    tag = watch.book.get(x)
    if tag is None or not x.numel():
        return
    within = 0.0 <= float(x.min()) and float(x.max()) <= 1.0
    if tag.kind in ("prob", "logprob") or (tag.squashed and within):
        text = f"{one.name} takes logits, an operand holds probabilities"
        watch.mark("probabilities", one.site, text, fix)


def _logits(watch: Watch, one: Term, x: Tensor, vocab_size: int | None) -> None:
    tag = watch.book.get(x)
    if (tag is not None and tag.kind == "prob") or is_probabilities(x, -1):
        text = f"{one.name} takes logits, an operand holds probabilities: rows sum to 1"
        watch.mark("probabilities", one.site, text, f"{one.name}(student_logits, teacher_logits)")
    elif tag is not None and tag.kind == "logprob" and abs(tag.temperature - 1.0) > 1e-6:
        if abs(one.temperature - 1.0) > 1e-6:
            text = f"{one.name} divides by T={one.temperature:g} what T has divided before"
            watch.mark("probabilities", one.site, text, f"{one.name}(student_logits, ...)")
    elif tag is not None and tag.axis is not None and tag.axis != -1 and x.dim() > 1:
        text = f"{one.name} takes classes last, those of shape {tuple(x.shape)} are at {tag.axis}"
        watch.mark("axis", one.site, text, f"logits.movedim({tag.axis}, -1)")


# ---- failures before they happen


def ids_in_table(watch: Watch, ids: Any, weight: Any) -> None:
    """Token ids beyond a table: the tokenizer is another model's."""
    if isinstance(ids, Tensor) and isinstance(weight, Tensor) and ids.numel():
        if int(ids.max()) >= weight.shape[0]:
            text = f"an id of {int(ids.max())} for a model of {weight.shape[0]} tokens"
            watch.mark("tokenizer", watch.program.site(), text)


def same_columns(watch: Watch, a: Any, b: Any) -> None:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dim() != b.dim() or a.dim() < 2:
        return
    if a.shape[-1] != b.shape[-1] and a.shape[:-1] == b.shape[:-1] and b.shape[-1] > 1:
        kinds = [watch.book.get(x) for x in (a, b)]
        if a.shape[-1] > 1 and all(x is not None and x.axis == -1 for x in kinds):
            text = f"{a.shape[-1]} columns of one model, {b.shape[-1]} of the other"
            watch.mark("tokenizer", watch.program.site(), text)


# ---- float16


def half(watch: Watch, name: str, args: Any, named: Any, out: Tensor) -> None:
    """A constant that is 0 in float16, or the logarithm of a probability that has become 0."""
    values = [*args[1:], *named.values()]
    adds = ("add", "add_", "__add__", "__radd__", "clamp", "clamp_min", "clip", "__iadd__")
    if name in adds:
        for value in values:
            if isinstance(value, float) and 0.0 < value < TINY:
                text = f"{value:g} is 0 in float16"
                watch.mark("float16", watch.program.site(), text, "x.float()")
    elif name == "log" and bool((out == -math.inf).any()):
        share = float((out == -math.inf).float().mean())
        text = f"the logarithm of float16 probabilities: {share:.1%} are -inf"
        watch.mark("float16", watch.program.site(), text, "F.log_softmax(x.float() / T, -1)")


def half_gradient(watch: Watch, x: Tensor) -> None:
    """Counts what is lost of a float16 output's gradient."""
    if x.dtype != torch.float16 or not x.requires_grad or x.dim() < 2:
        return
    site = watch.program.site()

    def hook(gradient: Tensor) -> None:
        if watch.scale_now >= 16 or gradient.dtype != torch.float16:
            return
        with watch._quiet(), torch.no_grad():
            lost = (gradient.abs() < SMALLEST).float().mean()
            watch.half.setdefault(site, []).append(float(lost))

    x.register_hook(hook)
