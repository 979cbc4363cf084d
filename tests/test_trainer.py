"""Terms, hooks, accumulation, resume: what the trainer promises beyond the bare loop."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.distill import Batch, Outputs, Term
from fastkd.distill.checkpoint import pack, unpack

V = 7


class Tokens(nn.Module):
    """A language model in small: ids [B, S] -> logits [B, S, V]."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def mlp(width: int = 8, *, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3))


def quiet(student: nn.Module, loader: Any, loss: Any, **options: Any) -> list[distill.Step]:
    return distill.train(student, loader, loss, progress=False, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mse(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(a, b)


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(48, 5)
    return list(zip(inputs.chunk(6), inputs[:, :3].argmax(-1).chunk(6), strict=True))


# terms


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


# accumulation: the same gradient however a step is split


def ragged() -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(0, V, (12, 9)), torch.randint(0, V, (12, 9))
    for row, length in enumerate((9, 1, 4, 0, 7, 2, 9, 3, 0, 0, 5, 6)):
        labels[row, length:] = -100
    return ids, labels


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


RANK = """
    import sys
    import torch
    from torch import nn
    import torch.nn.functional as F
    from fastkd import distill

    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    for split in ([8], [5, 3]):
        torch.manual_seed(0)
        student, teacher, projector = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 3)
        inputs, labels = torch.randn(16, 5), torch.randint(0, 3, (16,))
        labels[:7] = -100
        mine = range(8 * rank, 8 * rank + 8)
        terms = [
            distill.hard(),
            distill.soft(),
            distill.feature("", "", F.mse_loss, projector=projector),
        ]
        distill.train(
            nn.parallel.DistributedDataParallel(student),
            list(zip(inputs[mine].split(split), labels[mine].split(split))),
            terms,
            teacher=teacher,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            accumulate=len(split),
            progress=False,
        )
        distill.save(nn.ModuleList([student, projector]), f"{out}.{rank}.{len(split)}")
    torch.distributed.destroy_process_group()
"""


def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    """With 1 label against 8, in one micro-batch and two; a projector beside the student."""
    script = textwrap.dedent(RANK)
    root = str(Path(fastkd.__file__).parents[1])
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), store, out],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors

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


# hooks and projectors


def conv(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 3),
    )


def test_features_teach_through_a_projector_of_the_trainer(loader: Any) -> None:
    teacher, student = mlp(16), mlp(4)
    names = set(student.state_dict())
    projector = distill.projector(student, teacher, loader[0][0], "1", "1")
    before = [p.clone() for p in projector.parameters()]
    term = distill.feature("1", "1", mse, 2.0, projector=projector, name="hint")
    steps = quiet(student, loader, [distill.hard(), term], teacher=teacher, epochs=30, lr=1e-2)
    assert steps[-1].terms["hint"] < 0.5 * steps[0].terms["hint"]
    assert all(not torch.equal(a, b) for a, b in zip(before, projector.parameters(), strict=True))
    assert set(student.state_dict()) == names
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_projector_joins_an_optimizer_that_was_given(loader: Any) -> None:
    teacher, student = mlp(16), mlp(4)
    projector = nn.Linear(4, 16)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    term = distill.feature("1", "1", mse, projector=projector)
    for _ in range(2):  # once only
        quiet(student, loader, term, teacher=teacher, optimizer=optimizer)
        assert [len(g["params"]) for g in optimizer.param_groups] == [6]


def test_projectors_fit_the_shapes() -> None:
    x = torch.randn(2, 1, 6, 6)
    small, large = conv(3), conv(5)
    assert distill.projector(small, large, x, "1", "1")(small[:2](x)).shape == (2, 5, 6, 6)
    assert distill.projector(small, large, x, "2", "1")(small[:3](x)).shape == (2, 5, 6, 6)
    assert distill.projector(small, large, x, "3", "3")(small[:4](x)).shape == (2, 20)
    assert isinstance(distill.projector(small, large, x, "4", "4"), nn.Identity)
    assert small.training and large.training
    with pytest.raises(ValueError, match=r"\[2, 3, 6, 6\] of '1' and \[2, 20\] of '3', expected"):
        distill.projector(small, large, x, "1", "3")


