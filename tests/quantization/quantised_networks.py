"""Small networks with weights as trained ones have them, and images for them."""

import torch
from torch import Tensor, nn


class Ladder(nn.Module):
    """Dense, depthwise and 1x1 layers with ReLU6, a sum, and two heads if asked for."""

    def __init__(self, *, heads: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48), nn.ReLU6())
        self.filter = nn.Sequential(nn.Conv2d(48, 48, 3, 1, 1, groups=48), nn.BatchNorm2d(48), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16))
        self.last = nn.Sequential(nn.Conv2d(16, 40, 3, 2, 1), nn.BatchNorm2d(40), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(40, classes) for _ in range(heads))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.stem(image)
        x = self.last(x + self.project(self.filter(self.expand(x)))).mean((2, 3))
        found = tuple(head(x) for head in self.heads)
        return found[0] if len(found) == 1 else found


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network with batch norms that have seen images, of channels with ranges of their own, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=generator) * 1.5 + 0.3
            module.bias.data = torch.randn(module.num_features, generator=generator) * 0.5
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(photos(16, seed=seed + 1))
        net.eval()
        found = net(photos(100, seed=seed + 2))
        for head, logits in zip(net.heads, found if isinstance(found, tuple) else (found,), strict=True):
            # All classes are answered: else no answer could be lost.
            head.weight.div_(logits.std(0)[:, None])
            head.bias.copy_(head.bias / logits.std(0) - (logits / logits.std(0)).mean(0))
    return net


def photos(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Smooth images ``(count, 3, size, size)`` with edges, as photos have them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth + 0.1 * torch.randn(count, 3, size, size, generator=generator)
