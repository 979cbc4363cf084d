"""A network of the digits in 2-bit weights, where few labels are left to train it with.

The float network has been trained on 1 000 labels; whoever quantises it has 100 of them, and 900
images without. "PTQ" rounds and trains nothing. The others train through the rounding: with the
labels alone, or taught by the float network on the same images, or on all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastkd import distill
from fastkd.arguments.messages import shown

from .data import LABELLED, POOL, digits
from .recipe import Figures, Gain, Recipe
from .training import fit, held_out, mlp, sample_batches, scaled, seen_labels

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PER = ("channel", "tensor")
TRIED = 64  # steps from which the best is taken at the start


def fake_quantize(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits levels; gradients pass as if only the range were limited.

        level = clamp(floor(w / step), -2^(bits - 1), 2^(bits - 1) - 1) + 1 / 2
        value = step * level
        d value / d w = 1 within the range of the levels, 0 beyond it
        d value / d step = level - w / step within it, level beyond

    The levels lie evenly on both sides of 0, which is none of them.

    Args:
        weight: floating point, any shape.
        step: distance of two levels, above 0; broadcast against `weight`.
        bits: 1 to 8.

    Papers: Bengio, Leonard and Courville 2013, arXiv 1308.3432 (straight through); Esser et al.
    2020, arXiv 1902.08153 (the step's gradient).
    """
    half = 2.0 ** (bits - 1)
    ratio = (weight / step).clamp(-half, half)
    level = ratio.detach().floor().clamp(max=half - 1) + 0.5
    return step * (level + (ratio - ratio.detach()))  # level + 0: exactly 2^bits values


class FakeQuantize(nn.Module):
    """The parametrisation that `prepare_qat` puts on weights: learns one step, or one per output.

    It learns the step's logarithm, so that a learning rate means a relative change and the step
    stays above 0. It starts where the weights it is given have the least squared error.

    Args:
        weight: [out, ...], read only.
        bits: 1 to 8.
        per: "channel" for a step of each output, "tensor" for one.
    """

    def __init__(self, weight: Tensor, bits: int, per: str = "channel") -> None:
        super().__init__()
        self.bits = bits
        rows = weight.detach().flatten(1) if per == "channel" else weight.detach().view(1, -1)
        steps = _least_error(rows, bits).view(-1, *[1] * (weight.dim() - 1))
        self.log_step = nn.Parameter(steps.log(), weight.requires_grad)

    @property
    def step(self) -> Tensor:
        """Distance of two levels, [out, 1 ...] or [1, 1 ...]."""
        return self.log_step.exp()

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.step, self.bits)


