"""Most of the time of Triton's interpreter back.

It patches triton.language anew for every call of a device function, by looking at each of its
members. Within a launch that changes nothing: the first patch holds until the launch ends. And it
computes every sum and product of integers again in 64 bits to see an overflow, which tests of some
thousand columns cannot have. What is left is spent on types: a tensor of a shape is made from
scratch with each operation, and two of equal shapes are compared element by element.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
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
    _remember_types()


def _remember_types() -> None:
    """Each shape and each dtype of numpy's is worked out once, and shared."""
    build, widen, find = (
        tl.block_type.__init__,
        TritonSemantic.broadcast_impl_value,
        interpreter._get_np_dtype,
    )
    dtypes: dict[str, Any] = {}

    @functools.cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
        model = object.__new__(tl.block_type)
        build(model, tl.int32, [*sizes])
        return model.shape, model.numel, str(model.shape)

    @functools.cache
    def constants(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(x.value if isinstance(x, tl.constexpr) else x for x in shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = shape_of(sizes)
        self.name = f"<{text}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = constants(tuple(type.shape) if type.is_block() else ())

    def broadcast(self: Any, a: Any, b: Any) -> Any:
        blocks = a.type.is_block() and b.type.is_block()
        return (a, b) if blocks and a.type.shape is b.type.shape else widen(self, a, b)

    def np_dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in dtypes:
            dtypes[name] = find(of)
        return dtypes[name]

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
    TritonSemantic.broadcast_impl_value = broadcast
    interpreter._get_np_dtype = np_dtype
