"""The benchmark harness: every case runs, wrong providers are caught, the arithmetic is right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.demo import memory

# bench is no part of the installed package; last, so that an installed fastkd stays the one tested
sys.path.append(str(Path(__file__).parents[1]))

from bench import gate, report
from bench.__main__ import main
from bench.cases import CASES, FUNCTIONS, SHAPE_SETS, TOY_SHAPE, Case, Shape, bare
from bench.measure import AT_ONCE_BYTES, MOST_AT_ONCE, Bench, Plan, calls_at_once, measure
from bench.providers import PLAIN, PROVIDERS, TOY_PROVIDERS, Call, Provider
from bench.result import COPY, Result
from bench.timing import Clock, Neighbours, Summary, cores, gb_per_s, percentile, summarise

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
KL = CASES["kl_div"]


def run(*arguments: str) -> int:
    """The command line in this process, on the CPU."""
    return main([*arguments, "--device", "cpu"])


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables in a text, as cells; rows of unequal length are no table."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not inside:
                found.append([])
            found[-1].append(cells)
        inside = line.startswith("|")
    for table in found:
        assert len({len(row) for row in table}) == 1
        assert all(set(cell) <= set("-:") for cell in table[1])
    return found


def no_json_extensions(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


# ---- the command line


def test_every_case_runs_at_toy_size_as_a_program(tmp_path: Path) -> None:
    file = tmp_path / "toy.json"
    command = [sys.executable, "-m", "bench", "--toy", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = tables(done.stdout)
    assert len(found) == len(CASES)
    document = json.loads(file.read_text(), parse_constant=no_json_extensions)
    results = document["results"]
    assert {result["case"] for result in results} == set(CASES)
    for result in results:
        expected = "skipped" if result["provider"].startswith("liger") else "ok"
        assert result["status"] == expected, result["note"]
    shown = [row[1] for table in found for row in table[2:]]
    assert len(shown) == sum(result["status"] == "ok" for result in results)
    for name in ("cpu", "cores", "threads", "torch", "python", "fastkd", "commit", "date"):
        assert name in document["machine"]
    assert document["settings"]["toy"] is True
    assert "kl_div 3x37 float32" in done.stderr  # progress, away from the tables


def test_compile_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "toy.png"
    providers = "eager,compile,fastkd"
    assert run("kl_div", "--toy", "--providers", providers, "--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    # without a C++ compiler it is skipped, and the table says so
    assert "| compile" in text or "compile SKIPPED: " in text


def test_half_precision_and_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--toy", "--dtype", "bfloat16,float16", "--shapes", "2x5,3x4"]
    assert run("tv_distance", "distillation_loss", *arguments) == 0
    found = tables(capsys.readouterr().out)
    assert len(found) == 4
    assert {row[0] for table in found for row in table[2:]} == {"2x5", "3x4"}


def test_demo_shows_both_speedups(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "8x64", "--seconds", "0.05", "--providers", "eager,reference,fastkd"]
    assert run("--demo", *arguments) == 0
    (table,) = tables(capsys.readouterr().out)
    assert "vs eager" in table[0] and "forward ms" not in table[0]
    assert all(row[table[0].index("vs eager")].endswith("x") for row in table[2:-1])


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for name in (*CASES, *PROVIDERS, *SHAPE_SETS):
        assert name in text


@pytest.mark.parametrize(
    ("arguments", "got", "expected"),
    [
        (["kl"], "'kl'", "kl_div"),
        (["--shapes", "512"], "'512'", "ROWSxVOCAB"),
        (["--shapes", "0x5"], "'0x5'", "ROWSxVOCAB"),
        (["--shapes", ","], "','", "at least one shape"),
        (["--dtype", "int8"], "'int8'", "bfloat16"),
        (["--providers", "jax"], "'jax'", "eager"),
        (["--device", "abacus"], "'abacus'", "cpu or cuda"),
        (["--device", "meta"], "'meta'", "cpu, cuda or xpu"),
        (["--threads", "0"], "'0'", "a whole number above 0"),
        (["--threads", "two"], "'two'", "a whole number above 0"),
        (["--seconds", "-1"], "'-1'", "a number above 0"),
        (["--seconds", "nan"], "'nan'", "a number above 0"),
        (["--json", "no/such/folder/x.json"], "no/such/folder", "a folder that exists"),
        (["--toy", "--demo"], "--demo", "not allowed with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    arguments: list[str], got: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert got in said and expected in said


# ---- the cases


def test_every_divergence_of_the_table_has_a_case() -> None:
    names = set(fastkd.divergences)
    assert {case.divergence.name for case in CASES.values() if case.alpha is None} == names
    assert set(PLAIN) <= names and set(FUNCTIONS) <= names


def test_a_divergence_without_a_function_or_a_plain_form_is_measured_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(FUNCTIONS, "tv")
    monkeypatch.delitem(PLAIN, "tv")
    case = bare(fastkd.divergences.tv)
    assert case.call.startswith("fastkd.distillation_loss(student, teacher, temperature=")
    plan = Plan(["eager", "fastkd", "fastkd-inplace"], rounds=(1, 1), warm_up=0)
    results = measure(case, TOY_SHAPE, torch.float32, CPU, plan, lambda text: None)
    assert [result.status for result in results] == ["ok"] * 4, [r.note for r in results]


def test_inputs_repeat_and_the_floor_is_spelled_out() -> None:
    case, shape = CASES["distillation_loss"], Shape(4, 10, "")
    first, again = (case.make_inputs(shape, torch.bfloat16, CPU, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.student, first.teacher)
    assert case.floor_bytes(shape, torch.bfloat16, gradient=True) == 3 * 4 * 10 * 2 + 4 * 8
    assert case.floor_bytes(shape, torch.bfloat16, gradient=False) == 2 * 4 * 10 * 2 + 4 * 8
    assert KL.floor_bytes(shape, torch.float32, gradient=True) == 3 * 4 * 10 * 4


# ---- the gate


def scaled_gradient(call: Call, by: float) -> Call:
    """The right loss, its gradient off by a factor."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        value = call(student, teacher, labels)
        return value.detach() + by * (value - value.detach())

    return loss


