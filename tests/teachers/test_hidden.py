"""Hidden states and the head on disk: the teacher's own logits, at any temperature."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_pairs import columns, left, right
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import distill
from fastkd.__main__ import main
from fastkd.teachers import store

V, H, N, L = 23, 8, 6, 5


class Net(nn.Module):
    """A body and a head; its logits are never built."""

    def __init__(self, seed: int = 0, bias: bool = True, dtype: Any = None, **head: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Embedding(V, H), nn.Linear(H, V, bias=bias)
        self.numbers = head
        self.to(dtype or torch.float32)

    def forward(self, ids: Tensor) -> fastkd.LinearLogits:
        hidden = self.body(ids)
        return fastkd.LinearLogits(hidden, self.head.weight, self.head.bias, **self.numbers)


def dense(logits: Any) -> Tensor:
    """The definition, in float64."""
    bias = None if logits.bias is None else logits.bias.double()
    z = logits.head.scale * F.linear(logits.hidden.double(), logits.weight.double(), bias)
    cap = logits.head.softcap
    return z if cap is None else cap * torch.tanh(z / cap)


IDS = torch.randint(1, V, (N, L), generator=torch.Generator().manual_seed(1))
LABELS = IDS.roll(-1, 1).masked_fill(torch.arange(L) == L - 1, -100)
DATA = TensorDataset(IDS, LABELS)


def captured(folder: Path, teacher: Any = None, **options: Any) -> store.Reader:
    own = {"vocab_size": V, "progress": False, "hidden": True, "labels": "shifted", **options}
    store.capture(teacher or Net(), DataLoader(DATA, 4), folder, **own)
    return store.Reader(folder)


def test_what_a_user_writes(tmp_path: Path) -> None:
    teacher, student = Net(), nn.Sequential(nn.Embedding(V, 4), nn.Linear(4, V))
    loader = DataLoader(DATA, batch_size=4)
    store.capture(teacher, loader, tmp_path, vocab_size=V, hidden=True, labels="shifted")
    reader = store.Reader(tmp_path, vocab_size=V)
    pairs = store.Paired(DATA, reader)
    batches = DataLoader(pairs, batch_size=3, collate_fn=store.collate)
    term = distill.soft(temperature=3.0, divergence="js", rows="labelled")
    live = copy.deepcopy(student)
    distill.train(student, batches, term, progress=False)
    distill.train(live, DataLoader(DATA, 3), term, teacher=teacher, progress=False)
    for ours, expected in zip(student.parameters(), live.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "softcap": 3.0}])
def test_the_teachers_own_logits(tmp_path: Path, head: dict[str, Any], dtype: Any) -> None:
    teacher = Net(bias=not head, dtype=dtype, **head)
    reader = captured(tmp_path, teacher)
    assert reader.spec.encoding == str(dtype)[6:] and reader.spec.error == "0 of a logit"
    said = reader.batch(range(N))
    with torch.no_grad():
        own = teacher(IDS[:, :-1])  # the last row has no label
    assert said.shape == own.shape and said.head == own.head
    pairs = zip(said.tensors, own.tensors, strict=True)
    assert all(torch.equal(x, y) if x is not None else y is None for x, y in pairs)
    student = torch.randn(N, L - 1, V)
    for T in (0.5, 4.0):
        for loss in (fastkd.kl_div, fastkd.reverse_kl_div, fastkd.tv_distance):
            stored = loss(student, said, temperature=T)
            assert torch.equal(stored, loss(student, own, temperature=T))
            expected = loss(student.double(), dense(own), temperature=T)
            close = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(stored.double(), expected, rtol=close, atol=close)


def adversarial(weight: Tensor) -> Tensor:
    """Rows on the middle between two codes, every element wrong in one column's direction."""
    norms = weight.double().abs().sum(-1)
    sign = weight[norms.argmax()].double().sign()
    whole = torch.randint(0, 126, (64, H), dtype=torch.float64)
    rows = (whole + 0.4999) * sign
    rows[:, 0] = 127 * sign[0]
    chance = torch.randn(64, H).double()
    spread = chance * torch.logspace(-6, 6, 64).double()[:, None]
    spread[:8, 3] *= 1e4  # one element above all others
    return torch.cat([rows, rows * 1e-3, chance, spread, torch.eye(H).double() * 1e-30])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("encoding", ["int8", "bfloat16", "float16"])
