"""Teachers by sample, of the student itself, and under another prompt, against loops by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_runs import equal, quiet, weights

import fastkd
from fastkd import distill
from fastkd.distill import Batch

V, L = 11, 6


class Net(nn.Module):
    """A causal model of ids; `asked` are the samples of each of its forwards."""

    def __init__(self, seed: int = 0, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.cell = nn.Embedding(V, width), nn.GRU(width, width, batch_first=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width, V)
        self.asked: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
        self.asked.append(len(input_ids))
        hidden = self.cell(self.table(input_ids))[0]
        return self.head(self.drop(hidden))


def rows(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids, and labels of the token behind each; some rows have none."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V, (size, L), generator=chance)
    labels = ids.roll(-1, 1).masked_fill(torch.rand(size, L, generator=chance) < 0.4, -100)
    labels[:, -1] = -100
    return ids, labels


def calm(student: Net) -> Net:
    student.drop.p = 0.0  # draws of the two loops would differ
    return student


TERM = distill.soft(temperature=2.0, rows="labelled")


def by_hand(student: Net, batches: list[Any], teach: Any, steps: int = 2) -> Net:
    """Steps of two micro-batches, row by row: 4 KL(p, q) at T = 2, over the labels of a step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    student.train()
    for step in range(steps):
        two = batches[2 * step : 2 * step + 2]
        count = sum(int((batch["labels"] != -100).sum()) for batch in two)
        for batch in two:
            for b, (ids, labels) in enumerate(zip(batch["inputs"], batch["labels"], strict=True)):
                student.drop.p, p = 0.0, student.drop.p
                said = teach(batch, b)
                logits = student(ids[None])[0]
                student.drop.p = p
                losses = [logits.sum() * 0.0]
                for i in (labels != -100).nonzero().flatten().tolist():
                    log_p = (said[i].double() / 2).log_softmax(-1)
                    log_q = (logits[i].double() / 2).log_softmax(-1)
                    losses.append(4 * (log_p.exp() * (log_p - log_q)).sum() / count)
                torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def trained(student: Net, batches: list[Any], teacher: Any, **options: Any) -> Net:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    quiet(student, batches, TERM, teacher=teacher, optimizer=optimizer, accumulate=2, **options)
    return student


