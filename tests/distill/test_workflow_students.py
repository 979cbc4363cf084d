"""Students made of a teacher: layers copied, units pruned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from trainer_runs import equal, weights
from workflow_nets import convnet, mlp

from fastkd import distill


def test_layers_are_copied_by_name() -> None:
    teacher, student = nn.Module(), nn.Module()
    teacher.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    student.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    names = distill.layer_map(3, 6, "blocks", "layers")
    assert names == {"blocks.0": "layers.0", "blocks.1": "layers.2", "blocks.2": "layers.5"}
    distill.copy_layers(student, teacher, names)
    for mine, theirs in names.items():
        assert equal(
            student.get_submodule(mine).state_dict(), teacher.get_submodule(theirs).state_dict()
        )
        assert student.get_submodule(mine).weight is not teacher.get_submodule(theirs).weight
    assert distill.layer_map(1, 6) == {"layers.0": "layers.0"}
    with pytest.raises(ValueError, match="student: got 7 layers of 6"):
        distill.layer_map(7, 6)


def test_layers_that_do_not_fit_leave_the_student_alone() -> None:
    student, before = (model := mlp()), weights(model)
    with pytest.raises(ValueError, match=r"layers: got '0' for '2' with 'bias' of shape \(8,\)"):
        distill.copy_layers(student, mlp(), {"0": "0", "2": "0"})
    with pytest.raises(ValueError, match="got '7', which Sequential does not have"):
        distill.copy_layers(student, mlp(), {"0": "0", "2": "7"})
    assert equal(weights(student), before)


def test_units_that_do_nothing_are_pruned_first() -> None:
    """Then the narrow model says exactly what the wide one said."""
    model = convnet()
    with torch.no_grad():
        for norm in (model[0][1], model[4]):  # as after training: statistics of their own
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        model[2].weight[:, [1, 4, 5]] = 0  # nothing reads channels 1, 4, 5 of the first
        model[6].weight[:, 4:12] = 0  # nor 1 and 2 of the second, 4 inputs each
        model[8].weight[:, :5] = 0
    wide = weights(model)
    narrow = distill.prune(model, 0.5)
    assert [tuple(p.shape) for p in narrow.parameters() if p.dim() > 1] == [
        (3, 1, 3, 3), (2, 3, 3, 3), (5, 8), (3, 5)
    ]  # fmt: skip
    x = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(narrow.eval()(x), model.eval()(x))
    assert equal(weights(model), wide)
    steps = distill.train(narrow, [(x, torch.arange(7) % 3)], distill.hard(), progress=False)
    assert math.isfinite(steps[0].loss)
    assert "Linear(in_features=8, out_features=5" in repr(narrow)


def test_prune_by_layer_and_to_one_unit() -> None:
    model = mlp(8)
    assert distill.prune(model, {"0": 0.25})[0].weight.shape == (2, 5)
    assert distill.prune(model, 1e-9)[0].weight.shape == (1, 5)
    assert equal(weights(distill.prune(model, 1.0)), weights(model))


@pytest.mark.parametrize(
    ("model", "keep", "message"),
    [
        (mlp(), 0.0, "keep: got 0.0 for '0'"),
        (mlp(), 1.1, "keep: got 1.1 for '0'"),
        (mlp(), {"2": 0.5}, r"keep: got layer '2', expected one of \['0'\]"),
        (nn.Linear(2, 2), 0.5, "model: got Linear, expected nn.Sequential"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.5, r"model: got LayerNorm.* at 1"),
        (nn.Sequential(nn.Conv1d(2, 2, 1, groups=2)), 0.5, r"model: got Conv1d.* at 0"),
        (nn.Sequential(nn.Linear(2, 4), nn.Linear(6, 2)), 0.5, "got 4 units of '0' before '1'"),
    ],
)
def test_what_cannot_be_pruned(model: Any, keep: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill.prune(model, keep)
