"""A checkpoint whose tensors lie in shards, each rank's in a file: torch.distributed.checkpoint.

    step-00000120/tree.json                          what is no tensor, and where tensors belong
    step-00000120/shard-00001-...safetensors         what rank 0 holds, and so on

It is read on any number of ranks, and by one process without torch.distributed. Nothing is pickled.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distributed import Ranks, is_dtensor

TREE = "tree.json"


def write(path: Path, tensors: Mapping[str, Tensor], tree: Any, ranks: Ranks) -> None:
    """Every rank its shards, under a temporary name; the first renames when all are done."""
    dcp = _parts()
    part = path.with_name(f".{path.name}.tmp")
    if ranks.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        # `save` needs shapes from nobody, `read` those of what its run has not made yet
        shapes = {name: [list(x.shape), str(x.dtype)[6:]] for name, x in tensors.items()}
        with (part / TREE).open("w") as file:
            json.dump([tree, shapes], file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
    ranks.gathered(None)  # the folder is there
    dcp.save(
        {name: x.detach() for name, x in tensors.items()},
        storage_writer=dcp.HuggingFaceStorageWriter(str(part), save_distributed=True),
    )
    ranks.gathered(None)
    if ranks.first:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    ranks.gathered(None)


def read(
    path: Path, current: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], Any]:
    """Tensors and tree; each tensor is placed as the one of that name in `current`.

    The state of an optimizer that has made no step yet is placed as its parameters.
    """
    dcp = _parts()
    tree, shapes = json.loads((path / TREE).read_text())
    into: dict[str, Tensor] = {}
    for name, (shape, dtype) in shapes.items():
        blank = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        like = pattern(name, blank, current, optimizer)
        if like is None:
            into[name] = torch.empty_like(blank, device="cpu")
        else:
            into[name] = torch.empty_like(like, dtype=blank.dtype, requires_grad=False)
    with warnings.catch_warnings():  # that there is one process only
        warnings.simplefilter("ignore")
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    return into, tree


def pattern(
    name: str, x: Tensor, current: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Tensor | None:
    """The tensor as which one of a checkpoint is to be placed, None where there is none."""
    found = current.get(name)
    root, _, rest = name.partition("/optimizer_state/state/")
    number = rest.partition("/")[0]
    if found is None and not root and number.isdigit():
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        found = weights[int(number)] if int(number) < len(weights) else None
    return found if found is not None and found.shape == x.shape else None


def placed_like(x: Tensor, pattern: Tensor | None) -> Tensor:
    """A whole tensor, sharded as `pattern` is: of a checkpoint of one file."""
    if not is_dtensor(pattern):
        return x
    from torch.distributed.tensor import distribute_tensor

    found: Any = pattern
    return distribute_tensor(
        x.to(found.device), found.device_mesh, found.placements, src_data_rank=None
    )


def _parts() -> Any:
    """torch.distributed.checkpoint, where it knows safetensors."""
    dcp: Any = importlib.import_module("torch.distributed.checkpoint")
    if not hasattr(dcp, "HuggingFaceStorageReader"):
        raise ImportError(
            f"checkpoint: shards as safetensors need a newer torch than {torch.__version__}, with "
            "torch.distributed.checkpoint.HuggingFaceStorageReader"
        )
    return dcp
