"""What the command lines of this package share: progress, and parsers of single arguments."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.providers import first_line

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


def listed(known: dict[str, T], what: str) -> Callable[[str], list[T]]:
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
