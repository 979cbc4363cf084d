"""A student from a teacher alone: its inputs made from the teacher, beside noise and real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill
from fastkd.arguments.messages import shown
from fastkd.distill.batch import Outputs, device_of, forward, restored_modes

from .data import digits
from .recipe import Figures, Gain, Recipe
from .training import fit, held_out, sample_batches, scaled
from .workflow import TEMPERATURE, student

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def batch_norm_prior(teacher: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """A context whose value, called after a forward pass, says how far the batch is from the data.

        sum over batch norms, ||m(x) - m||_2 + ||v(x) - v||_2

    with m(x), v(x) mean and biased variance of the norm's input by channel, m and v the running
    ones.

    Raises:
        ValueError: a teacher without batch norms that keep statistics.

    Paper: Yin et al. 2020, DeepInversion, arXiv 1912.08795.
    """
    norms = [part for part in teacher.modules() if isinstance(part, NORMS)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        raise ValueError("teacher: got no batch norm with running statistics, expected some")
    found: list[Tensor] = []

    def look(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        by_channel = inputs[0].transpose(0, 1).flatten(1)
        var, mean = torch.var_mean(by_channel, 1, correction=0)
        found.append((mean - norm.running_mean).norm() + (var - norm.running_var).norm())

    def take() -> Tensor:
        total = torch.stack(found).sum()
        found.clear()
        return total

    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        yield take
    finally:
        for handle in handles:
            handle.remove()


def invert(
    teacher: nn.Module,
    labels: Tensor,
    shape: Sequence[int],
    *,
    steps: int = 200,
    lr: float = 0.05,
    prior: float = 1.0,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """Inputs that the teacher takes for the given classes and finds like its training data.

        argmin over x of CE(labels, teacher(x)) + prior * batch-norm prior(x), from noise

    Args:
        teacher: module with batch norms; runs in eval mode, leaves as it came.
        labels: int [N], the classes wanted.
        shape: of one input.
        steps: of Adam, at least 1.
        lr: its learning rate.
        prior: weight of `batch_norm_prior`; 0 leaves it out (a teacher without batch norms).
        bounds: least and greatest value of an input, kept after every step.

    Returns:
        [N, *shape], on the teacher's device. A class wanted is not always the class found: take the
        teacher's outputs on them, not `labels`, as targets.

    Raises:
        ValueError: `steps` below 1, labels that are no vector, empty bounds, a teacher without
            batch norms that keep statistics where `prior` is not 0.

    Paper: Yin et al. 2020, DeepInversion, arXiv 1912.08795.
    """
    if steps < 1:
        raise ValueError(f"steps: got {shown(steps)}, expected an integer >= 1")
    if labels.dim() != 1:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected [N]")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds: got {shown(bounds)}, expected (least, greatest)")
    where = device_of(teacher)
    x = torch.randn(len(labels), *shape, device=where)
    if bounds is not None:
        low, high = bounds
        x = low + (high - low) * torch.rand_like(x)
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels.to(where))

    def inputs() -> Tensor:
        return x

    for _ in _descent(optimizer, teacher, inputs, loss, prior, steps):
        if bounds is not None:
            with torch.no_grad():
                x.clamp_(*bounds)
    return x.detach()


def train_generator(
    generator: nn.Module,
    teacher: nn.Module,
    noise: Callable[[], Tensor],
    *,
    steps: int = 300,
    lr: float = 1e-3,
    prior: float = 1.0,
    balance: float = 5.0,
) -> None:
    """Train a generator of inputs in place, on what the teacher says of them.

        E CE(y, teacher(G(z))) - balance * H(E softmax(teacher(G(z)))) + prior * batch-norm prior

    with y the teacher's own first choice, and H the entropy of its mean answer over a batch: each
    input is to be of some class for sure, and all classes are to occur.

    Args:
        generator: module, noise -> inputs of the teacher; in train mode here.
        teacher: module; runs in eval mode, leaves as it came.
        noise: makes a batch of z, on the generator's device.
        steps: of Adam, at least 1.
        lr: its learning rate.
        prior: weight of `batch_norm_prior`; 0 leaves it out.
        balance: weight of the entropy.

    Raises:
        ValueError: `steps` below 1, a teacher without batch norms where `prior` is not 0.

    Paper: Chen et al. 2019, DAFL, arXiv 1904.01186; the prior by Yin et al. 2020.
    """
    if steps < 1:
        raise ValueError(f"steps: got {shown(steps)}, expected an integer >= 1")
    optimizer = torch.optim.Adam(generator.parameters(), lr=lr)

    def loss(logits: Tensor) -> Tensor:
        mean = logits.softmax(-1).mean(0)
        entropy = torch.special.entr(mean).sum()
        return F.cross_entropy(logits, logits.argmax(-1)) - balance * entropy

    def inputs() -> Tensor:
        return forward(generator, noise())

    with restored_modes(generator):
        generator.train()
        for _ in _descent(optimizer, teacher, inputs, loss, prior, steps):
            pass


def _descent(
    optimizer: torch.optim.Optimizer,
    teacher: nn.Module,
    inputs: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    prior: float,
    steps: int,
) -> Iterator[None]:
    """Steps down loss(teacher(inputs)) + prior; only what the optimizer holds gets a gradient."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    with restored_modes(teacher):
        teacher.eval()
        for _ in range(steps):
            x = inputs()
            if prior:
                with batch_norm_prior(teacher) as distance:
                    outputs = Outputs(forward(teacher, x), role="teacher")
                    value = loss(outputs.logits) + prior * distance()
            else:
                value = loss(Outputs(forward(teacher, x), role="teacher").logits)
            for p, slope in zip(weights, torch.autograd.grad(value, weights), strict=True):
                p.grad = slope
            optimizer.step()
            yield


