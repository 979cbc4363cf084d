"""The record of a run's steps, its progress bar, and a CSV file of its figures."""

from __future__ import annotations

import csv
import functools
import importlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.arguments.messages import MadeOf

from .serialization import absent

Log = Callable[[dict[str, float], int], None]
REDRAW = 0.2  # seconds between two looks of the bar


def progress_bar(shown: bool = True, over: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar, around what it counts if that is given, with tqdm's options.

    Where it is not shown, or tqdm is not there (one warning), one that counts nothing.
    """
    if shown:
        try:
            return importlib.import_module("tqdm.auto").tqdm(over, **options)
        except ImportError as error:
            _say_once(absent("tqdm.auto", "progress=True", "train", error))
    return _Hidden(() if over is None else over)


@functools.cache
def _say_once(missing: str) -> None:
    warnings.warn(f"no bar is shown: {missing}", UserWarning, stacklevel=4)


class _Hidden:
    """The methods of a tqdm bar, without effect."""

    def __init__(self, over: Iterable[Any]) -> None:
        self._over = over

    def __iter__(self) -> Iterator[Any]:
        return iter(self._over)

    def __enter__(self) -> _Hidden:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, *_: Any) -> None: ...

    def set_postfix(self, *_: Any, **__: Any) -> None: ...

    def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

    def close(self) -> None: ...


class Step(NamedTuple):
    """One optimizer step; `epoch` and `step` (of the whole run) count from 0, `lr` as applied.

    `terms` holds each term's value before its weight; it is empty for a loss that is a function.
    `metrics` holds what terms say beside it, by "NAME/METRIC".
    """

    epoch: int
    step: int
    loss: float
    lr: float
    terms: Mapping[str, float] = {}
    metrics: Mapping[str, float] = {}


class _Unread(NamedTuple):
    epoch: int
    first: int  # of the micro-batches, within the epoch
    last: int
    lr: Any  # a number, or a tensor of one
    samples: int
    values: list[Tensor]


class Record:
    """The steps so far; losses stay on their device until `every` of them are read at once."""

    def __init__(
        self,
        names: Sequence[str],
        first_step: int,
        every: int,
        log: Log | Sequence[Log] | None,
        metrics: Sequence[str] = (),
    ) -> None:
        self.steps: list[Step] = []
        self.names, self.metrics, self.every, self.next = names, metrics, every, first_step
        self._read_to = first_step
        self._unread: list[_Unread] = []
        self._logs = [log] if callable(log) else list(log or ())
        self._since = self._drawn = time.perf_counter()
        self._seen = 0  # samples since the bar's figures were drawn
        self._bar: Any = None

    def draw(self, total: int | None) -> Record:
        """Show a bar from now on, of `total` steps in all."""
        self._bar = progress_bar(total=total, initial=self.next, unit="step")
        return self

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            if self._seen:
                self._draw_figures(time.perf_counter())
            self._bar.close()

    def add(self, *entry: Any) -> None:
        """Note a step before it is taken: the fields of `_Unread`; maybe `read`."""
        self._unread.append(_Unread(*entry))
        if len(self._unread) >= self.every:
            self.read()
        self.next += 1

    def read(self) -> None:
        """Bring values to the host in one sync, and stop at the first that is not finite."""
        if not self._unread:
            return
        tensors = [value for entry in self._unread for value in entry.values]
        flat = torch.stack(tensors).tolist() if len(tensors) > 1 else [tensors[0].item()]
        of_terms = len(self.names)
        width = 1 + of_terms + len(self.metrics)
        for at, entry in enumerate(self._unread):
            loss, *values = flat[at * width : (at + 1) * width]
            terms = dict(zip(self.names, values[:of_terms], strict=True)) if values else {}
            if not (math.isfinite(loss) and all(map(math.isfinite, values[:of_terms]))):
                self._stop(entry, loss, terms)
            metrics = dict(zip(self.metrics, values[of_terms:], strict=True))
            step = Step(entry.epoch, self._read_to, loss, float(entry.lr), terms, metrics)
            self.steps.append(step)
            self._read_to += 1
        if self._logs or self._bar is not None:
            self._show()
        self._unread.clear()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def tell(self, values: dict[str, float]) -> None:
        """Log values that belong to the last step."""
        for log in self._logs:
            log(values, self.next - 1)

    def _show(self) -> None:
        """Tell logs and bar of the steps just read."""
        now = time.perf_counter()
        per_s = sum(entry.samples for entry in self._unread) / max(now - self._since, 1e-9)
        self._since = now
        for step in self.steps[-len(self._unread) :]:
            values = {"loss": step.loss, "lr": step.lr, "samples_per_s": per_s}
            for found in (step.terms, step.metrics):
                values |= {f"term/{name}": value for name, value in found.items()}
            for log in self._logs:
                log(values, step.step)
        self._seen += sum(entry.samples for entry in self._unread)
        if self._bar is not None and now - self._drawn > REDRAW:
            self._draw_figures(now)

    def _draw_figures(self, now: float) -> None:
        last, rate = self.steps[-1], self._seen / max(now - self._drawn, 1e-9)
        shown = {"loss": f"{last.loss:.4g}", "lr": f"{last.lr:.2g}", "samples/s": f"{rate:.0f}"}
        self._bar.set_postfix(shown, epoch=last.epoch, refresh=False)
        self._drawn, self._seen = now, 0

    def _stop(self, entry: _Unread, loss: float, terms: dict[str, float]) -> None:
        several = entry.last > entry.first
        batch = f"batches {entry.first} to {entry.last}" if several else f"batch {entry.first}"
        at = f"at epoch {entry.epoch}, step {self._read_to} (counted from 0), {batch} of the epoch"
        bad = [f"{name!r} = {value}" for name, value in terms.items() if not math.isfinite(value)]
        by = f", by term {', '.join(bad)}" if bad else ""
        raise FloatingPointError(f"loss: got {loss} {at}{by}, expected a finite number")


class CSVLogger(MadeOf):
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
