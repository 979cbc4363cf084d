"""What every test stands on: seeds, poisoned allocations and the backends that run here."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # read by triton when it is imported: no import before
    os.environ["TRITON_INTERPRET"] = "0" if os.environ.get("FASTKD_TEST_PTX") else "1"

import pairwise
from common import Backend, require
from progress import Progress

import fastkd

# till all tests are collected; see pytest_collection_finish
gc.disable()

# pytest's plugin, which is off, would hang a handler on 45 loggers twice in each phase of a test.
# Without any, logging adds one of its own that writes to the stream of the test that was first.
logging.getLogger().addHandler(logging.NullHandler())

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from interpreter import hurry

    hurry()

# two threads per tiny tensor cost a hundred times the work where other processes want the cores;
# the tests that are about threads ask for them
torch.set_num_threads(1)

# architectures to compile the Triton kernels for and to execute their PTX as on: tests/ptx
PTX = [arch for arch in os.environ.get("FASTKD_TEST_PTX", "").split(",") if arch]
if PTX:
    importlib.import_module("fastkd.backends.gpu")  # before a test asks for the interpreter


# Triton's interpreter costs a tenth of a second a case: it runs this many of a test's cases, and
# all of them where FASTKD_TEST_ALL=1
INTERPRETED_CASES = 1
# The reference is torch under autograd, held to torch under autograd: it runs one case of so many,
# and of a test of few cases this many.
REFERENCE_SHARE, REFERENCE_CASES = 8, 4


# a test that has not begun by then is skipped: `make gpu` has so many seconds for them
ENDS = time.monotonic() + float(os.environ.get("FASTKD_TEST_SECONDS", "inf"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > ENDS:
        pytest.skip("the seconds of FASTKD_TEST_SECONDS are over")


def pytest_configure(config: pytest.Config) -> None:
    for mark in (
        "not_interpreted: too much work for Triton's interpreter, runs on a GPU",
        f"interpreted(n): n cases run in Triton's interpreter, not {INTERPRETED_CASES}",
    ):
        config.addinivalue_line("markers", mark)
    if "FASTKD_TEST_PROGRESS" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(float(os.environ["FASTKD_TEST_PROGRESS"])))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the cases that a backend does not run (tests/README.md, "What is left out")."""
    if pairwise.ALL:
        return
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        key = item.nodeid.partition("[")[0], _backend_of(item)
        groups.setdefault(key, []).append(item)
    left_out: set[pytest.Item] = set()
    for (_, name), group in groups.items():
        if name == "reference":
            left_out |= set(group) - _sample(
                group, max(REFERENCE_CASES, len(group) // REFERENCE_SHARE)
            )
        if name == "gpu" and not torch.cuda.is_available():
            light = [item for item in group if not item.get_closest_marker("not_interpreted")]
            mark = group[0].get_closest_marker("interpreted")
            left_out |= set(group) - _sample(light, mark.args[0] if mark else INTERPRETED_CASES)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """What the imports and the list of tests have made stays: gc.collect() need not go through it.

    It is a million objects, a second for every collection.
    """
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """So does what a file's tests have left, which is mostly what they have imported."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries count what is left at the end, and say so


def _sample(items: list[pytest.Item], n: int) -> set[pytest.Item]:
    """n of them, the first ones in the order of a hash: along all axes, the same in every run."""

    def order(item: pytest.Item) -> int:
        return zlib.crc32(item.nodeid.rpartition("/")[2].encode())

    return set(sorted(items, key=order)[:n])


def _backend_of(item: pytest.Item) -> str:
    """The backend that a case runs on; "" for one that is not of the tests of backends."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    alone = "gpu" if item.get_closest_marker("interpreted") else ""
    return str(parameters.get("backend", parameters.get("kernels", alone)))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """One seed per test, made of its id: the same in any order and any selection."""
    number = zlib.crc32(request.node.nodeid.partition("::")[2].encode())
    if torch.cuda.is_available():
        torch.manual_seed(number)
    else:  # that one formats and keeps its stack for each kind of device that is not there
        torch.default_generator.manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that fastkd allocates without a value holds NaN: what it forgets to write shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "fastkd" and out.is_floating_point():
                out.fill_(float("nan"))
            return out

        return empty

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=bool(PTX))
def ptx(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Under FASTKD_TEST_PTX every launch is executed as PTX; the architecture by the test's id."""
    from ptx.launcher import on_host

    number = zlib.crc32(request.node.nodeid.rpartition("/")[2].encode())
    with on_host(PTX[number % len(PTX)]) as driver:
        yield driver


@pytest.fixture(params=["reference", "cpu", "gpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend in turn, in force for the test; yields its name and its device."""
    require(request.param)
    on_gpu = request.param == "gpu" and torch.cuda.is_available()
    with fastkd.use_backend(request.param):
        yield Backend(request.param, torch.device("cuda" if on_gpu else "cpu"))


@pytest.fixture(params=["cpu", "gpu"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """As `backend`, without the reference: what only the kernels promise."""
    require(request.param)
    on_gpu = request.param == "gpu" and torch.cuda.is_available()
    with fastkd.use_backend(request.param):
        yield Backend(request.param, torch.device("cuda" if on_gpu else "cpu"))
