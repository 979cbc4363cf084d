"""Export of a student to files that others load, and training on another task."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.arguments.messages import describe, shown

from ..batch import device_of, restored_modes, unwrap
from ..logging import Step
from ..serialization import needed, save
from ..trainer import train
from . import student_init

FORMATS = {"safetensors": "student.safetensors", "pt2": "student.pt2", "onnx": "student.onnx"}
ROWS = "rows"


def export(
    student: nn.Module,
    inputs: Tensor,
    folder: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("safetensors", "pt2"),
    metadata: Any = None,
) -> dict[str, Path]:
    """Write a student for others, in eval mode, for any number of rows (first dimension).

    "safetensors": weights for `load`; "pt2": a `torch.export` program; "onnx": an ONNX model
    (needs onnx and onnxscript). A program that does not repeat the student's outputs on `inputs`
    is not written.

    Args:
        student: module of one tensor; its mode is restored.
        inputs: an example [B, ...] with B >= 2, on the student's device.
        folder: made if missing; files are called student.*.
        formats: which.
        metadata: JSON, into the safetensors file.

    Returns:
        format -> path.

    Raises:
        TypeError, ValueError: inputs that are no tensor, an unknown format, an example of one row,
            outputs that differ.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"formats: got {unknown}, expected some of {list(FORMATS)}")
    if not isinstance(inputs, Tensor) or not inputs.dim():
        raise TypeError(
            f"inputs: got {describe(inputs)}, expected a tensor [B, ...]; a student of several "
            "inputs, or of inputs by name, goes into a module of one tensor"
        )
    if len(inputs) < 2:
        raise ValueError(f"inputs: got {len(inputs)} rows, expected 2 or more: 1 would be constant")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / FORMATS[name] for name in formats}
    bare = unwrap(student)
    inputs = inputs.to(device_of(bare))
    with restored_modes(bare), torch.no_grad():
        bare.eval()
        expected = bare(inputs)
        dynamic = ({0: torch.export.Dim(ROWS)},)
        for name, path in paths.items():
            part = path.with_name(f".{path.stem}.tmp{path.suffix}")
            try:
                if name == "safetensors":
                    save(bare, path, metadata)
                    continue
                program = torch.export.export(bare, (inputs,), dynamic_shapes=dynamic)
                _same(program.module()(inputs), expected, name)
                if name == "pt2":
                    torch.export.save(program, part)
                else:
                    _onnx(program, part)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
    return paths


def fine_tune(
    student: nn.Module,
    loader: Iterable[Any],
    loss: Any,
    *,
    head: str | None = None,
    outputs: int | None = None,
    freeze: Iterable[str] = (),
    **options: Any,
) -> tuple[nn.Module, list[Step]]:
    """Train a copy of a student on another task: a new head, some layers frozen.

    Args:
        student: module; left as it is.
        loader, loss: as for `train`.
        head: name of the Linear or Conv layer to replace; None keeps it.
        outputs: units of the new head.
        freeze: names of modules that do not learn and run in eval mode.
        options: of `train`, such as epochs, lr and teacher.

    Returns:
        The trained copy, and its steps.
    """
    if (head is None) != (outputs is None):
        raise ValueError(
            f"head: got {shown(head)} with outputs {shown(outputs)}, expected both or neither"
        )
    model = copy.deepcopy(unwrap(student))
    if head is not None and outputs is not None:
        student_init.replace_head(model, head, outputs)
    with student_init.freeze(model, freeze):
        steps = train(model, loader, loss, **options)
    return model, steps


def _onnx(program: Any, path: Path) -> None:
    for module in ("onnx", "onnxscript"):
        needed(module, "formats 'onnx'", "onnx")
    model = torch.onnx.export(program, dynamo=True, verbose=False)
    if model is None:
        raise RuntimeError("onnx: torch.onnx.export gave no program")
    model.save(str(path), external_data=False)
    onnx = needed("onnx", "formats 'onnx'", "onnx")
    onnx.checker.check_model(str(path), full_check=True)


def _same(got: Tensor, expected: Tensor, name: str) -> None:
    apart = (got.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    bound = 100 * torch.finfo(expected.dtype).eps * max(scale, 1.0)
    if not apart <= bound:
        raise ValueError(
            f"student: got outputs {apart:.2g} apart from {name}'s, expected {bound:.2g}"
        )
