"""Places in a sequence: which token a row predicts, and which rows the loss trains."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .flow import Run, Term

if TYPE_CHECKING:
    from .watch import Watch

TRAINED = re.compile(
    r"^(attn|attention|loss|resp|response|completion|answer|target|label|assistant)s?_?masks?$"
)
PROMPT = re.compile(r"^prompts?_?masks?$")
PROMPT_LENGTH = re.compile(r"^(prompt_?len(gth)?s?|n_prompt|len_prompt|p_?lens?)$", re.IGNORECASE)
LABELS = re.compile(r"^(label|target|gold|tgt)s?(_ids)?$")
IGNORED = -100
LENGTHS = re.compile(r"^(lengths?|lens|seq_?len(gth)?s|n_tokens)$")
PAD = re.compile(r"^_?pad(_?(token_?)?(id|idx|index))?$", re.IGNORECASE)


def labels(watch: Watch, one: Term, logits: Tensor, target: Tensor, ignored: int) -> None:
    """Whether labels are those of the next token, and whether any row is left."""
    all_ignored(watch, one, target, ignored)
    tag = one.student.tag
    if tag.rows is None or tag.run is None:
        return
    rows = tag.rows
    if rows.shape[-1] != 1 and logits.dim() > 2:
        rows = rows.movedim(1, -1)
    rows = rows.flatten()
    flat, ids = target.flatten(), tag.run.ids
    if rows.numel() != flat.numel():
        return
    kept = flat != ignored
    size = ids.shape[1]
    at, b = rows % size, rows // size
    rates: dict[int, float] = {}
    for offset in (-1, 0, 1, 2, 3):
        moved = at + offset
        valid = kept & (moved >= 0) & (moved < size)
        if int(valid.sum()) >= 6:
            hits = ids[b[valid], moved[valid]] == flat[valid]
            rates[offset] = float(hits.float().mean())
    best = max(rates, key=lambda x: rates[x], default=1)
    if best != 1 and rates[best] >= 0.9 and rates.get(1, 0.0) < 0.6:
        what = {0: "not shifted", -1: "shifted the wrong way"}.get(best, "shifted twice")
        text = f"labels are {what}: {rates[best]:.0%} are the token at offset {best:+d} of the row"
        text += f", {rates.get(1, 0.0):.0%} the next one"
        watch.mark("shift", one.site, text, "logits[:, :-1] with labels[:, 1:], once")
    shape = ids.shape
    causal = rates.get(1, 0.0) >= 0.9  # of a masked language model the rest may be learnt
    share = float(kept.float().mean())
    runs = float((kept[1:] & kept[:-1]).float().mean())
    one.sampled = not causal and share < 0.5 and runs < 0.6 * share
    if causal and 0 < int((~kept).sum()) < kept.numel():
        out = torch.zeros(shape.numel(), dtype=torch.bool, device=ids.device)
        out[rows[~kept]] = True
        out = out.view(shape)
        before = torch.cat([out[:, :1], out[:, :-1]], 1)
        inner = out & before
        _forbid(tag.run, inner, f"rows labelled {ignored}")


def all_ignored(watch: Watch, one: Term, target: Tensor, value: int) -> None:
    if target.numel() and not bool((target != value).any()):
        text = f"all {target.numel()} labels are {value}: no row is trained"
        watch.mark("mask", one.site, text, "labels of the tokens that are to be learnt")


def aligned(watch: Watch, one: Term) -> None:
    """Whether both operands' rows stand at the same token."""
    if one.teacher is None:
        return
    a, b = one.student.tag, one.teacher.tag
    if a.rows is None or b.rows is None or a.run is None or b.run is None:
        return
    first, second = a.rows.flatten(), b.rows.flatten()
    if first.numel() != second.numel() or first.numel() < 6:
        return
    ids, others = a.run.ids, b.run.ids
    own, other = ids.flatten()[first], others.flatten()[second]
    same = float((own == other).float().mean())
    if same > 0.9:
        return
    at, row = first % ids.shape[1], first // ids.shape[1]
    for offset in (-1, 1, -2, 2):
        moved = at + offset
        valid = (moved >= 0) & (moved < ids.shape[1])
        if int(valid.sum()) < 4:
            continue
        hits = float((ids[row[valid], moved[valid]] == other[valid]).float().mean())
        if hits > 0.9 and same < 0.6:
            text = f"the teacher's row is of token i{offset:+d} where the student's is of token i"
            text += f" (in {hits:.0%} of the rows)"
            watch.mark("shift", one.site, text, "the same slice of both models' logits")
            return
    if same < 0.1 and ids.shape == others.shape and not b.mapped and not a.mapped:
        text = f"the two models read different ids: {1 - same:.0%} of the tokens differ"
        watch.mark("tokenizer", one.site, text)


