"""A student trained from a teacher on disk beside one trained from the teacher itself.

Two language models over the Python standard library's own sources: of characters (128 of them, from
the 12 before), where the best 8 to 32 hold nearly all of the teacher's mass, and of words and signs
(2 048 of them, from the 6 before), where they leave out a tenth and more. A wide teacher, narrow
students that see 128 000 positions once; held-out files judge them, in nats a token.

Bytes a token of words, its number and offsets among them: top 8 54, top 32 114, 32 samples 106,
hidden states 784, in 8 bits 408 (and the head once); all logits would be 8 192.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import distill
from fastkd.teachers import store

from .data import LABELLED, POOL, digits, split_whole, standard_library
from .recipe import Figures, Gain, Recipe

BATCH, STEPS, TEACHER_STEPS = 512, 250, 1200
CHARACTERS = 3_000_000
HELD_OUT = 20_000  # positions


class Task(NamedTuple):
    """A kind of token: its pattern, the vocabulary, the context, and the teacher's width."""

    pattern: str
    vocab: int
    context: int
    width: int
    alpha: float  # weight of the hard labels


CHARACTER = Task(r"[\s\S]", 128, 12, 512, 0.1)
WORD = Task(r"\w+|[^\w\s]| +|\n", 2048, 6, 384, 0.5)


class Model(nn.Sequential):
    """The tokens before -> logits of the next."""

    def __init__(self, task: Task, embedding: int, width: int) -> None:
        super().__init__(
            nn.Embedding(task.vocab, embedding),
            nn.Flatten(),
            nn.Linear(task.context * embedding, width),
            nn.GELU(),
            nn.Linear(width, task.vocab),
        )


@cache
def sources() -> tuple[list[str], list[str]]:
    """Training files and held-out ones of the Python standard library."""
    texts: list[str] = []
    for file in standard_library():
        texts.append(file.read_text("utf-8", errors="ignore"))
        if sum(map(len, texts)) > CHARACTERS:
            break
    return split_whole(texts)


@cache
def tokens(task: Task) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens in training files and in held-out ones; the rarest are all 0."""
    split = re.compile(task.pattern)
    words = [[word for text in side for word in split.findall(text)] for side in sources()]
    known = [word for word, _ in Counter(words[0]).most_common(task.vocab - 1)]
    number = {word: i + 1 for i, word in enumerate(known)}
    train, held_out = (torch.tensor([number.get(word, 0) for word in side]) for side in words)
    return train, held_out


def windows(task: Task, text: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    at = positions.unsqueeze(-1) + torch.arange(task.context + 1)
    return text[at[:, :-1]], text[at[:, -1]]


def positions(task: Task, steps: int, seed: int) -> TensorDataset:
    text, _ = tokens(task)
    size, generator = (steps * BATCH,), torch.Generator().manual_seed(seed)
    at = torch.randint(len(text) - task.context, size, generator=generator)
    return TensorDataset(*windows(task, text, at))


@cache
def teacher(task: Task, steps: int) -> nn.Module:
    """One for all seeds: what is compared are students."""
    torch.manual_seed(0)
    model = Model(task, 32, task.width)
    loader = DataLoader(positions(task, steps, -1), batch_size=BATCH)
    schedule = distill.lr_schedule(steps, warmup=steps // 24)
    distill.train(model, loader, distill.hard(), lr=3e-3, schedule=schedule, progress=False)
    return model


def nats(task: Task, model: nn.Module) -> float:
    """Held-out cross-entropy."""
    _, text = tokens(task)
    at = torch.arange(0, len(text) - task.context, max(1, len(text) // HELD_OUT))
    inputs, labels = windows(task, text, at)
    batches = zip(inputs.split(2000), labels.split(2000), strict=True)
    return distill.evaluate(model, list(batches)).cross_entropy


def student(
    task: Task, seed: int, loader: Any, terms: Any, steps: int, live: nn.Module | None
) -> float:
    """Minus the held-out nats of a student."""
    torch.manual_seed(1000 + seed)
    model = Model(task, 16, 64)
    distill.train(
        model,
        loader,
        terms,
        teacher=live,
        lr=1e-2,
        schedule=distill.lr_schedule(steps, warmup=steps // 12),
        progress=False,
    )
    return -nats(task, model)


STORED: dict[str, dict[str, Any]] = {
    "top 8": {"k": 8},
    "top 16": {"k": 16},
    "top 32": {"k": 32},
    "32 samples": {"k": 32, "method": "sample"},
    "hidden": {"hidden": True, "encoding": "bfloat16"},
    "hidden, 8 bits": {"hidden": True, "encoding": "int8"},
}
HIDDEN = ("hidden", "hidden, 8 bits")


def compare(task: Task, seed: int, size: float) -> Figures:
    steps = max(4, round(STEPS * size))
    live = teacher(task, max(4, round(TEACHER_STEPS * size)))
    data = positions(task, steps, seed)
    loader = DataLoader(data, batch_size=BATCH)
    terms = [distill.hard(task.alpha), distill.soft(1 - task.alpha, temperature=1.0)]
    figures = {
        "teacher": -nats(task, live),
        "hard labels": student(task, seed, loader, distill.hard(), steps, None),
        "live teacher": student(task, seed, loader, terms, steps, live),
    }
    for name, options in STORED.items():
        with tempfile.TemporaryDirectory() as folder:
            cached_batches = through_disk(task, live, loader, data, folder, options, seed)
            figures[name] = student(task, seed, cached_batches, terms, steps, None)
    return figures


def through_disk(
    task: Task,
    live: Any,
    loader: Any,
    data: Any,
    folder: str,
    options: dict[str, Any],
    seed: int,
) -> Any:
    """The same batches, the teacher's outputs written to a cache here and read from it."""

    *layers, head = live
    body = nn.Sequential(*layers)

    def unbuilt(inputs: Tensor) -> fastkd.LinearLogits:
        return fastkd.LinearLogits(body(inputs), head.weight, head.bias)

    store.capture(
        unbuilt if "hidden" in options else live,
        loader,
        folder,
        vocab_size=task.vocab,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
        **options,
    )
    reader = store.Reader(folder, vocab_size=task.vocab)
    paired = store.Paired(data, reader)
    return DataLoader(paired, batch_size=BATCH, collate_fn=store.collate)


