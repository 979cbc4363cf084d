"""The stages around the trainer: students, reports, logs, export."""

from __future__ import annotations

import copy
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.distill import Batch, Outputs


def mlp(width: int = 8, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))


def convnet() -> nn.Sequential:
    """Convolutions, batch norms on both sides of a Flatten, nested."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.Flatten(),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Linear(16, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(60, 5)
    return list(zip(inputs.split(25), inputs[:, :3].argmax(-1).split(25), strict=True))


# students


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


# the report


@pytest.mark.parametrize("classes", [2, 4])
def test_report_equals_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    student, teacher = mlp(8, classes), mlp(16, classes)
    inputs, labels = torch.randn(301, 5), torch.randint(0, classes, (301,))
    kept = torch.rand(301) < 0.8
    loader = list(
        zip(inputs.split(64), labels.where(kept, torch.tensor(-100)).split(64), strict=True)
    )
    got = distill.report(student, loader, teacher=teacher)
    for name, model in (("student", student), ("teacher", teacher)):
        logits = torch.cat([model(x).detach().double() for x, _ in loader])[kept]
        p, y = logits.softmax(-1).numpy(), labels[kept].numpy()
        predicted = p.argmax(-1)
        several = {"average": "macro", "zero_division": 0}
        hot = F.one_hot(labels[kept], classes).numpy()
        expected = {
            "accuracy": metrics.accuracy_score(y, predicted),
            "precision": metrics.precision_score(y, predicted, **several),
            "recall": metrics.recall_score(y, predicted, **several),
            "f1": metrics.f1_score(y, predicted, **several),
            "roc_auc": metrics.roc_auc_score(
                *((y, p[:, 1]) if classes == 2 else (y, p)), multi_class="ovr", average="macro"
            ),
            "average_precision": metrics.average_precision_score(hot, p, average="macro"),
            "cross_entropy": metrics.log_loss(y, p),
        }
        for figure, value in expected.items():
            assert got.figures[name][figure] == pytest.approx(value, abs=1e-12), figure
        fpr, tpr, _ = metrics.roc_curve(hot.ravel(), p.ravel())
        assert got.curves[name]["roc"] == {"x": fpr.tolist(), "y": tpr.tolist()}
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert got.figures[name]["entropy"] == pytest.approx(entropy.item(), abs=1e-12)
    assert got.rows == kept.sum()

    figures = got.figures["student"]
    s, t = (
        torch.cat([m(x).detach().double() for x, _ in loader])[kept] for m in (student, teacher)
    )
    kl = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    assert figures["kl"] == pytest.approx(kl.item(), abs=1e-12)
    same = (s.argmax(-1) == t.argmax(-1)).double().mean().item()
    assert figures["agreement"] == pytest.approx(same, abs=1e-12)
    assert figures["parameters"] == sum(p.numel() for p in student.parameters())
    assert figures["compression"] == got.figures["teacher"]["bytes"] / figures["bytes"] > 1
    assert figures["latency_ms"] > 0 and student.training


def test_calibration_error_by_hand() -> None:
    p = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.45, 0.55], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    # 10 bins: (0.8, 0.9] sure 0.85 right 0; (0.9, 1] sure 0.975 right 1; (0.5, 0.6] 0.55 right 1
    expected = 0.25 * 0.85 + 0.5 * 0.025 + 0.25 * 0.45
    assert distill.calibration_error(p, labels, 10) == pytest.approx(expected, abs=1e-6)


def test_report_is_a_table_json_and_a_plot(loader: Any, tmp_path: Path) -> None:
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    got = distill.report(mlp(), loader, teacher=mlp(32))
    table = got.table()
    assert "60 labelled rows" in table
    for name, value in got.figures["student"].items():
        assert name in table
        assert name in ("parameters", "bytes") or f"{value:.4g}" in table
    text = got.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(text)
    assert json.loads(text)["figures"] == got.figures
    got.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_one_class_has_no_areas(loader: Any) -> None:
    pytest.importorskip("sklearn")
    inputs = loader[0][0]
    got = distill.report(mlp(), [(inputs, torch.zeros(len(inputs), dtype=torch.long))])
    assert math.isnan(got.figures["student"]["roc_auc"])
    assert json.loads(got.to_json())["figures"]["student"]["roc_auc"] is None


def test_report_errors(loader: Any) -> None:
    inputs = loader[0][0]
    for data, message in (
        ([], "got no batch to evaluate"),
        ([inputs], "got inputs alone"),
        ([(inputs, torch.full((len(inputs),), -100))], "only rows labelled -100"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.report(mlp(), data)
    with pytest.raises(ValueError, match=r"got \[60, 3\] logits of the student and \[60, 4\]"):
        distill.report(mlp(), loader, teacher=mlp(8, 4))


# loggers and schedules


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_every_step_and_metric(loader: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    told: list[tuple[dict[str, float], int]] = []
    logs = [distill.CSVLogger(path), lambda values, step: told.append((values, step))]
    terms = [distill.hard(), distill.soft()]
    options: dict[str, Any] = {"teacher": mlp(), "epochs": 2, "progress": False}
    steps = distill.train(mlp(), loader, terms, log=logs, validate=lambda m: 0.5, **options)
    rows = table(path)
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert [float(row["loss"]) for row in rows] == [step.loss for step in steps]
    assert [float(row["term/soft"]) for row in rows] == [step.terms["soft"] for step in steps]
    assert [row["metric"] for row in rows] == ["", "", "0.5", "", "", "0.5"]
    assert all(float(row["samples_per_s"]) > 0 for row in rows)
    assert len(told) == 8


def test_csv_of_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    log = distill.CSVLogger(path)
    for step in range(5):
        log({"loss": float(step)}, step)
    again = distill.CSVLogger(path)
    for step in range(3, 6):
        again({"loss": 10.0 + step, "new": 1.0}, step)
    rows = table(path)
    assert [row["step"] for row in rows] == list("012345")
    assert [float(row["loss"]) for row in rows] == [0, 1, 2, 13, 14, 15]
    assert [row["new"] for row in rows] == ["", "", "", "1.0", "1.0", "1.0"]
    assert list(tmp_path.iterdir()) == [path]


def test_bar_shows_loss_rate_and_speed(
    loader: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    from fastkd.distill import logging

    monkeypatch.setattr(logging, "REDRAW", 0.0)
    distill.train(mlp(), loader, distill.hard(), epochs=2)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("6/6", "loss=", "lr=0.001", "samples/s=", "epoch=1"))


def test_schedules() -> None:
    cosine = distill.lr_schedule(10, warmup=2, floor=0.1)
    assert [cosine(step) for step in (0, 1, 2, 6, 10, 99)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    )
    linear = distill.lr_schedule(4, "linear")
    assert [linear(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert distill.lr_schedule(4, "constant", warmup=2)(3) == 1.0
    for bad in ({"shape": "step"}, {"warmup": 4}, {"warmup": -1}, {"floor": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
            distill.lr_schedule(4, **bad)


# export


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


def test_hand_over_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# the three stages in one


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
