"""The ten lines people write around the trainer: schedulers, rates set by hand, projectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fastkd import distill

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
STEPS = 4

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, 0.1),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1.0 / (1 + k)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.5),
    "cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "warmup": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, 0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "capturable": lambda p: torch.optim.AdamW(p, torch.tensor(0.1), foreach=False),
}


# OneCycleLR turns momentum or betas, which Adagrad has not
PAIRS = [
    (name, kind)
    for name in SCHEDULERS
    for kind in OPTIMIZERS
    if (name, kind) != ("cycle", "adagrad")
]


def linear(seed: int = 0, *sizes: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(*(sizes or (4, 3)))


def quiet(student: nn.Module, loss: Any = None, steps: int = STEPS, **options: Any) -> Any:
    loss = distill.hard() if loss is None else loss
    return distill.train(student, [(X, Y)] * steps, loss, progress=False, **options)


def by_hand(make: Any, schedule: Any) -> tuple[list[float], nn.Module]:
    """The loop of everybody's own."""
    model = linear()
    optimizer = make(model.parameters())
    scheduler, rates = schedule(optimizer), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return [*rates, float(optimizer.param_groups[0]["lr"])], model


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_torch_scheduler_has_the_rate_to_itself(name: str, kind: str) -> None:
    want, twin = by_hand(OPTIMIZERS[kind], SCHEDULERS[name])
    model = linear()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = SCHEDULERS[name](optimizer)
    steps = quiet(model, optimizer=optimizer, on_step=lambda *_: scheduler.step())
    assert [*(s.lr for s in steps), float(optimizer.param_groups[0]["lr"])] == want
    assert len(set(want)) > 1
    torch.testing.assert_close(model.weight, twin.weight)


def test_a_plateau_is_seen_by_validate_and_by_log() -> None:
    for where in ("validate", "log"):
        model = linear()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        plateau = lr_scheduler.ReduceLROnPlateau(sgd, factor=0.5, patience=0)

        def tell(*_: Any, plateau: Any = plateau) -> float:
            plateau.step(1.0)
            return 1.0

        steps = quiet(model, steps=1, epochs=4, optimizer=sgd, **{where: tell})
        rates = [s.lr for s in steps]
        assert rates[0] == 0.1 and rates[-1] < 0.1 and rates == sorted(rates, reverse=True), where
        assert sgd.param_groups[0]["lr"] < 0.1


