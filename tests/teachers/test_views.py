"""Random transforms that are a function of the sample's number, and a teacher stored of them."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fastkd import distill
from fastkd.teachers import store

N, VARIANTS = 6, 3
DATA = TensorDataset(torch.randn(N, 2, 5, 5), torch.arange(N) % 3)


def augment(x: Tensor, most: float = 1.0) -> Tensor:
    """Draws from every generator that torchvision and its like draw from."""
    x = torch.roll(x, random.randrange(5), -1)
    x = x.flip(-2) if np.random.rand() < 0.5 else x
    return x * most + 0.1 * torch.randn(x.shape)


def views(transform: Any = augment, data: Any = DATA, **options: Any) -> store.Views:
    return store.Views(data, transform, **{"seed": 7, "variants": VARIANTS, **options})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 3))


def captured(path: Path, made: Any, teacher: Any = None, **options: Any) -> int:
    options = {"vocab_size": 3, "progress": False, **options}
    return store.capture(teacher or net(), DataLoader(made, 4), path, **options)


def test_a_view_is_its_number() -> None:
    made = views()
    assert len(made) == N * VARIANTS and made.numbers(2) == range(12, 18)
    images = torch.stack([image for image, _ in made])
    assert len(images.flatten(1).unique(dim=0)) == len(images)  # no two are alike
    assert [int(label) for _, label in made] == [0, 1, 2] * 6
    other = torch.stack([image for image, _ in views(seed=8)])
    assert not (other == images).flatten(1).all(1).any()
    apart = DataLoader(Subset(made, made.numbers(1)), 2, num_workers=2)
    assert torch.equal(torch.cat([x for x, _ in apart]), images[6:12])


def test_generators_go_on_as_before() -> None:
    def drawn(between: Any) -> tuple[float, float, float]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        between()
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def failing(_: Tensor) -> Tensor:
        torch.rand(1), random.random()
        raise KeyError("no such file")

    def fails() -> None:
        with pytest.raises(KeyError, match="no such file"):
            views(failing)[3]

    assert drawn(lambda: None) == drawn(lambda: views()[3]) == drawn(fails)


class Pictures(Dataset[Any]):
    """Dicts with an image of PIL's, transformed by the dataset itself."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = Image.new("L", (4, 4), 40 * number)
        return {"image": image.rotate(90 * random.randrange(4)), "label": number, "name": "x"}


def test_a_dataset_with_transforms_of_its_own(tmp_path: Path) -> None:
    made = views(None, Pictures())
    assert made[4]["image"].tobytes() == made[4]["image"].tobytes()
    made.write(tmp_path)
    made.compare(tmp_path)

    def brighter(sample: Any) -> Any:
        return {**sample, "image": sample["image"].point(lambda x: x + 1)}

    with pytest.raises(ValueError, match="transform: got another view"):
        views(brighter, Pictures()).compare(tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_student_sees_what_the_teacher_saw(tmp_path: Path, ranks: int) -> None:
    for rank in range(ranks):
        shared = {"rank": rank, "world_size": ranks} if ranks > 1 else {}
        captured(tmp_path, views(), **shared)
    made = store.Views.stored(tmp_path, DATA, augment)
    assert (made.seed, made.variants) == (7, VARIANTS)
    pairs = store.Paired(made, store.Reader(tmp_path))
    loader = DataLoader(pairs, 5, shuffle=True, collate_fn=store.collate, num_workers=2)
    for images, _, said in loader:
        torch.testing.assert_close(net()(images), said)
    student = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    steps = distill.train(student, loader, distill.soft(), teacher=pairs._reader, progress=False)
    assert len(steps) == 4


def test_a_capture_goes_on(tmp_path: Path) -> None:
    class Dies(nn.Module):
        asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += 1
            if self.asked > 2:
                raise RuntimeError("out of memory")
            return net()(x)

    small = {"shard_bytes": 1}  # a shard a batch
    with pytest.raises(RuntimeError, match="out of memory"):
        captured(tmp_path, views(), Dies(), **small)
    with pytest.raises(ValueError, match="transform: got another view 0"):
        captured(tmp_path, views(lambda x: augment(x, 0.9)), **small)
    with pytest.raises(ValueError, match=r"dataset: got TensorDataset .*Views\.stored"):
        captured(tmp_path, DATA, **small)
    assert captured(tmp_path, views(), **small) == N * VARIANTS
    pairs = store.Paired(views(), store.Reader(tmp_path))
    for image, _, said in pairs:
        torch.testing.assert_close(net()(image[None])[0], said)


def test_other_views_are_refused(tmp_path: Path) -> None:
    captured(tmp_path, views())
    reader = store.Reader(tmp_path)
    turned = TensorDataset(*(x.flip(0) for x in DATA.tensors))
    for made, says in (
        (views(seed=8), "seed: got views of seed 8, expected 7"),
        (views(variants=1, data=DATA + DATA + DATA), "variants: got .* 1, expected 3"),
        (views(lambda x: augment(x, 0.99)), r"transform: got another view 0 \(sample 0\)"),
        (views(lambda x: augment(x).flip(-1)), "transform: got another view"),
        (views(data=turned), "transform: got another view"),
        (DATA + DATA + DATA, "dataset: got ConcatDataset for outputs of random views"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            store.Paired(made, reader)
        assert len(str(error.value)) <= 500
    plain = tmp_path / "plain"
    captured(plain, DATA)
    for read in (store.Paired, lambda made, _: captured(plain, made)):
        with pytest.raises(ValueError, match=r"dataset: got Views .*no views\.json"):
            read(views(variants=1), store.Reader(plain))


def test_a_generator_of_its_own_is_refused(tmp_path: Path) -> None:
    own = torch.Generator()
    made = views(lambda x: x + torch.randn(x.shape, generator=own))
    with pytest.raises(ValueError, match="a random transform"):
        captured(tmp_path, made)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(seed=-1), ValueError, "seed: got -1"),
        (dict(seed=0.5), ValueError, "seed: got 0.5"),
        (dict(variants=0), ValueError, "variants: got 0"),
        (dict(transform=3), TypeError, "transform: got 3"),
        (dict(data=iter(DATA)), TypeError, "dataset: got"),
    ],
)
def test_bad_arguments(options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        views(**options)
    with pytest.raises(IndexError, match="number: got 18"):
        views()[18]
    with pytest.raises(ValueError, match="variant: got 3"):
        views().numbers(3)


def test_a_dataset_in_another_order_is_told(tmp_path: Path) -> None:
    """Labels may be missing on either side; nobody's random numbers are drawn."""
    images = TensorDataset(DATA.tensors[0])
    captured(tmp_path, images)
    reader = store.Reader(tmp_path, vocab_size=3)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (images, DATA, [{"x": x, "y": y} for x, y in DATA]):
            assert len(store.Paired(same, reader)) == N
    first = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(1))
    changed = TensorDataset(DATA.tensors[0] + 0.1)
    for other in (Subset(DATA, [1, 0, *range(2, N)]), changed):
        with pytest.warns(UserWarning, match="dataset: got another sample 0 than") as told:
            store.Paired(other, reader)
        assert told[0].filename == __file__
