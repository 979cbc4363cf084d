"""What capture asks of a teacher and stores, and what the trainer learns from that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import distill
from fastkd.teachers import store

V, K = 300, 8


class Head(nn.Module):
    """A language model of nothing but its head."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Embedding(50, 16), nn.Linear(16, V, bias=False)
        self.drop, self.linear = nn.Dropout(0.5), linear

    def forward(self, inputs: Tensor) -> Any:
        hidden = 4 * self.drop(self.body(inputs))
        return fastkd.LinearLogits(hidden, self.head.weight) if self.linear else self.head(hidden)


@pytest.mark.parametrize("linear", [False, True])
def test_capture_stores_what_the_teacher_says(tmp_path: Path, linear: bool) -> None:
    inputs = torch.randint(50, (7, 6), generator=torch.Generator().manual_seed(0))
    labels = inputs.clone()
    labels[0, 4:], labels[1, :2], labels[2] = -100, -100, -100
    teacher = Head(linear).train()
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=3)
    options: Any = {"vocab_size": V, "k": K, "labels": "shifted", "progress": False}
    done = store.capture(teacher, loader, tmp_path, temperature=2.0, **options)
    assert done == 7 and teacher.training and teacher.drop.training
    reader = store.Reader(tmp_path)
    assert [x.size(0) for x in reader] == [4, 6, 0, 6, 6, 6, 6]
    assert reader[1].indices[:2].eq(-1).all() and reader.spec.temperature == 2.0
    with torch.no_grad():
        logits = Head(False).eval()(inputs)
    wanted = fastkd.topk_from_logits(logits[3], K, temperature=2.0)
    assert torch.equal(reader[3].indices, wanted.indices.int())
    torch.testing.assert_close(reader[3].logprobs, wanted.logprobs, rtol=0.02, atol=0.05)


def test_capture_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    inputs = torch.randint(50, (20, 4), generator=torch.Generator().manual_seed(0))
    head = Head(False).eval()
    asked: list[int] = []

    def teacher(x: Tensor) -> Tensor:
        asked.append(len(x))
        if sum(asked) == 13:
            raise KeyboardInterrupt
        return head(x)

    options: Any = {"vocab_size": V, "k": K, "progress": False}
    loader = DataLoader(inputs, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        asked[:] = [-2]
        store.capture(teacher, loader, tmp_path / "a", **options)
    kept = len(store.Reader(tmp_path / "a"))
    assert kept == 12
    asked.clear()
    assert store.capture(teacher, DataLoader(inputs, batch_size=5), tmp_path / "a", **options) == 20
    assert sum(asked) == 4 + 8  # some of those stored are compared
    assert store.capture(head, loader, tmp_path / "b", **options) == 20
    a, b = store.Reader(tmp_path / "a"), store.Reader(tmp_path / "b")
    for i in range(20):
        assert torch.equal(a[i].indices, b[i].indices)
        torch.testing.assert_close(a[i].logprobs, b[i].logprobs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got 5 samples, expected the 20 stored"):
        store.capture(head, DataLoader(inputs[:5], batch_size=3), tmp_path / "a", **options)


def test_capture_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    inputs = torch.randint(50, (4, 4))
    head = Head(True)
    for loader, wrong, k, match in (
        (DataLoader(inputs, batch_size=2), head, None, "LinearLogits, expected a tensor"),
        (DataLoader(inputs, batch_size=2), lambda x: x.float().mean(), K, "teacher: got logits"),
        (["abc"], head, K, "batch \\(str\\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            store.capture(wrong, loader, tmp_path / "x", vocab_size=V, k=k, progress=False)


def test_the_trainer_learns_from_it(tmp_path: Path) -> None:
    inputs = torch.randint(50, (24, 5), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, inputs)
    head = Head(False).eval()
    options: Any = {"vocab_size": V, "k": 32, "labels": "shifted", "progress": False}
    store.capture(head, DataLoader(data, batch_size=8), tmp_path, **options)
    reader = store.Reader(tmp_path, vocab_size=V)
    paired = DataLoader(store.Paired(data, reader), batch_size=8, collate_fn=store.collate)
    indexed = [{"inputs": inputs[i : i + 8], "index": torch.arange(i, i + 8)} for i in (0, 8, 16)]
    with torch.no_grad():
        said = fastkd.topk_from_logits(head(inputs), 32)
    in_memory = [(inputs[i : i + 8], inputs[i : i + 8], said[i : i + 8]) for i in (0, 8, 16)]
    losses = {}
    for name, loader, teacher in (
        ("in memory", in_memory, None),
        ("paired", paired, None),
        ("paired and named", paired, reader),
        ("by number", indexed, reader),
    ):
        torch.manual_seed(1)
        student = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, V))
        terms = [distill.soft(1.0, temperature=1.0)]
        steps = distill.train(
            student, loader, terms, teacher=teacher, epochs=4, lr=1e-2, progress=False
        )
        losses[name] = [step.loss for step in steps]
    assert losses["paired"] == losses["paired and named"] == losses["by number"]
    assert losses["paired"][-1] < 0.9 * losses["paired"][0]
    assert losses["paired"] == pytest.approx(losses["in memory"], rel=5e-3)
