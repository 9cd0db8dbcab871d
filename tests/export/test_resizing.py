"""A resize written as indexing takes PyTorch's pixels, whatever the sizes, and whole multiples stay a resize."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.export.resizing import resizes_as_choices


class Enlarged(nn.Module):
    """A convolution and a resize."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.layer(x), mode="nearest", **self.how).relu()


def resizes_in(model: nn.Module, image: Tensor) -> int:
    graph = torch.export.export(model, (image,)).graph
    return sum("upsample" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize(
    ("shape", "how", "left"),
    [
        ((3, 3), {"size": (7, 7)}, 0),  # the DFC attention of GhostNetV3 at 224 pixels
        ((3, 5), {"size": (6, 7)}, 0),
        ((7, 4), {"size": (3, 4)}, 0),
        ((5, 5), {"scale_factor": (2.3, 1.2)}, 0),
        ((5, 4), {"size": (10, 12)}, 1),
        ((5, 5), {"scale_factor": 2.0}, 1),
    ],
)
def test_the_same_pixels(shape: tuple[int, int], how: dict[str, Any], left: int) -> None:
    torch.manual_seed(0)
    model, image = Enlarged(**how).eval(), torch.randn(2, 3, *shape)
    rewritten = resizes_as_choices(model, (image,))
    assert resizes_in(rewritten, image) == left
    assert (rewritten is model) == bool(left)
    assert torch.equal(rewritten(image), model(image))
