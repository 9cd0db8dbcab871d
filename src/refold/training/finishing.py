"""What comes after training: the best network folded, proved, saved, exported, and asked in each form."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
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
    with console.status("Exporting to ONNX, and running the file against PyTorch"):
        exported = export(plain, folder / ONNX, example)
    with console.status("Asking each form about the held-out images"):
        session = get_engine("onnxruntime").open(folder / ONNX, threads=settings.threads)
        reference, truth = _network_answers(net, module)
        plain_answers, _ = _network_answers(plain, module)
        onnx_answers, _ = _answers(lambda batch: session(batch)[0], module)
    draw_curves(folder / CURVES, f"{settings.network}, {images.title}", keeper.rows, module.task.score)
    assert keeper.best is not None
    score_of = module.task.score_of
    names = [MODEL_CARD, TRAINING, PLAIN, ONNX, REPORT, PICTURE, CARD, HISTORY, CURVES]
    result = Result(
        best=keeper.best,
        epochs=len(keeper.rows),
        training_accuracy=score_of(reference, truth),
        plain_accuracy=score_of(plain_answers, truth),
        onnx_accuracy=score_of(onnx_answers, truth),
        same_answers=int((plain_answers == reference).sum()),
        onnx_same_answers=int((onnx_answers == reference).sum()),
        held_out_images=len(truth),
        unreadable=list(unreadable.messages),
        proof=plain.fold_report.proof.to_dict(),
        export_difference=exported.max_difference,
        files={name: str(folder / name) for name in names},
    )
    card = {
        **provenance(settings, images, keeper.best, unreadable),
        "class_names": images.class_names,
        "preprocessing": module.preprocessing,
        "result": dataclasses.asdict(result),
    }
    write_text(folder / CARD, json.dumps(card, indent=2))
    write_text(folder / MODEL_CARD, model_card(card))
    return result


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


def _network_answers(net: nn.Module, module: TrainingModule) -> tuple[Tensor, Tensor]:
    device = module.trainer.strategy.root_device
    net.eval().to(device)
    answers = _answers(lambda batch: net(batch.to(device)), module)
    net.cpu()
    return answers


def _answers(run: Callable[[Tensor], Tensor], module: TrainingModule) -> tuple[Tensor, Tensor]:
    """The answers about the held-out images and what would be right, as the task has them."""
    answers, truth = [], []
    batches = held_out_loader(
        module.images.held_out, module.measure, 128, workers=module.workers, collate=module.task.collate
    )
    with torch.inference_mode():
        for batch in batches:
            if len(batch.images):
                answers.append(module.task.answers(run(batch.images)).cpu())
                truth.append(batch.targets)
    return torch.cat(answers), torch.cat(truth)
