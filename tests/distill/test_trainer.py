"""Terms and accumulation: the gradient is the same however a step is split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_runs import Tokens, a_run, equal, mlp, mse, quiet, ragged, weights

import fastkd
from fastkd import distill
from fastkd.distill import Batch, Term


def test_loss_is_the_weighted_sum_of_its_terms(loader: Any) -> None:
    teacher, student = mlp(16), mlp()
    twin = copy.deepcopy(student)
    terms = [distill.hard(0.3), distill.soft(0.7, temperature=3.0)]
    steps = quiet(student, loader, terms, teacher=teacher)
    plain = quiet(
        twin,
        loader,
        lambda s, t, y: fastkd.distillation_loss(s, t, y, temperature=3.0, alpha=0.3),
        teacher=teacher,
    )
    for a, b in zip(steps, plain, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.loss == pytest.approx(0.3 * a.terms["hard"] + 0.7 * a.terms["soft"], rel=1e-6)
        assert b.terms == {}
    for a, b in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weights_and_temperatures_follow_the_step(loader: Any) -> None:
    asked: list[int] = []
    factor = [1.0, 0.5, 0.0, 2.0, 1.0, 1.0]

    def temperature(step: int) -> float:
        asked.append(step)
        return 1.0 + step

    terms = [distill.hard(lambda step: factor[step]), distill.soft(temperature=temperature)]
    steps = quiet(mlp(), loader, terms, teacher=mlp())
    assert asked == list(range(6))
    for step, f in zip(steps, factor, strict=True):
        assert step.loss == pytest.approx(f * step.terms["hard"] + step.terms["soft"], rel=1e-5)


def test_soft_leaves_out_unlabelled_rows_only_when_asked(loader: Any) -> None:
    student, teacher = mlp(), mlp()
    inputs, labels = loader[0][0], loader[0][1].clone()
    labels[3:] = -100
    s, t = student(inputs), teacher(inputs).detach()
    for rows, kept in (("all", slice(None)), ("labelled", slice(3))):
        term = distill.soft(temperature=2.0, rows=rows)
        steps = quiet(copy.deepcopy(student), [(inputs, labels)], term, teacher=teacher)
        expected = fastkd.distillation_loss(s[kept], t[kept], alpha=0.0, temperature=2.0)
        assert steps[0].loss == pytest.approx(expected.item(), rel=1e-5)


SPLITS = [(12,), (6, 6), (3, 3, 3, 3), (5, 4, 3), (8, 2, 2), (1,) * 12]


TERMS: dict[str, Callable[[], Any]] = {
    "hard and soft": lambda: [
        distill.hard(0.4),
        distill.soft(0.6, temperature=2.0, rows="labelled"),
    ],
    "normalizer": lambda: Term(
        "kl",
        lambda s, t, b: fastkd.kl_div(s.logits, t.logits, labels=b.labels, normalizer=b.normalizer),
        mean="step",
    ),
    "samples": lambda: [distill.soft(), distill.feature("body", "body", mse)],
}


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_split_of_a_step_does_not_change_its_gradient(
    split: tuple[int, ...], terms: Callable[[], Any], amp: torch.dtype | None
) -> None:
    ids, labels = ragged()
    student, teacher = Tokens(), Tokens()

    def gradient(parts: Sequence[int]) -> tuple[list[Tensor], distill.Step]:
        model = copy.deepcopy(student)
        loader = list(zip(ids.split(list(parts)), labels.split(list(parts)), strict=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        options = {"optimizer": optimizer, "accumulate": len(parts), "amp": amp}
        (step,) = quiet(model, loader, terms(), teacher=teacher, **options)
        return [p.grad for p in model.parameters() if p.grad is not None], step

    (whole, one), (pieces, many) = gradient([12]), gradient(split)
    assert len(whole) == len(list(student.parameters()))
    # rows are multiplied in bfloat16 in other groups then, and rounded otherwise
    tolerance = 1e-6 if amp is None else 1e-2
    for a, b in zip(whole, pieces, strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()
    assert many.loss == pytest.approx(one.loss, rel=tolerance)
    assert many.terms == pytest.approx(one.terms, rel=tolerance)


@pytest.mark.parametrize("split", SPLITS[2:], ids=str)
def test_labels_counted_on_a_device_have_the_same_shares(split: tuple[int, ...]) -> None:
    """There counts are tensors, and what has no label is not known to have none."""
    ids, labels = ragged()
    student, teacher = Tokens(), Tokens()
    terms = [distill.hard(0.4), distill.soft(0.6, rows="labelled")]
    gradients = []
    for on_device in (False, True):
        model = copy.deepcopy(student)
        loader = [
            Batch(x, y, _tokens=(y != -100).sum() if on_device else None)
            for x, y in zip(ids.split(list(split)), labels.split(list(split)), strict=True)
        ]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        options: dict[str, Any] = {"optimizer": optimizer, "accumulate": len(split)}
        quiet(model, loader, terms, teacher=teacher, **options)
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_last_step_of_an_epoch_may_be_short(loader: Any) -> None:
    student = mlp()
    twin = copy.deepcopy(student)
    steps = quiet(student, loader, distill.hard(), accumulate=4, epochs=2)
    joined = [
        (torch.cat([x for x, _ in part]), torch.cat([y for _, y in part]))
        for part in (loader[:4], loader[4:])
    ]
    expected = quiet(twin, joined, distill.hard(), epochs=2)
    assert [(s.epoch, s.step) for s in steps] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in expected], rel=1e-5)


def test_plain_function_of_ragged_batches_is_refused() -> None:
    ids, labels = ragged()
    loader = list(zip(ids.split(3), labels.split(3), strict=True))

    def loss(s: Tensor, t: None, y: Tensor) -> Tensor:
        return F.cross_entropy(s.flatten(0, 1), y.flatten(), ignore_index=-100)

    with pytest.raises(ValueError, match=r"loss: got a plain function .* expected Terms"):
        quiet(Tokens(), loader, loss, accumulate=4)


def test_batch_without_any_label_has_loss_0_and_gradient_0() -> None:
    ids, labels = ragged()
    model = Tokens()
    before = weights(model)
    nothing = [(ids, torch.full_like(labels, -100))]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    terms = [distill.hard(), distill.soft(rows="labelled")]
    (step,) = quiet(model, nothing, terms, teacher=Tokens(), optimizer=optimizer)
    assert step.loss == 0 and set(step.terms.values()) == {0.0}
    assert all(p.grad is not None and not p.grad.any() for p in model.head.parameters())
    assert equal(weights(model), before)


def take(out: str) -> None:
    """The steps of a rank."""
    rank = torch.distributed.get_rank()
    for split in ([8], [5, 3]):
        torch.manual_seed(0)
        student, teacher, projector = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 3)
        inputs, labels = torch.randn(16, 5), torch.randint(0, 3, (16,))
        labels[:7] = -100
        mine = slice(8 * rank, 8 * rank + 8)
        distill.train(
            nn.parallel.DistributedDataParallel(student),
            list(zip(inputs[mine].split(split), labels[mine].split(split), strict=True)),
            [distill.hard(), distill.soft(), distill.feature("", "", mse, projector=projector)],
            teacher=teacher,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            accumulate=len(split),
            progress=False,
        )
        distill.save(nn.ModuleList([student, projector]), f"{out}.{rank}.{len(split)}")


def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    """With 1 label against 8, in one micro-batch and two; a projector beside the student."""
    out = str(tmp_path / "out")
    ranks.run(2, take, out)
    torch.manual_seed(0)
    student, teacher, projector = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 3)
    inputs, labels = torch.randn(16, 5), torch.randint(0, 3, (16,))
    labels[:7] = -100
    terms = [distill.hard(), distill.soft(), distill.feature("", "", mse, projector=projector)]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    quiet(student, [(inputs, labels)], terms, teacher=teacher, optimizer=optimizer)
    expected = nn.ModuleList([student, projector]).state_dict()
    for name in ("0.1", "1.1", "0.2", "1.2"):
        got = nn.ModuleList([nn.Linear(5, 3), nn.Linear(3, 3)])
        distill.load(got, f"{out}.{name}")
        for key, value in got.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], list[distill.Step]]:
    return a_run(None)
