"""What a case family is: its cases and providers, what is counted, and the options it takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness import table
from bench.harness.machine import machine_line
from bench.harness.measure import Comparison, measure, start_afresh
from bench.harness.result import Group, Result, named, speedup
from bench.harness.timing import MAX_ROUNDS, MIN_ROUNDS, Say, TimingPlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Shape(NamedTuple):
    """Rows, columns, and why the shape is measured."""

    rows: int
    vocab: int
    reason: str = "asked for"

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.vocab}"


class Input(NamedTuple):
    """One input; inputs of one heading share a table."""

    case: str
    dtype: torch.dtype
    shape: Any  # None where the family has no shapes
    heading: str

    @property
    def name(self) -> str:
        parts = (self.case, self.shape and self.shape.label, spelled(self.dtype))
        return " ".join(filter(None, parts))


class Family:
    """Defaults of a case family; a subclass in `bench.families` declares what differs.

    Attributes:
        name, about: as on the command line. legend: what a row says.
        cases, providers: name -> one line for `--list`; default_*: which are run unless asked for.
        shapes: sets of shapes by name: "toy", "cpu" and, where it differs, "gpu"; empty where the
            family takes no `--shapes`. shape_form, shape_sizes: how a shape is written.
        devices, dtypes: what `--device` and `--dtype` may be; empty for neither option.
        clocks: whether `--clock` chooses between wall time and this process's own.
        limit: default of `--limit`; None where the family takes none.
        times: what is timed; the last one is compared. Nothing where the family only counts.
        bases: providers that all are compared with.
        key: name of the table's first column, the input's shape or else the case.
    """

    name = about = legend = ""
    cases: Mapping[str, str] = {}
    default_cases: Sequence[str] = ()
    toy_cases: Sequence[str] = ()
    providers: Mapping[str, str] = {}
    default_providers: Sequence[str] = ()
    toy_providers: Sequence[str] = ()
    shapes: Mapping[str, Sequence[Any]] = {}
    shape_form = "ROWSxVOCAB such as 512x32000"
    shape_sizes = r"([1-9]\d*)x([1-9]\d*)"
    shape: Any = Shape
    devices = False
    dtypes: Mapping[str, torch.dtype] = {}
    default_dtype = gpu_dtype = "float32"
    clocks = False
    limit: float | None = None
    seconds = 10.0
    threads: int | None = None
    rounds = (MIN_ROUNDS, MAX_ROUNDS)
    warm_up = 1
    times: tuple[str, ...] = ("step",)
    bases: tuple[str, ...] = ()
    key = "case"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Options of this family alone."""

    def settle(self, parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
        """Refuses what does not go together, and fills what is not filled by defaults."""

    def fill(self, a: argparse.Namespace) -> None:
        """Fills what was not given."""
        on_gpu = a.device.type != "cpu"
        a.cases = list(dict.fromkeys(a.cases)) or list(
            (self.toy_cases if a.toy else self.default_cases) or self.cases
        )
        if self.shapes:
            best = "toy" if a.toy else "gpu" if on_gpu and "gpu" in self.shapes else "cpu"
            a.shapes = a.shapes or list(self.shapes[best])
        if self.dtypes:
            a.dtype = a.dtype or [DTYPES[self.gpu_dtype if on_gpu else self.default_dtype]]
        if self.providers:
            a.providers = a.providers or list(
                (self.toy_providers if a.toy else self.default_providers) or self.providers
            )
        a.seconds = self.seconds if a.seconds is None else a.seconds

    # ---- measuring

    def inputs(self, a: argparse.Namespace) -> Iterator[Input]:
        """All that is to be measured."""
        for case in a.cases:
            for dtype in getattr(a, "dtype", None) or [torch.float32]:
                for shape in getattr(a, "shapes", None) or [None]:
                    yield Input(case, dtype, shape, self.heading(case, dtype, shape, a))

    def heading(self, case: str, dtype: torch.dtype, shape: Any, a: argparse.Namespace) -> str:
        return f"{case}, {spelled(dtype)}" if self.key == "shape" else self.name

    def comparison(self, one: Input, a: argparse.Namespace) -> Comparison:
        """Everyone who computes one input."""
        raise NotImplementedError

    def finish(self, results: list[Result]) -> None:
        """Adds the figures that follow from the times."""

    def measure(self, one: Input, a: argparse.Namespace, say: Say) -> list[Result]:
        """One input, from nothing to its results; `--toy` runs everything once."""
        start_afresh(a.device)
        say("making its inputs")
        rounds, warm_up = ((1, 1), 0) if a.toy else (self.rounds, self.warm_up)
        results = measure(self.comparison(one, a), TimingPlan(a.seconds, rounds, warm_up), say)
        self.finish(results)
        return results

    # ---- the table

    def counted(self, result: Result) -> dict[str, str]:
        """The last columns of a row."""
        return {}

    def row(self, result: Result, group: Group, times: Sequence[str]) -> dict[str, str]:
        """One provider's row."""
        first = result.input if self.key == "shape" else result.case
        row = {self.key: first, "provider": result.provider}
        for what in times:
            row[f"{what} ms"] = table.ms(result.times.get(what))
        for compared in times[-1:]:
            row["20-80 %"] = table.spread(result.times.get(compared))
            if result.status != "ok":
                row[f"{compared} ms"] = result.status.upper()
        for name in self.bases:
            if base := named(group, name):
                row[f"vs {name}"] = table.times(self.speedup(result, base))
        if any(one.peak_bytes is not None for one in group):
            row["peak extra"] = table.megabytes(result.peak_bytes)
        return row | self.counted(result)

    def speedup(self, result: Result, base: Result) -> float | None:
        return speedup(result, base, self.times[-1])

    def markdown(self, heading: str, groups: Sequence[Group], facts: dict[str, Any]) -> str:
        """One table, the call that it is of, and what there is to say about it."""
        known = {what for group in groups for result in group for what in result.times}
        times = [what for what in self.times if what in known or what in self.times[-1:]]
        shown = [(one, group) for group in groups for one in group if one.status != "skipped"]
        rows = [self.row(result, group, times) for result, group in shown]
        calls = dict.fromkeys(one.call for group in groups for one in group)
        lines = [f"### {heading}", ""]
        lines += [f"`{call}`  " for call in calls if call and len(calls) == 1]
        lines += [machine_line(facts), ""]
        lines += table.table(rows, (self.key, "provider")) if rows else []
        return "\n".join([*lines, *table.notes(groups, facts["cores"]), ""])

    # ---- behind the tables

    def extra(self, groups: Sequence[Group], a: argparse.Namespace) -> str:
        """What is printed behind all tables, before the legend."""
        return ""

    def complaints(self, groups: Sequence[Group], a: argparse.Namespace) -> list[str]:
        """What fails the run beside a wrong or failed result of ours."""
        return []

    def draw(self, groups: Sequence[Group], facts: dict[str, Any], path: Path) -> None:
        """Writes a picture."""
        from bench.harness.plot import draw_bars

        draw_bars(groups, facts, path, self.times[-1], self.bases[:1])
