"""Logits whose columns lie apart: the line that scan prints makes them contiguous."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scan_code import check, function

APART = [
    *("{x}.transpose(0, 1)", "{x}.T", "{x}.t()", "{x}.permute(1, 0)", "torch.transpose({x}, 0, 1)"),
    *("{x}.mT", "{x}.movedim(0, -1)", "{x}.swapaxes(0, 1)", "{x}[:, ::2]", "{x}[..., 1::3]"),
    *(
        "{x}.T.float().double()",
        "{x}.T.detach().clone()",
        "{x}.T[1:]",
        "{x}.T + 1",
        "{x}.T - {x}.mT",
    ),
]


@pytest.mark.parametrize("form", APART)
def test_columns_that_lie_apart(form: str, tmp_path: Path) -> None:
    """torch takes them as they are, the losses do not: the line must say .contiguous()."""
    torch.manual_seed(0)
    for by in ("", " / T"):
        s, t = (f"({form})".format(x=x) + by for x in "st")
        sides = f"F.log_softmax({s}, -1), F.softmax({t}, -1)"
        for how in ("reduction='batchmean'", "reduction='none'"):
            end = ".sum(-1).mean()" if "none" in how else ""
            found = check(function(f"F.kl_div({sides}, {how}){end}"), tmp_path)
            assert found.replacement is not None and found.replacement.count(".contiguous()") == 2
    named = "def loss(s, t, T):\n    a, b = 1 * s, 1 * t\n    x = {}\n    y = {}\n    return {}\n"
    line = "F.kl_div(F.log_softmax(x / T, -1), F.softmax(y / T, -1), reduction='sum')"
    check(named.format(form.format(x="a"), form.format(x="b"), line), tmp_path)


def test_columns_that_lie_side_by_side(tmp_path: Path) -> None:
    head = "class K(nn.Module):\n    def __init__(self, T):\n        super().__init__()\n"
    head += "        self.T = T\n    def forward(self, s, t):\n        return {}\n"
    head += "def loss(s, t, T):\n    return K(T)(s, t)\n"
    for x in ("{} / self.T", "{}[1:]", "{}[:, :3] / self.T", "{} * self.T", "{}.T.contiguous()"):
        sides = f"F.log_softmax({x.format('s')}, -1), F.softmax({x.format('t')}, -1)"
        found = check(head.format(f"F.kl_div({sides}, reduction='sum')"), tmp_path)
        assert str(found.replacement).count("contiguous") == 2 * x.count("contiguous"), found
