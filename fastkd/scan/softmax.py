"""Which softmax of which logits an expression of a Python source is."""

from __future__ import annotations

import ast
from typing import NamedTuple

from fastkd.scan.names import Names, arguments, start, written
from fastkd.scan.rules import TWICE

# what moves another axis to the last place, whose columns then lie apart
MOVES = {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT"}
PASSED = {"detach", "float", "double", "to", "clone", "contiguous"}  # the same numbers
SIGNATURES = {"softmax": ("input", "dim"), "log_softmax": ("input", "dim")}


class Softmax(NamedTuple):
    """(log) softmax(logits / (the product of the divisors)) over an axis."""

    logits: str
    divisors: tuple[str, ...]
    log: bool
    dim: int | str | None  # text where it is no number, None where it is not given
    notes: tuple[str, ...] = ()

    @property
    def temperature(self) -> str:
        return " * ".join(atom(x) if len(self.divisors) > 1 else x for x in self.divisors)

    def same(self, other: Softmax) -> bool:
        """Whether both are softmaxes of the same numbers."""
        plain = [x.logits.replace(".detach()", "") for x in (self, other)]
        return plain[0] == plain[1] and self[1] == other[1] and self.dim == other.dim


def atom(text: str) -> str:
    """The text, in brackets where an operator or a method after it would split it."""
    node = ast.parse(text, mode="eval").body
    whole = (ast.Name, ast.Attribute, ast.Call, ast.Subscript)
    number = isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
    return text if isinstance(node, whole) or number else f"({text})"


def constant(node: ast.expr | None, default: object = None) -> object:
    """The value of a literal, else the expression's text."""
    if node is None:
        return default
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return Unread(ast.unparse(node))


class Unread(str):
    """The text of an expression whose value is not in the source."""


class Softmaxes:
    """Reads expressions as they can be written at one place of a source."""

    def __init__(self, names: Names, site: ast.AST) -> None:
        self.names, self.site = names, site

    def read(self, node: ast.expr, depth: int = 16) -> Softmax | None:
        if depth == 0:
            return None
        found = self._call(node, depth) if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Attribute) and node.attr == "data":
            return self._detached(self.read(node.value, depth - 1))
        if found is None and (value := self.names.follow(node, self.site)) is not None:
            found = self.read(value, depth - 1)
            if found is not None and self.names.without_grad(value, self.site):
                found = self._detached(found)
            if found is not None and not pure(found.logits):
                again = f"line {start(value)[0]}"
                note = f"leave out {again}, or {found.logits[:60]} runs twice"
                if not any(again in x for x in found.notes):
                    found = found._replace(notes=(*found.notes, note))
        return found

    def _call(self, node: ast.Call, depth: int) -> Softmax | None:
        name = self.names.function(node.func)
        if name in SIGNATURES:
            sides = arguments(node, *SIGNATURES[name]) or {}
            return self._made(sides.get("input"), sides.get("dim"), name, depth)
        if name in ("log", "exp"):
            sides = arguments(node, "input") or {}
            return self._changed(sides.get("input"), name, depth)
        if name is not None:
            return None
        made = self.names.module(node.func)
        if made is not None:
            name = {"LogSoftmax": "log_softmax", "Softmax": "softmax"}.get(
                self.names.function(made.func) or ""
            )
            options, given = arguments(made, "dim"), arguments(node, "input")
            if name is None or options is None or given is None:
                return None
            return self._made(given.get("input"), options.get("dim"), name, depth)
        if not isinstance(node.func, ast.Attribute) or self.names.imported(node.func.value):
            return None
        name, value = node.func.attr, node.func.value
        if name in SIGNATURES and written(value) not in ("self", "cls"):
            given = arguments(node, "dim")
            if given and isinstance(constant(given.get("dim")), int):
                return self._made(value, given["dim"], name, depth)
        if name in ("log", "exp"):
            return self._changed(value, name, depth)
        if name in PASSED:
            inner = self.read(value, depth - 1)
            if inner is None or name in ("clone", "contiguous"):
                return inner
            if name == "detach":
                return self._detached(inner)
            return inner._replace(logits=atom(inner.logits) + _suffix(node))
        return None

    def _made(
        self, logits: ast.expr | None, dim: ast.expr | None, name: str, depth: int
    ) -> Softmax | None:
        if logits is None:
            return None
        text, divisors, notes = self.logits(logits, depth)
        axis = constant(dim)
        text = self.joined(text, logits, axis)
        if axis is not None and (isinstance(axis, (bool, str)) or not isinstance(axis, int)):
            axis = str(axis)
        return Softmax(text, divisors, name == "log_softmax", axis, notes)

    def joined(self, text: str, node: ast.expr, axis: object) -> str:
        """The text of logits, contiguous where the losses would refuse them as they lie."""
        return f"{atom(text)}.contiguous()" if axis == -1 and self._apart(node) else text

    def _apart(self, node: ast.expr, depth: int = 16) -> bool:
        """Whether an expression's columns lie apart in memory."""
        if depth == 0:
            return False
        if (parts := self.divided(node)) is not None:
            return self._apart(parts[0], depth - 1)
        if isinstance(node, ast.BinOp):  # the T of self.T on its right is a temperature
            right = not self._number(node.right) and self._apart(node.right, depth - 1)
            return right or self._apart(node.left, depth - 1)
        if isinstance(node, ast.Subscript):
            last = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice
            stepped = isinstance(last, ast.Slice) and constant(last.step, 1) != 1
            return stepped or self._apart(node.value, depth - 1)
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Attribute) or node.func.attr == "contiguous":
                return False
            name, inner = node.func.attr, node.func.value
            return name in MOVES or (name in PASSED and self._apart(inner, depth - 1))
        if isinstance(node, ast.Attribute) and node.attr in MOVES:
            return True
        value = self.names.follow(node, self.site)
        return value is not None and self._apart(value, depth - 1)

    def _changed(self, node: ast.expr | None, name: str, depth: int) -> Softmax | None:
        inner = None if node is None else self.read(node, depth - 1)
        if inner is None or inner.log == (name == "log"):
            return None
        return inner._replace(log=name == "log")

    @staticmethod
    def _detached(found: Softmax | None) -> Softmax | None:
        if found is None or found.logits.endswith(".detach()"):
            return found
        return found._replace(logits=f"{atom(found.logits)}.detach()")

    # ---- logits and temperature

    def logits(
        self, node: ast.expr, depth: int = 16
    ) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """(logits, what they are divided by, notes) of an expression."""
        if depth == 0:
            return ast.unparse(node), (), ()
        parts = self.divided(node)
        if parts is not None:
            text, divisors, notes = self.logits(parts[0], depth - 1)
            return text, (*divisors, parts[1]), notes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            text, divisors, notes = "", (), ()
            if node.func.attr in PASSED and not self.names.imported(node.func.value):
                text, divisors, notes = self.logits(node.func.value, depth - 1)
            if divisors:
                return atom(text) + _suffix(node), divisors, notes
        value = self.names.follow(node, self.site)
        if value is not None and self.names.without_grad(value, self.site):
            value = None
        if value is not None and (isinstance(value, ast.Name) or self.divided(value)):
            found = self.logits(value, depth - 1)
            if found[1] and pure(found[0]):
                return found
        notes = self._scaled(node)
        inner = self.read(node, depth - 1)
        if inner is not None:
            of = "its logarithm, which changes nothing" if inner.log else "itself"
            notes = (*notes, f"{TWICE.seen} (of {of}): give the logits {inner.logits}")
        return ast.unparse(node), (), notes

    def divided(self, node: ast.expr) -> tuple[ast.expr, str] | None:
        """(logits, number) of a division of logits by what may be a temperature."""
        left: ast.expr | None = None
        by: ast.expr | None = None
        times = False
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Div, ast.Mult)):
            left, by, times = node.left, node.right, isinstance(node.op, ast.Mult)
            if times and self._inverse(left):
                left, by = by, left
        elif isinstance(node, ast.Call):
            name = self.names.function(node.func)
            if name == "div" and len(node.args) == 2 and not node.keywords:
                left, by = node.args
            elif isinstance(node.func, ast.Attribute) and node.func.attr in ("div", "mul"):
                if len(node.args) == 1 and not node.keywords and name is None:
                    left, by, times = node.func.value, node.args[0], node.func.attr == "mul"
        if by is None or left is None:
            return None
        if times:
            by = self._inverse(by)
        if by is None or not self._number(by):
            return None
        return left, ast.unparse(by)

    @staticmethod
    def _inverse(node: ast.expr) -> ast.expr | None:
        """T of 1 / T."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            if isinstance(node.left, ast.Constant) and node.left.value == 1:
                return node.right
        return None

    def _number(self, node: ast.expr) -> bool:
        """Whether an expression may be a positive number, not a tensor with an axis."""
        if isinstance(node, ast.Constant):
            number = node.value
            return type(number) in (int, float) and number > 0  # type: ignore[operator]
        if isinstance(node, (ast.Name, ast.Attribute)):
            value = self.names.follow(node, node)
            home = next((x for x in self.names.above(node) if isinstance(x, ast.ClassDef)), None)
            made = [x.value for x in self.names.bound.get((home or node, written(node) or ""), [])]
            called = any(
                isinstance(x, ast.Call) and ast.unparse(x.func) not in ("float", "int")
                for x in (value, *made)
            )
            return written(node) is not None and not called
        if isinstance(node, ast.Subscript):
            return isinstance(node.slice, ast.Constant) and self._number(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div, ast.Pow)):
            return self._number(node.left) and self._number(node.right)
        return False

    def _scaled(self, node: ast.expr) -> tuple[str, ...]:
        """Where a name has been divided above, under the same name."""
        name, notes = written(node), []
        for scope in self.names.scopes(node) if name else ():
            for binding in self.names.bound.get((scope, name or ""), []):
                parts = binding.value and self.divided(binding.value)
                if parts and written(parts[0]) == name and binding.end <= start(node):
                    line = start(binding.node)[0]
                    notes.append(f"line {line} has divided {name} by {parts[1]}")
        return tuple(notes)


def _suffix(node: ast.Call) -> str:
    """The method and arguments of x.method(...), as text."""
    call = ast.Call(ast.Name("x"), node.args, node.keywords)
    return f".{node.func.attr}{ast.unparse(call)[1:]}"  # type: ignore[attr-defined]


def pure(text: str) -> bool:
    """Whether an expression may be evaluated twice: it calls nothing but cheap methods."""
    calls = [x for x in ast.walk(ast.parse(text, mode="eval")) if isinstance(x, ast.Call)]
    cheap = {*PASSED, "view", "reshape", "flatten", "transpose", "permute", "movedim", "size"}
    return all(isinstance(x.func, ast.Attribute) and x.func.attr in cheap for x in calls)
