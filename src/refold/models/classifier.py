"""What every image classifier of this library shares: stem, stages, head, and timm's interface to them."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from timm.layers import ClassifierHead, SelectAdaptivePool2d
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from refold.errors import InputError
from refold.models.layouts import CheckpointLayout

POOLINGS = ("avg", "max", "avgmax", "")

# What networks for CIFAR-10 state in `ImageClassifier.preprocessing`.
CIFAR10: Mapping[str, Any] = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "pool_size": None,
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}


class ImageClassifier(nn.Module):
    """A stem, stages of blocks and a classifier head, with the interface of timm's networks.

    Images ``(batch, in_chans, height, width)`` of any height and width give logits ``(batch,
    num_classes)``, or pooled features ``(batch, head_hidden_size)`` where ``num_classes`` is 0.

    ``stages`` holds one ``nn.Sequential`` of blocks a resolution; ``feature_channels`` names the modules
    whose outputs are the features at each of ``feature_strides``, with their channels. ``num_features`` is the
    number of channels that the head reads, those of the last feature unless given; without ``head`` it is
    ``pooled_head``. ``timm_names`` gives the networks that timm has under another name.

    Raises ``InputError`` where ``num_classes``, ``in_chans``, ``drop_rate`` or ``global_pool`` cannot be
    used.
    """

    layouts: tuple[CheckpointLayout, ...] = ()
    first_convs: ClassVar[tuple[str, ...]] = ()
    feature_strides: ClassVar[tuple[int, ...]] = (2, 4, 8, 16, 32)
    timm_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def preprocessing(cls, row: Any) -> Mapping[str, Any]:
        """The fields of timm's ``pretrained_cfg`` in which the network of this row differs from ImageNet's usual."""
        return {}

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: list[nn.Sequential],
        feature_channels: Mapping[str, int],
        final_conv: nn.Module | None = None,
        num_features: int | None = None,
        head: nn.Module | None = None,
        head_hidden_size: int | None = None,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        global_pool: str,
    ) -> None:
        super().__init__()
        if num_features is None:
            *_, num_features = feature_channels.values()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.final_conv = nn.Identity() if final_conv is None else final_conv
        if head is None:
            head = pooled_head(num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head = head
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": stride, "module": module}
            for (module, channels), stride in zip(feature_channels.items(), self.feature_strides, strict=True)
        ]
        self.num_features = num_features
        self.head_hidden_size = num_features if head_hidden_size is None else head_hidden_size
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last feature map ``(batch, num_features, height / 32, width / 32)``, rounded up."""
        x = self.stem(x)
        x = checkpoint_seq(self.stages, x, flatten=True) if self.grad_checkpointing else self.stages(x)
        out: Tensor = self.final_conv(x)
        return out

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Images to what ``forward_features`` gives, and the maps of ``feature_info`` on the way there.

        ``indices`` chooses the maps: all, the last so many, or those of a sequence, counted from the end where
        negative. With ``stop_early`` nothing behind the last of them runs, and the first result is that map.
        ``intermediates_only`` leaves the first result out. ``norm`` does nothing, these networks have no last norm.
        Raises ``InputError`` for an index that does not exist and another ``output_fmt`` than ``NCHW``.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt is {output_fmt!r}; these maps are 'NCHW' alone.")
        taken, last = self._taken(indices)
        names = [feature["module"] for feature in self.feature_info]
        wanted, end = {names[index] for index in taken}, names[last]
        found = []
        parts = [("stem", self.stem), *((f"stages.{i}", stage) for i, stage in enumerate(self.stages))]
        for name, part in parts:
            checkpointed = self.grad_checkpointing and part is not self.stem
            x = checkpoint_seq(part, x) if checkpointed else part(x)
            if name in wanted:
                found.append(x)
            if stop_early and name == end:
                break
        if intermediates_only:
            return found
        return (self.final_conv(x) if name == parts[-1][0] else x), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of ``forward_intermediates`` do not need, and give their indices.

        The stages behind the last map go, with the final convolution; the head keeps nothing but a pooling that does
        nothing. ``prune_norm`` removes the final convolution where all else stays.
        Raises ``InputError`` for an index that does not exist.
        """
        kept, last = self._taken(indices)
        end = self.feature_info[last]["module"]
        stages = 0 if end == "stem" else int(end.rpartition(".")[2]) + 1
        truncated = stages < len(self.stages)
        if truncated or prune_norm or prune_head:
            self.stages = self.stages[:stages]
            self.final_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            head = pooled_head(self.num_features, 0, pool_type="", drop_rate=self.drop_rate)
            self.head = head.train(self.training)
            self.num_classes, self.global_pool = 0, ""
            # It can no longer be rebuilt from what `create_model` recorded.
            self.__dict__.pop("architecture", None)
        return kept

    def _taken(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """The features that timm's `indices` mean, and the last of them."""
        try:
            taken: tuple[list[int], int] = feature_take_indices(len(self.feature_info), indices)
        except AssertionError as error:
            raise InputError(f"indices is {indices}, but {error}; `feature_info` lists the maps.") from None
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last feature map to logits, or to what the classifier reads: ``(batch, head_hidden_size)``."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity where ``num_classes`` is 0."""
        classifier: nn.Module = self.head.get_submodule("fc")
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, randomly drawn classifier for ``num_classes`` classes in place, 0 for none.

        ``global_pool`` changes the pooling too: ``avg``, ``max``, ``avgmax``, or an empty string for
        none, which leaves a map and therefore needs ``num_classes=0``.
        Raises ``InputError`` where either cannot be used.
        """
        pooling = self.global_pool if global_pool is None else global_pool
        check_arguments(num_classes, self.in_chans, self.drop_rate, pooling)
        kind = next(self.parameters())
        self.head.reset(num_classes, global_pool)  # type: ignore[operator]  # both heads have timm's `reset`
        # timm's own keeps these in newer versions only.
        self.head.to(device=kind.device, dtype=kind.dtype).train(self.training)
        self.num_classes = num_classes
        self.global_pool = pooling
        # What `create_model` recorded must go on describing this network: it is rebuilt from that record.
        architecture = getattr(self, "architecture", None)
        if isinstance(architecture, dict):
            architecture["arguments"]["num_classes"] = num_classes
            if global_pool is not None:
                architecture["arguments"]["global_pool"] = global_pool

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: compute the inside of a block again on the way back."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth for layer-wise rates: by block or, ``coarse``, by stage."""
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(block, None), (r"^final_conv|^head\.conv", (99999,))]}


