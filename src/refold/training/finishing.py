"""What comes after training: the best network folded, proved, saved, exported, and asked in each form."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from refold.checkpoints import example_input, save
from refold.export import export, get_engine
from refold.files import write_text
from refold.folding import fold
from refold.picture import save_picture
from refold.targets import network_of, original_network
from refold.training.batches import held_out_loader
from refold.training.callbacks import EpochRow, Keeper, Unreadable
from refold.training.curves import draw_curves
from refold.training.images import LabelledImages
from refold.training.model_card import model_card
from refold.training.module import TrainingModule
from refold.training.settings import (
    CARD,
    CURVES,
    HISTORY,
    MODEL_CARD,
    ONNX,
    PICTURE,
    PLAIN,
    REPORT,
    TRAINING,
    Result,
    Settings,
)


def finish(
    settings: Settings, module: TrainingModule, keeper: Keeper, unreadable: Unreadable, console: Console
) -> Result:
    """Fold the best network as it was saved, write what belongs to the run, and say what it gave."""
    folder, images = settings.output, module.images
    net = network_of(settings.network, folder / TRAINING)
    trained = original_network(settings.network, net) if hasattr(net, "unfold_report") else net
    example = example_input(net, module.preprocessing["input_size"])
    with console.status("Folding, and proving the fold"):
        plain: Any = fold(trained, example)
    save(plain, folder / PLAIN)
    write_text(folder / REPORT, plain.fold_report.to_json())
    save_picture(plain.fold_report, folder / PICTURE, title=settings.network)
    task = module.task
    with console.status("Exporting to ONNX, and running the file against PyTorch"):
        exported = export(plain, folder / ONNX, example, **task.export_options)
    with console.status("Asking each form about the held-out images"):
        session = get_engine("onnxruntime").open(folder / ONNX, threads=settings.threads)
        found = compared(module, [net, plain], [session])
    curves = f"{settings.network}, {images.title}"
    draw_curves(folder / CURVES, curves, keeper.rows, task.score, task.score_title)
    assert keeper.best is not None
    names = [MODEL_CARD, TRAINING, PLAIN, ONNX, REPORT, PICTURE, CARD, HISTORY, CURVES]
    result = Result(
        best=keeper.best,
        epochs=len(keeper.rows),
        score=task.score_title,
        training_score=found.scores[0],
        plain_score=found.scores[1],
        onnx_score=found.scores[2],
        same_answers=found.same[1],
        onnx_same_answers=found.same[2],
        held_out_images=found.images,
        unreadable=list(unreadable.messages),
        proof=plain.fold_report.proof.to_dict(),
        export_difference=exported.max_difference,
        files={name: str(folder / name) for name in names},
    )
    write_cards(settings, module, unreadable, result)
    return result


def write_cards(settings: Settings, module: TrainingModule, unreadable: Unreadable, result: Result) -> None:
    """Write what a run was and gave, for programs and for people."""
    images = module.images
    card = {
        **provenance(settings, images, result.best, unreadable),
        "task": module.task.name,
        "class_names": images.class_names,
        "preprocessing": module.preprocessing,
        "result": dataclasses.asdict(result),
    }
    write_text(settings.output / CARD, json.dumps(card, indent=2))
    write_text(settings.output / MODEL_CARD, model_card(card))


def provenance(
    settings: Settings, images: LabelledImages, row: EpochRow, unreadable: Unreadable
) -> dict[str, Any]:
    """Where the network of an epoch comes from: data, settings with the recipe, and versions."""
    return {
        "data": {
            "title": images.title,
            "training_images": len(images.training),
            "held_out_images": len(images.held_out),
            "unreadable": len(unreadable.messages),
        },
        "settings": settings.to_dict(),
        "epoch": row,
        "versions": {name: version(name) for name in ("refold", "torch", "timm", "lightning")},
    }


@dataclass(frozen=True)
class Compared:
    """The scores of the forms, and about how many images each answers as the first does."""

    scores: list[float]
    same: list[int]
    images: int


def compared(
    module: TrainingModule, nets: Sequence[nn.Module], sessions: Sequence[Callable[..., list[Tensor]]]
) -> Compared:
    """Ask networks, and then exported files, about the held-out images."""
    device, task = module.trainer.strategy.root_device, module.task
    for net in nets:
        net.eval().to(device)
    # The first process finishes the run alone.
    measures = [task.measures().of_this_process().to(device) for _ in (*nets, *sessions)]
    same, images = [0] * len(measures), 0
    batches = held_out_loader(
        module.images.held_out, module.measure, 64, workers=module.workers, collate=task.collate
    )
    with torch.inference_mode():
        for batch in batches:
            if not len(batch.images):
                continue
            outputs = [net(batch.images.to(device)) for net in nets]
            answers = [task.answers(net, found, batch) for net, found in zip(nets, outputs, strict=True)]
            answers += [task.answers_of_file(session(batch.images), batch) for session in sessions]
            for index, found in enumerate(answers):
                measures[index].update(found, batch.targets)
                same[index] += sum(map(task.same, found, answers[0]))
            images += len(batch.images)
    for net in nets:
        net.cpu()
    return Compared([each.compute()[task.score] for each in measures], same, images)