def shared(watch: Watch, one: Term) -> None:
    """Whether the two operands come from one model, or from two that share what is trained."""
    assert one.teacher is not None
    a, b = one.student, one.teacher
    first, second = list(a.tag.origins), list(b.tag.origins)
    while first and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
    if not first or not second:
        return
    one_module, other = first[-1].module, second[-1].module
    site = one.site
    if one_module is other:
        values = [x.tag.source.tensor() if x.tag.source else None for x in (a, b)]
        equal = all(x is not None for x in values) and values[0].shape == values[1].shape  # type: ignore[union-attr]
        equal = equal and torch.equal(values[0], values[1])  # type: ignore[arg-type]
        same_inputs = first[-1].inputs == second[-1].inputs
        if a.tag.mask == b.tag.mask and a.tag.mask and same_inputs and not (a.grad and b.grad):
            if equal or b.tag.noisy:
                text = f"student and teacher are one object, a {type(other).__name__}"
                text += ", with the same outputs" if equal else ""
                watch.mark("shared", site, text, "teacher = copy.deepcopy(student).eval()")
        return
    if one.kind == "pair":
        return  # features of one model may be compared with each other
    mine = {id(x) for x in one_module.parameters()}
    both = [x for x in other.parameters() if id(x) in mine]
    held = watch.optimized()
    trained = [x for x in both if x.requires_grad or id(x) in held]
    if trained and not (a.grad and b.grad and one_module is other):
        size = sum(x.numel() for x in trained)
        names = watch.program.named(one_module), watch.program.named(other)
        text = f"{names[0]} and {names[1]} share {len(trained)} parameters ({size} numbers) that"
        text += " are trained"
        watch.mark("shared", site, text, f"copy.deepcopy({names[1]}) before it is changed")


def follow(watch: Watch, one: Term) -> None:
    """Watches at which places of the student's logits the loss has a gradient."""
    run = one.student.tag.run or _mixed(watch, one)
    if run is None:
        return
    gather(watch, run)
    if run.site is None or one.teacher is not None:
        run.site = one.site
    latest = run.latest() if run.latest is not None else None
    if run.hooked or latest is None or not latest.requires_grad:
        return
    run.hooked, shape = True, run.ids.shape
    watch.runs.append(run)

    def hook(gradient: Tensor) -> None:
        with watch._quiet(), torch.no_grad():
            if gradient.shape[:2] == shape:
                now = gradient.abs().amax(-1) > 0
                run.trained = now if run.trained is None else run.trained | now
                _judge(watch, run, run.site)

    latest.register_hook(hook)


def _mixed(watch: Watch, one: Term) -> Run | None:
    """The pass behind an operand without rows of its own: a mixture of both models."""
    if one.teacher is None or one.kind == "pair" or len(one.student.shape) < 2:
        return None
    tags = [watch.book.get(x) for x in watch.recent.values() if x.requires_grad]
    runs = [x.run for x in tags if x is not None and x.mask & one.student.tag.mask]
    return runs[-1] if runs else None


def _judge(watch: Watch, run: Run, site: Any) -> None:
    assert run.trained is not None
    for mask, why in run.forbidden:
        count = int(mask.sum())
        wrong = int((run.trained & mask).sum())
        if count and wrong >= 2 and wrong > 0.5 * count:
            text = f"a gradient at {wrong} of {count} places that are {why}"
            fix = "labels=labels, with -100 there (fastkd), or (rows * mask).sum() / mask.sum()"
            watch.mark("mask", site, text, fix)
            return