def characters(seed: int, size: float) -> Figures:
    return compare(CHARACTER, seed, size)


def words(seed: int, size: float) -> Figures:
    return compare(WORD, seed, size)


def classes(seed: int, size: float) -> Figures:
    """The digits, of whose labels the student has 100: held-out accuracy in percent."""
    data = digits(seed)
    torch.manual_seed(seed)
    live = nn.Sequential(nn.Linear(64, 1200), nn.ReLU(), nn.Linear(1200, 10))
    pairs = TensorDataset(data.images, data.labels)
    labelled = torch.where(torch.arange(POOL) < LABELLED, data.labels, -100)
    distill.train(
        live, DataLoader(pairs, batch_size=100), distill.hard(), epochs=15, progress=False
    )
    seen = TensorDataset(data.images, labelled)
    terms = [distill.hard(0.5), distill.soft(0.5, temperature=4.0)]
    held_out = [(data.held_out, data.held_out_labels)]

    def trained(loader: Any, terms: Any, model: nn.Module | None) -> float:
        torch.manual_seed(100 + seed)
        net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        epochs = max(1, round(40 * size))
        distill.train(net, loader, terms, teacher=model, epochs=epochs, lr=1e-2, progress=False)
        return 100 * distill.evaluate(net, held_out).accuracy

    def read(folder: str) -> Any:
        paired = store.Paired(seen, store.Reader(folder, vocab_size=10))
        order = torch.Generator().manual_seed(seed)
        return DataLoader(
            paired,
            batch_size=100,
            shuffle=True,
            generator=order,
            collate_fn=store.collate,
        )

    def usual() -> Any:
        order = torch.Generator().manual_seed(seed)
        return DataLoader(seen, batch_size=100, shuffle=True, generator=order)

    figures = {
        "hard labels": trained(usual(), distill.hard(), None),
        "live teacher": trained(usual(), terms, live),
    }
    for name, options in (
        ("all logits", {}),
        ("top 8", {"k": 8, "temperature": 4.0}),
        ("8 samples", {"k": 8, "temperature": 4.0, "method": "sample"}),
        ("32 samples", {"k": 32, "temperature": 4.0, "method": "sample"}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            images: Any = DataLoader(TensorDataset(data.images), batch_size=100)  # of all
            store.capture(live, images, folder, vocab_size=10, progress=False, **options)
            figures[name] = trained(read(folder), terms, None)
    return figures


PAPER = "Anshumann et al. 2025, arXiv 2503.16870"
RECIPES = (
    Recipe(
        name="cached-digits",
        about="students of the digits from a teacher on disk beside one from the live teacher",
        paper=PAPER,
        run=classes,
        gains=(
            Gain("live teacher", "hard labels", 4.0, seeds_improved=1.0),
            *(Gain(x, "live teacher", -0.5) for x in ("all logits", "top 8", "32 samples")),
            # 8 draws of 10 flat classes, the same ones in all 40 epochs: too noisy to claim
            Gain("8 samples", "live teacher", None),
        ),
    ),
    Recipe(
        name="cached",
        about="students from a teacher on disk beside one from the live teacher, characters",
        paper=PAPER,
        run=characters,
        gains=(
            Gain("live teacher", "hard labels", 0.03, seeds_improved=1.0),
            *(Gain(name, "live teacher", -0.01) for name in ("top 32", "32 samples", *HIDDEN)),
            *(Gain(name, "live teacher", None) for name in ("top 8", "top 16")),
        ),
        seeds=4,
        unit="nats",
    ),
    Recipe(
        name="cached-words",
        about="the same with 2 048 words: samples keep the tail that the best k leave out",
        paper=PAPER,
        run=words,
        gains=(
            Gain("live teacher", "hard labels", 0.02, seeds_improved=1.0),
            *(Gain(name, "live teacher", -0.01) for name in ("32 samples", *HIDDEN)),
            Gain("32 samples", "top 32", 0.01, seeds_improved=1.0),
            *(Gain(name, "live teacher", None) for name in ("top 8", "top 16", "top 32")),
        ),
        seeds=2,
        unit="nats",
    ),
)
