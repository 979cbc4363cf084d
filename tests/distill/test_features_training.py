"""Feature losses: errors, and in the trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from feature_losses import FUNCTIONS, mean, pair
from torch import Tensor, nn
from trainer_runs import step

from fastkd import distill
from fastkd.distill.losses import attention, features, relations


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


# ---- padding, which a mask or the labels leave out


class Tokens(nn.Module):
    """Logits of a sequence [N, L, 4] that takes its mask, as language models do."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.last(self.hidden(x))


def sequences(padding: int) -> dict[str, Any]:
    torch.manual_seed(2)
    x, y = torch.randn(6, 5, 4), torch.randint(3, (6, 5))
    mask = torch.ones(6, 5, dtype=torch.long)
    more = torch.randn(6, padding, 4) * 9
    return {
        "inputs": {
            "x": torch.cat([x, more], 1),
            "attention_mask": F.pad(mask, (0, padding)),
        },
        "labels": F.pad(y, (0, padding), value=-100),
    }


MASKED: dict[str, Any] = {
    "hint": features.hint,
    "cosine": partial(features.hint, kind="cosine"),
    "mse": F.mse_loss,
    "nst": features.nst,
    "second_moment": features.second_moment,
    "rkd_distance": relations.rkd_distance,
    "rkd_angle": relations.rkd_angle,
    "sp": relations.sp,
    "cc": relations.cc,
    "pkt": relations.pkt,
    "tinybert_hidden": attention.tinybert_hidden,
}


@pytest.mark.parametrize("how", [{"rows": "labelled"}, {"mask": "attention_mask"}])
@pytest.mark.parametrize("name", list(MASKED))
def test_padding_does_not_change_a_feature_term(name: str, how: dict[str, str]) -> None:
    torch.manual_seed(0)
    student, teacher = Tokens(), Tokens()
    plain = distill.feature("hidden", "hidden", MASKED[name], name="one")
    want = step(student, sequences(0), plain, teacher=teacher).loss
    term = distill.feature("hidden", "hidden", MASKED[name], name="one", **how)  # type: ignore[arg-type]
    for padding in (0, 7):
        got = step(student, sequences(padding), term, teacher=teacher).loss
        assert got == pytest.approx(want, rel=1e-5)
    assert step(student, sequences(7), plain, teacher=teacher).loss != pytest.approx(want, rel=1e-3)


def test_the_mask_may_stand_beside_the_inputs() -> None:
    student, teacher = Tokens(), Tokens()
    given = sequences(7)
    beside = {
        "inputs": given["inputs"]["x"],
        "labels": given["labels"],
        "kept": given["inputs"]["attention_mask"],
    }
    terms = [
        distill.feature("hidden", "hidden", features.hint, mask=name, name="one")
        for name in ("attention_mask", "kept")
    ]
    values = [
        step(student, batch, term, teacher=teacher).loss
        for batch, term in zip((given, beside), terms, strict=True)
    ]
    assert values[0] == values[1]


def test_nothing_kept_is_a_loss_of_zero() -> None:
    given = sequences(3)
    given["inputs"]["attention_mask"].zero_()
    term = distill.feature("hidden", "hidden", features.hint, mask="attention_mask")
    assert step(Tokens(), given, term, teacher=Tokens()).loss == 0.0


def test_masks_that_cannot_be_used_are_named() -> None:
    def train(**how: Any) -> None:
        term = distill.feature("hidden", "hidden", features.hint, name="one", **how)
        step(Tokens(), sequences(3), term, teacher=Tokens())

    with pytest.raises(ValueError, match=r"term 'one': mask: got no tensor 'mask' among"):
        train(mask="mask")
    with pytest.raises(ValueError, match="rows: got 'some'"):
        train(rows="some")
    with pytest.raises(ValueError, match="expected one of them"):
        train(rows="labelled", mask="attention_mask")
    given = sequences(3)
    given["inputs"]["attention_mask"] = torch.ones(6, 4)
    term = distill.feature("hidden", "hidden", features.hint, mask="attention_mask")
    with pytest.raises(ValueError, match=r"mask: got \[6, 4\] for features \[6, 8, 5\]"):
        step(Tokens(), given, term, teacher=Tokens())
