"""What every run of the tests imports, imported once: the runs are forks of a process with it."""

import os
from contextlib import suppress
from importlib import import_module

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

for name in ("numpy", "pytest", "torch.distributed", "triton.language"):
    with suppress(ImportError):
        import_module(name)
