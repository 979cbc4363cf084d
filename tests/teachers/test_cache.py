"""A teacher on disk: what is written is what is read, by us and by others, within the bound."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import distill
from fastkd.__main__ import main
from fastkd.teachers import store
from fastkd.teachers.store.codec import decode, encode, pack, unpack

V, K = 300, 8


def rows(*shape: int, seed: int = 0, vocab: int = V) -> Tensor:
    return 3 * torch.randn(*shape, vocab, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, outputs: list[Any], **options: Any) -> store.Reader:
    kind = {"k": K} if isinstance(outputs[0], fastkd.TopK) else {}
    with store.Writer(folder, vocab_size=V, **{**kind, **options}) as writer:
        for output in outputs:
            writer.add(output)
    return store.Reader(folder)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    pairs = zip(a.tensors, b.tensors, strict=True)
    return (a.temperature, a.tail) == (b.temperature, b.tail) and all(
        (x is None and y is None) or torch.equal(x, y) for x, y in pairs
    )


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[list[fastkd.TopK], store.Reader]]:
    outputs = [fastkd.topk_from_logits(rows(n, seed=n), K) for n in (3, 1, 5, 2, 4)]
    yield outputs, written(tmp_path, outputs, shard_bytes=200)


def test_a_sample_comes_back_within_the_bound_in_any_order(
    stored: tuple[list[fastkd.TopK], store.Reader],
) -> None:
    outputs, reader = stored
    assert len(reader) == 5 and reader.tokens == 15 and reader.complete
    assert len(list(reader.path.glob("teacher-*.arrow"))) > 1
    for number in (4, 0, 2, 2, 1, 3):
        got, given_ = reader[number], outputs[number]
        assert torch.equal(got.indices, given_.indices.int())
        error = (got.logprobs.double() - given_.logprobs.double()).abs()
        assert (error <= store.logprob_bound("uint8", K, given_.logprobs.double())).all()
        torch.testing.assert_close(got.logprobs.exp().sum(-1), given_.logprobs.exp().sum(-1))
        assert got.tail_logprob is not None and given_.tail_logprob is not None
        torch.testing.assert_close(got.tail_logprob, given_.tail_logprob, rtol=2**-11, atol=1e-7)
    many = reader.__getitems__([3, 0, 3])
    assert all(same(x, reader[i]) for x, i in zip(many, (3, 0, 3), strict=True))
    assert [x.size(0) for x in reader] == [3, 1, 5, 2, 4]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_stated_error_bound_holds(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 40))
    scale = data.draw(st.sampled_from([0.01, 1.0, 10.0, 60.0]))
    seed = data.draw(st.integers(0, 10**6))
    x = scale * torch.randn(
        16, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    given_ = x.log_softmax(-1) + torch.linspace(-5, 0, 16, dtype=torch.float64).unsqueeze(-1)
    stored = encode(given_, "uint8")
    got = decode(stored["logprobs"], stored["level"], "uint8").double()
    within = given_.amax(-1, keepdim=True) - given_ <= 128.0
    error = (got - given_).abs()
    assert (error <= store.logprob_bound("uint8", k, given_))[within].all()
    assert (got <= 0).all()
    mass = torch.finfo(torch.float32).eps * (4 + given_.abs().amax(-1))
    assert ((got.exp().sum(-1) / given_.exp().sum(-1) - 1).abs() <= mass).all()


@given(vocab=st.integers(1, 2**31 - 1), k=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_columns_are_packed_exactly(vocab: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(-1, vocab, (5, k), generator=generator)
    packed = pack(columns, vocab)
    assert packed.shape == (5, -(-k * vocab.bit_length() // 8))
    assert torch.equal(unpack(packed, k, vocab).long(), columns)


def test_padding_and_impossible_columns_come_back(tmp_path: Path) -> None:
    inf = torch.inf
    for encoding in ("uint8", "plain"):
        logprobs = torch.tensor([[-0.7, -inf, -0.7], [-inf, -inf, -inf], [0.0, -inf, -inf]])
        indices = torch.tensor([[4, 299, -1], [-1, -1, -1], [0, -1, -1]])
        logprobs[0, 2] = -inf
        tail = torch.tensor([-3.0, 0.0, -inf])
        given_ = fastkd.TopK(logprobs, indices, tail_logprob=tail)
        reader = written(tmp_path / encoding, [given_], k=3, encoding=encoding)
        got = reader[0]
        # a column at -inf is absent, as one of index -1 is
        assert torch.equal(got.indices, indices.int().masked_fill(logprobs == -inf, -1))
        assert torch.equal(got.logprobs.isinf(), logprobs.isinf())
        assert got.tail_logprob is not None and torch.equal(got.tail_logprob, tail)
        assert got.logprobs[2, 0] == 0.0


def test_samples_of_a_teacher_are_exact(tmp_path: Path) -> None:
    drawn = fastkd.topk_from_logits(
        rows(6), 32, method="sample", generator=torch.Generator().manual_seed(1)
    )
    k = drawn.size(-1)
    reader = written(tmp_path, [drawn], k=k, method="sample", tail=drawn.tail)
    assert reader.spec.encoding == "counts"
    torch.testing.assert_close(reader[0].logprobs.exp(), drawn.logprobs.exp(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="expected whole draws"):
        with store.Writer(tmp_path / "b", vocab_size=V, k=k, method="sample", tail=drawn.tail) as w:
            half = drawn.logprobs - 0.1
            w.add(fastkd.TopK(half, drawn.indices, tail=drawn.tail))


@pytest.mark.parametrize(
    ("encoding", "bound"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
@pytest.mark.parametrize("many", [True, False])
def test_all_logits_of_a_classifier(
    tmp_path: Path, encoding: str, bound: float, many: bool
) -> None:
    logits = rows(6)
    logits[0, 3] = -torch.inf
    outputs = list(logits.view(3, 2, V)) if many else list(logits)
    reader = written(tmp_path, outputs, encoding=encoding)
    for i, output in enumerate(outputs):
        torch.testing.assert_close(reader[i].float(), output, rtol=bound, atol=2**-25)
        assert reader[i].shape == output.shape


def test_a_token_takes_106_bytes(tmp_path: Path) -> None:
    teacher = fastkd.topk_from_logits(rows(64, vocab=128256), 32)
    with store.Writer(tmp_path, vocab_size=128256, k=32) as writer:
        for _ in range(64):
            writer.add(teacher)
    files = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 106 <= files / (64 * 64) < 107.5
    assert store.Reader(tmp_path).facts()["bytes_per_token"] < 107.5


# ---- other readers


def test_datasets_opens_it_as_it_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    outputs = [fastkd.topk_from_logits(rows(n, seed=n), K) for n in (3, 1, 5, 2, 4)]
    reader = written(tmp_path, outputs, shard_bytes=200)
    data = datasets.load_from_disk(str(tmp_path))
    assert data["sample"][:] == [0, 1, 2, 3, 4] and data["rows"][:] == [3, 1, 5, 2, 4]
    stream = data.shard(2, 1, contiguous=True).to_iterable_dataset().shuffle(seed=0, buffer_size=2)
    tables = list(stream.with_format("arrow").iter(1))
    assert {int(table["sample"][0]) for table in tables} == {3, 4}
    for table in tables:
        (got,) = reader.decode(table)
        assert same(got, reader[int(table["sample"][0])])
    picked = data.with_format("arrow")[[4, 0, 1]]
    for got, number in zip(reader.decode(picked), (4, 0, 1), strict=True):
        assert same(got, reader[number])


def test_arrow_and_parquet_have_plain_numbers(tmp_path: Path) -> None:
    pa, ds = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.dataset")
    given_ = fastkd.topk_from_logits(rows(3), K)
    model = {"model": "m", "tokenizer": "t", "data": "d"}
    reader = written(tmp_path, [given_, given_[:1]], encoding="plain", **model)
    table = pa.ipc.open_stream(reader.shards[0].file).read_all()
    assert table["indices"].type == pa.list_(pa.int32())
    assert table["indices"].to_pylist() == [given_.indices[:n].flatten().tolist() for n in (3, 1)]
    assert table["logprobs"].to_pylist()[1] == given_.logprobs[0].tolist()
    facts = json.loads(table.schema.metadata[b"fastkd"])["teacher"]
    wanted = {"encoding": "plain", "k": K, "vocab_size": V, "temperature": 1.0, "method": "top"}
    assert wanted.items() | model.items() | {("tail", "bucket")} <= facts.items()
    (tmp_path / "out").mkdir()
    reader.to_parquet(tmp_path / "out")
    back = ds.dataset(tmp_path / "out").to_table()
    assert json.loads(back.schema.metadata[b"fastkd"])["teacher"] == facts
    assert all(same(a, b) for a, b in zip(reader.decode(back), reader, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_reads_it(
    stored: tuple[list[fastkd.TopK], store.Reader], workers: int
) -> None:
    outputs, reader = stored
    inputs = [torch.arange(n) for n in (3, 1, 5, 2, 4)]
    labels = [x + 10 for x in inputs]
    paired = store.Paired(list(zip(inputs, labels, strict=True)), reader)
    # in processes that share nothing with this one, to which the reader is sent
    others: Any = {"multiprocessing_context": ranks.context()} if workers else {}
    loader = DataLoader(
        paired, batch_size=2, collate_fn=store.collate, num_workers=workers, **others
    )
    batches = list(loader)
    assert [len(x) for x, _, _ in batches] == [2, 2, 1]
    x, y, teacher = batches[1]
    assert x.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert y.tolist() == [[10, 11, 12, 13, 14], [10, 11, -100, -100, -100]]
    assert same(teacher[0], reader[2]) and same(teacher[1][:2], reader[3])
    assert teacher.indices[1, 2:].eq(-1).all()
    student = rows(2, 5, seed=3).requires_grad_()
    loss = fastkd.kl_div(student, teacher, labels=y, reduction="sum")
    loss.backward()
    apart = sum(
        fastkd.kl_div(student[i, :n], outputs[2 + i], reduction="sum") for i, n in ((0, 5), (1, 2))
    )
    torch.testing.assert_close(loss, apart, rtol=2e-3, atol=2e-3)
    assert student.grad is not None and student.grad[1, 2:].eq(0).all()


def test_paired_refuses_another_dataset(stored: tuple[list[fastkd.TopK], store.Reader]) -> None:
    _, reader = stored
    with pytest.raises(ValueError, match=r"reader: got 5 samples.*expected 0 to 3"):
        store.Paired([0] * 4, reader)
    paired = store.Paired([(torch.arange(2), torch.arange(2))] * 5, reader)
    with pytest.raises(ValueError, match="is it of this sample"):
        store.collate([paired[0]])
    for wrong in ("a", 3.0, None, True):
        with pytest.raises(TypeError, match=r"sample: got .*, expected its number"):
            reader[wrong]
    assert len(reader.__getitems__([torch.tensor(1), 1])) == 2
    with pytest.raises(IndexError, match="sample 5 is not in the cache of 5"):
        reader[5]


def test_samples_with_numbers_of_their_own(tmp_path: Path) -> None:
    with store.Writer(tmp_path, vocab_size=V) as writer:
        writer.add_batch(rows(3), samples=[6, 7, 8])
        writer.add(rows(seed=5), sample=20)
        writer.add(rows(seed=6), sample=2)
        for wrong in (20, 7, -1):
            with pytest.raises(ValueError, match=rf"samples: got \[?{wrong}"):
                writer.add(rows(), sample=wrong)
        with pytest.raises(ValueError, match="rising by 1"):
            writer.add_batch(rows(2), samples=[30, 32])
    reader = store.Reader(tmp_path)
    assert reader.numbers.tolist() == [2, 6, 7, 8, 20]
    assert torch.equal(reader[20], rows(seed=5)) and torch.equal(reader[2], rows(seed=6))
    with pytest.raises(IndexError, match="sample 3 "):
        reader[3]
    with pytest.raises(ValueError, match="got None of rank 1, expected numbers"):
        with store.Writer(tmp_path, vocab_size=V, rank=1) as other:
            other.add(rows())


def test_a_resumed_run_must_have_the_same_cache(tmp_path: Path) -> None:
    readers = [written(tmp_path / str(i), [rows(seed=i)] * 4) for i in range(2)]
    data = TensorDataset(torch.arange(4), torch.arange(4))

    def run(reader: store.Reader, epochs: int) -> None:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, V))
        loader = DataLoader(store.Paired(data, reader), collate_fn=store.collate)
        terms = [distill.soft()]
        keep = distill.Checkpoints(tmp_path / "run", resume=True)
        distill.train(
            student, loader, terms, teacher=reader, epochs=epochs, checkpoint=keep, progress=False
        )

    run(readers[0], 1)
    run(readers[0], 2)
    with pytest.raises(ValueError, match="teacher"):
        run(readers[1], 3)


def test_the_command_line(
    stored: tuple[list[fastkd.TopK], store.Reader], capsys: pytest.CaptureFixture[str]
) -> None:
    _, reader = stored
    path = str(reader.path)
    assert main(["cache", "info", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["samples"] == 5 and facts["teacher"]["k"] == K and facts["complete"]
    assert main(["cache", "verify", path]) == 0
    assert "5 samples, 15 tokens" in capsys.readouterr().out
    file = next(reader.path.glob("teacher-*.arrow"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    assert main(["cache", "verify", path]) == 1
    assert file.name in capsys.readouterr().err
