"""Finds the distillation losses of Python sources and says what to write in their place.

Reads the syntax tree and runs nothing. A name is followed to its last assignment above the call in
the same function or module; what cannot be followed is shown as it stands.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FUNCTIONAL = "torch.nn.functional"
# names under which torch offers the same functions
KNOWN = {
    **{f"{FUNCTIONAL}.{name}": name for name in ("kl_div", "cross_entropy", "log_softmax")},
    f"{FUNCTIONAL}.softmax": "softmax",
    "torch.log_softmax": "log_softmax",
    "torch.softmax": "softmax",
    "torch.special.log_softmax": "log_softmax",
    "torch.special.softmax": "softmax",
    "torch.nn.KLDivLoss": "KLDivLoss",
    "torch.nn.LogSoftmax": "LogSoftmax",
    "torch.nn.Softmax": "Softmax",
}
METHODS = {"log_softmax", "softmax"}  # of tensors
TEACHERS = {"teacher", "teachers", "tea", "t", "ref", "target", "targets"}  # words of a name
REDUCTIONS = ("mean", "batchmean", "sum", "none")


class Found(NamedTuple):
    """One loss: where, what stands there, what to write, and what to mind."""

    file: str
    line: int
    code: str
    replacement: str | None
    note: str


class Softmax(NamedTuple):
    """(log) softmax(logits / temperature)."""

    logits: str
    temperature: str
    log: bool


def scan(path: Path) -> Iterator[Found]:
    """The losses of a file, or of all .py files of a folder, in order.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"path: got {path}, expected a Python file or a folder")
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    for file in files:
        try:
            text = file.read_text("utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            yield Found(str(file), getattr(error, "lineno", 0) or 0, "", None, f"not read: {error}")
            continue
        yield from Source(str(file), tree).losses()


class Source:
    """One file's names and scopes."""

    def __init__(self, file: str, tree: ast.Module) -> None:
        self.file, self.tree = file, tree
        self.aliases: dict[str, str] = {}
        self.parents: dict[ast.AST, ast.AST] = {}
        self.assigned: dict[tuple[ast.AST, str], list[tuple[int, ast.expr]]] = {}
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    head = alias.name.partition(".")[0]
                    self.aliases[alias.asname or head] = alias.name if alias.asname else head
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self.aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                name = self._written(node.targets[0])
                if name:
                    scope = self._class(node) if name.startswith("self.") else self._scope(node)
                    self.assigned.setdefault((scope, name), []).append((node.lineno, node.value))

    def losses(self) -> Iterator[Found]:
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, (ast.Call, ast.BinOp))]
        for node in sorted(nodes, key=lambda x: (x.lineno, x.col_offset)):
            if isinstance(node, ast.Call):
                found = self._call(node)
            else:
                found = self._product(node)
            if found is not None:
                yield found

    # ---- the three kinds

    def _call(self, node: ast.Call) -> Found | None:
        name, given = self._function(node.func), dict[str, ast.expr]()
        if name == "KLDivLoss":  # called where it is made; else found at its call
            return None
        if name is None and (made := self._follow(node.func)) is not None:
            if isinstance(made, ast.Call) and self._function(made.func) == "KLDivLoss":
                name = "kl_div"
                given = {x.arg: x.value for x in made.keywords if x.arg}
        if isinstance(node.func, ast.Call) and self._function(node.func.func) == "KLDivLoss":
            name, given = "kl_div", {x.arg: x.value for x in node.func.keywords if x.arg}
        if name not in ("kl_div", "cross_entropy"):
            return None
        keywords = {**given, **{x.arg: x.value for x in node.keywords if x.arg}}
        sides = [*node.args[:2]]
        for side in ("input", "target")[len(sides) :]:
            if side in keywords:
                sides.append(keywords[side])
        if len(sides) != 2:
            return None
        return self._kl(node, sides, keywords) if name == "kl_div" else self._soft(node, sides)

    def _kl(self, node: ast.Call, sides: list[ast.expr], options: dict[str, ast.expr]) -> Found:
        first, second = self._softmax(sides[0]), self._softmax(sides[1])
        reduction = self._constant(options.get("reduction"), "mean")
        log_target = self._constant(options.get("log_target"), False)
        if first is None or second is None or not first.log:
            what = "its arguments could not be followed to softmaxes of logits"
            return self._found(node, None, f"{what}: give fastkd.kl_div the logits themselves")
        notes = []
        if second.log != bool(log_target):
            notes.append("log_target does not fit the target: this line has a fault")
        return self._replaced(node, first, second, str(reduction), notes)

    def _soft(self, node: ast.Call, sides: list[ast.expr]) -> Found | None:
        target = self._softmax(sides[1])
        if target is None or target.log:
            return None
        logits, temperature = self._divided(sides[0])
        keywords = {x.arg: x.value for x in node.keywords if x.arg}
        reduction = str(self._constant(keywords.get("reduction"), "mean"))
        student = Softmax(logits, temperature, True)
        note = "a cross-entropy: larger by the teacher's entropy, the gradient is the same"
        row_mean = {"mean": "batchmean"}.get(reduction, reduction)
        return self._replaced(node, student, target, row_mean, [note])

    def _product(self, node: ast.BinOp) -> Found | None:
        """softmax(t) * log_softmax(s), the core of a hand-written soft cross-entropy."""
        if not isinstance(node.op, ast.Mult):
            return None
        sides = [self._softmax(x) for x in (node.left, node.right)]
        if sides[0] is None or sides[1] is None or sides[0].log == sides[1].log:
            return None
        student, teacher = sides if sides[0].log else sides[::-1]
        assert student is not None and teacher is not None
        if student.logits == teacher.logits:
            return None  # an entropy
        note = "a cross-entropy by hand: larger by the teacher's entropy, the gradient is the same"
        return self._replaced(node, student, teacher, "mean", [note, "check its reduction"])

    def _replaced(
        self, node: ast.expr, student: Softmax, teacher: Softmax, reduction: str, notes: list[str]
    ) -> Found:
        function = "kl_div"
        if self._says_teacher(student.logits) and not self._says_teacher(teacher.logits):
            function, student, teacher = "reverse_kl_div", teacher, student
            notes.append("KL(student || teacher), since the first argument is the teacher's")
        if student.temperature != teacher.temperature:
            notes.append(
                f"two temperatures ({student.temperature} and {teacher.temperature}): fastkd has "
                "one; divide the teacher's logits by their quotient"
            )
        options = "" if student.temperature == "1" else f", temperature={student.temperature}"
        by = ""
        if reduction == "mean" and not notes:
            notes.append("'mean' of F.kl_div divides by rows times columns")
            by, reduction = f" / {student.logits}.numel()", "sum"
        if reduction == "none":
            notes.append("fastkd's 'none' is one number per row, not per column")
        if reduction not in REDUCTIONS:
            notes.append(f"its reduction could not be read ({reduction})")
        elif reduction != "mean":
            options += f', reduction="{reduction}"'
        call = f"fastkd.{function}({student.logits}, {teacher.logits}{options}){by}"
        return self._found(node, call, "; ".join(notes))

    # ---- what an expression is

    def _softmax(self, node: ast.expr, depth: int = 8) -> Softmax | None:
        if depth == 0:
            return None
        if isinstance(node, ast.Call):
            name = self._function(node.func)
            if isinstance(node.func, ast.Call):
                made = {"LogSoftmax": "log_softmax", "Softmax": "softmax"}
                name = made.get(self._function(node.func.func) or "", None)
            method = isinstance(node.func, ast.Attribute) and node.func.attr
            if name in ("log_softmax", "softmax") and node.args:
                return Softmax(*self._divided(node.args[0]), name == "log_softmax")
            if method in METHODS and isinstance(node.func, ast.Attribute) and name is None:
                return Softmax(*self._divided(node.func.value), method == "log_softmax")
            if method in ("detach", "float", "to", "clone", "log") and isinstance(
                node.func, ast.Attribute
            ):
                inner = self._softmax(node.func.value, depth - 1)
                return inner and inner._replace(log=inner.log or method == "log")
        followed = self._follow(node)
        return None if followed is None else self._softmax(followed, depth - 1)

    def _divided(self, node: ast.expr) -> tuple[str, str]:
        """(logits, temperature) of an expression."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return ast.unparse(node.left), ast.unparse(node.right)
        followed = self._follow(node)
        if isinstance(followed, ast.BinOp) and isinstance(followed.op, ast.Div):
            return ast.unparse(followed.left), ast.unparse(followed.right)
        return ast.unparse(node), "1"

    def _function(self, node: ast.expr) -> str | None:
        """The torch function that an expression names."""
        dotted = self._written(node)
        if dotted is None:
            return None
        head, _, rest = dotted.partition(".")
        if head not in self.aliases:
            return None
        return KNOWN.get(self.aliases[head] + (f".{rest}" if rest else ""))

    def _follow(self, node: ast.expr) -> ast.expr | None:
        """What was last assigned to a name above it."""
        name = self._written(node)
        if name is None:
            return None
        scopes = [self._class(node)] if name.startswith("self.") else self._scopes(node)
        for scope in scopes:
            above = [
                value
                for line, value in self.assigned.get((scope, name), [])
                if line < node.lineno or name.startswith("self.")
            ]
            if above:
                return above[-1]
        return None

    @staticmethod
    def _written(node: ast.expr) -> str | None:
        """A name or a chain of attributes as it is written."""
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            of = Source._written(node.value)
            return None if of is None else f"{of}.{node.attr}"
        return None

    def _scopes(self, node: ast.AST) -> list[ast.AST]:
        """The functions around a node, inmost first, and the module."""
        scopes: list[ast.AST] = []
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Module)):
                scopes.append(node)
        return scopes or [self.tree]

    def _scope(self, node: ast.AST) -> ast.AST:
        return self._scopes(node)[0]

    def _class(self, node: ast.AST) -> ast.AST:
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.ClassDef):
                return node
        return self.tree

    @staticmethod
    def _constant(node: ast.expr | None, default: object) -> object:
        if node is None:
            return default
        return node.value if isinstance(node, ast.Constant) else ast.unparse(node)

    @staticmethod
    def _says_teacher(text: str) -> bool:
        return not TEACHERS.isdisjoint(re.split(r"[\W_\d]+", text.lower()))

    def _found(self, node: ast.expr, replacement: str | None, note: str) -> Found:
        square = self._squared(node)
        if replacement is not None and square:
            note = "; ".join(x for x in (note, f"the factor {square} stays") if x)
        return Found(self.file, node.lineno, ast.unparse(node), replacement, note)

    def _squared(self, node: ast.AST) -> str:
        """The T * T or T ** 2 that a loss is multiplied by."""
        while isinstance(parent := self.parents.get(node), ast.BinOp):
            if isinstance(parent.op, ast.Mult):
                other = parent.right if parent.left is node else parent.left
                if isinstance(other, ast.BinOp) and isinstance(other.op, (ast.Pow, ast.Mult)):
                    return ast.unparse(other)
            node = parent
        return ""
