"""What a run is told, what it gives, and the files of its folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from refold.errors import InputError
from refold.training.recipe import ResolvedRecipe

STATE, TRAINING, PLAIN, ONNX = "last.ckpt", "training.safetensors", "plain.safetensors", "plain.onnx"
RUN, CARD, REPORT, HISTORY, CURVES = "run.json", "card.json", "fold.json", "history.csv", "curves.png"
TENSORBOARD = "tensorboard"

Keep = Literal["best", "last"]
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]


@dataclass(frozen=True)
class Settings:
    """What a run may be told, beside its recipe.

    ``data`` is what `refold.training.data.open_data` understands. ``checkpoint`` holds weights to start from,
    ``unfold`` names a plan of `refold.unfold`, ``teacher`` a network or a checkpoint to learn from; ``teacher_cache``
    is a folder that keeps its answers (`answers.TeacherCache`).
    ``accelerator`` and ``precision`` are those of Lightning's Trainer, ``strategy`` its name for how ``devices`` on
    each of ``nodes`` machines train together; under torchrun those two are what it started. ``sync_batch_norm``
    takes batch statistics over all of them. ``compile`` runs the network through `torch.compile`. ``unreadable``
    images may be left out before it is an error. ``keep`` says which epoch's network is the result: the one that did
    best on the held-out images, or the last. ``tensorboard`` logs each epoch for TensorBoard as well.
    """

    output: Path
    data: str
    network: str
    recipe: ResolvedRecipe
    checkpoint: str | None = None
    unfold: str | None = None
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    teacher_cache: str | None = None
    seed: int = 0
    workers: int = 0
    threads: int = 1
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Strategy = "auto"
    sync_batch_norm: bool = False
    precision: str = "32-true"
    channels_last: bool = True
    compile: bool = False
    accumulate: int = 1
    unreadable: int = 10
    keep: Keep = "best"
    tensorboard: bool = False

    def check(self) -> None:
        """Raise `InputError` where a setting is none of its choices."""
        if self.keep not in get_args(Keep):
            raise InputError(f"There is no network '{self.keep}' to keep; choose best or last.")
        if self.strategy not in get_args(Strategy):
            raise InputError(
                f"There is no strategy '{self.strategy}' here; choose {', '.join(get_args(Strategy))}."
            )
        if min(self.devices, self.nodes) < 1:
            raise InputError(
                f"{self.devices} devices on {self.nodes} machines cannot train; give at least 1."
            )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


@dataclass(frozen=True)
class Result:
    """What a run gave: the best epoch, held-out accuracies (shares) of each form, the proof and the files.

    ``same_answers`` counts the held-out images that the plain form answers as the training form does,
    ``onnx_same_answers`` those that the exported file does.
    """

    best: dict[str, Any]
    epochs: int
    training_accuracy: float
    plain_accuracy: float
    onnx_accuracy: float
    same_answers: int
    onnx_same_answers: int
    held_out_images: int
    unreadable: list[str]
    proof: dict[str, Any]
    export_difference: float
    files: dict[str, str]
