"""What a run is told, what it gives, and the files of its folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from refold.errors import InputError
from refold.runs import INT8 as INT8
from refold.runs import PLAIN as PLAIN
from refold.runs import RUN as RUN
from refold.runs import STATE as STATE
from refold.runs import TRAINING as TRAINING
from refold.training.options import Option, check_bounds
from refold.training.recipe import ResolvedRecipe

ONNX, CARD, REPORT, HISTORY, CURVES = "plain.onnx", "card.json", "fold.json", "history.csv", "curves.png"
PICTURE, SPLIT, SAMPLE, MODEL_CARD = "fold.svg", "split.csv", "data.png", "README.md"
TENSORBOARD = "tensorboard"
# All that a run may write; what makes it a run comes first.
RUN_FILES = (
    RUN, STATE, TRAINING, PLAIN, INT8, ONNX, CARD, REPORT, HISTORY, CURVES, PICTURE, SPLIT, SAMPLE, MODEL_CARD,
    TENSORBOARD,
)  # fmt: skip

Keep = Literal["best", "last"]
TASKS = ("classify", "detect", "instances", "segment")
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]

Seed = Annotated[int, Option("Seed of the weights, the split and the training.", least=0, most=2**32 - 1)]
Threads = Annotated[
    int,
    Option("PyTorch threads; a small network gains little from more.", least=1, most=1024, changeable=True),
]


def check_task(task: str | None) -> None:
    """Raise `InputError` where there is no task of a name."""
    if task not in (None, *TASKS):
        raise InputError(f"There is no task '{task}'; choose {', '.join(TASKS)}.")


@dataclass(frozen=True)
class Settings:
    """What a run may be told, beside its recipe; the options of `refold train` and `refold distill` are made of it.

    ``data`` is what `refold.training.data.open_data` understands, ``network`` what `refold.targets` does, which
    ``model_args`` (KEY=VALUE) build. ``task`` says what the data are for where they leave it open. ``pretrained`` takes
    the network's published weights to start from, ``checkpoint`` holds others, ``unfold`` names a plan of
    `refold.unfold`, ``teacher`` a network or a checkpoint to learn from; ``teacher_cache`` is a folder that keeps its
    answers (`answers.TeacherCache`). ``accelerator`` and ``precision`` are those of Lightning's Trainer, ``strategy``
    its name for how ``devices`` on each of ``nodes`` machines train together; under torchrun those two are what it
    started. ``sync_batch_norm`` takes batch statistics over all of them. ``compile`` runs the network through
    `torch.compile`. ``unreadable`` images may be left out before it is an error. ``keep`` says which epoch's network is
    the result: the one that did best on the held-out images, or the last. ``tensorboard`` logs each epoch for
    TensorBoard as well.
    """

    output: Annotated[Path, Option("The run's folder.", short="-o", shown_default="runs/COMMAND-TIME")]
    data: Annotated[
        str,
        Option(
            "digits, a folder with one folder of images a class, with boxes (COCO, YOLO, VOC) or masks, CIFAR as "
            "distributed, wds/FOLDER, hfds/NAME, or a Dataset of your own: data.py:Name.",
            changeable=True,
        ),
    ]
    network: Annotated[
        str, Option("The network to train: a name, a checkpoint, net.py:Net ...", default="repghostnet_050")
    ]
    recipe: Annotated[
        ResolvedRecipe,
        Option(
            "A recipe's name, or a YAML file.",
            given_as=str,
            shown_default="small_images, photos or finetune: what fits data and weights",
        ),
    ]
    model_args: Annotated[
        list[str] | None, Option("An argument that builds the network; repeatable.", metavar="KEY=VALUE")
    ] = None
    task: Annotated[
        str | None,
        Option(
            "classify, detect, instances (boxes with masks) or segment.",
            shown_default="what the network is for, and else the data",
            metavar="TASK",
        ),
    ] = None
    pretrained: Annotated[bool, Option("Start from the published weights of the network.")] = False
    checkpoint: Annotated[str | None, Option("Weights of the network to start from.", given_as=Path)] = None
    unfold: Annotated[str | None, Option("Train with the branches of this plan.", metavar="PLAN")] = None
    teacher: Annotated[
        str | None, Option("A model name, whose published weights are taken, or a checkpoint.")
    ] = None
    teacher_checkpoint: Annotated[
        str | None, Option("Weights for the teacher's model name.", given_as=Path)
    ] = None
    teacher_cache: Annotated[
        str | None,
        Option(
            "Keep the teacher's answers here; for images without augmentation.",
            given_as=Path,
            changeable=True,
        ),
    ] = None
    seed: Seed = 0
    workers: Annotated[int, Option("Processes that prepare images, a device.", least=0, changeable=True)] = 0
    threads: Threads = 1
    accelerator: Annotated[str, Option("auto, cpu, gpu or mps.", changeable=True)] = "auto"
    devices: Annotated[
        int, Option("Devices of this machine that train together.", least=1, changeable=True)
    ] = 1
    nodes: Annotated[
        int,
        Option(
            "Machines that train together, each given MASTER_ADDR, MASTER_PORT and NODE_RANK.",
            least=1,
            changeable=True,
        ),
    ] = 1
    strategy: Annotated[
        Strategy, Option("How devices train together, by Lightning's name.", changeable=True)
    ] = "auto"
    sync_batch_norm: Annotated[bool, Option("Take batch statistics over all devices.")] = False
    precision: Annotated[str, Option("32-true, bf16-mixed or 16-mixed.")] = "32-true"
    channels_last: Annotated[bool, Option("Keep channels last in memory.", changeable=True)] = True
    compile: Annotated[bool, Option("Run the network through torch.compile.", changeable=True)] = False
    accumulate: Annotated[int, Option("Batches that make one step.", least=1, changeable=True)] = 1
    unreadable: Annotated[
        int, Option("Images that may be unreadable before it is an error.", least=0, changeable=True)
    ] = 10
    keep: Annotated[
        Keep, Option("The network to keep: the best on held-out images, or the last.", changeable=True)
    ] = "best"
    tensorboard: Annotated[bool, Option("Log each epoch for TensorBoard, too.", changeable=True)] = False

    @property
    def rounds(self) -> bool:
        """Whether the rounding of an int8 file is in the loop."""
        return self.recipe.recipe.weight_bits is not None

    @property
    def best(self) -> str:
        """The file of the best network so far."""
        return INT8 if self.rounds else TRAINING

    def check(self) -> None:
        """Raise `InputError` where a setting is none of its choices, or out of its bounds."""
        if self.keep not in get_args(Keep):
            raise InputError(f"There is no network '{self.keep}' to keep; choose best or last.")
        if self.strategy not in get_args(Strategy):
            raise InputError(
                f"There is no strategy '{self.strategy}' here; choose {', '.join(get_args(Strategy))}."
            )
        check_task(self.task)
        if self.pretrained and self.checkpoint is not None:
            raise InputError(
                "The weights to start from come from one place; give pretrained or a checkpoint."
            )
        check_bounds(self)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


@dataclass(frozen=True)
class QuickstartOptions:
    """What a run of `refold.quickstart` may be told.

    ``data`` None means the bundled digits, ``epochs`` and ``image_size`` None numbers that fit the data.
    """

    output: Annotated[Path, Option("The run's folder.", short="-o", shown_default="runs/quickstart-TIME")]
    data: Annotated[Path | None, Option("Your own images, one folder a class, instead of the digits.")] = None
    task: Annotated[
        str | None,
        Option(
            "classify, or detect: scenes of digits; your own images for all tasks of refold train.",
            metavar="TASK",
        ),
    ] = None
    epochs: Annotated[int | None, Option("Passes over the images.", shown_default="what fits the data")] = (
        None
    )
    image_size: Annotated[
        int | None, Option("Side of the images in pixels.", shown_default="48, and 96 for photos and scenes")
    ] = None
    seed: Seed = 0
    threads: Threads = 1


@dataclass(frozen=True)
class Result:
    """What a run gave: the best epoch, the held-out scores (shares) of each form, the proof and the files.

    ``score`` is what they are called. ``same_answers`` counts the held-out images that the plain form answers as the
    training form does, ``onnx_same_answers`` those that the exported file does. Of a run with rounding in the loop,
    "plain" is the float network that it started from, "training" the network as it rounds while it trains and "onnx"
    the int8 file; answers are compared with the float network's, and ``int8`` holds what else is known of the file.
    """

    best: dict[str, Any]
    epochs: int
    score: str
    training_score: float
    plain_score: float
    onnx_score: float
    same_answers: int
    onnx_same_answers: int
    held_out_images: int
    unreadable: list[str]
    proof: dict[str, Any]
    export_difference: float
    files: dict[str, str]
    int8: dict[str, Any] | None = None
