"""What the names of a Python source stand for, read from its syntax tree.

A name is followed to the one assignment that reaches it on every way through the code, and only
where everything in the assigned expression is still the same at the place that it is wanted for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import chain, count
from typing import NamedTuple

FUNCTIONAL = "torch.nn.functional"
# names under which torch offers the same functions and modules
KNOWN = {
    **{f"{FUNCTIONAL}.{x}": x for x in ("kl_div", "cross_entropy", "log_softmax", "softmax")},
    **{
        f"torch.{x}": x
        for x in ("log_softmax", "softmax", "log", "exp", "div", "sum", "mean", "masked_fill")
    },
    **{f"torch.special.{x}": x for x in ("log_softmax", "softmax")},
    "torch.true_divide": "div",
    "torch.divide": "div",
}
MODULES = {"KLDivLoss": "loss", "CrossEntropyLoss": "loss", "LogSoftmax": "", "Softmax": ""}
for _name, _file in MODULES.items():
    for _home in ("torch.nn", "torch.nn.modules", f"torch.nn.modules.{_file or 'activation'}"):
        KNOWN[f"{_home}.{_name}"] = _name
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
MOVED = {"to", "cuda", "cpu", "float", "double", "eval", "train"}  # modules that stay the same
Place = tuple[int, int]


class Binding(NamedTuple):
    """A name gets a value: from where on, in which block, and the value where it can be read."""

    end: Place
    node: ast.AST
    value: ast.expr | None


def written(node: ast.AST) -> str | None:
    """A name or a chain of attributes as it is written."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        of = written(node.value)
        return None if of is None else f"{of}.{node.attr}"
    return None


def start(node: ast.AST) -> Place:
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def arguments(call: ast.Call, *names: str) -> dict[str, ast.expr] | None:
    """The arguments of a call by name, None where * or ** hide them."""
    if any(isinstance(x, ast.Starred) for x in call.args) or any(not x.arg for x in call.keywords):
        return None
    given = dict(zip(names, call.args, strict=False))
    return {**given, **{x.arg: x.value for x in call.keywords if x.arg}}


