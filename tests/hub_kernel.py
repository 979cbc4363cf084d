"""The losses in the layout of Hugging Face's `kernels`: pure Python, for any GPU that Triton knows.

`python tests/hub_kernel.py FOLDER` writes FOLDER/build.toml, torch-ext/fastkd (the sources) and
build/torch-universal, which `kernels.get_local_kernel` loads. Such a kernel is imported under a
name of its own, several versions beside each other: every import within it is made relative, and
its operators stand in a namespace of their own.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastkd"
VARIANT = Path("build") / "torch-universal"


def file_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def files() -> list[Path]:
    """What the public face imports, however late, and the GPU kernels."""
    todo = [PACKAGE / "__init__.py", *(PACKAGE / "backends" / "gpu").glob("*.py")]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        todo += [PACKAGE / above / "__init__.py" for above in path.relative_to(PACKAGE).parents]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastkd":
                assert node.module
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                todo += map(file_of, names)
    return sorted(found)


def relative(text: str, depth: int, namespace: str) -> str:
    """A module's source with no name of the package in its imports and operators."""
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*from )fastkd\.?([\w.]*)( import)", rf"\1{dots}\2\3", text, flags=re.M)
    return text.replace('"fastkd::', f'"{namespace}::')


def build(folder: Path) -> Path:
    """Writes the layout; the folder of the variant that is loaded."""
    project = (ROOT / "pyproject.toml").read_text()
    sources = files()
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    name, variant = f"_fastkd_universal_{digest}", folder / VARIANT
    shutil.rmtree(variant, ignore_errors=True)
    for path in sources:
        place = path.relative_to(PACKAGE)
        text = relative(path.read_text(), len(place.parts) - 1, name)
        for root in (folder / "torch-ext" / "fastkd", variant):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_text(text)
    # where older versions of `kernels` look
    (variant / "fastkd").mkdir()
    (variant / "fastkd" / "__init__.py").write_text(
        "import importlib.util\nimport sys\nfrom pathlib import Path\n\n"
        'NAME = f"{__name__}_whole"\n'
        "place = Path(__file__).parents[1] / '__init__.py'\n"
        "spec = importlib.util.spec_from_file_location(NAME, place)\n"
        "whole = sys.modules[NAME] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(whole)\n"
        "globals().update({name: getattr(whole, name) for name in whole.__all__})\n"
    )
    licence = re.search(r'^license = "(.*)"', project, re.M)
    assert licence
    known = {"id": name, "name": "fastkd", "version": 1, "license": licence[1]}
    # the format names no backend for all of them; which one stands here is not looked at
    known |= {"python-depends": [], "backend": {"type": "cuda"}}
    (variant / "metadata.json").write_text(json.dumps(known, indent=2) + "\n")
    (folder / "build.toml").write_text(
        '[general]\nname = "fastkd"\nuniversal = true\n\n[torch]\nsrc = []\n'
    )
    return variant


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve()))