def assert_same(a: Net, b: Net) -> None:
    for x, y in zip(weights(a).values(), weights(b).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# ---- by sample


def named_batches(names: list[Any]) -> list[dict[str, Any]]:
    made, at = [], 0
    for seed, size in enumerate((4, 2, 3, 3)):
        ids, labels = rows(size, seed)
        of = names[at : at + size]
        made.append({"inputs": ids, "labels": labels, "teacher_id": of})
        at += size
    return made


NAMES = ["math", "code", "math", "chat", "code", "code", *["chat", "math", "code"] * 2]


def test_a_dict_of_teachers() -> None:
    teachers = {name: Net(i + 1, 5 + i).eval() for i, name in enumerate(("math", "code", "chat"))}
    batches, student = named_batches(NAMES), Net()
    expected = by_hand(
        calm(copy.deepcopy(student)),
        batches,
        lambda batch, b: teachers[batch["teacher_id"][b]](batch["inputs"][b][None])[0].detach(),
    )
    for teacher in teachers.values():
        teacher.asked.clear()
    ours = trained(calm(student), batches, teachers)
    assert_same(ours, expected)
    assert teachers["math"].asked == [2, 1, 1]  # once a batch, its own rows; never on none
    assert teachers["code"].asked == [1, 2, 1, 1] and teachers["chat"].asked == [1, 1, 1]


@pytest.mark.parametrize("widths", [(3, 5), (5, 5)])
def test_top_k_teachers_by_number(widths: tuple[int, int]) -> None:
    nets = [Net(i + 1) for i in range(2)]

    def top(net: Net, k: int) -> Any:
        return lambda ids: fastkd.topk_from_logits(net.eval()(ids), k, temperature=2.0)

    teachers = {7: top(nets[0], widths[0]), 3: top(nets[1], widths[1])}
    ids, labels = rows(5)
    of = torch.tensor([3, 7, 7, 3, 3])
    batch = Batch(ids, labels, extra={"teacher": of}, samples=5)
    said = distill.RoutedTeacher(teachers, by="teacher")(batch).logits
    student = torch.randn(5, L, V)
    loss = fastkd.kl_div(student, said, temperature=2.0, reduction="none")
    for b in range(5):
        own = teachers[int(of[b])](ids[b][None])
        expected = fastkd.kl_div(student[b][None], own, temperature=2.0, reduction="none")
        torch.testing.assert_close(loss[b], expected[0])


def test_routes_that_lead_nowhere() -> None:
    ids, labels = rows(2)
    teachers: dict[Any, Any] = {"a": Net(1), "b": Net(2)}
    for column, match in (
        (["a", "c"], "teacher_id: got 'c' in sample 1 of the batch, expected one of"),
        (["a"], "teacher_id: got list .* for 2 samples"),
        (None, "teacher_id: got none for 2 samples"),
        (torch.tensor([0, 1]), "teacher_id: got 0 in sample 0"),
    ):
        batch = {"inputs": ids, "labels": labels}
        batch |= {} if column is None else {"teacher_id": column}
        with pytest.raises(ValueError, match=match):
            trained(Net(), [batch], teachers)
    routed = distill.RoutedTeacher({"a": Net(1), "b": lambda x: Net(2)(x)[..., :-1]})
    batch_ = Batch(ids, labels, extra={"teacher_id": ["b", "a"]}, samples=2)
    with pytest.raises(ValueError, match=r"teachers: got .* one vocabulary"):
        routed(batch_)
    few = lambda x: fastkd.topk_from_logits(Net()(x), 3)  # noqa: E731
    routed = distill.RoutedTeacher({"a": Net(1), "b": few})
    with pytest.raises(TypeError, match=re.escape("teachers: got ['Tensor', 'TopK']")):
        routed(batch_)
    with pytest.raises(TypeError, match="teachers: got a PeerTeacher"):
        distill.RoutedTeacher({"a": distill.PeerTeacher(Net(), TERM)})
    with pytest.raises(TypeError, match=re.escape("expected {name: teacher}")):
        distill.RoutedTeacher([Net(), Net()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="teachers: got none"):
        trained(Net(), [], {})


# ---- the student without its adapter, and as it was


class Adapted(nn.Module):
    """A student with an adapter as PEFT's: switching back on sets requires_grad of its weights."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.net, self.on, self.fails = Net(), True, fails
        self.net.requires_grad_(False)
        self.a, self.b = nn.Linear(V, 2, bias=False), nn.Linear(2, V, bias=False)
        self.a.requires_grad_(False)  # trained by nobody
        self.modes: list[tuple[bool, bool]] = []

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.on = False
        for p in (*self.a.parameters(), *self.b.parameters()):
            p.requires_grad_(False)
        try:
            yield
        finally:
            self.on = True
            for p in (*self.a.parameters(), *self.b.parameters()):
                p.requires_grad_(True)

    def forward(self, ids: Tensor) -> Tensor:
        self.modes.append((self.on, self.net.drop.training))
        if self.fails and not self.on:
            raise RuntimeError("out of memory")
        z = self.net(ids)
        return z + self.b(self.a(z)) if self.on else z


def batches_of() -> list[dict[str, Any]]:
    return [{"inputs": x, "labels": y} for x, y in (rows(3, seed) for seed in range(4))]


def test_the_student_without_its_adapter() -> None:
    torch.manual_seed(0)
    student = Adapted()
    calm(student.net)
    live, base = copy.deepcopy(student), copy.deepcopy(student.net).eval()
    for model, teacher in ((student, "base"), (live, base)):
        optimizer = torch.optim.SGD(model.b.parameters(), lr=0.5)
        options = {"optimizer": optimizer, "accumulate": 2, "epochs": 2}
        quiet(model, batches_of(), TERM, teacher=teacher, **options)
    assert equal(weights(student), weights(live))
    assert student.modes == [(False, False), (True, True)] * 8
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    assert [name for name, flag in flags.items() if flag] == ["b.weight"]


def test_what_fails_leaves_the_student_as_it_was() -> None:
    student = Adapted(fails=True).eval()
    flags = [p.requires_grad for p in student.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        quiet(student, batches_of(), TERM, teacher="base")
    assert [p.requires_grad for p in student.parameters()] == flags and student.on
    assert not any(part.training for part in student.modules())
    for teacher, match in (
        ("base", "teacher: got 'base' for Net, which has no adapter to leave out"),
        ("bse", r"teacher: got 'bse', expected one of \['base', 'ema'\]"),
    ):
        with pytest.raises(ValueError, match=match):
            quiet(Net(), batches_of(), TERM, teacher=teacher)


def test_the_student_as_it_was() -> None:
    """`ema` by name is an EMATeacher of the student; with `every` it is an older self."""
    named, made = calm(Net()), calm(Net())
    trained(named, batches_of(), "ema")
    trained(made, batches_of(), distill.EMATeacher(made))
    assert equal(weights(named), weights(made))
    student, batches = calm(Net()), batches_of() * 2
    older, selves = distill.EMATeacher(decay=0.0, every=2), []
    trained(student, batches, older, on_step=lambda *_: selves.append(weights(student)))
    assert equal(weights(older.model), selves[3])  # taken after steps 2 and 4
    state = older.state_dict()
    again = distill.EMATeacher(Net(3), 0.0, every=2)
    again.load_state_dict(state)
    again.step(Net(5))
    assert equal(weights(again.model), selves[3])
    again.step(Net(5))
    assert equal(weights(again.model), weights(Net(5)))
    with pytest.raises(ValueError, match="every: got 0"):
        distill.EMATeacher(every=0)


# ---- another prompt

PROMPTS = [[3, 4], [5], [6, 7, 8]]


def padded(side: str) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Samples of 6, 4 and 5 tokens; labels from their third token on."""
    chance = torch.Generator().manual_seed(5)
    own = [torch.randint(1, V, (size,), generator=chance) for size in (6, 4, 5)]
    ids, mask = torch.zeros(3, L, dtype=torch.long), torch.zeros(3, L, dtype=torch.long)
    labels = torch.full((3, L), -100)
    for b, row in enumerate(own):
        start = L - len(row) if side == "left" else 0
        ids[b, start : start + len(row)], mask[b, start : start + len(row)] = row, 1
        labels[b, start + 1 : start + len(row) - 1] = row[2:]
    return {"input_ids": ids, "attention_mask": mask}, labels, own


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"after": 1}, {"after": 2}, {"replace": True}])
@pytest.mark.parametrize("own_prompts", [True, False])
def test_a_teacher_with_another_prompt(side: str, options: Any, own_prompts: bool) -> None:
    net = Net(1).eval()
    inputs, labels, own = padded(side)
    column = PROMPTS if own_prompts else [PROMPTS[2]] * 3
    teacher = distill.PromptedTeacher(
        net, "teacher_prompt" if own_prompts else PROMPTS[2], **options
    )
    batch = Batch(inputs, labels, extra={"teacher_prompt": column}, samples=3)
    said = teacher(batch).logits
    assert said.shape == (3, L, V)
    keep = options.get("after", 0)
    for b, (row, prompt) in enumerate(zip(own, column, strict=True)):
        cut = 2 if options.get("replace") else keep
        reads = torch.cat([row[:keep], torch.tensor(prompt), row[cut:]])
        alone = net(reads[None])[0]
        answers = alone[-(len(row) - 2) - 1 : -1]  # the rows that predict tokens 2 and further
        torch.testing.assert_close(said[b][labels[b] != -100], answers)
        if side == "right" and keep == 2:  # and of what stays in front of the prompt
            torch.testing.assert_close(said[b, 0], alone[0])


