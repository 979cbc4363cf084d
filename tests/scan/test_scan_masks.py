"""Per-token masks, labels to ignore, class axes and smoothing: run beside the original."""

from __future__ import annotations

from pathlib import Path

import pytest
from scan_code import check, function, look, refused

LABELS = """def loss(s, t, T):
    labels = s.detach().argmax(-1)
    labels.view(-1)[::3] = -100
"""
KL = "F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction='none').sum(-1)"
BODIES = {
    f"mask = labels != -100\n    return {KL}[mask].mean()": ", labels=labels",
    f"return {KL}[labels.ne(-100)].sum()": None,
    f"mask = (labels != -100).float()\n    return ({KL} * mask).sum() / mask.sum()": "s=labels",
    f"mask = (labels != -100).int()\n    rows = {KL}\n    rows = rows * mask\n"
    "    return rows.sum() / mask.sum().clamp(min=1)": "labels=labels",
    f"m = labels != -100\n    return torch.sum(m * {KL}) * 3": 'labels, reduction="sum"',
    f"mask = (labels == -100).float()\n    return ({KL} * mask).sum() / mask.sum()": "weight=mask",
    f"pad = -100\n    keep = labels != pad\n    return {KL}[keep].mean()": "index=pad",
    "p = F.softmax(t / T, dim=-1, dtype=torch.float64)\n    infinite = torch.isinf(s)\n"
    "    q = F.log_softmax(s / T, dim=-1, dtype=torch.float64)\n"
    "    prod = torch.masked_fill(p * q, infinite, 0)\n    x = torch.sum(prod, dim=-1).view(-1)\n"
    "    mask = (labels != -100).int()\n"
    "    return -torch.sum(x * mask.view(-1), dim=0) / torch.sum(mask.view(-1), dim=0)": (
        "temperature=T, labels=labels"
    ),
    "p, lp = F.softmax(t, -1), F.log_softmax(t, -1)\n    lq = F.log_softmax(s, -1)\n"
    "    mask = labels != -100\n    return (p * lp - p * lq).sum(-1)[mask].mean()": "labels=labels",
    "p, lp = F.softmax(s, -1), F.log_softmax(s, -1)\n    teacher = t\n"
    "    lq = F.log_softmax(teacher, -1)\n    mask = labels != -100\n"
    "    return ((p * lp - p * lq).sum(-1) * mask).sum() / mask.sum()": (
        "fastkd.reverse_kl_div(s, teacher, labels=labels)"
    ),
}


@pytest.mark.parametrize("body", BODIES)
def test_masks(body: str, tmp_path: Path) -> None:
    source = f"{LABELS}    {body}\n"
    wanted = BODIES[body]
    if wanted is None:
        assert "labels" not in str(check(source, tmp_path, (2, 3)).replacement)
        return
    found = check(source, tmp_path, (2, 3))
    assert wanted in (found.replacement or ""), found


def test_masks_that_are_no_rows(tmp_path: Path) -> None:
    """An index, a factor or the mean over all places stay as they are."""
    for tail in ("[index].mean()", " * mask.sum()", "[0].mean()"):
        source = f"{LABELS}    index = [0, 1]\n    mask = labels != -100\n    return {KL}{tail}\n"
        found = check(source, tmp_path, (2, 3))
        assert "labels" not in (found.replacement or ""), found
    used = f"{LABELS}    rows = {KL}\n    mask = labels != -100\n"
    found = check(f"{used}    return rows[mask].mean() + rows.mean()\n", tmp_path, (2,))
    assert "labels" not in (found.replacement or ""), found


def test_a_cross_entropy_of_the_student_is_no_divergence(tmp_path: Path) -> None:
    line = "-(F.softmax(s, -1) * F.log_softmax(teacher, -1)).sum(-1).mean()"
    refused(function(line).replace("loss(s, t,", "loss(s, teacher,"), tmp_path, "own entropy")


def test_class_axes_lie_where_they_are(tmp_path: Path) -> None:
    for x in ("{}.transpose(1, 2)", "{}.permute(0, 2, 1)", "{}[:, :, ::2]"):
        s, t = x.format("s"), x.format("t")
        line = f"F.kl_div(F.log_softmax({s} / T, 1), F.softmax({t} / T, 1), reduction='batchmean')"
        assert "class_dim=1" in (check(function(line), tmp_path, (3,)).replacement or "")


def test_faults_are_named_as_the_doctor_names_them(tmp_path: Path) -> None:
    swapped = "F.kl_div(F.log_softmax(teacher, -1), F.softmax(s, -1), reduction='sum')"
    source = function(swapped).replace("loss(s, t,", "loss(s, teacher,")
    assert look(source, tmp_path).faults == ("swapped",)
    assert look(source.replace("loss(", "reverse_kl("), tmp_path).faults == ()
    for line, fault in (
        ("F.kl_div(F.softmax(s, -1), F.softmax(t, -1))", "probabilities"),
        ("F.kl_div(F.log_softmax(s.softmax(-1), -1), F.softmax(t, -1))", "probabilities"),
        ("F.kl_div(F.log_softmax(s, -1), F.softmax(t, 0))", "axis"),
        ("F.kl_div(F.log_softmax(s, -1), F.softmax(s, -1))", "shared"),
    ):
        assert look(function(line), tmp_path).faults == (fault,)