def test_the_stated_bound_of_a_logit(tmp_path: Path, encoding: str, dtype: str) -> None:
    net = Net(dtype=getattr(torch, dtype), scale=1.7).requires_grad_(False)
    rows = adversarial(net.head.weight).to(net.head.weight.dtype)
    if "float16" in (dtype, encoding):
        rows = rows.clamp(-6e4, 6e4)
    given = fastkd.LinearLogits(rows, net.head.weight, net.head.bias, scale=1.7)
    options: dict[str, Any] = {"method": "hidden", "encoding": encoding}
    with store.Writer(tmp_path, vocab_size=V, **options) as writer:
        writer.add_batch(given.with_hidden(rows[:-1]))
        writer.add(given.with_hidden(rows[-1]))
    reader = store.Reader(tmp_path)
    said = reader.batch(range(len(rows)))
    error = (dense(said) - dense(given)).abs().amax(-1)
    bound = store.logit_bound(reader.spec, rows)
    rounding = 1e-14 * dense(given).abs().amax(-1)  # of this test's own float64
    assert (error <= bound + rounding).all()
    if (encoding, dtype) == ("int8", "float32"):
        assert float((error / bound).max()) > 0.85  # it says no more than can happen
    if encoding == dtype:
        assert float(error.max()) == 0.0


def test_exact_resume_and_ranks(tmp_path: Path) -> None:
    whole = captured(tmp_path / "whole", shard_bytes=1, encoding="int8")
    part, options = tmp_path / "part", {"vocab_size": V, "progress": False, "hidden": True}
    options |= {"labels": "shifted", "shard_bytes": 1, "encoding": "int8"}

    class Dies(Net):
        def forward(self, ids: Tensor) -> fastkd.LinearLogits:
            if len(list(part.glob("teacher-*"))) == 1:
                raise KeyboardInterrupt
            return super().forward(ids)

    with pytest.raises(KeyboardInterrupt):
        store.capture(Dies(), DataLoader(DATA, 4), part, **options)
    store.capture(Net(), DataLoader(DATA, 4), part, **options)
    names = [sorted(x.name for x in of.glob("*-*")) for of in (whole.path, part)]
    assert names[0] == names[1] and sum(x.startswith("head-") for x in names[0]) == 1
    for rank in (1, 0):
        loader, of = DataLoader(DATA, 4), {"rank": rank, "world_size": 2}
        store.capture(Net(), loader, tmp_path / "ranks", **options, **of)
    assert len(list((tmp_path / "ranks").glob("head-*"))) == 1
    ranks = store.Reader(tmp_path / "ranks")
    assert all(torch.equal(x.hidden, y.hidden) for x, y in zip(ranks, whole, strict=True))


def test_another_head_or_other_states_are_refused(tmp_path: Path) -> None:
    captured(tmp_path)
    other = Net()
    other.head.weight.data[3, 4] += 0.25
    with pytest.raises(store.CacheError, match="changed since: got another sha256, expected"):
        captured(tmp_path, other)
    other = Net()
    other.body.weight.data += 1.0
    with pytest.raises(ValueError, match=r"teacher: got outputs .* nats off"):
        captured(tmp_path, other)
    with pytest.raises(store.CacheError, match="encoding: got 'int8', expected 'float32'"):
        captured(tmp_path, encoding="int8")
    with pytest.raises(store.CacheError, match="made for vocab_size=23, expected 24"):
        store.Reader(tmp_path, vocab_size=24)


