"""The losses that `python -m fastkd scan` finds in sources, and the lines it would write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fastkd
from fastkd.__main__ import main
from fastkd.scan import Found, scan

HEAD = """import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.functional import log_softmax as lsm
"""
# the loss as users write it, and what must be said in its place
LINES = {
    "F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction='batchmean')": (
        'fastkd.kl_div(s, t, temperature=T, reduction="batchmean")'
    ),
    "F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction='sum')": (
        'fastkd.kl_div(s, t, reduction="sum")'
    ),
    "F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1))": (
        'fastkd.kl_div(s, t, temperature=T, reduction="sum") / s.numel()'
    ),
    "F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction='batchmean')": (
        'fastkd.kl_div(s, t, reduction="batchmean")'
    ),
    "F.kl_div(lsm(t, -1), torch.softmax(s, dim=-1), reduction='batchmean')": (
        'fastkd.reverse_kl_div(s, t, reduction="batchmean")'
    ),
    "nn.KLDivLoss(reduction='batchmean')(F.log_softmax(s / T, -1), F.softmax(t / T, -1))": (
        'fastkd.kl_div(s, t, temperature=T, reduction="batchmean")'
    ),
    "nn.KLDivLoss(reduction='sum')(nn.LogSoftmax(dim=-1)(s), nn.Softmax(dim=-1)(t.detach()))": (
        'fastkd.kl_div(s, t.detach(), reduction="sum")'
    ),
}
# the same up to the teacher's entropy, which has no gradient
CROSS_ENTROPIES = {
    "F.cross_entropy(s, F.softmax(t, -1))": "fastkd.kl_div(s, t)",
    "-(F.softmax(t / T, -1) * F.log_softmax(s / T, -1)).sum(-1).mean()": (
        "fastkd.kl_div(s, t, temperature=T)"
    ),
}


FILES = ("code.py", "latin.py")


def found(text: str, folder: Path, head: str = HEAD) -> list[Found]:
    file = folder / "code.py"
    file.write_text(head + text)
    return list(scan(file))


@pytest.mark.parametrize("line", [*LINES, *CROSS_ENTROPIES])
def test_replacement_is_the_same_loss(line: str, tmp_path: Path) -> None:
    """Both lines are run: the one of the user and the one that is written for it."""
    (only,) = found(f"def loss(s, t, T):\n    return {line}\n", tmp_path)
    assert only.replacement == {**LINES, **CROSS_ENTROPIES}[line] and only.line == 6
    s, t = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
    names = {"s": s, "t": t, "T": 2.0, "F": F, "nn": nn, "torch": torch, "lsm": F.log_softmax}
    theirs = eval(line, names)
    ours = eval(only.replacement, {**names, "fastkd": fastkd})
    if line in LINES:
        torch.testing.assert_close(ours, theirs)
    else:
        assert "entropy" in only.note
    grads = [torch.autograd.grad(x, s)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_names_are_followed(tmp_path: Path) -> None:
    text = """
class Distiller(nn.Module):
    def __init__(self):
        self.divergence = nn.KLDivLoss(reduction="batchmean")

    def forward(self, y_s, y_t):
        log_q = F.log_softmax(y_s / self.T, dim=-1)
        p = F.softmax(y_t / self.T, dim=-1)
        return self.divergence(log_q, p) * (self.T ** 2)
"""
    (only,) = found(text, tmp_path)
    assert only.replacement == (
        'fastkd.kl_div(y_s, y_t, temperature=self.T, reduction="batchmean")'
    )
    assert only.note == "the factor self.T ** 2 stays"


def test_names_of_another_function_are_not(tmp_path: Path) -> None:
    text = """
def one(a, b):
    q = F.log_softmax(a, -1)

def two(q, p):
    return F.kl_div(q, p)
