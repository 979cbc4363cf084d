"""What `scan` writes is run in the place of what it stands for: the values must be one.

A grid of the forms in which users write a softmax, a temperature and a reduction; what has another
value, or none that can be shown, must come without a replacement and with a note.
"""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.scan import Found, scan

HEAD = """import torch
import torch.nn as nn
import torch.nn.functional as F
import fastkd
from torch.nn.functional import *
from torch import log as ln
"""
SHAPES = {1: (6,), 2: (4, 7), 3: (2, 3, 5), 4: (2, 3, 4, 5)}


class Put(ast.NodeTransformer):
    """A replacement in the place of the code it is for."""

    def __init__(self, found: Found) -> None:
        assert found.replacement is not None
        self.found, self.times = found, 0
        self.new = ast.parse(found.replacement, mode="eval").body

    def visit(self, node: ast.AST) -> Any:
        at = getattr(node, "lineno", None) == self.found.line
        if at and isinstance(node, ast.expr) and ast.unparse(node) == self.found.code:
            self.times += 1
            return self.new
        return self.generic_visit(node)


def look(source: str, folder: Path, head: str = HEAD) -> Found:
    (folder / "code.py").write_text(head + source)
    (only,) = scan(folder / "code.py")
    return only


def value(source: str | ast.Module, s: torch.Tensor, t: torch.Tensor, T: float) -> torch.Tensor:
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's words on legacy options
        exec(compile(source, "code.py", "exec"), names)
        return names["loss"](s.clone(), t.clone(), T)


def check(source: str, folder: Path, dims: tuple[int, ...] = (2,), head: str = HEAD) -> Found:
    """Runs the source as it is and with the replacement; returns what was found."""
    found = look(source, folder, head)
    assert found.replacement is not None, found.note
    put = Put(found)
    replaced = ast.fix_missing_locations(put.visit(ast.parse(head + source)))
    assert put.times == 1, (found, ast.unparse(replaced))
    for ndim in dims:
        s, t = (3 * torch.randn(SHAPES[ndim], dtype=torch.float64) for _ in range(2))
        s.requires_grad_()
        theirs, ours = (value(x, s, t, 2.5) for x in (head + source, replaced))
        if "entropy" in found.note:
            theirs, ours = (torch.autograd.grad(x.sum(), s)[0] for x in (theirs, ours))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12, msg=str(found))
    return found


def refused(source: str, folder: Path, *words: str, head: str = HEAD) -> None:
    found = look(source, folder, head)
    assert found.replacement is None, found
    for word in words:
        assert word in found.note, found.note


def function(line: str) -> str:
    return f"def loss(s, t, T):\n    return {line}\n"


# options as they stand after the two sides, for the function; every legacy pair is among them
REDUCTIONS = [
    *("", "reduction='mean'", "reduction='batchmean'", "reduction='sum'"),
    *(f"size_average={a}, reduce={b}" for a in (None, True, False) for b in (None, True)),
    *("size_average=False", "size_average=True", "reduce=True", "size_average=0"),
    *("size_average=False, reduction='mean'", "reduce=True, reduction='sum'"),
    *(
        "False",
        "True",
        "None, None, 'sum'",
        "None, None, 'batchmean', False",
        "False, True, 'mean'",
    ),
]
NONE = ["reduction='none'", "reduce=False", "None, False", "None, None, 'none'", "True, False"]
# (log softmax, softmax) of what stands for {s} and {t}
SOFTMAXES = [
    ("F.log_softmax({s}, -1)", "F.softmax({t}, -1)"),
    ("F.log_softmax(input={s}, dim=-1)", "F.softmax(dim=-1, input={t})"),
    ("torch.log_softmax({s}, dim=-1)", "torch.softmax({t}, -1)"),
    ("({s}).log_softmax(-1)", "({t}).softmax(dim=-1)"),
    ("torch.special.log_softmax({s}, -1)", "torch.special.softmax({t}, -1).detach()"),
    ("torch.log(F.softmax({s}, -1))", "F.log_softmax({t}, -1).exp()"),
    ("({s}).softmax(-1).log()", "torch.exp(F.log_softmax({t}, -1))"),
    ("nn.LogSoftmax(-1)({s})", "nn.Softmax(dim=-1)({t})"),
    ("log_softmax({s}, -1)", "softmax({t}, -1)"),
    ("ln(softmax({s}, -1))", "softmax({t}, -1).to(s.dtype)"),
]
TEMPERATURES = [
    *("{x} / T", "{x} * (1 / T)", "(1.0 / T) * {x}", "{x}.div(T)", "{x}.mul(1 / T)"),
    *("torch.div({x}, T)", "({x} / T).detach()", "{x} / (2 * T)", "{x} / T / T", "{x} / 4"),
    *("{x}.double() / T", "{x} * T ** -1", "{x} / {x}.std(-1, keepdim=True)"),
]


