"""The recipes: each runs at one seed and reduced size, and the runner judges as it says."""

from __future__ import annotations

import json
import math
import multiprocessing
import zlib
from collections.abc import Iterator
from pathlib import Path

import pairwise
import pytest
import ranks
import torch

from fastkd.__main__ import main
from fastkd.recipes import architecture, cached, cross_tokenizer, runner
from fastkd.recipes.recipe import Figures, Gain, Recipe

SIZE = 0.003  # the fewest steps of nearly all of them


@pytest.fixture(scope="module")
def few() -> Iterator[None]:
    """Less text, fewer held-out positions and candidates: of what the size does not reduce."""
    monkeypatch = pytest.MonkeyPatch()
    kept = (cached.sources, cached.tokens, cached.teacher)
    for module, name, value in (
        (cached, "CHARACTERS", 200_000),
        (cached, "HELD_OUT", 1000),
        (cross_tokenizer, "HELD_OUT", 50),
        (architecture, "CANDIDATES", 4),
    ):
        monkeypatch.setattr(module, name, value)
    for one in kept:
        one.cache_clear()
    yield
    monkeypatch.undo()
    for one in kept:
        one.cache_clear()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", list(runner.known()))
def test_a_recipe_runs_and_repeats_itself(name: str) -> None:
    recipe = runner.known()[name]
    if name == "automatic":
        pytest.importorskip("optuna")
    assert recipe.name == name and recipe.about and recipe.gains and recipe.seeds >= 2
    first = recipe.run(3, SIZE)
    # a third of them runs twice; all draw from the same few generators
    if pairwise.ALL or zlib.crc32(name.encode()) % 3 == 2:
        assert recipe.run(3, SIZE) == first
    assert all(math.isfinite(figure) for figure in first.values())
    for claim in recipe.gains:
        assert {claim.method, claim.control} - {""} <= set(first)
        assert 0 <= claim.seeds_improved <= 1


def fake(seed: int, size: float) -> Figures:
    return {"a": 10.0 + seed, "b": 9.0 + 2 * seed * size, "seed": float(torch.initial_seed() >= 0)}


CLAIMS = (
    Gain("a", "b", -1.0, seeds_improved=0.25),
    Gain("a", "b", 0.0),
    Gain("a", "b", -1.0, seeds_improved=0.5),
    Gain("a", "", None),
)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    recipe = Recipe("fake", "nothing at all", "", fake, CLAIMS, seeds=4)
    monkeypatch.setattr(runner, "known", lambda: {"fake": recipe})
    yield recipe


def test_gains_are_judged_over_seeds(faked: Recipe) -> None:
    # gains over seeds 0 to 3: 1 - seed
    result = runner.run(["fake"], jobs=1, progress=False)
    rows = [runner.Row(**row) for row in result["rows"]]
    assert [row.gain for row in rows] == [-0.5, -0.5, -0.5, 11.5]
    assert (rows[0].low, rows[0].high, rows[0].seeds_improved, rows[0].seeds) == (-2.0, 1.0, 1, 4)
    assert rows[0].deviation == pytest.approx(1.2909944)
    assert [row.met for row in rows] == [True, False, False, None]
    assert len(runner.missed(result)) == 2
    text = runner.as_text(result)
    assert "MISSED" in text and "-2.0 .. +1.0" in text and "1/4" in text


def test_too_little_is_not_judged(faked: Recipe) -> None:
    for options in ({"seeds": 3}, {"size": 0.5}):
        result = runner.run(["fake"], jobs=1, progress=False, **options)
        assert {row["met"] for row in result["rows"]} == {None} and not runner.missed(result)


def test_command_line(faked: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "nothing at all" in capsys.readouterr().out
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    threads = torch.get_num_threads()
    assert main(["recipes", "fake", "--jobs", "1", "--first-seed", "1", *files]) == 1
    assert torch.get_num_threads() == threads
    said = capsys.readouterr()
    assert "fake: a over b is -1.5 points, 0/4 seeds; expected +0" in said.err
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["figures"]["fake"]) == ["1", "2", "3", "4"] and result["torch"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main(["recipes", "--all", "--seeds", "1", "--jobs", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["none"], "got ['none'], expected some of fake"),
        (["fake", "--size", "2"], "size: got 2.0"),
        (["fake", "--seeds", "0"], "seeds: got 0"),
        (["fake", "--jobs", "0"], "jobs: got 0"),
        (["fake", "--json", "/no/such/folder/x.json"], "folder that exists"),
    ],
)
def test_bad_arguments(
    faked: Recipe, arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["recipes", *arguments])
    assert match in capsys.readouterr().err


def test_seeds_in_processes_give_what_one_process_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    start = ranks.context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: start)
    one, two = (
        runner.run(["self-taught"], seeds=2, size=SIZE, jobs=jobs, progress=False)
        for jobs in (1, 2)
    )
    assert one["figures"] == two["figures"]
