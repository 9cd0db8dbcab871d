"""The task of finding objects with their masks: changed images, measures against pycocotools, and a run to its end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from typer.testing import CliRunner

import refold
from refold.boxes.pasting import pasted, run_lengths
from refold.cli import app
from refold.errors import InputError
from refold.training.batches import reseed
from refold.training.labels import OutlinedLabels
from refold.training.recipe import load_recipe
from refold.training.tasks import DetectionTask, InstanceTask
from refold.training.tasks.instances import InstanceAnswer, InstanceTarget, MaskPrecision

PREPROCESSING = {
    "input_size": [3, 64, 96], "interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0,
}  # fmt: skip
TRIANGLE = ((30, 10), (50, 10), (30, 30))


def triangle() -> tuple[Image.Image, OutlinedLabels]:
    """A black picture with a white triangle of 20 x 20 pixels, and a crowd."""
    picture = Image.new("RGB", (80, 60))
    ImageDraw.Draw(picture).polygon(TRIANGLE, fill=(255, 255, 255))
    corners = [float(value) for corner in TRIANGLE for value in corner]
    crowd = {"size": [60, 80], "counts": [4000, 10, 790]}
    labels = OutlinedLabels(
        ((30, 10, 50, 30), (60, 40, 70, 50)), (1, 0), (False, True), picture.size, outlines=([corners], crowd)
    )
    return picture, labels


def test_masks_follow_the_image_through_every_change() -> None:
    recipe = load_recipe("maskrcnn", {"resize_range": [0.5, 2.0]}).recipe
    augment, measure = InstanceTask(["a", "b"]).transforms(recipe, PREPROCESSING, mirror=True)
    areas = set()
    for seed in range(30):
        reseed(seed)
        image, target = augment(*triangle())
        assert isinstance(target, InstanceTarget)
        assert target.masks.shape == (len(target.boxes), 64, 96)
        assert target.whole_masks.shape == (2, 60, 80)
        for mask in target.masks.bool():
            if mask.sum() > 100:
                assert float(image[0][mask].mean()) > 0.8
                assert float((image[0] > 0.9).sum() - mask.sum()) < 0.3 * mask.sum()
                areas.add(int(mask.sum()))
    assert len(areas) > 10
    image, target = measure(*triangle())
    assert float(image[0][target.masks[0].bool()].mean()) > 0.8
    assert target.labels.tolist() == [1]


def random_case(seed: int) -> tuple[list[InstanceAnswer], list[InstanceTarget]]:
    """Images with objects, and answers about them that are shifted, missing, doubled and wrong."""
    torch.manual_seed(seed)
    answers, targets = [], []
    for _ in range(3):
        count = int(torch.randint(seed % 2, 5, ()))
        corners = torch.rand(count, 2) * 60
        whole = torch.cat([corners, corners + 8 + torch.rand(count, 2) * 40], 1).round()
        shapes = pasted(torch.rand(count, 28, 28) + 0.2, whole, (120, 120))
        labels, crowds = torch.randint(3, (count,)), torch.rand(count) < 0.15
        targets.append(
            InstanceTarget(
                whole, labels, shapes.byte(), whole, labels, crowds, shapes.byte(), torch.tensor([120, 120])
            )
        )
        boxes = torch.cat([whole + torch.randn(count, 4), whole[:2] + 1, torch.tensor([[5.0, 5, 60, 60]])])
        named = torch.cat([labels, labels[:2], torch.tensor([1])])
        answers.append(
            InstanceAnswer(
                boxes, torch.rand(len(boxes)), named, (torch.rand(len(boxes), 28, 28) + 0.25).clamp(max=1)
            )
        )
    return answers, targets


def coco_maps(answers: list[InstanceAnswer], targets: list[InstanceTarget]) -> list[float]:
    """The mean average precision of masks and of boxes by pycocotools."""
    coco_module = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    tools = pytest.importorskip("pycocotools.mask")

    def described(box: list[float], mask: torch.Tensor, **others: Any) -> dict[str, Any]:
        encoded = tools.encode(mask.numpy().astype(np.uint8).copy(order="F"))
        sides = [box[2] - box[0], box[3] - box[1]]
        return {"bbox": [*box[:2], *sides], "segmentation": encoded, "area": int(mask.sum()), **others}

    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": i} for i in range(3)]}
    found = []
    for number, (answer, target) in enumerate(zip(answers, targets, strict=True), start=1):
        truth["images"].append({"id": number, "height": 120, "width": 120})
        for box, label, crowd, mask in zip(
            target.whole.tolist(),
            target.whole_labels.tolist(),
            target.crowds.tolist(),
            target.whole_masks,
            strict=True,
        ):
            known = {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": label}
            truth["annotations"].append(described(box, mask, **known, iscrowd=int(crowd)))
        masks = pasted(answer.masks, answer.boxes, (120, 120))
        for box, label, score, mask in zip(
            answer.boxes.tolist(), answer.labels.tolist(), answer.scores.tolist(), masks, strict=True
        ):
            found.append(described(box, mask, image_id=number, category_id=label, score=score))
    maps = []
    for kind in ("segm", "bbox"):
        known_set = coco_module.COCO()
        known_set.dataset = truth
        known_set.createIndex()
        judge = evaluation.COCOeval(known_set, known_set.loadRes([dict(each) for each in found]), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        maps.append(float(judge.stats[0]))
    return maps


@pytest.mark.parametrize("seed", range(6))
def test_mask_map_is_that_of_pycocotools(seed: int) -> None:
    answers, targets = random_case(seed)
    measures = MaskPrecision()
    measures.update(answers[:2], targets[:2])
    measures.update(answers[2:], targets[2:])
    found = measures.compute()
    assert [found["mask_map"], found["map"]] == pytest.approx(coco_maps(answers, targets), abs=1e-6)
    assert found["mask_map"] > 0


def test_run_lengths_are_cocos() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    mask = torch.rand(13, 17) > 0.6
    mask[0, 0] = True
    lengths = run_lengths(mask)
    assert np.array_equal(tools.decode(tools.frPyObjects(lengths, 13, 17)), mask.numpy())


def test_networks_and_tasks_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match="such as maskrcnn/repvgg_a0"):
        InstanceTask(["a"]).check_network(nn.Identity(), "dense/repvgg_a0")
    net = refold.create_model("maskrcnn/mobilenetv3_small_050", channels=8, hidden=8)
    with pytest.raises(InputError, match="--task instances"):
        DetectionTask(["a"]).check_network(net, "maskrcnn/mobilenetv3_small_050")


def shapes_set(root: Path, images: int) -> None:
    """Squares and triangles with polygons, in COCO's JSON."""
    chance = np.random.default_rng(0)
    (root / "train").mkdir(parents=True)
    document: dict[str, Any] = {
        "images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "triangle"}],
    }  # fmt: skip
    for number in range(images):
        picture = Image.fromarray(chance.normal(60, 10, (64, 64, 3)).clip(0, 255).astype(np.uint8))
        kind, side = int(chance.integers(2)), int(chance.integers(20, 40))
        x, y = (int(value) for value in chance.integers(0, 64 - side, 2))
        corners = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
        corners = corners if kind == 0 else [corners[0], corners[1], corners[3]]
        ImageDraw.Draw(picture).polygon(corners, fill=(240, 200, 40))
        picture.save(root / "train" / f"{number}.png")
        document["images"].append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        flat = [value for corner in corners for value in corner]
        document["annotations"].append(
            {
                "id": number,
                "image_id": number,
                "category_id": kind + 1,
                "bbox": [x, y, side, side],
                "segmentation": [flat],
            }
        )
    (root / "instances_train.json").write_text(json.dumps(document))


