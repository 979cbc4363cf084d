"""Quantised weights: what they take, how they learn, and what of the model stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from trainer_runs import equal, weights

from fastkd import distill
from fastkd.recipes.quantization import FakeQuantize, convert, fake_quantize, prepare_qat


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 40), nn.Linear(40, 3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_values_are_the_nearest_of_the_levels(bits: int, dtype: torch.dtype) -> None:
    w = torch.linspace(-3, 3, 4001, dtype=torch.float64).to(dtype)
    step = torch.tensor(2.0 ** (1 - bits), dtype=dtype)
    values = fake_quantize(w, step, bits)
    half = 2 ** (bits - 1)
    levels = (torch.arange(-half, half, dtype=torch.float64) + 0.5) * step.double()
    assert torch.equal(values.unique().double(), levels)
    nearest = (w.double().unsqueeze(1) - levels).abs().min(1).values
    assert torch.equal((w.double() - values.double()).abs(), nearest)


def test_gradients_are_those_of_the_definition() -> None:
    w = (torch.randn(5, 7, dtype=torch.float64) * 2).requires_grad_()
    step = torch.rand(5, 1, dtype=torch.float64).add(0.3).requires_grad_()
    seen = torch.randn(5, 7, dtype=torch.float64)
    value = fake_quantize(w, step, 2)
    value.backward(seen)
    ratio, level = (w / step).detach(), (value / step).detach()
    inside = ratio.abs() <= 2
    assert 5 < inside.sum() < 30  # both kinds
    torch.testing.assert_close(w.grad, seen * inside, rtol=1e-12, atol=0)
    expected = (seen * torch.where(inside, level - ratio, level)).sum(1, keepdim=True)
    torch.testing.assert_close(step.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_first_step_has_the_least_squared_error(bits: int, per: str) -> None:
    w = torch.randn(3, 200, dtype=torch.float64)
    rounding = FakeQuantize(w, bits, per)
    assert rounding.step.shape == ((3, 1) if per == "channel" else (1, 1))

    def error(step: Tensor) -> Tensor:
        each = (fake_quantize(w, step, bits) - w).square()
        return each.sum(1, keepdim=True) if per == "channel" else each.sum()

    mine = error(rounding.step.detach())
    widest = 2.0 ** (2 - bits) * w.abs().max()
    for share in torch.linspace(0.01, 1.0, 150, dtype=torch.float64):
        assert (mine <= 1.05 * error((share * widest).expand_as(rounding.step))).all()


def test_two_values_of_equal_size_are_met_exactly() -> None:
    w = torch.tensor([[0.75, -0.75, 0.75], [2.0, 2.0, -2.0]])
    torch.testing.assert_close(FakeQuantize(w, 1)(w).detach(), w)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_trained_weights_take_few_values_and_teacher_and_rest_stay(bits: int, per: str) -> None:
    model = convnet()
    before = weights(model)
    twin = prepare_qat(model, bits, per=per)
    first = convert(twin)  # post-training quantisation
    x, y = torch.randn(40, 1, 4, 4), torch.randint(3, (40,))
    terms = [distill.hard(), distill.soft()]
    steps = distill.train(twin, [(x, y)] * 20, terms, teacher=model, lr=1e-2, progress=False)
    assert steps[-1].loss < steps[0].loss
    plain = convert(twin)
    assert equal(weights(model), before)  # a copy learns
    assert plain.state_dict().keys() == before.keys()
    assert type(plain[0]) is nn.Conv2d and type(plain[4]) is nn.Linear
    for at in (0, 3, 4):
        weight = plain[at].weight
        rows = weight.flatten(1) if per == "channel" else weight.flatten().unsqueeze(0)
        assert all(len(row.unique()) <= 2**bits for row in rows)
        assert weight.requires_grad and not torch.equal(weight, first[at].weight)
    assert len(plain[3].weight.unique()) > 2**bits or per == "tensor"
    # not to be had by rounding what it learnt from: biases and norms stay floats
    assert len(plain[3].bias.unique()) > 2**bits
    for one in (plain, twin):
        one.eval()
    assert torch.equal(plain(x), twin(x))


def test_a_copy_goes_on_learning_after_another_was_converted() -> None:
    """Copies share the class that torch puts the rounded weight on."""
    twin = prepare_qat(convnet(), 2)
    average = distill.EMATeacher(twin, decay=0.5)
    other = copy.deepcopy(twin)
    plain = convert(twin)
    x, y = torch.randn(8, 1, 4, 4), torch.randint(3, (8,))
    for one in (twin, other, average.model):
        assert torch.equal(one.eval()(x), plain.eval()(x))
    distill.train(twin, [(x, y)] * 3, distill.hard(), ema=average, lr=1e-2, progress=False)
    assert not torch.equal(twin.eval()(x), plain(x))
    assert not torch.equal(average.model.eval()(x), plain(x))
    assert torch.equal(other(x), plain(x))
    assert len(convert(average.model)[4].weight[0].unique()) <= 4


def test_only_named_layers_and_other_parametrisations_stay() -> None:
    model = convnet()
    parametrizations.weight_norm(model[4])
    twin = prepare_qat(model, 2, layers=["3"])
    assert torch.equal(twin[0].weight, model[0].weight)
    assert all(len(row.unique()) <= 4 for row in twin[3].weight)
    plain = convert(twin)
    assert {"0.weight", "3.weight", "4.parametrizations.weight.original0"} <= set(
        plain.state_dict()
    )


def test_a_frozen_weight_and_a_weight_of_zeros() -> None:
    layer = nn.Linear(16, 4)
    layer.weight.requires_grad_(False)
    assert not any(
        p.requires_grad for n, p in prepare_qat(layer, 4).named_parameters() if n != "bias"
    )
    nn.init.zeros_(layer.weight)
    layer.weight.requires_grad_(True)
    twin = prepare_qat(layer, 4)
    step = twin.parametrizations.weight[0].step
    torch.testing.assert_close(step, torch.full((4, 1), 16**-0.5 / 8))  # as of a fresh layer
    x = torch.randn(64, 16)
    y = x[:, :4].argmax(-1)
    steps = distill.train(twin, [(x, y)] * 60, distill.hard(), lr=3e-2, progress=False)
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_state_comes_back() -> None:
    one, two = prepare_qat(convnet(), 2), prepare_qat(convnet(), 2)
    two.load_state_dict(one.state_dict())
    assert equal(convert(one).state_dict(), convert(two).state_dict())


def test_eight_bits_are_nearly_the_float_model() -> None:
    model, x = convnet().eval(), torch.randn(30, 1, 4, 4)
    errors = [F.mse_loss(prepare_qat(model, bits).eval()(x), model(x)).item() for bits in (2, 4, 8)]
    assert errors[0] > 5 * errors[1] > 50 * errors[2] > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 0}, "bits: got 0"),
        ({"bits": 9}, "bits: got 9"),
        ({"bits": 2.5}, "bits: got 2.5"),
        ({"bits": 2, "per": "row"}, "per: got 'row'"),
        ({"bits": 2, "layers": ["0", "1"]}, r"layers: got \['1'\], expected some of \['0', '3'"),
        ({"bits": 2, "layers": ["none"]}, r"layers: got \['none'\]"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prepare_qat(convnet(), **options)


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(TypeError, match="layers: got the string '0'"):
        prepare_qat(convnet(), 2, layers="0")
    with pytest.raises(ValueError, match=r"model: got \['0', '3', '4'\] quantised already"):
        prepare_qat(prepare_qat(convnet(), 2), 2)
    with pytest.raises(ValueError, match="model: got no quantised weight"):
        convert(convnet())
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="layers: got '0' and '1' with one weight"):
        prepare_qat(tied, 2)
    assert len(prepare_qat(tied, 2, layers=["1"])[1].weight[0].unique()) <= 4
