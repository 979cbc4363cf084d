"""The doctor finds what was planted, and is silent over what is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_images
import faulty_logits
import faulty_text
import pytest
import right_images
import right_text
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd import distill, doctor
from fastkd.__main__ import main
from fastkd.distill import diagnose
from fastkd.doctor import FAULTS as KNOWN
from fastkd.doctor import examine

FAULTS = {**faulty_images.FAULTS, **faulty_logits.FAULTS, **faulty_text.FAULTS}
RIGHT = {**right_images.RIGHT, **right_text.RIGHT}


@pytest.fixture(autouse=True)
def _same_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def _doctor(
    tmp_path: Path, script: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "train.py"
    file.write_text(script)
    status = main(["doctor", "--json", str(file)])
    assert sorted(tmp_path.iterdir()) == [file]  # it writes nothing
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


def test_warnings_of_torch_name_the_line_of_the_script(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    body = """
log_q = student(X).log_softmax(1)
nn.KLDivLoss()(log_q, nn.Softmax(1)(teacher(X)))
F.softmax(X)
nn.Softmax()(X)
torch.optim.lr_scheduler.StepLR(torch.optim.SGD(student.parameters()), 1).step()
"""
    file = tmp_path / "train.py"
    file.write_text(faulty_images.IMAGES + body)
    assert examine(file).error is None
    lines = file.read_text().splitlines()
    for at, words in enumerate(("reduction: 'mean'", "Implicit", "Implicit", "scheduler"), -4):
        found = [(x.filename, x.lineno) for x in recwarn if words in str(x.message)]
        assert (str(file), len(lines) + 1 + at) in found, lines[at]


def test_the_factor_that_a_mean_over_classes_makes(tmp_path: Path) -> None:
    """64 rows of 5 classes: 2.8 is meant, and 0.56 arrives."""
    file = tmp_path / "train.py"
    file.write_text(faulty_logits.MEAN.format(soft="F.kl_div(log_q, p)"))
    (only,) = examine(file).findings
    assert "64 rows times 5 columns: the soft term's factor is 0.56, " in only.evidence
    assert only.evidence.endswith("a mean over the rows makes it 2.8")


def test_a_batchmean_hides_no_missing_t_squared(tmp_path: Path) -> None:
    """4 rows of 8 tokens: 0.5 becomes 4, as if T^2 = 4 and more were in it."""
    file = tmp_path / "train.py"
    file.write_text(faulty_text.BATCHMEAN.format(soft=faulty_text.PAIRS["torch"], factor="1"))
    first, other = examine(file).findings
    assert (first.name, other.name) == ("reduction", "temperature")
    assert first.evidence.startswith("batchmean of 32 rows divides by 4, ")
    assert "factor is 4, a mean over the rows makes it 0.5" in first.evidence
    assert "factor is 4 beside a hard one of 0.5, without T^2 = 4" in other.evidence


def test_every_kind_is_planted() -> None:
    assert {kind for kind, _, _ in FAULTS.values()} == set(KNOWN)


def test_results_are_those_of_the_script_alone(tmp_path: Path) -> None:
    body = (
        faulty_text.FAULTS["mean of means"][2]
        + """
with torch.no_grad():
    total = [p.double().sum().item() for p in student.parameters()]
"""
    )
    alone: dict[str, Any] = {}
    exec(compile(body, "alone", "exec"), alone)
    file, told = tmp_path / "train.py", tmp_path / "told.txt"
    file.write_text(f"{body}\nopen({str(told)!r}, 'w').write(repr(total))\n")
    assert examine(file).steps == 4
    assert told.read_text() == repr(alone["total"])


def test_stops_after_its_steps_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.py"
    file.write_text(faulty_images.FAULTS["T squared missing"][2] + "\nprint('end of the script')\n")
    assert main(["doctor", "--steps", "2", str(file), "--epochs", "3"]) == 1
    out = capsys.readouterr().out
    assert "temperature: the factor T^2 is missing or doubled" in out
    assert "1 finding in 2 steps of distillation" in out
    assert "end of the script" not in out


def test_the_example_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(doctor.__file__).with_name("README.md").read_text()
    script, shown = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "text"))
    (tmp_path / "train.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "train.py"]) == 1
    assert capsys.readouterr().out == shown


def test_a_script_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.py"
    body = """
