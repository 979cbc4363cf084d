"""Losses between the relations of samples, or of two layers, within a student and a teacher.

    distill.feature("layer1", "layer3", relations.rkd_distance, 25.0)
    distill.feature("layer1", "layer3", relations.CRD(64, 128))

Functions are (student features, teacher features) -> 0-d tensor, in float32 at least, also under
autocast. A sample is flattened, [N, ...] to [N, D], so the two D may differ and no projector is
needed. Relations are those within one micro-batch: gradient accumulation makes fewer of them, and
a batch of one sample has none, which is a gradient of 0 (`fsp` and `CRD` relate within a sample and
to a bank). A sample of zeros has cosine 0 to all, itself too, and gets no gradient from that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.arguments.messages import shown

from .feature_shapes import expect, full_precision, maps, pooled, same_batch, unit


@full_precision
def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of distances, each in units of its side's mean distance.

        mean over pairs i < j of  huber(|s_i - s_j| / mean |s - s'|, |t_i - t_j| / mean |t - t'|)

    huber(a, b) is (a - b)^2 / 2 up to |a - b| = 1 and |a - b| - 1/2 beyond. Not changed by a
    rotation, a shift or a factor on either side; samples that coincide have gradient 0.

    Args:
        student, teacher: [N, ...] with one N.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: another number of samples; both shapes are named.

    Paper: Park et al. 2019 (RKD), arXiv 1904.05068.
    """
    same_batch(student, teacher)
    s, t = (_over_mean(F.pdist(x.flatten(1))) for x in (student, teacher))
    return F.smooth_l1_loss(s, t, reduction="sum") / max(s.numel(), 1)


@full_precision
def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of angles: the cosine at x_j between x_i and x_k.

        mean over triplets of different i, j, k of  huber(cos(s_i - s_j, s_k - s_j), the same of t)

    Not changed by a rotation, a shift or a factor on either side. Where two samples coincide the
    cosine counts as 0, with gradient 0. Memory N^2 D + N^3.

    Args:
        student, teacher: [N, ...] with one N.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: another number of samples; both shapes are named.

    Paper: Park et al. 2019 (RKD), arXiv 1904.05068.
    """
    same_batch(student, teacher)
    s, t = (_cosines(x.flatten(1)) for x in (student, teacher))
    n = s.size(0)
    ends = ~torch.eye(n, dtype=torch.bool, device=s.device)  # i = k is no angle
    total = (F.smooth_l1_loss(s, t, reduction="none") * ends).sum()
    return total / max(n * (n - 1) * (n - 2), 1)


@full_precision
def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation: the samples' inner products, each row of norm 1.

        | G_s - G_t |^2 / N^2,   G = rows of x x^T, each divided by its 2-norm

    Args:
        student, teacher: [N, ...] with one N.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: another number of samples; both shapes are named.

    Paper: Tung and Mori 2019, arXiv 1907.09682.
    """
    same_batch(student, teacher)
    s, t = (unit(rows @ rows.T) for rows in (student.flatten(1), teacher.flatten(1)))
    return F.mse_loss(s, t)


