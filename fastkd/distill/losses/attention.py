"""Losses between attention: maps of a convolutional network, heads of a transformer.

    distill.feature("layer1", "layer3", attention.at, 1000.0)

Functions are (student features, teacher features) -> 0-d tensor, in float32 at least, also under
autocast. What is padding stands in the batch, whose mask a term hands over:

    distill.feature("scores", "scores", attention.attention_kl, mask="attention_mask")

`mask` is [N, L], not 0 where a token counts (a key that is padding has probability 0, a query that
is padding is left out of the mean), or [N, queries, keys], not 0 where a query may look at a key
(causal attention; a query that may look at none is left out). A mean runs over what a mask keeps
in its micro-batch, and is 0 where it keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.arguments.messages import shown

from ..batch import IGNORED
from .feature_shapes import check_same_shape, expect, full_precision, pooled, same_batch, unit

RELATIONS = "qkv"


@full_precision
def attention_map(features: Tensor, *, power: float = 2.0) -> Tensor:
    """Where a convolutional layer looks: the sum of its channels' powers, of norm 1.

        A = a / |a|,   a = sum over channels c of |f_c|^power, flattened

    Args:
        features: [N, C, H, W].
        power: at least 1.

    Returns:
        [N, H * W], float32 (float64 for float64 features); 0 where the features are.

    Raises:
        ValueError: features of another number of dimensions, another power.

    Paper: Zagoruyko and Komodakis 2016, arXiv 1612.03928.
    """
    if not power >= 1:
        raise ValueError(f"power: got {shown(power)}, expected a number >= 1")
    if features.dim() != 4:
        raise ValueError(f"features: got {list(features.shape)}, expected [N, C, H, W]")
    return unit(features.abs().pow(power).sum(1).flatten(1))


@full_precision
def at(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """Attention transfer between the maps of two convolutional layers.

        mean over samples and positions of (A_s - A_t)^2,   A = attention_map(features)

    The larger map is averaged down to the smaller's height and width first; the numbers of channels
    may differ. The paper's |A_s - A_t| is a norm without the square, which has no gradient at 0.

    Args:
        student, teacher: [N, C, H, W] with one N.
        power: of `attention_map`.

    Returns:
        0-d float32 (float64 where a feature is).

    Raises:
        TypeError, ValueError: features that cannot be compared; both shapes are named.

    Paper: Zagoruyko and Komodakis 2016, arXiv 1612.03928.
    """
    same_batch(student, teacher, (4,))
    s, t = pooled(student, teacher)
    return F.mse_loss(attention_map(s, power=power), attention_map(t, power=power))


def attention_kl(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, probabilities: bool = False
) -> Tensor:
    """Divergence of attention distributions over the keys.

        mean over samples, heads and queries of  KL(softmax(t) || softmax(s))

    Args:
        student, teacher: [N, H, queries, keys], scores before the softmax (-inf on both sides for
            keys that a query may not see) or logarithms of probabilities.
        mask: [N, L] or [N, queries, keys], see the module; None keeps all.
        probabilities: both sides are what the softmax gave; a probability below the smallest normal
            number counts as that, with gradient 0.

    Returns:
        0-d float32 (float64 where a side is).

    Raises:
        TypeError, ValueError: other shapes; both are named.

    Paper: Wang et al. 2020 (MiniLM), arXiv 2002.10957.
    """
    check_same_shape(student, teacher)
    expect(student.dim() == 4, student, teacher, "[N, H, queries, keys]")
    if probabilities:
        student, teacher = _log(student), _log(teacher)
    if mask is None:
        return fastkd.kl_div(student, teacher)
    keys, queries = _kept(mask, student)
    # rows that are ignored are never read: a query of padding may have no key at all
    labels = torch.where(queries, 0, IGNORED).expand(student.shape[:-1])
    student, teacher = (x.masked_fill(~keys, -math.inf) for x in (student, teacher))
    return fastkd.kl_div(student, teacher, labels=labels, ignore_index=IGNORED)


@full_precision
def minilm(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    heads: int,
    relations: Sequence[str] = ("qk", "vv"),
    mask: Tensor | None = None,
) -> Tensor:
    """Self-attention relations of one layer, the last as a rule, of a transformer.

        sum over relations xy of  mean over samples, heads and queries of
            KL(softmax(X_t Y_t^T / sqrt(d_t)) || softmax(X_s Y_s^T / sqrt(d_s)))

    X and Y are the queries, keys or values, split into `heads` relation heads of d = D / heads
    each, whatever number of attention heads a model has. ("qk", "vv") are attention and value
    relation of MiniLM; ("qq", "kk", "vv") is MiniLMv2.

    Args:
        student, teacher: queries, keys and values, [N, L, D] each with all heads side by side; D
            may differ between the sides.
        heads: number of relation heads; divides both D.
        relations: pairs of the letters q, k and v.
        mask: [N, L] or [N, queries, keys], see the module; None keeps all.

    Returns:
        0-d float32 (float64 where a side is).

    Raises:
        TypeError, ValueError: sides that cannot be compared (both shapes are named), a number of
            heads that does not divide D, another relation.

    Papers: Wang et al. 2020, arXiv 2002.10957; Wang et al. 2020 (MiniLMv2), arXiv 2012.15828.
    """
    wrong = [pair for pair in relations if len(pair) != 2 or not set(pair) <= set(RELATIONS)]
    if wrong or not relations:
        raise ValueError(f"relations: got {shown(list(relations))}, expected pairs of q, k and v")
    sides = [
        _projections(x, heads, name) for x, name in ((student, "student"), (teacher, "teacher"))
    ]
    losses = []
    for pair in relations:
        s, t = (_scores(side[pair[0]], side[pair[1]]) for side in sides)
        losses.append(attention_kl(s, t, mask=mask))
    return torch.stack(losses).sum()


@full_precision
def tinybert(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention scores of several layers, before their softmax.

        sum over student layers m of  mean (A_m - B_layers[m])^2

    A are the student's scores, B the teacher's. Equal scores differ by 0, also where both are
    -inf.

    Args:
        student, teacher: one tensor [N, H, queries, keys] per layer, or one layer's.
        layers: for each layer of the student, the number of the teacher's; None spreads them, the
            last on the last: layers[m] = (m + 1) * teacher layers / student layers - 1.
        heads: for each head of the student, the number of the teacher's; None: the same.
        mask: [N, L] or [N, queries, keys], see the module; None keeps all.

    Returns:
        0-d float32 (float64 where a side is).

    Raises:
        TypeError, ValueError: scores that cannot be compared (both shapes are named), a mapping
            that does not fit.

    Paper: Jiao et al. 2019 (TinyBERT), arXiv 1909.10351.
    """
    losses = []
    for s, t in _layers(student, teacher, layers):
        expect(True, s, t, "")
        expect(s.dim() == t.dim() == 4, s, t, "[N, H, queries, keys]")
        if heads is not None:
            fit = len(heads) == s.size(1) and all(0 <= head < t.size(1) for head in heads)
            expect(
                fit, s, t, f"heads={list(heads)}: for each of the student's one of the teacher's"
            )
            t = torch.stack([t[:, head] for head in heads], 1)
        check_same_shape(s, t)
        kept = None
        if mask is not None:
            keys, queries = _kept(mask, s)
            kept = (keys & queries.unsqueeze(-1)).expand(s.shape)
        losses.append(_squares(s, t, kept))
    return torch.stack(losses).sum()


