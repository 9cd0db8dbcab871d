"""Images of any shape in a frame of one size, and boxes there and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL.Image import Image, Resampling
from PIL.Image import new as new_image
from torch import Tensor

from refold.errors import InputError

GREY = (114, 114, 114)


@dataclass(frozen=True)
class Letterbox:
    """An image of ``size`` (height, width) scaled to fit ``frame`` and put into its upper left corner.

    Raises `InputError` where a side is not positive.

    Examples:
        >>> import torch
        >>> from refold.boxes import Letterbox
        >>> fitted = Letterbox(size=(100, 200), frame=(64, 64))
        >>> fitted.inner
        (32, 64)
        >>> fitted.back(fitted.into(torch.tensor([[0., 50., 200., 100.]])))
        tensor([[  0.,  50., 200., 100.]])
    """

    size: tuple[int, int]
    frame: tuple[int, int]

    def __post_init__(self) -> None:
        if min(*self.size, *self.frame) < 1:
            raise InputError(
                f"The image is {self.size} and its frame {self.frame}; all sides must be at least 1."
            )

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the image in the frame."""
        scale = min(side / own for side, own in zip(self.frame, self.size, strict=True))
        height, width = (
            min(side, max(1, round(own * scale))) for side, own in zip(self.frame, self.size, strict=True)
        )
        return height, width

    @property
    def scale(self) -> tuple[float, float]:
        """Along x and y; the two differ by the rounding of a side alone."""
        return self.inner[1] / self.size[1], self.inner[0] / self.size[0]

    def into(self, boxes: Tensor) -> Tensor:
        """Boxes ``(n, 4)`` x1, y1, x2, y2 of the image in pixels of the frame."""
        return boxes * boxes.new_tensor(self.scale * 2)

    def back(self, boxes: Tensor) -> Tensor:
        """Boxes of the frame in pixels of the image, clipped to it."""
        height, width = self.size
        limits = torch.tensor((width, height) * 2, dtype=boxes.dtype, device=boxes.device)
        return torch.minimum((boxes / boxes.new_tensor(self.scale * 2)).clamp(min=0), limits)

    def picture(self, image: Image, resampling: Resampling = Resampling.BILINEAR) -> Image:
        """The frame with the RGB image in it, grey where there is none."""
        height, width = self.inner
        framed = new_image("RGB", self.frame[::-1], GREY)
        framed.paste(image.resize((width, height), resampling))
        return framed
