"""Files that appear complete or not at all: safetensors with JSON in the header."""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .batch import bare_names, bare_state
from .distributed import full_tensor
from .sharded_checkpoint import placed_like

WRAPPER = "module."  # DataParallel's and DistributedDataParallel's, in front of every name
# what pip calls the module of another name
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
# what the module imports once it is called
LATE = {"safetensors.torch": ("numpy",), "pyarrow": ("numpy",)}


def save(model: nn.Module, path: str | os.PathLike[str], metadata: Any = None) -> None:
    """Write a model's state as safetensors, with `metadata` as JSON in its header.

    The file appears complete or not at all; one that was there stays until then. Names are those of
    the bare model, whatever wraps it or a part of it (torch.compile, DataParallel,
    DistributedDataParallel). Of one in shards (`fully_shard`) whole tensors are written, for which
    all ranks have to call.

    Args:
        model: module whose state dict holds tensors only; tied weights are written once per name.
        path: file to write, in an existing folder.
        metadata: anything JSON can hold (NaN and infinity it cannot).

    Raises:
        TypeError, ValueError: metadata or a state that the format cannot hold.
    """
    save_state({name: full_tensor(x) for name, x in bare_state(model).items()}, path, metadata)


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str], metadata: Any) -> None:
    """`save` of a state dict."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: got {type(value).__name__} as {name!r}, expected a tensor")
        if value.is_quantized:
            raise TypeError(f"model: got {value.dtype} as {name!r}, which safetensors cannot hold")
    write(path, state, metadata, "save")


def load(model: nn.Module, path: str | os.PathLike[str]) -> Any:
    """Read a safetensors file into `model` and return its metadata (None in a file not by `save`).

    Args:
        model: module with exactly the names and shapes of the file, wrapped or not, as the one that
            was saved may have been; keeps its dtypes, its device and its shards.
        path: file to read.

    Raises:
        ValueError: names or shapes differ (a prefix of all names is named); the model is untouched
            then.
    """
    state, metadata = read(path, "load")
    model_state = model.state_dict()
    names = bare_names(model, model_state)
    expected = {names[name]: x for name, x in model_state.items()}
    if state.keys() != expected.keys():  # of a model some parts of which were compiled
        state = {name.replace("_orig_mod.", ""): x for name, x in state.items()}
    while state and not state.keys() & expected.keys():
        if not all(name.startswith(WRAPPER) for name in state):
            break
        state = {name.removeprefix(WRAPPER): x for name, x in state.items()}
    _same_prefix(state, expected, path)
    same_shapes(state, expected, f"path: got {path} with")
    model.load_state_dict(
        {name: placed_like(state[names[name]], x) for name, x in model_state.items()}
    )
    return metadata


def _same_prefix(
    file_names: Mapping[str, Tensor],
    model_names: Mapping[str, Tensor],
    path: str | os.PathLike[str],
) -> None:
    """ValueError where all names of one side are those of the other behind a prefix."""
    for longer, shorter, model_is_longer in (
        (file_names, model_names, False),
        (model_names, file_names, True),
    ):
        one = next(iter(shorter), None)
        if one is None or len(longer) != len(shorter):
            return
        for name in longer:
            prefix = name.removesuffix(one)
            if prefix == name or not prefix or {prefix + x for x in shorter} != longer.keys():
                continue
            got, expected = (one, name) if model_is_longer else (name, one)
            part = prefix.removesuffix(".")
            hint = (
                f"load into its part {part!r}"
                if model_is_longer
                else f"load into a module with it as {part!r}"
            )
            where = "the model's" if model_is_longer else "the file's"
            raise ValueError(
                f"path: got {path} with {got!r}, expected {expected!r}: all of {where} names begin "
                f"with {prefix!r}; load into {hint}"
            )


def same_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], got: str) -> None:
    """ValueError, beginning with `got`, at the first name or shape that differs."""
    shapes = [
        {name: tuple(getattr(x, "shape", ())) for name, x in side.items()}
        for side in (found, expected)
    ]
    for name in sorted(shapes[0] | shapes[1]):
        if (found_shape := shapes[0].get(name)) != (expected_shape := shapes[1].get(name)):
            raise ValueError(f"{got} {name!r} of shape {found_shape}, expected {expected_shape}")


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Any, user: str
) -> None:
    """Tensors and JSON, in a file that appears complete or not at all."""
    header = {"format": "pt", "fastkd": json.dumps(metadata, allow_nan=False)}
    # copies: safetensors takes no two tensors of one storage, such as tied weights
    state = {n: x.detach().to("cpu", copy=True).contiguous() for n, x in tensors.items()}
    with appearing(Path(path)) as part:
        part.touch()
        mode = part.stat().st_mode
        needed("safetensors.torch", user).save_file(state, part, metadata=header)
        part.chmod(mode)  # safetensors may make the file its owner's alone, whatever the umask


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; flushed to the disk and renamed at the end, else removed."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the bytes
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
            with suppress(OSError):  # the file is there; some network disks sync no folders
                folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
                os.fsync(folder)
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], user: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata of a file that `write` wrote; metadata is None in other files."""
    with needed("safetensors", user).safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        header = file.metadata() or {}
    return state, json.loads(header.get("fastkd", "null"))


def in_lines(value: Any, depth: int = 2) -> str:
    """JSON with a line for each entry of a document, and for each entry of those."""
    if not depth or not value or not isinstance(value, (list, dict)):
        return json.dumps(value)
    if isinstance(value, list):
        return "[\n" + ",\n".join(in_lines(x, depth - 1) for x in value) + "\n]"
    entries = (f"{json.dumps(str(name))}: {in_lines(x, depth - 1)}" for name, x in value.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def needed(module: str, user: str, extra: str = "train") -> Any:
    """An optional module, or an ImportError that names what needs it and how to get it."""
    try:
        found = importlib.import_module(module)
        for late in LATE.get(module, ()):
            importlib.import_module(late)
        return found
    except ImportError as error:
        raise ImportError(absent(module, user, extra, error)) from error


def absent(module: str, user: str, extra: str, error: ImportError | None = None) -> str:
    """The message where an optional module does not import.

    fastkd is on no package index: its extras are installed from its checkout.
    """
    package, why = module.partition(".")[0], ""
    if error is not None and error.name not in (module, package):
        why = f" ({error})"  # it is there, and what it imports is not
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
    return (
        f"{user} needs {module}{why}: pip install '.[{extra}]' in fastkd's checkout, or "
        f"pip install {PACKAGES.get(package, package)}"
    )


def array(x: Tensor, user: str) -> Any:
    """The NumPy array of a tensor's memory; without NumPy, the ImportError of `needed`."""
    needed("numpy", user)
    return x.numpy()
