"""A plain network that does without the graph its teacher reads, for digits with 40 labels.

The teacher is a graph convolution over the nearest neighbours among the 1 000 images of the pool.
The student sees one image at a time, also those that were no node of the graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill

from .data import POOL, digits
from .recipe import Figures, Gain, Recipe
from .trained import drawn, fit, held_out, mlp, scaled

LABELLED, NEIGHBOURS = 40, 8
TEACHER_STEPS, STEPS, BATCH, WIDTH = 200, 400, 100, 64


class GraphConvolution(nn.Module):
    """Two layers over a fixed graph: images of all nodes [N, 64] -> logits [N, 10]."""

    def __init__(self, graph: Tensor) -> None:
        super().__init__()
        self.register_buffer("graph", graph, persistent=False)
        self.graph: Tensor
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.dropout(
            torch.sparse.mm(self.graph, self.first(images)).relu(), 0.5, self.training
        )
        return torch.sparse.mm(self.graph, self.last(hidden))


def graph(seed: int, size: float) -> Figures:
    data = digits(seed)
    labels = torch.where(torch.arange(POOL) < LABELLED, data.labels, -100)
    torch.manual_seed(seed)
    teacher = GraphConvolution(distill.neighbour_graph(data.images, NEIGHBOURS))
    fit(teacher, [(data.images, labels)] * scaled(TEACHER_STEPS, size), distill.hard())
    with torch.no_grad():
        said = teacher.eval()(data.images)

    def student(rows: int, *loss: distill.Term) -> float:
        torch.manual_seed(1000 + seed)
        columns = (column[:rows] for column in (data.images, labels, said))
        batches = drawn(seed, scaled(STEPS, size), BATCH, *columns)
        return held_out(fit(mlp(64, WIDTH, 10), batches, loss), data)

    taught = distill.hard(0.1), distill.soft(0.9, temperature=1.0)
    others = said.argmax(-1)[LABELLED:] == data.labels[LABELLED:]
    return {
        "teacher, unlabelled nodes": 100 * others.float().mean().item(),
        "hard labels": student(LABELLED, distill.hard()),
        "taught, same inputs": student(LABELLED, *taught),
        "taught": student(POOL, *taught),
    }


RECIPES = (
    Recipe(
        name="graph",
        about="a network without a graph, taught by a graph convolution over nearest neighbours",
        paper="Zhang et al. 2022, arXiv 2110.08727",
        run=graph,
        gains=(
            Gain("taught", "hard labels", 5.0, wins=1.0),
            Gain("taught, same inputs", "hard labels", None),
        ),
    ),
)
