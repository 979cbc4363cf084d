"""ULD as a term of a loss, between two tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INPUTS
from sorted_losses import S, classes, plain, uld
from torch import Tensor

from fastkd import distill
from fastkd.distill.batch import Batch, Outputs
from fastkd.distill.objective import Objective


def test_term() -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    s.requires_grad_()
    term = distill.response(uld, 1.5, rows="labelled")
    total, (value,) = Objective([term])(Outputs(s), Outputs(t[:, :8]), Batch(s, y, samples=7))
    assert term.name == "uld_loss" and value == uld(s, t[:, :8], y) and total == 1.5 * value


class Tokens(torch.nn.Module):
    """[N, L] -> [N, L, vocab]."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.net = torch.nn.Embedding(20, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


def test_term_of_two_tokenizers_over_micro_batches() -> None:
    """The sum over pairs by the labels of the step, however it is cut."""
    teacher, first = Tokens(9), Tokens(6)
    mine, its = torch.randint(20, (4, 5)), torch.randint(20, (4, 3))
    y = torch.randint(6, (4, 5))
    y[0, 1:], y[2] = -100, -100

    def loader(size: int) -> list[dict[str, Any]]:
        found = []
        for at in range(0, 4, size):
            part = slice(at, at + size)
            spans = [[[(i, i + 1) for i in range(5)]] * size, [[(0, 2), (2, 3), (3, 5)]] * size]
            found.append(
                {
                    "inputs": mine[part],
                    "labels": y[part],
                    "teacher_inputs": its[part],
                    "alignment": distill.align(*spans),
                }
            )
        return found

    ends = []
    for size in (4, 1):
        student = Tokens(6)
        student.load_state_dict(first.state_dict())
        distill.train(
            student,
            loader(size),
            [distill.hard(), distill.uld()],
            teacher=teacher,
            accumulate=4 // size,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            epochs=1,
            progress=False,
        )
        ends.append(student.net.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    # by hand: the pairs are (1, 0), (2, 1), (4, 2) of each sequence
    net = Tokens(6)
    net.load_state_dict(first.state_dict())
    rows, keep = net(mine)[:, [1, 2, 4]], y[:, [1, 2, 4]] != -100
    far = plain(rows[keep], teacher(its)[keep].detach()).sum() / (y != -100).sum()
    (F.cross_entropy(net(mine).flatten(0, 1), y.flatten()) + 1.5 * far).backward()
    true = first.net.weight - 0.1 * net.net.weight.grad
    torch.testing.assert_close(ends[0], true.detach(), rtol=1e-5, atol=1e-6)


def test_term_without_a_teacher() -> None:
    with pytest.raises(ValueError, match="term 'uld': got no teacher"):
        distill.uld().function(Outputs(S), Outputs(None), Batch(S))
