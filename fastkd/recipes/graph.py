"""A plain network that does without the graph its teacher reads, for digits with 40 labels.

The teacher is a graph convolution over the nearest neighbours among the 1 000 images of the pool.
The student sees one image at a time, also those that were no node of the graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill
from fastkd.arguments.messages import shown

from .data import POOL, digits
from .recipe import Figures, Gain, Recipe
from .training import fit, held_out, mlp, sample_batches, scaled

CHUNK = 1 << 24  # distances held at a time


def neighbour_graph(features: Tensor, k: int) -> Tensor:
    """The graph of `k` nearest neighbours, as a graph convolution multiplies by it.

        D^-1/2 (A + I) D^-1/2,  A_ij = 1 where i is among the k nearest of j, or j of i

    D is the diagonal of the row sums of A + I. A student that is to do without the graph learns
    from the teacher's outputs on the nodes: a loader of (features, labels, teacher's logits).

    Args:
        features: floating point [N, C]; nearest is least Euclidean distance.
        k: 1 to N - 1.

    Returns:
        Sparse COO [N, N], symmetric, of the features' dtype, for `torch.sparse.mm`.

    Raises:
        ValueError: another shape, k out of range.

    Papers: Kipf and Welling 2017, arXiv 1609.02907 (the normalisation); Zhang et al. 2022, GLNN,
    arXiv 2110.08727 (the student).
    """
    if features.dim() != 2 or not features.is_floating_point():
        got = f"{features.dtype} of shape {tuple(features.shape)}"
        raise ValueError(f"features: got {got}, expected floating point [N, C]")
    nodes = len(features)
    if not 1 <= k < nodes:
        raise ValueError(f"k: got {shown(k)}, expected 1 to {nodes - 1} (the other nodes)")
    x = features.detach()
    each = torch.arange(nodes, device=x.device)
    nearest = []
    for rows in each.split(max(1, CHUNK // nodes)):
        distance = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        distance[torch.arange(len(rows)), rows] = torch.inf  # not its own neighbour
        nearest.append(distance.topk(k, largest=False).indices)
    a, b = each.repeat_interleave(k), torch.cat(nearest).flatten()
    edges = torch.stack([torch.cat([a, b, each]), torch.cat([b, a, each])]).unique(dim=1)
    degree = torch.bincount(edges[0], minlength=nodes).to(x.dtype)
    values = (degree[edges[0]] * degree[edges[1]]).rsqrt()
    size = (nodes, nodes)
    return torch.sparse_coo_tensor(edges, values, size, is_coalesced=True, check_invariants=True)


# ---- the recipe

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
    teacher = GraphConvolution(neighbour_graph(data.images, NEIGHBOURS))
    fit(teacher, [(data.images, labels)] * scaled(TEACHER_STEPS, size), distill.hard())
    with torch.no_grad():
        teacher_logits = teacher.eval()(data.images)

    def student(rows: int, *loss: distill.Term) -> float:
        torch.manual_seed(1000 + seed)
        columns = (column[:rows] for column in (data.images, labels, teacher_logits))
        batches = sample_batches(seed, scaled(STEPS, size), BATCH, *columns)
        return held_out(fit(mlp(64, WIDTH, 10), batches, loss), data)

    distilled = distill.hard(0.1), distill.soft(0.9, temperature=1.0)
    others = teacher_logits.argmax(-1)[LABELLED:] == data.labels[LABELLED:]
    return {
        "teacher, unlabelled nodes": 100 * others.float().mean().item(),
        "hard labels": student(LABELLED, distill.hard()),
        "taught, same inputs": student(LABELLED, *distilled),
        "taught": student(POOL, *distilled),
    }


RECIPES = (
    Recipe(
        name="graph",
        about="a network without a graph, taught by a graph convolution over nearest neighbours",
        paper="Zhang et al. 2022, arXiv 2110.08727",
        run=graph,
        gains=(
            Gain("taught", "hard labels", 5.0, seeds_improved=1.0),
            Gain("taught, same inputs", "hard labels", None),
        ),
    ),
)
