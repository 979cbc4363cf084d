"""Teachers: cached, several, peers that learn, the moving average."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_runs import equal, mlp, mse, quiet, weights

import fastkd
from fastkd import distill
from fastkd.distill import Batch


def test_stored_outputs_equal_a_live_teacher(loader: Any) -> None:
    teacher, student = mlp(16), mlp()
    said = [teacher(x).detach() for x, _ in loader]
    rows = torch.cat(said)
    dicts = [
        {"inputs": x, "labels": y, "teacher": t, "index": torch.arange(8 * i, 8 * i + 8)}
        for i, ((x, y), t) in enumerate(zip(loader, said, strict=True))
    ]
    without = [{k: v for k, v in d.items() if k != "teacher"} for d in dicts]
    table = {teacher[0]: teacher}
    ways: list[tuple[Any, Any]] = [
        (loader, teacher),
        (dicts, None),
        (dicts, distill.CachedTeacher()),
        (without, distill.CachedTeacher(rows)),
        (loader, lambda x: table[teacher[0]](x)),
        (loader, [teacher, teacher]),
    ]
    results = []
    for data, given in ways:
        twin = copy.deepcopy(student)
        quiet(twin, data, [distill.hard(), distill.soft()], teacher=given, lr=1e-2)
        results.append(weights(twin))
    assert all(equal(results[0], other) for other in results[1:])
    with pytest.raises(ValueError, match="without 'teacher' and without 'index'"):
        quiet(student, loader, distill.soft(), teacher=distill.CachedTeacher(rows))


def test_terms_that_need_a_teacher_say_so(loader: Any) -> None:
    with pytest.raises(ValueError, match="term 'soft': got no teacher"):
        quiet(mlp(), loader, distill.soft())
    with pytest.raises(
        ValueError, match=r"teacher: got none, expected one with the layers \['1'\]"
    ):
        quiet(mlp(), loader, distill.feature("1", "1", mse))
    with pytest.raises(ValueError, match=r"layer: got \['1'\] of CallableTeacher"):
        quiet(mlp(), loader, distill.feature("1", "1", mse), teacher=lambda x: x)
    with pytest.raises(TypeError, match="teacher: got int"):
        quiet(mlp(), loader, distill.soft(), teacher=3)


def test_several_teachers_are_their_mean(loader: Any) -> None:
    a, b, x = mlp(16), mlp(4), loader[0][0]
    batch = Batch(x)
    said = distill.EnsembleTeacher([a, b], [3, 1])(batch)
    torch.testing.assert_close(said.logits, 0.75 * a(x) + 0.25 * b(x))
    assert torch.equal(said.members[1].logits, b(x))
    T = 2.0
    said = distill.EnsembleTeacher([a, b], [3, 1], temperature=T)(batch)
    mean = 0.75 * (a(x) / T).softmax(-1) + 0.25 * (b(x) / T).softmax(-1)
    torch.testing.assert_close((said.logits / T).softmax(-1), mean)
    for bad in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="weights: got"):
            distill.EnsembleTeacher([a, b], bad)
    term = distill.feature("1", "1.1", mse, projector=nn.Linear(8, 4))
    quiet(mlp(), loader, [distill.soft(), term], teacher=[a, b])
    with pytest.raises(ValueError, match="expected a number in front"):
        quiet(mlp(), loader, distill.feature("1", "layer", mse), teacher=[a, b])


def test_peer_learns_as_the_student_does(loader: Any) -> None:
    """Two models, each the other's teacher, against the loop written out."""
    terms = [distill.hard(), distill.soft(0.5, temperature=2.0)]
    student, other = mlp(), mlp(16)
    twins = copy.deepcopy(student), copy.deepcopy(other)
    peer = distill.PeerTeacher(other, terms, lr=1e-2)
    quiet(student, loader, terms, teacher=peer, lr=1e-2, epochs=2)

    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in twins]
    for _ in range(2):
        for x, y in loader:
            said = [m(x) for m in twins]
            for i, optimizer in enumerate(optimizers):
                theirs = said[1 - i].detach()
                soft = fastkd.distillation_loss(said[i], theirs, alpha=0.0, temperature=2.0)
                loss = F.cross_entropy(said[i], y) + 0.5 * soft
                optimizer.zero_grad()
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    assert equal(weights(student), weights(twins[0]))
    assert equal(weights(other), weights(twins[1]))


def test_peer_learns_features_of_the_student(loader: Any) -> None:
    student, other = mlp(4), mlp(16)
    projector = nn.Linear(16, 4)
    hint = distill.feature("1", "1", mse, projector=projector, name="hint")
    apart: list[float] = []

    def note(epoch: int, step: int, loss: Tensor) -> None:
        x = loader[0][0]
        apart.append(mse(projector(other[:2](x)), student[:2](x)).item())

    peer = distill.PeerTeacher(other, [distill.hard(), hint], lr=1e-2)
    quiet(student, loader, distill.hard(), teacher=peer, epochs=20, on_step=note)
    assert apart[-1] < 0.3 * apart[0]
    assert not any(m._forward_hooks for model in (student, other) for m in model.modules())


def test_cohort_of_peers_learns(loader: Any) -> None:
    models = [mlp(), mlp(16), mlp(4)]
    before = [distill.evaluate(m, loader).cross_entropy for m in models]
    terms = [distill.hard(), distill.soft()]
    cohort = distill.EnsembleTeacher(
        [distill.PeerTeacher(m, terms, lr=1e-2) for m in models[1:]], temperature=4.0
    )
    quiet(models[0], loader, terms, teacher=cohort, lr=1e-2, epochs=10)
    after = [distill.evaluate(m, loader).cross_entropy for m in models]
    assert all(a < b for a, b in zip(after, before, strict=True))


def test_average_is_the_definition(loader: Any) -> None:
    student = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    average = distill.EMATeacher(student, 0.9)
    expected = {n: p.detach().clone() for n, p in student.named_parameters()}

    def follow(*_: Any) -> None:
        for name, p in student.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach()

    quiet(student, loader, distill.hard(), ema=average, on_step=follow)
    for name, p in average.model.named_parameters():
        torch.testing.assert_close(p, expected[name])
    assert torch.equal(average.model[1].running_mean, student[1].running_mean)
    # as a teacher and an average at once it moves once a step
    twin = copy.deepcopy(student)
    both = distill.EMATeacher(twin, 0.5)
    start, (x, y) = twin[0].weight.detach().clone(), loader[0]
    quiet(twin, [(x, y)], [distill.hard(), distill.soft()], teacher=both, ema=both)
    torch.testing.assert_close(both.model[0].weight, (start + twin[0].weight) / 2)


def test_teacher_that_stays_in_train_mode_is_refused(loader: Any) -> None:
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> Stubborn:
            return super().train(True)

    with pytest.raises(ValueError, match="teacher: got 1 in train mode after eval"):
        quiet(mlp(), loader, distill.soft(), teacher=nn.Sequential(nn.ReLU(), Stubborn(5, 3)))


def test_teacher_on_another_device_is_named(loader: Any) -> None:
    with pytest.raises(ValueError, match="teacher: got outputs on meta, expected cpu"):
        quiet(mlp(), loader, distill.soft(), teacher=lambda x: torch.empty(8, 3, device="meta"))
