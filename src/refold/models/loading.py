"""Load a checkpoint into a network, whichever of the known layouts its names have."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from refold.algebra import batch_norm_affine
from refold.errors import CheckpointError, some
from refold.models.harmless import harmless_globals
from refold.models.layouts import CheckpointLayout, names_met, recognise
from refold.models.wrappers import Found, best, weights_in

# Of every norm that stands alone behind its convolution, here and in the official networks.
_EPSILON = 1e-5


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load_checkpoint` found: the layout, and the weights of either side without a partner.

    ``notes`` says what of the file was chosen, stripped from its names and left out, a fact each.
    """

    layout: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that was read: what messages call it, and the weights at each place of it."""

    described: str
    places: tuple[Found, ...]


def load_checkpoint(
    network: nn.Module,
    source: str | PathLike[str] | Mapping[str, Any] | nn.Module | OpenedCheckpoint,
    strict: bool = True,
) -> LoadedCheckpoint:
    """Fill a network in place with the weights of a checkpoint, cast to the network's dtype and device.

    ``source`` is a ``.pth``, ``.pt``, ``.ckpt`` or ``.safetensors`` file, a state dict or a network, bare or inside a
    training script's checkpoint (``state_dict``, ``model`` ..., their averages first), whose names may have prefixes
    such as ``module.`` or ``model.``. refold's own layout, the official repositories' and timm's are recognised by
    their names; no pickled code is executed.
    With ``strict=False`` every weight that fits is loaded and the others are left as they are.
    The official plain forms keep the batch norms that stand outside their branches; a plain network of this library,
    which has none, takes them into its convolutions.

    Raises ``CheckpointError``, with the network untouched, where the file cannot be read, belongs to another
    network, has another number of classes, or is in plain form and the network in training form (or
    reversed).

    Examples:
        >>> import torch, refold
        >>> trained = refold.create_model("resnet10t", num_classes=3)
        >>> torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, "net.pth")
        >>> net = refold.create_model("resnet10t", num_classes=3)
        >>> refold.load_checkpoint(net, "net.pth").notes
        ("took the weights in 'state_dict'", "stripped 'module.' from their names")
    """
    opened = source if isinstance(source, OpenedCheckpoint) else open_checkpoint(source)
    found, described = _best(opened, network), opened.described
    weights = found.weights
    own = {key: value.shape for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    layout = recognise(weights, _layouts(network), own)
    original = layout.rename_all(weights)
    renamed = {new: weights[key] for new, key in original.items()}
    # Other people's names tell neither the order of convolution and norm nor its epsilon.
    if _layouts(network):
        _take_in_norms(renamed, original, own)
    missing = [key for key in own if key not in renamed and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in renamed if key not in own]
    _check_form(network, missing, unexpected, described)
    unfit = [key for key, value in renamed.items() if key in own and value.shape != own[key]]
    if strict:
        _check_classes(network, renamed, described)
        _check_names(network, missing, [original[key] for key in unexpected], len(own), described)
        _check_shapes({key: (original[key], renamed[key].shape, own[key]) for key in unfit}, described)
    fitting = {key: value for key, value in renamed.items() if key in own and key not in unfit}
    if not any(value.ndim for value in fitting.values()):
        raise CheckpointError(
            f"{described} has no weight that fits {_name(network)}; give one of this network."
        )
    network.load_state_dict(fitting, strict=False)
    left = tuple(key for key in own if key in missing or key in unfit)
    strangers = tuple(original[key] for key in (*unexpected, *unfit))
    return LoadedCheckpoint(layout.name, left, strangers, found.notes)


def open_checkpoint(source: str | PathLike[str] | Mapping[str, Any] | nn.Module) -> OpenedCheckpoint:
    """Read a checkpoint once, for `checkpoint_classes` and `load_checkpoint`.

    Raises ``CheckpointError`` where it cannot be read or holds no weights.
    """
    if isinstance(source, Mapping | nn.Module):
        described, checkpoint = "The given checkpoint", source
    else:
        described, checkpoint = f"The checkpoint {source}", _read(Path(source))
    places = weights_in(checkpoint)
    if not places:
        raise CheckpointError(f"{described} holds no weights; give network.state_dict() or a file of it.")
    return OpenedCheckpoint(described, tuple(places))


def checkpoint_classes(opened: OpenedCheckpoint, network: nn.Module) -> int | None:
    """The number of classes that a checkpoint of this network's kind knows; None where its classifier is not found."""
    weight = _classifier_weight(network, rename_weights(_best(opened, network).weights, network))
    return None if weight is None else weight.shape[0]


def read_weights(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The weights in a ``.pth``, ``.pt`` or ``.safetensors`` file by name, taken out of a training script's wrapper.

    Raises ``CheckpointError`` where the file cannot be read or holds no weights.
    """
    return open_checkpoint(path).places[0].weights


def rename_weights(weights: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """The same weights under the network's own names, from whichever known layout they are in."""
    weights = _best(OpenedCheckpoint("", (Found(dict(weights)),)), network).weights
    layout = recognise(weights, _layouts(network), network.state_dict())
    return {new: weights[key] for new, key in layout.rename_all(weights).items()}


def _layouts(network: nn.Module) -> tuple[CheckpointLayout, ...]:
    return getattr(network, "layouts", ())


def _best(opened: OpenedCheckpoint, network: nn.Module) -> Found:
    own = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    return best(opened.places, lambda keys: names_met(keys, _layouts(network), own))


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"The checkpoint {path} {what}; give a .pth, .pt or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Any] = load_file(path)
            return tensors
        with torch.serialization.safe_globals(harmless_globals()):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the readers, in any way
        raise CheckpointError(_unreadable(path)) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"The checkpoint {path} holds a {type(loaded).__name__}, not a dictionary of weights; "
            "save network.state_dict()."
        )
    return loaded


