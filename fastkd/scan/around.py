"""What stands around a loss per row: sums, means, masks, and the names that it is given."""

from __future__ import annotations

import ast
from typing import NamedTuple

from fastkd.scan.names import Names, arguments, start, written
from fastkd.scan.products import INFINITE
from fastkd.scan.softmax import atom, constant

FLAT = {"view", "reshape", "flatten"}
FILLS = ("masked_fill", "masked_fill_")
CAST = {"int", "long", "float", "double", "bool", "to", "type_as", "type", "byte", "half"}


class Around(NamedTuple):
    """The expression around numbers per column, and what it makes of them."""

    node: ast.expr
    # rows, row means, sum, mean, row mean; with rows left out: masked (columns), kept rows, kept
    # sum, kept mean; of rows times a mask: weighted, of rows that were chosen: kept
    form: str = "columns"
    negative: bool = False
    mask: str = ""  # the options that leave rows out
    of: ast.expr | None = None  # the mask's expression
    notes: tuple[str, ...] = ()
    flat: bool = False

    @property
    def masked(self) -> bool:
        return self.form in ("kept rows", "kept sum", "kept mean")


class Walk:
    """Goes up from an expression of numbers per column, as far as its meaning is known."""

    def __init__(self, names: Names, dim: object, inside: bool = False) -> None:
        self.names, self.dim, self.inside = names, dim, inside
        self.of: ast.expr | None = None  # what the last mask was read from

    def begun(self, node: ast.expr, by: ast.expr) -> Around | None:
        """Columns that a mask is a factor of."""
        mask = self._mask(by, False, column=True)
        return Around(node, "masked", mask=mask, of=self.of) if mask else None

    def up(self, node: ast.expr, by: ast.expr | None = None) -> Around:
        """by: a mask within the node."""
        last = Around(node)  # the last that can be written
        at = last if by is None else self.begun(node, by) or last
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
        if isinstance(parent, ast.Subscript) and isinstance(parent.ctx, ast.Store):
            return self._assigned(at, parent)
        if isinstance(parent, ast.Subscript) and parent.value is node and at.form == "rows":
            mask = self._mask(parent.slice, at.flat, chosen=True)
            return at._replace(node=parent, form="kept", mask=mask, of=self.of) if mask else None
        if isinstance(parent, ast.Assign) and not self.inside:
            return self.named(at, parent)
        call, name, given = self._call(node, parent)
        if call is None or given is None:
            return None
        if name in FILLS:
            by, value = given.get("mask"), given.get("value")
            if by is None or constant(value) != 0:
                return None
            if "isinf(" in ast.unparse(self._value(by)):
                infinite = at.form == "columns" and name == "masked_fill"
                return at._replace(node=call, notes=(*at.notes, INFINITE)) if infinite else None
            filled = self._filled(at, call, by, at.form == "columns")
            if filled is None or not isinstance(self.names.parents.get(call), ast.Expr):
                return filled  # in place, and used at once
            return self._after(filled, node, call)
        if name in FLAT:
            shape = [constant(x) for x in given.values()]
            whole = shape == [-1] or (name == "flatten" and not shape)
            return at._replace(node=call, flat=True) if whole and "row" in at.form else None
        return self._sum(at, call, name, given)

    def _call(
        self, node: ast.expr, parent: ast.AST | None
    ) -> tuple[ast.Call | None, str, dict[str, ast.expr] | None]:
        """(call, name, arguments) of x.name(...) or torch.name(x, ...)."""
        order = dict.fromkeys(FILLS, ("mask", "value"))
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
            whole["weighted"] = whole["masked"] = whole["kept rows"] = {"sum": "kept sum"}
            form = whole.get(at.form, {}).get(name)
            return at._replace(node=call, form=form) if form else None
        dims = (self.dim, [self.dim], (self.dim,))
        if at.form == "masked" and name == "sum" and len(given) == 1 and constant(axis) in dims:
            return at._replace(node=call, form="kept rows")
        if at.form == "columns" and len(given) == 1 and constant(axis) in dims:
            return at._replace(node=call, form={"sum": "rows", "mean": "row means"}[name])
        return None

    def _operator(self, at: Around, parent: ast.BinOp) -> Around | None:
        """Rows or columns times a mask, and their sum divided by the mask's."""
        if isinstance(parent.op, ast.Mult) and at.form in ("rows", "columns"):
            other = parent.right if parent.left is at.node else parent.left
            mask = self._mask(other, at.flat, column=at.form == "columns")
            form = "weighted" if at.form == "rows" else "masked"
            return at._replace(node=parent, form=form, mask=mask, of=self.of) if mask else None
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
            if inner is not None and self._mask(inner, at.flat, column=None) == at.mask:
                return at._replace(node=parent, form="kept mean")
        return None

    def named(self, at: Around, parent: ast.Assign) -> Around | None:
        """The one use of a name that is set to the loss."""
        target = parent.targets[0]
        if len(parent.targets) > 1 or not isinstance(target, ast.Name):
            return None
        return self._after(at, target, parent)

    def _after(self, at: Around, target: ast.expr, binding: ast.AST) -> Around | None:
        """The one use of a name after what has set or changed it."""
        if not isinstance(target, ast.Name) or self.inside:
            return None
        scope = self.names.scope(binding)
        uses = [
            x
            for x in ast.walk(scope)
            if isinstance(x, ast.Name) and x.id == target.id and isinstance(x.ctx, ast.Load)
        ]
        bound = self.names.bound.get((scope, target.id), [])
        reached = [(x, self.names.reaching(x, bound)) for x in uses]
        if any(y is None for _, y in reached):
            return None  # a branch or a loop
        used = [x for x, y in reached if y is not None and y.node is binding]
        if len(used) != 1:
            return None
        note = f"leave out line {start(binding)[0]}"
        return at._replace(node=used[0], notes=(*at.notes, note))

    # ---- masks

    def _assigned(self, at: Around, parent: ast.Subscript) -> Around | None:
        """What loss[mask] = 0 leaves of a loss."""
        line = self.names.parents.get(parent)
        if not isinstance(line, ast.Assign) or line.targets != [parent]:
            return None
        if constant(line.value) != 0:
            return None
        filled = self._filled(at, at.node, parent.slice, False)
        return None if filled is None else self._after(filled, at.node, line)

    def _filled(
        self, at: Around, node: ast.expr, by: ast.expr, column: bool | None
    ) -> Around | None:
        """A loss that is 0 where a mask is true."""
        if at.form not in ("columns", "rows"):
            return None
        mask = self._mask(by, at.flat, filled=True, column=column)
        form = "masked" if at.form == "columns" else "kept rows"
        return at._replace(node=node, form=form, mask=mask, of=self.of) if mask else None

    def _value(self, node: ast.expr) -> ast.expr:
        value = self.names.follow(node, node)
        return self._value(value) if value is not None else node

    def _risen(self, node: ast.expr) -> ast.expr | None:
        """x of x.unsqueeze(-1) and x[..., None], with the axis of the classes."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            axis = arguments(node, "dim") or {}
            if node.func.attr == "unsqueeze" and constant(axis.get("dim")) == self.dim:
                return node.func.value
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and self.dim == -1:
            *front, last = [ast.unparse(x) for x in node.slice.elts]
            if last == "None" and (front == ["..."] or set(front) == {":"}):
                return node.value
        return None

    def _mask(
        self, node: ast.expr, flat: bool, chosen: bool = False, filled: bool = False,
        column: bool | None = False,
    ) -> str:  # fmt: skip
        """The options for a mask of rows, "" where it cannot be read.

        chosen: it may be an index. filled: it is true where a row is left out. column: whether it
        has the classes' axis, of size 1 (None: it may).
        """
        seen, text, value, risen = not flat, node, node, False
        named: tuple[ast.expr, bool] | None = None  # a name of an inverted mask
        for _ in range(12):
            if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Invert):
                if written(text):
                    named = text, filled
                filled, text, value = not filled, value.operand, value.operand
                continue
            if (inner := self._risen(value)) is not None:
                risen, text, value = True, inner, inner
                continue
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
        if column is not None and column != risen:
            return ""
        compared = isinstance(value, ast.Compare) and len(value.ops) == 1
        equal = ast.Eq if filled else ast.NotEq
        if isinstance(value, ast.Compare) and compared and isinstance(value.ops[0], equal):
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
        if named is not None and not (written(text) and "mask" in ast.unparse(text)):
            text, filled = named
        if not seen or not (written(text) and "mask" in ast.unparse(text)):
            return ""  # a factor, perhaps
        if filled:
            return f", weight=({ast.unparse(text)} == 0).float()"
        return f", weight={atom(ast.unparse(text))}.float()"
