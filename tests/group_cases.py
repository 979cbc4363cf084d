"""Random losses over the ranks of a group, and the whole that each must equal."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from fastkd.divergence import divergences
from fastkd.parallel import layout

N, H = 7, 6
INF = float("inf")


def near(a: Any, b: Any, dtype: torch.dtype, what: str, nat: float = 1e-3) -> None:
    """Two ways to one number, in the largest error relative to the largest: both only round."""
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    assert torch.equal(a.isnan(), b.isnan()), what
    a, b = a.nan_to_num(), b.nan_to_num()
    scale = b.abs().max().clamp_min(nat) if b.numel() else 1.0
    worst = float(((a - b).abs() / scale).max()) if a.numel() else 0.0
    units = 8 if dtype in (torch.bfloat16, torch.float16) else 64
    assert worst <= units * torch.finfo(dtype).eps, f"{what}: {worst:.2e}"


def same_on_all(x: Tensor, what: str) -> None:
    x = x.detach().reshape(-1).contiguous()
    got = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(got, x)
    for other in got:
        assert torch.equal(other.view(torch.uint8), got[0].view(torch.uint8)), what


def bounds(chance: random.Random, vocab: int, world: int) -> list[int]:
    """Uneven columns of the ranks, some of them none."""
    cuts = sorted(chance.randint(0, vocab) for _ in range(world - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, vocab], strict=True)]


def logits(generator: torch.Generator, vocab: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(N, vocab, generator=generator)).to(dtype)


def cases() -> Iterator[tuple[random.Random, dict[str, Any], dict[str, Any]]]:
    """The same draws on every rank: shape and kind of the operands, options of the loss."""
    chance = random.Random(11)
    for name in divergences:
        for at in range(6):
            case = {
                "divergence": name,
                "vocab": chance.choice((1, 2, 5, 37, 300)),
                "dtype": chance.choice((torch.float32, torch.bfloat16, torch.float64)),
                "labels": chance.random() < 0.6,
                "replicated": chance.random() < 0.3,
                "padded": chance.random() < 0.4,
                "alpha": chance.choice((0.0, 0.3)),
                "teacher_grad": at % 3 == 0,
                "backend": "reference" if at == 5 else "cpu",
            }
            options = {
                "reduction": chance.choice(("mean", "sum", "batchmean", "none")),
                "temperature": chance.choice((1.0, 2.0)),
                "z_loss": (0.0, 0.05)[at % 2],
                "weight": chance.random() < 0.3,
            }
            yield chance, case, options


def compare(
    whole: dict[str, Any], part: dict[str, Any], columns: slice, dtype: Any, what: str
) -> None:
    near(part["loss"], whole["loss"], torch.float32 if dtype != torch.float64 else dtype, what, 1.0)
    for name, grad in whole["grads"].items():
        mine = part["grads"][name]
        near(mine, grad if mine.shape == grad.shape else grad[..., columns], dtype, what + name)


def over_ranks(mine: slice, replicated: bool) -> Callable[..., Tensor]:
    """`fastkd.distillation_loss` of whole operands by way of this rank's columns of them."""
    whole = fastkd.distillation_loss

    def loss(s: Tensor, t: Tensor, *labels: Any, **options: Any) -> Tensor:
        # a rank's gradient is 0 beyond its columns: the sum over ranks is the whole one
        s = layout.replicated(s, dist.group.WORLD)
        t = t if replicated else layout.replicated(t, dist.group.WORLD)[:, mine]
        return whole(s[:, mine], t, *labels, group=dist.group.WORLD, **options)

    return loss
