"""Pseudo-labels: a teacher's outputs, averaged within clusters of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd import distill
from fastkd.arguments.messages import shown
from fastkd.distill.batch import Outputs, batches, device_of, forward, moved, restored_modes
from fastkd.distill.sample_order import check_order, watched
from fastkd.distill.serialization import array, needed

from .data import LABELLED, digits
from .recipe import Figures, Gain, Recipe
from .training import fit, held_out, sample_batches, scaled, seen_labels, teacher
from .workflow import TEMPERATURE, student


class PseudoLabels(NamedTuple):
    """Per sample, in the loader's order.

    logits: float32 [N, V], T log(mean soft label of the sample's cluster); softmax(logits / T) is
        that mean, so they stand in for the teacher's logits at temperature T.
    labels: int64 [N], the cluster's most probable class.
    clusters: int64 [N], which cluster.
    """

    logits: Tensor
    labels: Tensor
    clusters: Tensor


def pseudo_labels(
    teacher: nn.Module,
    loader: Iterable[Any],
    clusters: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    order: str | None = "dataset",
) -> PseudoLabels:
    """Cluster the teacher's soft labels by k-means, and give each sample its cluster's mean.

        soft label of a sample = mean over its cluster of softmax(t / T)

    Args:
        teacher: module, inputs -> logits [B, V]; runs in eval mode, its mode is restored.
        loader: gives inputs, or (inputs, labels) whose labels are not used; in its dataset's order.
            Its first samples are read twice, but of an iterator, which lasts one pass.
        clusters: 1 to the number of samples.
        temperature: T, above 0.
        seed: of k-means.
        order: "dataset": sample i must be the dataset's; "loader": another order that stays; None:
            nothing is checked.

    Raises:
        ValueError: an argument out of range, no batch, a shuffled loader, samples that change from
            one reading to the next (random transforms).
    """
    if not temperature > 0:
        raise ValueError(f"temperature: got {shown(temperature)}, expected > 0")
    check_order(loader, order)
    device, teacher_logits = device_of(teacher), []
    with torch.no_grad(), restored_modes(teacher):
        for item in batches(watched(loader, order), "to label"):
            raw = forward(teacher.eval(), moved(item, device).inputs)
            teacher_logits.append(
                (Outputs(raw, role="teacher").logits.float() / temperature).softmax(-1).cpu()
            )
    soft = torch.cat(teacher_logits)
    if not 1 <= clusters <= len(soft):
        raise ValueError(
            f"clusters: got {shown(clusters)}, expected 1 to {len(soft)} (the samples)"
        )
    means = needed("sklearn.cluster", "pseudo_labels").KMeans(clusters, n_init=4, random_state=seed)
    cluster = torch.from_numpy(means.fit_predict(array(soft.double(), "pseudo_labels"))).long()
    count = torch.bincount(cluster, minlength=clusters).clamp(min=1)
    total = torch.zeros(clusters, soft.size(1), dtype=torch.float64)
    mean = total.index_add(0, cluster, soft.double()) / count.unsqueeze(1)
    logits = temperature * mean.clamp(min=torch.finfo(torch.float32).tiny).log().float()
    return PseudoLabels(logits[cluster], mean.argmax(-1)[cluster], cluster)


# ---- the recipe

CLUSTERS = 20


def pseudo(seed: int, size: float) -> Figures:
    """Soft labels of 20 clusters, beside a soft label for every sample."""
    data, steps = digits(seed), scaled(400, size)
    live = teacher(data, seed)
    seen = seen_labels(data)
    made = pseudo_labels(live, [data.images], CLUSTERS, temperature=TEMPERATURE, seed=seed)
    with torch.no_grad():
        teacher_logits = live(data.images)
    terms = [distill.hard(0.1), distill.soft(0.9, temperature=TEMPERATURE)]

    def trained(*columns: Tensor, loss: Any = terms) -> float:
        batches = sample_batches(seed, steps, 100, *columns)
        return held_out(fit(student(seed), batches, loss), data)

    few = data.images[:LABELLED], data.labels[:LABELLED]
    return {
        "hard labels": trained(*few, loss=distill.hard()),
        "20 clusters": trained(data.images, seen, made.logits),
        "cluster classes": trained(data.images, made.labels, loss=distill.hard()),
        "soft labels": trained(data.images, seen, teacher_logits),
        "teacher": held_out(live, data),
    }


RECIPES = (
    Recipe(
        name="pseudo-labels",
        about="20 clusters of the teacher's answers as soft labels of 1000 inputs",
        paper="",
        run=pseudo,
        gains=(
            Gain("20 clusters", "hard labels", 5.0),
            Gain("soft labels", "hard labels", None),
            Gain("20 clusters", "soft labels", None),
            Gain("cluster classes", "hard labels", None),
        ),
    ),
)
