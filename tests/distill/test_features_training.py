"""Feature losses: errors, and in the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from feature_losses import FUNCTIONS, mean, pair
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill.losses import features


@pytest.mark.parametrize(
    "call, shapes",
    [
        (features.hint, ((2, 3), (2, 4))),
        (features.nst, ((2, 3, 4), (2, 3, 4, 4))),
        (features.nst, ((2, 3, 4), (2, 5, 4))),
        (features.nst, ((2, 3), (3, 3))),
        (features.second_moment, ((2, 3), (2, 4))),
        (features.second_moment, ((3,), (3,))),
        (features.VID(3, 4), ((2, 3), (2, 5))),
        (features.VID(3, 4), ((2, 3), (3, 4))),
        (features.MGD(3, 4), ((2, 3, 4, 4), (2, 4, 5, 5))),
        (features.MGD(3, 4), ((2, 3), (2, 4))),
    ],
)
def test_shapes_that_cannot_be_compared_are_named(
    call: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    with pytest.raises(ValueError) as error:
        call(*(torch.randn(shape) for shape in shapes))
    assert str(list(shapes[1])) in str(error.value)
    student = str(list(shapes[0]))
    assert student in str(error.value) or isinstance(call, nn.Module)  # there: what became of it


def test_arguments_out_of_range() -> None:
    s, t = pair((2, 3))
    for call, message in (
        (lambda: features.hint(s, t, kind="l3"), "kind: got 'l3'"),
        (lambda: features.nst(s, t, kernel="cubic"), "kernel: got 'cubic'"),
        (lambda: features.nst(s, t, kernel="gaussian", bandwidth=0.0), "bandwidth > 0"),
        (lambda: features.nst(s, t, degree=0), "degree >= 1"),
        (lambda: features.VID(2, 2, floor=0.0), "floor: got 0.0"),
        (lambda: features.MGD(2, 2, ratio=1.0), "ratio: got 1.0"),
        (lambda: features.VID(4, 2)(s, t), "expected 4 channels"),
        (lambda: features.VID(3, 2, mean=nn.Identity())(s.float(), t), "expected 2 channels"),
        (lambda: features.Each(nn.Identity())((s, t)), "got 2 features"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("call", [features.hint, features.nst, features.second_moment])
def test_a_layer_that_gives_no_tensor(call: Any) -> None:
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match="teacher: got tuple"):
        call(x, (x, x))
    with pytest.raises(TypeError, match="expected floating-point tensors"):
        call(None, None)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


@pytest.mark.parametrize(
    "function",
    [
        *FUNCTIONS.values(),
        features.VID(6, 8),
        features.MGD(6, 8, ratio=0.2, spatial=False),
    ],
    ids=[*FUNCTIONS, "vid", "mgd"],
)
def test_a_term_lowers_its_loss(function: Any) -> None:
    teacher, student = mlp(8), mlp(6)
    learns = isinstance(function, nn.Module)
    projector = None if learns else nn.Linear(6, 8)
    term = distill.feature("1", "1", function, 1.0, projector=projector)
    loader = [torch.randn(16, 5) for _ in range(4)]
    steps = distill.train(
        student, loader, term, teacher=teacher, epochs=25, lr=1e-2, progress=False
    )
    losses = [step.loss for step in steps]
    assert mean(losses[-4:]) < mean(losses[:4]) - 0.2 * abs(mean(losses[:4]))


def test_what_a_term_learns_is_trained_and_checkpointed(tmp_path: Path) -> None:
    teacher, student = mlp(8), mlp(6)
    names = set(student.state_dict())
    vid, projector = features.VID(6, 8), nn.Linear(6, 6)
    before = {name: value.clone() for name, value in vid.state_dict().items()}
    plain = distill.feature("1", "1", vid, name="plain")
    both = distill.feature("1", "1", features.VID(6, 8), projector=projector, name="both")
    mse = distill.feature("1", "1", nn.MSELoss(), projector=nn.Linear(6, 8), name="mse")
    distill.train(
        student,
        [torch.randn(16, 5)],
        [plain, both, mse],
        teacher=teacher,
        epochs=3,
        checkpoint=tmp_path,
        progress=False,
    )
    assert set(student.state_dict()) == names
    assert all(not torch.equal(before[name], value) for name, value in vid.state_dict().items())
    from safetensors.torch import load_file

    (path,) = sorted(tmp_path.glob("step-*.safetensors"))[-1:]
    saved = load_file(path)
    assert torch.equal(saved["/modules/0.log_variance"], vid.log_variance.detach())
    assert torch.equal(saved["/modules/1.0.weight"], projector.weight.detach())
    assert "/modules/1.1.log_variance" in saved and "/modules/2.weight" in saved


def test_each_projects_every_layer() -> None:
    teacher, student = mlp(8), mlp(6)
    projector = features.Each(nn.Linear(6, 8), nn.Identity())
    seen: list[list[torch.Size]] = []

    def both(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
        seen.append([x.shape for x in mine])
        return sum((features.hint(a, b) for a, b in zip(mine, theirs, strict=True)), mine[0][0, 0])

    term = distill.feature(("1", "2"), ("1", "2"), both, projector=projector)
    distill.train(student, [torch.randn(4, 5)], term, teacher=teacher, progress=False)
    assert seen == [[torch.Size([4, 8]), torch.Size([4, 3])]]
