"""The main job at its tiny size: all stages, an interruption, other texts, bad input."""

from __future__ import annotations

import base64
import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from safetensors.torch import load_file

from bench import demo as record
from fastkd import __main__ as command
from fastkd import demo, distill
from fastkd.demo import corpus, stages
from fastkd.demo.model import Language

WORDS = "the model of a loss reads each row once and keeps nothing but its gradient".split()
SIZES = demo.PRESETS["tiny"]._replace(
    vocab=300,
    context=16,
    teacher=demo.PRESETS["tiny"].teacher._replace(steps=8, batch=4),
    student=demo.PRESETS["tiny"].student._replace(steps=8, batch=4),
    held_out=256,
    repeats=1,
)


def sentences(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(WORDS), (count, 8), generator=generator).tolist()
    return "\n".join(" ".join(WORDS[i] for i in line) + "." for line in drawn)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve files of text, one of bytes and a hidden one."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(sentences(40, i))
    (folder / "image.bin").write_bytes(bytes(range(256)))
    (folder / ".hidden").write_text("never read " * 500)
    return folder


def started(text: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"preset": SIZES, "progress": False, "device": "cpu", **options}
    return demo.run(text, out=out, **options)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nothing interrupts, and its folder."""
    out = tmp_path_factory.mktemp("whole")
    return out, started(text, out)


def test_table(whole: tuple[Path, dict[str, Any]]) -> None:
    out, found = whole
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["teacher", "hard labels", "eager", "dense", "linear", "cached"]
    assert rows["eager"]["steps"] == 4 and rows["dense"]["steps"] == rows["cached"]["steps"] == 8
    assert rows["teacher"]["agreement"] == 1.0
    assert all(0 < row["nats"] < 8 and 0 <= row["agreement"] <= 1 for row in rows.values())
    students = [row for name, row in rows.items() if name != "teacher"]
    assert all(row["step_s"] > 0 and row["peak_bytes"] > 0 for row in students)
    assert {name for name, row in rows.items() if "loss_s" in row} == {"eager", "dense"}
    assert found["text"]["files"] == 12 and found["text"]["vocab"] == 300
    assert set(found["thresholds"]) == {"gain", "loss", "step", "peak"}
    assert json.loads((out / "result.json").read_text()) == found
    plot = (out / "demo.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    page = (out / "demo.html").read_text()
    assert base64.b64encode(plot).decode() in page and page.count("<tr>") == 7
    assert not re.findall(r'(?:src|href)="(?!data:)|https?:', page)
    assert all(found["samples"].values())
    said = demo.report.text(found, out)
    assert all(f"\n{name} " in said for name in rows)


def test_every_figure_and_word_of_the_table_can_be_read(whole: tuple[Path, Any]) -> None:
    out, found = whole[0], copy.deepcopy(whole[1])
    page, said = (out / "demo.html").read_text(), demo.report.text(found, out)
    for row in found["rows"]:
        row |= {key: 1e-5 * row[key] for key in ("step_s", "loss_s") if key in row}
    head, *rows = demo.report.cells(found)
    figures = " ".join(x for row in rows for x in row[5:]) + demo.report.notes(found)
    assert not re.search(r"\b0(\.0*)? (ms|MiB|M)\b", figures)
    assert {*head[1:]} <= {*demo.report.TERMS}
    for term, about in {**demo.report.TERMS, **{x: "" for x in stages.VARIANTS}}.items():
        assert f"<dt><b>{term}</b></dt>" in page and about in said
    digits = demo.report.digits
    assert [digits(x) for x in (0, 0.0123, 1.5, 99.97, 519.4, 12345.6)] == [
        *("0.00", "0.0123", "1.50", "100", "519", "12346")
    ]


def test_no_curve_hides_another(
    whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    figure = Figure.__init__
    monkeypatch.setattr(
        Figure, "__init__", lambda own, **options: (made.append(own), figure(own, **options))[0]
    )
    demo.report.plot(whole[1], tmp_path / "plot.png")
    lines = {line.get_label(): line for line in made[0].axes[0].get_lines()}
    drawn = [lines[name] for name in ("eager", "dense", "linear")]  # one curve, three times
    assert [list(lines).index(x.get_label()) for x in drawn] == sorted(
        list(lines).index(x.get_label()) for x in drawn
    )
    widths = [(x.get_linewidth(), x.get_markersize()) for x in drawn]
    assert widths == sorted(widths, reverse=True) and len({*widths}) == 3


def test_a_run_of_the_default_size_is_recorded(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"kept\n\n{record.HEADING}\nan older table\n")
    with pytest.raises(ValueError, match="a run of other sizes"):
        record.record(whole[0], tmp_path, page)
    found = {**whole[1], "default": True, "gains": {"0": 0.2, "1": 0.3}}
    found["stages"] = {**found["stages"], "seed 1": 61.4}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(found))
    shutil.copy(whole[0] / "demo.png", folder)
    record.record(folder, tmp_path, page)
    written = page.read_text()
    assert written.startswith("kept\n\n## ") and "older" not in written
    assert written.count("\n| ") == 8 and "each further seed 61 s" in written
    assert "mean of seeds 0, 1: from 0.200 to 0.300" in written
    assert json.loads((tmp_path / "demo.json").read_text()) == found
    assert (tmp_path / "demo.png").read_bytes() == (folder / "demo.png").read_bytes()


def test_seeds_and_what_is_said(
    text: Path,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A further seed trains two students more, and every stage says what and how long."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "seconds.json").unlink()  # as if no stage had been finished
    found = started(text, out, seeds=2, progress=True)
    assert list(found["gains"]) == ["0", "1"] and found["gains"]["0"] != found["gains"]["1"]
    assert found["gains"]["0"] == whole[1]["gains"]["0"]
    reached = found["thresholds"]["gain"]["reached"]
    assert reached == pytest.approx(sum(found["gains"].values()) / 2)
    assert "mean of seeds 0, 1: from " in demo.report.notes(found)
    said = [line for line in capsys.readouterr().err.splitlines() if re.match(r"\[ *\d+ s\]", line)]
    names = ("text", "estimate", "teacher", "student, linear", "capture", "held-out text", "seed 1")
    assert all(any(f"] {name}: " in line for line in said) for name in names)
    assert all(re.search(r"; about \d+ (s|min)", line) for line in said[2:])
    monkeypatch.setattr(distill, "train", lambda *_, **__: pytest.fail("trained again"))
    assert started(text, out, seeds=2, progress=True)["gains"] == found["gains"]
    assert capsys.readouterr().err.count("there from before") == len(said)
    with pytest.raises(ValueError, match="seeds: got 0, expected 1 or more"):
        started(text, out, seeds=0)


def test_three_ways_to_one_loss(whole: tuple[Path, dict[str, Any]]) -> None:
    """Torch's loss, the fused one and the one that takes the heads over: rounding apart."""
    curves = {row["name"]: dict(map(tuple, row["curve"])) for row in whole[1]["rows"]}
    assert len(curves["eager"]) > 1
    for at, nats in curves["eager"].items():
        assert curves["dense"][at] == pytest.approx(nats, abs=1e-4)
        assert curves["linear"][at] == pytest.approx(nats, abs=1e-4)


