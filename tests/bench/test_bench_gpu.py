"""The run that needs a GPU, without one: its steps, and what it makes of their outcomes."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

pytest.importorskip("triton")
from bench import gpu
from bench.__main__ import parser
from bench.families import FAMILIES, load
from bench.families.loss_cases import SHAPE_SETS
from bench.families.loss_providers import PROVIDERS
from bench.gpu import Outcome, document, main
from bench.gpu_steps import EVERYONE, Step, steps, target
from bench.harness import machine

ROOT = Path(__file__).parents[2]


def script(name: str, code: str, **options: Any) -> Step:
    return Step(name, ["-c", code], **options)


def outcomes(results: Path) -> dict[str, dict[str, Any]]:
    return {s["name"]: s for s in json.loads((results / "gpu.json").read_text())["steps"]}


def options_of(step: Step) -> dict[str, str]:
    return dict(re.findall(r"--(\S+) (\S+)", step.line))


# ---- the steps


@pytest.mark.parametrize("shapes", ["fit", "", "64x32000"])
def test_every_command_of_a_benchmark_parses(shapes: str, tmp_path: Path) -> None:
    for step in steps(tmp_path, shapes, "sm_90"):
        if step.command[:2] == ["-m", "bench"]:
            words = [word if word != "cuda" else "cpu" for word in step.command[2:]]
            name = words.pop(0) if words[0] in FAMILIES else "losses"
            family = load(name)
            given = parser(family).parse_args(words)
            assert set(given.cases) <= set(family.cases) and given.shapes, step.name


def test_the_whole_grid_is_the_issues(tmp_path: Path) -> None:
    grid = next(step for step in steps(tmp_path, "", "sm_90") if step.name == "bench-grid")
    options = options_of(grid)
    assert options["shapes"] == "gpu" and options["dtype"] == "bfloat16,float32"
    assert set(PROVIDERS) - set(options["providers"].split(",")) == {"reference"}
    assert options["providers"] == EVERYONE
    assert {shape.rows for shape in SHAPE_SETS["gpu"]} == {64, 512, 4096, 8192}
    vocabs = {shape.vocab for shape in SHAPE_SETS["gpu"]}
    assert vocabs == {32000, 50257, 128256, 151936, 256000}
    assert grid.limit is None and grid.command[2] == "--device"  # no case named: all of them


def test_what_fits_meets_every_case_and_axis(tmp_path: Path) -> None:
    fit = [step for step in steps(tmp_path, "fit", "sm_90") if step.name.startswith("bench-")]
    joined = [options_of(step) for step in fit]
    shapes = {tuple(s.split("x")) for options in joined for s in options["shapes"].split(",")}
    assert {int(v) for _, v in shapes} == {32000, 50257, 128256, 151936, 256000}
    assert {int(n) for n, _ in shapes} == {64, 512, 4096, 8192}
    assert {options["dtype"] for options in joined} == {"bfloat16", "float32"}
    assert any(step.command[2] == "--device" for step in fit)


def test_what_decides_comes_first(tmp_path: Path) -> None:
    """And fits ten minutes, if that is all that there is at a time."""
    todo = steps(tmp_path, "fit", "sm_90")
    names = [step.name for step in todo]
    decisive = ["wheels", "build", "driver", "info", "tests-passes"]
    decisive += ["bench-decides", "alone", "linear"]
    assert names[: len(decisive)] == decisive
    assert sum(step.limit or 0 for step in todo[: len(decisive)]) < 600
    named = {step.name: step for step in todo}
    assert "8192x128256:4096x4096" in named["linear"].line
    assert {"compile", "liger"} <= set(options_of(named["bench-decides"])["providers"].split(","))
    assert named["alone"].env == {"FASTKD_GPU_COOPERATIVE": "0"}
    assert named["tests-passes"].env == {"FASTKD_TEST_SECONDS": "60"}
    own = set(named["tests-passes"].command)
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_gpu*.py")} <= own


def test_numbers_of_programs_are_measured_beside_one(tmp_path: Path) -> None:
    found = [s.env for s in steps(tmp_path, "fit", "sm_90") if s.name.startswith("programs-")]
    assert {env["FASTKD_GPU_COOPERATIVE"] for env in found} == {"4", "8", "16"}
    alone = [s.env for s in steps(tmp_path, "fit", "sm_90") if s.name.startswith("tile-")]
    assert all(env["FASTKD_GPU_COOPERATIVE"] == "0" for env in alone)


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


def test_a_step_out_of_time_is_stopped_with_its_processes(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    began = time.monotonic()
    assert gpu._run([script("slow", code, limit=3, must=True)], tmp_path, 60) == 1
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


LIST = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write('x')"


def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, from outside; what had ended is not repeated, failed or not."""
    program = f"""
import sys, pathlib
from bench import gpu
from bench.gpu_steps import Step
one = {LIST!r}
wait = "import time; time.sleep(600)" if words[0] == "wait" else one
gpu.steps = lambda *a: [
    Step("bad", ["-c", one + "; sys.exit(3)", {str(tmp_path / "bad")!r}]),
    Step("slow", ["-c", "import sys; exec(sys.stdin.read() or open(sys.argv[2]).read())",
        {str(tmp_path / "slow")!r}, {str(tmp_path / "code")!r}]),
    Step("last", ["-c", one, {str(tmp_path / "last")!r}], must=True),
]
pathlib.Path({str(tmp_path / "code")!r}).write_text(wait)
sys.exit(gpu.main(["--results", {str(tmp_path)!r}, *words[1:]]))
"""

    def start(*words: str) -> Any:
        names = {"__name__": "__main__", "words": words}
        process = ranks.context().Process(target=exec, args=(program, names))
        process.start()
        return process

    def end(process: Any, seconds: int) -> int | None:
        process.join(seconds)
        code: int | None = process.exitcode
        return code

    def runs() -> dict[str, int]:
        names = ("bad", "slow", "last")
        return {n: len(p.read_text()) if (p := tmp_path / n).exists() else 0 for n in names}

    first = start("wait")
    deadline = time.monotonic() + 60
    while not (tmp_path / "gpu.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.terminate()
    assert end(first, 30) == 143 and runs() == {"bad": 1, "slow": 0, "last": 0}
    assert list(outcomes(tmp_path)) == ["bad"]
    assert end(start("go"), 60) == 0 and runs() == {"bad": 1, "slow": 1, "last": 1}
    assert [o["status"] for o in outcomes(tmp_path).values()] == ["failed", "ok", "ok"]
    assert end(start("go", "--only", "last"), 60) == 0 and runs()["last"] == 2
    assert list(outcomes(tmp_path)) == ["bad", "slow", "last"]
    assert end(start("go", "--again"), 60) == 0 and runs() == {"bad": 2, "slow": 2, "last": 3}


def test_what_other_sources_have_ended_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = [script("one", "")]
    assert gpu._run(todo, tmp_path, 60) == 0 and set(gpu.ended(tmp_path, todo)) == {"one"}
    assert gpu.ended(tmp_path, [script("one", "pass")]) == {}
    monkeypatch.setattr(gpu, "sources", lambda: "others")
    assert gpu.ended(tmp_path, todo) == {}
    (tmp_path / "gpu.json").write_text('{"steps": [')
    assert gpu.ended(tmp_path, todo) == {}


def test_a_step_that_the_run_has_cut_short_is_repeated(tmp_path: Path) -> None:
    todo = [script("long", "import time; time.sleep(600)", limit=100)]
    gpu._run(todo, tmp_path, 2)
    assert outcomes(tmp_path)["long"]["status"] == "interrupted" and not gpu.ended(tmp_path, todo)


def test_a_file_cut_off_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "gpu-slow.json").write_text('{"machine": ')
    whole = document([Outcome("slow", "", "out of time", note="stopped after 5 s")], tmp_path)
    assert whole["runs"] == {} and whole["machine"] is None
    assert whole["steps"][0]["note"] == "stopped after 5 s; gpu-slow.json is cut off"


def test_make_gpu_is_this() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ngpu:\n")[2].partition("\n\n")[0]
    assert recipe.split() == [
        *("$(PYTHON)", "-m", "bench.gpu", "--results", "$(RESULTS)"),
        *("--minutes", "$(GPU_MINUTES)", "\\"),
        *("--shapes", '"$(GPU_SHAPES)"', "--linear", "$(LINEAR_SHAPES)"),
    ]


def test_the_machine_names_driver_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Wed Jan\nGCC version: 12.3.0"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert machine.driver() == "570.86.15"
    monkeypatch.undo()
    facts = machine.machine(torch.device("cpu"))
    assert facts["driver"] is None and "triton" in facts
