"""Two thirds of the time of Triton's interpreter back.

It patches triton.language anew for every call of a device function, by looking at each of its
members. Within a launch that changes nothing: the first patch holds until the launch ends. And it
computes every sum and product of integers again in 64 bits to see an overflow, which tests of some
thousand columns cannot have.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Held:
    """The scope of a call within a launch: there is nothing to restore."""

    def restore(self) -> None:
        pass


class _Launch:
    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def restore(self) -> None:
        global _launched
        _launched = False
        self.scope.restore()


_launched = False


def hurry() -> None:
    """For versions whose patches are scopes (Triton 3.9); others stay as they are."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch = interpreter._patch_lang
    # what kernels and the standard library's functions see of the language
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def once(fn: Any) -> Any:
        global _launched
        if _launched:
            return _Held()
        scope = _Launch(patch(both))
        _launched = True
        return scope

    interpreter._patch_lang = once