@pytest.mark.parametrize("options", REDUCTIONS)
@pytest.mark.parametrize("module", [False, True])
def test_reductions(options: str, module: bool, tmp_path: Path) -> None:
    sides = "F.log_softmax(s / T, -1), F.softmax(t / T, -1)"
    call = f"nn.KLDivLoss({options})({sides})" if module else f"F.kl_div({sides}, {options})"
    check(function(call), tmp_path, (2, 3, 4))
    check(function(f"{call}.mul(3) * T ** 2 / 7"), tmp_path)
    kept = f"""class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.kl = nn.KLDivLoss({options})

    def forward(self, s, t, T):
        return self.kl({sides})
"""
    if module:
        check(kept + "def loss(s, t, T):\n    return Kept()(s, t, T)\n", tmp_path)


@pytest.mark.parametrize("options", NONE)
@pytest.mark.parametrize("dim", [-1, 1])
def test_no_reduction(options: str, dim: int, tmp_path: Path) -> None:
    """A loss per column has no counterpart, its sums and means have."""
    call = f"F.kl_div(F.log_softmax(s / T, {dim}), F.softmax(t / T, {dim}), {options})"
    refused(function(call), tmp_path, "per column", 'reduction="none"')
    refused(function(f"{call}.sum(0)"), tmp_path, "per column")
    for sums in (f"sum({dim})", f"sum(dim={dim}).mean()", "sum()", "mean()", f"mean({dim})"):
        check(function(f"{call}.{sums}"), tmp_path, (2, 3, 4))
    for sums in (f"sum(axis=({dim},)).sum()", f"mean(dim=[{dim}]).mean()", f"sum({dim}).mean(0)"):
        check(function(f"-{call}.{sums} * 2"), tmp_path, (2, 4))
    check(function(f"torch.mean(torch.sum({call}, dim={dim}))"), tmp_path, (2, 4))


@pytest.mark.parametrize("log", [x for x, _ in SOFTMAXES])
@pytest.mark.parametrize("prob", [x for _, x in SOFTMAXES])
def test_softmaxes(log: str, prob: str, tmp_path: Path) -> None:
    sides = log.format(s="s / T"), prob.format(t="t / T")
    found = check(function(f"F.kl_div({sides[0]}, {sides[1]}, reduction='sum')"), tmp_path, (2, 3))
    assert "temperature=T" in (found.replacement or "")
    target = log.format(s="t / T")
    for option in ("reduction='batchmean', log_target=True", "None, None, 'batchmean', True"):
        check(function(f"F.kl_div({sides[0]}, {target}, {option})"), tmp_path)
    check(function(f"nn.KLDivLoss(log_target=True)({sides[0]}, {target})"), tmp_path)
    check(function(f"-({sides[1]} * {sides[0]}).sum(-1).mean()"), tmp_path, (2, 3))
    check(function(f"F.cross_entropy(s / T, {sides[1]})"), tmp_path)


@pytest.mark.parametrize("first", TEMPERATURES)
@pytest.mark.parametrize("second", [*TEMPERATURES[:2], TEMPERATURES[-1], "{x}"])
def test_temperatures(first: str, second: str, tmp_path: Path) -> None:
    s, t = first.format(x="s"), second.format(x="t")
    line = f"F.kl_div(F.log_softmax({s}, -1), F.softmax({t}, -1), size_average=False)"
    check(function(line), tmp_path)
    text = f"def loss(s, t, T):\n    a, b = {s}, {t}\n    q = F.log_softmax(a, dim=-1)\n"
    text += "    p = b.softmax(-1)\n    return F.kl_div(q, p)\n"
    found = check(text, tmp_path)
    same = first in (*TEMPERATURES[:6], "{x}.double() / T") and second in TEMPERATURES[:2]
    assert ("temperature=T" in (found.replacement or "")) == same, found


