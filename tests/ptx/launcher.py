"""Stands in for the driver: launches of CPU tensors are compiled for a GPU and executed here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.aot.build import build, flat
from bench.aot.cases import Launch
from ptx.machine import execute
from ptx.memory import Global
from ptx.parser import Program, parse

VARIABLE = "FASTKD_TEST_PTX"  # the architecture: sm_80, sm_90, sm_100


@dataclass
class Run:
    """What one launch has done."""

    kernel: str
    programs: int
    args: dict[str, Any]
    counts: Counter[str]  # instructions of a warp, by opcode
    memory: Global


@dataclass
class Driver:
    """Executes launches for one architecture.

    processors, cache: what the launcher is told of the GPU, by which it splits rows and has
        programs cooperate; 0: neither.
    """

    arch: str
    processors: int = 0
    cache: int = 0
    seed: int = 0
    resident: int = 8
    runs: list[Run] = field(default_factory=list)
    edit: Callable[[str], str] = str  # of the PTX, to plant a fault

    def launch(
        self, kernel: Any, programs: int, args: dict[str, Any], threads: int, device: Any
    ) -> None:
        program, shared, values = compiled(Launch(kernel, args, threads), self.arch, self.edit)
        tensors = {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}
        memory = Global(tensors)
        named = zip(program.params, list(values.values()), strict=False)
        params = {name: bits(value, kind, memory) for (kind, name), value in named}
        # Triton's own, for scratch memory that no kernel here takes
        params.update({name: 0 for _, name in program.params[len(values) :]})
        counts = execute(program, memory, params, programs, shared, self.seed, self.resident)
        memory.write_back()
        self.runs.append(Run(kernel.__name__, programs, args, counts, memory))


def bits(value: Any, kind: str, memory: Global) -> int:
    """An argument as the driver hands it over."""
    if isinstance(value, torch.Tensor):
        return memory.address(value)
    if kind == "f64":
        return int(np.float64(value).view(np.uint64))
    if kind == "f32":
        return int(np.float32(value).view(np.uint32))
    return int(value)


_known: dict[Any, tuple[Program, int, list[str]]] = {}


def compiled(
    launch: Launch, arch: str, edit: Callable[[str], str]
) -> tuple[Program, int, dict[str, Any]]:
    """(program, bytes of shared memory, arguments) of a launch; compiled once."""

    args = flat(launch)
    constant = {p.name for p in launch.kernel.params if p.is_constexpr}

    def of(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if name in constant or not isinstance(value, (int, float)):
            return getattr(value, "__name__", str(value))
        if isinstance(value, int):
            return value if value == 1 else (value % 16 == 0, -(1 << 31) <= value < 1 << 31)
        return type(value)

    seen = [(name, of(name, value)) for name, value in args.items()]
    seen.append(("maxnreg", launch.args.get("maxnreg")))
    key = launch.kernel.__name__, arch, launch.threads, tuple(seen), edit
    if key not in _known:
        with without_machine_code():
            built = build(launch, arch)
        _known[key] = parse(edit(built.asm["ptx"])), built.shared, list(built.values)
    program, shared, names = _known[key]
    return program, shared, {name: args[name] for name in names}


@contextmanager
def without_machine_code() -> Iterator[None]:
    """Triton stops at the PTX, without lines of the source, and keeps it apart in its cache."""
    from triton import knobs

    def hook(*args: Any) -> Any:
        if not args:
            return "ptx only, no lines", "ptx only, no lines"
        args[1]["cubin"] = lambda source, metadata: b""

    with (
        mock.patch.object(knobs.runtime, "add_stages_inspection_hook", hook),
        mock.patch.object(knobs.compilation, "disable_line_info", True),  # 5% of compiling
    ):
        yield


@contextmanager
def on_host(arch: str, **of_driver: Any) -> Iterator[Driver]:
    """Within, the backend "gpu" takes CPU tensors, and its launches are executed here."""
    from fastkd.backends import choice
    from fastkd.backends.gpu import cooperative, launch, split_rows

    driver = Driver(arch, **of_driver)
    info = launch.GpuInfo(arch, 32)
    holds = cooperative.Capacity(driver.processors, driver.cache) if driver.cache else None
    with (
        mock.patch.multiple(launch, launch=driver.launch, gpu_info=lambda device: info),
        mock.patch.object(choice, "interpreted", lambda: True),
        mock.patch.object(cooperative, "HOST", holds),
        mock.patch.object(split_rows, "HOST_PROCESSORS", driver.processors),
    ):
        yield driver


def requested() -> str | None:
    """The architecture that this run of the tests is for; None: Triton's interpreter."""
    return os.environ.get(VARIABLE) or None
