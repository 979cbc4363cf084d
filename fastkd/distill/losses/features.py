"""Losses between the features of a student's and a teacher's layer.

    distill.feature("layer1", "layer3", features.hint, 100.0, projector=...)
    distill.feature("layer1", "layer3", features.VID(32, 64))

Functions are (student features, teacher features) -> 0-d tensor, in float32 at least, also under
autocast; a module (`VID`, `MGD`) is such a function that learns, and its term trains it and puts it
into checkpoints. Options go in by `functools.partial`. Gradients go to both sides; the trainer
detaches the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.arguments.messages import shown

from .feature_shapes import (
    channels_last,
    check_same_shape,
    expect,
    full_precision,
    maps,
    pooled,
    same_batch,
    unit,
)

HINTS = ("l2", "l1", "cosine")
KERNELS = ("polynomial", "linear", "gaussian")


@full_precision
def hint(student: Tensor, teacher: Tensor, *, kind: str = "l2") -> Tensor:
    """Distance of features: the hint of FitNets and its relatives.

        "l2": mean (s - t)^2    "l1": mean |s - t|    "cosine": mean over vectors of 1 - cos(s, t)

    A mean, so that the weight does not depend on sizes: the paper's 1/2 |s - t|^2 of a sample of D
    numbers is D / 2 times "l2". A vector is what lies along the last dimension, in maps
    [N, C, H, W] along the channels; two zero vectors have cos = 0.

    Args:
        student, teacher: features of one shape; see `fastkd.distill.projector` for others.
        kind: "l2", "l1" or "cosine".

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: shapes that differ (both are named), another kind.

    Paper: Romero et al. 2014 (FitNets), arXiv 1412.6550.
    """
    if kind not in HINTS:
        raise ValueError(f"kind: got {shown(kind)}, expected one of {HINTS}")
    check_same_shape(student, teacher)
    if kind == "l2":
        return F.mse_loss(student, teacher)
    if kind == "l1":
        return F.l1_loss(student, teacher)
    s, t = unit(channels_last(student)), unit(channels_last(teacher))
    return (1 - (s * t).sum(-1)).mean()


@full_precision
def nst(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: str = "polynomial",
    degree: int = 2,
    offset: float = 0.0,
    bandwidth: float | None = None,
) -> Tensor:
    """Neuron selectivity transfer: squared maximum mean discrepancy of the channels' unit maps.

        mean over samples of  mean_ij k(t_i, t_j) + mean_ij k(s_i, s_j) - 2 mean_ij k(s_i, t_j)

    s_i, t_j: the i-th and j-th channel's map, flattened and divided by its 2-norm, so the numbers
    of channels may differ. Of features [N, D] a neuron's map is its activation over the batch.

    Args:
        student, teacher: [N, C, H, W] (the larger averaged down to the smaller height and width),
            [N, L, C] with one L, or [N, D].
        kernel: "polynomial" (x.y + offset)^degree, "linear" x.y, or "gaussian"
            exp(-|x - y|^2 / (2 bandwidth)).
        degree, offset: of the polynomial.
        bandwidth: of the Gaussian, a squared distance > 0; None for the mean of |s_i - t_j|^2 of
            each sample, as a constant.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: features that cannot be compared (both shapes are named), an
            option out of range.

    Paper: Huang and Wang 2017, arXiv 1707.01219.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: got {shown(kernel)}, expected one of {KERNELS}")
    if degree < 1 or (bandwidth is not None and not bandwidth > 0):
        got = f"degree={shown(degree)}, bandwidth={shown(bandwidth)}"
        raise ValueError(f"kernel: got {got}, expected a degree >= 1 and a bandwidth > 0")
    same_batch(student, teacher, (2, 3, 4))
    s, t = pooled(student, teacher)
    both = (x.unsqueeze(0) if x.dim() == 2 else x for x in (s, t))  # the batch is the map
    s, t = (unit(maps(x)) for x in both)
    same = student.dim() == teacher.dim() and s.size(2) == t.size(2)
    expect(same, student, teacher, "maps of one size: [N, C, H, W], [N, L, C] or [N, D] on both")
    if kernel == "linear":  # what the three means come to
        return (s.mean(1) - t.mean(1)).square().sum(-1).mean()
    products = [a @ b.transpose(1, 2) for a, b in ((t, t), (s, s), (s, t))]
    if kernel == "polynomial":
        values = [(product + offset) ** degree for product in products]
    else:
        squares = [(s.square().sum(-1), t.square().sum(-1)) for s, t in ((t, t), (s, s), (s, t))]
        distances = [
            (a.unsqueeze(2) + b.unsqueeze(1) - 2 * product).clamp(min=0)
            for (a, b), product in zip(squares, products, strict=True)
        ]
        usual = distances[2].detach().mean((1, 2), keepdim=True)
        width = usual.where(usual > 0, 1.0) if bandwidth is None else bandwidth
        values = [torch.exp(-distance / (2 * width)) for distance in distances]
    teachers, students, between = (value.mean((1, 2)) for value in values)
    return (teachers + students - 2 * between).mean()


