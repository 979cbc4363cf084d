"""Random transforms that a stored teacher can follow: a view is a function of its number.

    views = store.Views(dataset, transform, seed=7, variants=4)  # of each sample four views
    store.capture(teacher, DataLoader(views, 100, num_workers=2), "outputs", vocab_size=V)
    pairs = store.Paired(views, store.Reader("outputs"))  # the views that the teacher saw

The seed lies beside the outputs, in `views.json`, with a few numbers of some views: another
transform, seed or dataset is refused where the capture goes on and where the outputs are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.arguments.messages import MadeOf, shown
from fastkd.arguments.numbers import integer
from fastkd.distill.rng_state import random_state, set_random_state

FILE = "views.json"
SAMPLES = "samples.json"  # of a dataset without random views
LOOKS, FEW = 32, 8  # views, and samples, that are compared, from the first to the last
NEAR = 1e-3  # of a view's norm: what another machine's rounding may change
HOST = torch.device("cpu")


class Views(MadeOf, Dataset[Any]):
    """A dataset under random transforms, each view of a sample seeded by seed, variant and sample.

    View i of n samples is variant i // n of sample i % n, the same in every epoch, process and run.
    Python's, NumPy's and torch's own generators are seeded for it, and put back: what draws from
    them, as torchvision's transforms do, needs no change. A transform with a generator of its own
    is refused by `capture`, which reads some samples twice.

    >>> import torch
    >>> from fastkd.teachers import store
    >>> views = store.Views(torch.zeros(3, 2), lambda x: x + torch.rand(2), seed=7, variants=4)
    >>> len(views), views.numbers(1)
    (12, range(3, 6))
    >>> bool((views[4] == views[4]).all()), bool((views[4] == views[1]).all())
    (True, False)

    Args:
        dataset: map-style; may have random transforms itself.
        transform: of a sample's first entry where it is a tuple, (image, label), else of all of it.
        seed: from 0 to 2^63 - 1.
        variants: views of each sample, at least 1.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Any] | None = None,
        *,
        seed: int,
        variants: int = 1,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            got = type(dataset).__name__
            raise TypeError(f"dataset: got {got}, expected a map-style one, with len and [i]")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform: got {shown(transform)}, expected a function or None")
        for name, value, least in (("seed", seed, 0), ("variants", variants, 1)):
            whole = integer(value)
            if whole is None or not least <= whole < 2**63:
                raise ValueError(f"{name}: got {shown(value)}, expected an integer >= {least}")
        self._dataset, self._transform = dataset, transform
        self.seed, self.variants = int(seed), int(variants)

    @classmethod
    def stored(cls, path: str | os.PathLike[str], dataset: Any, transform: Any = None) -> Views:
        """The views that a teacher's outputs are of: seed and variants are read beside them.

        FileNotFoundError: there are none; ValueError: another dataset or transform.
        """
        said = json.loads(Path(path, FILE).read_text())
        made = cls(dataset, transform, seed=said["seed"], variants=said["variants"])
        made.compare(path)
        return made

    def __len__(self) -> int:
        return self.variants * len(self._dataset)

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"number: got {shown(number)}, expected 0 to {len(self) - 1}")
        variant, sample = divmod(int(number), len(self._dataset))
        with _seeded(f"{self.seed} {variant} {sample}"):
            found = self._dataset[sample]
            if self._transform is None:
                return found
            if isinstance(found, (tuple, list)):
                return (self._transform(found[0]), *found[1:])
            return self._transform(found)

    def numbers(self, variant: int) -> range:
        """The numbers of one view of each sample: `Subset(pairs, views.numbers(epoch % 4))`."""
        if not 0 <= variant < self.variants:
            got = shown(variant)
            raise ValueError(f"variant: got {got}, expected 0 to {self.variants - 1}")
        size = len(self._dataset)
        return range(variant * size, (variant + 1) * size)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the seed beside a teacher's outputs; `capture` does."""
        part = Path(path, f".{FILE}-{os.getpid()}.tmp")
        part.write_text(json.dumps(self._facts()))
        part.replace(Path(path, FILE))

    def compare(self, path: str | os.PathLike[str]) -> None:
        """ValueError: the outputs there are of other views; the message says what differs."""
        file = Path(path, FILE)
        if not file.exists():
            raise ValueError(
                f"dataset: got Views for the outputs in {str(path)[:150]}, which have no {FILE}: "
                "nobody knows of which views they are; expected a folder captured from Views"
            )
        said = json.loads(file.read_text())
        mine = self._facts([number for number, _ in said["looks"] if number < len(self)])
        for name in ("seed", "variants", "samples"):
            if said[name] != mine[name]:
                raise ValueError(
                    f"{name}: got views of {name} {mine[name]}, expected {said[name]}, those of "
                    f"the outputs in {str(path)[:150]}"
                )
        for (number, one), (_, two) in zip(said["looks"], mine["looks"], strict=True):
            if not _near(one, two):
                raise ValueError(
                    f"transform: got another view {number} (sample {number % said['samples']}) "
                    f"than the one that the teacher saw, by {str(file)[:150]}; expected the same "
                    "dataset and transform: another needs a folder of its own"
                )

    def _facts(self, numbers: Sequence[int] | None = None) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "variants": self.variants,
            "samples": len(self._dataset),
            "looks": _looks(self, _spread(len(self), LOOKS) if numbers is None else numbers),
        }


