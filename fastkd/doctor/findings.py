"""What may be wrong with a distillation: the names, the texts and the lines to write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

# name: (what is wrong, the line to write)
FAULTS = {
    "shift": (
        "labels or rows are off by one",
        "logits[:, :-1] with labels[:, 1:], once, for student and teacher alike",
    ),
    "mask": (
        "the loss counts places that are not to be learnt, or none at all",
        "fastkd.distillation_loss(student, teacher, labels)  # -100 on padding and prompt",
    ),
    "temperature": (
        "the factor T^2 is missing or doubled",
        "loss = alpha * hard + (1 - alpha) * T * T * soft",
    ),
    "denominator": (
        "accumulated micro-batches: a mean of means",
        "fastkd.kl_div(student, teacher, labels=labels, normalizer=tokens_of_the_whole_step)",
    ),
    "teacher_mode": ("the teacher is in training mode", "teacher.eval()"),
    "teacher_gradient": (
        "the teacher has a gradient, or is trained",
        "with torch.no_grad(): teacher_logits = teacher(inputs)",
    ),
    "shared": (
        "student and teacher share what is trained",
        "teacher = copy.deepcopy(student).eval().requires_grad_(False)",
    ),
    "swapped": (
        "student and teacher are swapped",
        "F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), ...)",
    ),
    "probabilities": (
        "probabilities, log-probabilities or logits in each other's place",
        "fastkd.kl_div(student_logits, teacher_logits, temperature=T)",
    ),
    "axis": ("a softmax over an axis that is not the classes'", "F.softmax(logits / T, dim=-1)"),
    "order": ("stored outputs are in another order than the samples", "stored[index]"),
    "tokenizer": (
        "student and teacher number their tokens in two ways",
        "fastkd.MappedLogits, or fastkd.distill.uld for two tokenizers",
    ),
    "projector": (
        "a module of the loss is not in the optimizer",
        'optimizer.add_param_group({"params": projector.parameters()})',
    ),
    "gradient": (
        "a loss without a gradient",
        "compute the student's logits with gradients, and do not detach them",
    ),
    "float16": (
        "float16 loses numbers",
        "scaler.scale(loss).backward(), with the loss in float32: logits.float()",
    ),
    "schedule": ("a schedule without effect", "scheduler.step()  # after optimizer.step()"),
}


class Finding(NamedTuple):
    """One fault: its name, where it is, what was seen, and what to write."""

    name: str
    file: str
    line: int
    message: str
    evidence: str
    fix: str


def finding(name: str, file: str, line: int, evidence: str, fix: str = "") -> Finding:
    message, usual = FAULTS[name]
    return Finding(name, file, line, message, evidence, usual if len(fix) < 12 else fix)


class Findings(list[Finding]):
    """Findings; `table()` and `str` show them."""

    def table(self) -> str:
        """One paragraph a finding."""
        if not self:
            return "no findings"
        return "\n".join(text(x) for x in self)

    __str__ = table

    __repr__ = table


def text(one: Finding) -> str:
    where = f"{os.path.relpath(one.file)}:{one.line}" if one.file else "(no line)"
    lines = [f"{where}: {one.name}: {one.message}", f"    seen   {one.evidence}"]
    return "\n".join([*lines, f"    write  {one.fix}"])


def report(found: Sequence[Finding], steps: int) -> str:
    """What a run of the doctor prints."""
    count = f"{len(found)} finding{'s' if len(found) != 1 else ''}"
    end = f"{count} in {steps} step{'s' if steps != 1 else ''} of distillation"
    return "\n".join([*(text(x) for x in found), end])
