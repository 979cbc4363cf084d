"""The rules that all formats share, one by one, and what is refused by name."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from format_samples import BYTES, IDS, RAW, SAID, V2, V, llama_cpp, openai, same, tgi, vllm

import fastkd
from fastkd.teachers import formats


def answer(*rows: Any) -> dict[str, Any]:
    """A vLLM answer of rows {id: logprob}."""
    entries = [
        row and {str(i): {"logprob": x, "rank": n} for n, (i, x) in enumerate(row.items(), 1)}
        for row in rows
    ]
    return {"choices": [{"prompt_logprobs": [None, *entries]}]}


def one(*rows: Any, **options: Any) -> formats.Record:
    return next(formats.read("vllm", answer(*rows), **options))


# ---- rows


def test_a_null_row_is_no_teacher_and_its_token_is_ignored() -> None:
    reading = formats.read("vllm", answer(SAID[0], None, SAID[2]), tokens=IDS, vocab_size=V)
    (record,) = reading
    assert record.taught.tolist() == [True, False, True]
    assert record.labels().tolist() == [3, -100, 1] and record.labels(-1).tolist() == [3, -1, 1]
    assert reading.report.rows == 3 and reading.report.absent_rows == 1
    student = torch.randn(4, V, requires_grad=True)
    loss = fastkd.kl_div(student[record.teaches - 1], record.topk, labels=record.labels())
    loss.backward()
    assert loss.isfinite() and student.grad is not None
    assert student.grad.any(-1).tolist() == [True, False, True, False]


def test_row_i_teaches_token_i_plus_1() -> None:
    record = one(*SAID, tokens=IDS)
    assert record.teaches.tolist() == [1, 2, 3] and record.labels().tolist() == IDS[1:]
    for rows, message in (
        ([{"7": {"logprob": -0.5}}], "got an entry for the first token, expected null"),
        ([], "got no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            next(formats.read("vllm", {"choices": [{"prompt_logprobs": rows}]}))
    with pytest.raises(ValueError, match="got 4 rows for 3 tokens"):
        next(formats.read("vllm", vllm(prompt_token_ids=IDS[:3])))


def test_aligned_rows_leave_gaps() -> None:
    record = one(*SAID, tokens=IDS)
    last = record._replace(topk=record.topk[2:], teaches=record.teaches[2:]).aligned()
    assert last.indices[:2].eq(-1).all() and last.indices[2].tolist() == [1, 9, -1]
    generated = next(formats.read("easydistill", [[{"3": 0.5}]]))
    with pytest.raises(ValueError, match="count from the end of a sequence without ids"):
        generated.aligned()
    with pytest.raises(ValueError, match="tokens: got none in this format"):
        generated.labels()


def test_tokens_must_be_of_the_source() -> None:
    for given, message in (
        ([[9, 9, 9, 9]], "expected the end of them to be its"),
        ([IDS[1:]], "expected the end of them to be its"),
        ([IDS, IDS], "more sequences than the 1 of the source"),
        ([], "fewer sequences than the source"),
    ):
        with pytest.raises(ValueError, match=f"tokens: .*{message}"):
            [*formats.read("vllm", vllm(prompt_token_ids=IDS), tokens=given)]
    with pytest.raises(ValueError, match="rows for the tokens 1 to 3 of a sequence of 2"):
        next(formats.read("vllm", vllm(), tokens=IDS[:2]))
    longer = next(formats.read("tgi", tgi(), tokens=[2, *IDS]))
    assert longer.teaches.tolist() == [2, 3, 4] and longer.labels().tolist() == IDS[1:]


# ---- columns


@pytest.mark.parametrize("low", [-math.inf, -9999.0, None])
def test_what_stands_for_minus_infinity_is_an_absent_column(low: float | None) -> None:
    record = one({3: -0.5, 0: low, 2: low})
    assert record.topk.indices.tolist() == [[3]]
    assert record.topk.tail_logprob is not None
    assert math.isclose(record.topk.tail_logprob.item(), math.log(1 - math.exp(-0.5)), rel_tol=1e-5)


@pytest.mark.parametrize("pad", [(0, -math.inf), (-1, 0.0), (-1, -math.inf), (1, -9999.0)])
def test_every_padding(pad: tuple[int, float]) -> None:
    ids, logs = [[3, pad[0], pad[0]]], [[-0.5, pad[1], pad[1]]]
    row = {"input_ids": IDS[:2], "token_ids": ids, "top_values": logs}
    same(next(formats.read("distillkit-raw", [row], kind="logprob")), [{3: -0.5}])


@pytest.mark.parametrize("text", [" Paris", "7", "token_id:", "token_id:x", "token_id:٣"])
def test_token_text_is_refused(text: str) -> None:
    logprobs = {"tokens": ["token_id:5"], "token_logprobs": [None], "top_logprobs": [None]}
    logprobs |= {"tokens": ["token_id:5", "token_id:3"], "token_logprobs": [None, -0.5]}
    logprobs["top_logprobs"] = [None, {text: -0.5}]
    with pytest.raises(ValueError, match="two ids may have one text"):
        next(formats.read("vllm-echo", {"choices": [{"logprobs": logprobs}]}))
    if text != "7":
        with pytest.raises(ValueError, match="got the token "):
            next(formats.read("vllm", {"choices": [{"prompt_logprobs": [None, {text: -0.5}]}]}))


def test_old_llama_cpp_and_openai_name_tokens_by_text() -> None:
    old = {"completion_probabilities": [{"content": " a", "probs": [{"tok_str": "a", "prob": 1}]}]}
    with pytest.raises(ValueError, match="got the fields content, probs, expected 'id'"):
        next(formats.read("llama.cpp", old))
    with pytest.raises(TypeError, match="these answers name tokens by their bytes"):
        next(formats.read("openai", openai()))
    known = {key: i for key, i in BYTES.items() if i != 9}
    with pytest.raises(ValueError, match="the bytes b'J', expected those of one of its tokens"):
        next(formats.read("openai", openai(), tokenizer=known))
    bare = openai()
    bare["choices"][0]["logprobs"]["content"][0]["bytes"] = None
    with pytest.raises(ValueError, match="token 'D' without bytes"):
        next(formats.read("openai", bare, tokenizer=BYTES))


def test_a_tokenizer_gives_the_bytes() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocab = {chr(65 + i): i for i in range(V - 2)} | {"é": V - 2, "Ġa": V - 1}
    vocab["Ã©"] = vocab.pop("é")  # the two bytes of é, as byte-level tokenizers write them
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    same(next(formats.read("openai", openai(), tokenizer=fast)))
    said = {"token": "é", "bytes": [*"é".encode()], "logprob": -0.5}
    said["top_logprobs"] = [{"token": " a", "bytes": [*b" a"], "logprob": -1.5}]
    content = {"choices": [{"logprobs": {"content": [said]}}]}
    record = next(formats.read("openai", content, tokenizer=fast))
    assert record.topk.indices.tolist() == [[V - 2, V - 1]]
    inner.decoder = tokenizers.decoders.Metaspace()
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    with pytest.raises(TypeError, match="fast byte-level tokenizer"):
        next(formats.read("openai", openai(), tokenizer=other))


def test_by_rank_with_the_token_itself_behind_and_nothing_twice() -> None:
    rows = {"7": {"logprob": -3.0, "rank": 5}, "8": {"logprob": -2.0, "rank": 2}}
    rows["4"] = {"logprob": -2.0, "rank": 1}  # equal: the rank decides
    record = next(formats.read("vllm", {"choices": [{"prompt_logprobs": [None, rows]}]}))
    assert record.topk.indices.tolist() == [[4, 8, 7]]
    row = {**RAW, "token_ids": [[3, 2, 3]] * 3, "top_values": [[-0.5, -1.5, -0.5]] * 3}
    same(next(formats.read("distillkit-raw", [row], kind="logprob")), [SAID[0]] * 3)
    row["top_values"] = [[-0.5, -1.5, -0.75]] * 3
    with pytest.raises(ValueError, match="got 3 in row 0, expected no column twice with other"):
        next(formats.read("distillkit-raw", [row], kind="logprob"))


# ---- numbers


def test_a_kind_is_declared_and_held_to() -> None:
    with pytest.raises(ValueError, match=r"prompt_logprobs: got 0\.5 in row 0, expected log-prob"):
        one({3: 0.5})
    for wrong in (-0.5, 1.5):
        with pytest.raises(ValueError, match="expected probabilities, as kind='prob' says"):
            next(formats.read("easydistill", [[{"3": wrong}]]))
    with pytest.raises(ValueError, match="expected finite numbers"):
        one({3: math.nan})
    with pytest.raises(ValueError, match="kind: got 'prob' for vllm, expected logprob or logit"):
        one({3: -0.5}, kind="prob")
    with pytest.raises(ValueError, match="kind: got 'logprob', expected 'prob', as answer"):
        next(formats.read("llama.cpp", llama_cpp("prob"), kind="logprob"))
    mixed = llama_cpp()
    mixed["completion_probabilities"] += llama_cpp("prob")["completion_probabilities"]
    with pytest.raises(ValueError, match="got both logprob and prob"):
        next(formats.read("llama.cpp", mixed))


def test_logits_are_known_up_to_their_sum() -> None:
    record = one({3: 5.0, 2: 4.0, 9: -20000.0}, kind="logit")
    assert record.topk.tail == "renormalize" and record.topk.tail_logprob is None
    assert torch.allclose(record.topk.logprobs.exp().sum(-1), torch.ones(1))
    assert record.topk.indices.tolist() == [[3, 2, 9]]  # -9999.0 means nothing of logits


def test_the_tail_is_measured_or_unknown() -> None:
    record = one({3: math.log(0.5), 2: math.log(0.25)})
    assert record.topk.tail == "bucket" and record.topk.tail_logprob is not None
    assert math.isclose(record.topk.tail_logprob.item(), math.log(0.25), rel_tol=1e-5)
    every = one({0: math.log(0.5), 1: math.log(0.4999)}, vocab_size=2)
    assert every.topk.tail_logprob is not None and every.topk.tail_logprob.item() == -math.inf
    unknown = next(formats.read("axolotl-v2", [V2]))
    assert unknown.topk.tail == "renormalize" and unknown.topk.tail_logprob is None
    known = next(formats.read("axolotl-v2", [V2], tail="bucket", temperature=2.0))
    assert known.topk.tail == "bucket" and known.topk.temperature == 2.0


def test_ids_beyond_the_vocabulary_give_their_mass_to_the_tail() -> None:
    half, eighth = math.log(0.5), math.log(0.125)
    rows = ({3: half, V: eighth, 2: eighth}, {V + 5: half})
    reading = formats.read("vllm", answer(*rows), vocab_size=V)
    (record,) = reading
    assert record.topk.indices.tolist() == [[3, 2], [-1, -1]]
    tail = record.topk.tail_logprob
    assert tail is not None and math.isclose(tail[0].item(), math.log(0.375), rel_tol=1e-5)
    assert reading.report.beyond_vocab == 2 and reading.report.absent_rows == 1
    with pytest.raises(ValueError, match=r"expected ids below 2\*\*31"):
        one({2**31: half})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_mass_above_1_by_rounding_is_renormalized(dtype: str) -> None:
    count = {"bfloat16": 10, "float16": 58}[dtype]
    log = torch.tensor(1 / count).log().to(getattr(torch, dtype)).item()
    row = {i: log for i in range(count)}
    assert count * math.exp(log) > 1.001
    with pytest.raises(ValueError, match="a mass of at most 1 but for the rounding of float32"):
        one(row)
    reading = formats.read("vllm", answer(row), dtype=dtype)
    (record,) = reading
    assert torch.allclose(record.topk.logprobs.exp().sum(-1), torch.ones(1), atol=1e-6)
    assert reading.report.renormalized == 1
    student = torch.randn(1, count + 3)
    assert fastkd.kl_div(student, record.topk).isfinite()
    with pytest.raises(ValueError, match=f"rounding of {dtype}"):
        one({i: 2 * log / 3 for i in range(count)}, dtype=dtype)
    assert one({i: 2 * log / 3 for i in range(count)}, tail="renormalize").topk.size(-1) == count


# ---- what is read, and what is not


@pytest.mark.parametrize("suffix", [".array_record", ".pkl", ".pt", ".npy"])
def test_pickle_is_never_read(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="to read one is to run"):
        next(formats.read("verl", tmp_path / f"x{suffix}"))


def test_formats_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"'maxtext', which is not read: \.array_record holds pick"
    ):
        formats.read("maxtext", "x.array_record")
    with pytest.raises(ValueError, match="got 'vlm', expected one of vllm, vllm-echo"):
        formats.read("vlm", {})
    for name, entry in formats.formats.items():
        assert entry.text and entry.tail in ("bucket", "renormalize"), name


@pytest.mark.parametrize(
    "format, source, message",
    [
        ("vllm", {"id": 1}, "got the fields id, expected a list of choices with 'prompt_logprobs'"),
        ("vllm", {"choices": [{"index": 0}]}, "expected the request's prompt_logprobs=k in"),
        ("vllm", 3, "got int 3, expected a list of choices"),
        ("vllm-echo", {"choices": [{"logprobs": None}]}, "expected the request's logprobs=k"),
        ("sglang", {"meta_info": {}}, "expected return_logprob and logprob_start_len=0"),
        (
            "sglang",
            {"meta_info": {"input_token_logprobs": [[None, 5, None]]}},
            "top_logprobs_num=k",
        ),
        ("sglang", {"meta_info": {"input_token_logprobs": [[-1.0, 5, None]]}}, "expected null"),
        ("trl", {}, "expected logprobs_b64, or lists"),
        ("tgi", {"generated_text": "a"}, "expected details=true in 'details'"),
        ("tgi", {"details": {"tokens": []}}, "expected top_n_tokens=k in 'top_tokens'"),
        ("llama.cpp", {"content": "a"}, r"expected n_probs=k .* in 'completion_probabilities'"),
        ("easydistill", [[1]], "expected a list of {id: prob}"),
        ("verl", ["x"], "got str 'x', expected columns, 'teacher_ids' among them"),
        ("verl", [{"teacher_ids": [[0], [0]], "teacher_logprobs": [[0.0], [0.0]]}], "K > 1"),
        ("trl-rows", [{**V2, "teacher_topk_ids": 3}], "expected lists of numbers"),
        ("distillkit", [{}], "config: got NoneType None, expected a dict of d, k"),
        ("llamakd", [{}], "expected 'next' .row i is for token i . 1. or 'token'"),
    ],
)
def test_what_is_missing_is_named(format: str, source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        next(formats.read(format, source))
    assert len(str(caught.value)) < 500


def test_llamakd_is_told_by_its_shape() -> None:
    for targets, message in (
        ([[[-0.5], [3.0]]] * 3, r"got \[3, 2, 1\], expected \[4, 2, K\]"),
        ([[[-0.5], [3.5]]] * 4, "no whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            next(formats.read("llamakd", [{"inputs": IDS, "targets": targets}], align="next"))
    own = [(5, -9.0), (3, -0.5), (7, -3.0), (1, -0.125)]
    row = {"inputs": IDS, "targets": [[[x], [float(i)]] for i, x in own]}
    record = next(formats.read("llamakd", [row], align="token"))
    assert record.teaches.tolist() == [1, 2, 3] and record.topk.indices[:, 0].tolist() == IDS[1:]


def test_an_extra_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow.parquet", "yaml"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ImportError, match=r"needs pyarrow.*pip install '\.\[formats\]'"):
        next(formats.read("verl", tmp_path / "x.parquet"))
    (tmp_path / "compression_config.yaml").write_text("d: 12")
    with pytest.raises(ImportError, match=r"distillkit needs yaml.*pip install pyyaml"):
        next(formats.read("distillkit", tmp_path))


def test_an_option_that_a_format_does_not_take() -> None:
    for options, message in (
        ({"align": "next"}, "align: got str 'next', expected none: vllm takes none"),
        ({"tail": "none"}, "tail: got 'none', expected bucket or"),
        ({"vocab_size": 0}, "vocab_size: got 0, expected the student's, at least 1"),
        ({"dtype": "float8"}, "dtype: got 'float8', expected one of float64"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            formats.read("vllm", {}, **options)


def test_files_of_answers(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([vllm(), vllm()]))
    (tmp_path / "lines.jsonl").write_text("\n".join([json.dumps(vllm())] * 3))
    assert [len([*formats.read("vllm", tmp_path / x)]) for x in ("one.json", "lines.jsonl")] == [
        2,
        3,
    ]
    for name, format in (("x.txt", "vllm"), ("x.csv", "verl")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=r"file, expected \.(json|parquet)"):
            next(formats.read(format, tmp_path / name))
    with pytest.raises(ValueError, match=r"folder of lines.jsonl|got a folder|columns"):
        next(formats.read("verl", tmp_path))


def test_what_no_format_holds_is_not_written(tmp_path: Path) -> None:
    (record,) = formats.read("vllm", vllm(), tokens=IDS)
    hot = record._replace(topk=one(*SAID, temperature=2.0).topk)
    bare = record._replace(tokens=None)
    for format, records, message in (
        ("sglang", [record], "'sglang', which is read only, expected one of vllm, distillkit"),
        ("verl", [hot], "records: got temperature=2, expected 1: verl has no place for another"),
        ("verl", [bare], "records: got one without tokens, expected them: verl holds the ids"),
        ("axolotl-v2", [bare], "rows of other than the last tokens, expected tokens too"),
        ("distillkit", [], "records: got none"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.write(format, records, tmp_path / "out.parquet")
    with pytest.raises(ValueError, match=r"got '.txt', expected .parquet or .jsonl"):
        formats.write("verl", [record], tmp_path / "out.txt")


def test_a_report_is_read_by_people_and_programs() -> None:
    reading = formats.read("vllm", answer(SAID[0], None, SAID[1]), vocab_size=8)
    assert reading.report.sequences == 0
    assert len(list(reading)) == 1
    found = json.loads(reading.report.json())
    assert found["rows"] == 3 and found["absent_rows"] == 1 and found["beyond_vocab"] == 1
    masses = [math.exp(-0.5) + math.exp(-1.5), math.exp(-0.25) + math.exp(-3.0)]
    assert math.isclose(found["mean_mass"], sum(masses) / 2, rel_tol=1e-6)
    assert math.isclose(found["least_mass"], min(masses), rel_tol=1e-6)
    text = str(reading.report)
    assert text.startswith("vllm: 1 sequences, 3 rows (1 without a teacher), at most 2 columns")
    assert "1 ids beyond the vocabulary" in text


def test_rows_of_the_last_tokens_beside_all_ids() -> None:
    """axolotl's: they count from the start there; an empty row for the first token goes."""
    row = {"input_ids": [5, 1, 3], "target_token_ids": [[1, 2], [3, 4]]}
    row["logprobs"] = [[-0.1, -3.0], [-0.2, -2.5]]
    first = {name: x if name == "input_ids" else [[], *x] for name, x in row.items()}
    for one in (row, first):
        (record,) = formats.read("axolotl-v2", [one])
        assert record.teaches.tolist() == [1, 2] and record.aligned().shape == (2, 2)
    odd = {**row, "logprobs": [[-0.1], [-0.2, -2.5]]}
    with pytest.raises(ValueError, match=r"got 2 ids and 1 of 'logprobs' in row 0, expected as m"):
        next(formats.read("axolotl-v2", [odd]))
    with pytest.raises(ValueError, match=r"expected 'target_token_ids' \(null\)"):
        next(formats.read("axolotl-v2", [{**row, "target_token_ids": None}]))


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    for name, text, where in (("a.json", "{", "a.json: "), ("b.jsonl", "\n{oops\n", "line 2: ")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{where}got no JSON"):
            next(formats.read("vllm", tmp_path / name))
    (record,) = formats.read("easydistill", [[{"1": 0.5}, None, {}]])
    assert record.topk.indices.tolist() == [[1], [-1], [-1]]
