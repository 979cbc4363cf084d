"""Code that `scan` reads, run as it is and with its replacement: the values must be one."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import torch

from fastkd.scan import Found, scan

HEAD = """import torch
import torch.nn as nn
import torch.nn.functional as F
import fastkd
from torch.nn.functional import *
from torch import log as ln
"""
SHAPES = {1: (6,), 2: (4, 7), 3: (2, 3, 5), 4: (2, 3, 4, 5)}


class Put(ast.NodeTransformer):
    """A replacement in the place of the code it is for."""

    def __init__(self, found: Found) -> None:
        assert found.replacement is not None
        self.found, self.times = found, 0
        self.new = ast.parse(found.replacement, mode="eval").body

    def visit(self, node: ast.AST) -> Any:
        at = getattr(node, "lineno", None) == self.found.line
        if at and isinstance(node, ast.expr) and ast.unparse(node) == self.found.code:
            self.times += 1
            return self.new
        return self.generic_visit(node)


def look(source: str, folder: Path, head: str = HEAD) -> Found:
    (folder / "code.py").write_text(head + source)
    (only,) = scan(folder / "code.py")
    return only


def value(source: str | ast.Module, s: torch.Tensor, t: torch.Tensor, T: float) -> torch.Tensor:
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's words on legacy options
        exec(compile(source, "code.py", "exec"), names)
        return names["loss"](s.clone(), t.clone(), T)


def check(source: str, folder: Path, dims: tuple[int, ...] = (2,), head: str = HEAD) -> Found:
    """Runs the source as it is and with the replacement; returns what was found."""
    found = look(source, folder, head)
    assert found.replacement is not None, found.note
    put = Put(found)
    replaced = ast.fix_missing_locations(put.visit(ast.parse(head + source)))
    assert put.times == 1, (found, ast.unparse(replaced))
    for ndim in dims:
        s, t = (3 * torch.randn(SHAPES[ndim], dtype=torch.float64) for _ in range(2))
        s.requires_grad_()
        theirs, ours = (value(x, s, t, 2.5) for x in (head + source, replaced))
        if "entropy" in found.note:
            theirs, ours = (torch.autograd.grad(x.sum(), s)[0] for x in (theirs, ours))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12, msg=str(found))
    return found


def refused(source: str, folder: Path, *words: str, head: str = HEAD) -> None:
    found = look(source, folder, head)
    assert found.replacement is None, found
    for word in words:
        assert word in found.note, found.note


def function(line: str) -> str:
    return f"def loss(s, t, T):\n    return {line}\n"
