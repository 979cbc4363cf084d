"""From files to tokens: a tenth held out, a BPE trained on the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.distill.serialization import needed, read, write
from fastkd.recipes.data import split_whole, standard_library

END = "<|endoftext|>"
EXTRA = "demo"  # of the package, with what this needs


class Corpus(NamedTuple):
    """Tokens int64 [N] in training and in held-out texts, what they were made by, and of what."""

    train: Tensor
    held_out: Tensor
    tokenizer: Any
    facts: dict[str, Any]

    @property
    def vocab(self) -> int:
        return int(self.tokenizer.get_vocab_size())


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Samples (tokens [L], the tokens after each [L]) that begin at `starts`."""

    def __init__(self, text: Tensor, context: int, starts: Tensor) -> None:
        self.text, self.context, self.starts = text, context, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        at = int(self.starts[number])
        return (
            self.text[at : at + self.context],
            self.text[at + 1 : at + self.context + 1],
        )


def random_windows(text: Tensor, context: int, count: int, seed: int) -> Windows:
    """`count` windows at random places."""
    generator = torch.Generator().manual_seed(seed)
    return Windows(text, context, torch.randint(len(text) - context, (count,), generator=generator))


def in_order(text: Tensor, context: int, tokens: int) -> Windows:
    """Windows side by side, spread evenly over the text, of `tokens` tokens at most."""
    fitting = (len(text) - 1) // context
    count = max(1, min(fitting, tokens // context))
    return Windows(text, context, torch.arange(count) * fitting // count * context)


def texts(path: Path | None, characters: int) -> tuple[list[str], list[str]]:
    """Training texts and held-out ones, `characters` of both at most.

    Args:
        path: a text file, whose last tenth is held out; a folder, of whose files in the order of
            their names every tenth is; None for the standard library's sources.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no text.
    """
    if path is not None and not path.exists():
        raise FileNotFoundError(f"path: got {str(path)!r}, which is not there")
    if path is not None and path.is_file():
        text = _text(path)
        if text is None:
            raise ValueError(f"path: got {str(path)!r}, which is binary, expected text in UTF-8")
        text = text[:characters]
        cut = len(text) * 9 // 10
        return [text[:cut]], [text[cut:]]
    found: list[str] = []
    size = 0
    for file in standard_library() if path is None else _files(path):
        if text := _text(file):
            found.append(text)
            size += len(text)
        if size > characters:
            break
    if not found:
        raise ValueError(f"path: got {str(path)!r}, which has no file of text in UTF-8")
    if len(found) < 2:
        cut = len(found[0]) * 9 // 10
        return [found[0][:cut]], [found[0][cut:]]
    return split_whole(found)


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(root, name)


def _text(path: Path) -> str | None:
    """The text of a file; None where it is not text."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\0" in text else text


def load(path: Path | None, folder: Path, vocab: int, characters: int, least: int) -> Corpus:
    """The corpus, from `folder` where it was made before.

    Args:
        path, characters: as for `texts`.
        folder: keeps the tokenizer and the tokens.
        vocab: entries of the BPE, at most.
        least: tokens that each side must have.

    Raises:
        ImportError: no tokenizers.
        FileNotFoundError, ValueError: as `texts`, and a text that is too small.
    """
    tokenizers = needed("tokenizers", "python -m fastkd demo", EXTRA)
    names = folder / "tokenizer.json", folder / "tokens.safetensors"
    if not all(name.exists() for name in names):
        _make(tokenizers, texts(path, characters), names, vocab, least)
    tensors, facts = read(names[1], "demo")
    tokenizer = tokenizers.Tokenizer.from_file(str(names[0]))
    return Corpus(tensors["train"].long(), tensors["held_out"].long(), tokenizer, facts)


def _make(
    tokenizers: Any,
    sides: tuple[list[str], list[str]],
    names: tuple[Path, Path],
    vocab: int,
    least: int,
) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sides[0], trainer, length=len(sides[0]))
    end = tokenizer.token_to_id(END)
    tokens = []
    for side in sides:
        encoded = tokenizer.encode_batch(side)
        tokens.append(torch.tensor([x for part in encoded for x in (*part.ids, end)]).int())
    for name, made in zip(("training", "held-out"), tokens, strict=True):
        if len(made) < least:
            raise ValueError(
                f"path: got {len(made)} {name} tokens, expected {least} or more: a larger text, "
                "or a smaller --preset"
            )
    facts = {
        "files": sum(map(len, sides)),
        "characters": sum(len(text) for side in sides for text in side),
        "train_tokens": len(tokens[0]),
        "held_out_tokens": len(tokens[1]),
        "vocab": tokenizer.get_vocab_size(),
    }
    part = names[0].with_name(".tokenizer.tmp")
    part.write_text(json.dumps(json.loads(tokenizer.to_str())), encoding="utf-8")
    os.replace(part, names[0])
    write(names[1], {"train": tokens[0], "held_out": tokens[1]}, facts, "demo")
