"""Where a teacher looks, as a target: a task that is a plateau until attention finds its place.

A sequence lists pairs of a key and a value and then one key; asked for is that key's value. A
transformer needs two layers for it: one that tells each value which key stands before it, and one
that looks for the key. Until it has both, all it can do is to guess among the values it sees, and
neither labels nor a teacher's logits say where to look.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastkd import distill
from fastkd.distill.losses import attention

from .recipe import Figures, Gain, Recipe
from .training import Row, accuracy, fit, scaled

PAIRS, KINDS, HEADS, LAYERS = 6, 16, 2, 2  # KINDS of keys, and as many of values
LENGTH = 2 * PAIRS + 1
BATCH, STEPS, TEACHER_STEPS = 64, 400, 600
SCORES = tuple(f"blocks.{layer}.scores" for layer in range(LAYERS))


def recall(generator: torch.Generator, rows: int) -> Row:
    """[rows, LENGTH] tokens (keys first, values from KINDS on), and the value that is asked for."""
    keys = torch.rand(rows, KINDS, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.rand(rows, KINDS, generator=generator).argsort(-1)[:, :PAIRS]
    at = torch.randint(PAIRS, (rows, 1), generator=generator)
    pairs = torch.stack([keys, values + KINDS], -1).flatten(1)
    return torch.cat([pairs, keys.gather(1, at)], -1), values.gather(1, at).squeeze(1)


class Block(nn.Module):
    """Causal self-attention, whose scores a hook can reach, and an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mixed, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.scores = nn.Identity()  # a name for [N, heads, queries, keys]

    def forward(self, x: Tensor) -> Tensor:
        split = self.mixed(self.norms[0](x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(2, 3) / math.sqrt(key.size(-1))
        later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = self.scores(scores.masked_fill(later, -torch.inf))
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """[N, LENGTH] tokens -> logits [N, KINDS] of the value at the end."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(2 * KINDS, dim)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, KINDS))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.places)[:, -1])


def divergence(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    layers = zip(student, teacher, strict=True)
    return torch.stack([attention.attention_kl(s, t) for s, t in layers]).sum()


def run(seed: int, size: float) -> Figures:
    generator = torch.Generator().manual_seed(seed)
    batches = [recall(generator, BATCH) for _ in range(scaled(TEACHER_STEPS, size))]
    test = recall(generator, 2000)
    torch.manual_seed(seed)
    teacher = fit(Transformer(64), batches, distill.hard(), lr=3e-3)

    def student(*loss: distill.Term) -> float:
        torch.manual_seed(1000 + seed)
        few = batches[: scaled(STEPS, size)]
        return accuracy(fit(Transformer(24), few, loss, lr=1e-3, teacher=teacher), *test)

    hard = distill.hard()
    return {
        "teacher": accuracy(teacher, *test),
        "hard labels": student(hard),
        "logits": student(distill.hard(0.1), distill.soft(0.9, temperature=4.0)),
        "attention": student(hard, distill.feature(SCORES, SCORES, divergence, 1.0)),
    }


RECIPES = (
    Recipe(
        name="attention",
        about="associative recall in 400 steps by 2 layers of 24: what tells them where to look",
        paper="Wang et al. 2020, arXiv 2002.10957; Jiao et al. 2019, arXiv 1909.10351",
        run=run,
        gains=(
            Gain("attention", "hard labels", 30.0, seeds_improved=1.0),
            Gain("logits", "hard labels", None),
        ),
    ),
)
