"""A teacher of more columns than the student, by a map of columns: a draft model's vocabulary."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastkd.arguments.messages import describe, shown, sizes
from fastkd.arguments.tensors import check_map
from fastkd.operands import LinearLogits, Operand, Teacher

Normalize = Literal["mapped", "all"]


class MappedLogits:
    """A teacher's logits for a student that has some of its columns: student's i is columns[i].

    Stands in for the teacher's logits in every loss of fastkd. With t the teacher's logits, c the
    map, T the temperature and q the student's softmax over its own V_s columns:

        "mapped"   p_i = exp(t_c(i) / T) / sum_j exp(t_c(j) / T),     the loss is D(p, q)
        "all"      p_i = exp(t_c(i) / T) / sum_v exp(t_v / T) over the teacher's whole vocabulary,
                   the loss is D(p, q) where q is 0 off the map

    "mapped" is what EAGLE-3 trains its draft model with. With "all" the teacher's mass off the map
    is one more outcome, which the student gives 0: what that adds to the loss (1/2 of the mass for
    tv_distance, so that 1 - tv is the rate at which drafts are accepted; 0 for reverse_kl_div) has
    no gradient. kl_div would be +inf and leaves it out: with m the mass on the map it is
    m KL(p / m, q) + m log m, so that positions count by what a draft can say there, and may fall
    below 0.

    EAGLE stores its map as offsets, `d2t` [V_s], draft token i being token i + d2t[i], beside
    `t2d` [V_t], which says of each token whether the draft has it. Either gives the columns:

        columns = d2t + torch.arange(len(d2t), device=d2t.device)
        columns = t2d.nonzero().squeeze(-1)

    Labels are columns of the student. No logits [N, V_t] are copied: what is made is [N, V_s] in
    the teacher's dtype, a few rows at a time with "all". Of a `LinearLogits`, "mapped" takes the
    map's rows of the weight, at every call; `LinearLogits(hidden, weight[columns])`, made once, is
    the same. "all" makes the logits a chunk of rows at a time. torch.compile, torch.func and a
    teacher that requires grad run "all" in plain torch.

    Args:
        teacher: logits [..., V_t], or a `LinearLogits` of them. One that requires grad gets its
            gradient.
        columns: [V_s] int32 or int64, each column of the teacher at most once, in the order of the
            student's.
        normalize: "mapped" or "all".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or shape. Values of `columns` are
            looked at by the loss, on the CPU always and on a GPU inside `fastkd.checked()`: one out
            of range or named twice. Elsewhere one out of range makes all rows NaN.
        NotImplementedError: in a loss with `group` or DTensors.

    Li et al. 2025 (EAGLE-3), arXiv 2503.01840.
    """

    def __init__(
        self, teacher: Operand, columns: Tensor, *, normalize: Normalize = "mapped"
    ) -> None:
        if not isinstance(teacher, (Tensor, LinearLogits)):
            raise TypeError(
                f"teacher: got {describe(teacher)}, expected a tensor of logits [..., V] or a "
                "LinearLogits"
            )
        if teacher.dim() == 0:
            raise ValueError(f"teacher: got shape {sizes(teacher.shape)}, expected [..., V]")
        check_map(columns, teacher.device, teacher.size(-1))
        if not isinstance(normalize, str) or normalize not in ("mapped", "all"):
            raise ValueError(f"normalize: got {shown(normalize)}, expected 'mapped' or 'all'")
        self.teacher, self.columns, self.normalize = teacher, columns, normalize

    @property
    def shape(self) -> torch.Size:
        """[..., V_s], that of the student's logits."""
        return torch.Size((*self.teacher.shape[:-1], self.columns.size(0)))

    @property
    def dtype(self) -> torch.dtype:
        """That of the teacher's logits."""
        return self.teacher.dtype

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    @property
    def requires_grad(self) -> bool:
        return self.teacher.requires_grad

    def dim(self) -> int:
        return self.teacher.dim()

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def __repr__(self) -> str:
        return f"MappedLogits({sizes(self.shape)} of {describe(self.teacher)}, {self.normalize!r})"


AnyTeacher = Teacher | MappedLogits
