"""Watches a program: torch's functions, modules, backward, optimizers and schedules."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

import fastkd

from . import losses, places, stored
from .flow import Book, Origin, Part, Run, Site, Term, tensors
from .source import Program


class Stop(BaseException):
    """Enough steps were seen."""


@dataclass
class Backward:
    """One call of backward."""

    site: Site
    parts: tuple[Part, ...]
    mask: int
    grad: bool
    scale: float
    place: Site  # of the call itself, perhaps in a library


@dataclass
class Steps:
    """What an optimizer did."""

    optimizer: Optimizer
    made: Site
    count: int = 0
    soft: int = 0  # steps after a soft term
    moved: int = 0  # steps with a gradient other than 0
    lrs: list[float] = field(default_factory=list)
    site: Site = field(default_factory=lambda: Site("", 0))


@dataclass
class Schedule:
    """A schedule, and how often the optimizer's learning rate was not the schedule's."""

    schedule: Any
    made: Site
    name: str
    told: int = 0
    other: int = 0
    first: float | None = None


class Watch(TorchFunctionMode):
    """Records what the checks ask for; changes no value and no gradient."""

    def __init__(self, program: Program, steps: int | None = 10) -> None:
        super().__init__()
        self.program, self.limit = program, steps
        self.book, self.busy, self.depth = Book(), 0, 0
        self.calls = 0  # of modules
        self.stack: list[tuple[nn.Module, int, int, tuple[Any, ...]]] = []
        self.marks: dict[tuple[str, Site], list[Any]] = defaultdict(lambda: [0, "", ""])
        self.seen: Counter[Site] = Counter()  # losses with two operands at a line
        self.seen_hard: Counter[Site] = Counter()
        self.terms: list[Term] = []
        self.backwards: list[list[Backward]] = [[]]  # of each step
        self.optimizers: dict[int, Steps] = {}
        self.schedules: list[Schedule] = []
        self.fed: dict[int, int] = {}  # of a module's id: the parameters its inputs came from
        self.modules: dict[int, nn.Module] = {}
        self.graded = 0  # bits of parameters seen with a gradient outside of the optimizers
        self.scales: dict[int, float] = {}
        self.items: list[tuple[float, Term]] = []
        self.half: dict[Site, list[float]] = {}
        self.outputs: list[tuple[list[int], Tensor]] = []  # (keys of the inputs, outputs)
        self.inputs: dict[int, Tensor] = {}  # of a model's last call
        self.recent: dict[tuple[int, ...], Tensor] = {}  # the last logits of each model
        self.kept = 0
        self.calls_before = 0  # of modules, before this step
        self.added: list[float] = []  # numbers in sums of losses
        self.labels: Tensor | None = None
        self.agreement: dict[str, Any] = {"batch": 0, "rows": 0}
        self.vocabularies: dict[str, dict[Any, int]] | None = None
        self.roots: dict[int, bool] = {}
        self.given = 0  # parameters said to be trained: of diagnose
        self.grad_mode, self.scale_now, self.stale = True, 0.0, False
        self.runs: list[Run] = []
        self.step_lines: set[Site] = set()
        self.files: set[str] = set()
        self.changed: dict[int, tuple[float, float]] = {}  # a teacher's parameter, first and last
        self.names: dict[int, tuple[str, Site]] = {}
        self.kd_since, self.kd_steps = False, 0
        self.stopped = False

    def optimized(self) -> set[int]:
        """The ids of all parameters in optimizers."""
        held = [g["params"] for s in self.optimizers.values() for g in s.optimizer.param_groups]
        return {id(x) for group in held for x in group}

    # ---- marks

    def terms_at(self, site: Site) -> int:
        """How often a loss was computed at a line."""
        return self.seen[site] or self.seen_hard[site]

    def mark(self, kind: str, site: Site, evidence: str, fix: str = "") -> None:
        entry = self.marks[kind, site]
        entry[0] += 1
        entry[1:] = [entry[1] or evidence, entry[2] or fix]

    # ---- torch's functions

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if self.busy:
            return func(*args, **named)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in ("data", "T", "mT", "H"):
                return func(*args, **named)
        elif name in ("__set__", "size", "dim", "__len__", "is_floating_point", "__hash__"):
            return func(*args, **named)
        self.grad_mode = torch.is_grad_enabled()
        with self._quiet(), torch.no_grad():
            losses.before(self, name, args, named)
        out = func(*args, **named)
        with self._quiet(), torch.no_grad():
            losses.after(self, name, func, args, named, out)
        return out

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without instrumentation; a fault of the doctor's never reaches the program."""
        self.busy += 1
        try:
            yield
        except Exception:
            if os.environ.get("FASTKD_DOCTOR_DEBUG"):
                raise
        finally:
            self.busy -= 1

    # ---- modules

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls += 1
        with self._quiet():
            given = [x for x in tensors((args, kwargs))]
            mask = 0
            for x in given:
                tag = self.book.get(x)
                mask |= tag.mask if tag is not None else 0
            inputs = tuple((id(x), tuple(x.shape), losses.version(x)) for x in given)
            if id(module) not in self.modules:
                self.modules[id(module)] = module
                self.roots[id(module)] = not self.stack
                if mask and not isinstance(module, nn.modules.loss._Loss):
                    if next(module.parameters(), None) is not None:
                        name = self.program.named(module)
                        self.names[id(module)] = (name, self.program.site())
            self.fed[id(module)] = self.fed.get(id(module), 0) | mask
            self.stack.append((module, self.calls, mask, inputs))
            return
        self.stack.append((module, self.calls, 0, ()))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        while self.stack:
            held, call, fed, inputs = self.stack.pop()
            if held is module:
                break
        else:
            return
        with self._quiet(), torch.no_grad():
            losses.left(self, module, Origin(module, call, inputs), fed, args, kwargs, out)

    # ---- training

    def backward(self, loss: Tensor) -> None:
        tag = self.book.get(loss)
        scale = tag.scale if tag is not None else 0.0
        parts = tag.terms if tag is not None else ()
        mask = tag.mask if tag is not None else 0
        grad = loss.requires_grad
        found = Backward(self.program.site(), parts, mask, grad, scale, self.program.place())
        self.backwards[-1].append(found)
        sizes = (abs(p.factor) * p.term.rows / p.columns for p in parts)
        self.scale_now = scale or max(sizes, default=0.0)
        for run in {id(p.term.student.tag.run): p.term.student.tag.run for p in parts}.values():
            if run is not None:
                places.gather(self, run)

    def _made_optimizer(self, optimizer: Optimizer) -> None:
        if id(optimizer) not in self.optimizers:
            self.optimizers[id(optimizer)] = Steps(optimizer, self.program.site())

    def _stepped(self, optimizer: Optimizer) -> None:
        with self._quiet(), torch.no_grad():
            self._made_optimizer(optimizer)
            steps = self.optimizers[id(optimizer)]
            steps.count += 1
            steps.site = self.program.site()
            self.step_lines.update(
                Site(f.f_code.co_filename, f.f_lineno) for f in self.program.frames()
            )
            held = [x for group in optimizer.param_groups for x in group["params"]]
            graded = [x.grad for x in held if x.grad is not None]
            steps.moved += any(bool((x if not x.is_sparse else x._values()).any()) for x in graded)
            steps.lrs.append(float(optimizer.param_groups[0]["lr"]))
            self._scheduled(optimizer)
            self.grade()
            steps.soft += self.kd_since
            if self.kd_since and not self.stale:
                self.kd_steps += 1
            self.stale = True
            self.calls_before = self.calls
            stored.stepped(self)
            self.recent.clear()
            self.backwards.append([])
        if self.limit is not None and self.kd_steps >= self.limit:
            self.stopped = True
            raise Stop

    def grade(self) -> None:
        """Notes which parameters have a gradient."""
        for at, x in enumerate(self.book.parameters):
            if x.is_leaf and x.grad is not None:
                self.graded |= 1 << at

    def _scheduled(self, optimizer: Optimizer) -> None:
        for held in self.schedules:
            told = getattr(held.schedule, "_last_lr", None)
            if held.schedule.optimizer is not optimizer or not told:
                continue
            now = float(optimizer.param_groups[0]["lr"])
            if held.first is None:
                held.first = float(told[0])
            if abs(float(told[0]) - held.first) > 1e-9 * abs(held.first):
                held.told += 1
                held.other += abs(now - float(told[0])) > 1e-6 * max(abs(now), abs(float(told[0])))

    # ---- the patches

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """The program runs within this block."""
        with ExitStack() as stack:
            # the call itself is wrapped: hooks do not see a call that fails
            call = nn.Module._call_impl

            def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if self.busy:
                    return call(module, *args, **kwargs)
                self._enter(module, args, kwargs)
                out: Any = None
                try:
                    out = call(module, *args, **kwargs)
                finally:
                    self._leave(module, args, kwargs, out)
                return out

            self._patch(stack, nn.Module, "_call_impl", called)
            self._patch(stack, Optimizer, "add_param_group", self._grouped())
            self._patch(stack, Optimizer, "zero_grad", self._zeroed())
            for kind in (LRScheduler, ReduceLROnPlateau):
                self._patch(stack, kind, "__init__", self._made_schedule(kind))
            self._patch(stack, torch.amp.GradScaler, "scale", self._scaled())
            core: Any = fastkd.nn
            patched = losses.wrapped(self, core.dispatch.loss)
            self._patch(stack, core.losses, "loss", patched)
            self._patch(stack, core.dispatch, "loss", patched)
            binary: Any = fastkd.binary
            self._patch(stack, binary, "loss", losses.wrapped_binary(self, binary.loss))
            hook = register_optimizer_step_post_hook(lambda o, *_: self._stepped(o))
            stack.callback(hook.remove)
            self._patch(stack, torch, "compile", _uncompiled)
            self._patch(stack, warnings, "showwarning", self._warned())
            self._patch(stack, nn.Module, "compile", lambda *_, **__: None)
            stack.enter_context(self)
            yield self

    def _patch(self, stack: ExitStack, owner: Any, name: str, value: Any) -> None:
        held = vars(owner).get(name)
        setattr(owner, name, value)
        stack.callback(setattr, owner, name, held)

    def _grouped(self) -> Any:
        group = Optimizer.add_param_group

        def add_param_group(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            with self._quiet():
                self._made_optimizer(optimizer)
            return group(optimizer, *args, **kwargs)

        return add_param_group

    def _zeroed(self) -> Any:
        zero = Optimizer.zero_grad

        def zero_grad(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self.backwards[-1]:
                self.backwards.append([])
            return zero(optimizer, *args, **kwargs)

        return zero_grad

    def _made_schedule(self, kind: Any) -> Any:
        init = kind.__init__

        def made(schedule: Any, *args: Any, **kwargs: Any) -> None:
            with self._quiet():
                if all(x.schedule is not schedule for x in self.schedules):
                    name = type(schedule).__name__
                    self.schedules.append(Schedule(schedule, self.program.site(), name))
            init(schedule, *args, **kwargs)

        return made

    def _scaled(self) -> Any:
        scale = torch.amp.GradScaler.scale

        def scaled(scaler: Any, outputs: Any) -> Any:
            found = scale(scaler, outputs)
            if scaler.is_enabled() and isinstance(found, Tensor) and isinstance(outputs, Tensor):
                with self._quiet(), torch.no_grad():
                    tag = self.book.get(outputs)
                    if tag is not None:
                        new = losses.copied(tag)
                        new.scale = float(scaler.get_scale())
                        self.book.put(found, new)
            return found

        return scaled

    def _warned(self) -> Any:
        """Shows a warning at the program's line: the doctor's frames stand between it and torch."""
        show = warnings.showwarning

        def showwarning(
            message: Any, category: Any, filename: str, lineno: int, *to: Any, **named: Any
        ) -> None:
            site = self.program.beyond(filename)
            if site is not None:
                (filename, lineno), to = site, to[:1]  # the text of a line is that of the other
            show(message, category, filename, lineno, *to, **named)

        return showwarning


def _uncompiled(model: Any = None, **_: Any) -> Any:
    """In place of torch.compile: the plain function."""
    return model if model is not None else lambda function: function
