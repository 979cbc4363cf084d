"""What the tests of the trainer share: small nets, a run without a bar, a run to be resumed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill

V = 7
Loader = list[tuple[Tensor, Tensor]]


class Tokens(nn.Module):
    """A language model in small: ids [B, S] -> logits [B, S, V]."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def mlp(width: int = 8, *, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3))


def quiet(student: nn.Module, loader: Any, loss: Any, **options: Any) -> list[distill.Step]:
    return distill.train(student, loader, loss, progress=False, **options)


def step(
    student: nn.Module, given: Any, loss: Any, *, lr: float = 0.0, **options: Any
) -> distill.Step:
    """One step on one batch; without a learning rate the student stays as it is."""
    sgd = torch.optim.SGD(student.parameters(), lr)
    return quiet(student, [given], loss, **{"teacher": None, "optimizer": sgd, **options})[0]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mse(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(a, b)


def ragged() -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(0, V, (12, 9)), torch.randint(0, V, (12, 9))
    for row, length in enumerate((9, 1, 4, 0, 7, 2, 9, 3, 0, 0, 5, 6)):
        labels[row, length:] = -100
    return ids, labels


class Stop(Exception):
    pass


class Data(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples disturbed by every source of random numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(22, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        x = self.inputs[at]
        shift = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return x + 0.1 * shift, x[:3].argmax()


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def a_run(
    points: distill.Checkpoints | None,
    stop_at: int | None = None,
    epochs: int = 3,
    seed: int = 5,
    own_generator: bool = True,
) -> tuple[dict[str, Tensor], list[distill.Step]]:
    """Everything that has a state takes part: returns all weights and the steps.

    `seed` decides all but the frozen teacher: what is resumed must not lean on it.
    """
    seed_all(0)
    teacher = mlp(16)
    seed_all(seed)
    student, other, projector = mlp(dropout=0.3), mlp(4), nn.Linear(8, 16)
    order = torch.Generator().manual_seed(seed) if own_generator else None
    loader = torch.utils.data.DataLoader(Data(), batch_size=4, shuffle=True, generator=order)
    soft = distill.soft(lambda step: 1 / (1 + step))
    peer = distill.PeerTeacher(other, [distill.hard(), distill.soft()])
    average = distill.EMATeacher(student, 0.9)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    feature = distill.feature("1", "0.1", mse, projector=projector)

    def on_step(epoch: int, step: int, loss: Tensor) -> None:
        if step == stop_at:
            raise Stop

    steps = quiet(
        student,
        loader,
        [distill.hard(), soft, feature],
        teacher=[teacher, peer],
        optimizer=optimizer,
        epochs=epochs,
        accumulate=2,
        clip_norm=1.0,
        schedule=lambda step: 1 / (1 + step),
        ema=average,
        transform=distill.input_noise(0.1),
        weight_noise=0.05,
        validate=lambda m: -sum(p.abs().sum().item() for p in m.parameters()),
        checkpoint=points,
        on_step=on_step,
    )
    parts = {"student": student, "projector": projector, "other": other, "ema": average.model}
    state = {f"{k}.{n}": v for k, m in parts.items() for n, v in weights(m).items()}
    return state, steps
