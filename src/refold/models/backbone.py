"""Any classifier of refold or timm as the backbone of a detector or a segmenter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from refold.errors import InputError, RefoldError, first_line


class Backbone(nn.Module):
    """A classifier without its head: images to its maps of the given ``strides``, a list in their order.

    ``channels`` are those of the maps. Of several maps of one stride the last is taken.
    ``output_stride`` keeps all maps at most so many times smaller than the image, where the network can; strides above
    it mean its last map then.
    Raises `InputError` where the network has no maps, or none of a stride.
    """

    def __init__(
        self,
        create: Callable[..., nn.Module],
        name: str,
        strides: Sequence[int],
        *,
        output_stride: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if output_stride is not None:
            arguments["output_stride"] = output_stride
            strides = [min(stride, output_stride) for stride in strides]
        try:
            self.features = create(name, features_only=True, **arguments)
        except RefoldError:
            raise
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            raise InputError(_refusal(name, output_stride, error)) from error
        info: Any = self.features.feature_info
        reductions, channels = list(info.reduction()), list(info.channels())
        absent = [stride for stride in strides if stride not in reductions]
        if absent:
            raise InputError(
                f"{name} has maps of strides {', '.join(map(str, reductions))}, none of {absent[0]}; choose a network "
                f"whose maps are {', '.join(map(str, strides))} times smaller than the image."
            )
        last = {reduction: place for place, reduction in enumerate(reductions)}
        self.places = [last[stride] for stride in strides]
        self.channels = [channels[place] for place in self.places]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.features(images)
        return [maps[place] for place in self.places]


def _refusal(name: str, output_stride: int | None, error: Exception) -> str:
    if output_stride is None:
        return f"{name} gives no maps of several sizes ({first_line(error)}); choose a convolutional network."
    return (
        f"{name} cannot keep its maps at a stride of {output_stride} ({first_line(error)}); give output_stride=32, or "
        "another backbone."
    )
