"""Losses that read no logits, in DistributedDataParallel: they train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill.losses import relations

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def _own(student: Any, _: Any, __: Any) -> Tensor:
    return F.mse_loss(student.features["0"][:, :3], student.logits.detach())


LOSSES: dict[str, Any] = {
    "feature": lambda: distill.feature("0", "0", F.mse_loss),
    "relation": lambda: distill.feature("0", "0", relations.sp),
    "detached": lambda: [
        distill.feature("0", "0", F.mse_loss),
        distill.Term("own", _own, student_layers=("0",)),
    ],
    "two outputs": lambda: distill.Term(
        "one of two", lambda s, t, _: F.mse_loss(s.raw["logits"], t.logits)
    ),
}
KINDS = ("ddp", "unused", "compiled")


class TwoHeads(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.second = body, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x), "second": self.second(x)}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def weights(loss: str, kind: str) -> list[Any]:
    """After three steps of the student: in one process (""), or wrapped with this rank's rows."""
    student, x = TwoHeads(net(0)) if loss == "two outputs" else net(0), X
    model: Any = student
    if kind:
        x = X.chunk(dist.get_world_size())[dist.get_rank()]
        unused = kind == "unused"
        model = nn.parallel.DistributedDataParallel(student, find_unused_parameters=unused)
        if kind == "compiled":
            model = torch.compile(model, backend="eager")
    sgd = torch.optim.SGD(student.parameters(), 0.1)
    options: dict[str, Any] = {"teacher": net(1), "optimizer": sgd, "progress": False}
    distill.train(model, [x] * 3, LOSSES[loss](), **options)
    return [p.tolist() for p in student.parameters()]


def of_all() -> dict[tuple[str, str], list[Any]]:
    """Relations between samples are of a rank's own: one rank has those, several the others."""
    one = dist.get_world_size() == 1
    kept = [loss for loss in LOSSES if one == (loss == "relation")]
    return {(kind, loss): weights(loss, kind) for kind in KINDS for loss in kept}


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_without_logits_trains_in_ddp(world: int) -> None:
    want = {loss: weights(loss, "") for loss in LOSSES}
    for found in ranks.run(world, of_all):
        assert len(found) == len(KINDS) * (1 if world == 1 else len(LOSSES) - 1)
        for (kind, loss), got in found.items():
            for a, b in zip(got, want[loss], strict=True):
                torch.testing.assert_close(
                    torch.tensor(a),
                    torch.tensor(b),
                    msg=lambda text, at=(kind, loss): f"{at}: {text}",
                )
