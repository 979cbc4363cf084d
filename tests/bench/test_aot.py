"""Every Triton kernel compiles without a GPU, for every target, and as tightly as it should."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastkd

pytest.importorskip("triton")
from bench.aot import __main__ as aot
from bench.aot.budget import BUDGETS, MERGES, Budget, budget, judge, share, total, usual
from bench.aot.cases import DTYPES, ODD, TARGETS, WHOLE, Case, cases, kernels, places, recorded
from bench.aot.read import Report, TileLoop, loops, read_xpu

ROOT = Path(__file__).parents[2]
PAIRED = ("fused", "cooperative", "topk", "loss", "grad")  # kernels that a divergence is built into


# The last cases are kl's fused kernel once more, for each target: what others have shown by then.
QUICK = """
import sys
from bench.aot import __main__ as aot
cases = aot.cases
aot.cases = lambda quick, targets, *lists: cases(quick, targets, *lists)[: -len(targets)]
sys.exit(aot.main())
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """`python -m bench.aot --quick`, in a process without the interpreter."""
    out = tmp_path_factory.mktemp("aot") / "table.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", QUICK, "--quick", "--json", str(out)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert isinstance(rows, list)
    return rows


def test_every_kernel_of_the_package_is_launched_by_a_pass() -> None:
    """A kernel in a new file that no pass of launch.py starts has no case."""
    assert kernels() == set(places())
    assert {"fused", "topk", "stats", "loss", "grad", "total", "multiply"} <= kernels()


# What old versions of Triton refuse where new ones take it, found with the one that is installed:
# nothing is compiled beyond its first stage.
NESTED = """
import triton.language.core as core
from triton.backends import backends
from bench.aot.build import build
from bench.aot.cases import cases, recorded

class Done(Exception):
    pass

def stop(*_):
    raise Done

made = core.tuple.__init__

def checked(self, args, *rest):
    made(self, args, *rest)
    inner = [x for x in self.values if isinstance(x, core.tuple)]
    if any(isinstance(value, core.tensor) for x in inner for value in x.values):
        raise TypeError("a tuple in a tuple")

core.tuple.__init__ = checked
backends["nvidia"].compiler.make_ttir = staticmethod(stop)
# an expectation, and two that are none; divergences differ in their arithmetic alone
for case in cases(True, ["sm_90"], ["kl", "js", "acceptance"], ["bf16"]):
    try:
        build(recorded(case), "sm_90")
    except Done:
        print(case.kernel)
"""


def test_no_tuple_stands_in_a_tuple() -> None:
    """Triton 3.2 has none, and up to 3.7 `(a, b), c = f()` fails at a kernel's first launch."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_ALWAYS_COMPILE"] = "1"
    command = [sys.executable, "-c", NESTED]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == kernels()


MOST_ARGUMENTS = 20  # constants are counted too, and a tuple is one


def test_no_function_takes_more_than_twenty_arguments() -> None:
    """Kernels and what they call: what travels together is passed together."""
    seen = {}
    for path in sorted((ROOT / "fastkd" / "backends" / "gpu").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and _jitted(node):
                of = node.args
                seen[path.stem, node.name] = len([*of.posonlyargs, *of.args, *of.kwonlyargs])
    assert {f"{name}_kernel" for name in kernels()} <= {name for _, name in seen}
    assert len(seen) > 100
    assert {place: n for place, n in seen.items() if n > MOST_ARGUMENTS} == {}


def _jitted(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


# A launch whose divergence stands in a file; hashes by which Triton would find a binary of it: as
# the launcher hands it over, and as a constexpr.
EDITED = """
import triton, triton.language as tl
from unittest import mock
from bench.aot.build import build
from bench.aot.cases import Case, Launch, recorded
import divergence_in_a_file

