"""Every format says the same of one sequence, and what is written reads back as it was."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from format_samples import ANSWERS, FILES, IDS, SAID, V1, V2, V, b64, same, sglang, trl, vllm

import fastkd
from fastkd.teachers import formats


def test_every_format_has_a_sample_and_a_row_in_the_readme() -> None:
    by_hand = {"vllm-ids", "distillkit", "distillkit-legacy"}  # in tests of their own
    samples = {sample[1] for sample in ANSWERS} | {sample[0] for sample in FILES}
    assert samples | by_hand == set(formats.formats), "format_samples.py"
    page = Path(formats.__file__).with_name("README.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.-]+)`( w)? \|", page, re.MULTILINE))
    written = {name: " w" if entry.write else "" for name, entry in formats.formats.items()}
    assert rows == written, "README.md of the formats"


@pytest.mark.parametrize("name, format, answer, options, own", ANSWERS, ids=[x[0] for x in ANSWERS])
def test_an_answer(name: str, format: str, answer: Any, options: Any, own: Any) -> None:
    reading = formats.read(format, answer, vocab_size=V, **options)
    record = next(reading)
    same(record)
    assert (None if record.tokens is None else record.tokens.tolist()) == own
    if own is not None:
        assert record.labels().tolist() == IDS[1:]
    for placed in formats.read(
        format, answer, tokens=[IDS, IDS[:2]][: 1 + (name == "trl")], **options
    ):
        assert placed.teaches.tolist() == [1, 2, 3][: len(placed.teaches)]
        assert placed.labels().tolist() == IDS[1 : 1 + len(placed.teaches)]
    mass = torch.tensor([sum(torch.tensor([*row.values()]).exp()) for row in SAID])
    assert record.topk.tail == "bucket" and record.topk.tail_logprob is not None
    assert torch.allclose(record.topk.tail_logprob, torch.log1p(-mass), atol=1e-5)


# a row that is a list has no columns: no Parquet holds it
ON_DISK = [
    pytest.param(*file, suffix, id=f"{file[0]}-{suffix}")
    for file in FILES
    for suffix in (".parquet", ".jsonl", None)
    if not (suffix == ".parquet" and isinstance(file[1], list))
]


@pytest.mark.parametrize("format, row, options, own, suffix", ON_DISK)
def test_a_file(
    format: str, row: Any, options: Any, own: Any, suffix: str | None, tmp_path: Path
) -> None:
    source: Any = [row, row]
    if suffix is not None:
        source = tmp_path / f"train{suffix}"
        if suffix == ".jsonl":
            source.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
        else:
            pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pa.Table.from_pylist([row, row]), source)
    reading = formats.read(format, source, vocab_size=V, **options)
    records = [*reading]
    assert len(records) == reading.report.sequences == 2
    for record in records:
        same(record)
        assert (None if record.tokens is None else record.tokens.tolist()) == own
        if own is not None:
            assert record.labels().tolist() == IDS[1:]
    records = [*formats.read(format, source, tokens=[IDS, IDS], **options)]
    assert [record.teaches.tolist() for record in records] == [[1, 2, 3]] * 2


@pytest.mark.parametrize(
    "format", [name for name, entry in formats.formats.items() if entry.write is not None]
)
def test_what_is_written_reads_back(format: str, tmp_path: Path) -> None:
    if format not in ("vllm", "easydistill"):
        pytest.importorskip("pyarrow")
    suffix = {"vllm": ".json", "easydistill": ".jsonl", "distillkit": ""}.get(format, ".parquet")
    answer = vllm()
    answer["choices"][0]["prompt_logprobs"][2] = None  # a row in the middle without a teacher
    ids = IDS if format in ("easydistill",) else [*IDS, 0]  # and a last token without one
    (record,) = formats.read("vllm", answer, tokens=IDS)
    record = record._replace(tokens=torch.tensor(ids))
    said = [SAID[0], SAID[2]]
    formats.write(format, [record, record], tmp_path / f"out{suffix}")
    options = {"align": "next"} if format == "llamakd" else {}
    back = [*formats.read(format, tmp_path / f"out{suffix}", vocab_size=V, **options)]
    assert len(back) == 2
    for one in back:
        kept = one.topk.indices[:, 0] >= 0
        places = one.teaches if int(one.teaches.min()) > 0 else one.teaches + len(ids)
        assert places[kept].tolist() == [1, 3]
        same(one._replace(topk=one.topk[kept]), said)
        if one.tokens is not None:
            assert one.tokens.tolist() == ids


def test_the_loss_of_a_served_teacher_is_that_of_the_same_columns() -> None:
    teacher, student = torch.randn(4, V), torch.randn(4, V)
    wanted = fastkd.topk_from_logits(teacher[:-1], 3)
    rows: list[Any] = [None]
    for ids, logs in zip(wanted.indices.tolist(), wanted.logprobs.tolist(), strict=True):
        rows.append(
            {
                str(i): {"logprob": x, "rank": r}
                for r, (i, x) in enumerate(zip(ids, logs, strict=True), 1)
            }
        )
    (record,) = formats.read("vllm", {"choices": [{"prompt_logprobs": rows}]}, tokens=IDS)
    for divergence in ("kl_div", "reverse_kl_div", "js_div"):
        loss = getattr(fastkd, divergence)
        got, expected = (loss(student[:3], x) for x in (record.topk, wanted))
        assert torch.allclose(got, expected, rtol=1e-4), divergence
    aligned = record.aligned()
    assert aligned.indices.equal(record.topk.indices)


def test_folders_and_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([V2] * 3)
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    for source in (data, tmp_path / "saved"):
        records = [*formats.read("axolotl-v2", source)]
        assert len(records) == 3
        same(records[2])
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        data.to_parquet(tmp_path / f"{name}.parquet")
    assert len([*formats.read("axolotl-v2", tmp_path)]) == 6
    data.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"got files of test-N-of-N\.parquet, train-N-of-N"):
        next(formats.read("axolotl-v2", tmp_path))


def test_answers_of_a_client() -> None:
    """The openai package gives models of pydantic, with what it does not know as extra fields."""

    class Model(SimpleNamespace):
        def model_dump(self) -> dict[str, Any]:
            return dict(self.__dict__)

    for given in (Model(**vllm()), [Model(**vllm())]):
        same(next(formats.read("vllm", given)))


def test_scores_of_given_ids(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    import base64
    import io

    scores, ids = [[-0.5, -1.5], [-2.0, -torch.inf]], [[3, 2], [8, -1]]
    data = io.BytesIO()
    numpy.save(data, numpy.array(scores, dtype="float32"))
    text = base64.b64encode(data.getvalue()).decode()
    for given in (scores, text):
        answer = {"prompt_token_id_logprobs": given}
        (record,) = formats.read("vllm-ids", answer, ids=ids, start=0, tokens=IDS[:3])
        assert record.topk.indices.tolist() == ids  # the caller's order, and -1
        assert record.teaches.tolist() == [1, 2]
    (record,) = formats.read("vllm-ids", {"prompt_token_id_logprobs": scores}, ids=[3, 2], start=1)
    assert record.topk.indices.tolist() == [[3, 2], [3, -1]] and record.teaches.tolist() == [2, 3]

    data = io.BytesIO()
    numpy.save(data, numpy.array([{}], dtype=object), allow_pickle=True)
    answer = {"prompt_token_id_logprobs": base64.b64encode(data.getvalue()).decode()}
    with pytest.raises(ValueError, match=r"no \.npy of numbers"):
        [*formats.read("vllm-ids", answer, ids=ids, start=0)]
    with pytest.raises(ValueError, match="prefix-cache hit"):
        [*formats.read("vllm-ids", {"prompt_token_id_logprobs": None}, ids=ids, start=0)]
    with pytest.raises(ValueError, match="prompt_logprob_start"):
        [*formats.read("vllm-ids", {"prompt_token_id_logprobs": scores}, ids=ids)]


def test_generated_text_without_echo() -> None:
    answer = {
        "choices": [
            {
                "logprobs": {
                    "tokens": ["token_id:3"],
                    "token_logprobs": [-0.5],
                    "top_logprobs": [{"token_id:3": -0.5, "token_id:2": -1.5}],
                }
            }
        ]
    }
    (record,) = formats.read("vllm-echo", answer)
    assert record.teaches.tolist() == [-1] and record.labels().tolist() == [3]
    same(record, SAID[:1])


def test_sglang_counts_null_rows_in_some_versions() -> None:
    answer = sglang("flat")
    answer["meta_info"]["input_top_logprobs_shape"] = [4, 2]
    same(next(formats.read("sglang", answer)))
    answer["meta_info"]["input_top_logprobs_shape"] = [5, 2]
    with pytest.raises(ValueError, match=r"input_top_logprobs_val_flat: got 6 numbers"):
        next(formats.read("sglang", answer))
    answer = sglang("b64")
    answer["meta_info"]["input_top_logprobs_val_flat_b64_dtype"] = "float16"
    with pytest.raises(ValueError, match="b64_dtype='float16', expected 'float32'"):
        next(formats.read("sglang", answer))


def test_trl_as_json_and_padding() -> None:
    second = [*formats.read("trl", trl())][1]
    same(second, SAID[:1])
    ids = [[*row] for row in SAID]
    answer = {"logprobs": [[[*row.values()] for row in SAID]], "logprob_token_ids": [ids]}
    answer["logprobs"][0][1][2] = None  # NaN
    (record,) = formats.read("trl", answer)
    same(record, [SAID[0], {4: -0.25, 8: -2.0}, SAID[2]])
    short = {**trl(), "token_ids_b64": b64("i", 1)}
    with pytest.raises(ValueError, match=r"token_ids_b64: got 1 numbers, expected those of \[2, 3"):
        next(formats.read("trl", short))
    with pytest.raises(ValueError, match="expected base64"):
        next(formats.read("trl", {**trl(), "logprobs_b64": "?"}))


CONFIG: dict[str, Any] = {
    "d": V,
    "k": 5,
    "exact_k": 2,
    "exact_dtype": "float16",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 2}],
    "delta_encoding": False,
}
# values -0.5, -1.5; fit -4 - t + sqrt(t) of t = 0, 1, 2; residuals 5 - 4 and 1 - 4, times 0.25
PACKED = struct.pack("<2e3fe", -0.5, -1.5, -4.0, -1.0, 1.0, 0.25) + bytes([0b10100100])
DECODED = [-0.5, -1.5, -4.0 + 0.25, -4.0 - 0.75, -6.0 + 2.0**0.5]
ROW = {
    "input_ids": [5, 3],
    "compressed_logprobs": [[*PACKED]],
    "bytepacked_indices": [[0x32, 0x48, 0x10]],  # 3, 2, 4, 8, 1 in 4 bits each
}


def test_distillkit_by_hand(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    yaml = pytest.importorskip("yaml")
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(CONFIG))
    for number in (10, 2):
        row = {**ROW, "input_ids": [number, 3]}
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / f"data_{number}.parquet")
    records = [*formats.read("distillkit", tmp_path)]
    assert [int(record.tokens[0]) for record in records] == [2, 10]  # by number
    for record in records:
        same(record, [dict(zip([3, 2, 4, 1, 8], sorted(DECODED)[::-1], strict=True))])
        assert record.topk.tail == "renormalize" and record.labels().tolist() == [3]

    moved = {**CONFIG, "delta_encoding": True}
    (record,) = formats.read("distillkit", [ROW], config=moved)
    logs = torch.tensor(DECODED).cumsum(0)
    assert torch.allclose(record.topk.logprobs[0], logs)
    unit = {**CONFIG, "normalize_t": True, "polynomial_terms": [0, 1, 2]}
    (record,) = formats.read("distillkit", [ROW], config=unit)  # -4 - t + t^2, t = 0, 1/2, 1
    assert record.topk.logprobs[0, 2:].tolist() == [-3.75, -4.0, -5.0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codebook": 3}, "expected only d, k"),
        ({"d": None}, "got d=None"),
        ({"polynomial_terms": ["log"]}, "polynomial term 'log', expected a power, 'sqrt' or 'exp'"),
        ({"term_dtype": "float8"}, "term_dtype='float8', expected one of float16"),
        ({"exact_k": 6}, "expected exact_k and the bins to fit into k"),
        ({"exact_k": 3}, "got 19 bytes a row by compression_config.yaml, expected 21"),
        ({"d": 17}, "got 3 bytes a row for 5 numbers of 5 bits, expected 4"),
        ({"residual_bins": [{"element_bits": 3}]}, "scale_dtype=None"),
        ({"normalize_t": "yes"}, "normalize_t='yes', expected true or false"),
    ],
)
def test_a_distillkit_config_is_read_in_full_or_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(formats.read("distillkit", [ROW], config={**CONFIG, **change}))


def test_distillkit_legacy_and_packed_documents(tmp_path: Path) -> None:
    legacy = {"vocab_size": V, "k": 4, "exact_k": 2, "polynomial_degree": 1}
    word = 3 | 2 << 4 | 4 << 8 | 8 << 12
    row = {
        "input_ids": [5, 3, 7],
        "packed_indices": [[word]] * 3,
        "exact_values": [[2.5, 1.5]] * 3,
        "coeffs": [[-1.0, 0.5]] * 3,  # -1 + 0.5 / rank
        "attention_mask": [1, 1, 2],
    }
    with pytest.raises(ValueError, match="kind: got None for distillkit-legacy, expected logprob"):
        formats.read("distillkit-legacy", [row], config=legacy)
    with pytest.raises(ValueError, match="log-probabilities, at most 0"):
        next(formats.read("distillkit-legacy", [row], config=legacy, kind="logprob"))
    with pytest.raises(ValueError, match="tail: got 'bucket', expected renormalize or restrict"):
        formats.read("distillkit-legacy", [row], config=legacy, kind="logit", tail="bucket")
    for change, message in (
        ({"exact_k": 1}, "exact_values: got 2 values a row, expected 1"),
        ({"polynomial_degree": 2}, "coeffs: got 2 coefficients a row, expected 3"),
        ({"k": 40}, "packed_indices: got 1 words a row, expected 3"),
    ):
        with pytest.raises(ValueError, match=message):
            other = {**legacy, **change}
            next(formats.read("distillkit-legacy", [row], config=other, kind="logit"))
    reading = formats.read("distillkit-legacy", [row], config=legacy, kind="logit")
    (record,) = reading
    logs = torch.tensor([2.5, 1.5, -0.5, -0.75]).log_softmax(0)
    assert torch.allclose(record.topk.logprobs[0], logs)
    assert record.topk.indices[0].tolist() == [3, 2, 4, 8]
    assert record.labels().tolist() == [3, -100]  # the last token of the first document
    assert reading.report.mean_mass is None and reading.report.absent_rows == 1


def test_distillkit_leaves_out_what_did_not_come() -> None:
    exact = {"d": V, "k": 2, "exact_k": 2, "residual_bins": [], "delta_encoding": False}
    data = struct.pack("<2f", -0.5, -torch.inf)
    row = {"input_ids": [5, 3], "compressed_logprobs": [[*data]], "bytepacked_indices": [[0x3F]]}
    (record,) = formats.read("distillkit", [row], config=exact, vocab_size=V)
    same(record, [{3: -0.5}])  # an id of memory that nobody wrote


def test_rows_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 rows of ids and 1 of values for 4 tokens"):
        next(formats.read("distillkit", [{**ROW, "input_ids": IDS}], config=CONFIG))
    with pytest.raises(ValueError, match="rows for the tokens -3 to -1 of a sequence of 2"):
        next(formats.read("axolotl-v2", [{**V2, "input_ids": IDS[1:3]}]))
    with pytest.raises(ValueError, match=r"\[3, 3\] ids and \[3, 1\] of 'logprobs'"):
        next(formats.read("axolotl-v2", [{**V2, "logprobs": [[-1.0]] * 3}]))
    with pytest.raises(ValueError, match="got the columns logprobs, expected 'target_token_ids'"):
        next(formats.read("axolotl-v2", [{"logprobs": V1}]))
