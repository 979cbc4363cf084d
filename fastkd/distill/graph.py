"""Nearest neighbours as a graph, for a teacher that sees more than one sample at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.arguments.messages import shown

CHUNK = 1 << 24  # distances held at a time


def neighbour_graph(features: Tensor, k: int) -> Tensor:
    """The graph of `k` nearest neighbours, as a graph convolution multiplies by it.

        D^-1/2 (A + I) D^-1/2,  A_ij = 1 where i is among the k nearest of j, or j of i

    D is the diagonal of the row sums of A + I. A student that is to do without the graph learns
    from what the teacher says of the nodes: a loader of (features, labels, teacher's logits).

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
