"""MobileNetV4's convolutional networks, and RepGhostNetV2 and PlainNet, which move or drop their shortcuts."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

from torch import nn

from refold.blocks import ConvNorm, InvertedBottleneck, depthwise
from refold.models.classifier import ExpandedHead, ImageClassifier, check_arguments
from refold.models.layouts import CheckpointLayout


class ConvRow(NamedTuple):
    """A convolution with batch norm in the first stages."""

    kernel_size: int
    stride: int
    out_channels: int
    activation: bool = True


class BottleneckRow(NamedTuple):
    """A bottleneck: depthwise kernels in front of the expansion and behind it (0 for none), stride, channels."""

    start: int
    middle: int
    stride: int
    mid_channels: int
    out_channels: int


class MobileNetV4Layers(NamedTuple):
    """The layers of one size: the stem's channels, stages of convolutions, then stages of bottlenecks."""

    stem_channels: int
    convs: tuple[tuple[ConvRow, ...], ...]
    bottlenecks: tuple[tuple[BottleneckRow, ...], ...]


def _rows(out_channels: int, *rows: tuple[int, int, int]) -> tuple[BottleneckRow, ...]:
    """The bottlenecks of a stage from their kernels and inner channels; the first one has stride 2."""
    return tuple(
        BottleneckRow(start, middle, 1 if index else 2, mid_channels, out_channels)
        for index, (start, middle, mid_channels) in enumerate(rows)
    )


_LAYERS = {
    "small": MobileNetV4Layers(
        32,
        ((ConvRow(3, 2, 32), ConvRow(1, 1, 32)), (ConvRow(3, 2, 96), ConvRow(1, 1, 64))),
        (
            _rows(96, (5, 5, 192), *[(0, 3, 192)] * 4, (3, 0, 384)),
            _rows(128, (3, 3, 576), (5, 5, 512), (0, 5, 512), (0, 5, 384), *[(0, 3, 512)] * 2),
        ),
    ),
    "medium": MobileNetV4Layers(
        32,
        ((ConvRow(3, 2, 128), ConvRow(1, 1, 48, activation=False)),),
        (
            _rows(80, (3, 5, 192), (3, 3, 160)),
            _rows(
                160,
                (3, 5, 480),
                *[(3, 3, 640)] * 2,
                (3, 5, 640),
                (3, 3, 640),
                (3, 0, 640),
                (0, 0, 320),
                (3, 0, 640),
            ),
            _rows(
                256,
                (5, 5, 960),
                (5, 5, 1024),
                *[(3, 5, 1024)] * 2,
                (0, 0, 1024),
                (3, 0, 1024),
                (3, 5, 512),
                (5, 5, 1024),
                *[(0, 0, 1024)] * 2,
                (5, 0, 512),
            ),
        ),
    ),
    "large": MobileNetV4Layers(
        24,
        ((ConvRow(3, 2, 96), ConvRow(1, 1, 48, activation=False)),),
        (
            _rows(96, (3, 5, 192), (3, 3, 384)),
            _rows(192, (3, 5, 384), *[(3, 3, 768)] * 3, (3, 5, 768), *[(5, 3, 768)] * 5, (3, 0, 768)),
            _rows(
                512,
                (5, 5, 768),
                *[(5, 5, 2048)] * 3,
                (5, 0, 2048),
                (5, 3, 2048),
                *[(5, 0, 2048)] * 2,
                (5, 3, 2048),
                (5, 5, 2048),
                *[(5, 0, 2048)] * 3,
            ),
        ),
    ),
}
_FINAL_CHANNELS, _HEAD_CHANNELS = 960, 1280

Shortcuts = Literal["inverted", "repghost", "none"]
"""Around depthwise-1x1-depthwise-1x1, around 1x1-depthwise-1x1-depthwise, or nowhere."""

_SHORTCUTS: dict[str, Shortcuts] = {
    "mobilenetv4": "inverted",
    "repghostnetv2": "repghost",
    "plainnet": "none",
}

NETWORKS = {
    f"{family}_{size}": (layers, shortcuts)
    for family, shortcuts in _SHORTCUTS.items()
    for size, layers in _LAYERS.items()
}

