"""Export, fine-tuning and all stages; names, batches and outputs."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_runs import equal, weights
from workflow_nets import convnet, mlp

import fastkd
from fastkd import distill
from fastkd.distill import Batch, Outputs


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(60, 5)
    return list(zip(inputs.split(25), inputs[:, :3].argmax(-1).split(25), strict=True))


def test_student_is_exported(tmp_path: Path) -> None:
    student = convnet()
    x = torch.randn(3, 1, 8, 8)
    paths = distill.export(student, x, tmp_path / "out", metadata={"task": "t"})
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in paths.values()}
    assert student.training
    expected = student.eval()(torch.randn(5, 1, 8, 8, generator=torch.manual_seed(1)))
    again = torch.randn(5, 1, 8, 8, generator=torch.manual_seed(1))
    program = torch.export.load(paths["pt2"])
    torch.testing.assert_close(program.module()(again), expected)
    other = convnet()
    assert distill.load(other, paths["safetensors"]) == {"task": "t"}
    assert torch.equal(other.eval()(again), expected)


def test_student_goes_to_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    student = mlp()
    path = distill.export(student, torch.randn(3, 5), tmp_path, formats=["onnx"])["onnx"]
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(7, 5)
    model = onnx.load(path)
    (got,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), student(x).detach())
    assert [p.name for p in tmp_path.iterdir()] == ["student.onnx"]


def test_export_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for inputs, formats, message in (
        (torch.randn(3, 5), ["pickle"], r"formats: got \['pickle'\]"),
        (torch.randn(1, 5), ["pt2"], "inputs: got 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.export(mlp(), inputs, tmp_path, formats=formats)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"formats 'onnx' needs onnx.*\.\[onnx\]"):
        distill.export(mlp(), torch.randn(3, 5), tmp_path, formats=["onnx"])
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_has_a_new_head_and_frozen_layers() -> None:
    student = convnet().train()
    before = weights(student)
    data = [(torch.randn(16, 1, 8, 8), torch.arange(16) % 5)]
    model, steps = distill.fine_tune(
        student,
        data,
        distill.hard(),
        head="8",
        outputs=5,
        freeze=["0", "2", "4"],
        epochs=60,
        lr=3e-2,
        progress=False,
    )
    assert steps[-1].loss < 0.8 * steps[0].loss
    assert equal(weights(student), before)
    after = weights(model)
    still = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.split(".")[0] in ("0", "2", "4")}
    assert still == frozen  # running statistics of batch norms too
    assert model[8].weight.shape == (5, 10) and model(data[0][0]).shape == (16, 5)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_fine_tuning_errors() -> None:
    data = [(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))]
    for options, message in (
        ({"head": "2"}, "expected both or neither"),
        ({"head": "1", "outputs": 3}, "name: got '1', a ReLU"),
        ({"head": "2", "outputs": 0}, "outputs: got 0"),
        ({"head": "3", "outputs": 2}, "got '3', which Sequential does not have"),
        ({"freeze": ["9"]}, "got '9', which Sequential does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.fine_tune(mlp(), data, distill.hard(), progress=False, **options)


def test_three_stages(tmp_path: Path) -> None:
    """Teacher, pruned student taught through a layer, judged, exported, tuned for another task."""
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    torch.manual_seed(0)
    inputs = torch.randn(200, 5)
    labels = inputs[:, :3].argmax(-1)
    data = list(zip(inputs.chunk(4), labels.chunk(4), strict=True))
    quiet: dict[str, Any] = {"progress": False, "lr": 1e-2}

    teacher = mlp(64)
    distill.train(teacher, data, distill.hard(), epochs=20, **quiet)
    student = distill.prune(teacher, 0.125)
    projector = distill.projector(student, teacher, inputs[:2], "1", "1")
    hint = distill.feature("1", "1", F.mse_loss, 0.1, projector=projector)
    terms = [distill.hard(0.5), distill.soft(0.5, temperature=2.0), hint]
    start = distill.evaluate(student, data)
    distill.train(student, data, terms, teacher=teacher, epochs=20, **quiet)
    got = distill.report(student, data, teacher=teacher)
    assert got.figures["student"]["accuracy"] > start.accuracy
    assert got.figures["student"]["agreement"] > 0.9 and got.figures["student"]["compression"] > 2
    distill.export(student, inputs[:4], tmp_path)
    other = [(inputs, (inputs[:, 3] > 0).long())]
    tuned, _ = distill.fine_tune(
        student, other, distill.hard(), head="2", outputs=2, epochs=60, **quiet
    )
    assert distill.evaluate(tuned, other).accuracy > 0.7


def test_names_are_public_and_documented() -> None:
    assert sorted(distill.__all__) == distill.__all__
    for name in distill.__all__:
        assert getattr(distill, name).__doc__, name
    assert fastkd.distill is distill


def test_batch_and_outputs_take_what_models_and_loaders_give() -> None:
    class Said:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    x = torch.ones(2, 3, requires_grad=True)
    for raw in (x, {"logits": x}, Said(x)):
        out = Outputs(raw, {"a": (x, [x])})
        assert out.logits is x
        assert not out.detach().logits.requires_grad
        assert not out.detach().features["a"][1][0].requires_grad
    assert Outputs((x, x)).logits == (x, x) and Outputs(None).logits is None

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(ids) * scale}

    inputs = {"ids": torch.randn(4, 5), "scale": torch.ones(4, 1)}
    labels = torch.zeros(4, dtype=torch.long)
    model = Named()
    twins = [copy.deepcopy(model) for _ in range(3)]
    given = [(inputs, labels), {"inputs": inputs, "labels": labels, "more": labels}]
    for twin, batch in zip(twins, [*given, Batch(inputs, labels)], strict=True):
        distill.train(twin, [batch], distill.hard(), progress=False)
    assert equal(weights(twins[0]), weights(twins[1])) and equal(
        weights(twins[0]), weights(twins[2])
    )


def test_several_frozen_teachers_of_a_student_with_heads() -> None:
    """Nobody averages a student's outputs for teachers that do not learn from them."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    def function(student: distill.Outputs, teacher: distill.Outputs, _: distill.Batch) -> Tensor:
        return F.mse_loss(student.raw["a"], teacher.logits)

    teachers = distill.EnsembleTeacher([nn.Linear(5, 3), nn.Linear(5, 3)])
    loader = [(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))] * 2
    term = distill.Term("a", function, mean="samples")
    assert len(distill.train(Heads(), loader, term, teacher=teachers, progress=False)) == 2
