"""Losses of embeddings: a student encoder's vectors against its teacher's, or how they relate.

    distill.embedding(projector=nn.Linear(384, 768))
    distill.embedding(distill.in_batch_similarity, output="sentence_embedding")

>>> import torch
>>> from fastkd import distill
>>> student, teacher, projector = (torch.nn.Linear(*sizes) for sizes in ((6, 4), (6, 8), (4, 8)))
>>> terms = [distill.embedding(projector=projector), distill.embedding(distill.in_batch_similarity)]
>>> batch = torch.randn(5, 6)
>>> len(distill.train(student, [batch], terms, teacher=teacher, progress=False))
1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

import fastkd
from fastkd.arguments.messages import describe, shown, sizes, unexpected
from fastkd.arguments.numbers import temperature_of
from fastkd.arguments.tensors import check_dense

from ..batch import Batch, Outputs
from ..distributed import gathered_rows
from ..targets import teacher_logits, try_options
from ..terms import Term, Weight
from .chunked import DTYPES
from .feature_shapes import full_precision, unit
from .logits import cosine
from .ranking import Rows
from .regression import regression_loss

KINDS = ("cosine", "l2")
SIMILARITIES = ("cosine", "dot")
Embeddings = Tensor | tuple[Tensor, Tensor]


def embedding_loss(
    student: Tensor, teacher: Tensor, *, kind: str = "cosine", **rows: Unpack[Rows]
) -> Tensor:
    """Distance of a student's embeddings from its teacher's.

        "cosine": 1 - cos(s, t)    "l2": mean over D of (s - t)^2

    Args:
        student: embeddings s [..., D], float32, bfloat16, float16 or float64.
        teacher: embeddings t [..., D] of any of these dtypes.
        kind: "cosine" or "l2".
        **rows: weight [...], reduction and normalizer, as in `fastkd.losses`.

    Returns:
        0-d float32 (float64 where an operand is), [...] with reduction="none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; of embeddings of other
            lengths the message names both.

    Reimers and Gurevych 2020, arXiv 2004.09813 (l2).
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: got {shown(kind)}, expected one of {', '.join(KINDS)}")
    if unknown := rows.keys() - Rows.__annotations__.keys():
        raise TypeError(unexpected(unknown, Rows.__annotations__))
    both = isinstance(student, Tensor) and isinstance(teacher, Tensor)
    if both and student.shape[:-1] == teacher.shape[:-1] and student.shape != teacher.shape:
        raise ValueError(
            f"teacher: got embeddings {sizes(teacher.shape)}, expected the student's "
            f"{sizes(student.shape)}; project the student's, such as "
            f"distill.embedding(projector=nn.Linear({student.size(-1)}, {teacher.size(-1)}))"
        )
    if kind == "cosine":
        return cosine(student, teacher, **rows)
    return regression_loss(student, teacher, alpha=0.0, **rows)


@full_precision
def in_batch_similarity(
    student: Embeddings,
    teacher: Embeddings,
    *,
    temperature: float = 0.05,
    teacher_temperature: float | None = None,
    similarity: str = "cosine",
    diagonal: bool | None = None,
    group: Any = None,
) -> Tensor:
    """Which samples of the batch a sample is like: KL between rows of two similarity matrices.

        mean over i of KL(p_i || q_i),   p_i = softmax_j(sim(t_i, t_j) / T_t),
                                         q_i = softmax_j(sim(s_i, s_j) / T)

    The lengths of the two sides' embeddings may differ, and no projector is needed. No factor T^2:
    similarities are bounded, and T sets how near a neighbour has to be to count. Similarities are
    those within one micro-batch, of all ranks with `group`; where a sample has no two others to
    choose from the loss is 0.

    Args:
        student, teacher: embeddings [N, D], or each a pair of queries [N, D] and documents [M, D],
            which are compared with each other.
        temperature: T > 0 of the student, and of the teacher where it has no other.
        teacher_temperature: T_t > 0.
        similarity: "cosine" or "dot".
        diagonal: whether j = i counts. None: not among one set of embeddings, where each sample
            is most like itself, but with pairs, where document i belongs to query i. False needs
            N = M.
        group: process group whose ranks' samples are compared with each other, gradients included,
            such as torch.distributed.group.WORLD under DistributedDataParallel. Each rank has the
            mean over its own i; the mean of those over ranks, as the wrapper takes it of gradients,
            is the loss of the whole batch (of `distill.train` also where ranks have other N). All
            of the ranks must call it, in the same order.

    Returns:
        0-d float32 (float64 where an operand is).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; shapes are named.

    Fang et al. 2021 (SEED), arXiv 2101.04731 (there against a queue).
    """
    T = float(temperature_of(temperature))
    T_t = T
    if teacher_temperature is not None:
        T_t = float(temperature_of(teacher_temperature, "teacher_temperature"))
    if similarity not in SIMILARITIES:
        got = shown(similarity)
        raise ValueError(f"similarity: got {got}, expected one of {', '.join(SIMILARITIES)}")
    if diagonal not in (None, True, False):
        raise TypeError(f"diagonal: got {shown(diagonal)}, expected True, False or None")
    (a, b), (c, d) = _sides("student", student), _sides("teacher", teacher)
    if a.size(0) != c.size(0) or b.size(0) != d.size(0) or (a is b) != (c is d):
        raise ValueError(
            f"teacher: got embeddings {_shapes(teacher)}, expected as many samples as the "
            f"student's {_shapes(student)}"
        )
    whole = a is not b if diagonal is None else diagonal
    if not whole and a.size(0) != b.size(0):
        raise ValueError(f"diagonal: got False for {_shapes(student)}, expected N = M")
    start = 0
    if group is not None:
        (b, start), (d, _) = gathered_rows("student", b, group), gathered_rows("teacher", d, group)
    s, t = _similar(a, b, T, similarity), _similar(c, d, T_t, similarity)
    if not whole:
        s, t = _without_own(s, start), _without_own(t, start)
    if s.size(0) == 0 or s.size(1) < 2:  # a softmax over one column is constant
        return s.flatten()[:0].sum() + t.flatten()[:0].sum()
    return fastkd.kl_div(s, t)


