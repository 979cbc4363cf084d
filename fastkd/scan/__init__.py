"""Finds the distillation losses of Python sources and says what to write in their place.

Reads the syntax tree and runs nothing. A name is followed to the one assignment that reaches it. A
replacement has the value of the code above it, in its place; where that cannot be shown, a note
says why and no replacement is given.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastkd.scan import reductions, rules
from fastkd.scan.around import Around, Walk
from fastkd.scan.files import Unreadable, files, parse
from fastkd.scan.found import Found
from fastkd.scan.hard import beside
from fastkd.scan.names import Names, arguments
from fastkd.scan.products import ENTROPY, Products
from fastkd.scan.softmax import Softmax, Softmaxes, Unread, atom, constant, pure

TEACHERS = {"teacher", "teachers", "tea", "t", "ref", "target", "targets"}  # words of a name
BATCHES = re.compile(r"(size\(0\)|shape\[0\]|\blen\(|batch|\bbs\b|^[BN]$)", re.IGNORECASE)
# the arguments of torch's functions and of the modules' constructors, in order
FUNCTIONS = {
    "kl_div": ("input", "target", *reductions.LEGACY, "log_target"),
    "cross_entropy": (
        *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
        "label_smoothing",
    ),
}
CONSTRUCTORS = {"KLDivLoss": "kl_div", "CrossEntropyLoss": "cross_entropy"}


def scan(*paths: Path) -> Iterator[Found]:
    """The losses of files, or of all .py and .ipynb files of folders, in order.

    Args:
        *paths: files (Python sources or notebooks) and folders.

    Returns:
        What was found; a file that cannot be read is named with `code=""` and a note "not read".

    Raises:
        FileNotFoundError: nothing is there.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"path: got {path}, expected a Python file or a folder")
    seen = set[Path]()
    for file in files(paths):
        if isinstance(file, Unreadable):
            yield _unread(file)
            continue
        if file.resolve() in seen:
            continue
        seen.add(file.resolve())
        parsed = parse(file)
        for fault in parsed.faults:
            yield Found(
                fault.file, fault.line, "", None, f"not read: {fault.why}"[:300], fault.cell
            )
        for found in Source(str(file), parsed.tree).losses():
            cell, line = parsed.place(found.line)
            first, start, last, end = found.span or (0, 0, 0, 0)
            up = found.line - line
            yield found._replace(cell=cell, line=line, span=(first - up, start, last - up, end))


def _unread(fault: Unreadable) -> Found:
    return Found(fault.file, fault.line, "", None, f"not read: {fault.why}"[:300], fault.cell)