def _forbid(run: Run, mask: Tensor, why: str) -> None:
    held = run.forbidden
    if bool(mask.any()) and all(x[1] != why for x in held):
        held.append((mask, why))


def gather(watch: Watch, run: Run) -> None:
    """What names in the program, and the ids, say of padding and prompts."""
    ids, shape = run.ids, run.ids.shape
    columns = torch.arange(shape[1], device=ids.device).expand(shape)
    for name, value in _names(watch):
        if isinstance(value, Tensor) and value.shape == shape and not value.requires_grad:
            if TRAINED.match(name) and (mask := _zeros_and_ones(value)) is not None:
                _forbid(run, _twice(~mask), f"0 in {name}")
            elif PROMPT.match(name) and (mask := _zeros_and_ones(value)) is not None:
                _forbid(run, _twice(mask), f"1 in {name}")
            elif LABELS.match(name) and not value.is_floating_point():
                kept = value != IGNORED
                if bool(kept.any()) and float((value == ids)[kept].float().mean()) > 0.9:
                    _forbid(run, _twice(~kept), f"{IGNORED} in {name}")
        elif LENGTHS.match(name) and isinstance(value, Tensor) and value.shape == shape[:1]:
            if not value.is_floating_point() and 0 < int(value.min()) <= int(value.max()):
                if int(value.max()) <= shape[1]:
                    _forbid(run, columns >= value[:, None], f"beyond {name}")
        elif PROMPT_LENGTH.match(name):
            if isinstance(value, int) and 1 < value < shape[1]:
                _forbid(run, columns < value - 1, f"in the prompt ({name}={value})")
            elif isinstance(value, Tensor) and value.shape == shape[:1]:
                _forbid(run, columns < value[:, None] - 1, f"in the prompt ({name})")
        elif PAD.match(name) and isinstance(value, int) and not isinstance(value, bool):
            _forbid(run, _padding(ids, value), f"padding ({name}={value})")


def _padding(ids: Tensor, pad: int) -> Tensor:
    """Ends of rows, of two places or more, that hold nothing but `pad`."""
    other = (ids != pad).flip(1).cumsum(1).flip(1)
    tail = other == 0
    return tail & (tail.sum(1, keepdim=True) > 1) & ~tail.all(1, keepdim=True)


def _twice(mask: Tensor) -> Tensor:
    """Where a mask holds here and at the next place, whose token the row predicts."""
    return mask & torch.cat([mask[:, 1:], mask[:, -1:]], 1)


def _zeros_and_ones(value: Tensor) -> Tensor | None:
    mask = value.bool()
    whole = bool(((value == 0) | (value == 1)).all())
    return mask if whole and bool(mask.any()) and not bool(mask.all()) else None


def _names(watch: Watch) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for at, frame in enumerate(watch.program.frames()):
        scopes = [frame.f_locals] if frame.f_locals is not frame.f_globals else []
        if at == 0 or not scopes:
            scopes.append(frame.f_globals)
        for names in scopes:
            for name, value in list(names.items()):
                if isinstance(value, dict):
                    found += [(str(k), v) for k, v in list(value.items())[:40]]
                elif isinstance(value, (Tensor, int)):
                    found.append((name, value))
                elif hasattr(value, "data") and isinstance(getattr(value, "data", None), dict):
                    found += [(str(k), v) for k, v in value.data.items()]
                elif isinstance(value, nn.Embedding) and value.padding_idx is not None:
                    found.append(("pad_id", value.padding_idx))
                elif not isinstance(value, (nn.Module, type)) and hasattr(value, "__dict__"):
                    held = vars(value) if len(vars(value)) < 60 else {}
                    found += [(k, v) for k, v in list(held.items()) if isinstance(v, (int, Tensor))]
    return found


def padded(run: Run, pad: int) -> None:
    """The padding_idx of the table that ids were looked up in."""
    _forbid(run, _padding(run.ids, pad), f"padding (padding_idx={pad})")


def given_mask(run: Run, mask: Any) -> None:
    """The attention mask that a model was called with."""
    if isinstance(mask, Tensor) and mask.shape == run.ids.shape:
        if (kept := _zeros_and_ones(mask)) is not None:
            _forbid(run, _twice(~kept), "0 in attention_mask")
