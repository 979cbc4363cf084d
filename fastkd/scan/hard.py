"""The cross-entropy that a loss is added to: both are one fastkd.distillation_loss."""

from __future__ import annotations

import ast

from fastkd.scan.around import Around, Walk
from fastkd.scan.names import Names, arguments
from fastkd.scan.softmax import Softmax, Softmaxes, atom, constant

HEAD = "with the hard term: "
OPTIONS = (
    *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "label_smoothing",
)


def beside(names: Names, around: Around, student: Softmax, teacher: Softmax) -> str:
    """The call for alpha * CE + (1 - alpha) * T^2 * KL, "" where the sum is another."""
    if around.form not in ("batchmean", "row mean", "kept mean") or around.negative:
        return ""
    if student.divisors != teacher.divisors or len(student.divisors) > 1:
        return ""
    at: ast.expr = around.node
    weights, walk = list[str](), Walk(names, student.dim)
    while True:
        parent = names.parents.get(at)
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, (ast.Mult, ast.Add)):
            other = parent.right if parent.left is at else parent.left
            if isinstance(parent.op, ast.Add):
                return _joined(names, around, student, teacher, weights, other)
            weights += [ast.unparse(x) for x in _factors(other)]
            at = parent
        elif isinstance(parent, ast.Assign) and (used := walk.named(Around(at), parent)):
            at = used.node
        else:
            return ""


def _factors(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [*_factors(node.left), *_factors(node.right)]
    return [node]


def _joined(
    names: Names,
    around: Around,
    student: Softmax,
    teacher: Softmax,
    soft: list[str],
    other: ast.expr,
) -> str:
    parts = list[ast.expr]()
    for x in _factors(other):
        value = names.follow(x, other)
        parts += [x] if value is None or isinstance(value, ast.Constant) else _factors(value)
    calls = [x for x in parts if isinstance(x, ast.Call)]
    if (
        len(calls) != 1
        or not names.same(calls[0], other)
        or (hard := _hard(names, calls[0], student)) is None
    ):
        return ""
    weight = [ast.unparse(x) for x in parts if x is not calls[0]]
    t = student.temperature
    squared = _take_square(soft, t) if t else True
    alpha = _alpha(weight, soft)
    if alpha is None:
        return ""
    labels, ignored, smoothing = hard
    kept = f", labels={labels}" + (f", ignore_index={ignored}" if ignored else "")
    if around.mask and around.mask != kept:
        return ""
    options = f"temperature={t or '1.0'}, alpha={alpha}"
    options += f", label_smoothing={smoothing}" if smoothing else ""
    options += f", ignore_index={ignored}" if ignored else ""
    options += "" if student.dim == -1 else f", class_dim={student.dim}"
    options += "" if squared else ", t_squared=False"
    minds = [] if around.mask else [f"no label is {ignored or -100}"]
    minds += ["the logits are 2-D"] if student.dim != -1 and around.form == "batchmean" else []
    call = f"fastkd.distillation_loss({student.logits}, {teacher.logits}, {labels}, {options})"
    return f"{HEAD}{call}" + (f" where {' and '.join(minds)}" if minds else "")


def _hard(names: Names, call: ast.Call, student: Softmax) -> tuple[str, str, str] | None:
    """(labels, ignore_index, label_smoothing) of a cross-entropy of the same logits."""
    made = names.module(call.func)
    name = names.function(made.func if made is not None else call.func)
    options = arguments(made, *OPTIONS[2:]) if made is not None else {}
    given = arguments(call, *OPTIONS)
    if name not in ("cross_entropy", "CrossEntropyLoss") or options is None or given is None:
        return None
    options |= given
    target, logits = options.get("target"), options.get("input")
    if target is None or logits is None or ast.unparse(logits) != student.logits:
        return None
    if Softmaxes(names, call).read(target) is not None or student.dim not in (-1, 1):
        return None
    if constant(options.get("reduction"), "mean") != "mean" or "size_average" in options:
        return None
    if "reduce" in options or constant(options.get("weight")) is not None:
        return None
    texts = [ast.unparse(options[x]) if x in options else "" for x in OPTIONS]
    ignored, smoothing = texts[4], texts[7]
    return ast.unparse(target), "" if ignored == "-100" else ignored, smoothing


def _take_square(factors: list[str], t: str) -> bool:
    """Takes T^2 out of the factors."""
    for one in (f"{t} ** 2", f"{t} ** 2.0", f"pow({t}, 2)"):
        if one in factors:
            factors.remove(one)
            return True
    if factors.count(t) == 2:
        factors[:] = [x for x in factors if x != t]
        return True
    number = _number(t)
    square = next((x for x in factors if number and _number(x) == number**2), None)
    if square is not None:
        factors.remove(square)
    return square is not None


def _alpha(hard: list[str], soft: list[str]) -> str | None:
    """The weight of the hard term, where both weights sum to one."""
    if len(hard) != 1 or len(soft) != 1:
        return None
    a, b = hard[0], soft[0]
    numbers = _number(a), _number(b)
    if numbers[0] is not None and numbers[1] is not None:
        return a if abs(numbers[0] + numbers[1] - 1.0) < 1e-9 else None
    for one in ("1", "1.0"):
        if b == f"{one} - {atom(a)}":
            return a
        if a == f"{one} - {atom(b)}":
            return a
    return None


def _number(text: str) -> float | None:
    value = constant(ast.parse(text, mode="eval").body)
    return float(value) if isinstance(value, (int, float)) else None
