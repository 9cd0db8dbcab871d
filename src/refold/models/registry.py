"""Networks by name: refold's own families first, then everything that timm has.

In timm's registry each network of refold is ``refold_`` and its name: ``timm.create_model("refold_repvgg_a0")``.
"""

import difflib
import fnmatch
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    register_model,
)
from torch import nn

from refold.errors import CheckpointError, RefoldError, UnknownModel
from refold.models import (
    cghost_cifar,
    cghost_nets,
    gghost_regnet,
    gghost_resnet,
    gghostnet,
    ghost_resnet,
    ghostnet,
    ghostnetv2,
    ghostnetv3,
    mobilenetv4,
    mobileone,
    repghostnet,
    repnext,
    repvgg,
)
from refold.models.cghost_cifar import GhostCifarResNet, GhostVGG
from refold.models.cghost_nets import InvertedNet
from refold.models.classifier import ImageClassifier
from refold.models.composed import HEADS, build_composed, head_named, is_composed
from refold.models.gghost_regnet import GGhostRegNet
from refold.models.gghost_resnet import GGhostCifarResNet, GGhostResNet
from refold.models.gghostnet import GGhostNet
from refold.models.ghost_resnet import GhostResNet
from refold.models.ghostnet import GhostNet
from refold.models.ghostnetv2 import GhostNetV2
from refold.models.ghostnetv3 import GhostNetV3
from refold.models.loading import rename_weights
from refold.models.mobilenetv4 import MobileNetV4
from refold.models.mobileone import MobileOne
from refold.models.output_stride import set_output_stride
from refold.models.pretrained import RELEASES, loading_failure, published_weights
from refold.models.repghostnet import RepGhostNet, RepGhostNetDFC
from refold.models.repnext import RepNeXt
from refold.models.repvgg import RepVGG
from refold.models.torchvision_networks import (
    PREFIX as TORCHVISION,
)
from refold.models.torchvision_networks import (
    build_torchvision,
    check_torchvision_name,
    list_torchvision,
)

_FAMILIES: tuple[tuple[type[ImageClassifier], Mapping[str, Any]], ...] = (
    (RepVGG, repvgg.NETWORKS),
    (GhostNet, ghostnet.NETWORKS),
    (GhostNetV2, ghostnetv2.NETWORKS),
    (GhostNetV3, ghostnetv3.NETWORKS),
    (MobileNetV4, mobilenetv4.NETWORKS),
    (MobileOne, mobileone.NETWORKS),
    (RepGhostNet, repghostnet.NETWORKS),
    (RepGhostNetDFC, repghostnet.ATTENTION_NETWORKS),
    (RepNeXt, repnext.NETWORKS),
    (GhostResNet, ghost_resnet.NETWORKS),
    (GhostVGG, cghost_cifar.VGG_NETWORKS),
    (GhostCifarResNet, cghost_cifar.RESNET_NETWORKS),
    (InvertedNet, cghost_nets.NETWORKS),
    (GGhostRegNet, gghost_regnet.NETWORKS),
    (GGhostResNet, gghost_resnet.NETWORKS),
    (GGhostCifarResNet, gghost_resnet.CIFAR_NETWORKS),
    (GGhostNet, gghostnet.NETWORKS),
)
_NETWORKS = {name: (network, row) for network, rows in _FAMILIES for name, row in rows.items()}

# timm has networks of its own under some of these names, which stay as they are.
TIMM_PREFIX = "refold_"

# How a pretrained configuration brings weights along, or says itself how to get them.
_GIVEN_WEIGHTS = ("state_dict", "file", "source")

# Where a network runs and where its weights come from is not part of what it is.
_SOURCES = ("pretrained_cfg", "pretrained_cfg_overlay")
_NOT_ARCHITECTURE = {"device", "dtype", "cache_dir", "checkpoint_path", *_SOURCES}


