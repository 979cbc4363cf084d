"""`Batch` and `Outputs`: the data between the loader, the models and the terms of a loss."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import listed

IGNORED = -100  # torch's own label for a row that does not count


@dataclasses.dataclass(slots=True)
class Batch:
    """One micro-batch; a loader may give a `Batch`, or a tensor, a tuple or a dict of its fields.

    Args:
        inputs: tensor, or a dict of the model's keyword arguments.
        labels: int [...], -100 where a row has none; None without labels.
        teacher: the teacher's outputs, made beforehand (logits, TopK ...), where a loader has them.
        teacher_inputs: what the teacher sees where that differs from `inputs`.
        extra: whatever else a loader's dict holds.

    The trainer sets the rest: `epoch` and `step` of the run from 0, `tokens` (labels that are not
    -100; samples where there are no labels) and `samples` (first dimension) of this micro-batch,
    and `normalizer` and `sample_total`, their sums over all micro-batches of the optimizer step
    (where several ranks train: the mean over ranks of these sums).
    """

    inputs: Any
    labels: Any = None
    teacher: Any = None
    teacher_inputs: Any = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    samples: int = 0
    sample_total: float = 0
    _tokens: Any = dataclasses.field(default=None, repr=False)
    _normalizer: Any = dataclasses.field(default=None, repr=False)

    @property
    def tokens(self) -> Any:
        if self._tokens is None:
            count(self)
        return self._tokens

    @property
    def is_whole_step(self) -> bool:
        """Whether the step has this one micro-batch alone."""
        return self._normalizer is None

    @property
    def normalizer(self) -> Any:
        return self.tokens if self._normalizer is None else self._normalizer

    @normalizer.setter
    def normalizer(self, value: Any) -> None:
        self._normalizer = value


@dataclasses.dataclass(slots=True)
class Outputs:
    """What a model returned: `logits`, hooked `features` by module name, and `raw`, all of it.

    `logits` is `raw`, or its attribute or entry of that name. `members` are the outputs of each
    teacher where there are several. `role` names the model, such as "student" or "teacher". Reading
    `logits` where there are none is an error that names the role; without a role they are None.
    """

    raw: Any
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    members: tuple[Outputs, ...] = ()
    role: str = ""

    @property
    def logits(self) -> Any:
        if isinstance(self.raw, Tensor):
            return self.raw
        named = isinstance(self.raw, Mapping)
        found = self.raw.get("logits") if named else getattr(self.raw, "logits", self.raw)
        if self.role and (found is None or isinstance(found, (tuple, list, Mapping, str))):
            raise _without_logits(self.raw, found, self.role)
        return found

    def detach(self) -> Outputs:
        """The same without gradient."""
        return Outputs(
            mapped(self.raw, Tensor.detach),
            {name: mapped(value, Tensor.detach) for name, value in self.features.items()},
            tuple(member.detach() for member in self.members),
            self.role,
        )


def _without_logits(raw: Any, found: Any, role: str) -> Exception:
    """The error for a model's answer in which the logits cannot be found."""
    expected = "logits [..., V] or an output with `logits`"
    if isinstance(raw, Mapping) and "logits" not in raw:
        entries = [str(key)[:40] for key in list(raw)[:8]]
        got = f"a {type(raw).__name__} with the entries {entries}"
        return ValueError(f"{role}: got {got}, expected 'logits' among them; wrap the model")
    if found is None:
        answer = "None" if raw is None else f"{type(raw).__name__} with `logits` None"
        return TypeError(
            f"{role}: got {answer}, expected {expected}; does its forward return them?"
        )
    what = f"a {type(found).__name__} of {len(found)}"
    if isinstance(found, (tuple, list)):
        parts = [
            f"tensor {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            for x in found[:4]
        ]
        what += f" ({', '.join(parts)}{', ...' if len(found) > 4 else ''})"
    return TypeError(
        f"{role}: got {what}, expected {expected}; wrap it in a module that returns its logits, "
        "or read `raw` in a Term"
    )


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor in it: containers, dataclasses, operands."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        parts = {key: mapped(part, function) for key, part in value.items()}
        if type(value) is dict:
            return parts
        try:  # a model's output class: made of its own fields
            return type(value)(**parts)
        except TypeError:
            return parts
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, function) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(part, function) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{k: mapped(v, function) for k, v in fields.items()})
    if hasattr(value, "map_tensors"):
        return value.map_tensors(function)
    if hasattr(value, "__dict__") and any(isinstance(v, Tensor) for v in vars(value).values()):
        clone = object.__new__(type(value))  # an operand such as TopK: the same, fields mapped
        vars(clone).update({k: mapped(v, function) for k, v in vars(value).items()})
        return clone
    return value


