"""How good a model is: quick figures of one or two, and a report beside its teacher."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import shown
from fastkd.arguments.numbers import integer

from .batch import IGNORED, Outputs, batches, device_of, forward, moved, restored_modes
from .serialization import array, needed, save
from .targets import class_numbers, classes_last, in_use

BINS = 15  # of the calibration error, as in Guo et al. 2017
RUNS = 20  # of the latency


class Evaluation(NamedTuple):
    """Share of right answers in [0, 1] and mean cross-entropy in nats, over `rows` rows."""

    accuracy: float
    cross_entropy: float
    rows: int


def evaluate(model: nn.Module, loader: Iterable[Any], *, class_dim: int = -1) -> Evaluation:
    """Accuracy and mean cross-entropy of `model` in eval mode; rows labelled -100 do not count.

    Args:
        model: module, inputs -> logits [..., V]; its mode is restored.
        loader: gives (inputs, labels [...] int).
        class_dim: the dimension of the classes: 1 for maps [N, C, H, W] with labels [N, H, W].

    Raises:
        ValueError: no batch, a batch without labels, no row that counts, a label that is no class.
    """

    def count(labels: Tensor | None, logits: Tensor) -> list[Tensor]:
        if labels is None:
            raise ValueError("loader: got inputs alone, expected (inputs, labels)")
        labels = class_numbers("own", logits, labels)
        flat = logits.flatten(0, -2).float()
        try:
            nats = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        except IndexError as error:  # on the CPU; it does not say what it is about
            kept = labels[labels != IGNORED]
            raise ValueError(
                f"labels: got class numbers from {int(kept.min())} to {int(kept.max())}, expected "
                f"0 to {logits.size(-1) - 1}, the model's logits {list(logits.shape)}, or {IGNORED}"
            ) from error
        return [(logits.argmax(-1) == labels).sum(), nats]

    rows, right, nats = _totals([model], loader, count, class_dim)
    return Evaluation(right / rows, nats / rows, int(rows))


def agreement(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    vocab_size: int | None = None,
    class_dim: int = -1,
) -> float:
    """Share of rows, in [0, 1], where both models (in eval mode) predict the same class.

    Args:
        model_a, model_b: modules on one device, inputs -> logits [..., V]; modes are restored.
        loader: gives inputs, or (inputs, labels [...]) whose rows labelled -100 do not count.
        vocab_size: use the first n columns of both only.
        class_dim: as in `evaluate`.

    Raises:
        ValueError: no batch, or no row that counts.
    """

    def count(labels: Tensor | None, a: Tensor, b: Tensor) -> list[Tensor]:
        a, b = in_use("model_a", a, vocab_size), in_use("model_b", b, vocab_size)
        same = a.argmax(-1) == b.argmax(-1)
        return [(same if labels is None else same & (labels != IGNORED)).sum()]

    rows, same = _totals([model_a, model_b], loader, count, class_dim)
    return same / rows


def _totals(
    models: list[nn.Module], loader: Iterable[Any], count: Callable[..., Any], class_dim: int
) -> list[float]:
    """[rows that count, *count(labels, *logits)], each summed over the loader; one host sync."""
    parts = []
    device = device_of(models[0])
    with torch.no_grad(), restored_modes(*models):
        for item in batches(loader, "to evaluate"):
            batch = moved(item, device)
            labels = batch.labels
            outputs = [forward(model.eval(), batch.inputs) for model in models]
            logits = [_logits(raw, "model", labels, batch.inputs, class_dim) for raw in outputs]
            shape = logits[0].shape[:-1]
            rows = torch.tensor(shape.numel()) if labels is None else (labels != IGNORED).sum()
            parts.append(torch.stack([rows.to(logits[0].device), *count(labels, *logits)]))
    totals = [math.fsum(column) for column in zip(*torch.stack(parts).tolist(), strict=True)]
    if totals[0] == 0:
        raise ValueError(f"loader: got only rows labelled {IGNORED}, expected others too")
    return totals


def _logits(raw: Any, role: str, labels: Any, inputs: Any, class_dim: int) -> Tensor:
    """A model's logits with their classes last."""
    logits: Tensor = Outputs(raw, role=role).logits
    if class_dim == -1:
        classes_last("", logits, labels, inputs)
        return logits
    at = integer(class_dim)
    if at is None or not -logits.dim() <= at < logits.dim():
        raise ValueError(
            f"class_dim: got {shown(class_dim)}, expected a dimension of the logits "
            f"{list(logits.shape)}"
        )
    return logits.movedim(at, -1)


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures by model ("student", "teacher") and name; curves and bins for the plot.

    `figures[model]` holds, over the labelled rows: accuracy, precision, recall, f1 (macro),
    roc_auc, average_precision and pr_auc (one class against the rest, mean over classes that occur
    and do not fill the data), cross_entropy, entropy (nats), calibration_error; parameters, bytes
    (as safetensors), latency_ms (of the first batch, median). Beside a teacher the student's also
    hold agreement, kl = KL(teacher || student) in nats at T = 1, compression (bytes of the teacher
    over the student's) and speedup (of latency).
    """

    figures: dict[str, dict[str, float]]
    curves: dict[str, dict[str, dict[str, list[float]]]]
    rows: int

    def table(self) -> str:
        """The figures as text, a column for each model."""
        names = list(dict.fromkeys(name for column in self.figures.values() for name in column))
        width = max(map(len, names)) + 2
        lines = [" " * width + "".join(f"{model:>14}" for model in self.figures)]
        for name in names:
            cells = (column.get(name) for column in self.figures.values())
            line = "".join(f"{'' if x is None else _number(x):>14}" for x in cells)
            lines.append(f"{name:{width}}{line}")
        return "\n".join([*lines, f"{self.rows} labelled rows"])

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Figures as JSON (what is not defined is null); written to `path` where one is given."""
        tidy = {
            model: {name: x if x == x else None for name, x in column.items()}
            for model, column in self.figures.items()
        }
        text = json.dumps({"rows": self.rows, "figures": tidy}, indent=2, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | os.PathLike[str]) -> None:
        """ROC and precision-recall curves (all classes together) and calibration, as a picture."""
        figure = needed("matplotlib.figure", "plot").Figure(figsize=(13, 4), layout="constrained")
        metrics = needed("sklearn.metrics", "plot")
        roc_axis, pr_axis, calibration_axis = figure.subplots(1, 3)
        for model, curves in self.curves.items():
            roc, pr, bins = curves["roc"], curves["pr"], curves["calibration"]
            metrics.RocCurveDisplay(fpr=roc["x"], tpr=roc["y"]).plot(roc_axis, name=model)
            metrics.PrecisionRecallDisplay(precision=pr["y"], recall=pr["x"]).plot(
                pr_axis, name=model
            )
            calibration_axis.plot(bins["x"], bins["y"], marker="o", markersize=3, label=model)
        calibration_axis.plot([0, 1], [0, 1], color="#d1d5db", linewidth=1, zorder=0)
        calibration_axis.set(xlabel="confidence", ylabel="accuracy")
        calibration_axis.legend(frameon=False)
        figure.savefig(path, dpi=150)


def report(
    student: nn.Module,
    loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    vocab_size: int | None = None,
    class_dim: int = -1,
) -> Report:
    """Judge a classifier, and beside its teacher where one is given.

    Args:
        student: module, inputs -> logits [..., V] with V >= 2; its mode is restored.
        loader: gives (inputs, labels [...] int); rows labelled -100 do not count. Iterated once
            per model, in one order. Logits of all rows are kept on the host.
        teacher: module of the same V.
        vocab_size: use the first n columns only, so that V may differ by padding.
        class_dim: as in `evaluate`.

    Raises:
        ValueError: no batch, a batch without labels, no row that counts, another V.

    Papers: Guo et al. 2017, arXiv 1706.04599 (calibration error).
    """
    models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    how = vocab_size, class_dim
    collected = {name: _collect(model, loader, name, *how) for name, model in models.items()}
    logits, labels, _ = collected["student"]
    figures, curves = {}, {}
    for name, model in models.items():
        figures[name], curves[name] = _quality(collected[name][0], labels)
        figures[name] |= _cost(model, collected[name][2])
    if teacher is not None:
        teacher_logits = collected["teacher"][0]
        if teacher_logits.shape != logits.shape or not torch.equal(collected["teacher"][1], labels):
            raise ValueError(
                f"loader: got {list(logits.shape)} logits of the student and "
                f"{list(teacher_logits.shape)} "
                "of the teacher, or other labels; expected the same rows in the same order"
            )
        student_figures, teacher_figures = figures["student"], figures["teacher"]
        student_figures["agreement"] = float(
            (logits.argmax(-1) == teacher_logits.argmax(-1)).double().mean()
        )
        student_figures["kl"] = float(fastkd.kl_div(logits, teacher_logits))
        student_figures["compression"] = teacher_figures["bytes"] / student_figures["bytes"]
        student_figures["speedup"] = teacher_figures["latency_ms"] / student_figures["latency_ms"]
    return Report(figures, curves, len(labels))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """sum_b n_b / N * abs(accuracy_b - confidence_b) over equal bins of confidence in (0, 1].

    Args:
        probabilities: [N, V].
        labels: int [N].
        bins: how many.
    """
    share, confidence, accuracy = _bins(probabilities, labels, bins)
    return float((share * (accuracy - confidence).abs()).sum())


def _bins(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Share of rows, mean confidence and accuracy of each bin that has rows."""
    confidence, predicted = probabilities.double().max(-1)
    right = (predicted == labels).double()
    at = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count, total_confidence, total_right = (
        torch.zeros(bins, dtype=torch.float64).index_add(0, at, values)
        for values in (torch.ones_like(confidence), confidence, right)
    )
    some = count > 0
    count, total_confidence, total_right = count[some], total_confidence[some], total_right[some]
    return count / len(labels), total_confidence / count, total_right / count


def _collect(
    model: nn.Module, loader: Iterable[Any], role: str, vocab_size: int | None, class_dim: int
) -> tuple[Tensor, Tensor, Any]:
    """Logits float64 [N, V] and labels [N] of the rows that count, and the first batch's inputs."""
    device = device_of(model)
    logits, labels, first = [], [], None
    with torch.no_grad(), restored_modes(model):
        for item in batches(loader, "to evaluate"):
            if item.labels is None:
                raise ValueError("loader: got inputs alone, expected (inputs, labels)")
            batch = moved(item, device)
            first = batch.inputs if first is None else first
            raw = forward(model.eval(), batch.inputs)
            output = _logits(raw, role, batch.labels, batch.inputs, class_dim)
            output = in_use(role, output, vocab_size)
            if output.size(-1) < 2:
                got = f"a single logit {list(output.shape)}"
                raise ValueError(f"{role}: got {got}, expected logits [..., V] with V >= 2")
            truth = class_numbers("own", output, batch.labels)
            keep = truth != IGNORED
            logits.append(output[keep].double().cpu())
            labels.append(truth[keep].cpu())
    if not sum(map(len, labels)):
        raise ValueError(f"loader: got only rows labelled {IGNORED}, expected others too")
    return torch.cat(logits), torch.cat(labels), first


def _quality(logits: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    metrics = needed("sklearn.metrics", "report")
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    truth, predicted = (array(x, "report") for x in (labels, logits.argmax(-1)))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, predicted, average="macro", zero_division=0
    )
    found: dict[str, float] = {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }
    hot = torch.nn.functional.one_hot(labels, logits.size(1)).numpy()
    score = p.numpy()
    areas = []
    for column in range(hot.shape[1]):
        positive, column_score = hot[:, column], score[:, column]
        if 0 < positive.sum() < len(positive):
            ps, rs, _ = metrics.precision_recall_curve(positive, column_score)
            areas.append(
                (
                    metrics.roc_auc_score(positive, column_score),
                    metrics.average_precision_score(positive, column_score),
                    metrics.auc(rs, ps),
                )
            )
    for at, name in enumerate(("roc_auc", "average_precision", "pr_auc")):
        found[name] = statistics.fmean(row[at] for row in areas) if areas else float("nan")
    found["cross_entropy"] = float(-log_p.gather(1, labels.unsqueeze(1)).mean())
    found["entropy"] = float(-torch.special.xlogy(p, p).sum(-1).mean())
    found["calibration_error"] = calibration_error(p, labels)
    fpr, tpr, _ = metrics.roc_curve(hot.ravel(), score.ravel())
    ps, rs, _ = metrics.precision_recall_curve(hot.ravel(), score.ravel())
    _, confidence, accuracy = _bins(p, labels, BINS)
    curves = {
        "roc": {"x": fpr.tolist(), "y": tpr.tolist()},
        "pr": {"x": rs.tolist(), "y": ps.tolist()},
        "calibration": {"x": confidence.tolist(), "y": accuracy.tolist()},
    }
    return {name: float(x) for name, x in found.items()}, curves


def _cost(model: nn.Module, inputs: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        size = path.stat().st_size
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "latency_ms": latency(model, inputs),
    }


def latency(model: nn.Module, inputs: Any, runs: int = RUNS) -> float:
    """Milliseconds of one forward in eval mode: the median of `runs`, after 3 to warm up."""
    device = device_of(model)
    wait = (lambda: None) if device.type == "cpu" else torch.get_device_module(device).synchronize
    times = []
    with torch.no_grad(), restored_modes(model):
        model.eval()
        for run in range(runs + 3):
            wait()
            start = time.perf_counter()
            forward(model, inputs)
            wait()
            if run >= 3:
                times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _number(x: float) -> str:
    return f"{x:,.0f}" if float(x).is_integer() and abs(x) >= 2 else f"{x:.4g}"
