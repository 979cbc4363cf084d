"""The doctor finds what was planted, and is silent over what is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from faulty_scripts import FAULTS, IMAGES
from right_scripts import RIGHT
from torch import nn
from torch.nn import functional as F

from fastkd.__main__ import main
from fastkd.distill import diagnose
from fastkd.doctor import FAULTS as KNOWN


@pytest.fixture(autouse=True)
def _same_random_state() -> object:
    with torch.random.fork_rng():
        yield


def _doctor(tmp_path: Path, script: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    file = tmp_path / "train.py"
    file.write_text(script)
    status = main(["doctor", "--json", str(file)])
    assert sorted(tmp_path.iterdir()) == [file]
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", FAULTS)
def test_finds_what_was_planted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, text, script = FAULTS[name]
    status, told = _doctor(tmp_path, script, capsys)
    assert status == 1
    assert {x["name"] for x in told["findings"]} == {wanted}
    lines = script.splitlines()
    assert any(text in lines[x["line"] - 1] for x in told["findings"])
    for found in told["findings"]:
        assert found["file"] == str(tmp_path / "train.py")
        assert found["evidence"] and found["fix"]
    assert told["steps"]


@pytest.mark.parametrize("name", RIGHT)
def test_is_silent_over_what_is_right(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = _doctor(tmp_path, RIGHT[name], capsys)
    assert (status, told["findings"], told["failed"]) == (0, [], None)
    assert told["steps"] > 0


def test_every_kind_is_planted_once() -> None:
    assert {kind for kind, _, _ in FAULTS.values()} == set(KNOWN)
