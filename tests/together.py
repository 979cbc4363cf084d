"""Programs of Triton's interpreter that run together, as those of a GPU do.

The interpreter runs a grid's programs one after the other; one that waits for another would wait
for ever. Here each has a thread, of which one runs at a time and hands over wherever it looks at
what others may have written (a volatile load) or has written itself. Who is next, and the order
that programs are begun in, come from a seed.
"""

from __future__ import annotations

import inspect
import random
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
from triton.runtime import interpreter

PATIENT = 600.0  # seconds until a thread that nobody hands over to gives up


class Together:
    """Runs programs of which at most `resident` are under way at a time."""

    def __init__(self, seed: int, resident: int) -> None:
        self.random, self.resident = random.Random(seed), resident
        self.switches = 0
        self.builder = interpreter.interpreter_builder
        self.turns: dict[int, threading.Semaphore] = {}  # of those under way
        self.current: int | None = None

    def run(self, programs: list[tuple[Any, Callable[[], None]]]) -> None:
        """programs: (grid index, what to do)."""
        self.waiting = list(enumerate(programs))
        self.random.shuffle(self.waiting)
        self.turns, self.error = {}, None
        self.over = threading.Semaphore(0)
        for _ in range(self.resident):
            self._begin()
        self._next()
        assert self.over.acquire(timeout=PATIENT), "nobody has come to an end"
        self.current = None
        if self.error is not None:
            raise self.error

    def _begin(self) -> None:
        if self.waiting:
            number, (index, program) = self.waiting.pop()
            self.turns[number] = threading.Semaphore(0)
            work = threading.Thread(target=self._work, args=(number, index, program), daemon=True)
            work.start()

    def _work(self, number: int, index: Any, program: Callable[[], None]) -> None:
        if not self.turns[number].acquire(timeout=PATIENT):
            self.error = RuntimeError("a program was never given its turn")
            self.over.release()
            return
        self.builder.grid_idx = index
        try:
            program()
        except BaseException as error:
            self.error, self.waiting = error, []
        del self.turns[number]
        self._begin()
        self._next()

    def _next(self) -> None:
        """Hands over to anybody."""
        if self.turns and self.error is None:
            self.current = self.random.choice(sorted(self.turns))
            self.turns[self.current].release()
        else:
            self.over.release()

    def switch(self) -> None:
        """Hands over, and comes back when it is this program's turn again."""
        number, index = self.current, self.builder.grid_idx
        if number is None:
            return
        self.switches += 1
        own = self.turns[number]
        self._next()
        assert own.acquire(timeout=PATIENT), "nobody hands over"
        self.builder.grid_idx = index


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Together]:
    """together(kernel, seed=, resident=): launches of the kernel run that way."""

    def begin(kernel: Any, seed: int = 0, resident: int = 4) -> Together:
        turns, executor, builder = (
            Together(seed, resident),
            interpreter.GridExecutor,
            interpreter.InterpreterBuilder,
        )
        real_init, real_load = executor.__init__, builder.create_masked_load
        real_add = builder.create_atomic_rmw

        def init(self: Any, fn: Any, arg_names: Any, grid: Any, *rest: Any) -> None:
            real_init(self, fn, arg_names, grid, *rest)
            if fn.__name__ == kernel.__name__:
                self.fn = _collected(fn, grid[0], turns)

        def load(self: Any, *args: Any) -> Any:
            out = real_load(self, *args)
            if args[-1]:  # volatile
                turns.switch()
            return out

        def add(self: Any, *args: Any) -> Any:
            out = real_add(self, *args)
            turns.switch()
            return out

        monkeypatch.setattr(executor, "__init__", init)
        monkeypatch.setattr(builder, "create_masked_load", load)
        monkeypatch.setattr(builder, "create_atomic_rmw", add)
        return turns

    return begin


def _collected(fn: Any, programs: int, turns: Together) -> Any:
    """A stand-in for a kernel's function: the last of so many calls runs them all."""
    begun: list[tuple[Any, Callable[[], None]]] = []

    def call(**args: Any) -> None:
        begun.append((turns.builder.grid_idx, lambda: fn(**args)))
        if len(begun) == programs:
            turns.run(begun)

    # the interpreter reads a function's globals and signature
    own = types.FunctionType(call.__code__, fn.__globals__, fn.__name__, None, call.__closure__)
    own.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
    return own
