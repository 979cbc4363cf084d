"""The benchmark: every family runs, wrong providers get no number, the arithmetic is right."""

from __future__ import annotations

import json
import math
import os
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
sys.path.append(str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench.__main__ import main
from bench.families import (
    FAMILIES,
    communication,
    linear,
    load,
    losses,
    responses,
    trainer,
    vocab_parallel,
)
from bench.families.loss_cases import CASES, FUNCTIONS, SHAPE_SETS, TOY_SHAPE, Case, bare
from bench.families.loss_providers import PLAIN, PROVIDERS, UPSTREAM, Call, Provider
from bench.families.losses import Bench, calls_at_once, comparison, count_bandwidth
from bench.harness import gate, table
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

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KL = CASES["kl_div"]
ONCE = TimingPlan(1.0, (1, 1), 0)
EXTRA = {"store-scale": ["--ranks", "4", "--tokens", "1000000", "--mib", "1", "2"]}


def silent(text: str) -> None:
    """Says nothing."""


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables in a text, as cells; rows of unequal length are no table."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found += [] if inside else [[]]
            found[-1].append(cells)
        inside = line.startswith("|")
    assert all(len({len(row) for row in table}) == 1 for table in found)
    return found


def results_in(file: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(file.read_text(), parse_constant=refuse)
    for name in ("cpu", "cores", "threads", "torch", "python", "fastkd", "commit", "date"):
        assert name in document["machine"]
    return document["results"]


# ---- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_and_its_table_says_what_its_json_says(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "integrations":
        pytest.importorskip("transformers", reason="transformers is not installed")
    family, file = load(name), tmp_path / "toy.json"
    arguments = [name, "--toy", "--json", str(file), *EXTRA.get(name, [])]
    if family.devices:
        arguments += ["--device", "cpu"]
    threads = torch.get_num_threads()
    assert main(arguments) == 0, capsys.readouterr().out
    assert torch.get_num_threads() == threads
    results, said = results_in(file), capsys.readouterr()
    known = set(family.toy_cases or family.cases)
    assert known == {one["case"] for one in results}
    assert {one["status"] for one in results} <= {"ok", "skipped"}, results
    rows = [row for found in tables(said.out)[: len(known)] for row in found[2:]]
    shown = [one for one in results if one["status"] == "ok"]
    head = tables(said.out)[0][0]
    for row, one in zip(rows, shown, strict=False):
        what = family.times[-1] if family.times else ""
        if what:
            at = [*head].index(f"{what} ms")
            assert row[at] == table.digits(one[f"{what}_ms"]["median"])
            assert one["provider"] in row
    assert len(rows) >= len(shown)
    assert f"[1/{1 if name == 'store' else ''}" in said.err  # progress, away from the tables


@pytest.mark.parametrize("family", [["kl_div"], ["linear"]], ids=lambda words: words[0])
def test_pictures(family: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, shapes = tmp_path / "x.png", "2x9:4x4,4x9:4x4,4x17:4x4"
    more = ["--shapes", shapes if family == ["linear"] else "2x5,3x4", "--device", "cpu"]
    arguments = [*family, *more, "--toy", "--providers", "eager,fastkd", "--plot", str(file)]
    assert main(arguments) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_demo_shows_the_speedup(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "8x64", "--seconds", "0.05", "--providers", "eager,reference,fastkd"]
    assert main(["--demo", "--device", "cpu", *arguments]) == 0
    (found,) = tables(capsys.readouterr().out)
    assert "vs eager" in found[0] and "forward ms" not in found[0]
    assert all(row[found[0].index("vs eager")].endswith("x") for row in found[2:-1])


def test_the_program_lists_everything() -> None:
    command = [sys.executable, "-m", "bench", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in (*FAMILIES, *CASES, *PROVIDERS, *SHAPE_SETS):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "got", "expected"),
    [
        (["kl"], "'kl'", "kl_div"),
        (["linear", "distillation_loss"], "'distillation_loss'", "kl_div"),
        (["--shapes", "0x5"], "'0x5'", "ROWSxVOCAB"),
        (["--shapes", ","], "','", "at least one shape"),
        (["linear", "--shapes", "512x100"], "'512x100'", "ROWSxVOCAB:STUDENTxTEACHER"),
        (["--dtype", "int8"], "'int8'", "bfloat16"),
        (["--providers", "jax"], "'jax'", "eager"),
        (["--device", "abacus"], "'abacus'", "cpu or cuda"),
        (["--device", "meta"], "'meta'", "cpu, cuda or xpu"),
        (["--threads", "two"], "'two'", "a whole number above 0"),
        (["--seconds", "nan"], "'nan'", "a number above 0"),
        (["--json", "no/such/folder/x.json"], "no/such/folder", "a folder that exists"),
        (["--toy", "--demo"], "--demo", "not allowed with"),
        (["store", "--samples", "3"], "got 3", "at least 4"),
        (["store-scale", "--shards", "5"], "[5]", "two sizes"),
        (["communication", "--shapes", "2x8"], "8", "at least 32"),
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


def test_every_divergence_of_the_table_has_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(fastkd.divergences)
    assert {case.divergence.name for case in CASES.values() if case.alpha is None} == names
    assert set(PLAIN) <= names and set(FUNCTIONS) <= names
    monkeypatch.delitem(FUNCTIONS, "tv")  # as a new one, without a function or a plain form
    monkeypatch.delitem(PLAIN, "tv")
    case = bare(fastkd.divergences.tv)
    assert case.call.startswith("fastkd.distillation_loss(student, teacher, temperature=")
    of = comparison(Bench(case, TOY_SHAPE, torch.float32, CPU), ["eager", "fastkd"])
    assert [one.status for one in measure(of, ONCE, silent)] == ["ok"] * 3


# ---- the gate


def scaled_gradient(call: Call) -> Call:
    """The right loss, its gradient off by a factor."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        value = call(student, teacher, labels)
        return value.detach() + 1.001 * (value - value.detach())

    return loss


def overwriting(call: Call) -> Call:
    """Overwrites the logits that it was not to touch."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        value = call(student, teacher, labels)
        student.data.add_(1.0)
        return value

    return loss


WRONG: dict[str, Callable[[Call], Call]] = {
    "loss": lambda call: lambda s, t, labels: call(s, t, labels) + 1e-4,
    "gradient": scaled_gradient,
    "nan": lambda call: lambda s, t, labels: call(s, t, labels) * math.nan,
    "overwrites": overwriting,
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
    arguments = ["kl_div", "--toy", "--providers", "eager,fastkd,reference", "--device", "cpu"]
    assert main([*arguments, "--json", str(file)]) == 1
    text = capsys.readouterr().out
    rows = {row[1]: row for row in tables(text)[0][2:]}
    assert set(rows["fastkd"]) == {"3x37", "fastkd", "WRONG", "-"}
    assert "WRONG" not in rows["reference"] and "fastkd WRONG at 3x37: " in text
    (ours,) = (one for one in results_in(file) if one["provider"] == "fastkd")
    assert ours["status"] == "wrong" and ours["note"]
    assert ours["forward_backward_ms"] is None and ours["peak_extra_bytes"] is None


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
    arguments = ["kl_div", "--toy", "--providers", "eager,fastkd", "--device", "cpu"]
    assert main(arguments) == code
    text = capsys.readouterr().out
    assert status in text and "ArithmeticError: no ground to stand on" in text


@pytest.mark.parametrize("spoilt", [0, 1, 2], ids=["loss", "hidden", "weight"])
def test_a_wrong_linear_loss_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoilt: int
) -> None:
    def build(case: Case, device: torch.device) -> linear.Step:
        right = linear.linear(case, device)

        def step(inputs: linear.Inputs) -> Any:
            return tuple(x * (1.3 if i == spoilt else 1) for i, x in enumerate(right(inputs)))

        return step

    monkeypatch.setitem(linear.PROVIDERS, "fastkd", build)
    assert main(["linear", "--toy", "--dtype", "float32", "--device", "cpu"]) == 1
    assert "fastkd WRONG" in capsys.readouterr().out


def test_what_other_families_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = responses.CASES["logit_mse"]
    wrong = case._replace(ours=lambda s, t, y: 1.01 * case.plain(s, t, y))
    monkeypatch.setitem(responses.CASES, "logit_mse", wrong)
    assert main(["responses", "logit_mse", "--toy", "--device", "cpu"]) == 1
    real = trainer.distill.train
    clipped = lambda *given, **more: real(*given, **more, clip_norm=1e-3)  # noqa: E731
    monkeypatch.setattr(trainer.distill, "train", clipped)
    assert main(["trainer", "--toy"]) == 1
    counted = {name: communication.expected(of) + 1 for name, of in communication.LOSSES.items()}
    monkeypatch.setattr(communication, "count", lambda world, vocab: [counted] * world)
    assert main(["communication", "dense"]) == 1
    text = capsys.readouterr().out
    assert "fastkd WRONG at logit_mse 5x50: error of the loss 1.00e-02" in text
    assert "trainer WRONG at tiny: the losses differ" in text
    assert "fastkd WRONG at dense: counted [3633], by the formula 3632" in text


def test_what_is_too_slow_or_too_much_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = trainer.CASES["tiny"]._replace(counts=True)
    monkeypatch.setitem(trainer.CASES, "tiny", tiny)
    assert main(["trainer", "--toy", "--limit", "-1"]) == 1
    assert "tiny: " in capsys.readouterr().out
    assert main(["communication", "dense", "--limit", "30"]) == 1
    assert main(["store", "--toy", "--device", "cpu", "--limit", "1e9"]) == 1
    assert "below the limit of 1e+09" in capsys.readouterr().out


def test_a_parallel_loss_that_is_wrong_has_no_ratio() -> None:
    sizes = vocab_parallel.Sizes(2, 10, 100, 3, "float32", ("kl",))
    rank = {"ms": [[2.0, 4.0, 3.0]] * 3, "error": 0.0, "bytes": communication.CALL + 640}
    *_, right = vocab_parallel.to_results("kl", [rank | {"calls": 2}] * 2, sizes)
    assert right.figures["ratio"] == 2.0 and right.figures["bytes_per_row"] == 64
    bad = rank | {"calls": 2, "error": math.nan}
    *_, wrong = vocab_parallel.to_results("kl", [rank | {"calls": 2}, bad], sizes)
    assert wrong.status == "wrong" and not wrong.times and wrong.figures["ratio"] is None


def test_truth_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case, toy = CASES["distillation_loss"], linear.SHAPES["toy"][0]
    inputs = case.make_inputs(Shape(7, 11), torch.float32, CPU, 0)
    products = linear.make_inputs(toy, torch.float32, CPU)
    whole, split = gate.truth(case, inputs), linear.truth(KL, products)
    monkeypatch.setattr(gate, "CHUNK", 75)  # some rows at a time, and some left over
    parts, cut = gate.truth(case, inputs), linear.truth(KL, products)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-14)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-13, atol=0)
    torch.testing.assert_close(cut.weight.grad, split.weight.grad)
    wide = [x.double() if x.is_floating_point() else x for x in inputs if x is not None]
    plain = PROVIDERS["eager"].build(case, CPU)(wide[0], wide[1], wide[2])
    assert whole.loss == pytest.approx(plain.item(), rel=1e-12)


def test_error_is_relative_to_the_largest_gradient_and_nan_is_never_within() -> None:
    true = gate.Truth(4.0, torch.tensor([[0.0, -2.0]], dtype=torch.float64))
    found = gate.errors(torch.tensor(5.0), torch.tensor([[0.5, -2.0]]), true)
    assert found == gate.Errors(0.25, 0.25)
    for bad in ([[math.nan, -2.0]], [[0.0, math.nan]]):
        lost = gate.errors(torch.tensor(4.0), torch.tensor(bad), true)
        assert not lost.within(gate.Errors(math.inf, math.inf))
    assert gate.bound(gate.Errors(1.0, 2.0), torch.float32) == gate.Errors(2 + 1e-6, 4 + 1e-6)
    with pytest.raises(ValueError, match="expected \\(1, 2\\)"):
        gate.errors(torch.tensor(4.0), torch.zeros(2), true)


# ---- the arithmetic, the turns and the memory


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


@pytest.mark.parametrize("name", ["fastkd-scaled", "fastkd-inplace-scaled"])
def test_scaled_providers_scale(name: str) -> None:
    """Half the gradient is what comes out, and the gate takes it for right."""
    bench, provider = Bench(KL, Shape(5, 37), torch.float32, CPU), PROVIDERS[name]
    call = provider.build(KL, CPU)
    whole = bench.training(call)()[1].clone()
    half = bench.training(call, upstream=provider.upstream)()[1]
    assert provider.upstream == UPSTREAM and torch.equal(half, whole * UPSTREAM) and half.any()
    result, _ = measure(comparison(bench, [name]), ONCE, silent)
    assert result.status == "ok" and list(result.times) == [losses.TRAINING]


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