launch = recorded(Case("fused", "kl", "bf16", "sm_90"))
for wrap in (lambda x: x, tl.constexpr):
    const = launch.args["const"]._replace(DIVERGENCE=wrap(divergence_in_a_file.kl))
    with mock.patch.object(triton, "compile", lambda source, **_: print(source.hash()) or exit_):
        exit_ = mock.MagicMock()
        build(Launch(launch.kernel, {**launch.args, "const": const}, launch.threads), "sm_90")
"""


def test_an_edited_divergence_is_not_found_in_the_cache(tmp_path: Path) -> None:
    """It is an argument in a tuple: its source must be a part of what Triton looks up."""
    found = []
    for result in ("q", "p"):
        text = "import triton\n@triton.jit\ndef kl(logp, logq, p, q):\n    return "
        (tmp_path / "divergence_in_a_file.py").write_text(text + result + "\n")
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        env |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", EDITED]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    (first, by_name), (second, by_name_again) = found
    assert first != second
    assert by_name == by_name_again  # what would go wrong


def test_a_launch_hands_over_what_its_kernel_takes() -> None:
    """And options that Triton's backend for the GPU knows: it refuses any other name."""
    from triton.backends.nvidia.compiler import CUDAOptions

    for target in ("sm_90", "gfx942"):
        for case in cases(False, [target], list(fastkd.divergences), ["bf16"]):
            launch = recorded(case)
            assert launch is not None
            rest = launch.args.keys() - set(launch.kernel.arg_names)
            assert launch.args.keys() >= set(launch.kernel.arg_names)
            assert rest <= {"maxnreg"} & CUDAOptions.__dataclass_fields__.keys()
            assert target == "sm_90" or not rest


def test_every_kernel_and_divergence_has_a_case() -> None:
    names = list(fastkd.divergences)
    for quick in (False, True):
        todo = cases(quick, list(TARGETS), names, list(DTYPES))
        assert {case.kernel for case in todo} == kernels()
        assert {case.vocab for case in todo} >= {ODD}
        of = [{case.divergence for case in todo if case.kernel == kernel} for kernel in PAIRED]
        assert set(names) == of[0] == set().union(*of[2:])
        assert all(found == set(names) for found in of) or (quick and all(map(len, of)))
    todo = cases(False, list(TARGETS), names, list(DTYPES))
    everything = {(case.kernel, case.dtype, case.target) for case in todo}
    nowhere = {("cooperative", dtype, "gfx942") for dtype in DTYPES}
    assert everything == {(k, d, t) for k in kernels() for d in DTYPES for t in TARGETS} - nowhere


def test_everything_is_compiled(table: list[dict[str, Any]]) -> None:
    assert {row["kernel"] for row in table} == kernels()
    assert {row["target"] for row in table} == set(TARGETS)
    assert {row["dtype"] for row in table} == set(DTYPES)


def test_nothing_spills_calls_or_reads_narrowly(table: list[dict[str, Any]]) -> None:
    for row in table:
        assert row["problems"] == [], row
        assert row["spills"] == 0 and row["calls"] == 0 and row["registers"], row
        wide = row["bytes"] == 16 or row["kernel"] in MERGES  # those read numbers, one by one
        assert wide or row["vocab"] == ODD or not row["rows"], row


def test_the_counts_are_of_all_loops(table: list[dict[str, Any]]) -> None:
    """An expectation has its first loop, the one for rows that overflow, and the gradient's."""
    for row in table:
        if row["kernel"] in WHOLE and row["vocab"] != ODD:
            assert [loop["writes"] for loop in row["loops"]] == [
                False,
                False,
                True,
            ], row
            assert row["share"] and 0 < row["share"] <= 1, row


def _report(**changes: Any) -> Report:
    plain = Report("fused", "kl", "bf16", "sm_90", hard=False, bytes=16)
    plain.loops = [TileLoop(2.25, 20, False), TileLoop(2, 16, True)]
    return replace(plain, **changes)


