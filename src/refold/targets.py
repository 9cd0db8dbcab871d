"""How a model is named in every command: by name, as a checkpoint, as a run's folder, or as code of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from refold.cards import Form
from refold.checkpoints import load_with_notes, network_for, read_card
from refold.errors import CheckpointError, InputError, RefoldError, first_line
from refold.files import PathLike
from refold.models import create_model, load_checkpoint
from refold.models.loading import open_checkpoint
from refold.own_code import OwnNetwork, is_own_code
from refold.runs import PLAIN, STATE, TRAINING

CHECKPOINT_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar"}
_MOST_CLASSES = 1_000_000

Say = Callable[[str], None]


def open_network(
    target: str,
    checkpoint: PathLike | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    form: Form = "training",
    pretrained: bool = False,
    say: Say = lambda _: None,
) -> nn.Module:
    """The network that a text names, in eval mode on the CPU, with the weights of ``checkpoint`` if it is a name.

    ``form`` is what is taken from the folder of a run. ``arguments`` build a named network, or one of the user's own;
    a foreign checkpoint tells how many classes there are where they do not. What was chosen and stripped goes to
    ``say``, a line each.
    Raises `InputError`, `CheckpointError` or `UnknownModel`, whose messages name options of the command line.
    """
    arguments = {key: value for key, value in (arguments or {}).items() if value is not None}
    _check_classes(arguments)
    with speaking_of_options():
        file = weights_file(target, form)
        if file is not None:
            if checkpoint is not None:
                raise InputError(
                    f"'{target}' is a checkpoint already; leave --checkpoint out or name a model."
                )
            if pretrained:
                raise InputError("The weights come from one place; leave --pretrained or the checkpoint out.")
            return _loaded(file, None, arguments, say)
        if pretrained and checkpoint is not None:
            raise InputError("The weights come from one place; leave --pretrained or --checkpoint out.")
        if is_own_code(target):
            return _own(OwnNetwork(target), checkpoint, arguments, form, pretrained, say)
        _check_name(target)
        if checkpoint is None:
            with building(target, arguments):
                return create_model(target, pretrained, **arguments).eval()
        return _named(target, weights_file(str(checkpoint), form) or checkpoint, arguments, say)


def weights_file(target: str, form: Form = "training") -> Path | None:
    """The checkpoint that a text names, in the folder of a run that in a form; None where it names a model.

    Raises `InputError` where a folder holds no such file.
    """
    path = Path(target)
    if path.is_dir():
        file = path / (TRAINING if form == "training" else PLAIN)
        if not file.is_file():
            raise InputError(
                f"The folder '{target}' holds no {file.name}, so it is none of a finished run; give a file."
            )
        return file
    return path if path.is_file() or (path.suffix in CHECKPOINT_SUFFIXES and ":" not in path.name) else None


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
    except RefoldError:
        raise
    except Exception as error:  # timm checks its arguments nowhere
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise InputError(
            f"{target} cannot be built with {given} ({first_line(error)}); give it arguments that it takes."
        ) from error


def _own(
    network: OwnNetwork,
    checkpoint: PathLike | None,
    arguments: dict[str, Any],
    form: Form,
    pretrained: bool,
    say: Say,
) -> nn.Module:
    if pretrained:
        raise InputError(
            f"Nobody publishes weights of '{network.target}'; give a --checkpoint, or leave --pretrained out."
        )
    if checkpoint is None:
        return network(**arguments).eval()
    return _loaded(weights_file(str(checkpoint), form) or checkpoint, network, arguments, say)


def _named(name: str, checkpoint: PathLike, arguments: dict[str, Any], say: Say) -> nn.Module:
    card = read_card(checkpoint)
    is_described = card is not None and (card.architecture in (name, None) or card.form == "plain")
    if is_described or Path(checkpoint).name == STATE:
        return _loaded(checkpoint, name, arguments, say)
    opened = open_checkpoint(checkpoint)
    with building(name, arguments):
        network = network_for(opened, name, arguments)
    _say(checkpoint, load_checkpoint(network, opened).notes, say)
    return network.eval()


def _loaded(path: PathLike, architecture: Any, arguments: dict[str, Any], say: Say) -> nn.Module:
    network, notes = load_with_notes(path, architecture, **arguments)
    _say(path, notes, say)
    return network


def _say(path: PathLike, notes: Sequence[str], say: Say) -> None:
    if notes:
        say(f"{path}: {', '.join(notes)}.")


def _check_name(target: str) -> None:
    if ("/" in target or "\\" in target) and ":" not in target:
        raise InputError(f"There is no file, run folder or model '{target}'; check the path.")


def _check_classes(arguments: Mapping[str, Any]) -> None:
    classes = arguments.get("num_classes", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or not 0 <= classes <= _MOST_CLASSES:
        raise InputError(
            f"The number of classes is {classes!r:.50}; give one from 1 to {_MOST_CLASSES:,}, or 0 for features alone."
        )
