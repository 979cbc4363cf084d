"""What every test stands on: seeds, poisoned allocations and the backends that run here."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

import common
from common import INPUTS, PAIRS, Backend, require

import fastkd

# two threads per tiny tensor cost a hundred times the work where other processes want the cores;
# the tests that are about threads ask for them
torch.set_num_threads(1)


# Triton's interpreter costs a tenth of a second a case: it runs this many of a test's cases, and
# all of them where FASTKD_TEST_ALL=1
INTERPRETED_CASES = 2


def pytest_configure(config: pytest.Config) -> None:
    for mark in (
        "not_interpreted: too much work for Triton's interpreter, runs on a GPU",
        f"interpreted(n): n cases run in Triton's interpreter, not {INTERPRETED_CASES}",
    ):
        config.addinivalue_line("markers", mark)


# A linear form runs these of the large tests' cases: what it adds does not depend on the rest.
FORM_PAIRS = [PAIRS[name] for name in ("fp32", "bf16", "bf16-fp32")]
FORM_INPUTS = [INPUTS[name] for name in ("random", "equal", "large")]


def _of_another_form(item: pytest.Item) -> bool:
    """Left out: a case of a linear form that is not among those above."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or callspec.params.get("form", "dense") == "dense":
        return False
    pair, make = callspec.params.get("pair"), callspec.params.get("make")
    if make in INPUTS.values() and make not in FORM_INPUTS:
        return True
    return pair is not None and pair not in FORM_PAIRS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not _of_another_form(item)]
    if torch.cuda.is_available() or os.environ.get("FASTKD_TEST_ALL") == "1":
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if _is_gpu(item):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for group in groups.values():
        light = [item for item in group if not item.get_closest_marker("not_interpreted")]
        mark = group[0].get_closest_marker("interpreted")
        # in the order of a hash: a sample along all axes, the same one every time
        light.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        left_out |= set(group) - set(light[: mark.args[0] if mark else INTERPRETED_CASES])
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _is_gpu(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    names = ("backend", "kernels")
    return callspec is not None and any(callspec.params.get(name) == "gpu" for name in names)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """One seed per test, made of its id: the same in any order and any selection."""
    number = zlib.crc32(request.node.nodeid.partition("::")[2].encode())
    torch.manual_seed(number)
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


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the operands are given (common.FORMS), in force for what calls `differentiate`."""
    monkeypatch.setattr(common, "form_in_force", request.param)
    return str(request.param)
