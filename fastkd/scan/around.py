"""What stands around a loss per row: sums, means, masks, and the names that it is given."""

from __future__ import annotations

import ast
from typing import NamedTuple

from fastkd.scan.names import Names, arguments, start, written
from fastkd.scan.products import INFINITE
from fastkd.scan.softmax import atom, constant

FLAT = {"view", "reshape", "flatten"}
CAST = {"int", "long", "float", "double", "bool", "to", "type_as", "type", "byte", "half"}


class Around(NamedTuple):
    """The expression around numbers per column, and what it makes of them."""

    node: ast.expr
    form: str = "columns"  # rows, row means, sum, mean, row mean, kept sum, kept mean
    negative: bool = False
    mask: str = ""  # the options that leave rows out
    of: ast.expr | None = None  # the mask's expression
    notes: tuple[str, ...] = ()
    flat: bool = False

    @property
    def masked(self) -> bool:
        return self.form in ("kept sum", "kept mean")


class Walk:
    """Goes up from an expression of numbers per column, as far as its meaning is known."""

    def __init__(self, names: Names, dim: object, inside: bool = False) -> None:
        self.names, self.dim, self.inside = names, dim, inside
        self.of: ast.expr | None = None  # what the last mask was read from

    def up(self, node: ast.expr) -> Around:
        at = Around(node)
        last = at  # the last that can be written
        while (after := self._step(at)) is not None:
            named, at = isinstance(after.node, ast.Name), after
            meant = at.of is None or (at.masked and self.names.same(at.of, at.node))
            if not named and meant:
                last = at
        return last

    def _step(self, at: Around) -> Around | None:
        node, parent = at.node, self.names.parents.get(at.node)
        if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.USub):
            return at._replace(node=parent, negative=not at.negative)
        if isinstance(parent, ast.BinOp):
            return self._operator(at, parent)
        if isinstance(parent, ast.Subscript) and parent.value is node and at.form == "rows":
            mask = self._mask(parent.slice, at.flat, chosen=True)
            return at._replace(node=parent, form="kept", mask=mask, of=self.of) if mask else None
        if isinstance(parent, ast.Assign) and not self.inside:
            return self.named(at, parent)
        call, name, given = self._call(node, parent)
        if call is None or given is None:
            return None
        if name == "masked_fill":
            by, value = given.get("mask"), given.get("value")
            infinite = by is not None and "isinf(" in ast.unparse(self._value(by))
            if at.form == "columns" and infinite and constant(value) == 0:
                return at._replace(node=call, notes=(*at.notes, INFINITE))
            return None
        if name in FLAT:
            shape = [constant(x) for x in given.values()]
            whole = shape == [-1] or (name == "flatten" and not shape)
            return at._replace(node=call, flat=True) if whole and "row" in at.form else None
        return self._sum(at, call, name, given)

    def _call(
        self, node: ast.expr, parent: ast.AST | None
    ) -> tuple[ast.Call | None, str, dict[str, ast.expr] | None]:
        """(call, name, arguments) of x.name(...) or torch.name(x, ...)."""
        order = {"masked_fill": ("mask", "value")}
        if isinstance(parent, ast.Attribute):
            call, name = self.names.parents.get(parent), parent.attr
            if isinstance(call, ast.Call) and call.func is parent:
                return call, name, arguments(call, *order.get(name, ("dim", "keepdim")))
        elif isinstance(parent, ast.Call) and parent.args[:1] == [node]:
            name = self.names.function(parent.func) or ""
            given = arguments(parent, "input", *order.get(name, ("dim", "keepdim")))
            return parent, name, given and {k: v for k, v in given.items() if k != "input"}
        return None, "", None

    def _sum(
        self, at: Around, call: ast.Call, name: str, given: dict[str, ast.expr]
    ) -> Around | None:
        if name not in ("sum", "mean"):
            return None
        axis = given.get("dim", given.get("axis"))
        if (at.flat or at.form == "kept") and len(given) == 1 and constant(axis) in (0, -1):
            given, axis = {}, None  # of one axis
        if axis is None and not given:
            whole = {"columns": {"sum": "sum", "mean": "mean"}}
            whole["rows"] = {"sum": "sum", "mean": "row mean"}
            whole["kept"] = {"sum": "kept sum", "mean": "kept mean"}
            whole["weighted"] = {"sum": "kept sum"}
            form = whole.get(at.form, {}).get(name)
            return at._replace(node=call, form=form) if form else None
        dims = (self.dim, [self.dim], (self.dim,))
        if at.form == "columns" and len(given) == 1 and constant(axis) in dims:
            return at._replace(node=call, form={"sum": "rows", "mean": "row means"}[name])
        return None

    def _operator(self, at: Around, parent: ast.BinOp) -> Around | None:
        """Rows times a mask, and their sum divided by the mask's."""
        if isinstance(parent.op, ast.Mult) and at.form == "rows":
            other = parent.right if parent.left is at.node else parent.left
            mask = self._mask(other, at.flat)
            return (
                at._replace(node=parent, form="weighted", mask=mask, of=self.of) if mask else None
            )
        if isinstance(parent.op, ast.Div) and at.form == "kept sum" and parent.left is at.node:
            total, least = self._value(parent.right), None
            if isinstance(total, ast.Call) and isinstance(total.func, ast.Attribute):
                if total.func.attr in ("clamp", "clamp_min") and "labels=" in at.mask:
                    least = total.func.value  # 0 where no row is kept, in both
            total = least or total
            inner = None
            if isinstance(total, ast.Call) and self.names.function(total.func) == "sum":
                inner = total.args[0] if total.args else None
            elif isinstance(total, ast.Call) and isinstance(total.func, ast.Attribute):
                inner = total.func.value if total.func.attr == "sum" else None
            if inner is not None and self._mask(inner, at.flat) == at.mask:
                return at._replace(node=parent, form="kept mean")
        return None

    def named(self, at: Around, parent: ast.Assign) -> Around | None:
        """The one use of a name that is set to the loss."""
        target = parent.targets[0]
        if len(parent.targets) > 1 or not isinstance(target, ast.Name):
            return None
        scope = self.names.scope(parent)
        uses = [
            x
            for x in ast.walk(scope)
            if isinstance(x, ast.Name) and x.id == target.id and isinstance(x.ctx, ast.Load)
        ]
        bound = self.names.bound.get((scope, target.id), [])
        reached = [(x, self.names.reaching(x, bound)) for x in uses]
        if any(y is None for _, y in reached):
            return None  # a branch or a loop
        used = [x for x, y in reached if y is not None and y.value is parent.value]
        if len(used) != 1:
            return None
        note = f"leave out line {start(parent)[0]}"
        return at._replace(node=used[0], notes=(*at.notes, note))

    # ---- masks

    def _value(self, node: ast.expr) -> ast.expr:
        value = self.names.follow(node, node)
        return self._value(value) if value is not None else node

    def _mask(self, node: ast.expr, flat: bool, chosen: bool = False) -> str:
        """The options for a mask of rows, "" where it cannot be read."""
        seen, text, value = not flat, node, node
        for _ in range(12):
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
                if value.func.attr in FLAT and flat:
                    seen = True
                elif value.func.attr not in CAST:
                    break
                value = value.func.value
                text = value if written(value) else text
                continue
            after = self.names.follow(value, node)
            if after is None:
                break
            value = after
        self.of = value
        compared = isinstance(value, ast.Compare) and len(value.ops) == 1
        if isinstance(value, ast.Compare) and compared and isinstance(value.ops[0], ast.NotEq):
            labels, index = value.left, value.comparators[0]
            if isinstance(labels, ast.Call) and isinstance(labels.func, ast.Attribute):
                if labels.func.attr in FLAT and flat:
                    labels, seen = labels.func.value, True
            at = ast.unparse(index)
            if not seen or not (written(labels) or isinstance(labels, ast.Subscript)):
                return ""
            return f", labels={ast.unparse(labels)}" + (
                f", ignore_index={at}" if at != "-100" else ""
            )
        if chosen and not compared:
            return ""  # an index
        if not seen or not (written(text) and "mask" in ast.unparse(text)):
            return ""  # a factor, perhaps
        return f", weight={atom(ast.unparse(text))}.float()"
