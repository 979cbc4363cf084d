"""The cross-entropy that a loss is added to: both are one fastkd.distillation_loss."""

from __future__ import annotations

import ast

from fastkd.scan.around import Around, Walk
from fastkd.scan.names import Names, arguments
from fastkd.scan.softmax import Softmax, Softmaxes, atom, constant

HEAD = "with the hard term: "
# what makes one axis of all rows; V is whatever stands there
LOGITS = ("view(-1, V)", "reshape(-1, V)", "flatten(0, 1)", "flatten(0, -2)")
LABELS = ("view(-1)", "reshape(-1)", "flatten()")
# what moves the classes where F.cross_entropy wants them
TURNED = ("transpose(1, 2)", "transpose(-1, -2)", "transpose(2, 1)", "permute(0, 2, 1)")
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
        or (hard := _hard(names, calls[0], student, around.node)) is None
    ):
        return ""
    weight = [ast.unparse(x) for x in parts if x is not calls[0]]
    t = student.temperature
    squared = _take_square(soft, t) if t else True
    alpha = _alpha(weight, soft)
    if alpha is None:
        return ""
    labels, ignored, smoothing, apart = hard
    kept = f", labels={labels}" + (f", ignore_index={ignored}" if ignored else "")
    if around.mask and around.mask != kept:
        return ""
    options = f"temperature={t or '1.0'}, alpha={alpha}"
    options += f", label_smoothing={smoothing}" if smoothing else ""
    options += f", ignore_index={ignored}" if ignored else ""
    options += "" if student.dim == -1 else f", class_dim={student.dim}"
    options += "" if squared else ", t_squared=False"
    minds, why = list[str](), list[str]()
    if not around.mask:
        minds.append(f"no label is {ignored or -100}")
        why.append(
            f"a row labelled {ignored or -100} counts in no term there, in the soft one here"
        )
    if around.form == "batchmean" and apart:
        minds.append("a mean over rows is meant")
        why.append("batchmean divides by the first size alone, not by all rows")
    elif around.form == "batchmean" and student.dim != -1:
        minds.append("the logits are 2-D")
    call = f"fastkd.distillation_loss({student.logits}, {teacher.logits}, {labels}, {options})"
    where = f" where {' and '.join(minds)}" if minds else ""
    return f"{HEAD}{call}{where}" + (f" ({', and '.join(why)})" if why else "")


def _hard(
    names: Names, call: ast.Call, student: Softmax, site: ast.expr
) -> tuple[str, str, str, bool] | None:
    """(labels, ignore_index, label_smoothing) of a cross-entropy of the same logits.

    The last: whether the rows of these logits have several axes.
    """
    made = names.module(call.func)
    name = names.function(made.func if made is not None else call.func)
    options = arguments(made, *OPTIONS[2:]) if made is not None else {}
    given = arguments(call, *OPTIONS)
    if name not in ("cross_entropy", "CrossEntropyLoss") or options is None or given is None:
        return None
    options |= given
    target, logits = options.get("target"), options.get("input")
    if target is None or logits is None or student.dim not in (-1, 1):
        return None
    labels, apart = ast.unparse(target), False
    if ast.unparse(logits) != student.logits:
        own = _rows(names, names.placed(student.logits, site), LOGITS)
        flat, turned = (_rows(names, logits, x) for x in (LOGITS, TURNED))
        if student.dim != -1 or (own[0], True) not in (flat, turned):
            return None
        apart = not own[1]
        if apart and flat[1]:
            labels, flat_too = _rows(names, target, LABELS)
            if not flat_too:
                return None
        elif turned[1] and not apart:
            return None  # the labels are not those of the flat logits
    if Softmaxes(names, call).read(target) is not None:
        return None
    if constant(options.get("reduction"), "mean") != "mean" or "size_average" in options:
        return None
    if "reduce" in options or constant(options.get("weight")) is not None:
        return None
    texts = [ast.unparse(options[x]) if x in options else "" for x in OPTIONS]
    ignored, smoothing = texts[4], texts[7]
    return labels, "" if ignored == "-100" else ignored, smoothing, apart


def _rows(names: Names, node: ast.expr, shapes: tuple[str, ...]) -> tuple[str, bool]:
    """The text of logits or labels before their rows became one axis, and whether they did."""
    value: ast.expr | None = node
    while value is not None:
        func = value.func if isinstance(value, ast.Call) else None
        if not isinstance(value, ast.Call):
            value = names.follow(value, node)
        elif not isinstance(func, ast.Attribute) or value.keywords:
            break
        elif func.attr == "contiguous":
            value = func.value
        else:
            given = [ast.unparse(x) for x in value.args]
            if len(given) == 2 and func.attr in ("view", "reshape"):
                given[1] = "V"
            if f"{func.attr}({', '.join(given)})" not in shapes:
                break
            return ast.unparse(func.value).removesuffix(".contiguous()"), True
    return ast.unparse(node).removesuffix(".contiguous()"), False


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