def embedding(
    function: Callable[..., Tensor] = embedding_loss,
    weight: Weight = 1.0,
    *,
    output: str | None = None,
    projector: nn.Module | None = None,
    name: str | None = None,
    **options: Any,
) -> Term:
    """A term of a loss between embeddings: function(projector(student), teacher, **options).

    Args:
        function: `embedding_loss`, `in_batch_similarity`, or one of your own.
        weight: factor, or step -> factor.
        output: the entry or attribute of the models' outputs that holds the embeddings, such as
            "sentence_embedding" or "pooler_output"; None where they return a tensor.
        projector: learnt with the student, from its embeddings to the teacher's length; in
            checkpoints, never in the student's state dict.
        name: None for the function's own.
        **options: of the function; `temperature` may be step -> T.

    Raises:
        ValueError: in training: a model without that output.
    """
    name = str(name or getattr(function, "__name__", "embedding"))
    try_options(function, options, 2, 4)

    def call(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        own = _output("student", student, output)
        target = teacher_logits(name, teacher) if output is None else None
        target = _output("teacher", teacher, output) if target is None else target
        found = dict(options)
        if callable(found.get("temperature")):
            found["temperature"] = found["temperature"](batch.step)
        return function(own if projector is None else projector(own), target, **found)

    return Term(name, call, weight, mean="samples", module=projector)


def _output(side: str, outputs: Outputs, entry: str | None) -> Any:
    raw = outputs.raw
    if entry is None and isinstance(raw, Mapping) and "logits" not in raw:
        got = f"None for the {side}'s output with the entries {[str(key)[:40] for key in raw][:8]}"
        raise ValueError(f"output: got {got}, expected the name of its embeddings")
    if entry is None:
        return outputs.logits
    if isinstance(raw, Tensor):  # a teacher's stored embeddings
        return raw
    found = raw.get(entry) if isinstance(raw, Mapping) else getattr(raw, entry, None)
    if not isinstance(found, Tensor):
        got = f"no tensor {entry!r} in the {side}'s output, {describe(raw)}"
        raise ValueError(f"output: got {got}, expected the name of its embeddings")
    return found


def _sides(name: str, x: Embeddings) -> tuple[Tensor, Tensor]:
    """Queries and documents; of one set of embeddings twice the same."""
    pair = (x, x) if isinstance(x, Tensor) else x
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: got {describe(x)}, expected embeddings [N, D] or a pair of them")
    a, b = pair
    for part in pair:
        if not isinstance(part, Tensor) or part.dtype not in DTYPES:
            raise TypeError(f"{name}: got {describe(part)}, expected float embeddings [N, D]")
        check_dense(name, part)
    if a.dim() != 2 or b.dim() != 2 or a.size(1) != b.size(1):
        raise ValueError(f"{name}: got {_shapes(x)}, expected embeddings [N, D], pooled; one D")
    return a, b


def _shapes(x: Embeddings) -> str:
    return sizes(x.shape) if isinstance(x, Tensor) else " and ".join(sizes(y.shape) for y in x)


def _similar(a: Tensor, b: Tensor, T: float, similarity: str) -> Tensor:
    if similarity == "cosine":
        a, b = unit(a), unit(b)
    return (a / T) @ b.T


def _without_own(x: Tensor, start: int) -> Tensor:
    """[N, M - 1]: row i without column start + i, by no mask that a GPU would have to count."""
    column = torch.arange(max(x.size(1) - 1, 0), device=x.device)
    own = torch.arange(start, start + x.size(0), device=x.device).unsqueeze(-1)
    return x.gather(1, column + (column >= own))
