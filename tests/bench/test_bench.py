"""The benchmark: every family runs, its tables say what its JSON says, bad arguments are told."""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from pathlib import Path

import pytest
import ranks
import torch
import torch.nn.functional as F
from bench_runs import CPU, ONCE, results_in, silent, tables

import fastkd
from bench.__main__ import main
from bench.families import FAMILIES, load
from bench.families.loss_cases import CASES, FUNCTIONS, SHAPE_SETS, TOY_SHAPE, WrittenCase, bare
from bench.families.loss_providers import PLAIN, PROVIDERS
from bench.families.losses import Bench, comparison
from bench.harness import table
from bench.harness.measure import measure

ROOT = Path(__file__).parents[2]
EXTRA = {"store-scale": ["--ranks", "4", "--tokens", "1000000", "--mib", "1", "2"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_and_its_table_says_what_its_json_says(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in ("communication", "vocab-parallel"):
        start = ranks.context()
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: start)
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


@pytest.mark.parametrize("family", [["kl_div"], ["linear", "kl_div"]], ids=lambda words: words[0])
def test_pictures(family: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, shapes = tmp_path / "x.png", "2x9:4x4,4x9:4x4,4x17:4x4"
    more = ["--shapes", shapes if "linear" in family else "2x5,3x4", "--device", "cpu"]
    arguments = [*family, *more, "--toy", "--providers", "eager,fastkd", "--plot", str(file)]
    assert main(arguments) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_demo_shows_the_speedup(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "8x64", "--seconds", "0.05", "--providers", "eager,reference,fastkd"]
    assert main(["--demo", "--device", "cpu", *arguments]) == 0
    (found,) = tables(capsys.readouterr().out)
    assert "vs eager" in found[0] and "forward ms" not in found[0]
    assert all(row[found[0].index("vs eager")].endswith("x") for row in found[2:-1])


def test_the_program_lists_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--list"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "bench" / "__main__.py"), run_name="__main__")
    assert end.value.code == 0
    said = capsys.readouterr().out
    for name in (*FAMILIES, *CASES, *PROVIDERS, *SHAPE_SETS):
        assert name in said


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


def test_what_is_written_behind_a_loss_is_timed_beside_the_bare_one() -> None:
    written = [case for case in CASES.values() if isinstance(case, WrittenCase)]
    assert len(written) == 4 and list(CASES)[:4] == [case.name for case in written]
    inputs = written[1].make_inputs(TOY_SHAPE, torch.float32, CPU, seed=0)
    s, t, labels = inputs
    bare = fastkd.kl_div(s, t, temperature=2.0)
    for case in written:
        got = case.function(s, t, labels if case.alpha else None, **case.options)
        hard = case.alpha * F.cross_entropy(s, labels) if case.alpha else 0.0
        torch.testing.assert_close(got, case.factor * bare + hard)
        assert eval(case.call.replace("fastkd.kl_div", "loss"), {  # what is printed is what is run
            "F": F, "T": 2.0, "student": s, "teacher": t, "labels": labels, "loss": fastkd.kl_div
        }) == got  # fmt: skip
