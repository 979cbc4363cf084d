"""The data of the recipes: scikit-learn's digits, split by seed, and Python's own sources."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.distill.serialization import needed

LABELLED, POOL = 100, 1000


class Digits(NamedTuple):
    """8 x 8 images in [0, 1] as rows of 64, and classes.

    The first LABELLED of the POOL training images are those whose labels a student may see; the
    other 797 images of the data set are held out.
    """

    images: Tensor  # [1000, 64]
    labels: Tensor  # [1000]
    held_out: Tensor  # [797, 64]
    held_out_labels: Tensor  # [797]


def digits(seed: int) -> Digits:
    """The data set in the order of the seed.

    Raises:
        ImportError: scikit-learn is missing.
    """
    data = needed("sklearn.datasets", "a recipe on digits").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target)[order]
    return Digits(images[:POOL], labels[:POOL], images[POOL:], labels[POOL:])


def standard_library() -> Iterator[Path]:
    """Python's own sources but their tests: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in (*sorted(root.glob("*.py")), *sorted(root.glob("[a-z]*/*.py"))):
        if "test" not in str(file) and "site-packages" not in str(file):
            yield file


def split_whole(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training texts and held-out ones: every tenth file is held out, whole."""
    train, held_out = (
        [x for i, x in enumerate(texts) if (i % 10 == 0) == b] for b in (False, True)
    )
    return train, held_out