class Source:
    """The losses of one file."""

    def __init__(self, file: str, tree: ast.Module) -> None:
        self.file, self.tree, self.names = file, tree, Names(tree)
        self.products = Products(self.names)
        self.used = set[ast.AST]()  # constructors whose calls were found

    def losses(self) -> Iterator[Found]:
        kinds = (ast.Call, ast.BinOp)
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, kinds)]
        found: list[tuple[ast.AST, Found | None]] = [
            (x, self._call(x) if isinstance(x, ast.Call) else self._product(x)) for x in nodes
        ]
        losses = [one for node, one in found if node not in self.products.used]
        note = "its call was not found: give fastkd.kl_div the logits themselves there"
        for node in nodes:
            if isinstance(node, ast.Call) and self.names.function(node.func) == "KLDivLoss":
                if node not in self.used:
                    losses.append(self._found(node, None, [note]))
        yield from sorted((x for x in losses if x is not None), key=lambda x: x.line)

    # ---- the kinds

    def _call(self, node: ast.Call) -> Found | None:
        name, options = self.names.function(node.func), dict[str, ast.expr]()
        hidden = False
        if name is None and (made := self.names.module(node.func)) is not None:
            name = CONSTRUCTORS.get(self.names.function(made.func) or "")
            if name is not None:
                self.used.add(made)
                given = arguments(made, *FUNCTIONS[name][2:])
                options, hidden = given or {}, given is None
        if name not in FUNCTIONS:
            return None
        given = arguments(node, *FUNCTIONS[name])
        hidden = hidden or given is None
        if given is None:
            given = dict(zip(("input", "target"), node.args, strict=False))
        options = {**options, **given}
        if "input" not in options or "target" not in options:
            return self._found(node, None, [f"F.{name} with its arguments in * or **"])
        read = Softmaxes(self.names, node)
        kind = self._kl if name == "kl_div" else self._soft
        return kind(node, read, options, hidden)

    def _kl(
        self, node: ast.Call, read: Softmaxes, options: dict[str, ast.expr], hidden: bool
    ) -> Found:
        sides = options["input"], options["target"]
        first, second = read.read(sides[0]), read.read(sides[1])
        if first is None or second is None:
            which = "input" if first is None else "target"
            text = ast.unparse(sides[first is not None])[:80]
            what = f"its {which} ({text}) could not be followed to a softmax of logits"
            mixed = ast.unparse(self.names.follow(options["input"], node) or options["input"])
            if "logsumexp(" in mixed or "logaddexp(" in mixed:
                what = "a mixture of both sides, as of fastkd.js_div"
            notes = [f"{what}: give fastkd.kl_div the logits themselves"]
            return self._found(node, None, [*notes, *reductions.means(options)])
        reduction, faults = reductions.read(options)
        log_target = constant(options.get("log_target"), False)
        if hidden:
            faults.append("its options are hidden in * or **")
        if not first.log:
            faults.append(f"{rules.INPUT.seen}: this line has a fault")
        if isinstance(log_target, Unread):
            faults.append(f"its log_target could not be read ({log_target})")
        elif second.log != bool(log_target):
            faults.append(f"{rules.TARGET.seen}: this line has a fault")
        if first.same(second) and pure(first.logits):
            faults.append(rules.SAME.seen)
        if reduction != "none":
            return self._written(Around(node, reduction), first, second, faults, [])
        around, two = self._around(node, first, second, lambda x: tuple(map(x.read, sides)))
        return self._written(around, two[0], two[1], faults, [])

    def _soft(
        self, node: ast.Call, read: Softmaxes, options: dict[str, ast.expr], hidden: bool
    ) -> Found | None:
        target = read.read(options["target"])
        if target is None:
            return None  # labels
        logits, divisors, notes = read.logits(options["input"])
        logits = read.joined(logits, options["input"], target.dim)
        student = Softmax(logits, divisors, True, target.dim, notes)
        if student.same(target):
            return None  # an entropy
        reduction, faults = reductions.read(options)
        if hidden:
            faults.append("its options are hidden in * or **")
        if target.log:
            faults.append("its target is a log-softmax, not a softmax: this line has a fault")
        if "weight" in options and constant(options["weight"]) is not None:
            faults.append("class weights, which fastkd has not")
        if constant(options.get("label_smoothing"), 0) != 0:
            faults.append("label_smoothing over soft targets, which fastkd has not")
        hints = [f"a cross-entropy: {ENTROPY}"]
        if target.dim == -1:
            hints.append("of 2-D logits, since F.cross_entropy takes dim 1 for the classes")
        elif target.dim != 1:
            faults.append(f"F.cross_entropy takes dim 1 for the classes, its target {target.dim}")
        form = {"mean": "row mean", "none": "rows"}.get(reduction, reduction)
        return self._written(Around(node, form), student, target, faults, hints)

    def _product(self, node: ast.BinOp) -> Found | None:
        """p * log q, the core of a soft cross-entropy by hand, or p * (log p - log q)."""
        made, product, by = self.products.pair(node, node), node, None
        if made is None:
            for product, by in self.products.without_mask(node):
                made = self.products.pair(product, node)
                if made and Walk(self.names, made[0].dim).begun(node, by) is not None:
                    break
            else:
                return None
        first, second, negative, hints = made
        around, again = self._around(
            node, first, second, lambda x: self.products.pair(product, x.site), by
        )
        around = around._replace(negative=around.negative != negative)
        return self._written(around, again[0], again[1], [], hints)

    def _around(
        self, node: ast.expr, first: Softmax, second: Softmax, again: Any,
        by: ast.expr | None = None,
    ) -> tuple[Around, Any]:  # fmt: skip
        """What is around a loss per column, and its sides as they are written there.

        by: a mask that is a factor within it.
        """
        around = Walk(self.names, first.dim).up(node, by)
        made = again(Softmaxes(self.names, around.node))
        if made is not None and all(x is not None for x in made[:2]):
            return around, made
        alone = Walk(self.names, first.dim, inside=True).up(node, by)
        return alone, again(Softmaxes(self.names, node))

    # ---- what is written

    def _written(
        self,
        around: Around,
        student: Softmax,
        teacher: Softmax,
        faults: list[str],
        hints: list[str],
    ) -> Found:
        node, negative = around.node, around.negative
        notes = [*dict.fromkeys((*student.notes, *teacher.notes))]
        faults += [x for x in notes if x.startswith(rules.TWICE.seen)]
        hints += [x for x in (*notes, *around.notes) if not x.startswith(rules.TWICE.seen)]
        dim, second = student.dim, teacher.dim
        joined = beside(self.names, around, student, teacher)
        if dim != second:
            faults.append(f"{rules.AXES.seen} (dim={dim} and dim={second})")
        elif dim is None:
            what = "no dim: torch takes 1 of 2-D and 4-D logits, 0 of 1-D and 3-D"
            faults.append(f"{what}; the line is for 2-D, of others move the classes last")
        elif isinstance(dim, str):
            faults.append(f"its dim could not be read ({dim}): move the classes last")
        function = "kl_div"
        if _says_teacher(student.logits) and not _says_teacher(teacher.logits):
            function, student, teacher = "reverse_kl_div", teacher, student
            why = "" if self._means_reverse(node) else f", since {rules.SWAPPED.seen}"
            hints.append(f"KL(student || teacher){why}")
            if any(ENTROPY in x for x in hints):
                hints = [x for x in hints if ENTROPY not in x]
                faults.append("a cross-entropy without the student's own entropy, no divergence")
        sides, options = _temperatures(student, teacher, hints)
        names = [x.logits.removesuffix(".contiguous()") for x in (student, teacher)]
        plain = next((x for x in names if "(" not in x), "")
        if isinstance(dim, int) and dim != -1:
            options += f", class_dim={dim}"
        name = plain or self.names.unused("logits")
        form, of_mask, after = reductions.written(around, dim, name, faults, hints)
        options += of_mask
        if after and not plain:
            faults.append(f"give the logits a name first, as {name} = {sides[0]}")
            sides[0] = name
        if around.form == "mean":
            over_rows = f"fastkd.{function}({sides[0]}, {sides[1]}{options})"
            hints.append(f"over the rows alone it is {over_rows}")
        if form in ("sum", "batchmean", "rows"):
            options += f', reduction="{form if form != "rows" else "none"}"'
        sign = "-" if negative else ""
        call = f"{sign}fastkd.{function}({sides[0]}, {sides[1]}{options}){after}"
        split = (ast.BinOp, ast.UnaryOp, ast.Attribute, ast.Subscript)
        if (sign or after) and isinstance(self.names.parents.get(node), split):
            call = f"({call})"
        if (by := self._batch(node)) and form != "rows" and (after or form != "sum"):
            hints.append(f"{rules.DIVIDED.seen}: {by} divides what the loss's own mean has divided")
        if faults:
            zero = any("always 0" in x for x in faults)
            meant = [] if zero else [f"as far as it can be read: {call}"[:300]]
            return self._found(node, None, [*faults, *meant, *hints])
        both = "" if any(ENTROPY in x for x in hints) or function != "kl_div" else joined
        return self._found(node, call, [*hints, both] if both else hints)

    def _found(self, node: ast.expr, replacement: str | None, notes: list[str]) -> Found:
        square = self._squared(node)
        if replacement is not None and square:
            notes = [*notes, f"the factor {square} stays"]
        last, end = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
        span = (node.lineno, node.col_offset, last, end)
        note = "; ".join(notes)
        code, faults = ast.unparse(node), rules.faults(note)
        return Found(self.file, node.lineno, code, replacement, note, None, span, faults)

    def _means_reverse(self, node: ast.AST) -> bool:
        """Whether the names and docstrings around say that the direction is meant."""
        words = [ast.get_docstring(self.tree) or ""]
        for x in self.names.above(node):
            if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                words += [x.name, (ast.get_docstring(x) or "")[:300]]
            elif isinstance(x, ast.Assign):
                words += [ast.unparse(y) for y in x.targets]
        return any(rules.MEANT.search(x) for x in words)

    def _squared(self, node: ast.AST) -> str:
        """The T * T or T ** 2 that a loss is multiplied by."""
        while isinstance(parent := self.names.parents.get(node), ast.BinOp):
            if isinstance(parent.op, ast.Mult):
                other = parent.right if parent.left is node else parent.left
                if isinstance(other, ast.BinOp) and isinstance(other.op, (ast.Pow, ast.Mult)):
                    return ast.unparse(other)
            node = parent
        return ""

    def _batch(self, node: ast.expr) -> str:
        """The size of the batch that a loss is divided by, at once or under its name."""
        for division in ast.walk(self.tree):
            if isinstance(division, ast.BinOp) and isinstance(division.op, ast.Div):
                left, right = division.left, division.right
            elif isinstance(division, ast.AugAssign) and isinstance(division.op, ast.Div):
                left, right = division.target, division.value
            else:
                continue
            text = ast.unparse(right)
            if BATCHES.search(text) and any(x is node for x in self._factors(left)):
                return f"/ {text}"
        return ""

    def _factors(self, node: ast.expr, depth: int = 4) -> list[ast.expr]:
        """What is multiplied in an expression, under names, too."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return [*self._factors(node.left, depth), *self._factors(node.right, depth)]
        value = self.names.follow(node, node) if depth else None
        return [node, *(self._factors(value, depth - 1) if value is not None else ())]


def _temperatures(student: Softmax, teacher: Softmax, hints: list[str]) -> tuple[list[str], str]:
    """The logits of both sides, and what says their common temperature."""
    sides = [student.logits, teacher.logits]
    if student.divisors == teacher.divisors:
        if len(student.divisors) > 1:
            hints.append(f"divided {len(student.divisors)} times, by {student.temperature}")
        return sides, f", temperature={student.temperature}" if student.divisors else ""
    two = [x.temperature or "1" for x in (student, teacher)]
    hints.append(f"two temperatures ({two[0]} and {two[1]}), each divided in its place")
    for i, side in enumerate((student, teacher)):
        sides[i] = " / ".join((atom(sides[i]), *(atom(x) for x in side.divisors)))
    return sides, ""


def _says_teacher(text: str) -> bool:
    return not TEACHERS.isdisjoint(re.split(r"[\W_\d]+", text.lower()))
