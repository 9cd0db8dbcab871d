"""What the tests of unfolding share: images, two steps of training, and when outputs are close."""

import torch
from torch import Tensor, nn


def images(seed: int = 0, size: int = 32, batch: int = 4) -> Tensor:
    return torch.randn(
        batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def close(expected: Tensor, found: Tensor) -> bool:
    with torch.no_grad():
        return float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


def train(model: nn.Module, x: Tensor, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
