"""What `scan` writes is run in the place of what it stands for: the values must be one.

A grid of the forms in which users write a softmax, a temperature and a reduction; what has another
value, or none that can be shown, must come without a replacement and with a note.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from scan_code import HEAD, check, function, refused

from fastkd.scan import scan

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


# each side is read by itself
SIDES = [(log, SOFTMAXES[i - k][1]) for k in (0, 3) for i, (log, _) in enumerate(SOFTMAXES)]


@pytest.mark.parametrize(("log", "prob"), SIDES)
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
    assert dim == -1 or f"class_dim={dim}" in (found.replacement or "")
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
        assert "fastkd.kl_div(s, t, temperature=T, class_dim=1" in str(found)
    text = (head + rest).format(line=f"self.kl{sides})", how="how")
    (tmp_path / "code.py").write_text(HEAD + text)
    found = [x for x in scan(tmp_path / "code.py") if x.line == 15]
    assert found[0].replacement is None and "(how)" in found[0].note
    changed = text.replace("self.other = F.kl_div", "self.kl.reduction = how")
    (tmp_path / "code.py").write_text(HEAD + changed)
    assert "its call was not found" in str([*scan(tmp_path / "code.py")])
