"""Features of inner modules by forward hooks, and projectors between two of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.arguments.messages import MadeOf

from .batch import bare_names, forward, mapped, restored_modes, unwrap


class Hooks(MadeOf):
    """A context that keeps the outputs of the named modules; it removes its hooks at its end.

    The outputs are copied as the module returns them, because a later module may work in place
    (`nn.ReLU(inplace=True)`, `x += y`).

    Args:
        model: hooks sit on what it wraps (torch.compile, DistributedDataParallel), so names are
            those of the bare model.
        names: as in `named_modules()`; "" is the model itself.

    Raises:
        ValueError: a module that does not exist; the message lists near names.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        inner = unwrap(model)
        self.model, self.names = inner, list(names)
        self._modules = {name: resolve(inner, name) for name in dict.fromkeys(names)}
        self._handles: list[Any] = []
        self._kept: dict[str, Any] = {}

    def __enter__(self) -> Hooks:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()

    def take(self) -> dict[str, Any]:
        """The outputs of the last forward, by name; of a module called twice, the last one."""
        if len(self._kept) < len(self._modules):
            missing = [name for name in self._modules if name not in self._kept]
            raise ValueError(
                f"layer: {missing} did not run in forward; expected modules that take part in it "
                "(a model compiled and called before the hooks were set does not run them)"
            )
        kept, self._kept = self._kept, {}
        return kept

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # copied at once: a later write into it could not be undone
            self._kept[name] = mapped(output, Tensor.clone)

        return keep


def resolve(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name; ValueError with near names where there is none."""
    model = unwrap(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:  # by the names without those of wrapped parts
        modules = {bare: modules[full] for full, bare in bare_names(model, modules).items()}
    if name in modules:
        return modules[name]
    names = [known for known in modules if known]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    listed = ", ".join(map(repr, near)) or "none, the model has no submodules"
    raise ValueError(
        f"layer: got {name!r}, which {type(model).__name__} does not have; near names: {listed}"
    )


def projector(
    student: nn.Module, teacher: nn.Module, inputs: Any, student_layer: str, teacher_layer: str
) -> nn.Module:
    """A projector from the student's features to the teacher's, made for their shapes.

    Equal shapes: identity. [..., D] with equal leading dimensions: Linear. [B, C, H, W]: a 1 x 1
    convolution, after adaptive average pooling where the heights and widths differ.

    Args:
        student, teacher: modules on one device; run once on `inputs`, in eval mode.
        inputs: some inputs of both.
        student_layer, teacher_layer: names of modules.

    Raises:
        ValueError: a layer that does not exist, or shapes that cannot be projected.
    """
    shapes, places = [], []
    for model, layer in ((student, student_layer), (teacher, teacher_layer)):
        with torch.no_grad(), restored_modes(model), Hooks(model, [layer]) as hooks:
            forward(model.eval(), inputs)
            found = hooks.take()[layer]
        if not isinstance(found, Tensor):
            raise ValueError(f"layer: got {type(found).__name__} from {layer!r}, expected a tensor")
        shapes.append(tuple(found.shape))
        places.append(found)
    a, b = shapes
    if a == b:
        return nn.Identity()
    if len(a) == len(b) == 4 and a[0] == b[0]:
        convolution = nn.Conv2d(a[1], b[1], 1, bias=False)
        pooled = [] if a[2:] == b[2:] else [nn.AdaptiveAvgPool2d((b[2], b[3]))]
        return nn.Sequential(*pooled, convolution).to(places[0])
    if len(a) == len(b) and len(a) >= 2 and a[:-1] == b[:-1]:
        return nn.Linear(a[-1], b[-1]).to(places[0])
    raise ValueError(
        f"projector: got features {list(a)} of {student_layer!r} and {list(b)} of "
        f"{teacher_layer!r}, expected equal shapes, [..., D] with equal leading dimensions, or "
        "[B, C, H, W] on both"
    )


class Hook:
    """A forward pre-hook; in a pickle or a deep copy of its module it does nothing."""

    def __init__(self, act: Callable[..., Any]) -> None:
        self.act = act

    def __call__(self, *args: Any) -> Any:
        return self.act(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """The hook of a copied module."""
