"""A teacher with another tokenizer: its probabilities by rank, where both have read the same.

Language models over the Python standard library's own sources. The teacher reads words (1 024 of
them) and is trained on the files; the students read pieces of at most 4 characters (512 of them)
of 160 short sequences, over and over. A word that a vocabulary has not is spelt in characters.
Held-out files judge the students, in nats a token of theirs.

What "truncated" pairs by position has mostly not read the same: a control of what alignment does.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill

from .cached import sources
from .recipe import Figures, Gain, Recipe
from .training import fit, scaled

CHUNK, BATCH = 128, 16  # characters of a sequence, sequences
STEPS, TEACHER_STEPS = 160, 400
FEW = 160  # sequences that the students see
HELD_OUT = 400
WEIGHT = 1.5  # the paper's


class Tokenizer(NamedTuple):
    """A tokenizer (pattern and vocabulary) and the sizes of the model that reads its tokens."""

    pattern: str
    vocab: int
    context: int
    embedding: int
    width: int


TEACHER = Tokenizer(r" ?\w+|[^\w\s]| +|\s", 1024, 8, 32, 256)
STUDENT = Tokenizer(r"\w{1,4}|[^\w\s]| +|\s", 512, 8, 24, 96)


class Model(nn.Module):
    """Tokens [N, L] -> logits [N, L, vocab] of the next, from the `context` last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.before = tokenizer.context - 1
        self.tokens = nn.Embedding(tokenizer.vocab, tokenizer.embedding)
        self.mixed = nn.Conv1d(tokenizer.embedding, tokenizer.width, tokenizer.context)
        self.head = nn.Linear(tokenizer.width, tokenizer.vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.pad(self.tokens(tokens).transpose(1, 2), (self.before, 0))
        return self.head(F.gelu(self.mixed(x)).transpose(1, 2))


@cache
def numbers(tokenizer: Tokenizer) -> dict[str, int]:
    """The vocabulary: 0 is padding and what it has not; its characters, then the commonest."""
    texts = sources()[0]
    letters = [c for c, _ in Counter("".join(texts)).most_common(128)]
    words = Counter(word for text in texts for word in re.findall(tokenizer.pattern, text))
    longer = [word for word, _ in words.most_common(2 * tokenizer.vocab) if len(word) > 1]
    return {word: i + 1 for i, word in enumerate((letters + longer)[: tokenizer.vocab - 1])}


def tokenized(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Numbers and (start, end) of the tokens."""
    known, ids, spans = numbers(tokenizer), [], []
    for match in re.finditer(tokenizer.pattern, text):
        word, start = match[0], match.start()
        for piece in [word] if word in known else word:
            ids.append(known.get(piece, 0))
            spans.append((start, start := start + len(piece)))
    return ids, spans


def padded(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    both = [tokenized(tokenizer, text) for text in texts]
    most = max(len(ids) for ids, _ in both)
    ids = torch.tensor([ids + [0] * (most - len(ids)) for ids, _ in both])
    return ids, [spans + [(0, 0)] * (most - len(spans)) for _, spans in both]


def following(ids: Tensor, spans: list[list[tuple[int, int]]]) -> Tensor:
    """Of each token the next as its label, -100 where there is none."""
    token = torch.tensor([[end > start for start, end in row] for row in spans])
    return F.pad(torch.where(token, ids, -100)[:, 1:], (0, 1), value=-100)


def batch(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    ids, spans = padded(tokenizer, texts)
    return ids, following(ids, spans)


def paired_batch(texts: list[str]) -> dict[str, object]:
    """A batch of the student's tokens beside the teacher's."""
    (ids, spans), (teacher_ids, teachers) = padded(STUDENT, texts), padded(TEACHER, texts)
    return {
        "inputs": ids,
        "labels": following(ids, spans),
        "teacher_inputs": teacher_ids,
        "alignment": distill.align(spans, teachers, text=texts),
    }


@cache
def chunks(held_out: bool) -> list[str]:
    text = "".join(sources()[held_out])
    return [text[at : at + CHUNK] for at in range(0, len(text) - CHUNK, CHUNK)]


def sample_batches(texts: list[str], steps: int, generator: torch.Generator) -> list[list[str]]:
    """The texts of each step, each once a pass."""
    found: list[list[str]] = []
    while len(found) < steps:
        order = torch.randperm(len(texts), generator=generator)
        found += [[texts[i] for i in at] for at in order.split(BATCH)]
    return found[:steps]


@cache
def teacher(steps: int) -> nn.Module:
    """One for all seeds: what is compared are students."""
    torch.manual_seed(0)
    order = sample_batches(chunks(False), steps, torch.Generator().manual_seed(0))
    batches = [batch(TEACHER, texts) for texts in order]
    schedule = distill.lr_schedule(steps, warmup=steps // 12)
    return fit(Model(TEACHER), batches, distill.hard(), lr=3e-3, schedule=schedule)


def run(seed: int, size: float) -> Figures:
    steps, live = scaled(STEPS, size), teacher(scaled(TEACHER_STEPS, size))
    generator = torch.Generator().manual_seed(seed)
    every = chunks(False)
    few = [every[i] for i in torch.randperm(len(every), generator=generator)[:FEW]]
    batches = [paired_batch(texts) for texts in sample_batches(few, steps, generator)]
    step = max(1, len(chunks(True)) // HELD_OUT)
    test = [batch(STUDENT, chunks(True)[::step][:HELD_OUT])]

    def student(*loss: distill.Term) -> float:
        torch.manual_seed(1000 + seed)
        schedule = distill.lr_schedule(steps, warmup=steps // 12)
        taught_by = {"teacher": live} if loss[1:] else {}
        model = fit(Model(STUDENT), batches, loss, 5e-3, schedule=schedule, **taught_by)
        return -distill.evaluate(model, test).cross_entropy

    hard = distill.hard()
    return {
        "hard labels": student(hard),
        "aligned": student(hard, distill.uld(WEIGHT)),
        "truncated": student(hard, distill.uld(WEIGHT, alignment="truncate")),
    }


RECIPES = (
    Recipe(
        name="cross-tokenizer",
        about="a teacher of words, students of pieces: probabilities by rank, and where they align",
        paper="Boizard et al. 2024, arXiv 2402.12030",
        run=run,
        gains=(
            Gain("aligned", "hard labels", 0.01, seeds_improved=0.75),
            Gain("truncated", "hard labels", None),
            Gain("aligned", "truncated", None),
        ),
        seeds=4,
        unit="nats",
    ),
)