def test_rates_of_several_groups_set_by_hand_stay() -> None:
    model = nn.Sequential(linear(0, 4, 5), linear(1, 5, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
    sgd = torch.optim.SGD(groups, 0.2)

    def halve(*_: Any) -> None:
        for group in sgd.param_groups:
            group["lr"] /= 2

    assert [s.lr for s in quiet(model, optimizer=sgd, on_step=halve)] == [0.1, 0.05, 0.025, 0.0125]
    assert [g["lr"] for g in sgd.param_groups] == [0.1 / 16, 0.2 / 16]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_trainers_own_schedule_is_undone_and_keeps_a_tensor(kind: str) -> None:
    model = linear()
    optimizer = OPTIMIZERS[kind](model.parameters())
    before = optimizer.param_groups[0]["lr"]
    steps = quiet(model, optimizer=optimizer, schedule=lambda k: 0.5**k)
    torch.testing.assert_close(
        torch.tensor([s.lr for s in steps]), torch.tensor([0.1, 0.05, 0.025, 0.0125])
    )
    assert optimizer.param_groups[0]["lr"] is before and float(before) == pytest.approx(0.1)


def test_a_schedule_and_a_scheduler_are_one_too_many() -> None:
    model = linear()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = lr_scheduler.StepLR(sgd, 1, 0.1)
    options: dict[str, Any] = {"optimizer": sgd, "on_step": lambda *_: scheduler.step()}
    with pytest.raises(ValueError, match=r"rate of 0\.01 in group 0, which schedule= had set"):
        quiet(model, schedule=lambda _: 1.0, **options)
    with pytest.warns(UserWarning, match=r"which schedule= had set.* lost"):
        quiet(model, steps=1, schedule=lambda _: 1.0, **options)


def test_a_resumed_run_has_the_schedulers_rate(tmp_path: Path) -> None:
    def run(folder: Path | None, epochs: int, resume: bool = False) -> tuple[list[float], Tensor]:
        model = linear()
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler = lr_scheduler.ExponentialLR(sgd, 0.5)
        point = None if folder is None else distill.Checkpoints(folder, resume=resume)
        steps = quiet(
            model,
            steps=2,
            epochs=epochs,
            optimizer=sgd,
            checkpoint=point,
            on_step=lambda *_: scheduler.step(),
        )
        return [s.lr for s in steps], model.weight.detach()

    rates, weight = run(None, 3)
    first, _ = run(tmp_path / "a", 1)
    rest, resumed = run(tmp_path / "a", 3, resume=True)
    assert first + rest == rates and torch.equal(weight, resumed)


def test_a_resumed_schedule_starts_from_the_rate_of_before(tmp_path: Path) -> None:
    rates: list[float] = []
    for epochs in (1, 3):
        model = linear()
        sgd = torch.optim.SGD(model.parameters(), 0.1 if epochs == 1 else 0.7)
        point = distill.Checkpoints(tmp_path, resume=epochs == 3)
        rates += [
            s.lr
            for s in quiet(
                model,
                steps=1,
                epochs=epochs,
                optimizer=sgd,
                schedule=lambda k: 0.5**k,
                checkpoint=point,
            )
        ]
    assert rates == [0.1, 0.05, 0.025]


def test_accelerates_optimizer_and_scheduler() -> None:
    accelerate = pytest.importorskip("accelerate")
    want, twin = by_hand(OPTIMIZERS["sgd"], SCHEDULERS["step"])
    model = linear()
    sgd = OPTIMIZERS["sgd"](model.parameters())
    accelerator = accelerate.Accelerator(cpu=True)
    student, optimizer, scheduler = accelerator.prepare(model, sgd, SCHEDULERS["step"](sgd))
    steps = quiet(
        student,
        optimizer=optimizer,
        accelerator=accelerator,
        on_step=lambda *_: scheduler.step(),
    )
    assert [s.lr for s in steps] == want[:-1]
    torch.testing.assert_close(model.weight, twin.weight)


def test_peers_rates_are_left_alone() -> None:
    models, made = [linear(0), linear(1)], []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(model.parameters(), 0.1))
        return made[-1]

    def halve(*_: Any) -> None:
        for own in made:
            own.param_groups[0]["lr"] /= 2

    batches = [(X, Y)] * 2
    distill.mutual(models, batches, optimizer=make, on_step=halve, progress=False)
    assert [own.param_groups[0]["lr"] for own in made] == [0.025, 0.025]
    made.clear()
    distill.mutual(
        models, batches, optimizer=make, schedule=lambda k: 0.5**k, progress=False, lr=1.0
    )
    assert [own.param_groups[0]["lr"] for own in made] == [0.1, 0.1]


# a scheduler that was made before a term's projector


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_scheduler_made_before_the_projector(name: str, kind: str, named: bool) -> None:
    student, teacher, projector = linear(0), linear(1), linear(2, 3, 3)
    before = copy.deepcopy(projector.state_dict())
    params = student.named_parameters() if named else student.parameters()
    optimizer = OPTIMIZERS[kind](params)
    scheduler = SCHEDULERS[name](optimizer)
    hint = distill.feature("", "", F.mse_loss, projector=projector)
    steps = quiet(
        student,
        hint,
        teacher=teacher,
        optimizer=optimizer,
        on_step=lambda *_: scheduler.step(),
    )
    assert len(steps) == STEPS and len(optimizer.param_groups) == 1
    assert all(not torch.equal(before[n], p) for n, p in projector.state_dict().items())
    if named:
        names = optimizer.param_groups[0]["param_names"]
        assert len(names) == len(optimizer.param_groups[0]["params"]) == 4
        assert len(set(names)) == 4


def test_a_projectors_group_of_the_users_own_stays() -> None:
    student, teacher, projector = linear(0), linear(1), linear(2, 3, 3)
    sgd = torch.optim.SGD(
        [{"params": student.parameters()}, {"params": projector.parameters(), "lr": 0.01}], 0.1
    )
    hint = distill.feature("", "", F.mse_loss, projector=projector)
    quiet(student, hint, teacher=teacher, optimizer=sgd)
    assert [len(group["params"]) for group in sgd.param_groups] == [2, 2]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda _: torch.optim.SGD(linear(1).parameters(), 0.1), "none of them the model's"),
        (lambda _: torch.optim.SGD, "expected a torch optimizer over"),
        (lambda model: torch.optim.LBFGS(model.parameters()), "got LBFGS"),
    ],
    ids=["another model's", "class", "lbfgs"],
)
def test_an_optimizer_by_which_nothing_learns_is_refused(make: Any, match: str) -> None:
    model = linear()
    with pytest.raises((TypeError, ValueError), match=f"^optimizer: .*{match}") as caught:
        quiet(model, optimizer=make(model))
    assert len(str(caught.value)) <= 500