def rows_at(output: Any, at: Tensor) -> Any:
    """output[b, at[b, l]] in place of output[b, l], of logits or an operand [B, L, ...]."""
    at = at.to(output.device)
    batch = torch.arange(len(at), device=at.device)[:, None]
    return in_rows(output, lambda x: x[batch, at])


def in_rows(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Logits or an operand with its rows changed; a head has none."""
    if isinstance(output, fastkd.LinearLogits):
        return output.with_hidden(change(output.hidden))
    return mapped(output, change)


def to(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    return value if value is None else mapped(value, lambda x: x.to(device, non_blocking=True))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`, in its order."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    mapped(value, note)
    yield from found


def forward(model: nn.Module, inputs: Any) -> Any:
    """`model` on `inputs`, by name where they are a dict."""
    try:
        if isinstance(inputs, Tensor) or not isinstance(inputs, Mapping):
            return model(inputs)
        return model(**inputs)
    except IndexError as error:
        if (named := _beyond(model, inputs)) is None:
            raise
        raise IndexError(named) from error


def _beyond(model: nn.Module, inputs: Any) -> str | None:
    """The message for ids that an embedding of the model does not have; None for others."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
        return None
    least, most = (int(x) for x in ids.aminmax())
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) and not 0 <= least <= most < part.num_embeddings:
            return (
                f"inputs: got ids from {least} to {most}, expected 0 to {part.num_embeddings - 1}, "
                f"the rows of {type(model).__name__}'s embedding {name!r}: are they another "
                "tokenizer's?"
            )
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The module within torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while (inner := within(model)) is not None:
        model = inner
    return model


def bare_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Each name within `model` -> the same without its wrappers', and those of its parts."""
    found = {}
    for name in names:
        at: Any = model
        kept = []
        for part in name.split("."):
            inner = at._modules.get(part) if isinstance(at, nn.Module) else None
            wrapper = inner is not None and isinstance(at, nn.Module) and within(at) is inner
            if not wrapper:
                kept.append(part)
            at = inner
        found[name] = ".".join(kept)
    return found


def bare_state(model: nn.Module) -> dict[str, Any]:
    """The state of a model by its bare names, which no wrapper of it or of a part changes."""
    state = model.state_dict()
    names = bare_names(model, state)
    return {names[name]: x for name, x in state.items()}


def load_bare_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Take `bare_state` back, wrapped as the model may be now."""
    own = {bare: name for name, bare in bare_names(model, model.state_dict()).items()}
    model.load_state_dict({own.get(name, name): x for name, x in state.items()})


def within(model: nn.Module) -> nn.Module | None:
    """The module within one wrapper; None for a module that is no wrapper."""
    if isinstance(found := getattr(model, "_orig_mod", None), nn.Module):
        return found
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, parallel) else None


@contextmanager
def restored_modes(*models: nn.Module) -> Iterator[None]:
    """Give submodules their train/eval modes back."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def in_eval(model: nn.Module | Sequence[nn.Module]) -> Iterator[None]:
    """A context in which a model, or a list of all its modules, is in eval mode.

    Modes are put back one by one: a module that two models share keeps what the other one needs.
    """
    parts = model.modules() if isinstance(model, nn.Module) else model
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter is; the CPU for a module without."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def batches(
    loader: Iterable[Any],
    when: str,
    skip: int = 0,
    skipped: Callable[[], None] | None = None,
) -> Iterator[Batch]:
    """The items of `loader` as `Batch`, on their own device; `skipped` is called after `skip`.

    A loader may give functions without arguments: one that is skipped is not called.
    """
    count = 0
    for item in loader:
        count += 1
        if count > skip:
            batch = as_batch(item() if callable(item) else item)
            inputs = batch.inputs
            first = inputs if isinstance(inputs, Tensor) else next(tensors(inputs), None)
            batch.samples = first.size(0) if first is not None and first.dim() else 1
            yield batch
        elif count == skip and skipped is not None:
            skipped()
    if count == 0:
        raise ValueError(f"loader: got no batch {when}; a generator lasts one pass only")
    if count < skip:
        raise ValueError(
            f"loader: got {count} batches {when}, expected the {skip} of the run before"
        )


