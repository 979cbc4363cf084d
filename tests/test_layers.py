"""Who may import whom, who may ask for a device, and that names are the same on every backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import require

import fastkd

ROOT = Path(fastkd.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

BENEATH = {"divergence", "messages", "operands", "reals"}
# what a module of the package may import from it; a folder stands for all in it
MAY_IMPORT = {
    "messages": set(),
    "reals": set(),
    "divergence": set(),
    "operands": set(),
    "backend": set(),
    "reference": {"backend"},
    "checks": {"backend"},
    "reduction": {"backend"},
    "arena": set(),
    "cpu": {"arena", "backend", "_C"},
    "gpu": {"backend", "gpu"},
    "function": {"backend", "reference", "reduction"},
    "operators": {"backend", "function"},
    "topk": {"backend", "checks", "reference", "reduction"},
    "sums": {"backend"},
    "chunks": {"backend", "reduction", "sums"},
    "trips": {"chunks", "function", "operators", "backend", "reference", "reduction"},
    "linear": {"shards", "trips", "topk", "function", "backend", "reference", "reduction"},
    "exchange": set(),
    "split": {"exchange", "backend", "reference"},
    "shards": {"exchange", "backend", "split"},
    "dtensors": {"checks", "shards"},
    "losses": {
        *("dtensors", "eagerly", "shards", "split", "linear", "topk", "operators", "function"),
        *("backend", "reference", "reduction", "checks"),
    },
    "nn": {"losses", "checks"},
    "about": {"backend", "cpu"},
    "scan": {"scan_files", "scan_names", "scan_softmax"},
    "scan_files": set(),
    "scan_names": set(),
    "scan_softmax": {"scan_names"},
    "eagerly": set(),
}
# users of the public face: the package itself, and their own folder
USERS = {"demo", "distill", "recipes", "integrations"}
PUBLIC = {"__init__", "__main__"}
DEVICE_QUESTIONS = {"is_cuda", "is_cpu", "is_xpu", "is_meta", "is_mps"}


def _module(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def _imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, "" for the package itself."""
    package = ("fastkd", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            full = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{full}.{alias.name}" for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "fastkd":
                first = rest.partition(".")[0]
                is_module = (ROOT / f"{first}.py").exists() or (ROOT / first).is_dir()
                yield first if first and (is_module or first == "_C") else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    module, imported = _module(path), set(_imported(path))
    if module in PUBLIC:
        assert "_C" not in imported
    elif module in USERS:
        more = {"demo": {"recipes"}, "distill": {"arena"} if path.name == "memory.py" else set()}
        # how an argument is quoted and a number is read is one way for all, and knows no core
        assert imported <= {"", "nn", "messages", "reals", "distill", module, *more.get(module, ())}
    else:
        assert imported <= MAY_IMPORT[module] | BENEATH


def _attributes(path: Path) -> Iterator[ast.Attribute]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node


def _is_device_type(node: ast.Attribute) -> bool:
    of = node.value
    name = of.attr if isinstance(of, ast.Attribute) else of.id if isinstance(of, ast.Name) else ""
    return node.attr == "type" and name == "device"


CORE = [path for path in FILES if _module(path) not in USERS]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_but_the_backend_asks_for_a_device(path: Path) -> None:
    asked = [node for node in _attributes(path) if node.attr in DEVICE_QUESTIONS]
    types = [node for node in _attributes(path) if _is_device_type(node)]
    assert not asked
    if _module(path) in ("losses", "checks", "reduction"):
        assert len(types) <= 1  # may a value be checked here, or a number come from the host
    elif _module(path) != "backend":
        assert not types


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_waits_for_a_device(path: Path) -> None:
    """.item(), .tolist() and torch.equal make the host wait for the GPU."""
    waits = {"item", "tolist", "synchronize"}
    found = [
        f"{node.attr} in line {node.lineno}" for node in _attributes(path) if node.attr in waits
    ]
    if _module(path) == "shards":  # once for each group and layout, remembered off the host
        assert len(found) == 1
        found = []
    equal = [
        f"torch.equal in line {node.lineno}"
        for node in _attributes(path)
        if node.attr == "equal" and isinstance(node.value, ast.Name) and node.value.id == "torch"
    ]
    assert not found + equal


def test_nothing_is_pickled() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        names = {
            alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
        }
        assert not names & {"pickle", "shelve", "marshal", "dill"}, path
        calls = {(n.value.id, n.attr) for n in _attributes(path) if isinstance(n.value, ast.Name)}
        assert not calls & {("torch", "save"), ("torch", "load")}, path


def test_folders_are_at_most_two_deep() -> None:
    assert all(len(path.relative_to(ROOT).parts) <= 2 for path in FILES)


def test_names_in_cpp() -> None:
    require("cpu")
    from fastkd import _C

    assert sorted(_C.divergences()) == sorted(fastkd.divergences)


def test_names_in_triton() -> None:
    require("gpu")
    from fastkd.gpu import divergence

    there = {
        name
        for name, value in vars(divergence).items()
        if hasattr(value, "fn") and value.fn.__module__ == divergence.__name__ and name[0] != "_"
    }
    assert set(fastkd.divergences) <= there


def test_every_divergence_is_named_in_the_tests_of_its_values() -> None:
    """A named function for every entry that the library itself ships."""
    public = {name.removesuffix("_div").removesuffix("_distance") for name in fastkd.__all__}
    assert set(fastkd.divergences) <= public
