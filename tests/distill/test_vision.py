"""Convolutional students, as torchvision and timm make them: as a plain loop trains them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workflow_nets import ResNet

import fastkd
from fastkd import distill
from fastkd.teachers import store

CLASSES, STEPS = 5, 10


def channels_last(model: nn.Module) -> Any:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pictures(number: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(number, 3, 8, 8, generator=draw)
    return TensorDataset(images, torch.randint(CLASSES, (number,), generator=draw))


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_convolutional_student_is_trained_as_in_a_plain_loop(amp: torch.dtype | None) -> None:
    """channels_last, autocast, workers, accumulation 2; responses and features of inner blocks."""
    torch.manual_seed(0)
    student, teacher = channels_last(ResNet(4)), channels_last(ResNet(8)).eval()
    plain, projector = copy.deepcopy(student), nn.Conv2d(8, 16, 1)
    own = copy.deepcopy(projector)
    loader = DataLoader(pictures(4 * STEPS), 2, num_workers=1)

    layer = "layer2"
    terms = [
        distill.hard(0.3),
        distill.soft(0.7, temperature=4.0),
        distill.feature(layer, layer, F.mse_loss, 0.5, projector=projector, name="hint"),
    ]
    options: dict[str, Any] = {"accumulate": 2, "amp": amp, "progress": False}
    sgd = torch.optim.SGD(student.parameters(), lr=0.05)
    steps = distill.train(student, loader, terms, teacher=teacher, optimizer=sgd, **options)

    kept: dict[str, Tensor] = {}
    for name, model in (("student", plain), ("teacher", teacher)):
        model.layer2.register_forward_hook(lambda _, __, y, name=name: kept.update({name: y}))
    sgd = torch.optim.SGD([*plain.parameters(), *own.parameters()], lr=0.05)
    losses, T = [], 4.0
    for at, (images, labels) in enumerate(loader):
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
            with torch.no_grad():
                t = teacher(images)
            s = plain(images)
            soft = F.kl_div(
                (s.float() / T).log_softmax(-1), (t.float() / T).softmax(-1), reduction="batchmean"
            )
            hint = F.mse_loss(own(kept["student"]), kept["teacher"])
            loss = 0.3 * F.cross_entropy(s.float(), labels) + 0.7 * T * T * soft + 0.5 * hint
        (loss / 2).backward()
        losses.append(float(loss.detach()))
        if at % 2:
            sgd.step()
            sgd.zero_grad()
    want = torch.tensor(losses).view(-1, 2).mean(1)
    close: dict[str, float] = (
        {"rtol": 1e-4, "atol": 1e-5} if amp is None else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(torch.tensor([step.loss for step in steps]), want, **close)
    assert len(steps) == STEPS
    for mine, its in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, its, **close)
        assert mine.dim() < 4 or mine.is_contiguous(memory_format=torch.channels_last)


def test_a_stored_teacher_of_augmented_pictures(tmp_path: Any) -> None:
    """All of it at once: views, workers, channels_last, a stored teacher, bfloat16."""

    def flipped(x: Tensor) -> Tensor:
        return x.flip(-1) if torch.rand(()) < 0.5 else x

    torch.manual_seed(0)
    student, teacher = channels_last(ResNet(4)), ResNet(8)
    views = store.Views(pictures(8), flipped, seed=1, variants=2)
    store.capture(teacher, DataLoader(views, 4), tmp_path, vocab_size=CLASSES, progress=False)
    pairs = store.Paired(views, reader := store.Reader(tmp_path))
    loader = DataLoader(pairs, 4, True, num_workers=1, collate_fn=store.collate)
    term = distill.soft(temperature=2.0)
    seen: list[Tensor] = []

    def judged(batch: distill.Batch) -> distill.Batch:
        with torch.no_grad():
            said = teacher(batch.inputs)
        seen.append((said - torch.as_tensor(batch.teacher)).abs().max())
        return batch

    teacher.eval()
    steps = distill.train(
        student, loader, term, teacher=reader, transform=judged, amp=torch.bfloat16, progress=False
    )
    assert len(steps) == 4 == len(seen) and max(seen) < 1e-4
    assert fastkd.kl_div(student(pairs[0][0][None]), pairs[0][2][None]).isfinite()
