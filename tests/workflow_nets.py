"""Small nets that the tests of the workflow share."""

from __future__ import annotations

from torch import Tensor, nn


def mlp(width: int = 8, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))


def convnet() -> nn.Sequential:
    """Convolutions, batch norms on both sides of a Flatten, nested."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.Flatten(),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Linear(16, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


class Block(nn.Module):
    """A residual block with what trips hooks: ReLU in place, and a sum in place."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        # not of stride 2: of so small maps in channels_last torch 2.13's gradient breaks the heap
        self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(self.conv1(x))
        out += self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Names as in torchvision and timm: layer1, layer2, ..., fc."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.layer1, self.layer2 = Block(width, width), Block(width, 2 * width)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))
