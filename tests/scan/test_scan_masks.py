"""Per-token masks, labels to ignore, class axes and smoothing: run beside the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scan_code import HEAD, check, function, look, refused, value

from fastkd.scan.hard import HEAD as HARD

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

BY = "F.softmax(t, -1) * (F.log_softmax(t, -1) - F.log_softmax(s, -1))"
COLUMNS = "F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction='none')"
BODIES |= {  # masks of columns, multiplied before the sum over the classes
    f"mask = labels != -100\n    return ({BY} * mask.unsqueeze(-1)).sum(-1)": "labels=labels, red",
    f"mask = (labels != -100).float()\n    x = ({BY}) * mask[..., None]\n"
    "    return x.sum() / mask.sum()": "labels=labels",
    f"mask = (labels != -100).unsqueeze(-1)\n    return ({COLUMNS} * mask).sum() / mask.sum()": (
        "labels=labels"
    ),
    f"mask = (labels > -100).float()\n    rows = (mask[..., None] * ({BY})).sum(dim=-1)\n"
    "    return rows.sum() / mask.sum()": "weight=mask.float()",
    f"padding_mask = labels == -100\n    kl = {COLUMNS}\n"
    "    kl = kl.masked_fill(padding_mask.unsqueeze(-1), 0.0)\n    return kl.sum(-1).mean()": (
        'labels=labels, reduction="none"'
    ),
}
BODIES |= {  # among the factors
    "mask = (labels > -100).float()\n    p, lq = F.softmax(t, -1), F.log_softmax(s, -1)\n"
    "    kl = (mask.unsqueeze(-1) * p * (F.log_softmax(t, -1) - lq)).sum(-1)\n"
    "    return kl.sum() / mask.sum()": "weight=mask.float()",
    "p = F.softmax(t / T, -1) * (labels != -100).unsqueeze(-1)\n"
    "    return -(p * F.log_softmax(s / T, -1)).sum() / (labels != -100).sum()": "labels=labels",
}
BODIES |= {  # an inverted mask has a name of its own
    f"pad = labels < 0\n    mask = ~pad\n    return ({KL} * mask).sum() / mask.sum()": (
        "weight=mask.float()"
    ),
}
BODIES |= {  # masks in place
    f"loss = {KL}\n    loss[labels == -100] = 0\n    return loss.sum() / (labels != -100).sum()": (
        "T, labels=labels)"
    ),
    f"mask = labels > -100\n    loss = {KL}\n    loss[~mask] = 0.0\n    return loss.sum()": (
        'weight=mask.float(), reduction="sum"'
    ),
    f"mask = labels > -100\n    loss = {COLUMNS}\n    loss[~mask] = 0.0\n"
    "    return loss.sum() / mask.sum()": "weight=mask.float()",
    f"padding_mask = labels < 0\n    loss = {KL}\n    loss.masked_fill_(padding_mask, 0)\n"
    "    return loss.sum()": 'weight=(padding_mask == 0).float(), reduction="sum"',
    f"padding_mask = labels == -100\n    loss = {COLUMNS}\n"
    "    loss.masked_fill_(padding_mask[..., None], 0)\n    return loss.sum(-1)": "labels=labels",
    f"loss = {KL}.masked_fill_(labels.eq(-100), 0)\n    return loss.sum()": None,
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
    for flat in ("", ".view(-1)"):
        later = f"{LABELS}    mask = labels != -100\n    rows = {KL}{flat} * mask{flat}\n"
        later += f"    labels = labels * 0\n    return rows.sum() / mask{flat}.sum()\n"
        assert "labels" not in str(check(later, tmp_path, (2,)).replacement)
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
        ("F.kl_div(F.softmax(s, -1), F.softmax(t, -1), {})", "probabilities"),
        ("F.kl_div(F.log_softmax(s.softmax(-1), -1), F.softmax(t, -1), {})", "probabilities"),
        ("F.kl_div(F.log_softmax(s, -1), F.softmax(t, 0), {})", "axis"),
        ("F.kl_div(F.log_softmax(s, -1), F.softmax(s, -1), {})", "shared"),
    ):
        alone = line.format("reduction='batchmean'")
        assert look(function(alone), tmp_path).faults == (fault,)
        assert look(function(line.format("")), tmp_path).faults == (fault, "reduction")
    for line in (
        "F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1))",
        "nn.KLDivLoss()(read(s), F.softmax(t, -1))",
        "(F.softmax(t, -1) * (F.log_softmax(t, -1) - F.log_softmax(s, -1))).mean()",
        "F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction='none').mean(-1)",
    ):
        assert look(function(line), tmp_path).faults == ("reduction",)


def test_a_mean_over_classes_is_told_with_the_mean_over_rows(tmp_path: Path) -> None:
    line = "F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1))"
    assert "it is fastkd.kl_div(s, t, temperature=T)" in check(function(line), tmp_path).note


SUMS = [  # (loss, what the line holds); a: the weight, y: labels
    ("a * F.cross_entropy(s, y) + (1 - a) * T * T * {kl}", "alpha=a"),
    ("(1 - a) * F.cross_entropy(s, y) + a * T ** 2 * {kl}", "alpha=1 - a"),
    ("{kl} * (T * T) * 0.7 + 0.3 * F.cross_entropy(s, y, label_smoothing=0.1)", "label_smoothing"),
    ("a * F.cross_entropy(s, y) + (1 - a) * {kl}", "t_squared=False"),
    ("a * nn.CrossEntropyLoss(label_smoothing=.2)(s, y) + (1 - a) * T * T * {kl}", "smoothing=0.2"),
    ("a * F.cross_entropy(s, y, ignore_index=5) + (1 - a) * T * T * {kept}", "ignore_index=5"),
]
SIDES = "F.log_softmax(s / T, {d}), F.softmax(t / T, {d})"


@pytest.mark.parametrize("line,word", SUMS)
@pytest.mark.parametrize("dim", [-1, 1])
def test_the_hard_term_beside_it(line: str, word: str, dim: int, tmp_path: Path) -> None:
    """The line in the note is run in the place of the whole sum."""
    sides = SIDES.format(d=dim)
    kl = f"F.kl_div({sides}, reduction='batchmean')"
    kept = f"F.kl_div({sides}, reduction='none').sum({dim})[y != 5].mean()"
    head = "def loss(s, t, T, a=0.25):\n    y = t.argmax(1)\n"
    text = line.format(kl=kl, kept=kept)
    named = f"    ce = {text.split(' + ')[0]}\n    return ce + {text.split(' + ', 1)[1]}\n"
    for source in (f"{head}    return {text}\n", head + named):
        note = check(source, tmp_path).note
        assert HARD in note and word in note, note
        call = note.split(HARD)[1].split(" where ")[0].split("; ")[0]
        s, t = (torch.randn(4, 7, dtype=torch.float64) for _ in range(2))
        ours = value(f"{HEAD}{head}    return {call}\n", s, t, 2.5)
        torch.testing.assert_close(ours, value(HEAD + source, s, t, 2.5), rtol=1e-6, atol=1e-9)


FLAT = "s.view(-1, s.size(-1))"  # the causal models' cross-entropy: all rows as one axis
CAUSAL = [  # (the soft term, logits and labels of the hard one, whether a mean over rows)
    (f"F.kl_div({SIDES}, reduction='none').sum(-1).mean()", f"{FLAT}, y.view(-1)", True),
    (f"F.kl_div({SIDES}, reduction='none').sum(-1).mean()", "s.transpose(1, 2), y", True),
    (f"F.kl_div({SIDES}, reduction='batchmean')", f"{FLAT}, y.view(-1)", False),
    (f"F.kl_div({SIDES}, reduction='batchmean')", "s.transpose(1, 2), y", False),
    (
        "F.kl_div(F.log_softmax(a / T, {d}), F.softmax(b / T, {d}), reduction='batchmean')",
        f"{FLAT}, y.reshape(-1)",
        True,
    ),
    (
        "F.kl_div(F.log_softmax(a / T, {d}), F.softmax(b / T, {d}), reduction='batchmean')",
        "a, y.flatten()",
        True,
    ),
]


@pytest.mark.parametrize("soft,sides,by_rows", CAUSAL)
def test_the_hard_term_of_causal_models(
    soft: str, sides: str, by_rows: bool, tmp_path: Path
) -> None:
    """One line for both terms, and what it does with labels of -100, each held by its value."""
    head = "def loss(s, t, T, w=0.25):\n    y = t.argmax(-1)\n{ignored}"
    head += "    V = s.size(-1)\n    a, b = s.view(-1, V), t.view(-1, V)\n"
    body = f"    ce = F.cross_entropy({sides})\n    kl = {soft.format(d=-1)}\n"
    body += "    return w * T * T * kl + (1 - w) * ce\n"
    first, other = head.format(ignored=""), head.format(ignored="    y[:, ::2] = -100\n")
    note = check(first + body, tmp_path, (3,)).note
    call, mind = note.split(HARD)[1].split("; ")[0].split(" where ")
    assert "no label is -100" in mind and "counts in no term there, in the soft one here" in mind
    s, t = (torch.randn(2, 6, 5, dtype=torch.float64) for _ in range(2))
    ours, theirs = (value(f"{HEAD}{first}{x}", s, t, 2.5) for x in (f"    return {call}\n", body))
    assert ("a mean over rows is meant" in mind) is not by_rows
    assert torch.allclose(ours, theirs, rtol=1e-6) is by_rows
    rows = body.replace("batchmean", "none").replace("kl +", "kl.mean() * kl.size(-1) +")
    if not by_rows:  # as the note says: a mean over rows is the same
        torch.testing.assert_close(
            ours, value(f"{HEAD}{first}{rows}", s, t, 2.5), rtol=1e-6, atol=0
        )
    ours = value(f"{HEAD}{other}    return {call}\n", s, t, 2.5)
    assert not torch.allclose(ours, value(f"{HEAD}{other}{body}", s, t, 2.5))
    kept = f"    s, t, y = (x[y != -100] for x in (s, t, y))\n    return {call}\n"
    if by_rows and "a," not in call:
        torch.testing.assert_close(ours, value(f"{HEAD}{other}{kept}", s, t, 2.5))


def test_the_hard_term_of_causal_models_with_a_mask(tmp_path: Path) -> None:
    head = "def loss(s, t, T, w=0.25):\n    y = t.argmax(-1)\n    y[:, ::2] = -100\n"
    body = f"    rows = F.kl_div({SIDES.format(d=-1)}, reduction='none').sum(-1)\n"
    body += "    mask = y != -100\n    kl = (rows * mask).sum() / mask.sum()\n"
    body += f"    return w * T * T * kl + (1 - w) * F.cross_entropy({FLAT}, y.view(-1))\n"
    call = check(head + body, tmp_path, (3,)).note.split(HARD)[1].split("; ")[0]
    s, t = (torch.randn(2, 6, 5, dtype=torch.float64) for _ in range(2))
    ours, theirs = (value(f"{HEAD}{head}{x}", s, t, 2.5) for x in (f"    return {call}\n", body))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_flat_labels_of_logits_that_are_not(tmp_path: Path) -> None:
    for sides in ("a, y", "a.transpose(1, 2), y.view(-1)", "t.view(-1, 7), y.view(-1)"):
        line = f"w * F.cross_entropy({sides}) + (1 - w) * T * T * F.kl_div({SIDES.format(d=-1)}, "
        source = "def loss(s, t, T, w=0.5, y=None):\n    a = s.view(-1, 7)\n"
        assert (
            HARD not in look(f"{source}    return {line}None, None, 'batchmean')\n", tmp_path).note
        )


def test_sums_that_are_no_distillation_loss(tmp_path: Path) -> None:
    kl = f"F.kl_div({SIDES.format(d=-1)}, reduction='batchmean')"
    for line in (
        f"a * F.cross_entropy(s, y) + 0.5 * T * T * {kl}",
        f"F.cross_entropy(s, y) + T * T * {kl}",
        f"a * F.cross_entropy(t, y) + (1 - a) * T * T * {kl}",
        f"a * F.cross_entropy(s, y, reduction='sum') + (1 - a) * T * T * {kl}",
        f"a * F.cross_entropy(s, y, w) + (1 - a) * T * T * {kl}",
    ):
        source = f"def loss(s, t, T, a=0.5, y=None, w=None):\n    return {line}\n"
        assert HARD not in look(source, tmp_path).note


def test_a_mixture_is_a_jensen_shannon_divergence(tmp_path: Path) -> None:
    lines = "def loss(s, t, T):\n    ls, lt = F.log_softmax(s, -1), F.log_softmax(t, -1)\n"
    lines += "    m = torch.logsumexp(torch.stack([ls, lt]), 0)\n"
    refused(f"{lines}    return F.kl_div(m, lt, log_target=True)\n", tmp_path, "fastkd.js_div")
