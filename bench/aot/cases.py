"""What is compiled: every kernel as the launcher starts it, on tensors without memory.

No list of kernels stands here. Those of `fastkd.backends.gpu` are found, and each is compiled with
the arguments of the pass that launches it; one that no pass launches has no case, and a test says
so.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # and "xpu", by a Triton of its own
DTYPES = ("bf16", "fp32")
PROCESSORS, CACHE = 132, 50 << 20  # of the GPU whose launches are compiled
ROWS, FEW = 8192, 64  # one program to a row, and several
VOCAB, SHORT, ODD = 128256, (512, 2048), 50257  # ODD: divisible by no vector width
NAMED = 64  # columns of a stored teacher
SUFFIX = "_kernel"
WHOLE = ("fused", "cooperative")  # the kernels that are a loss and its gradient


@dataclass
class Case:
    """A kernel (its name without `_kernel`) for one divergence ("-": none), dtype and target.

    hard: with hard labels, whose cross-entropy is taken at T = 1; smooth: and label smoothing.
    """

    kernel: str
    divergence: str
    dtype: str
    target: str
    vocab: int = VOCAB
    hard: bool = True
    smooth: bool = False


@dataclass(frozen=True)
class Launch:
    """What a pass has requested of the launcher."""

    kernel: Any
    args: dict[str, Any]
    threads: int

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix(SUFFIX)

    @property
    def constants(self) -> dict[str, Any]:
        """What it is compiled for, by name."""
        from fastkd.backends.gpu.arguments import constants_of

        return constants_of(self.args)


def kernels() -> set[str]:
    """The names of all kernels that stand in a file of `fastkd.backends.gpu`, without `_kernel`."""
    import fastkd.backends.gpu

    names: set[str] = set()
    for found in pkgutil.iter_modules(fastkd.backends.gpu.__path__):
        module = importlib.import_module(f"fastkd.backends.gpu.{found.name}")
        names |= {
            name.removesuffix(SUFFIX)
            for name, value in vars(module).items()
            if name.endswith(SUFFIX) and _home(value) == module.__name__
        }
    return names


def launches(case: Case, rows: int, entry: str | None = None) -> list[tuple[str, Launch]]:
    """(pass, launch) of each pass, or of one, on `rows` rows, in their order."""
    import torch

    from fastkd.backends.base import LossSpec, Rows, Stats, TopKRows
    from fastkd.backends.gpu import BACKEND, cooperative, launch
    from fastkd.bernoulli import Bernoulli, Flat
    from fastkd.divergence import divergences

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(case.dtype)
    dtype = dtype or torch.float64
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = tensor(1, rows, case.vocab, dtype=dtype)
    keep, label = tensor(rows, dtype=torch.bool), tensor(rows, dtype=torch.int64)
    stats, scale = tensor(rows, 3), tensor(rows)
    hard, smoothing = 0.5 if case.hard else 0.0, 0.1 if case.smooth else 0.0
    name = case.divergence if case.divergence != "-" else next(iter(divergences))
    spec = LossSpec(
        name, divergences[name].param, 2.0, 0.5, hard, smoothing, case.vocab, case.vocab
    )
    named = tensor(rows, NAMED), tensor(rows, NAMED, dtype=torch.int64), tensor(rows)
    rest = spec, Rows(keep, label, scale)
    flat = tensor(rows * case.vocab, dtype=dtype)
    logits = Flat(flat, flat, flat, (-100,), None, None, acc)
    binary = Bernoulli(divergences.kl, 2.0, 0.5, hard)
    passes: dict[str, Callable[[], Any]] = {
        "fused": lambda: BACKEND.fused(x, x, *rest, x),
        "cooperative": lambda: cooperating(lambda: BACKEND.fused(x, x, *rest, x)),
        "topk": lambda: BACKEND.topk(x, TopKRows(*named, False), *rest, x),
        "loss": lambda: BACKEND.loss(x, x, Stats(stats, stats), *rest),
        "grad": lambda: BACKEND.grad(x, x, Stats(stats, stats, stats), tensor(rows, 2), *rest, x),
        "stats": lambda: BACKEND.stats(x, 2.0, case.vocab, keep),
        "total": lambda: BACKEND.total(scale, scale, 1.0),
        "multiply": lambda: BACKEND.multiply(x, tensor()),
        "bernoulli": lambda: BACKEND.bernoulli(binary, logits, tensor(), None, flat, flat, None),
        "count_elements": lambda: BACKEND.count_elements(logits),
    }

    def cooperating(run: Callable[[], Any]) -> None:
        holds = mock.patch.object(cooperative, "HOST", cooperative.Capacity(PROCESSORS, CACHE))
        # what is set for measurements is not what is compiled
        with holds, mock.patch.dict(os.environ, {cooperative.VARIABLE: ""}):
            run()

    seen: list[tuple[str, Launch]] = []
    info = launch.GpuInfo(case.target, 64 if case.target.startswith("gfx") else 32)
    with ExitStack() as stack:
        split_rows = getattr(launch, "split_rows")  # noqa: B009  # not exported
        stack.enter_context(mock.patch.object(split_rows, "HOST_PROCESSORS", PROCESSORS))
        for which, run in passes.items():
            if entry not in (None, which):
                continue

            def record(
                kernel: Any, n: int, args: dict[str, Any], threads: int, *_: Any, of: str = which
            ) -> None:
                seen.append((of, Launch(kernel, args, threads)))

            with mock.patch.multiple(launch, launch=record, gpu_info=lambda device: info):
                run()
    return seen


def _home(value: Any) -> str | None:
    """The module that a jitted function was written in."""
    return getattr(getattr(value, "fn", None), "__module__", None)


@cache
def places() -> dict[str, tuple[str, int, bool]]:
    """Where each kernel is launched first: (pass, rows, whether it takes the divergence).

    js for its second tile loop, which the expectations do without.
    """
    found: dict[str, tuple[str, int, bool]] = {}
    for rows in (ROWS, FEW):
        for entry, seen in launches(Case("", "js", "bf16", "sm_90"), rows):
            place = (
                entry,
                rows,
                bool({"DIVERGENCE", "EXPECTATION"} & seen.constants.keys()),
            )
            found.setdefault(seen.name, place)
    return found


def recorded(case: Case) -> Launch | None:
    """The case's launch; None where its divergence does without the kernel."""
    entry, rows, _ = places()[case.kernel]
    seen = (launch for _, launch in launches(case, rows, entry))
    return next((launch for launch in seen if launch.name == case.kernel), None)


