"""The faults of a distillation: names, texts and lines to write, of scan and of the doctor.

`scan` reads what a source says, the doctor what its run shows; where both judge the same thing,
both say it with one text of `RULES`.
"""

from __future__ import annotations

import re
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
    "reduction": (
        "the soft term is no mean over its rows",
        'fastkd.kl_div(student, teacher, temperature=T), or reduction="batchmean" of 2-D logits',
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


class Rule(NamedTuple):
    """What can be told from one line: the fault that it is, and what is seen."""

    fault: str
    seen: str


INPUT = Rule("probabilities", "the input of F.kl_div holds probabilities, not their logarithms")
TARGET = Rule("probabilities", "log_target does not fit the target")
TWICE = Rule("probabilities", "a softmax of a softmax")
SAME = Rule("shared", "the same logits on both sides: the loss is always 0")
AXES = Rule("axis", "two axes")
SWAPPED = Rule("swapped", "the first operand is the teacher's")
MEAN = Rule("reduction", "the mean is over rows times columns")
DIVIDED = Rule("denominator", "divided twice")
RULES = (INPUT, TARGET, TWICE, SAME, AXES, SWAPPED, MEAN, DIVIDED)

# names and comments that say that KL(student || teacher) is meant
MEANT = re.compile(
    r"reverse|(^|[^a-z])r_?kl|rev_?kl|jsd|(^|[^a-z])js(_|$|[^a-z])|jensen|mode.?seek|symmetric|skew"
    r"|minillm|gkd|jeffreys|kl_?qp|kl_?st|student.{0,6}\|\|",
    re.IGNORECASE,
)
SAID = re.compile(r"reverse.?kl|\brkl\b|mode.?seek|KL\((q|student) ?\|", re.IGNORECASE)


def faults(note: str) -> tuple[str, ...]:
    """The names of the faults that a note tells of."""
    return tuple(dict.fromkeys(x.fault for x in RULES if x.seen in note))
