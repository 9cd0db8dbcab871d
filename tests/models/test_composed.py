"""Detectors and segmenters: built by name, folded as any network, their losses, and boxes in every form and engine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.boxes.comparing import difference
from refold.export import get_engine
from refold.models.composed import HEADS, task_of
from refold.models.detectors.dense import DenseDetector

DETECTORS = [name for name, head in HEADS.items() if head.task == "detect"]
SEGMENTERS = [name for name, head in HEADS.items() if head.task == "segment"]
BACKBONES = ["repghostnet_100", "ghostnetv3_100", "repvgg_a0", "gghost_regnetx_032", "mobilenetv3_large_100"]
SIZES = [(96, 128), (97, 131)]

Randomise = Callable[[nn.Module], nn.Module]


def built(name: str, randomised: Randomise, **arguments: Any) -> Any:
    """A network with statistics as if it had been trained, and scores of all sizes."""
    net = randomised(refold.create_model(name, num_classes=3, **arguments))
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None and module.out_channels < 60:
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.uniform_(module.bias, -2, 1)
    return net


def outputs_of(net: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = net(images)
    return [found] if isinstance(found, Tensor) else list(found)


def batch_norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def check_fold(name: str, randomised: Randomise, **arguments: Any) -> None:
    net = built(name, randomised, **arguments).double()
    plain: Any = refold.fold(net, torch.randn(1, 3, *SIZES[0], dtype=torch.float64))
    assert plain.fold_report.left == []
    assert batch_norms(plain) == 0
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        for expected, found in zip(outputs_of(net, images), outputs_of(plain, images), strict=True):
            assert float((expected - found).abs().max()) < 1e-9 * max(1.0, float(expected.abs().max()))
            assert float(expected.std()) > 0


@pytest.mark.parametrize("head", HEADS)
def test_every_head_folds_whole(head: str, randomised: Randomise) -> None:
    check_fold(f"{head}/repghostnet_050", randomised)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_folds_on_every_kind_of_backbone(head: str, backbone: str, randomised: Randomise) -> None:
    check_fold(f"{head}/{backbone}", randomised)


@pytest.mark.parametrize("head", SEGMENTERS)
def test_segmenters_score_every_pixel(head: str, randomised: Randomise) -> None:
    net = built(f"{head}/repghostnet_050", randomised)
    for size in SIZES:
        assert net(torch.randn(2, 3, *size)).shape == (2, 3, *size)
    coarse = refold.create_model(f"{head}/repghostnet_050", num_classes=3, output_stride=32).eval()
    assert coarse(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_training_layers_do_not_go_into_the_plain_form(randomised: Randomise) -> None:
    net = built("dense/repghostnet_050", randomised, branches=3)
    plain: Any = refold.fold(net, torch.randn(1, 3, 64, 64))
    assert not any(key.startswith("predict_many") for key in plain.state_dict())
    assert any("predict_many" in note for note in plain.fold_report.notes)
    assert (
        plain.fold_report.after.operators["convolution"] < plain.fold_report.before.operators["convolution"]
    )
    assert len(plain(torch.randn(1, 3, 64, 64))) == 3
    assert len(plain.train()(torch.randn(2, 3, 64, 64))) == 3
    suppressed = built("dense/repghostnet_050", randomised, one_to_one=False)
    kept: Any = refold.fold(suppressed, torch.randn(1, 3, 64, 64))
    assert any(key.startswith("predict_many") for key in kept.state_dict())


def test_a_plain_detector_is_saved_and_loaded(tmp_path: Path, randomised: Randomise) -> None:
    plain = refold.fold(built("dense/mobilenetv3_small_050", randomised), torch.randn(1, 3, 64, 64))
    refold.save(plain, tmp_path / "net.safetensors")
    loaded: Any = refold.load(tmp_path / "net.safetensors")
    images = torch.randn(2, 3, 96, 64)
    for expected, found in zip(plain(images), loaded(images), strict=True):
        assert torch.equal(expected, found)
    assert loaded.card.architecture == "dense/mobilenetv3_small_050"
    assert difference(refold.detections(plain)(images), refold.detections(loaded)(images)).unmatched == 0


@pytest.mark.parametrize("head", DETECTORS)
def test_boxes_are_those_of_a_loop_over_images_classes_and_boxes(head: str, randomised: Randomise) -> None:
    net = built(f"{head}/repghostnet_050", randomised)
    images = torch.randn(3, 3, 96, 128)
    with torch.no_grad():
        scores, boxes = net.decode(net(images))
        found = refold.detections(net, threshold=0.3, count=50)(images)
    assert len(found[0]) > 0
    kept: list[tuple[int, int, list[float], float]] = []
    for image in range(3):
        pairs = [
            (float(s), row, label) for row, own in enumerate(scores[image]) for label, s in enumerate(own)
        ]
        looked_at = 1000 if net.needs_suppression else 50
        best = [pair for pair in sorted(pairs, reverse=True)[:looked_at] if pair[0] > 0.3]
        limits = torch.tensor([128.0, 96.0, 128.0, 96.0])
        taken: list[tuple[int, Tensor]] = []
        for score, row, label in best:
            if len(taken) == 50:
                break
            box = torch.minimum(boxes[image, row].clamp(min=0), limits)
            if not bool((box[2:] - box[:2] >= 1).all()):
                continue
            if net.needs_suppression and any(
                own == label and overlap(box, other) > 0.6 for own, other in taken
            ):
                continue
            taken.append((label, box))
            kept.append((image, label, box.tolist(), score))
    expected = (
        torch.tensor([box for _, _, box, _ in kept]),
        torch.tensor([score for *_, score in kept]),
        torch.tensor([label for _, label, _, _ in kept]),
        torch.tensor([image for image, *_ in kept]),
    )
    assert len(expected[0]) == len(found[0])
    assert difference(expected, found).unmatched == 0


def overlap(a: Tensor, b: Tensor) -> float:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    shared = float(sides.prod())
    return shared / max(float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - shared, 1e-12)


def test_an_image_without_boxes_one_box_and_tied_boxes() -> None:
    net = refold.create_model("dense/repghostnet_050", num_classes=1).eval()
    maps = net(torch.randn(1, 3, 64, 64))
    silent = [torch.full_like(map_, -9.0) for map_ in maps]
    for map_ in silent:
        map_[:, 1:] = 1.0  # boxes of some size

    class Fixed(nn.Module):
        output_kind, needs_suppression, decode = "maps", False, net.decode

        def __init__(self, maps: Sequence[Tensor]) -> None:
            super().__init__()
            self.maps = maps

        def forward(self, images: Tensor) -> Sequence[Tensor]:
            return self.maps

    images = torch.randn(1, 3, 64, 64)
    assert [len(part) for part in refold.detections(Fixed(silent))(images)] == [0, 0, 0, 0]
    one = [map_.clone() for map_ in silent]
    one[1][0, 0, 2, 1] = 3.0
    boxes, scores, labels, image_index = refold.detections(Fixed(one))(images)
    assert (len(boxes), labels.tolist(), image_index.tolist()) == (1, [0], [0])
    assert abs(float(scores[0]) - 1 / (1 + 2.718281828**-3)) < 1e-5
    tied = [map_.clone() for map_ in one]
    tied[1][0, 0, 0, 3] = 3.0
    boxes, scores, *_ = refold.detections(Fixed(tied))(images)
    assert len(boxes) == 2
    assert float(scores[0]) == float(scores[1])


def test_a_small_image_has_fewer_boxes_than_are_taken() -> None:
    net = refold.create_model("dense/repghostnet_050", num_classes=1).eval()
    for layer in net.predict_one:
        nn.init.ones_(layer.bias)
    assert len(refold.detections(net, count=1000)(torch.randn(1, 3, 32, 32))[0]) == 16 + 4 + 1


@pytest.mark.parametrize("head", DETECTORS)
def test_losses_are_finite_and_go_down(head: str) -> None:
    net: Any = refold.create_model(f"{head}/mobilenetv3_small_050", num_classes=2)
    images = torch.randn(2, 3, 64, 64)
    truth = [
        (torch.tensor([[8.0, 8, 40, 40], [30, 4, 60, 60]]), torch.tensor([0, 1])),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = net.loss(net(images), truth)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.96 * losses[0]
    nothing = [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))] * 2
    empty = net.loss(net(images), nothing)
    optimizer.zero_grad()
    empty.backward()
    assert empty.isfinite()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert net.eval().loss(net(images), truth).isfinite()


def test_yolov3_learns_a_box_at_its_cell_by_the_likest_anchor() -> None:
    net: Any = refold.create_model("yolov3/mobilenetv3_small_050", num_classes=2).double()
    images = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    box = torch.tensor([[50.0, 20, 82, 43]], dtype=torch.float64)  # most like 33 x 23, of the finest map
    maps = net.eval()(images)
    rows, targets = net._learnt(maps, box)
    place = (31 // 8 * (128 // 8) + 66 // 8) * 3 + 2
    assert rows.tolist() == [place]
    written = [map_.clone() for map_ in maps]
    own = written[0].view(1, 3, 7, 12, 16)[0, 2, :, 31 // 8, 66 // 8]
    own[:2] = torch.logit(targets[0, :2])
    own[2:4] = targets[0, 2:]
    assert torch.allclose(net.boxes(written)[0, place], box[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("head", DETECTORS)
def test_boxes_in_the_engine_are_those_of_pytorch(
    head: str, engine: str, randomised: Randomise, tmp_path: Path
) -> None:
    pytest.importorskip(engine)
    net = built(f"{head}/repghostnet_050", randomised)
    path = tmp_path / ("net.onnx" if engine == "onnxruntime" else "net.xml")
    report = refold.export(
        net, path, torch.randn(1, 3, 96, 128), engine=engine, detections=True, dynamic_size=True
    )
    assert report.checked
    session = get_engine(engine).open(path)
    boxes = refold.detections(net)
    for batch, size in [(1, (96, 128)), (2, (97, 131)), (5, (64, 64)), (1, (160, 224))]:
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            expected = boxes(images)
        found = difference(expected, session(images))
        assert found.boxes > 0
        assert found.unmatched == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "engine"), [("dense", "ncnn"), ("dense", "mnn"), ("retinanet", "mnn"), ("yolov3", "ncnn")]
)
def test_maps_in_an_engine_without_boxes_are_those_of_pytorch(
    head: str, engine: str, randomised: Randomise, tmp_path: Path
) -> None:
    pytest.importorskip(engine if engine == "ncnn" else "MNN")
    net = built(f"{head}/repghostnet_050", randomised)
    path = tmp_path / f"net.{'param' if engine == 'ncnn' else 'mnn'}"
    assert refold.export(net, path, torch.randn(1, 3, 96, 128), engine=engine).checked
    with pytest.raises(refold.InputError, match="ONNX Runtime or OpenVINO"):
        refold.export(net, path, torch.randn(1, 3, 96, 128), engine=engine, detections=True)


def test_names_are_listed_and_wrong_ones_answered() -> None:
    assert "dense/repvgg_a0" in refold.list_models("dense/repvgg*")
    assert "dense/repvgg_a0" not in refold.list_models("repvgg*")
    assert task_of("dense/repvgg_a0") == "detect"
    assert task_of("fpn/repvgg_a0") == "segment"
    assert task_of("repvgg_a0") == "classify"
    for name, said in {
        "dens/repvgg_a0": "did you mean dense/repvgg_a0",
        "dense/": "names no backbone",
        "dense/repvgg_a00": "the nearest names are repvgg_a0",
    }.items():
        with pytest.raises(refold.UnknownModel, match=said):
            refold.create_model(name)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("dense/vit_tiny_patch16_224", {}, "none of 8"),
        ("dense/cghost_resnet56", {}, "none of 8"),
        ("dense/repvgg_a0", {"num_classes": 0}, "num_classes is 0"),
        ("dense/repvgg_a0", {"branches": 0}, "branches is 0"),
        ("lraspp/hrnet_w18_small", {}, "output_stride=32"),
        ("fpn/repvgg_a0", {"features_only": True}, "for a classifier alone"),
    ],
)
def test_what_cannot_be_built_is_said(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(refold.InputError, match=said):
        refold.create_model(name, **arguments)


def test_what_is_no_detector_has_no_boxes() -> None:
    with pytest.raises(refold.InputError, match="is no detector"):
        refold.detections(nn.Conv2d(3, 8, 1))
    net = refold.create_model("dense/repvgg_a0")
    assert isinstance(net, DenseDetector)
    for arguments, said in [
        ({"threshold": 1.0}, "threshold"),
        ({"iou": 2.0}, "iou"),
        ({"count": 0}, "count"),
    ]:
        with pytest.raises(refold.InputError, match=said):
            refold.detections(net, suppress=True, **arguments)  # type: ignore[arg-type]  # of either type
