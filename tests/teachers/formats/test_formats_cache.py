"""Other tools' files into a store and out of it, by hand and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from format_samples import IDS, SAID, TRL_ROWS, V2, V, vllm

import fastkd
from fastkd.__main__ import main
from fastkd.teachers import formats, store
from fastkd.teachers.formats.cache import export_cache, import_cache

pytest.importorskip("safetensors")


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_imported_file_is_a_store_like_any_other(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", TRL_ROWS, TRL_ROWS)
    report = import_cache("trl-rows", source, tmp_path / "cache", vocab_size=V)
    assert report.sequences == 2 and report.rows == 6 and report.columns == 3
    reader = store.Reader(tmp_path / "cache", vocab_size=V)
    assert len(reader) == 2 and reader.complete and reader.spec.data == "trl-rows: rows.jsonl"
    dataset = [{"input_ids": IDS, "labels": IDS}] * 2
    batch = store.collate(list(store.Paired(dataset, reader)), labels="shifted")
    said = next(formats.read("trl-rows", [TRL_ROWS])).topk
    student = torch.randn(2, 4, V)
    losses = fastkd.kl_div(student, batch["teacher"], labels=batch["labels"], reduction="none")
    wanted = fastkd.kl_div(student[0, :3], said, reduction="none")
    assert torch.allclose(losses[0, :3], wanted, atol=0.1)  # 8 bits a log-probability
    assert losses[:, 3].eq(0.0).all()


def test_an_import_goes_on_where_it_ended(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", TRL_ROWS)
    import_cache("trl-rows", source, tmp_path / "cache", vocab_size=V)
    lines(source, TRL_ROWS, TRL_ROWS, TRL_ROWS)
    import_cache("trl-rows", source, tmp_path / "cache", vocab_size=V)
    assert len(store.Reader(tmp_path / "cache")) == 3
    lines(source)
    with pytest.raises(ValueError, match="source: got no sequence"):
        import_cache("trl-rows", source, tmp_path / "other", vocab_size=V)
    assert not (tmp_path / "other").exists()


def test_a_store_is_exported(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", TRL_ROWS)
    import_cache("trl-rows", source, tmp_path / "cache", vocab_size=V)
    with pytest.raises(ValueError, match="records: got one without tokens"):
        export_cache(tmp_path / "cache", "trl-rows", tmp_path / "out.jsonl")
    out = tmp_path / "out.jsonl"
    for ids in ([IDS], source):
        assert export_cache(tmp_path / "cache", "trl-rows", out, tokens=ids) == 1
        (record,) = formats.read("trl-rows", out, tail="renormalize")
        assert record.labels().tolist() == IDS[1:]
        assert [[i for i in row if i >= 0] for row in record.topk.indices.tolist()] == [
            [*row] for row in SAID
        ]
    with pytest.raises(ValueError, match="tokens: got 2 ids for the 3 rows of sample 0"):
        export_cache(tmp_path / "cache", "trl-rows", out, tokens=[IDS[:2]])
    store_of_logits = tmp_path / "logits"
    with store.Writer(store_of_logits, vocab_size=V) as writer:
        writer.add(torch.randn(3, V))
    with pytest.raises(ValueError, match=r"got Tensor \[3, 12\], expected samples of TopK"):
        export_cache(store_of_logits, "trl-rows", out, tokens=[IDS])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps(vllm(prompt_token_ids=IDS)))
    cache, out = tmp_path / "cache", tmp_path / "out.jsonl"
    command = ["cache", "import", "--from", "vllm", str(answer), str(cache), "--vocab-size", str(V)]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("vllm: 1 sequences, 3 rows")
    assert main(["cache", "verify", str(cache)]) == 0
    capsys.readouterr()
    ids = lines(tmp_path / "ids.jsonl", {"input_ids": IDS})
    command = ["cache", "export", "--to", "axolotl-v2", str(cache), str(out)]
    assert main([*command, "--tokens", str(ids)]) == 0
    assert "1 samples" in capsys.readouterr().out
    assert next(formats.read("axolotl-v2", out)).labels().tolist() == IDS[1:]
    assert main(command) == 1 and "expected tokens too" in capsys.readouterr().err

    rows = lines(
        tmp_path / "rows.jsonl", {key: V2[key] for key in ("logprobs", "target_token_ids")}
    )
    command = ["cache", "import", "--from", "axolotl-v2", str(rows), str(tmp_path / "second")]
    command += ["--vocab-size", str(V), "--json"]
    assert main(command) == 1 and "count from the end" in capsys.readouterr().err
    assert main([*command, "--tokens", str(ids), "--tail", "bucket"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    (said,) = store.Reader(tmp_path / "second")
    assert said.tail == "bucket" and said.size(0) == 3
    assert main([*command[:4], str(rows), str(tmp_path / "third"), "--vocab-size", "0"]) == 1
