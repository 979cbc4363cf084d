"""Training, capture and on-policy texts with a teacher that is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import VOCAB, llama, ragged, together
from served_model import NAME, Server, local, serving
from torch import Tensor
from torch.utils.data import DataLoader

import fastkd
from fastkd import distill
from fastkd.teachers import Served, store

K = 8
APIS = ("vllm", "openai", "sglang", "trl", "llama.cpp")


def batches(steps: int = 10) -> list[dict[str, Any]]:
    rows = ragged(4 * steps, seed=2)
    made = []
    for at in range(0, len(rows), 4):
        batch = together(rows[at : at + 4])
        labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
        made.append({"inputs": batch, "labels": labels})
    return made


def trained(teacher: Any, loader: Any = None, **options: Any) -> list[float]:
    student = llama(1)
    terms = [distill.soft(temperature=1.0, rows="labelled")]
    steps = distill.train(
        student, loader or batches(), terms, teacher=teacher, progress=False, lr=1e-2, **options
    )
    return [step.loss for step in steps]


def test_ten_steps_are_those_of_a_module_and_its_topk(server: Server) -> None:
    def module(inputs: Any) -> fastkd.TopK:
        return fastkd.topk_from_logits(local(server, inputs), K)

    with Served(server.url, k=K) as teacher:
        found = trained(teacher)
    assert teacher.vocab_size == VOCAB  # the student's
    assert found == pytest.approx(trained(module), rel=1e-4) and len(found) == 10
    assert found[-1] < found[0]


def test_batches_are_asked_for_ahead_of_their_step(server: Server) -> None:
    taken, seen = [], []

    def loader() -> Iterator[Any]:
        for number, batch in enumerate(batches(5)):
            taken.append(number)
            yield batch

    for options in ({}, {"ahead": 0}, {"accumulate": 2}):
        taken.clear()
        with Served(server.url, k=K, ahead=1) as teacher:
            trained(teacher, loader(), on_step=lambda *_: seen.append(len(taken)), **options)
    assert seen == [2, 3, 4, 5, 5, 1, 2, 3, 4, 5, 3, 5, 5]


def test_teachers_of_served_ones_hand_on_what_is_ahead(server: Server) -> None:
    data = [{**x, "teacher_id": list("abab")} for x in batches(4)]

    def ids(inputs: Any) -> fastkd.TopK:
        return fastkd.topk_from_logits(local(server, inputs), K)

    for make in (
        lambda one: {"a": one, "b": ids},
        lambda one: distill.PromptedTeacher(one, [5, 6], after=1),
        lambda one: distill.PromptedTeacher({"a": ids, "b": one}, [7], replace=True),
    ):
        server.requests.clear()
        seen: list[int] = []
        with Served(server.url, k=K, ahead=1) as one:
            count = lambda *_: seen.append(len(one._waiting))  # noqa: E731, B023
            found = trained(make(one), data, on_step=count)
            assert one.asked == len(server.requests)
        assert found == pytest.approx(trained(make(ids), data), rel=1e-4)
        assert all(seen[:3]) and seen[3] == 0


def test_an_ensemble_and_an_ahead_that_are_not_known(server: Server) -> None:
    with Served(server.url, k=K) as one:
        both = distill.EnsembleTeacher([one, llama(8)])
        assert both.ahead_by == 2 and distill.EnsembleTeacher([llama(8)]).ahead_by is None
        with pytest.raises(TypeError, match="teachers: got TopK of 1 of 2 teachers, expected"):
            trained(both)
        for wrong in ("2", -1, True, 1.5):
            with pytest.raises(ValueError, match=r"ahead: got .*, expected an integer >= 0"):
                trained(one, ahead=wrong)
    with pytest.raises(TypeError, match=r"headers: got something else, expected \{name: value\}"):
        Served(server.url, headers={"Authorization": 3})  # type: ignore[dict-item]
    with pytest.raises(FileExistsError, match=r"keep: got .*, which cannot be a folder"):
        Served(server.url, keep=__file__)


def test_a_text_of_two_batches_is_asked_for_once(server: Server) -> None:
    batch = batches(1)[0]
    with Served(server.url, k=K) as teacher:
        for _ in range(2):
            teacher.prefetch(batch["inputs"], batch["labels"])
        for _ in range(2):
            teacher.score(batch["inputs"], batch["labels"])
        assert len(server.requests) == teacher.asked == 4 and not teacher._waiting


def test_an_interrupted_run_pays_nothing_twice(server: Server, tmp_path: Path) -> None:
    data, answers = batches(6), tmp_path / "answers"
    checkpoint = distill.Checkpoints(tmp_path / "run", every=1)
    options = {"checkpoint": checkpoint, "loader": data}
    server.faults = [""] * 13 + ["dies"] * 100
    with Served(server.url, k=K, keep=answers, retries=0) as teacher:
        with pytest.raises(ConnectionError):
            trained(teacher, **options)
    answered = len([*answers.rglob("*.safetensors")])
    assert answered == 13 and not [*answers.rglob("*.tmp")]
    with serving(server.score.model) as server, Served(server.url, k=K, keep=answers) as teacher:
        options["checkpoint"] = distill.Checkpoints(tmp_path / "run", every=1, resume=True)
        losses = trained(teacher, **options)
        assert len(server.requests) == teacher.asked == 24 - answered
        assert len({json.dumps(x) for x in server.requests}) == len(server.requests)
    # a third run asks nobody, and needs no server where the model's name is known
    with Served("http://127.0.0.1:1", k=K, keep=answers, model=NAME) as teacher:
        again = trained(teacher, loader=data)
        assert teacher.asked == 0 and again[-len(losses) :] == losses
        assert teacher.identity() == ["Served", "vllm", NAME, K, False, 1.0, None]
        # other columns are another question; ids beyond a vocabulary are seen in a kept answer too
        teacher.vocab_size = 5
        with pytest.raises(ValueError, match="expected ids below vocab_size=5"):
            teacher.score(data[0]["inputs"], data[0]["labels"])
    file = next(answers.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    with Served("http://127.0.0.1:1", k=K, keep=answers, model=NAME) as teacher:
        with pytest.raises(ValueError, match=r"keep: got .*remove that file to ask again"):
            trained(teacher, loader=data)
    with Served("http://127.0.0.1:1", api="trl", k=K, keep=answers) as teacher:
        with pytest.raises(ValueError, match="model: got none beside keep="):
            trained(teacher, loader=data)


def test_a_store_is_captured_from_a_server_behind_workers(server: Server, tmp_path: Path) -> None:
    rows = torch.randint(3, VOCAB, (6, 7))
    loader = DataLoader(rows, batch_size=4, num_workers=1)  # type: ignore[arg-type]
    with Served(server.url, k=K) as teacher:
        done = store.capture(teacher, loader, tmp_path / "s", vocab_size=VOCAB, k=K, progress=False)
    expected = fastkd.topk_from_logits(local(server, rows), K)
    reader = store.Reader(tmp_path / "s")
    assert done == len(reader) == 6
    student = torch.randn(7, VOCAB)
    for number, said in enumerate(reader):
        ours = fastkd.kl_div(student, said)
        assert float(ours) == pytest.approx(
            float(fastkd.kl_div(student, expected[number])), abs=1e-2
        )


@pytest.mark.parametrize("labels", ["shifted", "input_ids", None])
def test_a_capture_asks_ahead_for_the_rows_that_count(
    labels: str | None, server: Server, tmp_path: Path
) -> None:
    taken: list[int] = []
    seen: list[int] = []
    rows = ragged(12)
    data = [together(rows[at : at + 4]) for at in range(0, 12, 4)]
    if labels == "shifted":
        data = [
            {**x, "labels": torch.nn.functional.pad(x["labels"][:, 1:], (0, 1), value=-100)}
            for x in data
        ]
    if labels is None:
        data = [{k: x for k, x in batch.items() if k != "labels"} for batch in data]

    def loader() -> Iterator[Any]:
        for batch in data:
            taken.append(len(taken))
            yield batch

    options: Any = {"vocab_size": VOCAB, "k": K, "labels": labels, "progress": False}
    with Served(server.url, k=K, ahead=1) as teacher:
        score = teacher.score
        teacher.score = lambda *x: (seen.append(len(taken)), score(*x))[1]  # type: ignore[method-assign]
        store.capture(teacher, loader(), tmp_path / "s", **options)
        assert seen == [2, 3, 3] and not teacher._waiting
        store.capture(teacher, loader(), tmp_path / "s", **options)  # nothing is missing
        assert teacher.asked == len(server.requests) == 12 + 4
    store.capture(server.score.model, data, tmp_path / "m", **options)
    one, other = store.Reader(tmp_path / "s"), store.Reader(tmp_path / "m")
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.indices, b.indices)
    prompted = distill.PromptedTeacher(server.score.model, [5], after=1)
    store.capture(prompted, data, tmp_path / "p", **options)
    assert not all(torch.equal(*x) for x in _indices(store.Reader(tmp_path / "p"), one))


def _indices(*readers: store.Reader) -> list[tuple[Tensor, ...]]:
    return [tuple(x.indices for x in said) for said in zip(*readers, strict=True)]


class Policy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.next = torch.nn.Embedding(VOCAB, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.next(ids)
        return found


@pytest.mark.parametrize(("ahead", "accumulate"), [(0, 1), (0, 2), (1, 1)])
def test_the_students_own_text_is_scored(ahead: int, accumulate: int, server: Server) -> None:
    events: list[str] = []

    def generate(model: torch.nn.Module, prompts: Tensor) -> Tensor:
        events.append("written")
        for _ in range(4):
            drawn = torch.multinomial(model(prompts)[:, -1].softmax(-1), 1)
            prompts = torch.cat((prompts, drawn), 1)
        return prompts

    def run(teacher: Any) -> list[float]:
        student = Policy()
        torch.manual_seed(5)
        data = [{"inputs": torch.zeros(2, 3).long(), "labels": torch.zeros(2, 3).long()}] * 4
        data = [{**x, "prompts": torch.full((2, 3), 4 + i)} for i, x in enumerate(data)]
        steps = distill.on_policy(
            *(student, data),
            distill.response(distill.sampled_reverse_kl, estimator="k1"),
            teacher=teacher,
            generate=generate,
            student_share=1.0,
            ahead=ahead,
            accumulate=accumulate,
            progress=False,
            on_step=lambda *_: events.append("step"),
        )
        return [step.loss for step in steps]

    with Served(server.url, k=0) as teacher:
        found = run(teacher)
    order = list(events)
    with Served(server.url, k=0) as teacher:
        assert run(teacher) == pytest.approx(found, abs=1e-6)  # the same draws
    assert len(server.requests) == 2 * 8 and len(found) == 4 // accumulate
    whole = ["written", "step"] * 4
    if accumulate == 2:
        whole = ["written", "written", "step"] * 2
    if ahead:
        whole = ["written", *["written", "step"] * 3, "step"]
    assert order == whole
    if ahead:
        with pytest.raises(ValueError, match="ahead: got 1 with a checkpoint"):
            distill.on_policy(
                *(Policy(), []), teacher=Policy(), generate=generate, ahead=1, checkpoint="x"
            )
