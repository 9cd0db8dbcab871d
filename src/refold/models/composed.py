"""Networks named ``HEAD/BACKBONE``: detectors and segmenters on any classifier of refold or timm."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn

from refold.errors import InputError, UnknownModel
from refold.models.backbone import Backbone
from refold.models.detectors.dense import DenseDetector
from refold.models.detectors.maskrcnn import MaskRCNN
from refold.models.detectors.retinanet import RetinaNet
from refold.models.detectors.yolov3 import YOLOv3
from refold.models.segmenters.heads import DeepLab, LiteASPP, PyramidSum
from refold.models.segmenters.segmenter import Segmenter
from refold.models.torchvision_networks import PREFIX as TORCHVISION

TaskName = Literal["detect", "instances", "segment"]


@dataclass(frozen=True)
class Head:
    """A head: its ``task``, what builds the whole network from a backbone and the number of classes, and the strides of
    the maps that it reads; that of the backbone's last map is ``output_stride`` at most, unless asked for otherwise.
    ``side`` is that of the images that it usually reads, ``arguments`` are its own keywords."""

    task: TaskName
    build: Callable[..., nn.Module]
    strides: Sequence[int]
    side: int
    output_stride: int | None = None
    arguments: frozenset[str] = field(default_factory=frozenset)


def _segmenter(
    head: Callable[..., nn.Module], backbone: Backbone, num_classes: int, **arguments: Any
) -> nn.Module:
    return Segmenter(backbone, head(backbone.channels, num_classes, **arguments), num_classes)


def _detect(network: type[nn.Module], side: int) -> Head:
    return Head("detect", network, (8, 16, 32), side, arguments=_keywords(network))


def _segment(head: type[nn.Module], strides: Sequence[int], output_stride: int | None = None) -> Head:
    return Head("segment", partial(_segmenter, head), strides, 512, output_stride, _keywords(head))


def _keywords(made: type[nn.Module]) -> frozenset[str]:
    parameters = inspect.signature(made).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


HEADS: Mapping[str, Head] = {
    "dense": _detect(DenseDetector, side=320),
    "retinanet": _detect(RetinaNet, side=640),
    "yolov3": _detect(YOLOv3, side=416),
    "maskrcnn": Head("instances", MaskRCNN, (4, 8, 16, 32), 640, arguments=_keywords(MaskRCNN)),
    "lraspp": _segment(LiteASPP, (8, 32), output_stride=16),
    "deeplab": _segment(DeepLab, (4, 32), output_stride=16),
    "fpn": _segment(PyramidSum, (4, 8, 16, 32)),
}
"""Every head by its name."""


def is_composed(name: str) -> bool:
    """Whether a name is written ``HEAD/BACKBONE``; addresses and torchvision's, which have a slash too, are none."""
    head, slash, _ = name.partition("/")
    return bool(slash) and ":" not in head and not name.startswith(TORCHVISION)


def task_of(name: str) -> TaskName | Literal["classify"]:
    """What the network of a name is for."""
    head = HEADS.get(name.partition("/")[0]) if "/" in name else None
    return "classify" if head is None else head.task


def head_named(name: str) -> Head:
    """The head of a composed name; raises `UnknownModel` with those that there are."""
    head, _, backbone = name.partition("/")
    if head not in HEADS:
        nearest = difflib.get_close_matches(head.lower(), HEADS, n=1)
        hint = f"did you mean {nearest[0]}/{backbone}? " if nearest else ""
        raise UnknownModel(f"There is no head named {head!r}; {hint}the heads are {', '.join(HEADS)}.")
    if not backbone:
        raise UnknownModel(f"{name!r} names no backbone; write {head}/repghostnet_100, or another network.")
    return HEADS[head]


def build_composed(
    name: str,
    create: Callable[..., nn.Module],
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    output_stride: int | None = None,
    **arguments: Any,
) -> nn.Module:
    """The network of a composed name, its backbone built by ``create``; ``pretrained`` loads the backbone's weights.

    The keywords are those of the head, and else of the backbone.
    Raises `UnknownModel` where the head is unknown, `InputError` where an argument cannot be used.
    """
    head = head_named(name)
    num_classes = _classes(name, num_classes, head)
    own = {key: value for key, value in arguments.items() if key in head.arguments}
    theirs = {key: value for key, value in arguments.items() if key not in head.arguments}
    unusable = sorted({"features_only", "out_indices", "global_pool"} & set(theirs))
    if unusable:
        raise InputError(
            f"{unusable[0]} is for a classifier alone; {name} takes {', '.join(sorted(head.arguments))} and the "
            "arguments of its backbone."
        )
    backbone = Backbone(
        create,
        name.partition("/")[2],
        head.strides,
        output_stride=head.output_stride if output_stride is None else output_stride,
        pretrained=pretrained,
        **theirs,
    )
    network = head.build(backbone, num_classes, **own)
    known = getattr(backbone.features, "pretrained_cfg", None) or {}
    if isinstance(known, dict):
        known.pop("state_dict", None)  # weights that were given stand in their layers now
    channels = known.get("input_size", (3,))[0] if "in_chans" not in theirs else theirs["in_chans"]
    # What its images look like is the backbone's, their size the head's.
    network.pretrained_cfg = {  # type: ignore[assignment]  # a plain attribute, as timm sets them
        **{key: known[key] for key in _PREPROCESSING if key in known},
        "input_size": (channels, head.side, head.side),
        "crop_pct": 1.0,
    }
    return network


_COCO_CLASSES, _VOC_CLASSES = 80, 21
_PREPROCESSING = ("mean", "std", "interpolation")


def _classes(name: str, given: int | None, head: Head) -> int:
    if given is None:
        return _VOC_CLASSES if head.task == "segment" else _COCO_CLASSES
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise InputError(f"num_classes is {given!r}; {name} needs 1 or more.")
    return given
