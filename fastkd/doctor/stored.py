"""Stored outputs and their order; tokenizers and their ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .flow import Term
from .source import text_of

if TYPE_CHECKING:
    from .watch import Watch

MOST = 4_000_000  # numbers of teacher outputs that are remembered
ROLES = {
    "student": re.compile(r"stud|(^|_)(s|stu)(_|$)", re.IGNORECASE),
    "teacher": re.compile(r"teach|(^|_)(t|tea)(_|$)", re.IGNORECASE),
}
TABLES = "vocab stoi token_to_id ids encoder word2idx tok2id vocabulary".split()
PADDED = re.compile(r"padded|pad_to|vocab.{0,12}pad|pad.{0,12}vocab", re.IGNORECASE)


def remember(watch: Watch, module: nn.Module, given: list[Tensor], found: list[Tensor]) -> None:
    """Keeps a model's inputs and outputs: by them stored outputs are recognised."""
    x, out = given[0], found[0]
    watch.inputs[id(module)] = x
    if out.requires_grad or not out.is_floating_point() or not 2 <= out.dim() <= 3:
        return
    if x.shape[:1] != out.shape[:1] or not x.dim() or out.shape[-1] < 3 or not out.numel():
        return
    first = out[:, 0] if out.dim() == 3 else out
    if watch.kept + first.numel() > MOST or watch.kd_steps:
        return
    watch.kept += first.numel()
    watch.outputs.append((_keys(x), first.detach().float().clone()))


def _keys(x: Tensor) -> list[int]:
    rows = x.detach().reshape(x.shape[0], -1).cpu()
    rows = rows.float() if rows.dtype == torch.bfloat16 else rows
    return [hash(row.numpy().tobytes()) for row in rows]