def check_views(dataset: Any, path: Any, *, begin: bool = False) -> None:
    """Compare a dataset's samples with those that the outputs in a folder are of.

    With `begin` there are no outputs yet, and what identifies the samples is written where they
    will be: the seed of `Views`, or a few numbers of a few samples. ValueError: other views. Other
    samples are warned of: a student may see other inputs than its teacher on purpose.
    """
    there = path is not None and Path(path, FILE).exists()
    if isinstance(dataset, Views) and begin and not there:
        dataset.write(path)
    elif isinstance(dataset, Views):
        dataset.compare(path)
    elif there:
        raise ValueError(
            f"dataset: got {type(dataset).__name__} for outputs of random views, expected "
            f"store.Views.stored({str(path)[:150]!r}, dataset, transform), as the teacher saw them"
        )
    elif path is not None and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        _check_samples(dataset, Path(path, SAMPLES), begin)


def _check_samples(dataset: Any, file: Path, begin: bool) -> None:
    if begin:
        looks = _looks(dataset, _spread(len(dataset), FEW))
        part = file.with_name(f".{file.name}-{os.getpid()}.tmp")
        part.write_text(json.dumps({"looks": looks}))
        part.replace(file)
    elif file.exists():
        said = json.loads(file.read_text())["looks"]
        mine = _looks(dataset, [number for number, _ in said if number < len(dataset)])
        for (number, one), (_, two) in zip(said, mine, strict=False):
            few, many = sorted((one, two), key=len)  # one may have labels, or a mask, more
            if not all(any(_near([x], [y]) for y in many) for x in few):
                warnings.warn(
                    f"dataset: got another sample {number} than the one captured in "
                    f"{str(file.parent)[:150]}: in another order, or under another transform, a "
                    "sample has another's teacher; only inputs that differ on purpose are right",
                    stacklevel=4,
                )
                return


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Python's, NumPy's and torch's own generators seeded by a name; after it as before."""
    digest = hashlib.sha256(name.encode()).digest()
    state = random_state(None, HOST)
    try:
        random.seed(int.from_bytes(digest[:8], "little"))
        # not torch.manual_seed, which would seed every device too
        torch.default_generator.manual_seed(int.from_bytes(digest[8:16], "little") >> 1)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(int.from_bytes(digest[16:20], "little"))
        yield
    finally:
        set_random_state(state, None, HOST)


def _spread(size: int, most: int) -> list[int]:
    """Numbers from the first to the last."""
    return sorted({i * (size - 1) // max(most - 1, 1) for i in range(min(most, size))})


def _looks(dataset: Any, numbers: Sequence[int]) -> list[list[Any]]:
    """[number, look] of each; nobody's generators are drawn from."""
    with _seeded("look"):
        return [[number, _look(dataset[number])] for number in numbers]


def _look(sample: Any) -> list[list[float]]:
    """Of each array in a sample its size, its norm and one sum that depends on every place."""
    found = []
    for x in _arrays(sample):
        x = x.detach().cpu().double().flatten().nan_to_num(0.0, 0.0, 0.0)
        place = torch.sin(torch.arange(1.0, x.numel() + 1, dtype=torch.float64) * 12.9898)
        sums = (x.norm(), x @ ((place * 43758.5453).frac() - 0.5))
        found.append([float(x.numel()), *(float(f"{float(y):.7g}") for y in sums)])
    return found


def _arrays(sample: Any) -> Iterator[Tensor]:
    if isinstance(sample, Tensor):
        yield sample
    elif isinstance(sample, Mapping):
        for name in sorted(sample, key=str):
            yield from _arrays(sample[name])
    elif isinstance(sample, (int, float)) or (
        isinstance(sample, (tuple, list)) and all(isinstance(x, (int, float)) for x in sample)
    ):
        yield torch.as_tensor(sample)
    elif isinstance(sample, (tuple, list)):
        for part in sample:
            yield from _arrays(part)
    elif hasattr(sample, "__array_interface__"):  # NumPy's, and PIL's images
        array = sys.modules["numpy"].array(sample)
        if array.dtype.kind in "biuf":
            yield torch.as_tensor(array)


def _near(one: Any, two: Any) -> bool:
    if len(one) != len(two):
        return False
    return all(
        a[0] == b[0] and all(abs(x - y) <= NEAR * (a[1] + 1e-9) for x, y in zip(a, b, strict=True))
        for a, b in zip(one, two, strict=True)
    )
