"""Soft targets on scikit-learn's digits: does a teacher help, and do both loss paths agree?

A wide teacher learns from 1000 labelled images. A small student has the labels of 100 of them, and
of the other 900 at most the teacher's logits. Per seed, three students start from the same weights
and take the same steps over the same batches; the other 797 images judge them:

    labels alone  cross-entropy on the 100 labels (the control)
    plain torch   also T^2 KL(teacher, student) in the usual torch expressions
    fastkd        the same through fastkd.distillation_loss

    python -m fastkd.recipes.digits --seeds 5 --out demo/digits

Exit status: 0, or 1 where the two loss paths disagree beyond the tolerances below.

Paper: Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.arguments.messages import shown
from fastkd.distill.logging import progress_bar
from fastkd.distill.serialization import needed

USER = "python -m fastkd.recipes.digits"

LABELLED, POOL, BATCH = 100, 1000, 100  # a batch: 10 rows with a label, then 90 without
TEMPERATURE, ALPHA, LR = 4.0, 0.5, 1e-2  # ALPHA weighs the hard labels
STUDENT = (64, 16, 10)

# The paths round differently and training multiplies that; a wrong formula is off by far more.
LOSS_TOLERANCE = 1e-4  # largest difference of the loss curves, as a share of the first loss
SAME_TOLERANCE = 0.99  # least share of equal predictions on the held-out images


def usual(s: Tensor, t: Tensor, labels: Any = None, *, temperature: float, alpha: float) -> Tensor:
    """alpha CE + (1 - alpha) T^2 KL(p, q) as plain torch writes it: [N, V], [N, V], [N] -> 0-d."""
    T = temperature
    soft = T * T * F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")
    return soft if labels is None else alpha * F.cross_entropy(s, labels) + (1 - alpha) * soft


def over_batch(term: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Mean over a batch of `term`: both of its parts where there is a label, else the soft one."""
    n = LABELLED * BATCH // POOL

    def loss(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        labelled = term(s[:n], t[:n], labels[:n], temperature=TEMPERATURE, alpha=ALPHA)
        others = term(s[n:], t[n:], temperature=TEMPERATURE, alpha=0.0)
        return (n * labelled + (len(s) - n) * others) / len(s)

    return loss


CONTROL, PLAIN, OURS = "labels alone", "plain torch", "fastkd"
LOSSES: dict[str, Callable[..., Tensor]] = {
    CONTROL: lambda s, _, labels: F.cross_entropy(s, labels, ignore_index=-100),
    PLAIN: over_batch(usual),
    OURS: over_batch(fastkd.distillation_loss),
}


class Batches:
    """Shuffled batches; the first `fixed` images are dealt out evenly, at the head of each."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, fixed: int = 0) -> None:
        self.images, self.labels, self.fixed = images, labels, fixed
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        head = torch.randperm(self.fixed, generator=self.generator)
        rest = torch.randperm(len(self.images) - self.fixed, generator=self.generator) + self.fixed
        for rows in torch.cat([head.view(len(self), -1), rest.view(len(self), -1)], 1):
            yield self.images[rows], self.labels[rows]


def run_seed(
    seed: int, epochs: int, teacher_epochs: int, width: int, on_step: Callable[..., Any]
) -> tuple[dict[str, Any], nn.Module]:
    """Train one teacher and the three students on one split; return figures and fastkd's student.

    Args:
        seed: of the split, the weights, dropout and the batches; torch's own state is kept.
        epochs: passes of each student over the 1000 images, 10 steps each.
        teacher_epochs: passes of the teacher.
        width: of the teacher's two hidden layers.
        on_step: called after every step of every training.
    """
    digits = needed("sklearn.datasets", USER).load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        pool, held_out = order[:POOL], [(images[order[POOL:]], targets[order[POOL:]])]
        teacher = _mlp(images.shape[1], width, width, 10, dropout=0.5)
        distill.train(
            teacher,
            Batches(images[pool], targets[pool], seed),
            LOSSES[CONTROL],
            epochs=teacher_epochs,
            progress=False,
            on_step=on_step,
        )
        untrained = _mlp(*STUDENT)

    known = targets[pool].clone()
    known[LABELLED:] = -100
    figures: dict[str, Any] = {"seed": seed, "accuracy": {}, "seconds": {}, "loss": {}}
    figures["accuracy"]["teacher"] = distill.evaluate(teacher, held_out).accuracy
    students = {}
    for method, loss in LOSSES.items():
        students[method] = student = copy.deepcopy(untrained)
        began = time.perf_counter()
        steps = distill.train(
            student,
            Batches(images[pool], known, seed, fixed=LABELLED),
            loss,
            teacher=None if method == CONTROL else teacher,
            epochs=epochs,
            lr=LR,
            progress=False,
            on_step=on_step,
        )
        figures["seconds"][method] = time.perf_counter() - began
        figures["accuracy"][method] = distill.evaluate(student, held_out).accuracy
        figures["loss"][method] = [step.loss for step in steps]
    plain, ours = figures["loss"][PLAIN], figures["loss"][OURS]
    figures["difference"] = max(abs(a - b) for a, b in zip(plain, ours, strict=True)) / plain[0]
    figures["same"] = distill.agreement(students[PLAIN], students[OURS], held_out)
    return figures, students[OURS]


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table over `run_seed` figures: one row per method, and how well the two paths agree."""
    rows = []
    for method in ("teacher", *LOSSES):
        accuracy = [s["accuracy"][method] for s in seeds]
        gains = [s["accuracy"][method] - s["accuracy"][CONTROL] for s in seeds]
        row = {"method": method, "mean": statistics.fmean(accuracy)}
        row |= {"min": min(accuracy), "max": max(accuracy)}
        if method in (PLAIN, OURS):
            row |= {"gain": statistics.fmean(gains), "wins": sum(g > 0 for g in gains)}
        if method in LOSSES:
            row["seconds"] = sum(s["seconds"][method] for s in seeds)
        rows.append(row)
    paths: dict[str, Any] = {"difference": max(s["difference"] for s in seeds)}
    paths["same"] = min(s["same"] for s in seeds)
    paths |= {"difference_tolerance": LOSS_TOLERANCE, "same_tolerance": SAME_TOLERANCE}
    paths["agree"] = paths["difference"] <= LOSS_TOLERANCE and paths["same"] >= SAME_TOLERANCE
    return {
        "table": rows,
        "paths": paths,
        "per_seed": [{k: s[k] for k in ("seed", "accuracy", "difference", "same")} for s in seeds],
    }


def as_text(result: dict[str, Any]) -> str:
    """The table of `summary` for a terminal: accuracies in percent, gains in points."""
    count = len(result["per_seed"])
    lines = [f"{'':14}{'accuracy':>9}{'min .. max':>17}{'gain':>9}{'wins':>7}{'seconds':>10}"]
    for row in result["table"]:
        line = f"{row['method']:14}{row['mean']:9.1%}{row['min']:8.1%} .. {row['max']:5.1%}"
        line += f"{100 * row['gain']:+9.1f}{row['wins']:5}/{count}" if "gain" in row else " " * 16
        lines.append(line + (f"{row['seconds']:10.1f}" if "seconds" in row else ""))
    paths = result["paths"]
    lines += [
        f"\nthe two loss paths {'agree' if paths['agree'] else 'DISAGREE'}: curves differ by up to "
        f"{paths['difference']:.1e} of the first loss (tolerance {LOSS_TOLERANCE:.0e}),",
        f"at least {paths['same']:.1%} of the held-out predictions are equal "
        f"(tolerance {SAME_TOLERANCE:.0%})",
    ]
    return "\n".join(lines)


def plot(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the two loss curves of the first seed, their difference, and accuracies per seed."""
    figure = needed("matplotlib.figure", USER).Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    curves = figure.add_subplot(grid[0, 0])
    apart = figure.add_subplot(grid[1, 0], sharex=curves)
    dots = figure.add_subplot(grid[:, 1])
    grey, light, dark = "#6b7280", "#f5a623", "#1d4ed8"

    plain, ours = seeds[0]["loss"][PLAIN], seeds[0]["loss"][OURS]
    curves.plot(plain, color=light, linewidth=4, alpha=0.7, label=PLAIN)
    curves.plot(ours, color=dark, linewidth=1, label=OURS)
    curves.set(title=f"Loss of both paths, seed {seeds[0]['seed']}", yscale="log", ylabel="loss")
    curves.tick_params(labelbottom=False)
    curves.legend(frameon=False)
    gaps = [max(abs(a - b) / plain[0], 1e-9) for a, b in zip(plain, ours, strict=True)]
    apart.plot(gaps, color=grey, linewidth=0.8)
    apart.axhline(LOSS_TOLERANCE, color="#b91c1c", linewidth=1, linestyle="--")
    apart.text(0, LOSS_TOLERANCE * 0.6, "tolerance", va="top", color="#b91c1c", fontsize="small")
    apart.set(yscale="log", ylim=(1e-9, 1e-3), xlabel="step", ylabel="|difference|")

    places = range(len(seeds))
    styles = {
        "teacher": {"marker": "_", "color": grey, "s": 260},
        CONTROL: {"marker": "o", "color": grey, "s": 60},
        PLAIN: {"marker": "o", "color": light, "s": 170, "alpha": 0.7},
        OURS: {"marker": "o", "color": dark, "s": 35},
    }
    percent = {m: [100 * s["accuracy"][m] for s in seeds] for m in styles}
    dots.vlines(places, percent[CONTROL], percent[OURS], color="#d1d5db", linewidth=1.5, zorder=0)
    for method, style in styles.items():
        dots.scatter(places, percent[method], label=method, **style)
    dots.set(title="Held-out accuracy", xlabel="seed", ylabel="percent")
    dots.set_xlim(-0.6, len(seeds) - 0.4)
    dots.set_xticks(places, [str(s["seed"]) for s in seeds])
    dots.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    for axes in (curves, apart, dots):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write digits.png, student.safetensors and (--json) table.json."""
    about = "Distil a wide teacher into a small student on scikit-learn's digits."
    parser = argparse.ArgumentParser("python -m fastkd.recipes.digits", description=about)
    parser.add_argument("--seeds", type=_count, default=5, help="how many seeds (default 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--epochs", type=_count, default=40, help="of the students (default 40)")
    parser.add_argument("--teacher-epochs", type=_count, default=15, help="default 15")
    parser.add_argument("--width", type=_count, default=1200, help="of the teacher (default 1200)")
    parser.add_argument("--out", type=Path, default=Path("demo/digits"), help="default demo/digits")
    parser.add_argument("--json", action="store_true", help="write the table as JSON too")
    options = parser.parse_args(argv)
    try:  # now, not after the training
        for module in ("sklearn.datasets", "matplotlib.figure", "safetensors.torch"):
            needed(module, USER)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        parser.error(str(error))

    torch.set_num_threads(1)  # a second one gains little here, and loses much on cores others use
    steps = (options.teacher_epochs + len(LOSSES) * options.epochs) * (POOL // BATCH)
    settings: dict[str, Any] = {"recipe": "digits", "fastkd": fastkd.__version__}
    settings |= {"layers": STUDENT, "input": "pixels / 16", "labelled": LABELLED, "pool": POOL}
    settings |= {"temperature": TEMPERATURE, "alpha": ALPHA, "lr": LR, "epochs": options.epochs}
    settings |= {"teacher_epochs": options.teacher_epochs, "teacher_width": options.width}
    seeds: list[dict[str, Any]] = []
    with progress_bar(total=options.seeds * steps, unit="step", desc="digits") as bar:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            bar.set_postfix(seed=seed)
            figures, student = run_seed(
                seed, options.epochs, options.teacher_epochs, options.width, lambda *_: bar.update()
            )
            if not seeds:
                metadata = settings | {"seed": seed, "accuracy": figures["accuracy"][OURS]}
                distill.save(student, options.out / "student.safetensors", metadata)
            seeds.append(figures)
    result = summary(seeds)
    print(as_text(result))
    plot(seeds, options.out / "digits.png")
    if options.json:
        text = json.dumps({"settings": settings} | result, indent=2) + "\n"
        (options.out / "table.json").write_text(text, encoding="utf-8")
    print(f"\nwritten to {options.out}")
    return 0 if result["paths"]["agree"] else 1


def _mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected an integer >= 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
