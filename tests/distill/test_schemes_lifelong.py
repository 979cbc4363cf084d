"""Heads of a model, a new task beside a kept one, other modalities, a graph's neighbours."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_runs import weights

from fastkd import distill
from fastkd.distill import Batch, Head, Outputs, lwf, with_head

Both = namedtuple("Both", ["old", "new"])


class Heads(nn.Module):
    """Returns its two heads as a `kind` of container."""

    def __init__(self, kind: Any = dict) -> None:
        super().__init__()
        self.body, self.kind = nn.Linear(6, 8), kind
        self.old, self.new = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).relu()
        old, new = self.old(features), self.new(features)
        return self.kind(old=old, new=new) if self.kind in (dict, Both) else self.kind((old, new))


def task(rows: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 6)
    return x, x[:, :classes].argmax(-1)


KINDS = [(dict, "new", "old"), (Both, "new", "old"), (tuple, 1, 0), (list, -1, -2)]


@pytest.mark.parametrize(("kind", "new", "old"), KINDS)
def test_the_loss_is_the_new_labels_and_the_old_outputs(kind: Any, new: Any, old: Any) -> None:
    model, (x, y) = Heads(kind), task()
    before = copy.deepcopy(model)
    steps = lwf(
        model,
        [(x, y)] * 4,
        new=new,
        old=old,
        weight=0.7,
        temperature=3.0,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        progress=False,
    )
    theirs = before.old(before.body(x).relu()).detach()
    twin = copy.deepcopy(before)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    for step in steps:
        features = twin.body(x).relu()
        hard = F.cross_entropy(twin.new(features), y)
        p, q = (theirs / 3).softmax(-1), (twin.old(features) / 3).log_softmax(-1)
        soft = 9 * (p * (p.log() - q)).sum(-1).mean()
        assert step.terms == {
            "new": pytest.approx(hard.item(), rel=1e-5),
            "old": pytest.approx(soft.item(), rel=1e-3, abs=1e-6),
        }
        assert step.loss == pytest.approx((hard + 0.7 * soft).item(), rel=1e-5)
        optimizer.zero_grad()
        (hard + 0.7 * soft).backward()
        optimizer.step()
    assert abs(steps[0].terms["old"]) < 1e-6 < 1e-4 < steps[-1].terms["old"]
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_the_old_head_is_kept_and_without_it_is_not() -> None:
    torch.manual_seed(0)
    model = Heads()
    x, y = task(200, 3)
    distill.train(model, [(x, y)] * 100, with_head(distill.hard(), "old"), lr=1e-2, progress=False)
    old_new = {}
    other = task(200, 4)
    for weight in (0.0, 1.0):
        net = copy.deepcopy(model)
        lwf(net, [other] * 150, new="new", old="old", weight=weight, lr=1e-2, progress=False)
        old_new[weight] = (
            distill.agreement(Head(net, "old"), Head(model, "old"), [x]),
            distill.evaluate(Head(net, "new"), [other]).accuracy,
        )
    assert old_new[1.0][0] > 0.95 and old_new[1.0][0] > old_new[0.0][0] + 0.05
    assert min(new for _, new in old_new.values()) > 0.9


def test_several_old_heads_and_functions_of_one_that_grew() -> None:
    """Heads cut out of one vector: the same loss as of heads that come apart."""
    net, (x, y) = nn.Linear(6, 9), task()
    before = copy.deepcopy(net)
    steps = lwf(
        net,
        [(x, y)] * 5,
        new=lambda z: z[..., 5:],
        old=[lambda z: z[..., :3], lambda z: z[..., 3:5]],
        terms=[distill.Term("size", lambda s, _t, _b: s.raw.square().mean(), 0.1)],
        lr=1e-2,
        progress=False,
    )
    assert list(steps[-1].terms) == ["new", "old:0", "old:1", "size"]
    # the new rows of a linear layer are no concern of the old heads, whose rows have what they had
    changed = (net.weight - before.weight).abs().amax(1)
    assert changed[5:].min() > 0.01


def test_only_the_new_head_learns_while_all_else_is_frozen() -> None:
    model, (x, y) = Heads(), task()
    before = weights(model)
    with distill.freeze(model, ["body", "old"]):
        lwf(model, [(x, y)] * 3, new="new", old="old", progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("new")), name
    assert all(p.requires_grad for p in model.parameters())


def test_a_term_at_a_head_is_the_term_of_its_logits() -> None:
    x, y = task()
    student, teacher = Heads()(x), Heads()(x)
    batch = Batch(x, y, samples=len(x))
    for term in (distill.hard(0.3, name="a"), distill.soft(temperature=2.0)):
        moved = with_head(term, "new")
        assert (moved.name, moved.weight, moved.mean) == (term.name, term.weight, term.mean)
        got = moved.function(Outputs(student), Outputs(teacher), batch)
        want = term.function(Outputs(student["new"]), Outputs(teacher["new"]), batch)
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="got no teacher"):
        with_head(distill.soft(), "new").function(Outputs(student), Outputs(None), batch)


def test_features_reach_a_term_of_a_head() -> None:
    seen = []

    def function(student: Outputs, teacher: Outputs, _: Batch) -> Tensor:
        seen.append((student.logits, student.features["body"], teacher.features["old"]))
        return student.logits.sum()

    term = distill.Term("x", function, student_layers=("body",), teacher_layers=("old",))
    (x, y), model, teacher = task(), Heads(), Heads()
    expected = model(x)["new"].detach(), model.body(x).detach(), teacher(x)["old"].detach()
    distill.train(model, [(x, y)], with_head(term, "new"), teacher=teacher, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected, strict=True))


def test_a_head_is_a_model_of_its_own() -> None:
    model, (x, y) = Heads(Both), task()
    head = Head(model, "new")
    assert torch.equal(head(x), model(x).new) and torch.equal(head(x=x), model(x).new)
    assert distill.evaluate(head, [(x, y)]).rows == 40
    ours = distill.train(head, [(x, y)] * 2, distill.hard(), progress=False)
    assert ours[1].loss < ours[0].loss and head.model is model


@pytest.mark.parametrize(
    ("kind", "head", "match"),
    [
        (dict, "none", r"'none' of a model that returns a dict, expected one of \['old', 'new'\]"),
        (dict, 0, r"got 0 of a model that returns a dict"),
        (Both, "none", r"expected one of \['old', 'new'\] or a function"),
        (tuple, 2, r"got 2 of a model that returns a tuple, expected one of \[0, 1\]"),
        (tuple, -3, "got -3 of a model"),
        (tuple, "old", "got 'old' of a model that returns a tuple"),
        (torch.cat, 0, "got 0 of a model that returns a Tensor"),
        (torch.cat, "real", "got 'real' of a model that returns a Tensor"),
    ],
)
def test_heads_that_do_not_exist(kind: Any, head: Any, match: str) -> None:
    model = Heads(kind)
    model.new = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=match):
        Head(model, head)(torch.randn(2, 6))


def test_bad_arguments() -> None:
    batches = [task()]
    with pytest.raises(ValueError, match="old: got no head"):
        lwf(Heads(), batches, new="new", old=[])
    with pytest.raises(TypeError, match=r"options: got \['teacher'\]"):
        lwf(Heads(), batches, new="new", old="old", teacher=nn.Linear(6, 3))
    with pytest.raises(ValueError, match="head: got 'newer'"):
        lwf(Heads(), batches, new="newer", old="old", progress=False)


def test_a_teacher_of_another_modality_sees_its_own_inputs() -> None:
    """Batch.teacher_inputs, also where a loader gives a dict of it."""
    teacher, (sound, y), images = nn.Linear(9, 4), task(), torch.randn(40, 9)
    expected = distill.soft(temperature=2.0)
    losses = []
    for batch in (
        Batch(sound, y, teacher_inputs=images),
        {"inputs": sound, "labels": y, "teacher_inputs": images},
    ):
        torch.manual_seed(0)
        student = nn.Linear(6, 4)
        outputs = Outputs(student(sound)), Outputs(teacher(images).detach())
        want = expected.function(*outputs, Batch(sound)).item()
        (step,) = distill.train(student, [batch], expected, teacher=teacher, progress=False)
        assert step.loss == pytest.approx(want, rel=1e-6)
        losses.append(step.loss)
    assert losses[0] == losses[1] > 0
