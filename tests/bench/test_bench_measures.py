"""How the benchmark measures: its arithmetic, the turns of its providers, time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_runs import CPU, KL, silent, spoil

from bench.families import losses
from bench.families.loss_cases import TOY_SHAPE
from bench.families.loss_providers import PROVIDERS, Call
from bench.families.losses import Bench, calls_at_once, comparison, count_bandwidth
from bench.harness import table
from bench.harness.family import Shape
from bench.harness.machine import machine
from bench.harness.measure import measure
from bench.harness.result import Result, overhead, speedup
from bench.harness.timing import (
    Clock,
    Neighbours,
    Summary,
    TimingPlan,
    cores,
    percentile,
    summarise,
)
from fastkd.demo import memory


def result_of(provider: str, milliseconds: float, runs: int = 10) -> Result:
    time = Summary(milliseconds, milliseconds, milliseconds, runs)
    figures = {"logits_bytes": 4_000_000, "floor_bytes": {"training": 12_000_000}}
    return Result(
        "c", "", "1x1", "float32", provider, times={losses.TRAINING: time}, figures=figures
    )


def test_bandwidth_speedup_and_overhead() -> None:
    assert summarise([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Summary(3.5, 2.0, 5.0, 6)
    assert [percentile([10.0, 20.0], share) for share in (0.0, 0.25, 1.0)] == [10.0, 12.5, 20.0]
    ours, copy = result_of("fastkd", 2.0), result_of(losses.COPY, 1.0)
    count_bandwidth([ours, copy])
    assert ours.figures["gb_s"] == pytest.approx(6.0)  # 3 streams of 4 MB in 2 ms
    assert copy.figures["gb_s"] == pytest.approx(8.0)  # 2 streams of 4 MB in 1 ms
    assert ours.figures["copy_share"] == pytest.approx(0.75)
    eager = result_of("eager", 30.0)
    assert speedup(ours, eager, losses.TRAINING) == pytest.approx(15.0)
    assert speedup(result_of("fastkd", 2.0, runs=1), eager, losses.TRAINING) is None
    ours.samples, eager.samples = {"x": [3.0, 2.0, 4.0]}, {"x": [2.0, 2.0, 2.0]}
    assert overhead(ours, eager, "x")["overhead"] == pytest.approx(0.5)


def test_a_busy_machine_is_told() -> None:
    facts = {**machine(CPU), "cores": 4}
    for others, told in ((None, False), (0.1, False), (3.0, True)):
        eager = result_of("eager", 30.0)
        eager.others_cores = others
        text = "\n".join(table.notes([[eager]], facts["cores"]))
        assert ("UNRELIABLE at 1x1: others used 3.0 of the 4 cores" in text) is told
    with Neighbours(CPU) as neighbours:
        time.sleep(Neighbours.LEAST_SECONDS + 0.1)
    assert neighbours.cores is None or 0 <= neighbours.cores <= 1.2 * len(cores())


@pytest.mark.parametrize("at_once", [False, True], ids=["one", "many-at-once"])
def test_rounds_interleave_and_stop_at_the_budget(
    at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_at_once(TOY_SHAPE, torch.float32, CPU) if at_once else 1
    order: list[str] = []

    def noting(name: str) -> Callable[[Call], Call]:
        return lambda call: lambda s, t, labels: order.append(name) or call(s, t, labels)  # type: ignore[func-returns-value]

    names = ("eager", "fastkd")
    for name in names:
        spoil(monkeypatch, name, noting(name))
    bench = Bench(KL, TOY_SHAPE, torch.float32, CPU, calls)
    of = comparison(bench, names, with_forward=False)
    results = measure(of, TimingPlan(1e-9, (3, 50), 1), silent)
    expected = [name for name in names for _ in range(calls)] * 4
    assert order[-len(expected) :] == expected  # a round to warm up, the least of three timed
    assert [one.times[losses.TRAINING].runs for one in results] == [3, 3, 3]


class FakeGPU:
    """The parts of torch.cuda that the harness uses, with 100 bytes of inputs in memory."""

    def __init__(self, log: list[str], name: str = "") -> None:
        self.log, self.name = log, name
        self.names = iter(("start", "end"))

    def Event(self, *, enable_timing: bool) -> FakeGPU:
        return FakeGPU(self.log, next(self.names))

    def record(self) -> None:
        self.log.append(f"record {self.name}")

    def synchronize(self, device: object = None) -> None:
        self.log.append(f"wait for {self.name}")

    def elapsed_time(self, end: FakeGPU) -> float:
        return {("start", "end"): 7.0}[self.name, end.name]

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.log.append("reset")

    def memory_allocated(self, device: torch.device) -> int:
        return 100

    def max_memory_allocated(self, device: torch.device) -> int:
        return 130


def test_the_protocol_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeGPU(log))
    meta = torch.device("meta")
    assert Clock(meta)(lambda: log.append("run")) == 7.0
    assert log == ["record start", "run", "record end", "wait for end"]
    log.clear()
    assert memory.peak_extra(lambda: log.append("run"), meta, block=0) == 30
    assert log == ["wait for ", "reset", "run", "wait for "]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("eager", 4.0, 5.1), ("fastkd", 0.9, 1.1), ("fastkd-inplace", 0.0, 0.1)],
)
def test_both_ways_to_count_memory_agree(name: str, least: float, most: float) -> None:
    if name != "eager":
        pytest.importorskip("fastkd._C", exc_type=ImportError)
    bench = Bench(KL, Shape(9, 1_000_000), torch.float32, CPU)
    call = PROVIDERS[name].build(KL, CPU)
    size = 4 * bench.inputs.student.numel()
    bench.training(call)()  # code pages and thread stacks come in with the first run
    counted = memory.allocated_peak(bench.training(call))
    resident = memory.resident_peak(bench.training(call))
    assert size > memory.SYSTEM_BLOCK and least <= counted / size <= most
    assert resident is not None and resident / size == pytest.approx(counted / size, abs=0.3)
