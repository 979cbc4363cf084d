"""Who wrote a batch, what of it counts, and that a run can be repeated and resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.distill import Batch, Term

V, P, END, ANSWER = 7, 3, 6, 4


class Markov(nn.Module):
    """Logits of the next token from the last one; its ids may come by name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.next = nn.Embedding(V, V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.next(input_ids)


def write(model: nn.Module, prompts: Any) -> Tensor:
    """Sampled; every row as long as any, whatever stands behind its end."""
    assert isinstance(model, Markov) and not model.training and not torch.is_grad_enabled()
    ids = prompts["input_ids"] if isinstance(prompts, dict) else prompts
    for _ in range(ANSWER):
        probability = model(ids)[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(probability, 1)), 1)
    return ids


def data(steps: int = 6, rows: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps):
        text = torch.randint(V, (rows, P + ANSWER), generator=generator)
        labels = text[:, 1:].clone()
        labels[:, : P - 1] = -100
        made.append({"inputs": text[:, :-1], "labels": labels, "prompts": text[:, :P]})
    return made


class Seen:
    """A term that keeps the batches it saw, and is GKD's loss."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        self.batches.append(batch)
        assert teacher.logits.shape == student.logits.shape
        return fastkd.js_div(student.logits, teacher.logits, labels=batch.labels)

    @property
    def origins(self) -> list[str]:
        return [batch.extra["origin"] for batch in self.batches]


def run(**options: Any) -> tuple[Seen, nn.Module, list[distill.Step]]:
    seen, student = Seen(), Markov(0)
    loader = options.pop("loader", None) or data()
    torch.manual_seed(options.pop("state", 0))
    steps = distill.on_policy(
        student,
        loader,
        Term("gkd", seen),
        teacher=options.pop("teacher", None) or Markov(1),
        generate=options.pop("generate", write),
        end=END,
        progress=False,
        lr=options.pop("lr", 0.1),
        **options,
    )
    return seen, student, steps


@pytest.mark.parametrize(
    ("shares", "origin"),
    [((0.0, 0.0), "dataset"), ((1.0, 0.0), "student"), ((0.0, 1.0), "teacher")],
)
def test_one_source_alone(shares: tuple[float, float], origin: str) -> None:
    seen, _, _ = run(student_share=shares[0], teacher_share=shares[1])
    assert seen.origins == [origin] * 6
    for batch, given in zip(seen.batches, data(), strict=True):
        assert "prompts" not in batch.extra
        same = torch.equal(batch.inputs, given["inputs"])
        assert same == (origin == "dataset")


def test_a_text_starts_with_its_prompt_and_counts_up_to_its_end() -> None:
    seen, _, _ = run(student_share=1.0)
    ended = 0
    for batch, given in zip(seen.batches, data(), strict=True):
        inputs, labels = batch.inputs, batch.labels
        assert inputs.shape == labels.shape == (4, P + ANSWER - 1)
        assert torch.equal(inputs[:, :P], given["prompts"])
        assert (labels[:, : P - 1] == -100).all()
        for row, label in zip(inputs, labels, strict=True):
            answer = label[P - 1 :].tolist()
            count = answer.index(END) + 1 if END in answer else ANSWER
            ended += count < ANSWER
            assert answer[count:] == [-100] * (ANSWER - count) and -100 not in answer[:count]
            # the label of a row is the input of the next
            assert row[P : P + count].tolist() == answer[: min(count, ANSWER - 1)]
        assert batch.tokens == int((labels != -100).sum())
    assert ended  # or the test has shown nothing of it


def test_ids_and_mask_by_name() -> None:
    loader = data()
    for batch in loader:
        mask = torch.ones_like(batch["prompts"])
        mask[0, 0] = 0  # padded on the left
        batch["prompts"] = {"input_ids": batch["prompts"], "attention_mask": mask}
    seen, _, _ = run(loader=loader, student_share=1.0)
    for batch, given in zip(seen.batches, loader, strict=True):
        mask = batch.inputs["attention_mask"]
        assert torch.equal(mask[:, :P], given["prompts"]["attention_mask"])
        # a token is seen where it was an answer's: label of the row before
        assert torch.equal(mask[:, P:].bool(), batch.labels[:, P - 1 : -1] != -100)


def test_shares_are_those_asked_for_and_follow_the_seed() -> None:
    loader = data(200, rows=1)
    seen, _, _ = run(loader=loader, student_share=0.5, teacher_share=0.2, seed=3)
    count = {name: seen.origins.count(name) for name in ("student", "teacher", "dataset")}
    # four standard deviations of a binomial of 200 draws: 28, 23 and 26
    assert abs(count["student"] - 100) < 29
    assert abs(count["teacher"] - 40) < 24
    assert abs(count["dataset"] - 60) < 27
    again, _, _ = run(loader=loader, student_share=0.5, teacher_share=0.2, seed=3, state=5)
    assert again.origins == seen.origins  # whatever torch's own state is
    other, _, _ = run(loader=loader, student_share=0.5, teacher_share=0.2, seed=4)
    assert other.origins != seen.origins


def weights(model: nn.Module) -> Tensor:
    return model.next.weight.detach().clone()


def test_a_run_repeats_itself_and_the_student_writes_as_it_is() -> None:
    one, model, _ = run(student_share=0.5)
    two, twin, _ = run(student_share=0.5)
    assert torch.equal(weights(model), weights(twin))
    pairs = zip(one.batches, two.batches, strict=True)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in pairs)
    writers: list[tuple[Tensor, bool]] = []

    def watched(model: nn.Module, prompts: Any) -> Tensor:
        writers.append((weights(model), model.training))
        return write(model, prompts)

    _, model, _ = run(student_share=1.0, generate=watched)
    assert torch.equal(writers[0][0], weights(Markov(0)))
    assert len({float(weight.sum()) for weight, _ in writers}) == 6  # moved by every step


def test_a_wrapped_student_writes_by_the_module_within() -> None:
    options: dict[str, Any] = {"student_share": 1.0, "progress": False}
    wrapped = torch.compile(Markov(0), backend="eager")
    distill.on_policy(wrapped, data(2), teacher=Markov(1), generate=write, **options)
    assert not torch.equal(weights(wrapped), weights(Markov(0)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_is_as_never_interrupted(tmp_path: Path, stop: int, accumulate: int) -> None:
    options: dict[str, Any] = {"student_share": 0.5, "teacher_share": 0.2, "epochs": 2}
    options["accumulate"] = accumulate
    whole, model, steps = run(**options, checkpoint=tmp_path / "whole")

    def halt(_: int, step: int, __: Tensor) -> None:
        if step == stop:
            raise KeyboardInterrupt

    points = distill.Checkpoints(tmp_path / "part", every=1)
    with pytest.raises(KeyboardInterrupt):
        run(**options, checkpoint=points, on_step=halt)
    written: list[Any] = []

    def counted(model: nn.Module, prompts: Any) -> Tensor:
        written.append(prompts)
        return write(model, prompts)

    points = distill.Checkpoints(tmp_path / "part", every=1, resume=True)
    rest, resumed, after = run(**options, checkpoint=points, generate=counted, state=99)
    assert torch.equal(weights(model), weights(resumed))
    assert rest.origins == whole.origins[stop * accumulate :]
    assert [step.loss for step in after] == [step.loss for step in steps][stop:]
    # nothing is written for the batches that are skipped
    assert len(written) == sum(origin != "dataset" for origin in rest.origins)


def test_micro_batches_share_by_the_tokens_that_were_written() -> None:
    """Two of a step are the mean over their tokens, though answers end where they like."""
    with torch.no_grad():
        fixed = [write(Markov(2).eval(), batch["prompts"]) for batch in data()]

    def recited() -> Callable[[nn.Module, Any], Tensor]:
        rest = iter(fixed)
        return lambda model, prompts: next(rest)

    seen, split, _ = run(student_share=1.0, generate=recited(), accumulate=6)
    assert len({batch.tokens for batch in seen.batches}) > 1
    inputs = torch.cat([batch.inputs for batch in seen.batches])
    labels = torch.cat([batch.labels for batch in seen.batches])
    _, joint, _ = run(loader=[{"inputs": inputs, "labels": labels}], student_share=0.0)
    torch.testing.assert_close(weights(split), weights(joint))


def test_a_student_learns_from_what_it_writes() -> None:
    teacher, student = Markov(1), Markov(0)
    with torch.no_grad():
        teacher.next.weight.mul_(2)
    every = torch.arange(V)

    def apart() -> float:
        return float(fastkd.kl_div(student(every), teacher(every)).detach())

    before = apart()
    options: dict[str, Any] = {"student_share": 1.0, "lr": 0.1, "epochs": 20, "progress": False}
    torch.manual_seed(0)
    kept = copy.deepcopy(teacher.state_dict())
    steps = distill.on_policy(student, data(), teacher=teacher, generate=write, **options)
    assert apart() < 0.2 * before
    assert steps[-1].loss < 0.3 * steps[0].loss
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"student_share": 1.5}, "student_share: got 1.5, expected a number from 0"),
        (ValueError, {"teacher_share": 0.6}, "teacher_share: got 0.6 beside a student_share of"),
        (
            TypeError,
            {"teacher_share": 0.1, "teacher": lambda inputs: torch.zeros(1)},
            "teacher: got function with a teacher_share, expected a module",
        ),
        (
            ValueError,
            {"student_share": 1.0, "generate": lambda model, prompts: prompts},
            r"generate: got \(4, 3\), expected ids \[B, P \+ A\] that start with the prompts",
        ),
        (
            ValueError,
            {"student_share": 1.0, "generate": lambda model, prompts: torch.zeros(4, 9).long()},
            r"generate: got \(4, 9\), expected ids",
        ),
        (
            ValueError,
            {"student_share": 1.0, "loader": [(torch.zeros(2, 3).long(),) * 2]},
            "loader: got a batch without prompts",
        ),
    ],
)
def test_bad_arguments(error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**options)