SCALINGS = ["{x} /= T", "{x} = {x} / T", "{x}.div_(T)", "{x}.mul_(1 / T)", "{x} *= 1 / T"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_divided_under_their_own_name(scaling: str, tmp_path: Path) -> None:
    loss = "    return F.kl_div(F.log_softmax({}, -1), F.softmax({}, -1), reduction='batchmean')\n"
    lines = ["    s, t = s.detach().requires_grad_().clone(), t.clone()"]
    lines += [f"    {scaling.format(x=x)}" for x in "st"]
    for sides in (("s", "t"), ("s / T", "t / T"), ("s", "t / T")):
        text = "\n".join(["def loss(s, t, T):", *lines, loss.format(*sides)])
        if sides[1] == "t / T" and sides[0] == "s":
            text = text.replace(lines[2], "")
        found = check(text, tmp_path)
        assert "has divided s by T" in found.note, found.note


@pytest.mark.parametrize("dim", [-1, 0, 1, 2, -2])
@pytest.mark.parametrize("options", ["reduction='batchmean'", "reduction='sum'", "", "False"])
def test_axes(dim: int, options: str, tmp_path: Path) -> None:
    """Whatever the number of dimensions is."""
    dims = {0: (1, 2, 3, 4), -1: (1, 2, 3, 4), 2: (3, 4)}.get(dim, (2, 3, 4))
    line = f"F.kl_div(F.log_softmax(s / T, {dim}), F.softmax(t / T, dim={dim}), {options})"
    found = check(function(line), tmp_path, dims)
    assert dim == -1 or "movedim" in found.note or f"dim={dim}" in found.note
    by_hand = f"-(F.softmax(t, {dim}) * F.log_softmax(s, {dim})).sum({dim}).mean()"
    check(function(by_hand), tmp_path, dims)


def test_axes_that_cannot_be_told(tmp_path: Path) -> None:
    for first, second, word in (
        ("s", "t", "no dim"),
        ("s, -1", "t, 1", "two axes"),
        ("s, d", "t, d", "dim could not be read (d)"),
        ("s, -1", "t", "two axes"),
    ):
        line = f"F.kl_div(F.log_softmax({first}), F.softmax({second}), reduction='sum')"
        refused(function(line), tmp_path, word)
    check(function("F.cross_entropy(s / T, F.softmax(t / T, 1))"), tmp_path, (2, 3, 4))
    refused(function("F.cross_entropy(s, F.softmax(t, 0))"), tmp_path, "dim 1 for the classes")


@pytest.mark.parametrize(
    "line",
    [
        "nn.CrossEntropyLoss()(s, F.softmax(t, -1))",
        "nn.CrossEntropyLoss(reduction='sum')(s / T, softmax(t / T, dim=-1))",
        "nn.CrossEntropyLoss(None, False)(s, t.softmax(-1))",
        "F.cross_entropy(s, t.softmax(-1), None, False)",
        "F.cross_entropy(input=s, target=t.softmax(-1), reduction='none')",
        "F.cross_entropy(s, t.softmax(-1), None, None, -100, None, 'sum')",
        "cross_entropy(s, t.softmax(-1), reduce=False)",
        "-(t.softmax(-1) * F.log_softmax(s, -1)).sum()",
        "(-t.softmax(-1) * F.log_softmax(s, -1)).sum(-1).mean()",
        "torch.sum(-F.softmax(t, -1) * s.log_softmax(-1), dim=-1).mean()",
        "torch.mean(torch.sum(F.log_softmax(s / T, -1) * F.softmax(t / T, -1), -1)) * -1",
        "-(F.softmax(t, -1) * F.log_softmax(s, -1)).mean() * T * T",
    ],
)
def test_cross_entropies(line: str, tmp_path: Path) -> None:
    assert "entropy" in check(function(line), tmp_path).note


@pytest.mark.parametrize(
    "line",
    [
        "(p * (p.log() - q)).sum(-1).mean()",
        "(p * (torch.log(p) - q)).sum()",
        "-(p * (q - p.log())).sum(-1)",
        "torch.sum(p * (F.log_softmax(t / T, -1) - q), dim=-1).mean()",
        "(p * torch.log(p / q.exp())).mean()",
        "(p * (p / q.exp()).log()).sum(dim=-1)",
        "(q.exp() * (q - p.log())).sum(-1).sum()",
    ],
)
def test_divergences_by_hand(line: str, tmp_path: Path) -> None:
    text = "def loss(s, t, T):\n    q, p = F.log_softmax(s / T, -1), F.softmax(t / T, -1)\n"
    check(text + f"    return {line}\n", tmp_path, (2, 3))
    text += f"    d = {line}\n    return d * 3\n"
    check(text, tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("F.kl_div(q, p, reduction=kind)", "reduction could not be read (kind)"),
        ("F.kl_div(q, p, kind)", "size_average could not be read (kind)"),
        ("F.kl_div(q, p, reduce=kind)", "reduce could not be read (kind)"),
        ("F.kl_div(q, p, None, None, kind)", "reduction could not be read (kind)"),
        ("nn.KLDivLoss(reduction=kind)(q, p)", "reduction could not be read (kind)"),
        ("nn.KLDivLoss(**kind)(q, p)", "hidden"),
        ("F.kl_div(q, p, **kind)", "hidden"),
        ("nn.KLDivLoss(reduction='man')(q, p)", "reduction could not be read (man)"),
        ("F.kl_div(*kind)", "in * or **"),
        ("F.kl_div(q, p, log_target=kind)", "log_target could not be read (kind)"),
        ("F.kl_div(q, p, log_target=True)", "log_target does not fit"),
        ("F.kl_div(q, p.log())", "log_target does not fit"),
        ("F.kl_div(p, q.exp())", "not its logarithm"),
        ("F.kl_div(q, q.exp())", "same logits on both sides"),
        ("F.kl_div(F.log_softmax(s, -1), F.softmax(s.detach(), -1))", "same logits"),
        ("F.kl_div(F.log_softmax(F.softmax(s, -1), -1), p)", "softmax of a softmax"),
        ("F.kl_div(q.exp().log_softmax(-1), p)", "softmax of a softmax"),
        ("F.kl_div(q, F.softmax(p / 4, -1))", "softmax of a softmax"),
        ("F.cross_entropy(F.softmax(s, -1), p)", "softmax of a softmax"),
        ("nn.CrossEntropyLoss()(q, p)", "softmax of a softmax"),
        ("F.cross_entropy(s, p, kind)", "class weights"),
        ("F.cross_entropy(s, p, label_smoothing=0.1)", "label_smoothing"),
        ("F.cross_entropy(s, p.log())", "log-softmax"),
        ("F.kl_div(q, p + 1e-8)", "its target (p + 1e-08) could not be followed"),
        ("F.kl_div(self.log_softmax(s), p)", "its input (self.log_softmax(s)) could not"),
        ("F.kl_div(s.softmax(kind).log(), p)", "could not be followed"),
        ("(p * q)", "per column"),
    ],
)
def test_what_is_not_replaced(line: str, words: str, tmp_path: Path) -> None:
    text = (
        "def loss(s, t, T, kind=None):\n    q, p = F.log_softmax(s / T, -1), F.softmax(t / T, -1)\n"
    )
    refused(text + f"    return {line}\n", tmp_path, words)