PASSES = ("topk", "loss", "grad")


def _by_turns(kernel: str, divergence: str, divergences: list[str]) -> bool:
    at = divergences.index(divergence) if divergence in divergences else 0
    if kernel in PASSES:
        return PASSES.index(kernel) == at % len(PASSES)
    return kernel != "cooperative" or at % 2 == 0


def cases(quick: bool, targets: list[str], divergences: list[str], dtypes: list[str]) -> list[Case]:
    """Everything, or (quick) each kernel, divergence, dtype and target at least once.

    Of the quick ones each divergence stands in the fused kernel, in every other cooperative one and
    in one of the kernels of a pass: its formulas are the same device functions in all of them.
    """
    bare = [
        (kernel, divergence)
        for kernel, (_, _, paired) in places().items()
        for divergence in (divergences if paired else ["-"])
    ]
    # what a bare divergence and an ordinary distillation cost is what the budgets are about
    variants: list[dict[str, Any]] = [{"hard": False}, {"hard": True}]
    fused = [(k, d, v) for k in WHOLE for d in divergences for v in variants]
    rest: list[tuple[str, str, dict[str, Any]]] = [(k, d, {}) for k, d in bare if k not in WHOLE]
    smooth = [("fused", divergences[0], {"smooth": True})]
    odd = [(k, d, {"vocab": ODD, **v}) for k, d, v in fused]
    odd += [(k, d, {"vocab": ODD}) for k, d, _ in rest if d in ("-", divergences[0])]
    short = [("fused", divergences[0], {"vocab": v}) for v in SHORT]
    first: list[tuple[str, str, dict[str, Any]]] = [("fused", divergences[0], {}) for _ in targets]
    # `cooperative.capacity` knows no other devices
    of = {"cooperative": [name for name in targets if name.startswith("sm_")]}
    if quick:
        # with labels or without, by turns: each divergence of the one kernel as not of the other
        n = len(divergences)
        turns = [x for i, x in enumerate(fused) if (i // 2 % n + i // 2 // n + i) % 2 == 0]
        # the passes over a piece of a row have the divergence of the whole row's: two of them
        pieces = [*divergences[:1], *divergences[2:3], "-"]
        rest = [x for x in rest if not x[0].startswith("split_") or x[1] in pieces]
        picked = [*turns, *rest, *smooth, odd[0], short[0], *first]
        todo = [
            Case(k, d, dtypes[i // len(targets) % len(dtypes)], own[i % len(own)], **v)
            for i, (k, d, v) in enumerate(picked)
            if (own := of.get(k, targets)) and _by_turns(k, d, divergences)
        ]
    else:
        picked = [*fused, *rest, *smooth, *odd, *short]
        todo = [
            Case(k, d, t, a, **v)
            for a in targets
            for t in dtypes
            for k, d, v in picked
            if a in of.get(k, targets)
        ]
    return [case for case in todo if recorded(case) is not None]
