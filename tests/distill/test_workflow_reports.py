"""Reports beside scikit-learn, the CSV of a run, the bar, schedules."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from workflow_nets import mlp

from fastkd import distill


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(60, 5)
    return list(zip(inputs.split(25), inputs[:, :3].argmax(-1).split(25), strict=True))


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