# ---- the recipe

WIDTH, CLASSES, MADE, LATENT = 256, 10, 1000, 32
RANGE = (0.0, 1.0)  # of a pixel: what a user of a teacher knows


def normed() -> nn.Sequential:
    """An MLP with batch norms."""
    parts: list[nn.Module] = []
    for i in (64, WIDTH):
        parts += [nn.Linear(i, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(WIDTH, CLASSES))


def generator() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(LATENT, 128),
        nn.BatchNorm1d(128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, 64),
        nn.Sigmoid(),
    )


def compare(seed: int, size: float) -> Figures:
    data, steps = digits(seed), scaled(800, size)
    torch.manual_seed(seed)
    live = normed()
    fit(live, sample_batches(seed, 150, 100, data.images, data.labels), distill.hard(), lr=2e-3)
    labels = torch.arange(CLASSES).repeat(MADE // CLASSES)

    def inverted(prior: float) -> Tensor:
        torch.manual_seed(seed)
        count = scaled(300, size)
        return invert(live, labels, (64,), steps=count, lr=0.05, prior=prior, bounds=RANGE)

    def generated() -> Tensor:
        torch.manual_seed(seed)
        made = generator()
        train_generator(made, live, lambda: torch.randn(200, LATENT), steps=scaled(400, size))
        with torch.no_grad():
            return made.eval()(torch.randn(MADE, LATENT))

    def trained(images: Tensor) -> float:
        term = distill.soft(temperature=TEMPERATURE)
        batches = sample_batches(seed, steps, 100, images)
        return held_out(fit(student(seed), batches, term, teacher=live), data)

    noise = torch.rand(MADE, 64, generator=torch.Generator().manual_seed(seed))
    return {
        "teacher": held_out(live, data),
        "inverted": trained(inverted(1.0)),
        "inverted, classes alone": trained(inverted(0.0)),
        "generator": trained(generated()),
        "noise": trained(noise),
        "real": trained(data.images),
    }


RECIPES = (
    Recipe(
        name="data-free",
        about="inputs inverted from the teacher's batch norms, no image seen",
        paper="Yin et al. 2020, arXiv 1912.08795; Chen et al. 2019, arXiv 1904.01186",
        run=compare,
        gains=(
            Gain("inverted", "", 90.0),
            Gain("inverted", "noise", 20.0),
            Gain("inverted", "inverted, classes alone", None),
            Gain("inverted", "real", None),
            Gain("generator", "noise", None),
        ),
    ),
)