def test_students_start_alike_and_the_teacher_is_another(text: Path, tmp_path: Path) -> None:
    tokens = corpus.load(text, tmp_path, 300, 10**5, 17)
    of = stages.Stages(SIZES, tokens, tmp_path, 0, torch.device("cpu"), False)
    first, second = of.model("dense").state_dict(), of.model("cached").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(of.batches("dense").starts, of.batches("hard labels").starts)
    assert not torch.equal(of.batches("teacher").starts, of.batches("dense").starts)


def test_the_student_loads_through_transformers(
    whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out, found = whole
    student = transformers.AutoModelForCausalLM.from_pretrained(out / "student").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "student")
    ids = tokenizer("the loss of a row", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "the loss of a row"
    assert len(tokenizer) == found["text"]["vocab"]
    twin = transformers.LlamaForCausalLM(student.config).eval()
    distill.load(twin, out / "linear.safetensors")
    with torch.no_grad():
        logits = student(ids).logits
        assert torch.equal(logits, twin(ids).logits)
        torch.testing.assert_close(Language(twin, linear=False)(ids), logits)


def test_an_interrupted_run_ends_in_the_same_bits(
    text: Path,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three times in one run, each time within another stage."""
    train = distill.train
    broken = ""

    def interrupted(student: Any, *args: Any, **options: Any) -> Any:
        look: Callable[..., None] = options["on_step"]

        def stop(epoch: int, step: int, loss: Any) -> None:
            look(epoch, step, loss)
            if options["checkpoint"].folder.name == broken and step == 5:
                raise KeyboardInterrupt

        return train(student, *args, **{**options, "on_step": stop})

    monkeypatch.setattr(distill, "train", interrupted)
    for broken in ("teacher", "linear", "cached"):
        with pytest.raises(KeyboardInterrupt):
            started(text, tmp_path)
        assert not (tmp_path / f"{broken}.safetensors").exists()
        assert list((tmp_path / "checkpoints" / broken).iterdir())
    monkeypatch.setattr(distill, "train", train)
    found = started(text, tmp_path)
    for name in ("teacher", "linear", "cached"):
        mine, theirs = (load_file(at / f"{name}.safetensors") for at in (tmp_path, whole[0]))
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    curves = [[row["curve"] for row in result["rows"]] for result in (found, whole[1])]
    assert curves[0] == curves[1]


def test_a_finished_run_is_not_made_again(
    text: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "train", lambda *_, **__: pytest.fail("trained again"))
    again = started(text, whole[0])
    assert again["rows"] == whole[1]["rows"] and again["samples"] == whole[1]["samples"]


def test_other_settings_are_refused(text: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"out: got .* of seed 0, expected 1: .* --fresh"):
        started(text, whole[0], seed=1)
    with pytest.raises(ValueError, match="of text "):
        started(text / "00.txt", whole[0])


def test_fresh_forgets_its_own_files_only(
    text: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "notes.txt").write_text("mine")
    other = started(text, out, seed=1, fresh=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert whole[1]["text"] == other["text"] and whole[1]["rows"] != other["rows"]


def test_a_small_text_has_a_small_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_text(sentences(60, 0))
    monkeypatch.setattr(stages.Stages, "trained", lambda *_, **__: pytest.fail("here"))
    with pytest.raises(pytest.fail.Exception):
        started(text, tmp_path / "out", preset=SIZES._replace(vocab=5000), progress=True)
    assert "the text has no 5000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "which is not there"),
        (lambda path: path.write_bytes(b""), r"got \d+ \S+ tokens, expected 17 or more"),
        (lambda path: path.write_text("a few words"), "tokens, expected 17 or more"),
        (lambda path: path.write_bytes(b"text\0text" * 99), "which is binary, expected text"),
        (lambda path: path.write_bytes(b"\xff\xfe" * 99), "which is binary, expected text"),
        (lambda path: path.mkdir(), "no file of text"),
        (
            lambda path: (path.mkdir(), (path / "x.png").write_bytes(b"\x89PNG\0")),
            "no file of text",
        ),
    ],
    ids=["missing", "empty", "small", "nul", "not-utf-8", "empty-folder", "binary-folder"],
)
def test_bad_text(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "text"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        started(path, tmp_path / "out")


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        (["--preset", "huge"], "--preset: got 'huge', expected one of"),
        ([str(tmp_path / "none")], "none', which is not there"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(["demo", *arguments, "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_command_line_prints_what_it_found(
    text: Path,
    whole: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(demo.PRESETS, "tiny", SIZES)
    arguments = ["demo", str(text), "--preset", "tiny", "--out", str(whole[0]), "--device", "cpu"]
    assert command.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == whole[1]["rows"]
    assert command.main(arguments) == 0
    assert demo.report.table(whole[1]) in capsys.readouterr().out