class Own(nn.Module):
    def forward(self, x):
        raise KeyError('mine')
Own()(X)
"""
    file.write_text(faulty_images.IMAGES + body)
    assert main(["doctor", str(file)]) == 2
    told = capsys.readouterr()
    assert "KeyError: 'mine'" in told.err and f'"{file}", line' in told.err
    assert "runpy" not in told.err and "fastkd" not in told.err
    file.write_text("import sys\nsys.exit(0)\n")
    assert main(["doctor", str(file)]) == 0
    assert "no optimizer step was seen after a distillation loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path / "absent.py")])
    with pytest.raises(ValueError, match="steps: got 0, expected 1 or more"):
        examine(file, steps=0)


def _net(seed: int, *, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Linear(6, 5))


def _kl(s: Tensor, t: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    soft = F.kl_div(F.log_softmax(s / 2, 1), F.softmax(t.detach() / 2, 1), reduction="batchmean")
    return 0.5 * F.cross_entropy(s, batch[1]) + 0.5 * soft


def test_diagnose_one_batch() -> None:
    student, teacher = _net(0), _net(1)
    batch = torch.randn(8, 4), torch.randint(0, 5, (8,))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    state = torch.get_rng_state()
    found = diagnose(student, teacher, batch, _kl)
    assert {x.name for x in found} == {"temperature", "teacher_mode"}
    assert "T = 2" in found.table() and str(found) == found.table()
    assert all(x.grad is None for x in student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    teacher.eval()
    right = diagnose(
        student, teacher, batch, lambda s, t, b: _kl(s, t, b) * 0 + F.mse_loss(s, t.detach())
    )
    assert right == [] and str(right) == "no findings"
    with pytest.raises(TypeError, match="loss: got float"):
        diagnose(student, teacher, batch, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss: got a float from it, expected a tensor"):
        diagnose(student, teacher, batch, lambda s, t, b: 1.0)  # type: ignore[arg-type, return-value]


def test_diagnose_terms_as_the_trainer_takes_them() -> None:
    student, teacher = _net(0), _net(1)
    batch = {"inputs": torch.randn(8, 4), "labels": torch.randint(0, 5, (8,))}
    hint = distill.feature("0", "0", distill.features.hint)
    terms = [distill.hard(0.1), distill.soft(0.9, temperature=4.0), hint]
    assert diagnose(student, teacher, batch, terms) == [] and teacher.training
    assert diagnose(student, teacher, tuple(batch.values()), terms[0]) == []
    cut = distill.Term("cut", lambda s, t, b: F.mse_loss(s.logits.detach(), t.logits))
    with pytest.warns(UserWarning, match="term 'cut'"):
        found = diagnose(student, teacher, batch, [terms[0], cut])
    assert {x.name for x in found} == {"gradient"}
    swapped = distill.Term("swapped", lambda s, t, b: fastkd.kl_div(t.logits, s.logits))
    assert {x.name for x in diagnose(student, teacher, batch, swapped)} == {"swapped"}
    with pytest.raises(TypeError, match="loss: got function in it"):
        diagnose(student, teacher, batch, [terms[0], _kl])  # type: ignore[list-item]


def test_diagnose_a_loss_without_gradient() -> None:
    student, teacher = _net(0), _net(1).eval()
    batch = torch.randn(8, 4), torch.randint(0, 5, (8,))
    found = diagnose(student, teacher, batch, lambda s, t, b: F.mse_loss(s.detach(), t.detach()))
    assert {x.name for x in found} == {"gradient"}