def off(change: Callable[[Tensor], Tensor]) -> Callable[[Call], Call]:
    return lambda call: lambda s, t, labels: change(call(s, t, labels))


def sloppy(call: Call) -> Call:
    """Overwrites the logits that it was not to touch."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        value = call(student, teacher, labels)
        student.data.add_(1.0)
        return value

    return loss


WRONG: dict[str, Callable[[Call], Call]] = {
    "loss": off(lambda value: value + 1e-4),
    "gradient": lambda call: scaled_gradient(call, 1.001),
    "nan": off(lambda value: value * math.nan),
    "overwrites": sloppy,
}


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[[Call], Call]) -> None:
    """Replaces a provider by one whose call has gone through `how`."""
    right = PROVIDERS[name]

    def build(case: Case, device: torch.device) -> Call:
        return how(right.build(case, device))

    wrong = Provider(name, right.about, build, right.ours, right.inplace)
    monkeypatch.setitem(PROVIDERS, name, wrong)


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_fastkd_gets_no_number_and_fails_the_run(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spoil(monkeypatch, "fastkd", WRONG[how])
    file = tmp_path / "wrong.json"
    arguments = ["kl_div", "--toy", "--providers", "eager,fastkd,reference", "--json", str(file)]
    assert run(*arguments) == 1
    text = capsys.readouterr().out
    (table,) = tables(text)
    rows = {row[1]: row for row in table[2:]}
    assert "WRONG" in rows["fastkd"] and set(rows["fastkd"]) == {"3x37", "fastkd", "WRONG", "-"}
    assert "WRONG" not in rows["reference"]
    assert "fastkd WRONG at 3x37: " in text
    results = json.loads(file.read_text(), parse_constant=no_json_extensions)["results"]
    (ours,) = (result for result in results if result["provider"] == "fastkd")
    assert ours["status"] == "wrong" and ours["note"]
    assert ours["forward_backward_ms"] is None and ours["peak_extra_bytes"] is None


def test_another_wrong_provider_is_reported_without_failing_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, "compile", lambda call: lambda s, t, labels: 2 * s.sum())
    assert run("kl_div", "--toy", "--providers", "compile,fastkd") == 0
    assert "compile WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "status", "code"), [("fastkd", "FAILED", 1), ("eager", "SKIPPED", 0)]
)
def test_a_provider_that_raises(
    name: str,
    status: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(call: Call) -> Call:
        raise ArithmeticError("no ground to stand on")

    spoil(monkeypatch, name, broken)
    assert run("kl_div", "--toy", "--providers", "eager,fastkd") == code
    text = capsys.readouterr().out
    assert status in text and "ArithmeticError: no ground to stand on" in text


def test_truth_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["distillation_loss"]
    inputs = case.make_inputs(Shape(7, 11, ""), torch.float32, CPU, 0)
    whole = gate.truth(case, inputs)
    monkeypatch.setattr(gate, "CHUNK", 23)  # two rows at a time, and one left over
    parts = gate.truth(case, inputs)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-14)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-13, atol=0)
    # and it is what F.kl_div and F.cross_entropy say in float64
    wide = [x.double() if x.is_floating_point() else x for x in inputs if x is not None]
    plain = PROVIDERS["eager"].build(case, CPU)(wide[0], wide[1], wide[2])
    assert whole.loss == pytest.approx(plain.item(), rel=1e-12)


def test_error_is_relative_to_the_largest_gradient_and_nan_is_never_within() -> None:
    true = gate.Truth(4.0, torch.tensor([[0.0, -2.0]], dtype=torch.float64))
    found = gate.errors(torch.tensor(5.0), torch.tensor([[0.5, -2.0]]), true)
    assert found == gate.Errors(0.25, 0.25)
    assert found.within(gate.Errors(0.25, 0.25)) and not found.within(gate.Errors(0.3, 0.2))
    for bad in ([[math.nan, -2.0]], [[0.0, math.nan]]):
        lost = gate.errors(torch.tensor(4.0), torch.tensor(bad), true)
        assert not lost.within(gate.Errors(math.inf, math.inf))
    assert gate.bound(gate.Errors(1.0, 2.0), torch.float32) == gate.Errors(2 + 1e-6, 4 + 1e-6)
    with pytest.raises(ValueError, match="expected \\(1, 2\\)"):
        gate.errors(torch.tensor(4.0), torch.zeros(2), true)


# ---- the arithmetic


def test_percentiles() -> None:
    assert summarise([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Summary(3.5, 2.0, 5.0, 6)
    assert percentile([7.0], 0.2) == 7.0
    assert [percentile([10.0, 20.0], share) for share in (0.0, 0.25, 1.0)] == [10.0, 12.5, 20.0]


def result_of(provider: str, milliseconds: float, runs: int = 10) -> Result:
    empty = Bench(KL, Shape(1000, 1000, ""), torch.float32, CPU).result(provider)
    empty.training = Summary(milliseconds, milliseconds, milliseconds, runs)
    return empty


def test_bandwidth_share_and_speedup() -> None:
    eager, ours, copy = result_of("eager", 30.0), result_of("fastkd", 2.0), result_of(COPY, 1.0)
    ours.copy_gb_s = copy.copy_gb_s = copy.gb_s
    assert ours.gb_s == pytest.approx(6.0)  # 3 streams of 4 MB in 2 ms
    assert copy.gb_s == pytest.approx(8.0)  # 2 streams of 4 MB in 1 ms
    assert ours.copy_share == pytest.approx(0.75) and copy.copy_share == pytest.approx(1.0)
    assert report.speedup(ours, eager) == pytest.approx(15.0)
    assert report.speedup(copy, eager) is None
    assert report.speedup(result_of("fastkd", 2.0, runs=1), eager) is None
    assert gb_per_s(1, None) is None and gb_per_s(1, Summary(0.0, 0.0, 0.0, 1)) is None


def test_a_busy_machine_is_told() -> None:
    facts = {**report.machine(CPU), "cores": 4}
    eager, copy = result_of("eager", 30.0), result_of(COPY, 1.0)
    for others, told in ((None, False), (0.1, False), (3.0, True)):
        copy.others_cores = others
        text = report.markdown([[eager, copy]], facts)
        assert ("UNRELIABLE at 1000x1000: others used 3.0 of the 4 cores" in text) is told
    with Neighbours(CPU) as neighbours:
        time.sleep(Neighbours.LEAST_SECONDS + 0.1)
    assert neighbours.cores is None or 0 <= neighbours.cores <= 1.2 * len(cores())


@pytest.mark.parametrize("at_once", [False, True], ids=["one", "many-at-once"])
def test_rounds_interleave_and_stop_at_the_budget(at_once: bool) -> None:
    calls = calls_at_once(TOY_SHAPE, torch.float32, CPU) if at_once else 1
    order: list[str] = []

    def noting(name: str) -> Callable[[Call], Call]:
        def how(call: Call) -> Call:
            def loss(s: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
                order.append(name)
                return call(s, t, labels)

            return loss

        return how

    names = ("eager", "fastkd")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            spoil(patch, name, noting(name))
        plan = Plan(names, seconds=1e-9, rounds=(3, 50), with_forward=False, at_once=at_once)
        results = measure(KL, TOY_SHAPE, torch.float32, CPU, plan, lambda text: None)
    expected = [name for name in names for _ in range(calls)] * 4
    assert order[-len(expected) :] == expected  # a round to warm up, the least of three timed
    assert [result.training and result.training.runs for result in results] == [3, 3, 3]


def test_small_calls_are_timed_many_at_once() -> None:
    """Up to where the calls' logits together leave the caches, and not on a GPU."""
    one, many = SHAPE_SETS["cpu"][0], SHAPE_SETS["small"][0]
    assert calls_at_once(one, torch.float32, CPU) == 1
    assert calls_at_once(many, torch.float32, CPU) == MOST_AT_ONCE
    assert calls_at_once(many, torch.float32, torch.device("cuda")) == 1
    half = Shape(1, AT_ONCE_BYTES // 8, "two of them fit")
    assert calls_at_once(half, torch.float32, CPU) == 2


def test_each_call_at_once_has_its_own_logits() -> None:
    """An in-place call overwrites its own only, and a time is that of one call."""
    bench = Bench(KL, TOY_SHAPE, torch.float32, CPU, calls=3)
    call = PROVIDERS["fastkd-inplace"].build(KL, CPU)
    runs = bench.each(lambda at: bench.training(call, at))
    (first, *_), (loss, grad), (other, again) = (run() for run in runs)
    assert torch.equal(grad, again) and first == loss == other
    ticks = iter((10.0, 10.6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(ticks))
        assert Clock(CPU)(*bench.each(bench.copy)) == pytest.approx(200.0)


class FakeEvent:
    """A GPU's event: notes its use; the time since the start is 7 ms."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record(self) -> None:
        self.log.append(f"record {self.name}")

    def synchronize(self) -> None:
        self.log.append(f"wait for {self.name}")

    def elapsed_time(self, end: FakeEvent) -> float:
        assert (self.name, end.name) == ("start", "end")
        return 7.0


class FakeGPU:
    """The parts of torch.cuda that the harness uses, with 100 bytes of inputs in memory."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.names = iter(("start", "end"))

    def Event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self.log, next(self.names))

    def synchronize(self, device: torch.device) -> None:
        self.log.append("synchronize")

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
    assert log == ["synchronize", "reset", "run", "synchronize"]


# ---- memory


def test_peak_memory_counts_what_was_alive_at_once() -> None:
    def two_then_one() -> Tensor:
        kept = torch.empty(1000)
        kept += torch.empty(1000)
        return kept + 1.0

    assert memory.allocated_peak(two_then_one) == pytest.approx(8000, abs=500)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("eager", 4.0, 5.1), ("fastkd", 0.9, 1.1), ("fastkd-inplace", 0.0, 0.1)],
)
def test_both_ways_to_count_memory_agree(name: str, least: float, most: float) -> None:
    if name != "eager":
        pytest.importorskip("fastkd._C", exc_type=ImportError)
    bench = Bench(KL, Shape(9, 1_000_000, ""), torch.float32, CPU)
    call = PROVIDERS[name].build(KL, CPU)
    size = 4 * bench.inputs.student.numel()
    assert size > memory.SYSTEM_BLOCK
    bench.training(call)()  # code pages and thread stacks come in with the first run
    counted = memory.allocated_peak(bench.training(call))
    resident = memory.resident_peak(bench.training(call))
    assert least <= counted / size <= most
    assert resident is not None and resident / size == pytest.approx(counted / size, abs=0.3)


@pytest.mark.parametrize(("name", "multiple"), [("fastkd", 1.0), ("fastkd-inplace", 0.0)])
def test_peak_memory_of_fastkd_is_its_gradient(name: str, multiple: float) -> None:
    pytest.importorskip("fastkd._C", exc_type=ImportError)
    shape = Shape(64, 4096, "")
    plan = Plan([name], rounds=(1, 1), with_forward=False, warm_up=0)
    ours, _ = measure(KL, shape, torch.float32, CPU, plan, lambda text: None)
    assert ours.peak_bytes is not None
    assert ours.peak_bytes / ours.logits_bytes == pytest.approx(multiple, abs=0.05)


# ---- providers


def test_toy_runs_all_providers_but_the_slow_compiler() -> None:
    assert set(PROVIDERS) - set(TOY_PROVIDERS) == {"compile", "compile-max"}


def test_pytest_benchmark_entry_points() -> None:
    pytest.importorskip("pytest_benchmark")
    selection = "kl_div and fastkd and 128x1000 and not reverse and not skew and not top"
    command: list[Any] = [sys.executable, "-m", "pytest", "bench", "-k", selection]
    command += ["--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
