"""Losses by hand: products of a distribution and logarithms of distributions."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fastkd.scan.names import Names, written
from fastkd.scan.softmax import Softmax, Softmaxes

ENTROPY = "larger by the teacher's entropy, the gradient is the same"
INFINITE = "columns where the logits are infinite count 0 there"
Pair = tuple[Softmax, Softmax, bool, list[str]]  # student, teacher, whether negated, hints


class Products:
    """The products of one source; those within a difference that was read are `used`."""

    def __init__(self, names: Names) -> None:
        self.names, self.used = names, set[ast.AST]()

    def pair(self, node: ast.BinOp, site: ast.AST) -> Pair | None:
        """(student, teacher, whether negated, hints) of a product or a difference of two."""
        read, negative = Softmaxes(self.names, site), False
        if isinstance(node.op, ast.Sub):
            return self._two_products(node, site)
        if not isinstance(node.op, ast.Mult):
            return None
        sides = []
        for side in (node.left, node.right):
            while isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.USub):
                side, negative = side.operand, not negative
            sides.append(side)
        first, second = (read.read(x) for x in sides)
        if first is not None and second is not None:
            if first.log == second.log or first.same(second):
                return None  # no loss, or an entropy
            student, teacher = (first, second) if first.log else (second, first)
            return student, teacher, not negative, [f"a cross-entropy by hand: {ENTROPY}"]
        one = first or second
        pair = self._difference(read, sides[first is not None])
        if one is None or one.log or pair is None:
            return None
        if one.same(pair[1]):
            pair, negative = pair[::-1], not negative
        if not one.same(pair[0]) or one.same(pair[1]):
            return None
        return pair[1], one, negative, ["by hand"]

    def without_mask(self, node: ast.BinOp) -> Iterator[tuple[ast.BinOp, ast.expr]]:
        """(p * x, mask), for each factor that may be the mask of (mask * p) * x."""
        for side, other in ((node.left, node.right), (node.right, node.left)):
            value = self.names.follow(side, node) if written(side) else side
            if not (isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult)):
                continue
            for by, p in ((value.left, value.right), (value.right, value.left)):
                yield ast.copy_location(ast.BinOp(p, node.op, other), node), by

    def _two_products(self, node: ast.BinOp, site: ast.AST) -> Pair | None:
        """p * log p - p * log q, or the other way about."""
        read, parts, notes = (
            Softmaxes(self.names, site),
            list[tuple[Softmax, Softmax]](),
            list[str](),
        )
        products = []
        for side in (node.left, node.right):
            while not isinstance(side, ast.BinOp):
                inner = self._filled(side)
                value = inner or self.names.follow(side, site)
                if value is None:
                    return None
                notes += [INFINITE] if inner and INFINITE not in notes else []
                side = value
            first, second = read.read(side.left), read.read(side.right)
            if not isinstance(side.op, ast.Mult) or first is None or second is None:
                return None
            if first.log == second.log:
                return None
            parts.append((second, first) if first.log else (first, second))
            products.append(side)
        (p, log_a), (other, log_b) = parts
        if not p.same(other) or log_a.same(log_b) or not (p.same(log_a) or p.same(log_b)):
            return None
        self.used.update(products)
        hints = ["by hand", *notes]
        return (log_b, p, False, hints) if p.same(log_a) else (log_a, p, True, hints)

    def _filled(self, node: ast.expr) -> ast.expr | None:
        """x of x.masked_fill(isinf(...), 0)."""
        if not isinstance(node, ast.Call) or "isinf(" not in ast.unparse(self._mask_of(node)):
            return None
        if self.names.function(node.func) == "masked_fill":
            return node.args[0] if node.args else None
        named = isinstance(node.func, ast.Attribute) and node.func.attr == "masked_fill"
        return node.func.value if named else None  # type: ignore[attr-defined]

    def _mask_of(self, node: ast.Call) -> ast.expr:
        at = int(self.names.function(node.func) == "masked_fill")
        given = node.args[at] if len(node.args) > at else node
        return self.names.follow(given, node) or given

    def _difference(self, read: Softmaxes, node: ast.expr) -> tuple[Softmax, Softmax] | None:
        """(log a, log b) of log a - log b or log(a / b)."""
        if written(node):
            node = self.names.follow(node, read.site) or node
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
            logs = read.read(node.left), read.read(node.right)
            if logs[0] and logs[1] and logs[0].log and logs[1].log:
                return logs[0], logs[1]
        if isinstance(node, ast.Call):
            inner = None
            if self.names.function(node.func) == "log":
                inner = node.args[0] if node.args else None
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "log":
                inner = node.func.value
            if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Div):
                parts = read.read(inner.left), read.read(inner.right)
                if parts[0] and parts[1] and not (parts[0].log or parts[1].log):
                    return parts[0], parts[1]
        return None
