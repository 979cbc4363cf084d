"""What no cache holds is refused by name, and nothing of it is added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cache_faults import K, V, topk
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.teachers import store


def changed(of: fastkd.TopK, **changes: Any) -> fastkd.TopK:
    """A TopK with fields that its own checks may refuse."""
    twin = object.__new__(fastkd.TopK)
    vars(twin).update(vars(of))
    for name, value in changes.items():
        setattr(twin, name, value)
    return twin


def with_value(x: Tensor, row: int, column: int, value: float) -> Tensor:
    x = x.clone()
    x[row, column] = value
    return x


GOOD = topk(3, 1)


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ({"indices": with_value(GOOD.indices, 2, 1, V)}, "indices: got 40 in row 2 of sample 1"),
        ({"indices": with_value(GOOD.indices, 2, 1, -2)}, "indices: got -2 in row 2 of sample 1"),
        (
            {"indices": GOOD.indices[:, :1].expand(3, K).contiguous()},
            "expected each column once, -1 for padding",
        ),
        ({"logprobs": with_value(GOOD.logprobs, 0, 0, 0.1)}, "logprobs: got 0.1 in row 0"),
        ({"logprobs": with_value(GOOD.logprobs, 1, 0, torch.nan)}, "logprobs: got nan in row 1"),
        ({"logprobs": GOOD.logprobs * 0}, "mass: got [34].* in row 0 of sample 1"),
        ({"tail_logprob": torch.tensor([-1.0, 0.5, -1.0])}, "tail_logprob: got 0.5 in row 1"),
        ({"tail_logprob": torch.full((3,), torch.nan)}, "tail_logprob: got nan in row 0"),
        ({"tail_logprob": torch.zeros(3)}, "mass: got 1.* expected at most 1 but for rounding"),
        ({"tail_logprob": None}, r"with tail_logprob\) = .*False\), expected .*True\) as before"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_added(
    tmp_path: Path, output: dict[str, Any], match: str
) -> None:
    with store.Writer(tmp_path, vocab_size=V, k=K) as writer:
        writer.add(GOOD)
        with pytest.raises(ValueError, match=match):
            writer.add(changed(GOOD, **output))
        writer.add(GOOD)
    reader = store.Reader(tmp_path)
    assert len(reader) == 2 and reader.tokens == 6
    reader.verify()


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        (GOOD, TypeError, "got TopK, expected Tensor of all columns"),
        (torch.full((3, V), torch.nan), ValueError, "logits: got nan in row 0 of sample 0"),
        (torch.full((3, V), torch.inf), ValueError, "logits: got inf"),
        (torch.full((3, V), 1e5), ValueError, "float16 holds; encoding='float32' holds more"),
        (torch.zeros(3, V + 1), ValueError, r"expected floats \[..., 40\]"),
        (torch.zeros(3, V).long(), ValueError, "of torch.int64"),
        ("text", TypeError, "outputs: got str"),
    ],
)
def test_bad_logits(tmp_path: Path, output: Any, error: type[Exception], match: str) -> None:
    with store.Writer(tmp_path, vocab_size=V, encoding="float16") as writer:
        with pytest.raises(error, match=match):
            writer.add(output)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"vocab_size": 2**31}, "vocab_size: got 2147483648"),
        ({"total": -1}, "total: got -1"),
        ({"k": 0}, "k: got 0"),
        ({"rank": -1}, "rank: got -1"),
        ({"rank": "0"}, "rank: got '0'"),
        ({"shard_bytes": "1MB"}, "shard_bytes: got '1MB', expected 1 to"),
        ({"k": True}, "k: got True"),
        ({"method": "best"}, "method: got 'best'"),
        ({"tail": "none"}, "tail: got 'none'"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"encoding": "int4"}, "encoding: got 'int4'"),
        ({"encoding": "counts"}, "encoding: got 'counts' with method='top'"),
        ({"k": None, "temperature": 2.0}, "k: got None with temperature=2"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        store.Writer(tmp_path / "x", **{"vocab_size": V, "k": K, **options})
    assert not (tmp_path / "x").exists()


def test_what_is_no_teacher_loader_or_reader(tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab_size": np.int64(V), "k": np.int32(K), "progress": False}
    for teacher, match in (
        ("base", "teacher: got 'base', expected a module, a function"),
        ([len], "teacher: got .*expected a module"),
        (None, "teacher: got None"),
        (distill.EMATeacher(), "teacher: got EMATeacher without its student"),
        (distill.BaseTeacher(), "teacher: got BaseTeacher without its student"),
    ):
        with pytest.raises(TypeError, match=match):
            store.capture(teacher, [torch.arange(4)], tmp_path / "x", **options)
    with pytest.raises(ValueError, match="loader: got 0 samples, expected"):
        store.capture(nn.Embedding(9, V), [], tmp_path / "x", **options)
    assert store.capture(nn.Embedding(9, V), [torch.arange(4)], tmp_path / "y", **options) == 4
    reader = store.Reader(tmp_path / "y")
    assert type(reader.spec.k) is int and reader[torch.tensor(2)].shape == reader[2].shape
    with pytest.raises(TypeError, match="reader: got 'x', expected a store"):
        store.Paired([0], "x")
