"""A small segmenter of drawn shapes, taught at every pixel or by where each channel is active.

Images of 24 x 24 pixels show two shapes of one brightness under noise: discs, squares and
crosses, which only their outline tells apart. Of 192 images a student has the labels of 12.
Models and images are channels_last, so the losses read the logits where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import distill

from .recipe import Figures, Gain, Recipe
from .training import fit, sample_batches, scaled

SIDE, CLASSES, SHAPES = 24, 4, 2
TRAIN, LABELLED, HELD_OUT = 192, 12, 96
STEPS, BATCH, LEARNING_RATE = 400, 16, 1e-2
WIDE, NARROW, LAST = 24, 12, "8"


def scenes(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, SIDE, SIDE] and classes [count, SIDE, SIDE], 0 for what no shape covers."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(SIDE)
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for _ in range(SHAPES):
        kind = torch.randint(1, CLASSES, (count, 1, 1), generator=generator)
        radius = torch.randint(3, 7, (count, 1, 1), generator=generator)
        middle = torch.randint(3, SIDE - 3, (2, count, 1, 1), generator=generator)
        down = (place[:, None] - middle[0]).abs()
        across = (place - middle[1]).abs()
        disc, square = down**2 + across**2 <= radius**2, torch.maximum(down, across) <= radius
        cross = square & (torch.minimum(down, across) <= 1)
        inside = torch.where(kind == 1, disc, torch.where(kind == 2, square, cross))
        labels = torch.where(inside, kind, labels)
    noise = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    images = (labels > 0).unsqueeze(1) + 0.2 * noise
    return images.contiguous(memory_format=torch.channels_last), labels


def segmenter(width: int) -> nn.Sequential:
    """Four convolutions that see 7 pixels each way; LAST is their last hidden layer."""
    layers: list[nn.Module] = []
    for inputs, gap in ((1, 1), (width, 2), (width, 4)):
        convolution = nn.Conv2d(inputs, width, 3, padding=gap, dilation=gap)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.Conv2d(width, CLASSES, 1))
    model = nn.Sequential(*layers)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def mean_iou(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean over classes of intersection / union over all pixels, in percent."""
    with torch.no_grad():
        found = model.eval()(images).argmax(1)
    pairs = torch.bincount((labels * CLASSES + found).flatten(), minlength=CLASSES**2)
    table = pairs.view(CLASSES, CLASSES).double()
    both = table.diagonal()
    return 100 * float((both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).mean())


def run(seed: int, size: float) -> Figures:
    images, labels = scenes(2 * seed, TRAIN)
    held_out = scenes(2 * seed + 1, HELD_OUT)
    steps = scaled(STEPS, size)
    schedule = distill.lr_schedule(steps, warmup=steps // 10)
    torch.manual_seed(seed)
    teacher = segmenter(WIDE)
    fit(
        teacher,
        sample_batches(seed, steps, BATCH, images, labels),
        hard(),
        LEARNING_RATE,
        schedule=schedule,
    )
    seen = torch.where(torch.arange(TRAIN)[:, None, None] < LABELLED, labels, -100)
    projector = nn.Conv2d(NARROW, WIDE, 1)

    def student(rows: int, *loss: distill.Term) -> float:
        torch.manual_seed(1000 + seed)
        model = segmenter(NARROW)
        batches = sample_batches(seed, steps, BATCH, images[:rows], seen[:rows])
        taught = teacher if len(loss) > 1 else None
        fit(model, batches, loss, LEARNING_RATE, teacher=taught, schedule=schedule)
        return mean_iou(model, *held_out)

    pixels = distill.response(distill.pixel_wise, temperature=1.0)
    channels = distill.response(distill.channel_wise, temperature=4.0)
    inside = distill.feature(LAST, LAST, distill.channel_wise, 0.1, projector=projector)
    return {
        "teacher": mean_iou(teacher, *held_out),
        "hard labels": student(LABELLED, hard()),
        "pixel-wise": student(TRAIN, hard(0.1), pixels),
        "channel-wise": student(TRAIN, hard(), channels),
        "channels of a layer": student(TRAIN, hard(), inside),
    }


def hard(weight: float = 1.0) -> distill.Term:
    return distill.hard(weight, class_dim=1)


RECIPES = (
    Recipe(
        name="segmentation",
        about="convolutions of 12 channels from some of 24, 12 of 192 images labelled; mean IoU",
        paper="Shu et al. 2021, arXiv 2011.13256; Liu et al. 2019, arXiv 1903.04197",
        run=run,
        gains=(
            Gain("pixel-wise", "hard labels", 8.0, seeds_improved=1.0),
            Gain("channel-wise", "hard labels", 1.0),
            Gain("channels of a layer", "hard labels", None),
        ),
        seeds=4,
    ),
)
