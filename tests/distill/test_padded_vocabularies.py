"""A teacher whose vocabulary is padded otherwise than the student's: vocab_size in every term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_runs import step

import fastkd
from fastkd import distill

V = 5  # tokens in use


class Padded(nn.Module):
    """Logits of V columns and some more, larger than any other."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.layer, self.more = nn.Linear(4, V), more

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.layer(x), (0, self.more), value=50.0)


def models() -> tuple[Padded, Padded, Any]:
    torch.manual_seed(0)
    return Padded(1), Padded(3), (torch.randn(8, 4), torch.randint(V, (8,)))


TERMS: dict[str, Callable[..., distill.Term]] = {
    "soft": lambda n: distill.soft(vocab_size=n),
    "soft of labelled rows": lambda n: distill.soft(vocab_size=n, rows="labelled"),
    "hard": lambda n: distill.hard(vocab_size=n, label_smoothing=0.1),
    **{
        f.__name__: lambda n, f=f: distill.response(f, vocab_size=n)  # type: ignore[misc]
        for f in (distill.logit_mse, distill.dkd, distill.nkd, distill.zscore, distill.cosine)
    },
    "dist": lambda n: distill.response(distill.dist, vocab_size=n),
    "uld": lambda n: distill.uld(vocab_size=n),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_sees_the_columns_in_use(name: str) -> None:
    results = []
    for padded in (True, False):
        student, teacher, given = models()
        if not padded:
            student.more = teacher.more = 0
        seen = step(student, given, TERMS[name](V if padded else None), lr=0.1, teacher=teacher)
        results.append((torch.tensor(seen.loss), student.layer.weight.detach()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["soft", "logit_mse", "dist"])
def test_without_it_the_message_names_it(name: str) -> None:
    student, teacher, given = models()
    with pytest.raises(ValueError, match="vocab_size"):
        step(student, given, TERMS[name](None), teacher=teacher)


@pytest.mark.parametrize("name", ["soft", "hard"])
@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (99, ValueError), (2.5, TypeError)])
def test_other_sizes_are_refused(name: str, n: Any, error: type[Exception]) -> None:
    student, teacher, given = models()
    with pytest.raises(error, match=r"vocab_size: got"):
        step(student, given, TERMS[name](n), teacher=teacher)


def test_a_stored_teacher_of_more_tokens() -> None:
    student, teacher, (inputs, labels) = models()
    student.more = 0
    stored = fastkd.topk_from_logits(teacher(inputs), 4, temperature=4.0)
    with pytest.warns(UserWarning, match="past the student's 5 columns"):
        seen = step(student, (inputs, labels, stored), distill.soft(temperature=4.0))
    assert seen.loss > 0


def test_assistants_and_judges() -> None:
    student, teacher, given = models()
    assistant = Padded(2)
    options: dict[str, Any] = dict(progress=False, lr=1e-3, vocab_size=V)
    hard = distill.hard(vocab_size=V)
    distill.assistant_chain(teacher, [assistant, student], [given], hard, **options)
    assert distill.agreement(student, student, [given], vocab_size=V) == 1.0
    bare = Padded(0)
    bare.layer = student.layer
    assert distill.agreement(student, bare, [given], vocab_size=V) == 1.0
    assert distill.agreement(student, bare, [given]) == 0.0  # one says padding, as its largest
    figures = distill.report(student, [given], teacher=teacher, vocab_size=V).figures["student"]
    student.more = teacher.more = 0
    again = distill.report(student, [given], teacher=teacher).figures["student"]
    for name in ("accuracy", "kl", "agreement", "cross_entropy"):
        assert figures[name] == pytest.approx(again[name])
    with pytest.raises(ValueError, match="model_a: vocab_size: got 7"):
        distill.agreement(student, teacher, [given], vocab_size=7)
