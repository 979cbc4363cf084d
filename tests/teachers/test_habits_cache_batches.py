"""What batches look like: labels of two conventions, dicts, masks, ids of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.teachers import store

V = 20


class Model(nn.Module):
    """A causal language model that takes a mask: a token's logits are of all tokens so far."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None
    ) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.body(input_ids) * mask[..., None]
        if position_ids is not None:
            x = x + position_ids[..., None]
        return {"logits": self.head(x.cumsum(1))}


def captured(loader: Any, folder: Path, teacher: Any = None, **options: Any) -> store.Reader:
    options = {"vocab_size": V, "k": V, "progress": False, **options}
    store.capture(teacher or Model(), loader, folder, **options)
    return store.Reader(folder)


def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    return ids, labels


# ---- labels


def test_labels_of_transformers_keep_the_first_answer_token(tmp_path: Path) -> None:
    ids, labels = prompts()
    loader = DataLoader(TensorDataset(ids, labels), 4)
    with pytest.raises(ValueError, match=r"labels: got input_ids themselves.*labels='input_ids'"):
        captured(loader, tmp_path / "a")
    reader = captured(loader, tmp_path / "b", labels="input_ids")
    assert [x.size(0) for x in reader] == [11] * 8
    assert reader[0].indices[:5].eq(-1).all() and reader[0].indices[5:].ge(0).all()
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    student = Model(1)(ids)["logits"]
    live = fastkd.kl_div(student, Model()(ids)["logits"], labels=shifted)
    teacher = store.collate([(ids[i], shifted[i], reader[i]) for i in range(8)])[2]
    assert fastkd.kl_div(student, teacher, labels=shifted).item() == pytest.approx(
        live.item(), rel=2e-3
    )


@pytest.mark.parametrize("form", ["tuple", "dict", "inputs"])
def test_the_same_labels_in_every_form(tmp_path: Path, form: str) -> None:
    ids, labels = prompts()
    given: Any = {
        "tuple": (ids, labels),
        "dict": {"input_ids": ids, "labels": labels},
        "inputs": {"inputs": {"input_ids": ids}, "labels": labels},
    }[form]
    with pytest.raises(ValueError, match="labels: got input_ids themselves"):
        captured([given], tmp_path / "a")
    assert captured([given], tmp_path / "b", labels="input_ids").tokens == 8 * 11
    assert captured([given], tmp_path / "c", labels="shifted").tokens == 8 * 12
    with pytest.raises(ValueError, match="labels: got 'unshifted', expected 'shifted', 'input_ids"):
        captured([given], tmp_path / "d", labels="unshifted")


# ---- dicts


def test_dicts_reach_the_teacher_by_name(tmp_path: Path) -> None:
    ids, labels = prompts()
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    mask, places = torch.ones_like(ids), torch.arange(12).expand(8, 12)
    mask[:, 9:] = 0
    shifted[:, 8:] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    with torch.no_grad():
        wanted = Model()(**inputs)["logits"]
    for name, given in {
        "flat": {**inputs, "labels": shifted},
        "inputs": {"inputs": inputs, "labels": shifted},
        "tuple": (inputs, shifted),
        "plain": inputs,
    }.items():
        reader = captured([given], tmp_path / name, k=None)
        start, rows = (0, 9) if name == "plain" else (5, 8)
        for i in range(8):
            assert reader[i].size(0) == rows
            torch.testing.assert_close(reader[i][start:], wanted[i, start:rows])


def test_padding_in_front_is_left_out(tmp_path: Path) -> None:
    ids, labels = prompts()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    labels[1, :3] = -100
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    reader = captured([given], tmp_path, labels="input_ids", k=None)
    with torch.no_grad():
        wanted = Model()(ids, mask)["logits"][1]
    assert reader[0].size(0) == 11 and reader[1].size(0) == 8
    torch.testing.assert_close(reader[1][2:], wanted[5:11])


def test_a_dict_goes_on_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    ids, labels = prompts()
    places = torch.arange(12)[None]  # of all samples
    given = {"input_ids": ids, "position_ids": places, "labels": labels}
    part = {"input_ids": ids[:3], "position_ids": places, "labels": labels[:3]}
    captured([part], tmp_path, labels="input_ids", k=None)
    reader = captured([given], tmp_path, labels="input_ids", k=None)
    with torch.no_grad():
        torch.testing.assert_close(reader[5][5:], Model()(ids, None, places)["logits"][5, 5:11])
    assert len(reader) == 8


@pytest.mark.parametrize("given", [{"labels": torch.zeros(2)}, (1, 2), ["a"], {}, None, (), []])
def test_what_is_no_batch(tmp_path: Path, given: Any) -> None:
    with pytest.raises(TypeError, match="loader: got a batch"):
        captured([given], tmp_path)


# ---- another teacher


@pytest.mark.parametrize("options", [{}, {"k": 4}, {"k": None}, {"k": 16, "encoding": "plain"}])
@pytest.mark.parametrize("form", ["again", "on", "shared"])
def test_another_teacher_is_refused(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    ids, _ = prompts()
    if form == "shared":
        options = {**options, "rank": 0, "world_size": 1, "shard_bytes": 1}
    before = ids if form == "again" else ids[:5]
    whole: Any = DataLoader(ids, 2)
    if form == "shared":  # a rank that had a part only
        captured(whole, tmp_path, **{**options, "samples": range(4), "world_size": None})
    else:
        captured(DataLoader(before, 2), tmp_path, **options)
    count = len(store.Reader(tmp_path))
    with pytest.raises(ValueError, match=r"teacher: got outputs .* nats off .*model="):
        captured(whole, tmp_path, Model(1), **options)
    assert len(store.Reader(tmp_path)) == count
    with pytest.raises(ValueError, match="teacher: got outputs"):  # or other data
        captured(DataLoader(ids.flip(1), 2), tmp_path, **options)
    assert len(captured(whole, tmp_path, **options)) == 8


def test_draws_of_another_teacher_are_refused(tmp_path: Path) -> None:
    class Sharp(Model):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return 4 * super().forward(input_ids)["logits"]

    ids, _ = prompts()
    options: dict[str, Any] = {"k": 8, "method": "sample"}
    captured(DataLoader(ids[:5], 2), tmp_path, Sharp(), **options)
    with pytest.raises(ValueError, match="teacher: got outputs"):
        captured(DataLoader(ids, 2), tmp_path, Sharp(1), **options)
    assert len(captured(DataLoader(ids, 2), tmp_path, Sharp(), **options)) == 8


# ---- ids of another tokenizer


@pytest.mark.parametrize("wrong", [V, -1])
@pytest.mark.parametrize("named", [False, True])
def test_ids_beyond_the_vocabulary(tmp_path: Path, wrong: int, named: bool) -> None:
    ids, _ = prompts()
    ids[3, 3] = wrong
    given = {"input_ids": ids} if named else ids
    with pytest.raises(IndexError, match=r"inputs: got ids from .*, expected 0 to 19"):
        captured([given], tmp_path)