def test_tap_that_does_not_exist_lists_near_names(loader: Any) -> None:
    student, teacher = Tokens(), Tokens()
    ids, labels = ragged()
    for term, name in (
        (distill.feature("bodi", "body", mse), "bodi"),
        (distill.feature("body", "bodi.0", mse), "bodi.0"),
    ):
        with pytest.raises(ValueError, match=rf"got '{name}', which Tokens .*: '[a-z0.]*body"):
            quiet(student, [(ids, labels)], term, teacher=teacher)
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_hooks_go_even_after_an_error(loader: Any) -> None:
    student, teacher = mlp(), mlp()

    def fail(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        quiet(student, loader, distill.feature("1", "1", fail), teacher=teacher)
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_tapped_module_that_is_not_run_is_named(loader: Any) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = mlp(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.raises(ValueError, match=r"layer: \['unused'\] did not run in forward"):
        quiet(Skips(), loader, distill.feature("unused", "1", mse), teacher=mlp())


def test_taps_reach_through_wrappers(loader: Any) -> None:
    class Wrapper(nn.Module):
        """As torch.compile wraps."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, x: Tensor) -> Tensor:
            return self._orig_mod(x)

    for wrap in (Wrapper, nn.DataParallel, lambda m: Wrapper(nn.DataParallel(m))):
        student, teacher = mlp(4), mlp(16)
        term = distill.feature("1", "1", mse, projector=nn.Linear(4, 16))
        before = weights(student)
        quiet(wrap(student), loader, term, teacher=wrap(teacher))
        assert not equal(weights(student), before)


# teachers


def test_stored_outputs_equal_a_live_teacher(loader: Any) -> None:
    teacher, student = mlp(16), mlp()
    said = [teacher(x).detach() for x, _ in loader]
    rows = torch.cat(said)
    dicts = [
        {"inputs": x, "labels": y, "teacher": t, "index": torch.arange(8 * i, 8 * i + 8)}
        for i, ((x, y), t) in enumerate(zip(loader, said, strict=True))
    ]
    without = [{k: v for k, v in d.items() if k != "teacher"} for d in dicts]
    table = {teacher[0]: teacher}
    ways: list[tuple[Any, Any]] = [
        (loader, teacher),
        (dicts, None),
        (dicts, distill.CachedTeacher()),
        (without, distill.CachedTeacher(rows)),
        (loader, lambda x: table[teacher[0]](x)),
        (loader, [teacher, teacher]),
    ]
    results = []
    for data, given in ways:
        twin = copy.deepcopy(student)
        quiet(twin, data, [distill.hard(), distill.soft()], teacher=given, lr=1e-2)
        results.append(weights(twin))
    assert all(equal(results[0], other) for other in results[1:])
    with pytest.raises(ValueError, match="without 'teacher' and without 'index'"):
        quiet(student, loader, distill.soft(), teacher=distill.CachedTeacher(rows))


def test_terms_that_need_a_teacher_say_so(loader: Any) -> None:
    with pytest.raises(ValueError, match="term 'soft': got no teacher"):
        quiet(mlp(), loader, distill.soft())
    with pytest.raises(
        ValueError, match=r"teacher: got none, expected one with the layers \['1'\]"
    ):
        quiet(mlp(), loader, distill.feature("1", "1", mse))
    with pytest.raises(ValueError, match=r"layer: got \['1'\] of CallableTeacher"):
        quiet(mlp(), loader, distill.feature("1", "1", mse), teacher=lambda x: x)
    with pytest.raises(TypeError, match="teacher: got int"):
        quiet(mlp(), loader, distill.soft(), teacher=3)


def test_several_teachers_are_their_mean(loader: Any) -> None:
    a, b, x = mlp(16), mlp(4), loader[0][0]
    batch = Batch(x)
    said = distill.EnsembleTeacher([a, b], [3, 1])(batch)
    torch.testing.assert_close(said.logits, 0.75 * a(x) + 0.25 * b(x))
    assert torch.equal(said.members[1].logits, b(x))
    T = 2.0
    said = distill.EnsembleTeacher([a, b], [3, 1], temperature=T)(batch)
    mean = 0.75 * (a(x) / T).softmax(-1) + 0.25 * (b(x) / T).softmax(-1)
    torch.testing.assert_close((said.logits / T).softmax(-1), mean)
    for bad in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="weights: got"):
            distill.EnsembleTeacher([a, b], bad)
    term = distill.feature("1", "1.1", mse, projector=nn.Linear(8, 4))
    quiet(mlp(), loader, [distill.soft(), term], teacher=[a, b])
    with pytest.raises(ValueError, match="expected a number in front"):
        quiet(mlp(), loader, distill.feature("1", "layer", mse), teacher=[a, b])


def test_peer_learns_as_the_student_does(loader: Any) -> None:
    """Two models, each the other's teacher, against the loop written out."""
    terms = [distill.hard(), distill.soft(0.5, temperature=2.0)]
    student, other = mlp(), mlp(16)
    twins = copy.deepcopy(student), copy.deepcopy(other)
    peer = distill.PeerTeacher(other, terms, lr=1e-2)
    quiet(student, loader, terms, teacher=peer, lr=1e-2, epochs=2)

    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in twins]
    for _ in range(2):
        for x, y in loader:
            said = [m(x) for m in twins]
            for i, optimizer in enumerate(optimizers):
                theirs = said[1 - i].detach()
                soft = fastkd.distillation_loss(said[i], theirs, alpha=0.0, temperature=2.0)
                loss = F.cross_entropy(said[i], y) + 0.5 * soft
                optimizer.zero_grad()
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    assert equal(weights(student), weights(twins[0]))
    assert equal(weights(other), weights(twins[1]))


def test_peer_learns_features_of_the_student(loader: Any) -> None:
    student, other = mlp(4), mlp(16)
    projector = nn.Linear(16, 4)
    hint = distill.feature("1", "1", mse, projector=projector, name="hint")
    apart: list[float] = []

    def note(epoch: int, step: int, loss: Tensor) -> None:
        x = loader[0][0]
        apart.append(mse(projector(other[:2](x)), student[:2](x)).item())

    peer = distill.PeerTeacher(other, [distill.hard(), hint], lr=1e-2)
    quiet(student, loader, distill.hard(), teacher=peer, epochs=20, on_step=note)
    assert apart[-1] < 0.3 * apart[0]
    assert not any(m._forward_hooks for model in (student, other) for m in model.modules())


def test_several_taps_of_one_term(loader: Any) -> None:
    def fsp(a: Any, b: Any) -> Tensor:
        """Products between two layers (Yim et al. 2017), here of vectors."""
        (a1, a2), (b1, b2) = a, b
        return mse(a1.T @ a2 / len(a1), b1.T @ b2 / len(b1))

    term = distill.feature(("1", "3"), ("1", "3"), fsp)
    assert term.name == "fsp:1+3-1+3"
    steps = quiet(mlp(), loader, term, teacher=mlp(), epochs=20, lr=1e-2)
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_compiled_student_is_tapped(loader: Any) -> None:
    student, teacher = mlp(4), mlp(16)
    twin = copy.deepcopy(student)
    results = []
    for model in (twin, torch.compile(student, backend="eager")):
        torch.manual_seed(0)
        term = distill.feature("1", "1", mse, projector=nn.Linear(4, 16))
        steps = quiet(model, loader, [distill.hard(), term], teacher=teacher)
        results.append([step.loss for step in steps])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert equal(weights(student), weights(twin))


def test_cohort_of_peers_learns(loader: Any) -> None:
    models = [mlp(), mlp(16), mlp(4)]
    before = [distill.evaluate(m, loader).cross_entropy for m in models]
    terms = [distill.hard(), distill.soft()]
    cohort = distill.EnsembleTeacher(
        [distill.PeerTeacher(m, terms, lr=1e-2) for m in models[1:]], temperature=4.0
    )
    quiet(models[0], loader, terms, teacher=cohort, lr=1e-2, epochs=10)
    after = [distill.evaluate(m, loader).cross_entropy for m in models]
    assert all(a < b for a, b in zip(after, before, strict=True))


def test_average_is_the_definition(loader: Any) -> None:
    student = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    average = distill.EMATeacher(student, 0.9)
    expected = {n: p.detach().clone() for n, p in student.named_parameters()}

    def follow(*_: Any) -> None:
        for name, p in student.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach()

    quiet(student, loader, distill.hard(), ema=average, on_step=follow)
    for name, p in average.model.named_parameters():
        torch.testing.assert_close(p, expected[name])
    assert torch.equal(average.model[1].running_mean, student[1].running_mean)
    # as a teacher and an average at once it moves once a step
    twin = copy.deepcopy(student)
    both = distill.EMATeacher(twin, 0.5)
    start, (x, y) = twin[0].weight.detach().clone(), loader[0]
    quiet(twin, [(x, y)], [distill.hard(), distill.soft()], teacher=both, ema=both)
    torch.testing.assert_close(both.model[0].weight, (start + twin[0].weight) / 2)


def test_teacher_that_stays_in_train_mode_is_refused(loader: Any) -> None:
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> Stubborn:
            return super().train(True)

    with pytest.raises(ValueError, match="teacher: got 1 in train mode after eval"):
        quiet(mlp(), loader, distill.soft(), teacher=nn.Sequential(nn.ReLU(), Stubborn(5, 3)))


def test_teacher_on_another_device_is_named(loader: Any) -> None:
    with pytest.raises(ValueError, match="teacher: got outputs on meta, expected cpu"):
        quiet(mlp(), loader, distill.soft(), teacher=lambda x: torch.empty(8, 3, device="meta"))


# faults


def test_loss_that_is_not_finite_names_its_term_and_batch(loader: Any, tmp_path: Path) -> None:
    count = 0

    def sometimes(s: Outputs, t: Outputs, b: Batch) -> Tensor:
        nonlocal count
        count += 1
        return s.logits.mean() * (math.nan if count == 10 else 1.0)

    student = mlp()
    kept: list[dict[str, Tensor]] = []
    points = distill.Checkpoints(tmp_path, every=1, keep=1)
    message = r"epoch 0, step 4 .*batches 8 to 9 of the epoch, by term 'odd' = nan"
    with pytest.raises(FloatingPointError, match=message):
        quiet(
            student,
            [*loader, *loader],
            [distill.hard(), Term("odd", sometimes, 0.1)],
            accumulate=2,
            checkpoint=points,
            on_step=lambda *_: kept.append(weights(student)),
        )
    assert [p.name for p in points.files()] == ["step-00000004.safetensors"]
    assert len(kept) == 4 and equal(weights(student), kept[-1])
    assert not any("tmp" in path.name for path in tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(loader: Any, tmp_path: Path) -> None:
    student = mlp()

    def poison(epoch: int, step: int, loss: Tensor) -> None:
        if step == 3:
            with torch.no_grad():
                student[3].bias[0] = math.inf

    points = distill.Checkpoints(tmp_path, every=2)
    with pytest.raises(FloatingPointError, match=r"student: '3.bias' is not finite after step 3"):
        quiet(student, loader, distill.hard(), checkpoint=points, on_step=poison)
    assert [p.name for p in points.files()] == ["step-00000002.safetensors"]


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ([], TypeError, "loss: got no term"),
        ([distill.hard(), 3], TypeError, "loss: got int in it"),
        ([distill.hard(), distill.hard()], ValueError, "expected different names"),
        (Term("flat", lambda s, t, b: s.logits), ValueError, "from term 'flat'"),
        (Term("cut", lambda s, t, b: s.logits.mean().detach()), ValueError, "require grad"),
    ],
)
def test_bad_losses(loader: Any, loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quiet(mlp(), loader, loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"amp": torch.float64}, "amp: got torch.float64"),
    ],
)
def test_bad_options(loader: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(mlp(), loader, distill.hard(), **options)


# precision, noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns(loader: Any, dtype: torch.dtype) -> None:
    student, teacher = mlp(), mlp(16)
    seen: set[torch.dtype] = set()

    def note(s: Outputs, t: Outputs, b: Batch) -> Tensor:
        seen.update((s.logits.dtype, t.logits.dtype))
        return s.logits.float().mean() * 0

    terms = [distill.hard(), distill.soft(0.1), Term("note", note)]
    steps = quiet(
        student, loader, terms, teacher=teacher, amp=dtype, epochs=20, lr=1e-2, clip_norm=1.0
    )
    assert seen == {dtype} and student[0].weight.dtype == torch.float32
    assert steps[-1].terms["hard"] < 0.7 * steps[0].terms["hard"]


def test_input_noise_is_the_students_alone_unless_asked() -> None:
    x = torch.zeros(2000, 5)
    seen: list[Tensor] = []

    def look(s: Outputs, t: Outputs, b: Batch) -> Tensor:
        seen.extend((b.inputs, b.inputs if b.teacher_inputs is None else b.teacher_inputs))
        return s.logits.mean()

    for teacher in ("clean", "noisy"):
        seen.clear()
        transform = distill.input_noise(0.5, teacher=teacher)
        quiet(mlp(), [x], Term("look", look), transform=transform)
        mine, theirs = seen
        assert mine.std().item() == pytest.approx(0.5, rel=0.05)
        assert torch.equal(mine, theirs) if teacher == "noisy" else not theirs.any()
    assert not x.any()


def test_weight_noise_is_gone_after_the_gradient(loader: Any) -> None:
    student = mlp()
    before = weights(student)
    with distill.weight_noise(student, 0.1):
        ratio = (student[0].weight - before["0.weight"]).std() / before["0.weight"].std()
        assert ratio.item() == pytest.approx(0.1, rel=0.5)
    assert equal(weights(student), before)
    steps = [
        quiet(copy.deepcopy(student), loader, distill.hard(), weight_noise=std)[0].loss
        for std in (0.0, 0.5, 0.5)
    ]
    assert len(set(steps)) == 3
    frozen = torch.optim.SGD(student.parameters(), lr=0.0)
    quiet(student, loader, distill.hard(), weight_noise=0.5, optimizer=frozen)
    assert equal(weights(student), before)


# checkpoints


class Stop(Exception):
    pass


class Data(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples disturbed by every source of random numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(22, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        x = self.inputs[at]
        shift = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return x + 0.1 * shift, x[:3].argmax()


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def a_run(
    points: distill.Checkpoints | None,
    stop_at: int | None = None,
    epochs: int = 3,
    seed: int = 5,
    own_generator: bool = True,
) -> tuple[dict[str, Tensor], list[distill.Step]]:
    """Everything that has a state takes part: returns all weights and the steps.

    `seed` decides all but the frozen teacher: what is resumed must not lean on it.
    """
    seed_all(0)
    teacher = mlp(16)
    seed_all(seed)
    student, other, projector = mlp(dropout=0.3), mlp(4), nn.Linear(8, 16)
    order = torch.Generator().manual_seed(seed) if own_generator else None
    loader = torch.utils.data.DataLoader(Data(), batch_size=4, shuffle=True, generator=order)
    soft = distill.soft(lambda step: 1 / (1 + step))
    peer = distill.PeerTeacher(other, [distill.hard(), distill.soft()])
    average = distill.EMATeacher(student, 0.9)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    feature = distill.feature("1", "0.1", mse, projector=projector)

    def on_step(epoch: int, step: int, loss: Tensor) -> None:
        if step == stop_at:
            raise Stop

    steps = quiet(
        student,
        loader,
        [distill.hard(), soft, feature],
        teacher=[teacher, peer],
        optimizer=optimizer,
        epochs=epochs,
        accumulate=2,
        clip_norm=1.0,
        schedule=lambda step: 1 / (1 + step),
        ema=average,
        transform=distill.input_noise(0.1),
        weight_noise=0.05,
        validate=lambda m: -sum(p.abs().sum().item() for p in m.parameters()),
        checkpoint=points,
        on_step=on_step,
    )
    parts = {"student": student, "projector": projector, "other": other, "ema": average.model}
    state = {f"{k}.{n}": v for k, m in parts.items() for n, v in weights(m).items()}
    return state, steps


STEPS = 9  # 22 samples in 6 batches, two to a step, three epochs


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], list[distill.Step]]:
    return a_run(None)


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("stop_at", range(STEPS))
def test_run_that_was_interrupted_ends_in_the_same_bits(
    stop_at: int, every: int, tmp_path: Path, whole: Any
) -> None:
    expected, steps = whole
    with pytest.raises(Stop):
        a_run(distill.Checkpoints(tmp_path, every=every), stop_at)
    # with other weights and random numbers than those of the checkpoint, where there is one
    seed = 6 if stop_at >= every else 5
    got, after = a_run(distill.Checkpoints(tmp_path, every=every, resume=True), seed=seed)
    assert equal(got, expected)
    assert after == steps[len(steps) - len(after) :]
    # the step at which it stopped had not reached its own checkpoint
    assert len(after) == STEPS - stop_at // every * every


def test_resume_with_an_order_from_the_global_generator(tmp_path: Path) -> None:
    expected, _ = a_run(None, own_generator=False)
    with pytest.raises(Stop):
        a_run(distill.Checkpoints(tmp_path, every=2), 5, own_generator=False)
    points = distill.Checkpoints(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"loader.*0 random generators, expected 1"):
        a_run(points)
    got, _ = a_run(points, seed=6, own_generator=False)
    assert equal(got, expected)


def test_resume_with_workers(tmp_path: Path) -> None:
    """They draw batches ahead of their use, and random numbers of their own."""

    def run(stop_at: int | None, **options: Any) -> dict[str, Tensor]:
        seed_all(3)
        student = mlp(dropout=0.3)
        loader = torch.utils.data.DataLoader(Data(), batch_size=4, shuffle=True, num_workers=2)

        def on_step(epoch: int, step: int, loss: Tensor) -> None:
            if step == stop_at:
                raise Stop

        with contextlib.suppress(Stop):
            quiet(student, loader, distill.hard(), epochs=2, on_step=on_step, **options)
        return weights(student)

    expected = run(None)
    run(8, checkpoint=distill.Checkpoints(tmp_path, every=4))
    assert equal(run(None, checkpoint=distill.Checkpoints(tmp_path, resume=True)), expected)


def test_run_can_be_made_longer(tmp_path: Path) -> None:
    expected, steps = a_run(None, epochs=4)
    a_run(distill.Checkpoints(tmp_path), epochs=2)
    got, after = a_run(distill.Checkpoints(tmp_path, resume=True), epochs=4, seed=6)
    assert equal(got, expected) and after == steps[6:]
    got, after = a_run(distill.Checkpoints(tmp_path, resume=True), epochs=4, seed=6)
    assert equal(got, expected) and after == []


def test_checkpoints_beyond_keep_go_and_the_best_stays(tmp_path: Path, loader: Any) -> None:
    student = mlp()
    metrics = iter([0.1, 0.9, 0.4])
    at: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> float:
        at.append(weights(model))
        return next(metrics)

    told: list[tuple[dict[str, float], int]] = []
    quiet(
        student,
        loader,
        distill.hard(),
        epochs=3,
        validate=validate,
        checkpoint=distill.Checkpoints(tmp_path, every=4, keep=3),
        log=lambda values, step: told.append((values, step)),
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.safetensors", *(f"step-{n:08d}.safetensors" for n in (12, 16, 18))]
    best = mlp()
    assert distill.load(best, tmp_path / "best.safetensors") == {"metric": 0.9, "step": 12}
    assert equal(weights(best), at[1])
    assert [(v["metric"], s) for v, s in told if "metric" in v] == [(0.1, 5), (0.9, 11), (0.4, 17)]
    assert [s for v, s in told if "loss" in v] == list(range(18))


def test_folder_with_a_checkpoint_needs_resume(tmp_path: Path, loader: Any) -> None:
    quiet(mlp(), loader, distill.hard(), checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"which has step-00000006.*expected resume=True"):
        quiet(mlp(), loader, distill.hard(), checkpoint=tmp_path)


def another_model(loader: Any, **options: Any) -> Any:
    return quiet(mlp(9), loader, distill.hard(), **options)


def another_loss(loader: Any, **options: Any) -> Any:
    return quiet(mlp(), loader, Term("mine", lambda s, t, b: s.logits.mean()), **options)


def another_teacher(loader: Any, **options: Any) -> Any:
    return quiet(mlp(), loader, distill.hard(), teacher=mlp(), **options)


def another_optimizer(loader: Any, **options: Any) -> Any:
    student = mlp()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return quiet(student, loader, distill.hard(), optimizer=optimizer, **options)


def fewer_parameters(loader: Any, **options: Any) -> Any:
    student = mlp()
    optimizer = torch.optim.AdamW(student[3].parameters(), lr=0.1)
    return quiet(student, loader, distill.hard(), optimizer=optimizer, **options)


def an_average(loader: Any, **options: Any) -> Any:
    student = mlp()
    return quiet(student, loader, distill.hard(), ema=distill.EMATeacher(student), **options)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (another_model, r"the student's '0.bias' of shape \(8,\), expected \(9,\)"),
        (another_loss, r"terms \['hard'\], expected \['mine'\]"),
        (
            another_teacher,
            r"teacher None, expected \['ModelTeacher', 'Sequential', '[0-9a-f]{64}'\]|\[",
        ),
        (another_optimizer, "optimizer 'AdamW', expected 'SGD'"),
        (fewer_parameters, r"\[4\] parameters in the optimizer's groups, expected \[2\]"),
        (an_average, "no average of the student"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, loader: Any, run: Callable[..., Any], message: str
) -> None:
    quiet(mlp(), loader, distill.hard(), checkpoint=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(loader, checkpoint=distill.Checkpoints(tmp_path, resume=True), epochs=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, whole: Any) -> None:
    expected, _ = whole
    with pytest.raises(Stop):
        a_run(distill.Checkpoints(tmp_path, every=2), 6)
    newest = distill.Checkpoints(tmp_path).files()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"{newest.name} cannot be read"):
        got, after = a_run(distill.Checkpoints(tmp_path, resume=True), seed=6)
    assert equal(got, expected) and len(after) == STEPS - 4


def test_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    """SIGKILL once half of the second file is written."""
    script = """
        import os, signal, sys
        import torch
        from torch import nn
        import safetensors.torch
        from fastkd import distill

        real, count = safetensors.torch.save_file, 0

        def save_file(state, path, metadata):
            global count
            count += 1
            real(state, path, metadata=metadata)
            if count == 2:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        if sys.argv[2] == "kill":
            safetensors.torch.save_file = save_file
        torch.manual_seed(0)
        data = [(torch.randn(8, 5), torch.randint(0, 3, (8,))) for _ in range(6)]
        model = nn.Linear(5, 3)
        points = distill.Checkpoints(sys.argv[1], every=2, resume=True)
        steps = distill.train(model, data, distill.hard(), checkpoint=points, progress=False)
        print(steps[0].step, len(steps))
    """
    root = str(Path(fastkd.__file__).parents[1])

    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), how]
        return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)

    assert run("kill").returncode == -signal.SIGKILL
    assert [p.name for p in distill.Checkpoints(tmp_path).files()] == ["step-00000002.safetensors"]
    after = run("go on")
    assert after.stdout.split() == ["2", "4"], after.stderr
    assert not list(tmp_path.glob(".*.tmp")), "what the killed run left is cleaned up"


def test_pack_round_trip() -> None:
    tree = {"a/b": torch.ones(2), "a": {"b": torch.zeros(1)}, 3: (1, [None, True, 1e-300, "x"])}
    tensors: dict[str, Tensor] = {}
    back = unpack(pack(tree, tensors), tensors)
    assert back["a/b"].sum() == 2 and back["a"]["b"].sum() == 0 and back[3] == tree[3]
    with pytest.raises(TypeError, match="got object at '/x'"):
        pack({"x": object()}, {})
