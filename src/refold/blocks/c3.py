"""YOLOv5's C3 module with an addition in place of its concatenation."""

from torch import Tensor, nn


class AddedC3(nn.Module):
    """Two branches of one input, added, and a 1x1 convolution: ``cv3(m(cv1(x)) + cv2(x))``.

    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height, width)``, the channels being those
    of the parts.

    Source: RepGhost, appendix B.2 and table 10.
    """

    def __init__(self, cv1: nn.Module, cv2: nn.Module, cv3: nn.Module, m: nn.Module) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3, self.m = cv1, cv2, cv3, m

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv3(self.m(self.cv1(x)) + self.cv2(x))
        return out
