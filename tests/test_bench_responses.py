"""The benchmark of the responses at a toy size: a check of itself, and of its definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from bench import responses

TOY = ["--shape", "5x50", "--seconds", "0.001", "--threads", "1"]


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "responses.json"
    assert responses.main([*TOY, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["losses"]
    assert [row["loss"] for row in rows] == [case.name for case in responses.CASES]
    text = capsys.readouterr().out
    for row in rows:
        assert 0 < row["ours_peak"] and 0 < row["plain_peak"]
        assert row["rounds"] >= 5 and row["apart"] <= responses.AGREE
        assert f"{row['ours_ms']:10.2f}{row['plain_ms']:10.2f}" in text


def test_a_loss_that_is_another_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = responses.CASES[1]

    def wrong(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 1.01 * case.plain(s, t, y)

    monkeypatch.setattr(responses, "CASES", [case._replace(ours=wrong)])
    assert responses.main(TOY) == 1
    assert "logit_mse: not what its definition says" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "huge"], "--losses: got 'huge', expected one of kl"),
        (["--shape", "5"], "--shape: got '5', expected such as"),
        (["--shape", "0x7"], "--shape: got '0x7', expected such as"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        responses.main(arguments)
    assert message in capsys.readouterr().err