def _default_cfg(name: str, network: type[ImageClassifier], row: Any) -> PretrainedCfg:
    """timm's preprocessing and weights where it has this network, else ImageNet's usual or the row's own."""
    theirs = network.timm_names.get(name, name)
    cfg = get_pretrained_cfg(theirs) if timm.is_model(theirs) else PretrainedCfg(pool_size=(7, 7))
    own = {**network.preprocessing(row), "url": RELEASES.get(name)}
    return replace(cfg, architecture=name, first_conv=network.first_convs, classifier="head.fc", **own)


default_cfgs: dict[str, PretrainedCfg] = {
    name: _default_cfg(name, network, row) for name, (network, row) in _NETWORKS.items()
}


def list_models(pattern: str | Iterable[str] = "", include_timm: bool = False) -> list[str]:
    """The sorted names of refold's networks, and with ``include_timm`` of timm's too.

    ``pattern`` is a shell-style wildcard such as ``repghost*``, or several; empty for all. One with a slash asks for
    detectors and segmenters by head and backbone, such as ``dense/repghost*``, and for ``torchvision/*``.

    Examples:
        >>> import refold
        >>> refold.list_models("repvgg_a*")
        ['repvgg_a0', 'repvgg_a1', 'repvgg_a2']
    """
    names = set(_NETWORKS)
    if include_timm:
        names.update(name for name in timm.list_models() if not name.startswith(TIMM_PREFIX))
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if any("/" in each for each in patterns):
        names |= {f"{head}/{name}" for head in HEADS for name in names} | {*list_torchvision()}
    return sorted(name for name in names if any(fnmatch.fnmatch(name, each or "*") for each in patterns))


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a network by name, in training form: refold's where it has one, else timm's, or ``torchvision/NAME``.

    ``HEAD/BACKBONE`` is a detector (dense, retinanet, yolov3) or a segmenter (lraspp, deeplab, fpn) on any of them;
    ``pretrained`` is its backbone's then, and the keywords are the head's (`refold.models.composed.HEADS`) or the
    backbone's. A name with a tag, such as ``repvgg_a0.rvgg_in1k``, is always timm's. The keywords are timm's:
    ``num_classes``, ``in_chans``, ``drop_rate``, ``global_pool``, ``features_only``, ``out_indices``,
    ``output_stride``, ``pretrained_cfg_overlay`` ...; one that is None counts as not given. ``pretrained`` loads the
    published weights. The network remembers how it was built in ``architecture``, a dictionary of
    ``name`` and ``arguments`` that JSON can hold; with an argument that JSON cannot hold, such as a
    class, it has none.

    Raises ``UnknownModel`` with the nearest names where nobody has the name, ``CheckpointError`` where
    pretrained weights are not published, cannot be had or do not fit, and ``InputError`` where an argument cannot be
    used.

    Examples:
        >>> import torch, refold
        >>> net = refold.create_model("ghostnetv3_050", num_classes=10)
        >>> net.eval()(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    architecture = _architecture(name, kwargs)
    if is_composed(name):
        return _remembering(build_composed(name, create_model, pretrained=pretrained, **kwargs), architecture)
    is_own = name in _NETWORKS
    is_torchvision = name.startswith(TORCHVISION)
    if is_torchvision:
        check_torchvision_name(name)
    elif not is_own:
        _check_timm_name(name)
    if pretrained and not is_torchvision:
        _check_published(name, kwargs)
    build = partial(
        _build_own if is_own else build_torchvision if is_torchvision else timm.create_model, name
    )
    try:
        network: nn.Module = build(pretrained=pretrained, **kwargs)
    except RefoldError:
        raise
    except Exception as error:
        if not pretrained or isinstance(error, TypeError):
            raise  # not the weights' fault
        raise loading_failure(name, error) from error
    return _remembering(network, architecture)


def _remembering(network: nn.Module, architecture: dict[str, Any] | None) -> nn.Module:
    if architecture is not None:
        network.architecture = architecture  # type: ignore[assignment]  # a plain attribute, as timm sets them
    return network


def _register_with_timm(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_model(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = f"{TIMM_PREFIX}{name}"
    register_model(entrypoint)


for _name in _NETWORKS:
    _register_with_timm(_name)


def _build_own(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    network, row = _NETWORKS[name]
    cfg = kwargs.pop("pretrained_cfg", None) or default_cfgs[name].to_dict()
    filter_fn: Callable[[Mapping[str, Any], nn.Module], dict[str, Any]] = rename_weights
    if pretrained and isinstance(cfg, dict):
        cfg = {**cfg, **kwargs.pop("pretrained_cfg_overlay", {})}
        is_published = cfg.get("hf_hub_id") or cfg.get("url")
        if is_published and not any(cfg.get(given) for given in _GIVEN_WEIGHTS):
            source, cache_dir = dict(cfg), kwargs.get("cache_dir")
            # timm takes this for weights and has the filter, once the network stands, put the real ones in place.
            cfg["state_dict"] = {"source": source}

            def fetched(_: Mapping[str, Any], built: nn.Module) -> dict[str, Any]:
                return rename_weights(published_weights(name, source, cache_dir), built)

            filter_fn = fetched

    output_stride = kwargs.pop("output_stride", None)

    def constructed(**arguments: Any) -> nn.Module:
        made = cast(Callable[..., nn.Module], network)(row, **arguments)
        if output_stride is not None:
            set_output_stride(made, output_stride)
        return made

    built: nn.Module = build_model_with_cfg(
        constructed,
        name,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": tuple(range(len(network.feature_strides)))},
        **kwargs,
    )
    for kept in (built.pretrained_cfg, built.default_cfg):
        cast(dict[str, Any], kept).pop("state_dict", None)
    return built


def declared_arguments(name: str) -> frozenset[str]:
    """The keywords that the constructor of a named network declares.

    Raises ``UnknownModel`` where nobody has the name.
    """
    if is_composed(name):
        return head_named(name).arguments | declared_arguments(name.partition("/")[2])
    if name in _NETWORKS:
        network: type = _NETWORKS[name][0]
    else:
        is_torchvision = name.startswith(TORCHVISION)
        (check_torchvision_name if is_torchvision else _check_timm_name)(name)
        try:
            with torch.device("meta"):
                network = type((build_torchvision if is_torchvision else timm.create_model)(name))
        except Exception:  # some of timm's need real tensors to begin with
            return frozenset()
    constructors = [vars(base)["__init__"] for base in network.__mro__ if "__init__" in vars(base)]
    taken = {key for each in constructors for key in inspect.signature(each).parameters}
    return frozenset(taken - {"self", "args", "kwargs"})


def _architecture(name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    kept = {key: value for key, value in arguments.items() if key not in _NOT_ARCHITECTURE}
    # timm takes these from there where they are not given.
    for source in (arguments.get(key) for key in _SOURCES):
        for key in ("num_classes", "in_chans", "global_pool"):
            if isinstance(source, Mapping) and key in source:
                kept.setdefault(key, source[key])
    try:
        return {"name": name, "arguments": json.loads(json.dumps(kept))}
    except TypeError:
        return None


def _check_timm_name(name: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        nearest = difflib.get_close_matches(name.lower(), list_models(include_timm=True), n=5, cutoff=0.5)
        hint = f"the nearest names are {', '.join(nearest)}" if nearest else "`list_models` names them all"
        raise UnknownModel(f"There is no model named {name!r}; {hint}.")
    tags = get_arch_pretrained_cfgs(base)
    if tag and name not in tags:
        raise UnknownModel(f"{base} has no weights tagged {tag!r}; there are {', '.join(tags) or 'none'}.")


def _check_published(name: str, kwargs: Mapping[str, Any]) -> None:
    if name not in default_cfgs and not timm.is_model(name):
        return  # a hub or folder name, which is its own source of weights
    cfg = default_cfgs.get(name) or get_pretrained_cfg(name)
    given = any(kwargs.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"))
    if not given and not (cfg and cfg.has_weights):
        raise CheckpointError(
            f"No pretrained weights are published for {name}; create it without pretrained=True, and use "
            "load_checkpoint for weights of your own."
        )