def test_a_report_within_its_budget_is_no_problem() -> None:
    report = _report()
    judge(report)
    assert report.problems == [] and report.share == 1.0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spills": 2}, "spills: 2"),
        ({"calls": 1}, "calls: 1"),
        ({"bytes": 4}, "an access of 4 bytes"),
        ({"narrow": 30, "pointers": 7}, "30 narrow accesses for 7 pointers"),
        ({"loops": []}, "no loop that reads a row"),
        (
            {"loops": [TileLoop(3.3, 20, False), TileLoop(2, 16, True)]},
            "special: 5.3 a column, over",
        ),
        (
            {"loops": [TileLoop(2, 30, False), TileLoop(2, 16, True)]},
            "instructions: 46 a column, over",
        ),
    ],
)
def test_what_is_a_problem(changes: dict[str, Any], problem: str) -> None:
    report = _report(**changes)
    judge(report)
    assert len(report.problems) == 1 and problem in report.problems[0]


def test_the_loop_of_rows_that_overflow_is_not_an_ordinary_rows() -> None:
    rare = TileLoop(1, 17, False)
    report = _report(loops=[TileLoop(2, 20, False), rare, TileLoop(2, 16, True)])
    assert rare not in usual(report) and total(report) == (4, 36)
    report.divergence = "js"
    assert rare in usual(report) and total(report) == (5, 53)


def test_budgets() -> None:
    """Every divergence has one; labels cost more, float32 has the time of its bytes."""
    assert set(BUDGETS) == set(fastkd.divergences)
    plain, hard = budget(_report()), budget(_report(hard=True))
    assert plain == BUDGETS["kl"] and hard is not None and hard > plain
    assert budget(_report(dtype="fp32")) == Budget(10.4, 82)
    assert budget(_report(dtype="fp64")) is None and budget(_report(vocab=ODD)) is None


def test_the_share_of_the_floor() -> None:
    """Twice the instructions that an H200 has time for leave half of the floor."""
    report = _report(loops=[TileLoop(0, 83.6, True)])
    assert share(report) == pytest.approx(0.5, abs=0.01)
    assert share(_report(target="sm_86")) is None


def test_loops() -> None:
    """Innermost loops by their backward branch; comments and labels are no instructions."""
    code = """
    mov
    L1: // outer
    add
    L2:
    ld // a comment
    @p bra L2
    @p bra L1
    exit
    """.splitlines()
    found = loops((line.strip() for line in code), r"(L\d):", r"bra\s+(L\d)")
    assert found.inside == [["ld", "@p bra L2"]]
    assert found.outside == ["mov", "add", "@p bra L1", "exit"]


def test_what_is_read_of_an_xpu() -> None:
    """Calls of functions that neither LLVM nor SPIR-V has, and memory that a register should be."""
    fine = """
    %1 = tail call spir_func float @_Z27__spirv_ConvertBF16ToFINTELs(i16 %0)
    %2 = tail call float @llvm.exp2.f32(float %1)
    """
    report = _report(target="xpu")
    read_xpu(report, {"llir": fine}, 1.0)
    assert report.calls == 0 and report.problems == [] and report.registers is report.spills is None
    read_xpu(report, {"llir": fine + "%3 = alloca float\ncall void @helper(float %2)\n"}, 1.0)
    assert report.calls == 1
    judge(report)
    assert report.problems == ["an array in a thread's own memory", "calls: 1"]


def test_xpu_is_a_target_of_intels_triton_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench.aot", "--targets", "sm_80,xpu"])
    assert aot.main() == 2
    assert "needs the package triton-xpu" in capsys.readouterr().out


def test_cases_are_of_the_targets_asked_for() -> None:
    todo = cases(True, ["sm_80"], ["kl"], ["fp32"])
    assert {(case.target, case.dtype) for case in todo} == {("sm_80", "fp32")}
    assert Case("fused", "kl", "fp32", "sm_80", hard=False) in todo
