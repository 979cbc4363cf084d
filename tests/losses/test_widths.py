"""Student and teacher whose vocabularies are padded to different widths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import DIVERGENCES, EXACT, INPUTS, NAMED, Backend, label_of
from oracle import FLOORS
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd import distill
from fastkd.divergence import Divergence

USED, WIDTHS = 9, ((12, 17), (17, 9), (9, 12))
GARBAGE = ((math.nan, math.inf), (1e30, math.nan), (-math.inf, 1e30))


def padded(x: Tensor, width: int, what: float) -> Tensor:
    return F.pad(x, (0, width - x.size(-1)), value=what)


def operand(form: str, x: Tensor, width: int, what: float) -> tuple[Any, list[Tensor]]:
    """The operand and what of it gets a gradient, padded last."""
    if form == "dense":
        z = padded(x, width, what).requires_grad_()
        return z, [z]
    if form == "topk":
        log, at = x.double().log_softmax(-1).to(x.dtype).topk(x.size(-1))
        return fastkd.TopK(log, at), []
    weight = torch.full((width, x.size(-1)), what, dtype=x.dtype, device=x.device)
    weight[: x.size(-1)] = torch.eye(x.size(-1))
    h, weight = x.clone().requires_grad_(), weight.requires_grad_()
    return fastkd.LinearLogits(h, weight, chunk_size=2), [h, weight]


FORMS = [(a, b) for a in ("dense", "linear") for b in ("dense", "linear", "topk")]


@pairwise
@pytest.mark.interpreted(5)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=label_of)
@pytest.mark.parametrize("forms", FORMS, ids="-".join)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_columns_that_are_padding_reach_nothing(
    backend: Backend, divergence: Divergence, forms: tuple[str, str], widths: tuple[int, int]
) -> None:
    """As without them, bit for bit; and 0 where the rest is equal."""
    s, t = (x.to(backend.device) for x in INPUTS["random"](5, USED))
    y = torch.tensor([0, 8, -100, 3, 4], device=backend.device)
    garbage = GARBAGE[WIDTHS.index(widths)]
    for equal in (False, True):
        t = s.clone() if equal else t
        made = []
        for at in ((USED, USED), widths):
            given: list[Any] = []
            wanted: list[Tensor] = []
            for form, x, width, what in zip(forms, (s, t), at, garbage, strict=True):
                one, parts = operand(form, x, width, what)
                given.append(one)
                wanted += parts
            loss = fastkd.distillation_loss(
                *given, y, divergence=divergence, alpha=0.25 * (not equal), vocab_size=USED,
                temperature=1.0,
            )  # fmt: skip
            made.append((loss.detach(), torch.autograd.grad(loss, wanted)))
        (value, grads), (same, slopes) = made
        assert torch.equal(value, same)
        for grad, slope, form in zip(grads, slopes, _parts(forms), strict=True):
            cut = slope[:USED] if form == "weight" else slope[..., :USED]
            rest = slope[USED:] if form == "weight" else slope[..., USED:]
            assert torch.equal(grad, cut) and (rest == 0).all()
        if equal:
            assert same.abs() <= FLOORS[torch.float32]
            exact = backend.name != "reference" and "topk" not in forms
            if exact and divergence.name in EXACT:
                assert same == 0 and all((slope == 0).all() for slope in slopes)


def _parts(forms: tuple[str, str]) -> list[str]:
    names = {"dense": ["dense"], "linear": ["dense", "weight"], "topk": []}
    return [name for form in forms for name in names[form]]


SHORT = {
    **{loss.__name__: loss for loss in NAMED.values()},
    "distillation_loss": lambda s, t, **k: fastkd.distillation_loss(s, t, alpha=0.0, **k),
    "logit_mse": distill.logit_mse,
    "zscore": distill.zscore,
    "cosine": distill.cosine,
    "dist": distill.dist,
    "nkd": lambda s, t, **k: distill.nkd(s, t, torch.zeros(5, dtype=torch.long), **k),
    "dkd": lambda s, t, **k: distill.dkd(s, t, torch.zeros(5, dtype=torch.long), **k),
}


@pytest.mark.parametrize("name", SHORT)
def test_another_width_is_refused_with_its_remedy(backend: Backend, name: str) -> None:
    s, t = (x.to(backend.device) for x in INPUTS["random"](5, USED))
    loss = SHORT[name]
    if name in ("dkd", "nkd") and backend.device.type != "cpu":
        pytest.skip("its labels are on the host")
    wide = padded(t, 12, math.nan)
    with pytest.raises(ValueError, match=r"teacher: .*vocab_size="):
        loss(s, wide)
    assert torch.equal(loss(s, wide, vocab_size=USED), loss(s, t))


@pytest.mark.parametrize(
    "module",
    [fastkd.nn.KLDiv, fastkd.nn.JSDiv, fastkd.nn.DistillationLoss],
    ids=lambda x: x.__name__,
)
def test_modules(backend: Backend, module: Any) -> None:
    s, t = (x.to(backend.device) for x in INPUTS["random"](5, USED))
    y = torch.arange(5, device=backend.device)
    wide = padded(t, 12, math.nan)
    assert torch.equal(module(vocab_size=USED)(s, wide, y), module()(s, t, y))


@pytest.mark.not_interpreted
def test_a_real_pair_of_widths(backend: Backend) -> None:
    """151 665 columns in use, padded to 151 936 and to 152 064."""
    used = 151_665
    x = torch.randn(2, used, device=backend.device).bfloat16()
    s = padded(x, 151_936, math.nan).requires_grad_()
    t = padded(x, 152_064, math.inf)
    loss = fastkd.kl_div(s, t, vocab_size=used, reduction="sum")
    loss.backward()
    assert s.grad is not None and (s.grad[:, used:] == 0).all()
    if backend.name == "reference":
        assert loss.abs() <= 2 * FLOORS[torch.float32]
    else:
        assert loss == 0 and (s.grad == 0).all()