class Names:
    """One source's imports, scopes and assignments."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.aliases: dict[str, str] = {}
        self.parents: dict[ast.AST, ast.AST] = {}
        self.bound: dict[tuple[ast.AST, str], list[Binding]] = {}
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        for node in ast.walk(tree):
            self._import(node)
            self._read(node)

    # ---- what is bound

    def _import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name.partition(".")[0]
                self.aliases[alias.asname or head] = alias.name if alias.asname else head
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if alias.name != "*":
                    self.aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    continue
                for known in KNOWN:
                    home, _, name = known.rpartition(".")
                    if home == node.module:
                        self.aliases.setdefault(name, known)

    def _read(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value, node)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            if node.value is not None:
                self._bind(node.target, node.value, node)
        elif isinstance(node, ast.AugAssign):  # s /= T is s = s / T
            division = ast.BinOp(node.target, node.op, node.value)
            self._bind(node.target, ast.copy_location(division, node), node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name.endswith("_") and not name.endswith("__"):  # s.div_(T) is s = s.div(T)
                method = ast.Attribute(node.func.value, name[:-1], ast.Load())
                value = ast.Call(ast.copy_location(method, node), node.args, node.keywords)
                self._bind(node.func.value, ast.copy_location(value, node), node)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._bind(node.target, None, node)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._bind(node.optional_vars, None, node.optional_vars)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                self._bind(target, None, node)
        elif isinstance(node, ast.arg):
            self._add(self.scope(node), node.arg, node, None)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            for name in node.names:
                self._add(self.scope(node), name, node, None)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self._add(self.scope(node), node.name, node, None)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            self._add(self.scope(node), node.name, node, None)

    def _bind(self, target: ast.expr, value: ast.expr | None, node: ast.AST) -> None:
        if isinstance(target, ast.Starred):
            self._bind(target.value, None, node)
        elif isinstance(target, ast.Subscript):
            self._bind(target.value, None, node)
        elif isinstance(target, (ast.Tuple, ast.List)):
            values: list[ast.expr | None] = [None] * len(target.elts)
            if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(values):
                if not any(isinstance(x, ast.Starred) for x in (*value.elts, *target.elts)):
                    values = [*value.elts]
            for part, one in zip(target.elts, values, strict=True):
                self._bind(part, one, node)
        elif name := written(target):
            self._add(self.scope(node), name, node, value)
            home = self._class(node)
            if name.startswith("self.") and home is not None:
                self._add(home, name, node, value)

    def _add(self, scope: ast.AST, name: str, node: ast.AST, value: ast.expr | None) -> None:
        end = getattr(node, "end_lineno", 0), getattr(node, "end_col_offset", 0)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, *LOOPS, ast.arg, ast.ExceptHandler)):
            end = start(node)  # in force within it
        self.bound.setdefault((scope, name), []).append(Binding(end, node, value))

    # ---- where a node stands

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node

    def scopes(self, node: ast.AST) -> list[ast.AST]:
        """The scopes around a node, inmost first; a class only for what stands in its body."""
        found: list[ast.AST] = []
        for x in self.above(node):
            if isinstance(x, (*FUNCTIONS, *COMPREHENSIONS, ast.Module)):
                found.append(x)
            elif isinstance(x, ast.ClassDef) and not found:
                found.append(x)
        return found or [self.tree]

    def scope(self, node: ast.AST) -> ast.AST:
        walrus = isinstance(node, ast.NamedExpr)
        around = self.scopes(node)
        return next(x for x in around if not (walrus and isinstance(x, COMPREHENSIONS)))

    def _class(self, node: ast.AST) -> ast.AST | None:
        return next((x for x in self.above(node) if isinstance(x, ast.ClassDef)), None)

    def placed(self, text: str, site: ast.expr) -> ast.expr:
        """An expression's text as a node whose names are those of a place."""
        node = ast.parse(text, mode="eval").body
        for x in ast.walk(node):
            ast.copy_location(x, site)
            for child in ast.iter_child_nodes(x):
                self.parents[child] = x
        self.parents[node] = site
        return node

    def _loops(self, node: ast.AST) -> set[ast.AST]:
        return {x for x in (node, *self.above(node)) if isinstance(x, LOOPS)}

    def _blocks(self, node: ast.AST) -> list[tuple[ast.AST, str]]:
        """The lists of statements around a node, inmost first; `with` is none of its own."""
        found: list[tuple[ast.AST, str]] = []
        if isinstance(node, LOOPS):
            found.append((node, "body"))  # a loop's target is set where its body runs
        for parent in self.above(node):
            if isinstance(node, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                for field, value in ast.iter_fields(parent):
                    if isinstance(value, list) and any(x is node for x in value):
                        if not isinstance(parent, (ast.With, ast.AsyncWith)):
                            found.append((parent, field))
            elif isinstance(parent, (ast.BoolOp, ast.IfExp)):
                found.append((parent, "maybe"))
            elif isinstance(parent, (*FUNCTIONS, *COMPREHENSIONS)):
                found.append((parent, "body"))
            node = parent
        return found

    def without_grad(self, node: ast.AST, site: ast.AST) -> bool:
        """Whether a node stands under no_grad and the site does not."""
        around = {x for x in self.above(node) if isinstance(x, (ast.With, ast.AsyncWith))}
        names = [
            ast.unparse(item.context_expr) for x in around - {*self.above(site)} for item in x.items
        ]
        return any("no_grad" in x or "inference_mode" in x for x in names)

    # ---- what a name is

    def function(self, node: ast.expr, depth: int = 4) -> str | None:
        """The torch function or module class that an expression names."""
        dotted = written(node)
        if dotted is None or depth == 0:
            return None
        head, _, rest = dotted.partition(".")
        if any((scope, head) in self.bound for scope in self.scopes(node)):
            value = self.follow(node, node)
            return None if value is None else self.function(value, depth - 1)
        if head not in self.aliases:
            return None
        return KNOWN.get(self.aliases[head] + (f".{rest}" if rest else ""))

    def module(self, node: ast.expr, depth: int = 4) -> ast.Call | None:
        """The call that made the torch module that an expression is."""
        if depth == 0:
            return None
        if isinstance(node, ast.Call) and self.function(node.func) in MODULES:
            return node
        if isinstance(node, ast.Call):  # nn.KLDivLoss().cuda()
            moved = isinstance(node.func, ast.Attribute) and node.func.attr in MOVED
            return self.module(node.func.value, depth - 1) if moved else None  # type: ignore[attr-defined]
        name, value = written(node), self.follow(node, node)
        if value is None or any(x.startswith(f"{name}.") for _, x in self.bound):
            return None  # its options may have been changed
        return self.module(value, depth - 1)

    def unused(self, name: str) -> str:
        """The name, or the name with a number, so that the source has no other of it."""
        used = {x.id for x in ast.walk(self.tree) if isinstance(x, ast.Name)}
        used |= {x.arg for x in ast.walk(self.tree) if isinstance(x, ast.arg)}
        made = chain([name], (f"{name}_{i}" for i in count(2)))
        return next(x for x in made if x not in used)

    def imported(self, node: ast.expr) -> bool:
        name = written(node)
        return name is not None and name.partition(".")[0] in self.aliases

    def follow(self, node: ast.expr, site: ast.AST) -> ast.expr | None:
        """What a name was set to, if that can be written at the site and is the same there."""
        name = written(node)
        if name is None:
            return None
        direct = True
        for scope in self.scopes(node):
            if (scope, name) in self.bound:
                bindings = self.bound[scope, name]
                found = self.reaching(node, bindings) if direct else None
                if found is not None:
                    value = found.value
                    return value if value is not None and self._stays(found, site) else None
                own = [x for x in bindings if x.end <= start(node)] if direct else []
                if own or "." not in name:
                    return None if direct else self._same(bindings)
            direct = direct and isinstance(scope, COMPREHENSIONS)
        home = self._class(node)
        if home is None or not name.startswith("self."):
            return None
        values = [*self.bound.get((home, name), []), *self.bound.get((home, name[5:]), [])]
        return self._same(values)

    def _same(self, bindings: list[Binding]) -> ast.expr | None:
        """What is set elsewhere, read only where it is one module or function, always the same."""
        values = [x.value for x in bindings]
        if not values or any(x is None for x in values):
            return None
        first = values[0]
        if len({ast.dump(x) for x in values if x is not None}) > 1:
            return None
        if first is None or not (isinstance(first, ast.Call) or self.imported(first)):
            return None
        return first if not isinstance(first, ast.Call) or self.module(first) else None

    def reaching(self, node: ast.expr, bindings: list[Binding]) -> Binding | None:
        before = [x for x in bindings if x.end <= start(node)]
        if not before:
            return None
        last = max(before, key=lambda x: x.end)
        block = next(iter(self._blocks(last.node)), None)
        if isinstance(last.node, ast.arg):
            return last
        if block is not None and block not in self._blocks(node):
            return None
        around = self._loops(node) - self._loops(last.node)
        if any(around & self._loops(x.node) for x in bindings):
            return None  # a later round meets another value
        return last

    def same(self, value: ast.expr, site: ast.AST) -> bool:
        """Whether an expression can be written at a later place and means the same there."""
        return self._stays(Binding(start(value), value, value), site)

    def _stays(self, binding: Binding, site: ast.AST) -> bool:
        """Whether all names of a binding's value are the same at the site."""
        assert binding.value is not None
        since, until = start(binding.value), start(site)
        around = self._loops(site) - self._loops(binding.node)
        for node in ast.walk(binding.value):
            name = written(node)
            if name is None:
                continue
            for scope in self.scopes(site):
                for other in self.bound.get((scope, name), []):
                    if since < other.end <= until or around & self._loops(other.node):
                        return False
                if (scope, name) in self.bound:
                    break
        return True
