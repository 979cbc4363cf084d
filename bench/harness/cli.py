"""Progress on the terminal, and parsers of single arguments."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.harness.family import Family
from bench.harness.gate import first_line
from bench.harness.timing import CLOCKS

T = TypeVar("T")


class Progress:
    """What is being done, on stderr: a line that is rewritten, or in a log a line per input."""

    INTERVAL = 0.1

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last = 0.0
        self._said = ""
        self.prefix = ""

    def __call__(self, text: str) -> None:
        step = text.partition(",")[0]
        now = time.perf_counter()
        if not self._live:
            if self._said != self.prefix:
                print(self.prefix, file=sys.stderr, flush=True)
            self._said = self.prefix
        elif step != self._said or now - self._last > self.INTERVAL:
            print(f"\r\033[K{self.prefix}: {text}", end="", file=sys.stderr, flush=True)
            self._said, self._last = step, now

    def clear(self) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._said = ""


def listed(known: Mapping[str, T], what: str) -> Callable[[str], list[T]]:
    """A parser of comma-separated names of a table."""

    def parse(text: str) -> list[T]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{what}: got {name!r}, expected one of {', '.join(known)}"
                )
        if not names:
            raise argparse.ArgumentTypeError(f"{what}: got {text!r}, expected at least one name")
        return [known[name] for name in dict.fromkeys(names)]

    return parse


def shapes(family: Family) -> Callable[[str], list[Any]]:
    """A parser of comma-separated shapes and names of sets of them."""

    def parse(text: str) -> list[Any]:
        found: list[Any] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            match = re.fullmatch(family.shape_sizes, part)
            if part in family.shapes:
                found += family.shapes[part]
            elif match:
                found.append(family.shape(*map(int, match.groups())))
            else:
                raise argparse.ArgumentTypeError(
                    f"shapes: got {part!r}, expected {family.shape_form}, or one of the sets "
                    f"{', '.join(family.shapes)}"
                )
        if not found:
            raise argparse.ArgumentTypeError(f"shapes: got {text!r}, expected at least one shape")
        return found

    return parse


def device(text: str) -> torch.device:
    """A device that torch can use here."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except Exception as error:  # torch raises as many kinds as there are devices
        raise argparse.ArgumentTypeError(
            f"device: got {text!r}, expected one that torch can use here, such as cpu or cuda "
            f"({first_line(error)})"
        ) from None
    if device.type not in ("cpu", "cuda", "xpu"):
        raise argparse.ArgumentTypeError(f"device: got {text!r}, expected cpu, cuda or xpu")
    return device


def positive(kind: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    """A parser of numbers above 0."""

    def parse(text: str) -> Any:
        expected = "a whole number" if kind is int else "a number"
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{what}: got {text!r}, expected {expected} above 0")
        return value

    return parse


def output(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    if not path.parent.is_dir():  # found out before an hour of measuring, not after
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file in a folder that exists")
    return path


def add_common(p: argparse.ArgumentParser, family: Family) -> None:
    """The options that the family shares with others."""
    p.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (see --list)")
    p.add_argument("--list", action="store_true", help="list cases, shapes and providers, and stop")
    if family.shapes:
        sets = f"{family.shape_form.partition(' ')[0]},... or a set: {', '.join(family.shapes)}"
        p.add_argument("--shapes", type=shapes(family), help=sets)
    if family.dtypes:
        known = ",".join(family.dtypes)
        p.add_argument("--dtype", type=listed(family.dtypes, "dtype"), help=known)
    if family.devices:
        p.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ... (default: a GPU)")
    if family.providers:
        names = {name: name for name in family.providers}
        p.add_argument("--providers", type=listed(names, "providers"), help=",".join(names))
    if family.clocks:
        told = "cpu: the time of this process, for a busy machine (default: wall)"
        p.add_argument("--clock", choices=CLOCKS, default="wall", help=told)
    if family.limit is not None:
        told = f"the run fails beyond this (default: {family.limit:g})"
        p.add_argument("--limit", type=float, default=family.limit, help=told)
    p.add_argument("--threads", type=positive(int, "threads"), help="threads of the CPU")
    told = f"time budget of each input (default: {family.seconds:g})"
    p.add_argument("--seconds", type=positive(float, "seconds"), help=told)
    p.add_argument("--toy", action="store_true", help="run everything once at a tiny size")
    p.add_argument("--json", type=output, metavar="FILE", help="write all results as JSON")
    if family.times:
        p.add_argument("--plot", type=output, metavar="FILE", help="draw a picture")


def settle(p: argparse.ArgumentParser, a: argparse.Namespace, family: Family) -> None:
    """Checks what argparse cannot, and fills what was not given."""
    for name in a.cases:
        if name not in family.cases:
            p.error(f"CASE: got {name!r}, expected one of {', '.join(family.cases)}")
    if getattr(a, "plot", None) is not None and importlib.util.find_spec("matplotlib") is None:
        p.error("--plot: got a file, but matplotlib is not installed")
    if getattr(a, "device", None) is None:
        on_gpu = family.devices and torch.cuda.is_available()
        a.device = torch.device("cuda" if on_gpu else "cpu")
    elif a.device.type != "cpu" and a.device.index is not None:
        torch.get_device_module(a.device).set_device(a.device)  # events go to the current one
    family.settle(p, a)
    family.fill(a)