@pytest.mark.slow
def test_a_run_finds_masks_in_every_form_and_draws_them(tmp_path: Path) -> None:
    shapes_set(tmp_path / "data", 60)
    told = ["train", "--data", tmp_path / "data", "-o", tmp_path / "run"]
    told += ["--network", "maskrcnn/mobilenetv3_small_050", "--keep", "last"]
    for argument in ("channels=32", "hidden=64", "proposals=30"):
        told += ["--model-args", argument]
    for value in (
        "image_size=64", "epochs=6", "batch_size=8", "optimizer=adamw", "learning_rate=0.003",
        "learning_rate_batch_size=8", "schedule=cosine", "milestones=[]",
    ):  # fmt: skip
        told += ["--set", value]
    result = CliRunner().invoke(app, [str(part) for part in told])
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    given = card["result"]
    assert card["task"] == "instances"
    assert given["training_score"] > 0.05
    assert given["training_score"] == pytest.approx(given["plain_score"], abs=1e-3)
    assert given["training_score"] == pytest.approx(given["onnx_score"], abs=1e-3)
    assert given["same_answers"] == given["onnx_same_answers"] == given["held_out_images"] == 12
    outputs = []
    for file in ("plain.safetensors", "plain.onnx"):
        asked = ["predict", tmp_path / "run" / file, tmp_path / "data" / "train" / "0.png", "--json"]
        asked += ["--draw", tmp_path / file, "--threshold", "0.1"]
        seen = CliRunner().invoke(app, [str(part) for part in asked])
        assert seen.exit_code == 0, seen.output
        outputs.append(json.loads(seen.stdout)[0]["boxes"])
        assert Image.open(tmp_path / file / "0.png").size == (64, 64)
    assert len(outputs[0]) == len(outputs[1]) > 0
    for box in outputs[0]:
        assert sum(box["mask"]["counts"]) == 64 * 64
