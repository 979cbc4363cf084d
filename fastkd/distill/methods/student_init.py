"""A student from its teacher: layers copied, units pruned, a new head, layers frozen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.arguments.messages import shown

from ..batch import bare_names, unwrap, within
from ..hooks import resolve
from ..serialization import same_shapes

Prunable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def copy_layers(student: nn.Module, teacher: nn.Module, layers: Mapping[str, str]) -> None:
    """Copy the state of the teacher's modules into the student's.

    Args:
        student: changed in place.
        teacher: read only.
        layers: name of a student's module -> name of a teacher's module of equal shapes.

    Raises:
        ValueError: a module that does not exist (with near names), or shapes that differ; nothing
            is copied then.

    Paper: Sanh et al. 2019, DistilBERT, arXiv 1910.01108.
    """
    pairs = []
    for student_name, teacher_name in layers.items():
        target, origin = resolve(student, student_name), resolve(teacher, teacher_name)
        state, student_state = origin.state_dict(), target.state_dict()
        bare = bare_names(origin, state)
        state = {bare[name]: x for name, x in state.items()}
        names = bare_names(target, student_state)
        expected = {names[name]: x for name, x in student_state.items()}
        same_shapes(state, expected, f"layers: got {shown(teacher_name)} for {student_name!r} with")
        pairs.append((target, {name: state[names[name]] for name in student_state}))
    for target, state in pairs:
        target.load_state_dict(state)


def layer_map(
    student: int, teacher: int, student_stem: str = "layers", teacher_stem: str | None = None
) -> dict[str, str]:
    """Names for `copy_layers`: layer i of the student from layer i * (teacher - 1) / (student - 1).

    Args:
        student, teacher: how many layers each has, 1 <= student <= teacher.
        student_stem, teacher_stem: what stands before ".0"; None: the same on both sides.
    """
    if not 1 <= student <= teacher:
        raise ValueError(f"student: got {student} layers of {teacher}, expected 1 to {teacher}")
    stem = student_stem if teacher_stem is None else teacher_stem
    step = (teacher - 1) / max(student - 1, 1)
    return {f"{student_stem}.{i}": f"{stem}.{round(i * step)}" for i in range(student)}


def prune(model: nn.Sequential, keep: float | Mapping[str, float]) -> nn.Sequential:
    """A narrower copy of a chain of Linear or Conv layers, without its units of least magnitude.

    A unit's magnitude is the 2-norm of the weights into it (and its bias), times that of the
    weights out of it. The next layer loses the inputs, a batch norm between the two its channels;
    the outputs of the last layer stay.

    Args:
        model: nn.Sequential, nested or not, of Linear and Conv layers (one group), batch norms,
            Flatten, and modules without parameters that keep the order of channels; no other model.
            The copy is of what torch.compile or a parallel wrapper has within.
        keep: share of units that stay in (0, 1], rounded, at least one; or name -> share, 1 for
            layers without an entry.

    Raises:
        ValueError: another kind of module, a share out of range, a layer that does not exist.

    Paper: Li et al. 2017, arXiv 1608.08710.
    """
    narrow: Any = copy.deepcopy(unwrap(model))
    leaves = list(_leaves(narrow))
    layers = [(name, leaf) for name, leaf in leaves if isinstance(leaf, PRUNABLE)]
    shares = dict.fromkeys((name for name, _ in layers[:-1]), 1.0)
    requested = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(shares, keep)
    for name, share in requested.items():
        if name not in shares:
            raise ValueError(f"keep: got layer {shown(name)}, expected one of {list(shares)}")
        if not 0 < share <= 1:
            raise ValueError(f"keep: got {shown(share)} for {name!r}, expected a number in (0, 1]")
    shares |= requested

    names = [name for name, _ in leaves]
    for (name, layer), (next_name, after) in itertools.pairwise(layers):
        between = [leaf for _, leaf in leaves[names.index(name) + 1 : names.index(next_name)]]
        units = layer.weight.size(0)
        spots, rest = divmod(after.weight.size(1), units)  # inputs that stem from one unit
        if rest:
            raise ValueError(
                f"model: got {units} units of {name!r} before {next_name!r}, "
                f"which has {after.weight.size(1)} inputs; expected a multiple"
            )
        into = layer.weight.detach().flatten(1).pow(2).sum(1)
        into = into if layer.bias is None else into + layer.bias.detach().pow(2)
        out = after.weight.detach().transpose(0, 1).flatten(1).pow(2).sum(1).view(units, spots)
        count = max(1, round(shares[name] * units))
        kept = (into * out.sum(1)).topk(count).indices.sort().values
        _narrow(layer, kept, 0)
        for norm in between:
            if isinstance(norm, NORMS):
                _narrow_norm(norm, kept, units)
        inputs = (kept.unsqueeze(1) * spots + torch.arange(spots, device=kept.device)).flatten()
        _narrow(after, inputs, 1)
    return narrow


def replace_head(model: nn.Module, name: str, outputs: int) -> nn.Module:
    """Put a fresh layer of the same kind and inputs, with `outputs` units, in the place of `name`.

    Args:
        model: changed in place and returned.
        name: of a Linear or Conv layer within it.
        outputs: units of the new layer, at least 1.

    Raises:
        ValueError: another kind of layer, a model in DistributedDataParallel, which would not see
            the new layer.
    """
    at: Any = model
    while at is not None:
        if isinstance(at, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model: got DistributedDataParallel, which averages gradients of the layers that "
                "it was made with; expected the bare module, to be wrapped afterwards"
            )
        at = within(at)
    old = unwrap(resolve(model, name))
    if not isinstance(old, PRUNABLE) or not name:
        raise ValueError(
            f"name: got {shown(name)}, a {type(old).__name__}, expected a Linear or Conv"
        )
    if outputs < 1:
        raise ValueError(f"outputs: got {shown(outputs)}, expected an integer >= 1")
    new = copy.deepcopy(old)
    size = (outputs, *old.weight.shape[1:])
    new.weight = nn.Parameter(old.weight.new_zeros(size))
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.new_zeros(outputs))
    _rename(new, outputs)
    new.reset_parameters()
    parent, _, last = name.rpartition(".")
    setattr(unwrap(resolve(model, parent)), last, new)
    return model


@contextmanager
def freeze(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """A context in which the named modules do not learn: no gradient, eval mode (batch norms too).

    Args:
        model: module; its parameters' `requires_grad` come back with the end.
        names: as in `named_modules()`.
    """
    parts = [resolve(model, name) for name in names]
    before = [(p, p.requires_grad) for part in parts for p in part.parameters()]
    every = [module for part in parts for module in part.modules()]  # whoever calls them
    handles = [module.register_forward_pre_hook(_eval) for module in every]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, learns in reversed(before):
            p.requires_grad_(learns)
        for handle in handles:
            handle.remove()


def _eval(module: nn.Module, _: Any) -> None:
    if module.training:
        module.eval()


def _leaves(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"model: got {type(model).__name__}, expected nn.Sequential")
    for name, child in model.named_children():
        child = unwrap(child)
        if isinstance(child, nn.Sequential):
            yield from _leaves(child, f"{prefix}{name}.")
            continue
        plain = not any(True for _ in child.parameters()) and not any(True for _ in child.buffers())
        grouped = getattr(child, "groups", 1) != 1
        if grouped or not (plain or isinstance(child, (*PRUNABLE, *NORMS))):
            raise ValueError(
                f"model: got {child} at {prefix}{name}, expected a chain of Linear, Conv (one "
                "group), batch norms and modules without parameters"
            )
        yield prefix + name, child


def _narrow(layer: Prunable, kept: Tensor, dim: int) -> None:
    learns = layer.weight.requires_grad
    layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, kept), learns)
    if dim == 0:
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[kept], layer.bias.requires_grad)
        _rename(layer, len(kept))
    elif isinstance(layer, nn.Linear):
        layer.in_features = len(kept)
    else:
        layer.in_channels = len(kept)


def _rename(layer: Prunable, outputs: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features = outputs
    else:
        layer.out_channels = outputs


def _narrow_norm(norm: Any, kept: Tensor, units: int) -> None:
    spots = norm.num_features // units  # after Flatten a unit has several
    kept = (kept.unsqueeze(1) * spots + torch.arange(spots, device=kept.device)).flatten()
    norm.num_features = len(kept)
    for name in ("weight", "bias"):
        if (p := getattr(norm, name)) is not None:
            setattr(norm, name, nn.Parameter(p.detach()[kept], p.requires_grad))
    for name in ("running_mean", "running_var"):
        if (b := getattr(norm, name)) is not None:
            setattr(norm, name, b[kept])