@full_precision
def second_moment(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of second moments: what some texts call MMD, and far weaker than `nst`.

        | mean f f^T (student) - mean f f^T (teacher) |^2,  the squared Frobenius norm

    The mean runs over all vectors f: samples, and positions of sequences and maps, whose numbers
    may differ.

    Args:
        student, teacher: [..., D] or maps [N, C, H, W] (vectors of the C channels), with one D.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: vectors of different lengths; both shapes are named.

    Known as a second-order statistic, e.g. in Sun and Saenko 2016 (CORAL), arXiv 1607.01719, there
    of centred features.
    """
    expect(True, student, teacher, "")
    fits = student.dim() >= 2 and teacher.dim() >= 2
    if fits:
        s, t = (channels_last(x).flatten(0, -2) for x in (student, teacher))
        fits = s.size(1) == t.size(1)
    expect(fits, student, teacher, "[..., D] or [N, C, H, W] with as many features or channels")
    return (s.T @ s / s.size(0) - t.T @ t / t.size(0)).square().sum()


class VID(nn.Module):
    """Variational information distillation: negative log-likelihood of the teacher's features.

        mean of 1/2 [(t - mu(s))^2 / v_c + log v_c],   v_c = exp(log_variance_c) + floor

    A constant log(2 pi) / 2 is left out. mu and one variance per channel c of the teacher are
    learnt; below 0 the loss says that the student predicts its teacher well.

    Args:
        student, teacher: numbers of channels: D of [..., D], C of [N, C, H, W].
        mean: mu, any module from student features to the teacher's shape; None for a linear map of
            the channels (a 1 x 1 convolution for maps).
        floor: least variance, > 0: without it the loss of a perfect student has no lower bound.

    Called with:
        student, teacher: features [..., D] or [N, C, H, W].

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: mu(student) of another shape than the teacher's; both are named.

    Paper: Ahn et al. 2019, arXiv 1904.05835 (there v = log(1 + exp(.)) + floor).
    """

    def __init__(
        self, student: int, teacher: int, *, mean: nn.Module | None = None, floor: float = 1e-5
    ) -> None:
        super().__init__()
        if not floor > 0:
            raise ValueError(f"floor: got {shown(floor)}, expected a variance > 0")
        self.mean = Channels(student, teacher) if mean is None else mean
        self.log_variance = nn.Parameter(torch.zeros(teacher))
        self.floor = floor

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        expect(True, student, teacher, "")
        predicted = self.mean(student.to(self.log_variance.dtype))
        check_same_shape(predicted, teacher)
        variance = self.log_variance.exp() + self.floor
        return _likelihood(predicted, teacher, variance)

    def extra_repr(self) -> str:
        return f"mean 1/2 [(t - mean(s))^2 / v + log v], v = exp(log_variance) + {self.floor:g}"


@full_precision
def _likelihood(predicted: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    error = channels_last(predicted) - channels_last(teacher)
    expect(error.size(-1) == variance.numel(), predicted, teacher, f"{variance.numel()} channels")
    return (error.square() / variance + variance.log()).mean() / 2


class MGD(nn.Module):
    """Masked generative distillation: a teacher's features from what a mask leaves of a student's.

        mean (G(m * align(s)) - t)^2,   m = 0 with probability `ratio`, else 1

    Maps lose positions (all channels of one), vectors lose single features. G is two 3 x 3
    convolutions, or two linear maps, with a ReLU between; align makes the channels the teacher's.
    The mask comes from torch's generator, in train and in eval mode. A mean; the paper sums.

    Args:
        student, teacher: numbers of channels: C of [N, C, H, W], D of [..., D].
        ratio: share that is masked, 0 <= ratio < 1.
        spatial: maps [N, C, H, W]; False for [..., D].

    Called with:
        student, teacher: features with one height and width, or equal leading dimensions.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: features that cannot be compared; both shapes are named.

    Paper: Yang et al. 2022, arXiv 2205.01529.
    """

    def __init__(
        self, student: int, teacher: int, *, ratio: float = 0.5, spatial: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio: got {shown(ratio)}, expected 0 <= ratio < 1")
        self.ratio, self.spatial = ratio, spatial
        self.align = nn.Identity() if student == teacher else Channels(student, teacher)
        layers = [
            nn.Conv2d(teacher, teacher, 3, padding=1) if spatial else nn.Linear(teacher, teacher)
            for _ in range(2)
        ]
        self.generate = nn.Sequential(layers[0], nn.ReLU(), layers[1])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        expect(True, student, teacher, "")
        expected = "[N, C, H, W] on both" if self.spatial else "[..., D] on both, see spatial="
        for x in (student, teacher):
            expect((x.dim() == 4) == self.spatial, student, teacher, expected)
        aligned = self.align(student.to(next(self.generate.parameters()).dtype))
        check_same_shape(aligned, teacher)
        shape = aligned[:, :1].shape if self.spatial else aligned.shape
        kept = torch.rand(shape, device=aligned.device) >= self.ratio
        return hint(self.generate(aligned * kept), teacher)

    def extra_repr(self) -> str:
        return f"mean (generate(mask * align(s)) - t)^2, ratio={self.ratio:g}"


class Channels(nn.Module):
    """A linear map of the channels: of [..., D], and of [N, C, H, W] (a 1 x 1 convolution).

    Args:
        inputs, outputs: numbers of channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        if features.size(1 if features.dim() == 4 else -1) != self.linear.in_features:
            got = f"features {list(features.shape)}"
            raise ValueError(f"student: got {got}, expected {self.linear.in_features} channels")
        mixed = self.linear(channels_last(features))
        return mixed.movedim(-1, 1) if features.dim() == 4 else mixed


class Each(nn.Module):
    """A projector for a tuple of layers: the i-th feature through the i-th module.

    Args:
        *projectors: as many as there are layers, e.g. of `fastkd.distill.projector`.

    Called with:
        features: sequence of tensors.

    Returns:
        Tuple of what each projector makes of its feature.

    Raises:
        ValueError: another number of features.
    """

    def __init__(self, *projectors: nn.Module) -> None:
        super().__init__()
        self.projectors = nn.ModuleList(projectors)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(features) != len(self.projectors):
            expected = f"one for each of {len(self.projectors)} projectors"
            raise ValueError(f"student: got {len(features)} features, expected {expected}")
        return tuple(p(x) for p, x in zip(self.projectors, features, strict=True))
