"""The ten lines people write around a teacher: shared modules, switched modes, outputs twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastkd import distill
from fastkd.distill.batch import in_eval

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def linear(seed: int = 0, *sizes: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(*(sizes or (4, 3)))


def trunk() -> nn.Sequential:
    torch.manual_seed(7)
    parts = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.BatchNorm1d(16))
    return parts.requires_grad_(False)


def quiet(student: nn.Module, loss: Any = None, batch: Any = (X, Y), **options: Any) -> Any:
    loss = distill.soft() if loss is None else loss
    return distill.train(student, [batch] * 2, loss, progress=False, **options)


TEACHERS: dict[str, Callable[[nn.Module], Any]] = {
    "one": lambda m: m,
    "list": lambda m: [m, linear(3)],
    "weighted": lambda m: distill.EnsembleTeacher([linear(3), m], [0.2, 0.8], temperature=2.0),
    "beside a peer": lambda m: [distill.PeerTeacher(linear(3), distill.hard()), m],
    "function": lambda m: lambda x: m(x),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_shared_trunk_trains_in_the_student_and_not_in_the_teacher(kind: str) -> None:
    shared = trunk()
    teacher = nn.Sequential(shared, linear(1, 16, 3))
    student = nn.Sequential(shared, linear(2, 16, 3))
    modes: dict[str, list[bool]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_pre_hook(
            lambda *_, name=name: modes[name].append(shared[1].training)
        )
    before = shared[2].running_mean.clone()
    quiet(student, teacher=TEACHERS[kind](teacher))
    assert modes["student"] == [True, True]
    # a function's models are its own business
    assert kind == "function" or modes["teacher"] == [False, False]
    assert not torch.equal(before, shared[2].running_mean)
    assert all(part.training for part in student.modules())


def test_a_trunk_that_a_peer_shares_trains_in_the_peer() -> None:
    shared = trunk()
    frozen, peer = (nn.Sequential(shared, linear(at, 16, 3)) for at in (1, 2))
    modes: list[bool] = []
    shared[1].register_forward_pre_hook(lambda m, _: modes.append(m.training))
    quiet(linear(), teacher=[frozen, distill.PeerTeacher(peer, distill.hard())])
    assert modes == [False, True] * 2


def test_a_shared_trunk_is_recomputed_in_the_mode_of_the_forward() -> None:
    shared = trunk()
    shared[0].requires_grad_(True)

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.trunk, self.head = linear(5, 4, 4), shared, linear(2, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            found = checkpoint(self.trunk, self.first(x), use_reentrant=False)
            modes.append(shared[1].training)
            return self.head(found)

    modes: list[bool] = []
    shared.requires_grad_(False)
    student, teacher = Student(), nn.Sequential(shared, linear(1, 16, 3))
    shared[1].register_forward_pre_hook(lambda m, _: modes.append(m.training))
    quiet(student, teacher=[teacher, linear(3)])
    # of a step: the teacher's, the student's, the forward's end, and backward's recomputation
    assert modes == [False, True, True, True] * 2


def test_modes_come_back_one_by_one() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()).eval())
    before = [part.training for part in model.modules()]
    with pytest.raises(RuntimeError), in_eval(model):
        assert not any(part.training for part in model.modules())
        raise RuntimeError
    assert (
        [part.training for part in model.modules()] == before == [True, True, False, False, False]
    )


@pytest.mark.parametrize("kind", ["one", "list", "weighted", "beside a peer"])
def test_a_part_of_the_teacher_switched_to_train_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    before = teacher[1].running_mean.clone()

    def run(on_step: Any) -> list[float]:
        return [s.loss for s in quiet(linear(), teacher=TEACHERS[kind](teacher), on_step=on_step)]

    assert run(lambda *_: (teacher[1].train(), teacher[2].train())) == run(None)
    assert torch.equal(before, teacher[1].running_mean)


STORED = torch.tensor([9.0, 0, 0]).expand(8, 3)
TWICE: dict[str, Any] = {
    "tuple": (X, Y, STORED),
    "key": {"inputs": X, "labels": Y, "teacher": STORED},
    "batch": distill.Batch(X, Y, teacher=STORED),
    "weights": (X, Y, torch.rand(8)),
}


@pytest.mark.parametrize("batch", TWICE)
@pytest.mark.parametrize("kind", [*TEACHERS, "average"])
def test_a_live_teacher_and_a_stored_one_are_one_too_many(kind: str, batch: str) -> None:
    student = linear()
    make = {**TEACHERS, "average": lambda _: distill.EMATeacher(student)}[kind]
    with pytest.raises(ValueError, match=r"also a batch with its outputs.*sample weights") as got:
        quiet(student, batch=TWICE[batch], teacher=make(linear(1)))
    assert len(str(got.value)) <= 500


def test_a_list_with_a_stored_member_takes_both() -> None:
    loss = quiet(linear(), batch=TWICE["tuple"], teacher=[linear(1), distill.CachedTeacher()])[
        0
    ].loss
    mean = (linear(1)(X) + STORED).detach() / 2
    assert loss == pytest.approx(quiet(linear(), teacher=lambda _: mean)[0].loss, abs=1e-6)


def test_a_teacher_that_is_the_student_or_a_part_of_it_is_named() -> None:
    body = linear(1, 4, 4)
    student = nn.Sequential(body, linear(2))
    for teacher in (student, body, [student, linear(3)]):
        named = isinstance(teacher, nn.Module)
        match = "the student or a part of it" if named else "parameters of the teacher"
        with pytest.raises(ValueError, match=match):
            quiet(student, teacher=teacher)


class Words(nn.Module):
    """ids [B, L] -> logits [B, L, 3]"""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(words, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def test_ids_beyond_a_vocabulary_are_named() -> None:
    ids, labels = torch.tensor([[1, 2, 11]]), torch.tensor([[0, 1, 2]])
    for inputs in (ids, {"input_ids": ids}):
        for student, teacher in ((Words(12), Words(10)), (Words(10), Words(12))):
            with pytest.raises(IndexError, match=r"ids from 1 to 11, expected 0 to 9.*'embed'"):
                quiet(student, batch=distill.Batch(inputs, labels), teacher=teacher)


def test_teachers_of_different_classes_are_named() -> None:
    for temperature in (None, 2.0):
        teacher = distill.EnsembleTeacher([linear(1), linear(2, 4, 5)], temperature=temperature)
        with pytest.raises(ValueError, match=r"got logits \[\[8, 3\], \[8, 5\]\], expected equal"):
            quiet(linear(), teacher=teacher)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_teacher_of_16_bits_takes_inputs_of_32(kind: torch.dtype) -> None:
    teacher = linear(1).to(kind)
    for inputs in (X, {"input": X}):
        got = quiet(linear(), batch=distill.Batch(inputs, Y), teacher=teacher)[0].loss
        said = teacher(X.to(kind)).detach()
        want = F.kl_div(
            F.log_softmax(linear()(X) / 4, -1),
            F.log_softmax(said.float() / 4, -1),
            reduction="batchmean",
            log_target=True,
        )
        assert got == pytest.approx(16 * float(want.detach()), rel=1e-3)


def test_several_ends_of_an_answer() -> None:
    prompts, answers = torch.tensor([[3], [3]]), torch.tensor([[4, 2, 5, 1], [4, 5, 1, 2]])
    seen: list[Tensor] = []

    def note(student: Any, teacher: Any, labels: Tensor) -> Tensor:
        seen.append(labels)
        return student.sum()

    for end in ([2, 1], (1, 2), torch.tensor([1, 2])):
        distill.on_policy(
            Words(6),
            [{"inputs": prompts, "labels": prompts, "prompts": prompts}],
            note,
            teacher=Words(6),
            generate=lambda _, given: torch.cat((given, answers), 1),
            student_share=1.0,
            end=end,
            progress=False,
        )
        assert seen.pop().tolist() == [[4, 2, -100, -100], [4, 5, 1, -100]]
    with pytest.raises(TypeError, match="end: got"):
        distill.on_policy(
            Words(6), [], note, teacher=Words(6), generate=lambda _, x: x, end=2.5, progress=False
        )
