"""The run that needs a card, without one: its steps, and what it makes of their outcomes."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

pytest.importorskip("triton")
from bench import __main__ as bench_main
from bench import gpu, gpu_steps, report
from bench.cases import CASES
from bench.gpu import Outcome, document, main
from bench.gpu_steps import EVERYONE, Step, steps, target
from bench.providers import PROVIDERS, UPSTREAM

ROOT = Path(__file__).parent.parent


def script(name: str, code: str, **options: Any) -> Step:
    return Step(name, ["-c", code], **options)


def outcomes(results: Path) -> dict[str, dict[str, Any]]:
    return {s["name"]: s for s in json.loads((results / "gpu.json").read_text())["steps"]}


def options_of(step: Step) -> dict[str, str]:
    return dict(re.findall(r"--(\S+) (\S+)", step.line))


# ---- the steps


@pytest.mark.parametrize("shapes", ["fit", "", "64x32000"])
def test_every_command_of_a_benchmark_parses(
    shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.cli.device", torch.device)
    for step in steps(tmp_path, shapes, "sm_90"):
        if step.command[:2] == ["-m", "bench"]:
            words = [word if word != "cuda" else "cpu" for word in step.command[2:]]
            given = bench_main.parser().parse_args(words)
            assert set(given.cases) <= set(CASES) and given.providers, step.name


def test_the_whole_grid_is_the_issues(tmp_path: Path) -> None:
    grid = next(step for step in steps(tmp_path, "", "sm_90") if step.name == "bench-grid")
    options = options_of(grid)
    assert options["shapes"] == "gpu" and options["dtype"] == "bfloat16,float32"
    assert options["providers"].split(",") == EVERYONE.split(",")
    assert set(PROVIDERS) - set(EVERYONE.split(",")) == {"reference"}
    shapes = bench_main._shapes("gpu")
    assert {shape.rows for shape in shapes} == {64, 512, 4096, 8192}
    assert {shape.vocab for shape in shapes} == {32000, 50257, 128256, 151936, 256000}
    assert grid.limit is None and grid.command[2] == "--device"  # no case named: all of them


def test_what_fits_meets_every_case_and_axis(tmp_path: Path) -> None:
    fit = [step for step in steps(tmp_path, "fit", "sm_90") if step.name.startswith("bench-")]
    joined = [options_of(step) for step in fit]
    shapes = {tuple(s.split("x")) for options in joined for s in options["shapes"].split(",")}
    assert {int(v) for _, v in shapes} == {32000, 50257, 128256, 151936, 256000}
    assert {int(n) for n, _ in shapes} == {64, 512, 4096, 8192}
    assert {options["dtype"] for options in joined} == {"bfloat16", "float32"}
    assert any(step.command[2] == "--device" for step in fit)


def test_all_files_of_the_passes_are_run_first(tmp_path: Path) -> None:
    names = {step.name: step for step in steps(tmp_path, "fit", "sm_90")}
    first, rest = names["tests-passes"].command, names["tests-all"].command
    for path in (ROOT / "tests").glob("test_gpu*.py"):
        assert f"tests/{path.name}" in first
    assert "tests/test_topk.py" in first and "tests" in rest
    ignored = {word.partition("=")[2] for word in rest if word.startswith("--ignore=")}
    assert ignored == {word for word in first if word.startswith("tests/")}


def test_clusters_are_measured_where_they_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiles() -> dict[str, str]:
        found = {s.env.get("FASTKD_GPU_TILE"): s.skip for s in steps(tmp_path, "fit", "sm_90")}
        return {tile: skip for tile, skip in found.items() if tile}

    monkeypatch.setattr("fastkd.backends.gpu.tune.clusters", lambda arch: None)
    assert {tile.rpartition(":")[2] for tile, skip in tiles().items() if not skip} == {
        *("1", "2", "4")
    }
    monkeypatch.setattr("fastkd.backends.gpu.tune.clusters", lambda arch: f"{arch} has none")
    assert {skip for tile, skip in tiles().items() if not tile.endswith(":1")} == {"sm_90 has none"}
    assert not any(skip for tile, skip in tiles().items() if tile.endswith(":1"))


def test_teams_are_measured_beside_none(tmp_path: Path) -> None:
    found = [s.env for s in steps(tmp_path, "fit", "sm_90") if s.name.startswith("team-")]
    assert {env["FASTKD_GPU_COOPERATIVE"] for env in found} == {"4", "8", "16"}
    alone = [s.env for s in steps(tmp_path, "fit", "sm_90") if s.name.startswith("tile-")]
    assert all(env["FASTKD_GPU_COOPERATIVE"] == "0" for env in alone)


def test_memcheck_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def memcheck() -> Step:
        return next(step for step in steps(tmp_path, "fit", "sm_90") if step.name == "memcheck")

    monkeypatch.setattr(gpu_steps, "sanitizer", lambda: None)
    assert memcheck().skip == "compute-sanitizer is not on this machine"
    monkeypatch.setattr(gpu_steps, "sanitizer", lambda: "/opt/compute-sanitizer")
    assert memcheck().skip == "" and memcheck().argv[0] == "/opt/compute-sanitizer"


def test_a_card_without_a_data_sheet_has_no_prediction(tmp_path: Path) -> None:
    named = {step.name: step for step in steps(tmp_path, "fit", "sm_120")}
    assert "no data sheet of a card of sm_120" in named["traffic"].skip
    assert "sm_120" in named["aot"].line


# ---- the run


def test_dry_run_prints_every_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "none"
    assert main(["--dry-run", "--results", str(results)]) == 0
    said = capsys.readouterr().out
    for step in steps(results, "fit", target()):
        assert f"# {step.name} (" in said and step.line in said
    assert not results.exists()


def test_a_failure_hides_nothing_and_fails_the_run(tmp_path: Path) -> None:
    write = "import json; json.dump({{'machine': 'm', 'results': [1]}}, open({!r}, 'w'))"
    todo = [
        script("bad", "raise SystemExit(3)", must=True),
        script("measured", write.format(str(tmp_path / "gpu-measured.json"))),
        script("absent", "", skip="no such tool"),
    ]
    assert gpu._run(todo, tmp_path, 60) == 1
    found = outcomes(tmp_path)
    assert [found[name]["status"] for name in found] == ["failed", "ok", "skipped"]
    assert "exit status 3" in found["bad"]["note"] and found["absent"]["note"] == "no such tool"
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert whole["machine"] == "m" and whole["runs"]["measured"]["results"] == [1]


def test_a_failure_of_what_need_not_pass_is_only_told(tmp_path: Path) -> None:
    assert gpu._run([script("bad", "raise SystemExit(3)")], tmp_path, 60) == 0
    assert outcomes(tmp_path)["bad"]["status"] == "failed"


def test_a_step_out_of_time_is_stopped_with_its_processes(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    began = time.monotonic()
    assert gpu._run([script("slow", code, limit=5, must=True)], tmp_path, 60) == 1
    assert time.monotonic() - began < 60
    assert outcomes(tmp_path)["slow"]["status"] == "out of time"
    child = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_no_step_begins_after_the_runs_time(tmp_path: Path) -> None:
    assert gpu._run([script("late", "", must=True)], tmp_path, 0.5) == 1
    assert "spent before it" in outcomes(tmp_path)["late"]["note"]


def test_a_command_that_is_not_there_fails(tmp_path: Path) -> None:
    done = gpu.run(Step("gone", [str(tmp_path / "nothing")]), tmp_path, 10)
    assert done.status == "failed" and "nothing" in done.note


def test_environment_and_output_of_a_step(tmp_path: Path) -> None:
    step = script("say", "import os; print(os.environ['OF_STEP'])", env={"OF_STEP": "x"}, out="md")
    assert gpu.run(step, tmp_path, 30).status == "ok"
    assert (tmp_path / "gpu-say.md").read_text() == "x\n"
    assert step.line.startswith(f"OF_STEP=x {sys.executable} -c ")


def test_an_older_runs_file_is_not_this_ones(tmp_path: Path) -> None:
    (tmp_path / "gpu-old.json").write_text("{}")
    assert document([Outcome("old", "", "skipped")], tmp_path)["runs"] == {}


def test_a_file_cut_off_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "gpu-slow.json").write_text('{"machine": ')
    whole = document([Outcome("slow", "", "out of time", note="stopped after 5 s")], tmp_path)
    assert whole["runs"] == {} and whole["machine"] is None
    assert whole["steps"][0]["note"] == "stopped after 5 s; gpu-slow.json is cut off"


def test_an_unknown_step_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "nothing", "--results", str(tmp_path)])


def test_make_gpu_is_this() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ngpu:\n")[2].partition("\n\n")[0]
    assert recipe.split() == [
        *("$(PYTHON)", "-m", "bench.gpu", "--results", "$(RESULTS)"),
        *("--shapes", '"$(GPU_SHAPES)"', "--linear", "$(LINEAR_SHAPES)"),
    ]


# ---- grad_output that is not 1, and the machine


@pytest.mark.parametrize("name", ["fastkd-scaled", "fastkd-inplace-scaled"])
def test_scaled_providers_scale(name: str) -> None:
    """Half the gradient is what comes out, and the gate takes it for right."""
    from bench.cases import Shape
    from bench.measure import Bench, Plan, measure

    case, shape = CASES["kl_div"], Shape(5, 37, "")
    bench = Bench(case, shape, torch.float32, torch.device("cpu"))
    provider = PROVIDERS[name]
    call = provider.build(case, torch.device("cpu"))
    _, whole = bench.training(call)()
    whole = whole.clone()
    _, half = bench.training(call, upstream=provider.upstream)()
    assert provider.upstream == UPSTREAM != 1.0
    assert torch.equal(half, whole * UPSTREAM) and half.any()
    plan = Plan([name], rounds=(1, 1), warm_up=0)
    result, _ = measure(case, shape, torch.float32, torch.device("cpu"), plan, lambda text: None)
    assert result.status == "ok" and result.forward is None and result.training is not None


def test_the_machine_names_driver_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Wed Jan\nGCC version: 12.3.0"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert report._driver() == "570.86.15"
    monkeypatch.undo()
    assert report.machine(torch.device("cpu"))["driver"] is None
    assert "triton" in report.machine(torch.device("cpu"))