@pytest.mark.parametrize(
    "body",
    [
        "    if T > 1:\n        p = F.softmax(t, -1)\n",
        "    if T > 1:\n        t = t + 1\n",
        "    for _ in range(2):\n        p = p * p\n",
        "    p[0] = 1\n",
        "    t.add_(1)\n",
        "    p, x = T, p\n",
        "    try:\n        p = T\n    except ValueError:\n        pass\n",
        "    t = t + 1\n",
        "    with open(T) as p:\n        pass\n",
    ],
)
def test_names_that_may_have_changed(body: str, tmp_path: Path) -> None:
    text = "def loss(s, t, T):\n    p = F.softmax(t, -1)\n" + body
    text += "    return F.kl_div(F.log_softmax(s, -1), p, reduction='sum')\n"
    refused(text, tmp_path, "its target (p) could not be followed")


def test_a_later_round_of_a_loop(tmp_path: Path) -> None:
    text = "def loss(s, t, T):\n    p = F.softmax(t, -1)\n    for _ in range(3):\n"
    text += "        x = F.kl_div(F.log_softmax(s, -1), p, reduction='sum')\n        t = t + 1\n"
    refused(text, tmp_path, "could not be followed")


def test_modules_kept_as_attributes(tmp_path: Path) -> None:
    head = """class Net(nn.Module):
    kind = nn.KLDivLoss(reduction="sum")
    def __init__(self, how):
        super().__init__()
        self.log_softmax, self.softmax = nn.LogSoftmax(dim=1), nn.Softmax(dim=1)
        self.kl = nn.KLDivLoss(reduction={how}).to("cpu")
        self.other = F.kl_div
"""
    rest = "    def forward(self, s, t, T):\n        return {line}\n"
    rest += "def loss(s, t, T):\n    return Net('mean')(s, t, T)\n"
    sides = "(self.log_softmax(s / T), self.softmax(t / T)"
    for line in (f"self.kl{sides})", f"self.kind{sides})", f"self.other{sides}, reduction='sum')"):
        text = (head + rest).format(line=line, how="'batchmean'")
        (tmp_path / "code.py").write_text(HEAD + text)
        found = [x for x in scan(tmp_path / "code.py") if x.replacement]
        assert [x.line for x in found] == [15], found
        assert "fastkd.kl_div(s.movedim(1, -1).contiguous(), t.movedim" in str(found)
    text = (head + rest).format(line=f"self.kl{sides})", how="how")
    (tmp_path / "code.py").write_text(HEAD + text)
    found = [x for x in scan(tmp_path / "code.py") if x.line == 15]
    assert found[0].replacement is None and "(how)" in found[0].note
    changed = text.replace("self.other = F.kl_div", "self.kl.reduction = how")
    (tmp_path / "code.py").write_text(HEAD + changed)
    assert "its call was not found" in str([*scan(tmp_path / "code.py")])


