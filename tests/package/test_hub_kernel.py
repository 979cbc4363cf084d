"""What `tests/hub_kernel.py` builds, imported as Hugging Face's `kernels` does, beside fastkd."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
from hub_kernel import build

import fastkd


def test_a_kernel_from_a_local_folder(tmp_path: Path) -> None:
    variant = build(tmp_path)
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    spec.loader.exec_module(kernel)
    # nothing of it is the package that is installed
    assert not [new for new in set(sys.modules) - before if new.split(".")[0] == "fastkd"]
    assert kernel.__all__ == fastkd.__all__
    student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    losses = [module.js_div(student, teacher, temperature=2.0) for module in (kernel, fastkd)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in losses))