@full_precision
def cc(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Correlation congruence: a Gaussian kernel between samples, by its Taylor series.

        | K_s - K_t |^2 / N^2,   K = exp(-2 gamma) sum_{p <= order} (2 gamma)^p / p! (x.y)^p

    x and y are features divided by their 2-norm, for which K tends to exp(-gamma |x - y|^2).

    Args:
        student, teacher: [N, ...] with one N.
        gamma: of the Gaussian, > 0.
        order: last power of the series, >= 1.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: another number of samples (both shapes are named), an option out of
            range.

    Paper: Peng et al. 2019, arXiv 1904.01802.
    """
    if not gamma > 0 or order < 1:
        got = f"gamma={shown(gamma)}, order={shown(order)}"
        raise ValueError(f"kernel: got {got}, expected gamma > 0 and order >= 1")
    same_batch(student, teacher)
    factors = [(2 * gamma) ** p / math.factorial(p) for p in range(1, order + 1)]

    def kernel(x: Tensor) -> Tensor:  # without the term of p = 0, the same on both sides
        product = unit(x) @ unit(x).T
        series = sum(f * product**p for p, f in enumerate(factors, 1))
        return math.exp(-2 * gamma) * torch.as_tensor(series)

    return F.mse_loss(kernel(student.flatten(1)), kernel(teacher.flatten(1)))


@full_precision
def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer: which neighbour a sample would pick.

        mean over i of  sum_{j != i} p_ij log(p_ij / q_ij),   p_ij = K_ij / sum_{k != i} K_ik

    K = (1 + cos) / 2 of the teacher's samples for p, of the student's for q; a K below the
    dtype's resolution counts as that, with gradient 0.

    Args:
        student, teacher: [N, ...] with one N.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: another number of samples; both shapes are named.

    Paper: Passalis and Tefas 2018, arXiv 1803.10837 (its sum over i is a mean here).
    """
    same_batch(student, teacher)
    if student.size(0) < 2:
        return (student.flatten()[:0].sum() + teacher.flatten()[:0].sum()) * 0
    s, t = (_neighbours(x.flatten(1)) for x in (student, teacher))
    return fastkd.kl_div(s, t)


@full_precision
def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Flow of the solution procedure: how two layers' channels go together, position by position.

        mean (G_s - G_t)^2,   G = F_1 F_2^T / positions   [N, C_1, C_2] from maps [N, C, positions]

    Within each side the larger of the two maps is averaged down to the smaller's height and width;
    between the sides the positions may differ. Vectors [N, D] are maps of one position.

    Args:
        student, teacher: two layers' features each, as two hook points give them: [N, C, H, W],
            [N, L, C] with one L, or [N, D]; the channels of the two sides have to agree
            (a projector for both layers: `fastkd.distill.losses.features.Each`).

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: features that cannot be compared; all shapes are named.

    Paper: Yim et al. 2017, A gift from knowledge distillation, CVPR 2017.
    """
    flows = []
    for side, name in ((student, "student"), (teacher, "teacher")):
        if isinstance(side, Tensor) or len(side) != 2:
            got = "one tensor" if isinstance(side, Tensor) else f"{len(side)} features"
            raise TypeError(f"{name}: got {got}, expected the features of two layers")
        flows.append(_flow(*side))
    s, t = flows
    if s.shape != t.shape:
        student_shapes, teacher_shapes = (
            [list(x.shape) for x in side] for side in (student, teacher)
        )
        raise ValueError(
            f"features: got {student_shapes} of the student and {teacher_shapes} of the teacher, "
            "expected the same "
            "number of samples, and of channels in each of the two layers"
        )
    return F.mse_loss(s, t)


class CRD(nn.Module):
    """Contrastive representation distillation: noise-contrastive estimation against a bank.

        mean over samples, sum over both directions of
            -log h(s, t) - sum over negatives n of log(1 - h(s, t_n))
        h(s, t) = exp(s.t / tau) / (exp(s.t / tau) + negatives * Z)

    s and t are learnt linear embeddings of unit length; in the other direction negatives s_n meet
    t. Z, one for each direction, is the mean of exp(s.t_n / tau) in the first call in train mode
    and a constant from then on: without it (the paper's text has 1 / size of the training set
    there, its experiments have Z) every negative would have to be opposed, which unit vectors
    cannot all be.

    It departs from the paper in its bank: that one keeps a running mean for each training sample,
    found by its index, and draws negatives from it. Here the negatives are the embeddings of the
    latest samples, all of them, so no index has to travel with the batch; the bank is buffers
    (random at first, checkpointed with the rest) and gets the batch after each call in train mode.

    Args:
        student, teacher: features of a sample when flattened.
        negatives: size of the bank. At most about half of the training set: a sample would meet
            its own older embedding as a negative.
        dim: length of an embedding.
        temperature: tau > 0.

    Called with:
        student, teacher: [N, ...] with one N.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: another number of samples or of features (both shapes are named),
            an option out of range.

    Paper: Tian, Krishnan and Isola 2019, arXiv 1910.10699.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    place: Tensor
    log_z: Tensor

    def __init__(
        self,
        student: int,
        teacher: int,
        *,
        negatives: int = 4096,
        dim: int = 128,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        for name, value in (("negatives", negatives), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name}: got {shown(value)}, expected an integer >= 1")
        if not temperature > 0:
            raise ValueError(f"temperature: got {shown(temperature)}, expected > 0")
        self.negatives, self.temperature = negatives, temperature
        self.student, self.teacher = nn.Linear(student, dim), nn.Linear(teacher, dim)
        self.register_buffer("student_bank", unit(torch.randn(negatives, dim)))
        self.register_buffer("teacher_bank", unit(torch.randn(negatives, dim)))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("log_z", torch.full((2,), math.nan))  # until the first call

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        same_batch(student, teacher)
        flat = student.flatten(1), teacher.flatten(1)
        layers = self.student, self.teacher
        fits = [x.size(1) for x in flat] == [layer.in_features for layer in layers]
        expected = " and ".join(str(layer.in_features) for layer in layers) + " features a sample"
        expect(fits, student, teacher, expected)
        s, t = (f(x.to(f.weight.dtype)) for x, f in zip(flat, layers, strict=True))
        banks = self.teacher_bank.clone(), self.student_bank.clone()  # backward needs them as is
        log_z = _log_z(s.detach(), t.detach(), *banks, temperature=self.temperature)
        log_z = torch.where(self.log_z.isnan(), log_z, self.log_z)  # asked of the device: no wait
        if self.training:
            self.log_z.copy_(log_z)
            self._keep(s, t)
        return _contrast(s, t, *banks, log_z=log_z, temperature=self.temperature)

    @torch.no_grad()
    def _keep(self, s: Tensor, t: Tensor) -> None:
        s, t = (unit(x[-self.negatives :].to(self.student_bank.dtype)) for x in (s, t))
        at = (self.place + torch.arange(s.size(0), device=s.device)) % self.negatives
        self.student_bank.index_copy_(0, at, s)
        self.teacher_bank.index_copy_(0, at, t)
        self.place.copy_((self.place + s.size(0)) % self.negatives)

    def extra_repr(self) -> str:
        h = f"1 / (1 + {self.negatives} Z exp(-s.t / {self.temperature:g}))"
        return f"-log h(s, t) - sum log(1 - h(s, t_n)), h = {h}"


# they compare whole samples, in which padding has to be 0 on both sides
OF_SAMPLES = (rkd_distance, rkd_angle, sp, cc, pkt, CRD)


@full_precision
def _log_z(
    s: Tensor, t: Tensor, teachers: Tensor, students: Tensor, *, temperature: float
) -> Tensor:
    """log of the mean of exp(score / temperature), over samples and negatives, both directions."""
    scores = [(unit(x) @ bank.T).flatten() for x, bank in ((s, teachers), (t, students))]
    return torch.stack([(x / temperature).logsumexp(0) - math.log(x.numel()) for x in scores])


@full_precision
def _contrast(
    s: Tensor, t: Tensor, teachers: Tensor, students: Tensor, *, log_z: Tensor, temperature: float
) -> Tensor:
    """log h = logsigmoid(x), log(1 - h) = logsigmoid(-x) at x = score / temperature - log(N Z)."""
    s, t = unit(s), unit(t)
    positive = (s * t).sum(-1) / temperature
    losses = []
    for x, bank, z in ((s, teachers, log_z[0]), (t, students, log_z[1])):
        shift = z + math.log(bank.size(0))
        against = F.logsigmoid(shift - x @ bank.T / temperature).sum(-1)
        losses.append(-(F.logsigmoid(positive - shift) + against).mean())
    return torch.stack(losses).sum()


def _over_mean(distances: Tensor) -> Tensor:
    """Distances in units of their mean, which is 0 where all samples coincide (or there is one)."""
    mean = distances.sum() / max(distances.numel(), 1)
    return distances / mean.where(mean > 0, 1.0)


def _cosines(x: Tensor) -> Tensor:
    """cos[j, i, k] at x_j between x_i and x_k."""
    towards = unit(x.unsqueeze(0) - x.unsqueeze(1))  # [j, i]: from x_j to x_i
    return towards @ towards.transpose(1, 2)


def _neighbours(x: Tensor) -> Tensor:
    """log K of every other sample, [N, N - 1]."""
    n = x.size(0)
    cosine = unit(x) @ unit(x).T
    # what is not on the diagonal, without a mask that a GPU would have to count
    others = cosine.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
    return ((1 + others) / 2).clamp(min=torch.finfo(x.dtype).eps).log()


def _flow(first: Tensor, second: Tensor) -> Tensor:
    a, b = (x.unsqueeze(1) if x.dim() == 2 else x for x in pooled(first, second))
    if a.dim() == b.dim() and a.dim() in (3, 4) and a.size(0) == b.size(0):
        a, b = maps(a), maps(b)
        if a.size(2) == b.size(2):
            return a @ b.transpose(1, 2) / a.size(2)
    raise ValueError(
        f"features: got layers of {list(first.shape)} and {list(second.shape)}, expected two of "
        "[N, C, H, W], of [N, L, C] with one L, or of [N, D]"
    )
