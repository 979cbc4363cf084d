"""scan --diff and --write: the safe lines, and nothing else of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastkd.__main__ import main

SOURCE = """\
# é: a comment that stays
import torch
import torch.nn.functional as F

def soft(s, t, T):  # é
    x = F.kl_div(F.log_softmax(s / T, -1),
                 F.softmax(t / T, -1),
                 reduction="batchmean") * T * T  # Hinton
    return x + F.cross_entropy(s, t.softmax(1))
"""
WRITTEN = """\
# é: a comment that stays
import torch
import torch.nn.functional as F
import fastkd

def soft(s, t, T):  # é
    x = fastkd.kl_div(s, t, temperature=T, reduction="batchmean") * T * T  # Hinton
    return x + F.cross_entropy(s, t.softmax(1))
"""


def test_diff_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.py"
    file.write_text(SOURCE)
    assert main(["scan", "--diff", str(file)]) == 0
    told = capsys.readouterr()
    assert file.read_text() == SOURCE
    assert "+    x = fastkd.kl_div(s, t, temperature=T" in told.out
    assert told.out.count("\n-") == 3 and "1 of 2 places would be" in told.err


def test_the_summary_counts_what_is_left_and_says_where_the_notes_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train it.py"
    held = SOURCE.replace("s / T, -1),", "s / T, -1),  # student").replace("soft(", "held(")
    file.write_text(SOURCE + held.split("functional as F\n")[1])
    (tmp_path / "torn.py").write_text("def broken(:\n")
    for how, verb in (("--diff", "would be rewritten by --write"), ("--write", "rewritten")):
        assert main(["scan", how, str(file), str(tmp_path / "torn.py")]) == 0
        assert capsys.readouterr().err.splitlines() == [
            f"1 of 4 places {verb}",
            f"2 only noted, the notes are printed by: python -m fastkd scan '{file}' "
            f"{tmp_path / 'torn.py'}",
            "1 left as they are, for a comment or another loss within them",
            "1 not read",
        ]
    (tmp_path / "torn.py").write_text(WRITTEN.split("    return")[0] + "    return x\n")
    assert main(["scan", "--diff", str(tmp_path / "torn.py")]) == 0
    assert capsys.readouterr().err == "0 of 0 places would be rewritten by --write\n"
    with pytest.raises(SystemExit):
        main(["scan", "--diff", "--json", str(file)])
    assert "--json: got it with --diff or --write" in capsys.readouterr().err


def test_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.py"
    for text, wanted in ((SOURCE, WRITTEN), (WRITTEN, WRITTEN)):
        for end in ("\n", "\r\n"):
            file.write_bytes(text.replace("\n", end).encode())
            assert main(["scan", "--write", str(file)]) == 0
            assert file.read_bytes() == wanted.replace("\n", end).encode()
    held = SOURCE.replace("s / T, -1),", "s / T, -1),  # student")
    file.write_text(held)
    assert main(["scan", "--write", str(file)]) == 0
    assert file.read_text() == held  # a comment would be lost


def test_write_a_notebook(tmp_path: Path) -> None:
    file = tmp_path / "kd.ipynb"
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["F.kl_div"]},
        {
            "cell_type": "code",
            "execution_count": 3,
            "metadata": {"tags": ["é"]},
            "outputs": [],
            "source": SOURCE.splitlines(keepends=True),
        },
    ]
    document = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    file.write_text(text)
    assert main(["scan", "--write", str(file)]) == 0
    cells[1]["source"] = WRITTEN.splitlines(keepends=True)
    assert file.read_text() == json.dumps(document, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("first", ["%%time\n", "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n"])
def test_the_import_stands_behind_lines_that_must_be_first(tmp_path: Path, first: str) -> None:
    loss = "x = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction='batchmean')\n"
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "source": ""}
    head, cell["source"] = "import torch.nn.functional as F\n", first + loss
    file = tmp_path / "kd.ipynb"
    file.write_text(json.dumps({"cells": [{**cell, "source": head}, cell]}))
    assert main(["scan", "--write", str(file)]) == 0
    wanted = first + 'import fastkd\nx = fastkd.kl_div(s, t, reduction="batchmean")\n'
    assert json.loads(file.read_text())["cells"][1]["source"] == wanted
