"""The graph of nearest neighbours, by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkd.recipes import graph as recipe
from fastkd.recipes.graph import neighbour_graph


def adjacency(features: Tensor, k: int) -> Tensor:
    """By the definition, densely."""
    distance = (features.unsqueeze(1) - features).square().sum(-1).fill_diagonal_(torch.inf)
    near = torch.zeros(distance.shape).scatter_(1, distance.argsort(1)[:, :k], 1.0)
    linked = torch.maximum(near, near.T) + torch.eye(len(features))
    scale = linked.sum(1).rsqrt().diag()
    return scale @ linked @ scale


@pytest.mark.parametrize("k", [1, 4, 19])
@pytest.mark.parametrize("chunk", [1, 70, 1 << 20])
def test_the_graph_is_that_of_the_definition(
    k: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "CHUNK", chunk)
    features = torch.randn(20, 5).requires_grad_()
    graph = neighbour_graph(features, k)
    expected = adjacency(features.detach(), k)
    assert graph.is_sparse and not graph.requires_grad
    torch.testing.assert_close(graph.to_dense(), expected)
    x = torch.randn(20, 3, requires_grad=True)
    torch.sparse.mm(graph, x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * expected.T @ expected @ x.detach())


def test_nodes_that_are_alike_are_neighbours_and_not_their_own() -> None:
    features = torch.tensor([[0.0], [0.0], [1000.0], [1000.5]], dtype=torch.float64)
    graph = neighbour_graph(features, 1)
    pair = torch.full((2, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(graph.to_dense(), torch.block_diag(pair, pair))


@pytest.mark.parametrize(
    ("features", "k", "match"),
    [
        (torch.randn(5, 2), 0, "k: got 0, expected 1 to 4"),
        (torch.randn(5, 2), 5, "k: got 5, expected 1 to 4"),
        (torch.randn(5), 1, r"features: got torch.float32 of shape \(5,\)"),
        (torch.ones(5, 2, dtype=torch.long), 1, "features: got torch.int64"),
    ],
)
def test_graphs_that_cannot_be(features: Tensor, k: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        neighbour_graph(features, k)
