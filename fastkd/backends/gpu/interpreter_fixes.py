"""Repairs of Triton's interpreter, applied only where it is switched on.

* Up to Triton 3.6 it turns a loop bound, a one-element array, into a number by int(array), which
  NumPy 2.4 refuses. Remove when Triton 3.7 is the oldest supported.
* Up to Triton 3.6 its maximum and minimum of two numbers are NaN where one is, and not the other
  number, as on every GPU. Remove with the first.
* Up to 3.9 at least it cuts float32 down to bfloat16, and mistakes float64 for it, where every GPU
  rounds to nearest. Remove when `tests/backends/test_gpu.py::test_multiply` passes without it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Makes the interpreter do what a GPU does, as far as the kernels here need it."""
    patch, cast = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl

    def patch_and_mend(tensor: Any, *rest: Any) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    def cast_or_round(self: Any, source: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16 or source.dtype.scalar not in (tl.float32, tl.float64):
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(
            rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16
        )

    def of_two(function: Any) -> Any:
        return lambda self, x, y: self.binary_op(x, y, function)

    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.InterpreterBuilder.create_maxnumf = of_two(np.fmax)
    interpreter.InterpreterBuilder.create_minnumf = of_two(np.fmin)
    interpreter.InterpreterBuilder.cast_impl = cast_or_round
