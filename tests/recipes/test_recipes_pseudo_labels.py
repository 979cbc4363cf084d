"""Pseudo-labels: the mean of a cluster, and a student that learns from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from workflow_nets import mlp

from fastkd import distill
from fastkd.recipes.pseudo_labels import pseudo_labels


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(60, 5)
    return list(zip(inputs.split(25), inputs[:, :3].argmax(-1).split(25), strict=True))


def test_pseudo_labels_are_cluster_means(loader: Any) -> None:
    pytest.importorskip("sklearn")
    teacher, T = mlp(16).train(), 2.0
    inputs = [x for x, _ in loader]
    got = pseudo_labels(teacher, inputs, 4, temperature=T)
    soft = torch.cat([(teacher(x) / T).softmax(-1).detach() for x in inputs])
    assert sorted(set(got.clusters.tolist())) == [0, 1, 2, 3] and teacher.training
    for cluster in range(4):
        mine = got.clusters == cluster
        mean = soft[mine].double().mean(0).float()
        torch.testing.assert_close((got.logits[mine] / T).softmax(-1), mean.expand(mine.sum(), 3))
        assert (got.labels[mine] == mean.argmax()).all()
    # a cluster for each sample: the teacher itself
    alone = pseudo_labels(teacher, inputs, 60, temperature=T)
    torch.testing.assert_close((alone.logits / T).softmax(-1), soft)
    for clusters in (0, 61):
        with pytest.raises(ValueError, match=f"clusters: got {clusters}, expected 1 to 60"):
            pseudo_labels(teacher, inputs, clusters)


def test_student_learns_from_pseudo_labels(loader: Any) -> None:
    pytest.importorskip("sklearn")
    teacher, student = mlp(16), mlp()
    inputs = torch.cat([x for x, _ in loader])
    said = pseudo_labels(teacher, [inputs], 20)
    data = [{"inputs": inputs, "teacher": said.logits}]
    before = distill.agreement(student, teacher, [inputs])
    term = distill.soft(temperature=1.0)
    distill.train(student, data, term, epochs=300, lr=2e-2, progress=False)
    assert distill.agreement(student, teacher, [inputs]) > max(before, 0.85)