@full_precision
def tinybert_hidden(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    layers: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Hidden states of several layers.

        sum over student layers m of  mean (H_m - K_layers[m])^2

    H are the student's states after a projector (`features.Each`), K the teacher's.

    Args:
        student, teacher: one tensor [N, L, D] per layer, or one layer's.
        layers: as in `tinybert`.
        mask: [N, L], not 0 where a token counts; None keeps all.

    Returns:
        0-d float32 (float64 where a side is).

    Raises:
        TypeError, ValueError: states that cannot be compared (both shapes are named), a mapping
            that does not fit.

    Paper: Jiao et al. 2019 (TinyBERT), arXiv 1909.10351.
    """
    losses = []
    for s, t in _layers(student, teacher, layers):
        check_same_shape(s, t)
        kept = None
        if mask is not None:
            if mask.shape != s.shape[:2]:
                raise _mask_error(mask, f"{list(s.shape[:2])} for states {list(s.shape)}")
            kept = (mask != 0).unsqueeze(-1).expand(s.shape)
        losses.append(_squares(s, t, kept))
    return torch.stack(losses).sum()


def _squares(s: Tensor, t: Tensor, kept: Tensor | None) -> Tensor:
    """Mean of (s - t)^2 over what is kept, which alone is looked at."""
    apart = s != t if kept is None else kept & (s != t)
    square = (s - t).where(apart, 0.0).square()  # -inf - -inf is not looked at either
    return square.mean() if kept is None else square.sum() / kept.sum().clamp(min=1)


def _kept(mask: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys [N, 1, queries or 1, keys] and which queries [N, 1, queries] count."""
    n, _, queries, keys = scores.shape
    kept = mask != 0
    if mask.shape == (n, keys) and queries == keys:
        return kept[:, None, None, :], kept[:, None, :]
    if mask.shape == (n, queries, keys):
        return kept[:, None], kept.any(-1)[:, None]
    expected = f"[{n}, {keys}] or " if queries == keys else ""
    raise _mask_error(mask, f"{expected}{[n, queries, keys]} for scores {list(scores.shape)}")


def _mask_error(mask: Tensor, expected: str) -> ValueError:
    return ValueError(f"mask: got {list(mask.shape)}, expected {expected}")


def _log(probabilities: Tensor) -> Tensor:
    wide = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    return wide.clamp(min=torch.finfo(wide.dtype).tiny).log()


def _scores(x: Tensor, y: Tensor) -> Tensor:
    if x.size(3) != y.size(3):  # keys shared by several heads
        raise ValueError(
            f"relations: got a head of {x.size(3)} with one of {y.size(3)}, expected equal sizes; "
            "repeat what the heads share"
        )
    return x @ y.transpose(2, 3) / math.sqrt(x.size(3))


def _projections(side: Sequence[Tensor], heads: int, name: str) -> dict[str, Tensor]:
    """Queries, keys and values as [N, heads, L, D / heads]."""
    if isinstance(side, Tensor) or len(side) != 3:
        got = "one tensor" if isinstance(side, Tensor) else f"{len(side)} tensors"
        raise TypeError(f"{name}: got {got}, expected queries, keys and values")
    if any(x.dim() != 3 or heads < 1 or x.size(2) % heads for x in side):
        shapes = [list(x.shape) for x in side]
        raise ValueError(
            f"{name}: got queries, keys and values {shapes} and heads={shown(heads)}, expected "
            "three [N, L, D] with a D that heads divides"
        )
    return {
        letter: x.unflatten(2, (heads, -1)).transpose(1, 2)
        for letter, x in zip(RELATIONS, side, strict=True)
    }


def _layers(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    layers: Sequence[int] | None,
) -> list[tuple[Tensor, Tensor]]:
    """Each layer of the student with its teacher's."""
    student_layers, teacher_layers = (
        [x] if isinstance(x, Tensor) else list(x) for x in (student, teacher)
    )
    if layers is None:
        if not student_layers or len(teacher_layers) % len(student_layers):
            raise ValueError(
                f"layers: got None for {len(student_layers)} of the student and "
                f"{len(teacher_layers)} of the "
                "teacher, expected a number of the teacher's for each of the student's"
            )
        layers = [
            (m + 1) * len(teacher_layers) // len(student_layers) - 1
            for m in range(len(student_layers))
        ]
    if len(layers) != len(student_layers) or not all(
        0 <= number < len(teacher_layers) for number in layers
    ):
        raise ValueError(
            f"layers: got {list(layers)} for {len(student_layers)} of the student and "
            f"{len(teacher_layers)} of the "
            f"teacher, expected {len(student_layers)} numbers from 0 to {len(teacher_layers) - 1}"
        )
    return [(s, teacher_layers[number]) for s, number in zip(student_layers, layers, strict=True)]