def moved(batch: Batch, device: torch.device) -> Batch:
    """`batch` with its tensors on `device`; a copy where that is not the host.

    The micro-batches of a step that wait for their turn, or have had it, stay on the host.
    """
    if device.type != "cpu":
        batch = copy.copy(batch)
    batch.inputs = to(batch.inputs, device)
    batch.labels = to(batch.labels, device)
    if batch.teacher is not None:
        batch.teacher = to(batch.teacher, device)
    if batch.teacher_inputs is not None:
        batch.teacher_inputs = to(batch.teacher_inputs, device)
    if batch.extra:
        batch.extra = to(batch.extra, device)
    return batch


def count(batch: Batch) -> None:
    """Set `tokens`; labels on an accelerator are counted there, without a wait."""
    if batch.labels is None:
        batch._tokens = batch.samples
    else:
        kept = (batch.labels != IGNORED).sum()
        batch._tokens = kept.item() if kept.device.type == "cpu" else kept


def as_batch(item: Any) -> Batch:
    """An item of a loader (a tensor, tuple, dict or `Batch`) as a new `Batch`."""
    if type(item) in (tuple, list) and len(item) == 2 and isinstance(item[0], Tensor):
        if isinstance(item[1], Tensor):  # what most loaders give
            return Batch(item[0], item[1])
    if isinstance(item, Batch):
        return dataclasses.replace(item)
    if isinstance(item, Mapping) and "inputs" in item:
        known = {k: item[k] for k in ("inputs", "labels", "teacher", "teacher_inputs") if k in item}
        return Batch(**known, extra={k: v for k, v in item.items() if k not in known})
    parts = list(item) if isinstance(item, (tuple, list)) else [item]
    teacher = (
        parts.pop()
        if len(parts) > 1 and _is_teacher_output(parts[-1], last=len(parts) == 3)
        else None
    )
    labelled = len(parts) in (1, 2) and isinstance(parts[-1], Tensor)
    has_teacher = len(parts) == 1 and teacher is not None
    if not (labelled or has_teacher) or not isinstance(parts[0], (Tensor, Mapping)):
        many = item if isinstance(item, (tuple, list)) else ()
        got, more = ", ".join(type(part).__name__ for part in many), ""
        if isinstance(item, Mapping):
            got = f"{type(item).__name__} of {listed(item)}"
            if "input_ids" in item:
                more = "; of transformers' arguments {'inputs': them, 'labels': label i of row i}"
        raise TypeError(
            f"loader: got a batch ({got or type(item).__name__}), expected (inputs, labels), "
            "inputs, (inputs, labels, teacher), (inputs, TopK), a dict with inputs among its keys, "
            f"or a Batch{more}"
        )
    return Batch(parts[0], parts[1] if len(parts) == 2 else None, teacher)


def _is_teacher_output(value: Any, *, last: bool) -> bool:
    """Is it a teacher's: an operand, or behind inputs and labels a tensor of logits?"""
    logits = last and isinstance(value, Tensor) and value.is_floating_point()
    return logits or isinstance(value, (fastkd.TopK, fastkd.LinearLogits))