"""
    (only,) = found(text, tmp_path)
    assert only.replacement is None and "could not be followed" in only.note


@pytest.mark.parametrize(
    "line",
    [
        "F.cross_entropy(s, labels)",
        "(F.softmax(s, -1) * F.log_softmax(s, -1)).sum()",
        "F.softmax(s, -1) * weights",
        "kl_div(s, t)",
    ],
)
def test_what_is_no_distillation(line: str, tmp_path: Path) -> None:
    assert not found(f"def f(s, t, labels, weights):\n    return {line}\n", tmp_path)


def test_what_cannot_be_said_is_said(tmp_path: Path) -> None:
    line = "F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 4, -1), reduction=kind)"
    (only,) = found(f"def f(s, t, kind):\n    return {line}\n", tmp_path)
    assert "two temperatures (2 and 4)" in only.note and "(kind)" in only.note
    fault = "F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), reduction='sum')"
    (only,) = found(f"def f(s, t):\n    return {fault}\n", tmp_path)
    assert "log_target" in only.note


def test_folders_and_files_that_are_no_python(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text(
        HEAD + "F.kl_div(F.log_softmax(a, -1), F.softmax(b, -1))\n"
    )
    (tmp_path / "two.py").write_text("def broken(:\n")
    (tmp_path / "three.txt").write_text("F.kl_div(a, b)")
    one, two = scan(tmp_path)
    assert one.file.endswith("one.py") and one.replacement
    assert two.file.endswith("two.py") and two.note.startswith("not read")
    assert len(list(scan(tmp_path, tmp_path / "a"))) == 2  # a file counts once
    with pytest.raises(FileNotFoundError, match="expected a Python file or a folder"):
        list(scan(tmp_path / "nowhere"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code.py").write_text(
        HEAD + "x = F.kl_div(F.log_softmax(a, -1), F.softmax(b, -1), reduction='sum')\n"
    )
    assert main(["scan", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "code.py:5" in shown and "fastkd.kl_div(a, b" in shown
    assert main(["scan", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document[0]["line"] == 5 and document[0]["replacement"].startswith("fastkd.kl_div")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    assert main(["scan", *(str(tmp_path / x) for x in FILES)]) == 0
    several = capsys.readouterr().out
    assert "latin.py:1" in several
    assert "not read: " in several and "1 found, 1 not read" in several
    with pytest.raises(SystemExit):
        main(["scan", str(tmp_path / "nowhere")])
    assert "expected a Python file or a folder" in capsys.readouterr().err


@pytest.mark.parametrize("how", [[], ["--json"], ["--diff"], ["--write"]])
def test_exit_status_is_that_of_the_doctor(
    how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 where a fault is named, 0 where losses can only be written in another way."""
    line = "x = F.kl_div(F.log_softmax(a, -1), F.softmax(b, {}), reduction='sum')\n"
    for name, dim in (("right.py", -1), ("wrong.py", 0)):
        (tmp_path / name).write_text(HEAD + line.format(dim))
    assert main(["scan", *how, str(tmp_path / "right.py")]) == 0
    assert main(["scan", *how, str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    if not how:
        assert "    fault: axis: " in shown and "2 found, 1 with a fault, nothing" in shown
    for command in ("scan", "doctor"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "exit status: 0 no fault was found, 1 a loss has" in capsys.readouterr().out


def test_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells are read as one source, each named by its number; one that is no Python by itself."""
    sources = [
        ("markdown", ["# F.kl_div(a, b)"]),
        ("code", ["%matplotlib inline\n", "!pip list\n", *HEAD.splitlines(keepends=True)]),
        ("code", ["files = !ls\n", "T = 4\n", "p = F.softmax(t / T, dim=-1)"]),
        ("code", "%%bash\nls F.kl_div(\n"),
        ("code", ["def broken(:\n"]),
        ("code", ["%%time\n", "q = lsm(s / T, -1)\n", "F.kl_div(q, p, size_average=False)"]),
    ]
    cells = [{"cell_type": kind, "source": source} for kind, source in sources]
    (tmp_path / "book.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    (tmp_path / "torn.ipynb").write_text('{"cells": [')
    (tmp_path / "old.ipynb").write_text("[1]")
    broken, loss, old, torn = scan(tmp_path)
    assert broken.cell == 5 and broken.note.startswith("not read")
    assert (loss.cell, loss.line) == (6, 3)
    assert loss.replacement == 'fastkd.kl_div(s, t, temperature=T, reduction="sum")'
    assert old.note.startswith("not read") and torn.note.startswith("not read")
    main(["scan", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "book.ipynb:cell 6:3" in shown and "1 found, 3 not read" in shown