def test_an_optimizer_over_what_the_terms_learn_alone() -> None:
    for model in (linear(), linear().requires_grad_(False)):
        scale = nn.Linear(3, 3)
        before = scale.weight.detach().clone(), model.weight.detach().clone()
        term = distill.feature("", "", F.mse_loss, projector=scale)
        sgd = torch.optim.SGD(scale.parameters(), 0.1)
        for optimizer in (sgd, None) if not model.weight.requires_grad else (sgd,):
            quiet(model, term, teacher=linear(1), optimizer=optimizer)
        assert not torch.equal(scale.weight, before[0]) and torch.equal(model.weight, before[1])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 1.5),
        ("epochs", "2"),
        ("accumulate", 2.0),
        ("schedule", 0.5),
        ("transform", torch.zeros(2)),
        ("validate", 0.9),
        ("log", "run.csv"),
        ("log", ["run.csv"]),
    ],
)
def test_an_argument_of_another_kind_is_named(option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{option}: got .*, expected "):
        quiet(linear(), **{option: value})


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    weights: list[Tensor] = []
    metrics = iter([math.nan, 0.5, -math.inf, 0.7, math.nan])

    def validate(model: nn.Module) -> float:
        weights.append(model.weight.detach().clone())
        return next(metrics)

    with pytest.warns(UserWarning, match="validate: got nan after epoch 0, which is never"):
        quiet(linear(), epochs=5, validate=validate, checkpoint=tmp_path)
    best = linear(1)
    assert distill.load(best, tmp_path / "best.safetensors")["metric"] == 0.7
    assert torch.equal(best.weight, weights[3])
    with pytest.raises(TypeError, match="validate: got None from it, expected a number"):
        quiet(linear(), validate=lambda _: None)


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_label_beyond_the_logits_is_named(wrong: int) -> None:
    labels = Y.clone()
    labels[0], labels[1] = wrong, -100
    wanted = f"from {min(wrong, 0)} to {max(wrong, 2)}, expected 0 to 2"
    with pytest.raises(IndexError, match=f"term 'hard': labels: got class numbers {wanted}"):
        distill.train(linear(), [(X, labels)], distill.hard(), progress=False)


def test_inputs_by_name_are_refused_at_the_export(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"inputs: got dict .*, expected a tensor"):
        distill.export(linear(), {"x": X}, tmp_path)  # type: ignore[arg-type]


def test_a_peers_optimizer_is_over_the_peer() -> None:
    """One over another model would leave the peer as it is, without a word."""
    other = torch.optim.SGD(linear(1).parameters(), 0.1)
    with pytest.raises(ValueError, match=r"optimizer: got .* none of them the model's"):
        distill.PeerTeacher(linear(2), distill.hard(), optimizer=other)
    with pytest.raises(TypeError, match="optimizer: got"):
        distill.PeerTeacher(linear(2), distill.hard(), optimizer=0.1)  # type: ignore[arg-type]
