"""A small detector of drawn shapes, taught where each object's middle is and how large it is.

Images of 24 x 24 pixels show an ellipse, a rectangle or a cross in either half, of one brightness
under noise. On a grid of 12 x 12 cells the model gives one logit a class (is the middle of such an
object here?) and two numbers (half its height and width). Of 192 images a student has the boxes
of 12. Models and images are channels_last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd import distill

from .recipe import Figures, Gain, Recipe
from .training import fit, sample_batches, scaled

SIDE, CLASSES, CELL = 24, 3, 2
CELLS, LARGEST = SIDE // CELL, 4  # LARGEST: half of an object, in pixels
TRAIN, LABELLED, HELD_OUT = 192, 12, 96
STEPS, BATCH, LEARNING_RATE = 300, 16, 1e-2
WIDE, NARROW = 24, 8
OVERLAP, FOUND = 0.5, 4  # intersection over union of a hit; boxes of an image at most
SURE = 0.1  # of a middle, where a teacher's sizes are learnt


def scenes(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [count, 1, SIDE, SIDE], maps of labels [count, CLASSES + 2, CELLS, CELLS], and boxes
    [count, 2, 5]: class, middle and half of each size. Labels of sizes are -100 beside a middle."""
    generator = torch.Generator().manual_seed(seed)
    pixel, cell = torch.arange(SIDE), torch.arange(CELLS)
    images = 0.2 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    labels = torch.zeros(count, CLASSES + 2, CELLS, CELLS)
    labels[:, CLASSES:] = -100.0
    boxes = torch.zeros(count, 2, 5)
    every = torch.arange(count)
    for half in range(2):
        kind = torch.randint(CLASSES, (count,), generator=generator)
        y = torch.randint(LARGEST, SIDE - LARGEST, (count,), generator=generator)
        x = torch.randint(LARGEST, SIDE // 2 - LARGEST + 1, (count,), generator=generator)
        x = x + half * (SIDE // 2 - 1)
        size = torch.randint(2, LARGEST + 1, (2, count), generator=generator)
        down = (pixel[:, None] - y[:, None, None]).abs() / size[0][:, None, None]
        across = (pixel - x[:, None, None]).abs() / size[1][:, None, None]
        ellipse, box = down**2 + across**2 <= 1, torch.maximum(down, across) <= 1
        cross = box & (torch.minimum(down, across) < 0.5)
        one = kind[:, None, None]
        images[:, 0] += torch.where(one == 0, ellipse, torch.where(one == 1, box, cross)) * 1.0
        row, column = y // CELL, x // CELL
        far = (cell[:, None] - row[:, None, None]) ** 2 + (cell - column[:, None, None]) ** 2
        labels[every, kind] = torch.maximum(labels[every, kind], torch.exp(-far / 0.5))
        labels[every, CLASSES:, row, column] = size.T / LARGEST
        boxes[:, half] = torch.stack([kind, y, x, *size], 1).float()
    return images.contiguous(memory_format=torch.channels_last), labels, boxes


def detector(width: int) -> nn.Sequential:
    """Four convolutions, the second of stride 2, that see 10 pixels each way."""
    layers: list[nn.Module] = []
    for inputs, stride, gap in ((1, 1, 1), (width, CELL, 1), (width, 1, 1), (width, 1, 2)):
        convolution = nn.Conv2d(inputs, width, 3, stride, padding=gap, dilation=gap)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.Conv2d(width, CLASSES + 2, 1))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def parts(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the classes, and sizes."""
    return maps[:, :CLASSES], maps[:, CLASSES:]


def labelled(student: distill.Outputs, _: distill.Outputs, batch: distill.Batch) -> Tensor:
    """Binary cross-entropy of the middles, L1 of the sizes there; sums, mean over images."""
    (logits, sizes), (heat, target) = parts(student.logits), parts(batch.labels)
    images = float(len(logits))
    middles = fastkd.binary_distillation_loss(logits, logits, heat, alpha=1.0, normalizer=images)
    there = (target != -100) & (heat[:, :1] != -100)
    boxes = torch.where(there, (sizes - target).abs(), 0.0).sum() / images
    return middles + boxes


def middles(student: distill.Outputs, teacher: distill.Outputs, batch: distill.Batch) -> Tensor:
    """T^2 KL of each logit of a middle."""
    logits, said = parts(student.logits)[0], parts(teacher.logits)[0]
    return fastkd.binary_distillation_loss(
        logits, said, alpha=0.0, temperature=1.0, normalizer=float(len(logits))
    )


def sizes(student: distill.Outputs, teacher: distill.Outputs, batch: distill.Batch) -> Tensor:
    """L1 from the teacher's sizes, as much as the teacher holds a cell for a middle."""
    own, (said, target) = parts(student.logits)[1], parts(teacher.logits)
    sure = said.float().sigmoid().amax(1, keepdim=True)
    sure = torch.where(sure > SURE, sure, 0.0)
    return (sure * (own - target).abs()).sum() / len(own)


def found(model: nn.Module, images: Tensor) -> Tensor:
    """[N, FOUND, 6]: score, class, middle and half of each size, of the highest cells that no
    neighbour passes."""
    with torch.no_grad():
        logits, size = parts(model.eval()(images))
    score = logits.sigmoid() * (F.max_pool2d(logits, 3, 1, 1) == logits)
    best, at = score.flatten(1).topk(FOUND)
    kind, cell = at // CELLS**2, at % CELLS**2
    size = size.flatten(2).gather(2, cell[:, None].expand(-1, 2, -1)) * LARGEST
    middle = [CELL * (cell // CELLS) + 0.5, CELL * (cell % CELLS) + 0.5]
    return torch.stack([best, kind, *middle, size[:, 0], size[:, 1]], -1)


def overlap(one: Tensor, two: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4], middle and half of each size."""
    half = [x[..., 2:].clamp(min=0) + 0.5 for x in (one, two)]
    low = torch.maximum(one[..., :2] - half[0], two[..., :2] - half[1])
    high = torch.minimum(one[..., :2] + half[0], two[..., :2] + half[1])
    both = (high - low).clamp(min=0).prod(-1)
    return both / (4 * half[0].prod(-1) + 4 * half[1].prod(-1) - both)


def mean_precision(model: nn.Module, images: Tensor, boxes: Tensor) -> float:
    """Average precision at an overlap of OVERLAP, mean over classes, in percent."""
    said = found(model, images)
    like = overlap(said[:, :, None, 2:], boxes[:, None, :, 1:])
    like = like * (said[:, :, None, 1] == boxes[:, None, :, 0])
    hit = torch.zeros(said.shape[:2], dtype=torch.bool)
    for box in range(boxes.size(1)):  # the box's first hit, in the order of the scores
        first = (like[..., box] >= OVERLAP) & ~hit
        hit |= first & (first.cumsum(1) == 1)
    total = 0.0
    for kind in range(CLASSES):
        mine = said[..., 1] == kind
        order = said[..., 0][mine].argsort(descending=True)
        hits = hit[mine][order].double()
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        total += float((precision * hits).sum() / (boxes[..., 0] == kind).sum().clamp(min=1))
    return 100 * total / CLASSES


def run(seed: int, size: float) -> Figures:
    images, labels, _ = scenes(2 * seed, TRAIN)
    held_out, _, boxes = scenes(2 * seed + 1, HELD_OUT)
    steps = scaled(STEPS, size)
    schedule = distill.lr_schedule(steps, warmup=steps // 10)
    hard = distill.Term("labels", labelled, mean="samples")
    torch.manual_seed(seed)
    batches = sample_batches(seed, steps, BATCH, images, labels)
    teacher = fit(detector(WIDE), batches, hard, LEARNING_RATE, schedule=schedule)
    seen = labels.clone()
    seen[LABELLED:] = -100.0

    def student(rows: int, *soft: distill.Term) -> float:
        torch.manual_seed(1000 + seed)
        batches = sample_batches(seed, steps, BATCH, images[:rows], seen[:rows])
        model = fit(
            detector(NARROW), batches, [hard, *soft], LEARNING_RATE,
            teacher=teacher if soft else None, schedule=schedule,
        )  # fmt: skip
        return mean_precision(model, held_out, boxes)

    heat = distill.Term("middles", middles, 3.0, mean="samples")
    box = distill.Term("sizes", sizes, mean="samples")
    return {
        "teacher": mean_precision(teacher, held_out, boxes),
        "hard labels": student(LABELLED),
        "middles": student(TRAIN, heat),
        "middles and sizes": student(TRAIN, heat, box),
    }


RECIPES = (
    Recipe(
        name="detection",
        about="a detector of 8 channels from one of 24, boxes of 12 of 192 images; mean precision",
        paper="Zhou et al. 2019, arXiv 1904.07850 (the model); Chen et al. 2017, NeurIPS",
        run=run,
        gains=(
            Gain("middles and sizes", "hard labels", 5.0),
            Gain("middles and sizes", "middles", 2.0),
            Gain("middles", "hard labels", None),
        ),
        seeds=4,
    ),
)
