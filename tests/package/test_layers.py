"""Who may import whom, who may ask for a device, how long a file is, and names of the backends."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from common import NAMED, require

import fastkd

ROOT = Path(fastkd.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Who stands on whom: a folder or file imports its own layer's and those above it in this list.
LAYERS = [
    {"arguments"},
    {"divergence", "bernoulli", "operands", "mapped"},
    {"backends"},
    {"parallel"},
    {"engine"},
    {"losses", "binary", "binary_modules", "topk", "nn", "info", "rows", "scan"},
    {"distill", "teachers", "doctor"},
    {"recipes", "demo", "integrations"},
]
FACE = {"__init__", "__main__"}
# users of the public face: the package, nn and how arguments are quoted; no driver, no kernel
USERS = {"distill", "teachers", "doctor", "recipes", "demo", "integrations"}
HIDDEN = {
    "backends",
    "parallel",
    "engine",
    "losses",
    "topk",
    "operands",
    "mapped",
    "divergence",
    "bernoulli",
    "_C",
}
DEVICE_QUESTIONS = {"is_cuda", "is_cpu", "is_xpu", "is_meta", "is_mps"}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """A million nodes, which garbage collections would go through."""
    yield
    _tree.cache_clear()


def _module(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def _full_names(path: Path, node: ast.AST) -> list[str]:
    """What an import names, from the package on."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ("fastkd", *path.relative_to(ROOT).parent.parts)
    base = package[: len(package) + 1 - node.level] if node.level else ()
    full = ".".join((*base, *([node.module] if node.module else [])))
    return [f"{full}.{alias.name}" for alias in node.names]


def _imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, "" for the package itself."""
    for node in ast.walk(_tree(path)):
        for name in _full_names(path, node):
            head, _, rest = name.partition(".")
            if head == "fastkd":
                first = rest.partition(".")[0]
                is_module = (ROOT / f"{first}.py").exists() or (ROOT / first).is_dir()
                yield first if first and (is_module or first == "_C") else ""


def _rank(module: str) -> int:
    return next(at for at, layer in enumerate(LAYERS) if module in layer)


def test_imports() -> None:
    for path in FILES:
        module, imported = _module(path), set(_imported(path)) - {""}
        if module in FACE:
            assert "_C" not in imported, path
            continue
        if module in USERS:
            allowed = {"backends"} if path.name == "memory.py" else set()  # empties the buffer pool
            assert not imported & HIDDEN - allowed, path
        else:
            assert "_C" not in imported or path.name == "cpu.py", path
        above = {name for name in imported - {"_C"} if _rank(name) > _rank(module)}
        assert not above, f"{path}: {module} stands beneath {above}"


def _attributes(path: Path) -> Iterator[ast.Attribute]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute):
            yield node


def _is_device_type(node: ast.Attribute) -> bool:
    of = node.value
    name = of.attr if isinstance(of, ast.Attribute) else of.id if isinstance(of, ast.Name) else ""
    return node.attr == "type" and name == "device"


CORE = [path for path in FILES if _module(path) not in USERS]


def test_nobody_but_the_backend_asks_for_a_device() -> None:
    for path in CORE:
        types = [node for node in _attributes(path) if _is_device_type(node)]
        assert not [node for node in _attributes(path) if node.attr in DEVICE_QUESTIONS], path
        if path.stem == "validate":
            assert len(types) <= 1  # may a number come from the host
        elif path.stem not in ("base", "products", "choice"):
            assert not types, path


def test_nobody_waits_for_a_device() -> None:
    """.item(), .tolist() and torch.equal make the host wait for the GPU."""
    waits = {"item", "tolist", "synchronize"}
    for path in CORE:
        found = [node.lineno for node in _attributes(path) if node.attr in waits]
        if path.stem == "layout":  # once for each group and layout, remembered off the host
            assert len(found) == 1
            found = []
        equal = [
            node.lineno
            for node in _attributes(path)
            if node.attr == "equal"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
        if path.stem == "proof":  # once for each device
            assert len(equal) == 1
            equal = []
        assert not found + equal, path


def test_nothing_is_pickled() -> None:
    for path in FILES:
        names = {
            alias.name
            for n in ast.walk(_tree(path))
            if isinstance(n, ast.Import)
            for alias in n.names
        }
        assert not names & {"pickle", "shelve", "marshal", "dill"}, path
        calls = {(n.value.id, n.attr) for n in _attributes(path) if isinstance(n.value, ast.Name)}
        assert not calls & {("torch", "save"), ("torch", "load")}, path


# ---- files, functions and imports that a reader can keep in view

REPOSITORY = Path(__file__).parents[2]
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".inl", ".md", ".txt"}
TABLES: set[str] = set()  # files of data that may pass 400 lines, by their path


def _sources() -> Iterator[Path]:
    for folder in ("fastkd", "csrc", "tests", "bench"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                yield path


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """All statements but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            yield node
        types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, ast.expr) and not types:
            yield from _statements(node)


def test_no_file_passes_400_lines() -> None:
    lengths = {
        path.relative_to(REPOSITORY).as_posix(): path.read_bytes().count(b"\n")
        for path in _sources()
    }
    assert {path: n for path, n in lengths.items() if n > 400 and path not in TABLES} == {}


def test_no_function_passes_80_lines() -> None:
    """From its `def`, without its docstring."""
    long = {}
    for path in _sources():
        if path.suffix != ".py" or path.read_bytes().count(b"\n") <= 80:
            continue
        own = path.is_relative_to(ROOT)  # whose tree other tests need, too
        for node in _statements(_tree(path) if own else ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                first = node.body[0]
                if ast.get_docstring(node) is not None:
                    lines -= (first.end_lineno or 0) - first.lineno + 1
                if lines > 80:
                    long[path.name, node.name] = lines
    assert long == {}


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Nor when one of their functions is called, which would hide a circle."""
    names: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(("fastkd", *path.relative_to(ROOT).with_suffix("").parts))
        names[name.removesuffix(".__init__")] = {
            full
            for node in _statements(_tree(path))
            for full in _full_names(path, node)
            if full != "fastkd._C"
        }
    above = {
        name: {x if x in names else x.rpartition(".")[0] for x in found} & names.keys() - {name}
        for name, found in names.items()
    }
    while True:  # what imports none of the rest, or is imported by none of it, is in no circle
        imported = {x for of in above.values() for x in of}
        rest = {x: of & above.keys() for x, of in above.items() if of & above.keys()}
        rest = {x: of for x, of in rest.items() if x in imported}
        if len(rest) == len(above):
            break
        above = rest
    assert not above


def test_folders_are_at_most_three_deep() -> None:
    assert all(len(path.relative_to(ROOT).parts) <= 3 for path in FILES)


def test_names_in_cpp() -> None:
    require("cpu")
    from fastkd import _C

    assert set(_C.divergences()) == set(fastkd.divergences), "csrc/divergence.h; is it built?"


def test_names_in_triton() -> None:
    require("gpu")
    from fastkd.backends.gpu import divergence

    there = {
        name
        for name, value in vars(divergence).items()
        if hasattr(value, "fn") and value.fn.__module__ == divergence.__name__ and name[0] != "_"
    }
    assert set(fastkd.divergences) <= there


def test_every_divergence_has_a_function() -> None:
    assert set(NAMED) == set(fastkd.divergences), "fastkd/losses.py, fastkd/__init__.py"
