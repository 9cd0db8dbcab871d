"""How a model is named in every command: by name, as a checkpoint, as a run's folder, or as code of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import timm
import yaml
from torch import nn

from refold.cards import Form
from refold.checkpoints import HUB, fetched, load_with_notes, network_for, original, read_card
from refold.errors import CheckpointError, InputError, RefoldError, UnknownModel, first_line
from refold.files import PathLike
from refold.models import create_model, list_models, load_checkpoint
from refold.models.composed import HEADS
from refold.models.loading import open_checkpoint
from refold.models.torchvision_networks import PREFIX as TORCHVISION
from refold.onnx_files import is_onnx_file
from refold.own_code import OwnNetwork, is_own_code
from refold.runs import INT8, PLAIN, STATE, TRAINING

CHECKPOINT_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar"}
_MOST_CLASSES = 1_000_000
# Names, not paths, whatever follows the slash.
_KNOWN_BEFORE_SLASH = (*(f"{head}/" for head in HEADS), TORCHVISION)

Say = Callable[[str], None]


def open_network(
    target: str,
    checkpoint: PathLike | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    form: Form = "training",
    required: Form | None = None,
    pretrained: bool | None = False,
    say: Say = lambda _: None,
) -> nn.Module:
    """The network that a text names, in eval mode on the CPU, with the weights of ``checkpoint`` if it is a name.

    ``form`` is what is taken from the folder of a run, ``required`` the form that is to be had, if only one will do.
    ``arguments`` build a named network, or one of the user's own; a foreign checkpoint tells how many classes there are
    where they do not. ``pretrained`` takes the published weights of a name; None does so where no weights are given.
    What was chosen and stripped goes to ``say``, a line each.
    Raises `InputError`, `CheckpointError` or `UnknownModel`, whose messages name options of the command line.
    """
    arguments = {key: value for key, value in (arguments or {}).items() if value is not None}
    _check_classes(arguments)
    if is_onnx_file(target):
        if pretrained or checkpoint is not None or arguments:
            raise InputError(
                f"The ONNX file '{target}' is a whole network; leave --pretrained, --checkpoint, --num-classes and "
                "--model-args out."
            )
        return _read_onnx(target, say)
    with speaking_of_options():
        file = weights_file(target, form)
        if file is not None:
            if pretrained:
                raise InputError(
                    f"The weights come from one place; leave --pretrained or the checkpoint '{target}' out."
                )
            if checkpoint is not None:
                raise InputError(
                    f"'{target}' is a checkpoint already; leave --checkpoint out or name a model."
                )
            return _loaded(file, None, arguments, required, say)
        if pretrained and checkpoint is not None:
            raise InputError("The weights come from one place; leave --pretrained or --checkpoint out.")
        own = OwnNetwork(target) if is_own_code(target) else None
        if checkpoint is not None:
            return _filled(own or target, _weights(checkpoint, form), arguments, required, say)
        if own is None:
            with building(target, arguments):
                return create_model(target, pretrained is not False, **arguments).eval()
        if pretrained is not False:
            raise InputError(f"Nobody publishes weights of '{target}'; give its own as --checkpoint.")
        return own(**arguments).eval()


def _read_onnx(target: str, say: Say) -> nn.Module:
    from refold.onnx_files.reading import read_network

    network = read_network(target)
    _say(target, network.program.notes, say)
    return network


def network_file(target: str, form: Form = "training") -> Path | None:
    """The checkpoint or the ONNX file that a text names, as `weights_file`; None where it names a model."""
    return Path(target) if is_onnx_file(target) else weights_file(target, form)


def network_of(target: str, file: Path) -> nn.Module:
    """The network of a checkpoint that was trained as ``target``; only code of the user's own has to be named again."""
    own = OwnNetwork(target) if is_own_code(target) else None
    with speaking_of_options():
        return load_with_notes(file, own, form="training")[0]


def original_network(target: str, model: nn.Module) -> nn.Module:
    """`refold.checkpoints.original` for a model that ``target`` named, which may be code of the user's own."""
    built: Any = getattr(model, "built_from", None)
    with speaking_of_options():
        if built is None or not is_own_code(target):
            return original(model)
        return original(model, partial(OwnNetwork(target), **built["arguments"]))


def weights_file(target: str, form: Form = "training") -> Path | None:
    """The checkpoint that a text names, in the folder of a run that in a form; None where it names a model.

    Raises `InputError` where a folder holds no such file.
    """
    path = Path(target)
    if target.startswith(HUB):
        return _published(target)
    if is_own_code(target):
        return None
    if path.is_dir() and not _is_model(target):
        file = path / (TRAINING if form == "training" else PLAIN)
        if not file.is_file() and (path / INT8).is_file():
            raise InputError(f"The run in '{target}' gave an int8 file; name '{path / INT8}'.")
        if not file.is_file():
            raise InputError(
                f"The folder '{target}' holds no {file.name}, so it is none of a finished run; give a file."
            )
        return file
    if path.is_file() and path.suffix not in CHECKPOINT_SUFFIXES and not _is_model(target):
        raise InputError(
            f"'{target}' is no checkpoint ({', '.join(sorted(CHECKPOINT_SUFFIXES))}); give one, such as that which the "
            "file was made of."
        )
    return path if path.suffix in CHECKPOINT_SUFFIXES else None