class ExpandedHead(nn.Module):
    """Global pooling, a 1x1 convolution with bias to ``hidden_size``, ReLU, dropout and a linear classifier.

    With ``norm`` the convolution has a batch norm in place of the bias, as in MobileNetV4.
    Maps ``(batch, in_features, height, width)`` to ``(batch, num_classes)``.

    Source: GhostNets on Heterogeneous Devices, table 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        num_classes: int,
        *,
        pool_type: str,
        drop_rate: float,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type)
        self.conv = nn.Conv2d(in_features, hidden_size, kernel_size=1, bias=not norm)
        self.bn = nn.BatchNorm2d(hidden_size) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.flatten = nn.Flatten(1) if pool_type else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.fc = _classifier(hidden_size, num_classes)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier, and the pooling if ``pool_type`` is given; the convolution stays."""
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type)
            self.flatten = nn.Flatten(1) if pool_type else nn.Identity()
        self.fc = _classifier(self.conv.out_channels, num_classes).to(self.conv.weight)
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.flatten(self.act(self.bn(self.conv(self.global_pool(x))))))
        return x if pre_logits else self.fc(x)


def pooled_head(in_features: int, num_classes: int, *, pool_type: str, drop_rate: float) -> nn.Module:
    """Global pooling, dropout and a linear classifier: ``(batch, in_features, height, width)`` to logits."""
    head: nn.Module = ClassifierHead(in_features, num_classes, pool_type=pool_type, drop_rate=drop_rate)
    return head


def check_arguments(
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    global_pool: str,
    drop_path_rate: float = 0.0,
    *,
    width: float = 1.0,
) -> None:
    """Raise ``InputError`` for what no classifier can be built with."""
    if num_classes < 0:
        raise InputError(
            f"num_classes is {num_classes}; give the number of classes, or 0 for pooled features."
        )
    if in_chans < 1:
        raise InputError(f"in_chans is {in_chans}; give the number of image channels, 1 or more.")
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0 <= rate < 1:
            raise InputError(f"{name} is {rate}; give a probability from 0 up to, but not including, 1.")
    if width <= 0:
        raise InputError(f"width is {width}; give the factor of all channels, above 0.")
    if global_pool not in POOLINGS:
        raise InputError(f"global_pool is {global_pool!r}; choose one of {', '.join(map(repr, POOLINGS))}.")
    if not global_pool and num_classes:
        raise InputError(
            f"Without pooling there is no classifier, but num_classes is {num_classes}; "
            "give num_classes=0 for feature maps, or a global_pool."
        )


def _classifier(in_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(in_features, num_classes) if num_classes else nn.Identity()