def test_prompts_in_training() -> None:
    """The student with its own frozen self that has read a prompt; steps of two batches."""
    student = calm(Net())
    frozen = copy.deepcopy(student).eval()
    batches = [{**batch, "teacher_prompt": PROMPTS} for batch in batches_of()]

    def teach(batch: dict[str, Any], b: int) -> Tensor:
        reads = torch.cat([torch.tensor(PROMPTS[b]), batch["inputs"][b]])
        return frozen(reads[None])[0, len(PROMPTS[b]) :].detach()

    expected = by_hand(copy.deepcopy(student), batches, teach)
    ours = trained(student, batches, distill.PromptedTeacher(frozen, "teacher_prompt"))
    assert_same(ours, expected)
    for prompt in ([[3, -100, -100]] * 3, torch.tensor([[3, -100, -100]] * 3)):
        alike = [{**batch, "teacher_prompt": prompt} for batch in batches_of()]
        found = trained(calm(Net()), alike, distill.PromptedTeacher("ema", "teacher_prompt"))
        one = trained(calm(Net()), batches_of(), distill.PromptedTeacher("ema", [3]))
        assert equal(weights(found), weights(one))


def test_prompts_by_name() -> None:
    ids, labels = rows(2)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)}
    for made, batch, match in (
        ({"prompt": "p"}, Batch(ids, labels), "p: got none for 2 samples"),
        ({"prompt": "p"}, Batch(ids, labels, extra={"p": [[1]]}), "p: got 1 for 2 samples"),
        ({"prompt": "p"}, Batch(ids, labels, extra={"p": ["ab", "c"]}), "p: got 'ab'"),
        ({"prompt": [1], "replace": True}, Batch(ids), "labels: got none of the ids' shape"),
        ({"prompt": [1]}, Batch(torch.randn(2, 3)), r"inputs: got .*expected ids \[B, L\]"),
        ({"prompt": [1]}, Batch(packed), "position_ids: got packed samples"),
        ({"prompt": [0.5]}, None, "prompt: got torch.float32"),
        ({"prompt": [1], "after": -1}, None, "after: got -1"),
        ({"prompt": [1], "after": 1, "replace": True}, None, "after: got 1 with replace=True"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            distill.PromptedTeacher(Net(), **made)(batch)