def _unit(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def order(watch: Watch, one: Term, teacher: Any) -> None:
    """Whether stored outputs belong to the samples that the student has read."""
    assert one.teacher is not None
    a, b = one.student.tag, one.teacher.tag
    if not a.origins or (b.origins and b.origins[-1].call > watch.calls_before):
        return  # the teacher has just been asked
    x = watch.inputs.get(id(a.origins[-1].module))
    value, columns = _rows(one, teacher)
    if x is None or value is None or value.shape[0] != x.shape[0] or value.shape[0] < 4:
        return
    _by_labels(watch, one, value)
    keys = _keys(x)
    known = [key for held, _ in watch.outputs for key in held]
    if not known or value.shape[1] < 3:
        return
    where: dict[int, list[int]] = {}
    for at, key in enumerate(known):
        where.setdefault(key, []).append(at)
    outputs = [out for _, out in watch.outputs]
    outputs = [out for out in outputs if out.shape[1] == outputs[-1].shape[1]]
    table = torch.cat(outputs)
    if table.shape[0] != len(known):
        return
    width, found, wrong, other = value.shape[1], 0, 0, ""
    for i, key in enumerate(keys[:64]):
        if key not in where:
            continue
        if columns is not None:
            rows = table[:, columns[i]]
        elif width < table.shape[1]:
            rows = table.topk(width).values
        elif width == table.shape[1]:
            rows = table
        else:
            return
        alike = (_unit(rows) @ _unit(value[i].to(rows)) > 0.9995).nonzero().flatten().tolist()
        if alike:
            found += 1
            if not set(alike) & set(where[key]):
                wrong += 1
                other = other or f"row {i} of the batch has the outputs of sample {alike[0]}"
                other += f", its own is sample {where[key][0]}" if "its own" not in other else ""
    if found >= 3 and wrong > 0.5 * found:
        text = f"{wrong} of {found} stored rows are another sample's: {other}"
        watch.mark("order", one.site, text, "store with the sample's index, read by that index")


def _rows(one: Term, teacher: Any) -> tuple[Tensor | None, Tensor | None]:
    """Stored outputs as one row a sample, up to scale, and the columns where there are few."""
    assert one.teacher is not None
    tag, columns = one.teacher.tag, None
    if not isinstance(teacher, Tensor):
        value, columns = getattr(teacher, "logprobs", None), getattr(teacher, "indices", None)
    else:
        value = teacher
        if tag.kind == "prob":
            value = teacher.detach().float().clamp_min(1e-30).log()
        elif not tag.kind and float(teacher.min()) >= 0.0 and float(teacher.max()) <= 1.0:
            value = teacher.detach().float().clamp_min(1e-30).log()
    if not isinstance(value, Tensor) or value.dim() not in (2, 3):
        return None, None
    value = value.detach().float()
    if columns is not None and columns.shape != value.shape:
        columns = None
    if value.dim() == 3:
        value, columns = value[:, 0], None if columns is None else columns[:, 0]
    return value, columns


def _by_labels(watch: Watch, one: Term, value: Tensor) -> None:
    """Counts how often stored outputs name the label, in the batch and in the order of storage."""
    if watch.outputs:
        return
    tally = watch.agreement
    tally["pending"] = value.argmax(-1)
    if "site" not in tally:
        tally["site"], tally["classes"] = one.site, value.shape[1]
        arrays = list(_arrays(watch))
        for held in arrays:
            if held.dim() == 2 and held.shape[1] == value.shape[1] and held.shape[0] > len(value):
                for other in arrays:
                    whole = other.dim() == 1 and not other.is_floating_point()
                    if whole and other.shape[0] == held.shape[0]:
                        share = float((held.float().argmax(-1) == other).float().mean())
                        tally["all"] = max(tally.get("all", 0.0), share)


def stepped(watch: Watch) -> None:
    """A step is over: its stored outputs beside its labels."""
    named, labels = watch.agreement.pop("pending", None), watch.labels
    if named is not None and labels is not None and labels.shape == named.shape:
        watch.agreement["batch"] += int((named == labels.to(named.device)).sum())
        watch.agreement["rows"] += labels.numel()
    watch.labels = None


def judge(watch: Watch) -> None:
    """Stored outputs that fit the labels as they lie, and not as they are read."""
    tally = watch.agreement
    if "all" not in tally or not tally["rows"]:
        return
    batch, whole = tally["batch"] / tally["rows"], tally["all"]
    chance = 1.0 / tally["classes"]
    if whole > chance + 0.3 and batch < chance + 0.4 * (whole - chance):
        text = f"stored outputs name the label in {whole:.0%} of the samples as they are stored, "
        text += f"in {batch:.0%} as they are read (chance {chance:.0%})"
        watch.marks["order", tally["site"]][0] = watch.terms_at(tally["site"])
        watch.mark("order", tally["site"], text, "read stored outputs by the sample's index")


def _arrays(watch: Watch) -> Iterator[Tensor]:
    """Tensors in reach of the program's names: its own, and those of data sets."""
    seen = set[int]()

    def within(value: Any, depth: int) -> Iterator[Tensor]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value.detach().cpu()
        elif type(value).__module__ == "numpy" and hasattr(value, "dtype"):
            if value.dtype.kind in "fiu":
                yield torch.as_tensor(value)
        elif depth and isinstance(value, (list, tuple)):
            for x in value[:8]:
                yield from within(x, depth - 1)
        elif depth and isinstance(value, dict):
            for x in list(value.values())[:20]:
                yield from within(x, depth - 1)
        elif depth and not isinstance(value, (nn.Module, type)):
            if isinstance(value, (torch.utils.data.Dataset, torch.utils.data.DataLoader)):
                for x in list(vars(value).values()):
                    yield from within(x, depth - 1)

    for frame in watch.program.frames():
        for names in (frame.f_locals, frame.f_globals):
            for value in list(names.values()):
                yield from within(value, 3)


# ---- tokenizers


def tokenizers(watch: Watch, one: Term) -> None:
    """Whether student and teacher number their tokens in two ways, column against column."""
    assert one.teacher is not None
    a, b = one.student, one.teacher
    if a.tag.mapped or b.tag.mapped or not a.shape or not b.shape:
        return
    sizes = [x.tag.columns or x.shape[-1] for x in (a, b)]
    if sizes[0] != sizes[1]:
        more, less = max(sizes), min(sizes)
        files = {frame.f_code.co_filename for frame in watch.program.frames()}
        said = any(PADDED.search(text_of(file)) for file in files)
        round_up = any(more % x == 0 and more - less < x for x in (8, 64, 128) if more > 10 * x)
        padded = round_up or (more % 8 == 0 and more - less < 8)
        if not padded and more - less > 0.005 * more and not said:
            text = f"a student of {sizes[0]} tokens, a teacher of {sizes[1]}: columns were cut off"
            watch.mark("tokenizer", one.site, text)
    if watch.vocabularies is None:
        watch.vocabularies = _vocabularies(watch)
    found = watch.vocabularies
    if len(found) == 2 and a.shape[-1] >= 0.5 * len(found["student"]):
        mine, other = found["student"], found["teacher"]
        differ = [x for x in mine if x in other and mine[x] != other[x]]
        alone = len(mine.keys() ^ other.keys())
        if differ or alone > 0.05 * len(mine):
            text = f"two tokenizers: {len(differ)} tokens have two ids, {alone} are in one alone"
            if differ:
                x = differ[0]
                text += f" ({x!r}: {mine[x]} and {other[x]})"
            watch.mark("tokenizer", one.site, text)


def _vocabularies(watch: Watch) -> dict[str, dict[Any, int]]:
    found: dict[str, dict[Any, int]] = {}
    for frame in watch.program.frames():
        for names in (frame.f_locals, frame.f_globals):
            for name, value in list(names.items()):
                role = next((x for x, words in ROLES.items() if words.search(name)), None)
                if role is None or role in found:
                    continue
                table = _table(value)
                if table is not None:
                    found[role] = table
    return found


def _table(value: Any) -> dict[Any, int] | None:
    """Token to id, of a dictionary or of a tokenizer."""
    if isinstance(value, (Tensor, nn.Module, type)):
        return None
    if isinstance(value, dict):
        whole = len(value) > 3 and all(isinstance(x, str) for x in value)
        numbers = whole and all(isinstance(x, int) for x in value.values())
        return value if numbers and len(set(value.values())) == len(value) else None
    if hasattr(value, "get_vocab"):
        return dict(value.get_vocab())
    for name in TABLES:
        held = getattr(value, name, None)
        if isinstance(held, dict) and (table := _table(held)) is not None:
            return table
    for name in ("itos", "vocab", "tokens", "chars", "alphabet"):
        held = getattr(value, name, None)
        if isinstance(held, (list, tuple, str)) and len(set(held)) == len(held) > 3:
            return {x: i for i, x in enumerate(held)}
    strings = isinstance(value, list) and all(isinstance(x, str) for x in value)
    if strings and len(set(value)) == len(value) > 3:
        return {x: i for i, x in enumerate(value)}
    return None