def _unreadable(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(harmless_globals()):
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever is wrong with the file, it is not a readable archive
        objects = []
    if objects:
        return (
            f"The checkpoint {path} holds Python objects besides weights ({some(objects)}), which are not "
            "executed; save network.state_dict() alone and give that file."
        )
    return (
        f"The checkpoint {path} cannot be read: it is cut short, damaged or of another format; get it again."
    )


def _take_in_norms(
    renamed: dict[str, Tensor], original: dict[str, str], own: Mapping[str, torch.Size]
) -> None:
    """Fold each norm that the network no longer has, in place, into the convolution that it stood behind."""
    for key in own:
        place, _, leaf = key.rpartition(".conv.")
        norm, kernel = f"{place}.bn", f"{place}.conv.weight"
        parts = [f"{norm}.{part}" for part in ("running_mean", "running_var", "weight", "bias")]
        if leaf != "bias" or key in renamed or kernel not in renamed:
            continue
        if not set(parts) <= renamed.keys() - own.keys():
            continue
        original[key] = original[parts[-1]]
        renamed.pop(f"{norm}.num_batches_tracked", None)
        mean, variance, factor, bias = (renamed.pop(part).double() for part in parts)
        scale, shift = batch_norm_affine(mean, variance, factor, bias, _EPSILON)
        weight = renamed[kernel]
        if weight.shape[0] == scale.shape[0]:
            renamed[kernel] = weight.double() * scale.reshape(-1, *(1,) * (weight.dim() - 1))
        renamed[key] = shift


def _check_form(network: nn.Module, missing: list[str], unexpected: list[str], described: str) -> None:
    """A bias where training form has a batch norm, or the other way round, shows the wrong form."""
    if any(_is_folded_bias(network, key) for key in unexpected):
        raise CheckpointError(
            f"{described} is in plain (folded) form, but {_name(network)} is in training form; give a "
            "checkpoint in training form, or load this one into the folded network."
        )
    norms = [key for key in unexpected if key.endswith(".running_var")]
    only_norms_more = norms and not missing and hasattr(network, "fold_report")
    if only_norms_more or any(_is_bias_for_norm(network, key, norms) for key in missing):
        raise CheckpointError(
            f"{described} is in training form, but {_name(network)} is in plain (folded) form; load it into "
            "the network in training form and fold that."
        )


def _is_folded_bias(network: nn.Module, key: str) -> bool:
    module = _owner(network, key)
    if module is None or not key.endswith(".bias"):
        return False
    if isinstance(module, nn.Conv2d):
        return module.bias is None
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def _is_bias_for_norm(network: nn.Module, key: str, norms: list[str]) -> bool:
    """Whether ``key`` is the bias of a convolution at whose place the checkpoint has a batch norm."""
    place = key.rpartition(".")[0].rpartition(".")[0]
    return (
        key.endswith(".bias")
        and isinstance(_owner(network, key), nn.Conv2d)
        and any(norm.startswith(place) for norm in norms)
    )


def _owner(network: nn.Module, key: str) -> nn.Module | None:
    try:
        return network.get_submodule(key.rpartition(".")[0])
    except AttributeError:
        return None


def _classifier_weight(network: nn.Module, renamed: Mapping[str, Tensor]) -> Tensor | None:
    get_classifier = getattr(network, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    names = [name for name, module in network.named_modules() if module is classifier]
    return renamed.get(f"{names[0]}.weight") if names else None


def _check_classes(network: nn.Module, renamed: Mapping[str, Tensor], described: str) -> None:
    weight = _classifier_weight(network, renamed)
    if weight is None:
        return
    # That of a linear layer or, in some of timm's networks, of a convolution.
    own = getattr(network.get_classifier(), "weight", None)  # type: ignore[operator]  # it was called above
    found, expected = weight.shape[0], 0 if own is None else own.shape[0]
    if found != expected:
        fact = f"{described} has {found} classes, but {_name(network)} has {expected}"
        raise CheckpointError(
            f"{fact}; create it with num_classes={found}, or load all but the classifier with strict=False.",
            f"{fact}; give the number of the checkpoint, {found}, or none.",
        )


def _check_names(
    network: nn.Module, missing: list[str], unexpected: list[str], own: int, described: str
) -> None:
    if missing or unexpected:
        lacks = f"it lacks {len(missing)} of {own} weights ({some(missing)})" if missing else ""
        extra = f"it has {len(unexpected)} unknown ones ({some(unexpected)})" if unexpected else ""
        fact = f"{described} is not one of {_name(network)}: {' and '.join(filter(None, (lacks, extra)))}"
        raise CheckpointError(
            f"{fact}; create the network that it was saved from, or load what fits with strict=False.",
            f"{fact}; name the network that it was saved from.",
        )


def _check_shapes(unfit: Mapping[str, tuple[str, torch.Size, torch.Size]], described: str) -> None:
    if unfit:
        shapes = [f"{key} {tuple(found)} for {tuple(expected)}" for key, found, expected in unfit.values()]
        fact = f"{described} has {len(unfit)} weights of another shape ({some(shapes)})"
        raise CheckpointError(
            f"{fact}; create the network with the name and arguments that it was saved with, or load what fits with "
            "strict=False.",
            f"{fact}; name the network, with the arguments, that it was saved from.",
        )


def _name(network: nn.Module) -> str:
    architecture = getattr(network, "architecture", None)
    return architecture["name"] if isinstance(architecture, dict) else type(network).__name__