def _published(name: str) -> Path | None:
    """The file of refold's that a name of the hub stands for; None for one of timm's, or that cannot be had."""
    try:
        file = fetched(name)
    except CheckpointError:
        return None
    return None if read_card(file) is None else file


def _weights(checkpoint: PathLike, form: Form) -> Path:
    """The file that an option names, whatever it is called, or the one in the folder of a run."""
    path = Path(checkpoint)
    return (weights_file(str(path), form) or path) if path.is_dir() else path


def _is_model(name: str) -> bool:
    return bool(list_models(name)) or timm.is_model(name.partition(".")[0])


def model_arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """The arguments in texts such as ``width=0.5``, whose values are YAML; raises `InputError` for any other text."""
    arguments = {}
    for text in given or ():
        key, sign, value = text.partition("=")
        try:
            if not sign or not key.strip().isidentifier():
                raise ValueError("there is no name before a '='")
            arguments[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(
                f"--model-args '{text}' is not understood ({first_line(error)}); give KEY=VALUE, such as width=0.5."
            ) from error
    return arguments


def distinct_names(
    targets: Sequence[str], checkpoints: Sequence[PathLike | None] = (), form: Form = "training"
) -> list[str]:
    """What to call models that are shown together: the shortest ends of their paths that tell them apart.

    A file is called by its stem, the folder of a run by its own name, and all others as they are named; ``checkpoints``
    are the weights of each, if any. Names are equal only where the models are.
    """
    pairs = list(zip_longest(targets, checkpoints))
    models = [
        (
            str((network_file(target, form) or Path(target)).resolve()),
            checkpoint and str(_weights(checkpoint, form).resolve()),
        )
        for target, checkpoint in pairs
    ]
    names = [_names(target, checkpoint, form) for target, checkpoint in pairs]
    first = {model: names[place] for place, model in reversed(list(enumerate(models)))}
    lengths = dict.fromkeys(first, 0)
    while True:
        shown = {model: first[model][length] for model, length in lengths.items()}
        alike = [
            model
            for model, name in shown.items()
            if list(shown.values()).count(name) > 1 and lengths[model] + 1 < len(first[model])
        ]
        if not alike:
            return [shown[model] for model in models]
        for model in alike:
            lengths[model] += 1


def _names(target: str, checkpoint: PathLike | None, form: Form) -> list[str]:
    """What a model may be called, the shortest first."""
    if network_file(target, form) is not None or is_own_code(target):
        own = _ends(Path(target), keep_suffix=is_own_code(target))
    else:
        own = [target]
    weights = [] if checkpoint is None else _ends(Path(checkpoint))
    return [*own, *(f"{own[0]} {end}" for end in weights)]


def _ends(path: Path, keep_suffix: bool = False) -> list[str]:
    path = path.resolve()
    ends = [path.name] if keep_suffix or path.is_dir() else [path.stem, path.name]
    parents = ["", *("/".join(path.parts[-length:-1]) + "/" for length in range(2, len(path.parts) + 1))]
    return [parent + end for parent in parents for end in ends]


@contextmanager
def speaking_of_options() -> Iterator[None]:
    """Let what is said of a checkpoint name options of the command line instead of Python's arguments."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(error.on_command_line) from error


@contextmanager
def building(target: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn whatever building a network raises into an `InputError` that names its arguments."""
    try:
        yield
    except UnknownModel as error:
        if ("/" in target or "\\" in target) and not target.startswith(_KNOWN_BEFORE_SLASH):
            raise InputError(f"There is no file, run folder or model '{target}'; check the path.") from error
        raise
    except RefoldError:
        raise
    except Exception as error:  # timm checks its arguments nowhere
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise InputError(
            f"{target} cannot be built with {given} ({first_line(error)}); give it arguments that it takes."
        ) from error


def _filled(
    network: str | OwnNetwork, path: Path, arguments: dict[str, Any], required: Form | None, say: Say
) -> nn.Module:
    """A named network, or one of the user's own, with the weights of a file."""
    card = read_card(path)
    # A file of another network may still fit by its names: timm's of a network that refold has, too.
    is_its_own = isinstance(network, OwnNetwork) or (
        card is not None and card.architecture in (network, None)
    )
    has_card_beside = path.name == STATE and path.with_name(TRAINING).is_file()
    if has_card_beside or (card is not None and (is_its_own or card.form == "plain")):
        return _loaded(path, network, arguments, required, say)
    opened = open_checkpoint(path)
    if isinstance(network, OwnNetwork):
        filled = network_for(opened, network, arguments)
    else:
        with building(network, arguments):
            filled = network_for(opened, partial(create_model, network), arguments)
    _say(path, load_checkpoint(filled, opened).notes, say)
    return filled.eval()


def _loaded(
    path: Path, network: str | OwnNetwork | None, arguments: dict[str, Any], required: Form | None, say: Say
) -> nn.Module:
    loaded, notes = load_with_notes(path, network, form=required, **arguments)
    _say(path, notes, say)
    return loaded


def _say(path: PathLike, notes: Sequence[str], say: Say) -> None:
    if notes:
        say(f"{path}: {', '.join(notes)}.")


def _check_classes(arguments: Mapping[str, Any]) -> None:
    classes = arguments.get("num_classes", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or not 0 <= classes <= _MOST_CLASSES:
        raise InputError(
            f"The number of classes is {classes!r:.50}; give one from 1 to {_MOST_CLASSES:,}, or 0 for features alone."
        )
