"""Where a run's figures go: CSV, TensorBoard, a plot. A logger is called as ({name: x}, step)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .logging import Step
from .serialization import needed


class CSVLogger:
    """One row per step, one column per name; a resumed run replaces the rows it makes again.

    Args:
        path: file to write, in an existing folder; one that is there is continued.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._at = -1  # where the last row begins in the file

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        if not self._columns:
            self._continue(step)
        if step == self._row.get("step"):  # more of the same step: its row is written again
            with self.path.open("rb+") as file:
                file.truncate(self._at)
            self._row |= values
        else:
            self._row = {"step": step, **values}
        if new := [name for name in self._row if name not in self._columns]:
            self._rewrite([*self._columns, *new], self._rows())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            self._at = file.tell()
            csv.DictWriter(file, self._columns).writerow(self._row)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _continue(self, step: int) -> None:
        rows = [row for row in self._rows() if (row.get("step") or "").isdecimal()]
        kept = [row for row in rows if int(row["step"]) < step]
        self._rewrite(list(kept[0]) if kept else ["step"], kept)

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        part = self.path.with_name(f".{self.path.name}.tmp")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, self.path)
        self._columns = columns


class TensorBoardLogger:
    """Scalars for TensorBoard; a resumed run hides what it makes again.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._module = needed("torch.utils.tensorboard", "TensorBoardLogger", "track")
        self._writer: Any = None

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = self._module.SummaryWriter(str(self.folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held back."""
        if self._writer is not None:
            self._writer.close()


def read_steps(path: str | os.PathLike[str]) -> list[Step]:
    """The steps in a file of `CSVLogger`; its epochs are not there and read as 0."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("loss")]
    return [
        Step(
            0,
            int(row["step"]),
            float(row["loss"]),
            float(row["lr"]),
            {k.removeprefix("term/"): float(v) for k, v in row.items() if k.startswith("term/")},
        )
        for row in rows
    ]


def plot_curves(
    runs: Mapping[str, Iterable[Step]] | Iterable[Step] | str | os.PathLike[str],
    path: str | os.PathLike[str],
) -> None:
    """Draw loss, its terms and the learning rate over steps.

    Args:
        runs: what `train` returned, several of them by name, or a file of `CSVLogger`, which holds
            the steps before a resumption too.
        path: picture to write; its suffix chooses the format.

    Raises:
        ValueError: no step.
    """
    if isinstance(runs, (str, os.PathLike)):
        runs = read_steps(runs)
    named = runs if isinstance(runs, Mapping) else {"": runs}
    curves = {name: list(steps) for name, steps in named.items()}
    if not any(curves.values()):
        raise ValueError("runs: got no step, expected what train returned")
    terms = any(step.terms for steps in curves.values() for step in steps)
    figure = needed("matplotlib.figure", "plot_curves").Figure(
        figsize=(5 * (2 + terms), 3.6), layout="constrained"
    )
    axes = figure.subplots(1, 2 + terms)
    for run, steps in curves.items():
        at = [step.step for step in steps]
        axes[0].plot(at, [step.loss for step in steps], linewidth=1, label=run or "loss")
        axes[-1].plot(at, [step.lr for step in steps], linewidth=1, label=run or "lr")
        for name in steps[0].terms if steps else ():
            label = f"{run} {name}".strip()
            axes[1].plot(at, [step.terms[name] for step in steps], linewidth=1, label=label)
    titles = ["loss", *(["terms, before their weights"] if terms else []), "learning rate"]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(color="#e5e7eb", linewidth=0.6)
        axis.legend(frameon=False, fontsize="small")
    if all(step.loss > 0 for steps in curves.values() for step in steps):
        axes[0].set_yscale("log")
    figure.savefig(path, dpi=150)
