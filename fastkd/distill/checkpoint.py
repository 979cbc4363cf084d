"""Checkpoints of a run: safetensors and JSON, everything that an exact resume needs."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.arguments.messages import MadeOf, shown

from . import sharded_checkpoint
from .batch import Batch, bare_state, batches, load_bare_state, unwrap
from .distributed import Ranks, full_tensor, local
from .objective import Objective
from .rng_state import generators, random_state, set_random_state
from .schedules import Rates
from .serialization import read, same_shapes, save_state, write
from .teachers import Teacher

FORMAT = 1


@dataclasses.dataclass
class Position:
    """Where a run is: the next step, its epoch, batches of the epoch already used, best metric."""

    epoch: int = 0
    step: int = 0
    used: int = 0
    best: float | None = None
    epoch_start: Any = None  # random_state before the loader gave the epoch its order
    now: Any = None  # random_state of a run that was resumed


@dataclasses.dataclass
class Parts:
    """The parts of a run that a checkpoint holds, besides position and random numbers."""

    student: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    rates: Rates
    teacher: Teacher
    average: Teacher | None
    scaler: Any
    loader: Any
    device: torch.device
    ranks: Ranks
    accumulate: int


class Checkpoints(MadeOf):
    """A folder of checkpoints, `step-00000120.safetensors` after 120 steps.

    Each is written under a temporary name and renamed, so a kill at any moment leaves the one
    before. `best.safetensors` is the student (for `load`) at the best metric so far. A resumed run
    ends in the bits of one that was never interrupted, on the CPU: models, what terms learn,
    optimizer, random numbers (python, numpy, torch, the loader's generators), place in the epoch
    (batches already used are drawn again and left out), average and best metric are all in it.

    Several ranks share one folder, which all of them see. A model that each rank has whole is
    written by the first; of one in shards (`fully_shard`) each rank writes its own, to
    `step-00000120/`. Either is read on any number of ranks: the global batch of a step must stay
    the same (by the loader's batches, or by `accumulate`), and ranks that are new take the random
    numbers of the first.

    Args:
        folder: made if missing.
        every: steps between two; the end of training makes one more.
        keep: how many of the newest stay, at least 1.
        resume: go on from the newest; False refuses a folder that has one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 500,
        keep: int = 2,
        resume: bool = False,
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name}: got {shown(value)}, expected an integer >= 1")
        self.folder, self.every, self.keep, self.resume = Path(folder), every, keep, resume

    def files(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(p for p in found if re.fullmatch(r"step-\d+(\.safetensors)?", p.name))

    def start(self, parts: Parts) -> Position:
        """The position to begin at, with the parts restored where there is a checkpoint."""
        self._identity = parts.teacher.identity()
        if parts.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(".*.tmp"):  # of a run that was killed
                _remove(part)
        files = parts.ranks.gathered(self.files() if parts.ranks.first else None)[0]
        if not files:
            return Position()
        if not self.resume:
            raise ValueError(
                f"checkpoint: got {self.folder}, which has {files[-1].name}; expected "
                f"distill.Checkpoints({str(self.folder)!r:.200}, resume=True) to go on from there, "
                "or another folder"
            )
        for path in reversed(files):
            try:
                tree = self._read(path, parts)
            except ImportError:
                raise
            except Exception as error:  # a damaged disk, not a kill: those leave no such file
                warnings.warn(f"checkpoint: {path} cannot be read ({error})", stacklevel=3)
                continue
            return self._restore(path, tree, parts)
        raise ValueError(f"checkpoint: got {len(files)} files in {self.folder}, none can be read")

    def _read(self, path: Path, parts: Parts) -> Any:
        """The tree of a checkpoint, its tensors placed as the parts' own."""
        current: dict[str, Tensor] = {}
        if parts.ranks.sharded or path.is_dir():
            pack(self._tree(Position(), parts), current)
        if path.is_dir():
            tensors, tree = sharded_checkpoint.read(path, current, parts.optimizer)
        else:
            tensors, tree = read(path, "resume")
            if parts.ranks.sharded:
                tensors = {
                    name: sharded_checkpoint.placed_like(
                        x, sharded_checkpoint.pattern(name, x, current, parts.optimizer)
                    )
                    for name, x in tensors.items()
                }
        return unpack(tree, tensors)

    def write(self, position: Position, parts: Parts) -> None:
        """Write one, then remove those beyond `keep`."""
        ranks, bare = parts.ranks, unwrap(parts.student)
        own = {name: local(value) for name, value in bare.named_parameters()}
        bad = [name for name, value in own.items() if not torch.isfinite(value).all()]
        if bad := next(filter(None, ranks.gathered(bad)), []):  # one that sees it stops all
            raise FloatingPointError(
                f"student: {bad[0]!r} is not finite after step {position.step - 1}; the "
                f"checkpoint before stays: {[path.name for path in self.files()][-1:]}"
            )
        tree = self._tree(position, parts)
        tensors: dict[str, Tensor] = {}
        path = self.folder / f"step-{position.step:08d}"
        packed = pack(tree, tensors)
        if ranks.sharded:
            sharded_checkpoint.write(path, tensors, packed, ranks)
        elif ranks.first:
            write(path.with_suffix(".safetensors"), tensors, packed, "checkpoint")
        if ranks.first:
            for old in self.files()[: -self.keep]:
                _remove(old)

    def _tree(self, position: Position, parts: Parts) -> dict[str, Any]:
        now = random_state(parts.loader, parts.device)
        drawn = parts.ranks.gathered({"now": now, "epoch_start": position.epoch_start})
        return {
            "format": FORMAT,
            "position": vars(position) | drawn[0],  # of all ranks the same: one of them writes it
            "ranks": {"others": drawn[1:], "accumulate": parts.accumulate},
            "student": bare_state(parts.student),
            "terms": parts.objective.names,
            "modules": bare_state(parts.objective.modules),
            "optimizer": type(parts.optimizer).__name__,
            "optimizer_state": parts.optimizer.state_dict(),
            "rates": parts.rates.base(),
            "scaler": parts.scaler.state_dict(),
            "teacher": self._identity,
            "teacher_state": parts.teacher.state_dict(),
            "average": None if parts.average is None else parts.average.state_dict(),
        }

    def write_best(self, parts: Parts, metric: float, step: int) -> None:
        state = {name: full_tensor(x) for name, x in bare_state(parts.student).items()}
        if parts.ranks.first:
            save_state(state, self.folder / "best.safetensors", {"metric": metric, "step": step})

    def _restore(self, path: Path, tree: dict[str, Any], parts: Parts) -> Position:
        """Check everything, then load everything: an error leaves all parts as they were."""
        student, modules = parts.student, parts.objective.modules
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ValueError(f"checkpoint: got {path}, expected a checkpoint of format {FORMAT}")
        got = f"checkpoint: got {path} with"
        same_shapes(tree["student"], bare_state(student), got + " the student's")
        current = {
            "terms": parts.objective.names,
            "teacher": self._identity,
            "optimizer": type(parts.optimizer).__name__,
        }
        for name, value in current.items():
            saved, expected = (unpack(pack(x, {}), {}) for x in (tree[name], value))
            if saved != expected:
                hint = ""
                if name == "teacher" and None not in (saved, expected):
                    hint = "; a teacher whose weights were trained or drawn anew is another one: "
                    hint += "give the first run's weights (its seed), or another folder"
                raise ValueError(f"{got} {name} {shown(saved)}, expected {shown(expected)}{hint}")
        same_shapes(tree["modules"], bare_state(modules), got + " the terms'")
        groups = tree["optimizer_state"]["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        own_sizes = [len(group["params"]) for group in parts.optimizer.param_groups]
        if sizes != own_sizes:
            raise ValueError(
                f"{got} {sizes} parameters in the optimizer's groups, expected {own_sizes}"
            )
        if (tree["average"] is None) != (parts.average is None):
            saved = "no average" if tree["average"] is None else "an average"
            raise ValueError(f"{got} {saved} of the student, expected the other (ema=)")

        drawn, ready = len(tree["position"]["now"]["loader"]), len(generators(parts.loader))
        if drawn != ready:
            raise ValueError(f"{got} a loader of {drawn} random generators, expected {ready}")

        load_bare_state(student, tree["student"])
        load_bare_state(modules, tree["modules"])
        parts.optimizer.load_state_dict(tree["optimizer_state"])
        parts.rates.restore(tree["rates"])
        parts.scaler.load_state_dict(tree["scaler"])
        parts.teacher.load_state_dict(tree["teacher_state"])
        if parts.average is not None:
            parts.average.load_state_dict(tree["average"])
        return self._position(path, tree, parts)

    def _position(self, path: Path, tree: dict[str, Any], parts: Parts) -> Position:
        """Where the run goes on, and with which random numbers: this rank's, else the first's."""
        position = Position(**tree["position"])
        before = tree.get("ranks", {"others": [], "accumulate": parts.accumulate})
        others, rank = before["others"], parts.ranks.rank
        if 1 <= rank <= len(others):
            position = dataclasses.replace(position, **others[rank - 1])
        if parts.ranks.size != 1 + len(others):  # the same steps, in other batches or more of them
            steps, rest = divmod(position.used, before["accumulate"])
            if rest:
                raise ValueError(
                    f"checkpoint: got {path} of {1 + len(others)} ranks at the end of an epoch's "
                    "short step, expected one between whole steps on another number of ranks"
                )
            position.used = steps * parts.accumulate
        return position


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def epoch_batches(
    loader: Any, position: Position, device: torch.device, *, exact: bool
) -> Iterator[Batch]:
    """The epoch's batches from `position` on; `exact`: as in a run that was never interrupted."""
    when = f"in epoch {position.epoch}"
    if not exact:
        return batches(loader, when)

    def catch_up() -> None:
        if position.now is not None:
            set_random_state(position.now, loader, device)
            position.now = None

    if position.now is None or not position.used:
        catch_up()
        position.epoch_start = random_state(loader, device)
    else:  # the order is drawn once more, what was used is left out, then time goes on
        set_random_state(position.epoch_start, loader, device)
    return batches(loader, when, position.used, catch_up)


def pack(tree: Any, tensors: dict[str, Tensor], at: str = "") -> Any:
    """`tree` as JSON; its tensors go into `tensors` under the path to them."""
    if isinstance(tree, Tensor):
        while at in tensors:  # a name may hold the separator
            at += "'"
        tensors[at] = tree
        return {"tensor": at}
    if isinstance(tree, Mapping):
        pairs = [[key, pack(value, tensors, f"{at}/{key}")] for key, value in tree.items()]
        return {"dict": pairs}
    if isinstance(tree, (list, tuple)):
        parts = [pack(value, tensors, f"{at}/{i}") for i, value in enumerate(tree)]
        return {"tuple": parts} if isinstance(tree, tuple) else parts
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"checkpoint: got {type(tree).__name__} at {shown(at)}, expected tensors and JSON"
    )


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `pack`."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, value),) = tree.items()
    if tag == "tensor":
        return tensors[value]
    if tag == "tuple":
        return tuple(unpack(part, tensors) for part in value)
    return {key: unpack(part, tensors) for key, part in value}
