"""What people give to terms by habit is right, or refused with what to write instead."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_runs import step

import fastkd
from fastkd import distill
from fastkd.distill.losses import attention, features, relations
from fastkd.recipes.pseudo_labels import pseudo_labels


def batch(classes: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(8, 4), torch.randint(classes, (8,))


class Says(nn.Module):
    """A model whose answer is made by a function of its logits."""

    def __init__(self, answer: Callable[[Tensor], Any], outputs: int = 3) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(4, outputs), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.layer(x))


ANSWERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dict": (lambda z: {"out": z}, r"got a dict with the entries \['out'\], expected 'logits'"),
    "tuple": (lambda z: (z, z), r"got a tuple of 2 \(tensor \[8, 3\], tensor \[8, 3\]\), expected"),
    "list": (lambda z: [z], r"got a list of 1 \(tensor \[8, 3\]\), expected logits"),
    "None": (lambda z: None, "got None, expected logits"),
}
LOSSES: dict[str, Any] = {
    "soft": distill.soft(),
    "response": distill.response(distill.zscore),
    "plain": lambda s, t, y: F.mse_loss(s, t),
}


@pytest.mark.parametrize("answer", list(ANSWERS))
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("source", ["module", "list", "function"])
def test_a_teacher_without_logits_is_named(answer: str, loss: str, source: str) -> None:
    make, message = ANSWERS[answer]
    net: Any = Says(make)
    teacher = {"module": net, "list": [net, net], "function": lambda x: net(x)}[source]
    with pytest.raises((TypeError, ValueError), match=f"teacher: {message}") as caught:
        step(nn.Linear(4, 3), batch(), LOSSES[loss], teacher=teacher)
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("answer", list(ANSWERS))
@pytest.mark.parametrize("loss", ["hard", *LOSSES])
def test_a_student_without_logits_is_named(answer: str, loss: str) -> None:
    make, message = ANSWERS[answer]
    given = LOSSES.get(loss, distill.hard())
    with pytest.raises((TypeError, ValueError), match=f"student: {message}"):
        step(Says(make), batch(), given, teacher=nn.Linear(4, 3))


@pytest.mark.parametrize("answer", list(ANSWERS))
def test_judges_name_a_model_without_logits(answer: str) -> None:
    make, message = ANSWERS[answer]
    net, good = Says(make), nn.Linear(4, 3)
    for call, role in (
        (lambda: distill.evaluate(net, [batch()]), "model"),
        (lambda: distill.agreement(good, net, [batch()]), "model"),
        (lambda: distill.report(net, [batch()]), "student"),
        (lambda: distill.report(good, [batch()], teacher=net), "teacher"),
        (lambda: pseudo_labels(net, [batch()], 2), "teacher"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"{role}: {message}"):
            call()


def test_a_named_tuple_with_logits_is_an_output() -> None:
    Answer = namedtuple("Answer", ["logits", "more"])
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), Says(lambda z: Answer(z, z))
    want = fastkd.kl_div(student(batch()[0]), teacher(batch()[0]).logits).item()
    got = step(student, batch(), distill.soft(temperature=1.0), teacher=teacher)
    assert got.loss == pytest.approx(want)


def test_features_need_no_logits_of_the_teacher() -> None:
    student, teacher = nn.Linear(4, 3), Says(lambda z: {"out": z})
    term = distill.feature("", "layer", features.hint)
    want = F.mse_loss(student(batch()[0]), teacher.layer(batch()[0])).item()
    assert step(student, batch(), term, teacher=teacher).loss == pytest.approx(want)


@pytest.mark.parametrize(
    "term",
    [
        distill.hard(),
        distill.soft(rows="labelled"),
        distill.response(distill.zscore, rows="labelled"),
        distill.response(distill.dkd),
        distill.feature("", "", features.hint, rows="labelled"),
    ],
    ids=lambda term: term.name,
)
def test_terms_of_labelled_rows_need_labels(term: distill.Term) -> None:
    for given in (batch()[0], {"inputs": batch()[0], "label": batch()[1]}):
        with pytest.raises(ValueError, match="got a batch without labels"):
            step(nn.Linear(4, 3), given, term, teacher=nn.Linear(4, 3))


class Maps(nn.Module):
    """Logits [B, C, H, W] of images, as segmentation models give them."""

    def __init__(self, classes: int, stride: int = 1) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def images(classes: int, *, labels: bool) -> Any:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8, 6)
    return (x, torch.randint(classes, (2, 8, 6))) if labels else x


TERMS = {
    "hard": distill.hard(),
    "soft": distill.soft(),
    "labelled": distill.soft(rows="labelled", name="labelled"),
    "response": distill.response(distill.dist),
}


@pytest.mark.parametrize("name", list(TERMS))
@pytest.mark.parametrize("classes", [5, 6])
def test_classes_that_are_not_last_are_refused(name: str, classes: int) -> None:
    with pytest.raises(ValueError, match=r"movedim\(1, -1\)"):
        step(Maps(classes), images(classes, labels=True), TERMS[name], teacher=Maps(classes))


@pytest.mark.parametrize("stride", [1, 2])
def test_maps_without_labels_are_refused(stride: int) -> None:
    models = Maps(5, stride), Maps(5, stride)
    with pytest.raises(ValueError, match=r"got logits .* images as inputs.*movedim\(1, -1\)"):
        step(models[0], images(5, labels=False), distill.soft(), teacher=models[1])


def test_judges_refuse_maps() -> None:
    for judge in (distill.evaluate, distill.report):
        with pytest.raises(ValueError, match=r"movedim\(1, -1\)"):
            judge(Maps(5), [images(5, labels=True)])


@pytest.mark.parametrize("classes", [5, 6, 8])
def test_maps_with_classes_last_are_right(classes: int) -> None:
    class Last(Maps):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).movedim(1, -1).contiguous()

    torch.manual_seed(0)
    student, teacher = Last(classes), Last(classes)
    x, y = images(classes, labels=True)
    got = step(student, (x, y), [distill.hard(), distill.soft(temperature=1.0)], teacher=teacher)
    want = F.cross_entropy(student(x).movedim(-1, 1), y)
    assert got.terms["hard"] == pytest.approx(want.item(), rel=1e-5)
    want = fastkd.kl_div(student(x), teacher(x))
    assert got.terms["soft"] == pytest.approx(want.item(), rel=1e-5)


def test_sequences_of_features_are_no_maps() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 7, 4), torch.randint(4, (2, 7))
    student, teacher = nn.Linear(4, 4), nn.Linear(4, 4)
    got = step(student, (x, y), [distill.hard(), distill.soft()], teacher=teacher)
    want = F.cross_entropy(student(x).flatten(0, 1), y.flatten()).item()
    assert got.terms["hard"] == pytest.approx(want)


def mixed(rows: int = 8) -> Tensor:
    return torch.rand(rows, 3).softmax(-1)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.randint(2, (8, 3)), r"of distill\.binary_hard"),
        (torch.rand(8), r"F\.mse_loss"),
        (torch.randint(3, (6,)), r"got int64 \[6\] for logits \[8, 3\]"),
    ],
    ids=["multi-label", "regression", "rows"],
)
def test_labels_that_are_no_class_numbers(labels: Tensor, says: str) -> None:
    given = distill.Batch(batch()[0], labels)
    with pytest.raises((TypeError, ValueError), match=says) as caught:
        step(nn.Linear(4, 3), given, distill.hard())
    assert str(caught.value).count("hard") and len(str(caught.value)) <= 500
    with pytest.raises((TypeError, ValueError), match=says):
        distill.evaluate(nn.Linear(4, 3), [given])


def test_probabilities_are_labels_of_the_hard_term() -> None:
    student, labels = nn.Linear(4, 3), mixed()
    want = F.cross_entropy(student(batch()[0]), labels, label_smoothing=0.1).item()
    term = distill.hard(label_smoothing=0.1)
    assert step(student, (batch()[0], labels), term).loss == pytest.approx(want)
    with pytest.raises(ValueError, match=r"term 'hard': labels: .*sum to 3 in row 0.*binary_dist"):
        step(student, (batch()[0], torch.ones(8, 3)), term)
    with pytest.raises(ValueError, match=r"labels of distill\.hard alone"):
        distill.evaluate(nn.Linear(4, 3), [distill.Batch(batch()[0], labels)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_labels_of_other_integers_and_columns(dtype: torch.dtype, shape: Any) -> None:
    student, (x, y) = nn.Linear(4, 3), batch()
    given = x, y.to(dtype).view(shape)
    want = F.cross_entropy(student(x), y).item()
    assert step(student, given, distill.hard()).loss == pytest.approx(want)
    right = (student(x).argmax(-1) == y).double().mean().item()
    judged = distill.evaluate(student, [given])
    assert judged.accuracy == pytest.approx(right) and judged.rows == 8


def test_class_weights_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"weight: got Tensor \[3\].*class weights"):
        distill.hard(weight=torch.tensor([1.0, 2.0, 3.0]))  # type: ignore[arg-type]


ONE = {
    "soft": distill.soft,
    "hard": distill.hard,
    "zscore": partial(distill.response, distill.zscore),
    "logit_mse": partial(distill.response, distill.logit_mse),
}


@pytest.mark.parametrize("name", list(ONE))
def test_one_logit_under_a_softmax_warns_once(name: str) -> None:
    given, models = batch(1), (nn.Linear(4, 1), nn.Linear(4, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options: dict[str, Any] = {"teacher": models[1], "progress": False}
        distill.train(models[0], [given] * 3, ONE[name](), **options)
    told = [str(w.message) for w in caught if "single logit" in str(w.message)]
    assert len(told) == 1 and repr(name) in told[0]


def test_one_logit_compared_as_it_is_does_not_warn() -> None:
    term = distill.response(distill.logit_mse, centred=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(nn.Linear(4, 1), batch(1), term, teacher=nn.Linear(4, 1))


def test_feature_terms_are_named_by_their_functions() -> None:
    make = partial(distill.feature, "layer1", "layer3")
    terms = [
        distill.soft(),
        make(features.hint),
        make(relations.rkd_distance),
        make(features.VID(4, 8)),
        make(partial(attention.at, power=2.0)),
        make(F.mse_loss),
        make(lambda s, t: (s - t).mean()),
    ]
    names = ["soft", "hint", "rkd_distance", "VID", "at", "mse_loss", "feature"]
    tail = ":layer1-layer3"
    assert [term.name for term in terms] == ["soft", *(name + tail for name in names[1:])]


def test_errors_in_a_term_carry_its_name() -> None:
    term = distill.feature("", "", features.hint, projector=nn.Linear(5, 5), name="mine")
    with pytest.raises(RuntimeError, match=r"term 'mine': mat1 and mat2"):
        step(nn.Linear(4, 3), batch(), term, teacher=nn.Linear(4, 3))

    def function(*_: Any) -> Tensor:
        return {}["scores"]

    with pytest.raises(KeyError, match="term 'own': scores"):
        step(nn.Linear(4, 3), batch(), distill.Term("own", function))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: distill.soft(divergence="nope"), "divergence: got 'nope'"),
        (lambda: distill.soft(temperature=0), "temperature: got 0"),
        (lambda: distill.binary_soft(divergence="tv"), "divergence: got 'tv'"),
        (lambda: distill.regression(kind="huber"), "kind: got 'huber'"),
        (lambda: distill.regression(alhpa=0.2), "unexpected options .'alhpa'"),
        (lambda: distill.ranking(normalize="max"), "normalize: got 'max'"),
        (lambda: distill.embedding(kind="x"), "kind: got 'x'"),
        (lambda: distill.hard(label_smoothing=3), "label_smoothing: got 3, expected 0 to 1"),
        (lambda: distill.binary_hard(pos_weight=2.0), r"pos_weight: .* torch.tensor\(2.0\)"),
        (lambda: distill.response(distill.dkd, temperature=0), "temperature: got 0"),
    ],
)
def test_an_option_is_refused_where_it_is_given(make: Any, says: str) -> None:
    """Before the first step, which may be hours of preparation later."""
    with pytest.raises((TypeError, ValueError), match=says):
        make()
    distill.soft(temperature=lambda step: 4.0)
    distill.soft(divergence=fastkd.divergences.js(beta=0.3))  # callable, and no schedule
    distill.binary_soft(divergence=fastkd.divergences.reverse_kl)
    distill.regression(lambda s, t, y, own: s.sum(), own=3)
