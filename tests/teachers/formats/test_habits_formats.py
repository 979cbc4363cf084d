"""The ten lines that a user of another tool writes first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd.teachers import formats

V = 12


def student(length: int) -> torch.Tensor:
    return torch.randn(length, V, requires_grad=True)


def test_a_served_answer() -> None:
    ids = [3, 7, 1]
    answer = json.loads(
        """{"choices": [{"index": 0, "prompt_logprobs": [null,
        {"7": {"logprob": -0.5, "rank": 1, "decoded_token": " a"},
         "2": {"logprob": -1.5, "rank": 2, "decoded_token": " b"}},
        {"1": {"logprob": -3.0, "rank": 5, "decoded_token": " c"},
         "4": {"logprob": -0.2, "rank": 1, "decoded_token": " d"}}]}]}"""
    )
    logits = student(len(ids))
    (record,) = formats.read("vllm", answer, tokens=ids, vocab_size=V)
    loss = fastkd.kl_div(logits[record.teaches - 1], record.topk, labels=record.labels())
    loss.backward()
    assert logits.grad is not None
    assert record.labels().tolist() == [7, 1]
    assert record.topk.indices.tolist() == [[7, 2], [4, 1]]
    assert logits.grad[:2].abs().sum() > 0 and not logits.grad[2].any()


def test_somebody_elses_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "input_ids": [[5, 3, 7, 1]],
        "logprobs": [[[-0.5, -1.5], [-0.2, -3.0]]],
        "target_token_ids": [[[7, 2], [4, 1]]],
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")

    reading = formats.read("axolotl-v2", tmp_path / "train.parquet", vocab_size=V)
    for record in reading:
        logits = student(len(record.tokens))
        fastkd.kl_div(logits[record.teaches - 1], record.topk, labels=record.labels()).backward()
        assert logits.grad is not None
        assert [i for i in range(4) if logits.grad[i].any()] == [1, 2]
        assert record.labels().tolist() == [7, 1]
    print(reading.report)
    assert reading.report.rows == 2 and reading.report.sequences == 1


def test_a_table_that_was_read_already() -> None:
    pa, data = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.dataset")
    pytest.importorskip("pandas")
    row = {"input_ids": [5, 3, 7], "teacher_topk_ids": [[-1, -1], [3, 2], [7, -1]]}
    row["teacher_topk_logprobs"] = [[-torch.inf] * 2, [-0.5, -1.5], [-0.1, -torch.inf]]
    table = pa.Table.from_pylist([row, row])
    for source in (table, table.to_batches()[0], data.dataset(table), table.to_pandas()):
        found = [x.topk.indices.tolist() for x in formats.read("trl-rows", source, vocab_size=V)]
        assert found == [[[3, 2], [7, -1]]] * 2
    with pytest.raises(ValueError, match=r"expected json\.loads of it") as error:
        [*formats.read("vllm", '{"choices": []}' * 999, vocab_size=V)]
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("format", sorted(formats.formats))
def test_a_source_that_is_not_there_is_named_at_the_call(format: str, tmp_path: Path) -> None:
    kind = next(x for x in formats.formats[format].kinds if x)
    for source in (tmp_path / "captured", str(tmp_path / "answer.json")):
        with pytest.raises(FileNotFoundError, match=r"source: got '.*(captured|answer\.json)', wh"):
            formats.read(format, source, kind=kind)
    if "config" in formats.formats[format].options:
        with pytest.raises(FileNotFoundError, match=r"config: got 'none\.yaml', which is"):
            formats.read(format, tmp_path, kind=kind, config="none.yaml")
