"""The table of tiles, and what a launch makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

pytest.importorskip("triton")
from common import imported_anew

import fastkd
from fastkd.backends.gpu import launch, tune
from fastkd.backends.gpu.tune import TABLE, VARIABLE, override, tile

ROOT = Path(fastkd.__file__).parent.parent
WIDTHS = (1, 512, 513, 2048, 2049, 50257, 256000)


@pytest.fixture(autouse=True)
def own_table() -> Any:
    """`tile` keeps what it has answered: nothing of one test's table is left for another."""
    tile.cache_clear()
    yield
    tile.cache_clear()


def test_every_tile_of_the_table() -> None:
    limits = [entry.columns for entry in TABLE]
    assert limits == sorted(limits) and limits[-1] >= 2**31, "a row that no entry takes"
    for entry in TABLE:
        assert entry.bytes & (entry.bytes - 1) == 0 and entry.threads % 64 == 0
        assert entry.bytes % (entry.threads * tune.BYTES_PER_LOAD) == 0, "threads without a load"
    for vocab in WIDTHS:
        for itemsize in (2, 4, 8):
            size = tile(vocab, itemsize)
            assert size.group * itemsize == tune.BYTES_PER_LOAD
            assert size.lanes * size.group * itemsize <= 16384  # never grows with the vocabulary


@pytest.mark.parametrize("text", ["8192", "8192:256:1", "8192:96", "0:256", "a:b", "8:256"])
def test_a_bad_override_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=f"{VARIABLE}: got '{text}', expected bytes:threads as"):
        override(text)


def test_the_override_is_read_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "16384:512")
    tile = imported_anew("fastkd.backends.gpu.tune").tile
    wide = "Tile(lanes=1024, group=8, threads=512)"
    out = f"{tile(10, 2)} {tile(256000, 2)} {tile(256000, 4)}"
    assert out == f"{wide} {wide} {wide.replace('group=8', 'group=4')}"


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device, asked = torch.device("cuda", 7), []

    class Target:
        backend, arch, warp_size = "hip", "gfx942:sramecc+:xnack-", 64

    class Runtime:
        def device(self, which: torch.device) -> Any:
            asked.append(which)
            return launch.nullcontext()

    class Driver:
        class active:
            get_current_target = staticmethod(Target)

    monkeypatch.setattr(torch, "get_device_module", lambda _: Runtime())
    monkeypatch.setattr(launch.triton.runtime, "driver", Driver)
    launch.gpu_info.cache_clear()
    try:
        assert launch.gpu_info(device) == launch.gpu_info(device) == ("gfx942", 64)
        assert asked == [device]
    finally:
        launch.gpu_info.cache_clear()


def test_registers_by_card_and_rows() -> None:
    assert tune.registers("sm_90", 256, True) == 80 < tune.registers("sm_90", 256, False)
    assert tune.registers("sm_100", 256, True) == tune.registers("sm_120", 256, False) == 128
    assert tune.registers("sm_90", 1024, False) == 64  # all that there are
    assert tune.registers("gfx942", 256, True) is None