def test_teacher_under_no_grad(tmp_path: Path) -> None:
    text = """def loss(s, t, T):
    with torch.no_grad():
        out = {"out": t * 2}
        out["out"] = out["out"] / 2
        p = F.softmax(out["out"] / T, dim=-1)
    return F.kl_div(F.log_softmax(s / T, dim=-1), p, reduction="batchmean")
"""
    found = check(text, tmp_path)
    assert "out['out'].detach(), temperature=T" in (found.replacement or "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("F.kl_div(q, p) / s.size(0)", "divided twice: / s.size(0)"),
        ("F.kl_div(q, p, reduction='batchmean') * T * T / len(s)", "divided twice: / len(s)"),
        ("nn.KLDivLoss(reduction='batchmean')(q, p) / batch_size", "divided twice: / batch_size"),
    ],
)
def test_divided_twice(line: str, words: str, tmp_path: Path) -> None:
    text = "def loss(s, t, T):\n    batch_size = 4\n"
    text += "    q, p = F.log_softmax(s / T, -1), F.softmax(t / T, -1)\n"
    assert words in check(text + f"    return {line}\n", tmp_path).note
    named, by = line.rsplit(" / ", 1)
    for division in (f"    x = x / {by}\n    return x\n", f"    x /= {by}\n    return x\n"):
        assert words in check(text + f"    x = {named}\n" + division, tmp_path).note
    right = "F.kl_div(q, p, reduction='sum') / s.size(0)"
    assert "twice" not in check(text + f"    return {right}\n", tmp_path).note
    both = "F.kl_div(F.log_softmax(s / T / T, -1), F.softmax(t / T / T, -1))"
    assert "divided 2 times, by T * T" in check(text + f"    return {both}\n", tmp_path).note


@pytest.mark.parametrize(
    "line",
    [
        "jax.nn.softmax(t) * F.log_softmax(s, -1)",
        "F.cross_entropy(s, t)",
        "nn.CrossEntropyLoss()(s, t)",
        "(F.softmax(s, -1) * F.log_softmax(s, -1)).sum()",
        "F.cross_entropy(s, F.softmax(s, -1))",
        "(s.softmax(-1) * (F.log_softmax(t, -1) - t.log_softmax(-1))).sum()",
        "s * (s.log() - t)",
    ],
)
def test_what_is_no_distillation(line: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(HEAD + "import jax\n" + function(line))
    assert not list(scan(tmp_path / "code.py"))


def test_two_runs_of_a_model_are_not_the_same_logits(tmp_path: Path) -> None:
    """Of dropout, say; what is run in a line above is not to be run again."""
    head = HEAD + "def model(x):\n    return x * 2\n"
    line = "F.kl_div(F.log_softmax(model(s), -1), F.softmax(model(s), -1), reduction='sum')"
    assert check(function(line), tmp_path, head=head).note == ""
    refused(function(line.replace("'sum'", "'mean'")), tmp_path, "a name first", head=head)
    text = "def loss(s, t, T):\n    p = F.softmax(model(t), -1)\n"
    text += "    return F.kl_div(F.log_softmax(s, -1), p)\n"
    assert "leave out line 10, or model(t) runs twice" in check(text, tmp_path, head=head).note


def test_names_that_are_not_torchs(tmp_path: Path) -> None:
    for own in ("def softmax(x, d):\n    return x\n", "from mine import softmax\n"):
        line = function("F.kl_div(log_softmax(s, -1), softmax(t, -1))")
        refused(own + line, tmp_path, "its target (softmax(t, -1)) could not be followed")


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
