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
from fastkd.backends.base import LossSpec, Rows
from fastkd.backends.gpu import BACKEND, launch, tune
from fastkd.backends.gpu.tune import TABLE, VARIABLE, Entry, clusters, override, tile

ROOT = Path(fastkd.__file__).parent.parent
WIDTHS = (1, 512, 513, 2048, 2049, 50257, 256000)


@pytest.fixture(autouse=True)
def own_table() -> Any:
    """`tile` keeps what it has answered: nothing of one test's table is left for another."""
    tile.cache_clear()
    yield
    tile.cache_clear()


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("arch", sorted(TABLE))
def test_every_tile_of_the_table(arch: str, itemsize: int) -> None:
    limits = [entry.columns for entry in TABLE[arch][itemsize]]
    assert limits == sorted(limits) and limits[-1] >= 2**31, "a row that no entry takes"
    warp = 64 if arch.startswith("gfx") else 32
    for entry in TABLE[arch][itemsize]:
        assert entry.bytes & (entry.bytes - 1) == 0 and entry.threads % warp == 0
        assert entry.bytes % (entry.threads * tune.BYTES_PER_LOAD) == 0, "threads without a load"
        assert entry.ctas == 1, "no GPU has measured a cluster"
    for vocab in WIDTHS:
        size = tile(vocab, itemsize, arch)
        assert size.group * itemsize == tune.BYTES_PER_LOAD
        assert size.lanes * size.group * itemsize <= 16384  # never grows with the vocabulary


def test_an_unknown_card_takes_the_default() -> None:
    assert tile(50257, 2, "sm_123") == tile(50257, 2, "default") == tile(50257, 2)


@pytest.mark.parametrize("text", ["8192", "8192:256", "8192:256:3", "0:256:1", "a:b:c", "8:256:1"])
def test_a_bad_override_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=f"{VARIABLE}: got '{text}', expected bytes:threads:ctas"):
        override(text)


@pytest.mark.parametrize(
    ("arch", "version", "reason"),
    [
        ("sm_90", "3.9.0", None),
        ("sm_100", "4.0.0", None),
        ("sm_90", "3.10.1+git", None),
        ("sm_90", "3.8.0", "Triton 3.8.0 does not reduce"),
        ("sm_80", "3.9.0", "sm_80 has no clusters"),
        ("gfx942", "3.9.0", "gfx942 has no clusters"),
        ("default", "3.9.0", "default has no clusters"),
    ],
)
def test_where_clusters_work(arch: str, version: str, reason: str | None) -> None:
    said = clusters(arch, version)
    assert said is None if reason is None else said is not None and reason in said


def test_the_override_is_read_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "16384:512:1")
    tile = imported_anew("fastkd.backends.gpu.tune").tile
    out = f"{tile(10, 2, 'sm_90')} {tile(256000, 2, 'sm_90')} {tile(256000, 4, 'gfx942')}"
    wide = "Tile(lanes=1024, group=8, threads=512, ctas=1)"
    assert out == f"{wide} {wide} {wide.replace('group=8', 'group=4')}"


def _launched(monkeypatch: pytest.MonkeyPatch, arch: str, refused: str | None) -> list[Any]:
    """(kernel's name, its LANES, its num_ctas) of a dense and of a top-k loss on `arch`."""
    seen: list[Any] = []

    def record(kernel: Any, n: int, args: dict[str, Any], *_: Any) -> None:
        seen.append((kernel.__name__, args["LANES"], args.get("num_ctas")))

    monkeypatch.setattr(launch, "launch", record)
    monkeypatch.setattr(launch, "gpu_info", lambda device: launch.GpuInfo(arch, 32))
    monkeypatch.setattr(tune, "OVERRIDE", Entry(tune.ANY, 8192, 256, 4))
    monkeypatch.setattr(tune, "clusters", lambda arch: refused)
    x = torch.zeros(1, 2, 64)
    spec = LossSpec("kl", 0.0, 1.0, 1.0, 0.0, 0.0, 64, 64)
    BACKEND.fused(x, x, spec, Rows(), None)
    named = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    BACKEND.topk(x, fastkd.backends.base.TopKRows(*named, None, False), spec, Rows(), None)
    return seen


def test_a_cluster_takes_a_tile_as_many_times_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never the top-k kernel, whose barrier holds back one block only."""
    assert _launched(monkeypatch, "sm_90", None) == [
        ("fused_kernel", 2048, 4),
        ("topk_kernel", 512, None),
    ]


def test_a_cluster_that_cannot_work_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(lanes, ctas) for _, lanes, ctas in _launched(monkeypatch, "sm_80", "none")] == [
        (512, None),
        (512, None),
    ]


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