def prepare_qat(
    model: nn.Module, bits: int, *, per: str = "channel", layers: Sequence[str] | None = None
) -> nn.Module:
    """A copy whose weights are rounded to 2^bits levels in every forward pass: train it as any.

    Float weights stay behind the rounded ones and learn, with the distance of the levels, through
    the gradients of `fake_quantize`; a copy that was not trained is post-training quantisation. As
    teacher of a transfer set, the float `model` itself is at hand.

    Args:
        model: module, read only; weights of Linear and Conv layers are taken, biases and all else
            stay as they are.
        bits: of a weight, 1 to 8.
        per: "channel" for levels of each output's own, "tensor" for one set of them.
        layers: names of the modules to take; None for every Linear and Conv.

    Raises:
        ValueError: an argument out of range, a name that is no Linear or Conv, a weight that two of
            the layers share or that is quantised already.

    Paper: Polino, Pascanu and Alistarh 2018, arXiv 1802.05668.
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits: got {shown(bits)}, expected an integer from 1 to 8")
    if per not in PER:
        raise ValueError(f"per: got {shown(per)}, expected one of {PER}")
    if isinstance(layers, str):
        raise TypeError(f"layers: got the string {shown(layers)}, expected a list of names")
    clone = copy.deepcopy(model)
    able = {name: part for name, part in clone.named_modules() if isinstance(part, LAYERS)}
    chosen = list(able) if layers is None else list(dict.fromkeys(layers))
    if wrong := [name for name in chosen if name not in able]:
        raise ValueError(f"layers: got {wrong}, expected some of {list(able)}")
    if done := [name for name in chosen if _is_quantised(able[name])]:
        raise ValueError(f"model: got {done} quantised already, expected plain weights")
    seen: dict[int, str] = {}
    for name in chosen:
        other = seen.setdefault(id(able[name].weight), name)
        if other != name:
            raise ValueError(f"layers: got {other!r} and {name!r} with one weight, expected one")
    for name in chosen:
        layer = able[name]
        rounding = FakeQuantize(layer.weight, bits, per)
        parametrize.register_parametrization(layer, "weight", rounding)
    return clone


def convert(model: nn.Module) -> nn.Module:
    """A plain copy of a model from `prepare_qat`: its rounded weights, nothing else of it left.

    At most 2^bits values occur in each output's weights (or each tensor's). They are held in the
    model's own dtype: what is saved gets smaller only where a format packs them.

    Args:
        model: module, read only.

    Raises:
        ValueError: no quantised weight in it.
    """
    clone = copy.deepcopy(model)
    parts = [part for part in clone.modules() if _is_quantised(part)]
    if not parts:
        raise ValueError("model: got no quantised weight, expected a model from prepare_qat()")
    for part in parts:
        # copies share the class that holds the rounded weight, and removing it would change theirs
        layer_class = type(part)
        part.__class__ = type(layer_class.__name__, layer_class.__bases__, dict(vars(layer_class)))
        parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
    return clone


def _is_quantised(part: nn.Module) -> bool:
    if not parametrize.is_parametrized(part, "weight"):
        return False
    return any(isinstance(by, FakeQuantize) for by in part.parametrizations["weight"])  # type: ignore[index]


def _least_error(rows: Tensor, bits: int) -> Tensor:
    """[R]: the step of least squared error for each of `rows` [R, N], of TRIED even ones."""
    largest = rows.abs().amax(1)
    widest = largest * 2.0 ** (2 - bits)  # twice what reaches the largest: for 1 bit, 2 mean |w|
    best, least = widest, torch.full_like(widest, torch.inf)
    for at in range(1, TRIED + 1):
        step = widest * (at / TRIED)
        error = (fake_quantize(rows, step.unsqueeze(1), bits) - rows).square().sum(1)
        best, least = best.where(error >= least, step), least.minimum(error)
    # a row of zeros says nothing of the values it will have: those of a fresh layer
    return best.where(largest > 0, rows.size(1) ** -0.5 * 2.0 ** (1 - bits))


# ---- the recipe

FLOAT_STEPS, STEPS, BATCH = 200, 600, 100
WIDTH, BITS = 32, 2


def quantised(seed: int, size: float) -> Figures:
    data, steps = digits(seed), scaled(STEPS, size)
    torch.manual_seed(seed)
    batches = sample_batches(seed, scaled(FLOAT_STEPS, size), BATCH, data.images, data.labels)
    plain = fit(mlp(64, WIDTH, 10), batches, distill.hard())
    labels = seen_labels(data)
    distilled = distill.hard(0.1), distill.soft(0.9, temperature=2.0)

    def trained(rows: int, *loss: distill.Term) -> float:
        batches = sample_batches(seed, steps, BATCH, data.images[:rows], labels[:rows])
        net = prepare_qat(plain, BITS)
        fit(net, batches, loss, lr=3e-3, teacher=plain, schedule=distill.lr_schedule(steps))
        return held_out(convert(net), data)

    return {
        "float": held_out(plain, data),
        "PTQ": held_out(convert(prepare_qat(plain, BITS)), data),
        "QAT": trained(LABELLED, distill.hard()),
        "QAT, same inputs": trained(LABELLED, *distilled),
        "QAT, unlabelled": trained(POOL, *distilled),
    }


RECIPES = (
    Recipe(
        name="quantised",
        about="a network in 2-bit weights, trained through the rounding with and without a teacher",
        paper="Polino, Pascanu and Alistarh 2018, arXiv 1802.05668",
        run=quantised,
        gains=(
            Gain("QAT, unlabelled", "QAT", 1.8, seeds_improved=1.0),
            Gain("QAT, same inputs", "QAT", None),
            Gain("PTQ", "QAT", None),
        ),
    ),
)
