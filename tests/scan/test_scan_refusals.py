"""What `scan` leaves as it is, with a note that says why, or without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from scan_code import HEAD, check, function, look, refused

from fastkd.scan import scan


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
        ("F.kl_div(p, q.exp())", "holds probabilities"),
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
    mean = "def loss(s, t, logits):\n    return " + line.replace("'sum'", "'mean'")
    found = look(mean + "\n", tmp_path, head=head)
    call = found.note.split("as far as it can be read: ")[1].split("; ")[0]
    assert "as logits_2 = model(s);" in found.note  # the source has a name logits
    assert call == 'fastkd.kl_div(logits_2, model(s), reduction="sum") / logits_2.numel()'
    text = "def loss(s, t, T):\n    p = F.softmax(model(t), -1)\n"
    text += "    return F.kl_div(F.log_softmax(s, -1), p)\n"
    assert "leave out line 10, or model(t) runs twice" in check(text, tmp_path, head=head).note


def test_names_that_are_not_torchs(tmp_path: Path) -> None:
    for own in ("def softmax(x, d):\n    return x\n", "from mine import softmax\n"):
        line = function("F.kl_div(log_softmax(s, -1), softmax(t, -1))")
        refused(own + line, tmp_path, "its target (softmax(t, -1)) could not be followed")
