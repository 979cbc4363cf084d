"""From a dataset of columns to a cache and back, for `distill.train` and for a Trainer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_habits_cache_batches import Model, V
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastkd
from fastkd import distill
from fastkd.teachers import store

LENGTHS = (5, 9, 7, 4)


def columns() -> list[dict[str, list[int]]]:
    """As a tokenizer's map leaves them: lists, ragged, with a prompt of two tokens."""
    chance = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(1, V, (length,), generator=chance).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator that pads in front, as for generation."""
    most = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100}
    made = {
        name: torch.tensor([[fill] * (most - len(row[name])) + list(row[name]) for row in rows])
        for name, fill in fills.items()
    }
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(most) >= most - sizes[:, None]).long()
    return {**made, "attention_mask": mask}


def right(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    back = [{name: row[name][::-1] for name in row} for row in rows]
    return {name: x.flip(1) for name, x in left(back).items()}


@pytest.mark.parametrize("reading", [None, left, right])
@pytest.mark.parametrize("writing", [left, right])
@pytest.mark.parametrize("k", [V, None])
def test_a_dataset_of_columns(tmp_path: Path, writing: Any, reading: Any, k: int | None) -> None:
    data: Any = columns()
    loader = DataLoader(data, 3, collate_fn=writing)
    store.capture(Model(), loader, tmp_path, vocab_size=V, k=k, labels="input_ids", progress=False)
    pairs = store.Paired(data, store.Reader(tmp_path))
    batch = store.collate([pairs[i] for i in range(4)], collator=reading)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "teacher"}
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert int((labels != -100).sum()) == sum(LENGTHS) - 2 * len(LENGTHS)
    student, live = Model(1), Model()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    said = student(**inputs)["logits"]
    wanted = fastkd.kl_div(said, live(**inputs)["logits"], labels=labels)
    got = fastkd.kl_div(said, batch["teacher"], labels=labels)
    assert got.item() == pytest.approx(wanted.item(), rel=3e-3)


def test_the_trainer_takes_columns(tmp_path: Path) -> None:
    data: Any = columns()
    loader = DataLoader(data, 3, collate_fn=right)
    store.capture(Model(), loader, tmp_path, vocab_size=V, labels="input_ids", progress=False)
    pairs = store.Paired(data, store.Reader(tmp_path))
    shifted = functools.partial(store.collate, labels="shifted")
    batches = DataLoader(pairs, batch_size=4, collate_fn=shifted)
    weights = []
    for teacher in (None, Model()):
        given: Any = list(batches)
        if teacher is not None:
            given = [{k: v for k, v in batch.items() if k != "teacher"} for batch in given]
        student = Model(1)
        distill.train(
            student,
            given,
            distill.soft(temperature=1.0, rows="labelled"),
            teacher=teacher,
            epochs=1,
            optimizer=torch.optim.SGD(student.parameters(), 0.1),
            progress=False,
        )
        weights.append(student.head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-4)
    assert not torch.allclose(weights[0], Model(1).head.weight, atol=1e-3)


def test_columns_that_are_no_numbers(tmp_path: Path) -> None:
    teacher = torch.zeros(3, V)
    rows: Any = [{"input_ids": [1, 2, 3], "text": "abc", "teacher": teacher}]
    with pytest.raises(TypeError, match=r"got str in column 'text'.*remove_columns"):
        store.collate(rows)
    with pytest.raises(ValueError, match=r"no 'teacher' in sample 0.*remove_unused_columns=False"):
        store.collate([{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match=r"teacher of 3 rows for sample 0.*which has 2 tokens"):
        store.collate([{"input_ids": [1, 2], "teacher": teacher}])
    with pytest.raises(ValueError, match="labels: got 'input_ids', expected 'shifted' or None"):
        store.collate(rows, labels="input_ids")


def test_a_classifiers_columns() -> None:
    rows = [{"x": torch.ones(3), "labels": i, "teacher": torch.ones(4)} for i in range(2)]
    batch = store.collate(rows)
    assert batch["labels"].tolist() == [0, 1] and batch["teacher"].shape == (2, 4)
    pairs = [({"x": torch.ones(3)}, i, torch.ones(4)) for i in range(2)]
    got = store.collate(pairs, labels="shifted")
    assert got["labels"].tolist() == [0, 1] and got["inputs"]["x"].shape == (2, 3)


@pytest.mark.parametrize("many", [False, True])
def test_a_label_where_the_cache_has_nothing(many: bool) -> None:
    said = fastkd.topk_from_logits(torch.randn(3, V), 4)
    gone = fastkd.TopK(
        said.logprobs.index_fill(0, torch.tensor([1]), -torch.inf),
        said.indices.index_fill(0, torch.tensor([1]), -1),
        tail_logprob=said.tail_logprob,
    )
    ids = torch.tensor([1, 2, 3])
    labels = torch.tensor([2, 3, -100])
    if many:
        with pytest.raises(ValueError, match="got label 3 in sample 1 of the batch, row 1, where"):
            store.collate([(ids, labels, said), (ids, labels, gone)])
        with pytest.raises(ValueError, match="got label 3 in sample 0 of the batch, row 1, where"):
            store.collate([(ids, labels, torch.zeros(1, V))])
    else:
        with pytest.raises(ValueError, match="got label 3 in sample 1 of the batch, where"):
            store.collate([(ids, 2, said[0]), (ids, 3, gone[1])])
