"""A network whose channels can be scaled between its layers."""

import torch
from torch import nn


class Chain(nn.Module):
    """Convolutions, one depthwise, with one activation between them, pooling, and a linear layer."""

    def __init__(self, activation, classes=5):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation())
        self.filter = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), activation())
        self.mix = nn.Sequential(nn.Conv2d(8, 8, 1), activation(), nn.MaxPool2d(2))
        self.head = nn.Linear(8, classes)
        with torch.no_grad():
            for layer in (self.first[0], self.filter[0], self.mix[0]):
                layer.weight.mul_(torch.logspace(-2, 2, 8).view(-1, 1, 1, 1))

    def forward(self, image):
        x = self.mix(self.filter(self.first(image)))
        return self.head((x + x).mean((2, 3)))