_TIMM = CheckpointLayout(
    "timm MobileNetV4",
    (
        (r"^conv_stem\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        (r"^blocks\.4\.0\.", "final_conv."),
        (r"^blocks\.0\.0\.conv_exp\.", "stages.0.0.conv."),
        (r"^blocks\.0\.0\.conv_pwl\.", "stages.0.1.conv."),
        (r"^blocks\.0\.0\.bn2\.", "stages.0.1.bn."),
        (r"^blocks\.", "stages."),
        (r"\.bn1\.", ".bn."),
        (r"\.dw_start\.", ".start."),
        (r"\.pw_exp\.", ".expand."),
        (r"\.dw_mid\.", ".middle."),
        (r"\.pw_proj\.", ".project."),
        (r"^conv_head\.", "head.conv."),
        (r"^norm_head\.", "head.bn."),
        (r"^classifier\.", "head.fc."),
    ),
)


class MobileNetV4(ImageClassifier):
    """A stem, stages of convolutions and of ``InvertedBottleneck``, a 1x1 convolution and ``ExpandedHead``.

    All layers and their cost are those of MobileNetV4; where its shortcuts begin and end distinguishes
    RepGhostNetV2, and PlainNet has none.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: RepGhost, appendix B.1 and figure 7; timm for the layers of MobileNetV4.
    """

    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv",)
    timm_names: ClassVar[Mapping[str, str]] = {
        f"mobilenetv4_{size}": f"mobilenetv4_conv_{size}" for size in _LAYERS
    }

    def __init__(
        self,
        table: tuple[MobileNetV4Layers, Shortcuts],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool)
        layers, shortcuts = table
        widths = [layers.stem_channels]
        stages = []
        for convs in layers.convs:
            stages.append(_convolutions(widths[-1], convs))
            widths.append(convs[-1].out_channels)
        stages += _bottlenecks(widths[-1], layers.bottlenecks, shortcuts)
        widths += [rows[-1].out_channels for rows in layers.bottlenecks]
        names = ("stem", *(f"stages.{stage}" for stage in range(len(stages))))
        super().__init__(
            stem=ConvNorm(in_chans, layers.stem_channels, 3, stride=2, activation=True),
            stages=stages,
            final_conv=ConvNorm(widths[-1], _FINAL_CHANNELS, activation=True),
            head=ExpandedHead(
                _FINAL_CHANNELS,
                _HEAD_CHANNELS,
                num_classes,
                pool_type=global_pool,
                drop_rate=drop_rate,
                norm=True,
            ),
            feature_channels=dict(zip(names, widths, strict=True)),
            num_features=_FINAL_CHANNELS,
            head_hidden_size=_HEAD_CHANNELS,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
        # A moved convolution has another place than in timm's network, and another function.
        self.layouts = () if shortcuts == "repghost" else (_TIMM,)


def _convolutions(in_channels: int, rows: Sequence[ConvRow]) -> nn.Sequential:
    widths = [in_channels, *(row.out_channels for row in rows)]
    return nn.Sequential(
        *(
            ConvNorm(width, row.out_channels, row.kernel_size, stride=row.stride, activation=row.activation)
            for width, row in zip(widths, rows, strict=False)
        )
    )


def _bottlenecks(
    in_channels: int, stages: Sequence[Sequence[BottleneckRow]], shortcuts: Shortcuts
) -> list[nn.Sequential]:
    # RepGhost's bottleneck ends with the depthwise convolution that starts the next one in MobileNetV4.
    moved = shortcuts == "repghost"
    starts = [row.start for rows in stages for row in rows]
    ends = iter([*starts[1:], 0] if moved else [0] * len(starts))
    built, channels = [], in_channels
    for rows in stages:
        modules: list[nn.Module] = []
        for row in rows:
            modules.append(
                InvertedBottleneck(
                    channels,
                    row.mid_channels,
                    row.out_channels,
                    start=0 if moved else row.start,
                    middle=row.middle,
                    end=next(ends),
                    stride=row.stride,
                    shortcut=shortcuts != "none",
                )
            )
            channels = row.out_channels
        built.append(nn.Sequential(*modules))
    if moved:
        built[0].insert(0, depthwise(in_channels, starts[0]))
    return built