def test_a_flipped_byte_of_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = captured(tmp_path)
    reader.verify()
    data = bytearray(reader.head.file.read_bytes())
    for at in (0, len(data) // 2, len(data) - 1):
        data[at] ^= 4
        reader.head.file.write_bytes(data)
        with pytest.raises(store.CacheError, match=r"head-.*altered"):
            reader.verify()
        assert main(["cache", "verify", str(tmp_path)]) == 1 and "altered" in capsys.readouterr()[1]
        fresh = pickle.loads(pickle.dumps(store.Reader(tmp_path)))  # none that has read it
        fresh.head._on.clear()
        with pytest.raises(store.CacheError, match=r"head-.*altered"):
            fastkd.kl_div(torch.zeros(L - 1, V), fresh[0])
        data[at] ^= 4
    reader.head.file.unlink()
    with pytest.raises(store.CacheError, match=r"head-.*cannot be read"):
        reader.verify()


def test_bad_input_by_name(tmp_path: Path) -> None:
    class Dense(Net):
        def forward(self, ids: Tensor) -> Any:
            return dense(super().forward(ids)).float()

    class Broken(Net):
        def forward(self, ids: Tensor) -> fastkd.LinearLogits:
            said = super().forward(ids)
            said.hidden[1, 2, 3] = torch.nan
            return said

    for teacher, options, match in (
        (Dense(), {}, r"teacher: got Tensor, expected a causal language model .* LinearLogits"),
        (Broken(), {}, r"hidden: got nan in row 2 of sample 1, expected a finite number"),
        (Net(), {"k": 4}, r"k: got 4 with method='hidden'"),
        (Net(), {"method": "top"}, r"method: got 'top' with hidden=True"),
        (Net(), {"temperature": 2.0}, r"k: got None with temperature=2"),
        (Net(), {"encoding": "uint8"}, r"encoding: got 'uint8'"),
        (Net(), {"vocab_size": V + 1}, r"vocab_size: got 24, expected at most the head's 23"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            captured(tmp_path, teacher, **options)
    assert not list(tmp_path.glob("teacher-*"))
    few = captured(tmp_path, vocab_size=V - 3)  # a padded vocabulary's first columns
    assert few.batch([0, 1]).shape == (2, L - 1, V - 3)


def test_what_travels_are_hidden_states_alone(tmp_path: Path) -> None:
    reader = captured(tmp_path, encoding="int8")
    batch = next(iter(DataLoader(reader, 3, collate_fn=store.collate)))
    again = pickle.loads(pickle.dumps(batch))
    assert again.stored is reader.head  # read once a process, whoever asks
    assert len(pickle.dumps(batch)) < batch.hidden.numel() * 4 + 4000
    assert torch.equal(again.weight, Net().head.weight) and not again.requires_grad
    moved = distill.batch.to(batch, torch.device("cpu"))
    assert type(moved) is type(batch) and torch.equal(moved.hidden, batch.hidden)
    with pytest.raises(IndexError, match="expected an index of"):
        batch[..., 0]
    labels = torch.zeros(3, L, dtype=torch.long)
    with pytest.raises(ValueError, match=r"label 0 in sample 0 of the batch, row 4, where"):
        store.collate([(x, y, z) for x, y, z in zip(IDS, labels, batch, strict=False)])


@pytest.mark.parametrize("reading", [left, right, None])
def test_columns_padded_in_front_or_behind(tmp_path: Path, reading: Any) -> None:
    """Each row of the teacher stands beside the token that it was asked for."""
    data: Any = columns()

    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Embedding(V + 40, H)

        def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Any:
            return super().forward(input_ids)

    options: dict[str, Any] = {"labels": "input_ids", "progress": False, "hidden": True}
    loader, net = DataLoader(data, 3, collate_fn=left), Named()
    store.capture(net, loader, tmp_path, vocab_size=V, **options)
    pairs = store.Paired(data, store.Reader(tmp_path))
    batch = store.collate([pairs[i] for i in range(4)], collator=reading)
    kept = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    expected = net.body(batch["input_ids"])
    assert torch.equal(batch["teacher"].hidden[kept], expected[kept]) and bool(kept.any())


def test_the_command_line_and_other_readers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = captured(tmp_path / "a", encoding="int8")
    assert main(["cache", "info", str(reader.path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    head = facts["teacher"]["head"]
    norm = float(Net().head.weight.detach().double().abs().sum(-1).max())
    assert (head["hidden_size"], head["dtype"]) == (H, "float32")
    assert head["row_norm"] == pytest.approx(norm)
    most = float(facts["error"].split(" * max |hidden|")[0])
    assert most == pytest.approx(norm / 254, rel=1e-4)
    assert main(["cache", "info", str(reader.path)]) == 0
    text = capsys.readouterr().out
    assert "hidden_size 8" in text and "of a logit" in text
    assert main(["cache", "verify", str(reader.path)]) == 0
    (tmp_path / "b").mkdir()
    reader.to_parquet(tmp_path / "b")
    assert (tmp_path / "b" / reader.head.file.name).read_bytes() == reader.head.file.read_bytes()
    datasets = pytest.importorskip("datasets")
    table = datasets.load_from_disk(str(reader.path)).with_format("arrow")[[2, 0]]
    assert torch.equal(reader.decode(table)[1].hidden, reader[0].hidden)
