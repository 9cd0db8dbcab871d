"""Mask R-CNN: its stages beside torchvision's, what is folded and what is said of the rest, and engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.boxes.comparing import difference
from refold.boxes.pooling import pooled_in_boxes
from refold.export import get_engine
from refold.models.composed import task_of

Randomise = Callable[[nn.Module], nn.Module]
SIZE = (96, 128)


@pytest.fixture
def net(randomised: Randomise) -> Any:
    """A small network with statistics as if it had been trained, whose boxes have scores of all sizes."""
    torch.manual_seed(0)
    made: Any = randomised(
        refold.create_model(
            "maskrcnn/mobilenetv3_small_050", num_classes=3, channels=16, hidden=32, proposals=40
        )
    )
    # A first stage without certainty would leave the second nothing to tell apart.
    for layer in (made.rpn.head.cls_logits, made.rpn.head.bbox_pred, made.roi_heads.box_predictor.cls_score):
        nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(made.roi_heads.mask_predictor.mask_fcn_logits.weight, std=1.0)
    return made.eval()


def squares() -> list[tuple[Tensor, Tensor, Tensor]]:
    masks = torch.zeros(2, *SIZE, dtype=torch.uint8)
    masks[0, 10:40, 10:40] = masks[1, 30:60, 40:90] = 1
    nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, *SIZE, dtype=torch.uint8))
    return [(torch.tensor([[10.0, 10, 40, 40], [40, 30, 90, 60]]), torch.tensor([0, 2]), masks), nothing]


def test_boxes_and_masks_are_those_of_torchvision(net: Any) -> None:
    """Its list of boxes an image, its own pooling, its own decoding and its own suppression, on the same maps."""
    images = torch.randn(2, 3, *SIZE)
    shapes = [SIZE] * 2
    with torch.no_grad():
        maps = net(images)
        pyramid, logits, _ = net.parts(maps)
        scores, boxes = net.decode(maps)
        proposed, _ = net.rpn.filter_proposals(
            boxes, scores[..., 0].logit(), shapes, [map_[0].numel() for map_ in logits]
        )
        own, image_index = net.propose(maps, SIZE)
        for index, expected in enumerate(proposed):
            assert torch.allclose(own[image_index == index], expected, atol=1e-4)
        assert len(own) > 20
        found, _ = net.roi_heads({str(i): map_ for i, map_ in enumerate(pyramid)}, proposed, shapes)
        ours = refold.detections(net, threshold=0.05, iou=0.5)(images)
    theirs = (
        torch.cat([each["boxes"] for each in found]),
        torch.cat([each["scores"] for each in found]),
        torch.cat([each["labels"] for each in found]) - 1,
        torch.cat([each["masks"][:, 0] for each in found]),
        torch.cat([torch.full_like(each["labels"], index) for index, each in enumerate(found)]),
    )
    wide = (theirs[0][:, 2:] - theirs[0][:, :2] >= 1).all(1)  # torchvision keeps slivers at the edge
    between = difference([part[wide] for part in theirs], ours)
    assert between.boxes > 40
    assert between.unmatched == 0
    assert between.masks < 1e-4


def test_boxes_are_pooled_as_torchvision_pools_lists() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 160 // stride, 224 // stride) for stride in (4, 8, 16, 32)]
    corners = torch.rand(60, 2) * 60
    boxes = torch.cat([corners, corners + 1 + torch.rand(60, 2) * torch.logspace(0, 3, 60)[:, None]], 1)
    image_index = torch.arange(60) % 2
    from torchvision.ops import MultiScaleRoIAlign

    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, sampling_ratio=2)
    named = {str(level): map_ for level, map_ in enumerate(maps)}
    expected = pool(named, [boxes[image_index == 0], boxes[image_index == 1]], [(160, 224)] * 2)
    found = pooled_in_boxes(maps, (4, 8, 16, 32, 64), boxes, image_index, side=7)
    assert torch.allclose(found[torch.cat([image_index.eq(i).nonzero()[:, 0] for i in (0, 1)])], expected)
    none = pooled_in_boxes(maps, (4, 8, 16, 32, 64), boxes[:0], image_index[:0], side=7)
    assert none.shape == (0, 4, 7, 7)


def test_the_dense_part_folds_and_the_report_says_what_runs_behind_it(net: Any) -> None:
    images = torch.randn(1, 3, *SIZE)
    plain: Any = refold.fold(net, images)
    assert plain.fold_report.left == []
    assert any("behind the forward pass: roi_heads" in note for note in plain.fold_report.notes)
    with torch.no_grad():
        between = difference(refold.detections(net)(images), refold.detections(plain)(images))
    assert between.boxes > 10
    assert between.worst < 1e-4


def test_a_plain_network_with_masks_is_saved_and_loaded(net: Any, tmp_path: Path) -> None:
    images = torch.randn(1, 3, *SIZE)
    plain = refold.fold(net, images)
    refold.save(plain, tmp_path / "net.safetensors")
    loaded = refold.load(tmp_path / "net.safetensors")
    with torch.no_grad():
        for expected, found in zip(
            refold.detections(plain)(images), refold.detections(loaded)(images), strict=True
        ):
            assert torch.equal(expected, found)


def test_losses_go_down_and_are_finite_without_objects() -> None:
    torch.manual_seed(0)
    net: Any = refold.create_model(
        "maskrcnn/mobilenetv3_small_050", num_classes=3, channels=16, hidden=32, proposals=40
    )
    images, truth = torch.randn(2, 3, *SIZE), squares()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = net.loss(net(images), truth)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    empty = net.loss(net(images), [truth[1]] * 2)
    optimizer.zero_grad()
    empty.backward()
    assert empty.isfinite()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())
    net.eval()
    assert net.loss(net(images), truth).isfinite()
    assert not net.roi_heads.training


def test_no_boxes_have_no_masks(net: Any) -> None:
    nn.init.constant_(net.roi_heads.box_predictor.cls_score.bias[:1], 99.0)
    found = refold.detections(net)(torch.randn(2, 3, *SIZE))
    assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,), (0, 28, 28), (0,)]
    assert task_of("maskrcnn/repvgg_a0") == "instances"
    with pytest.raises(refold.InputError, match="proposals 0"):
        refold.create_model("maskrcnn/mobilenetv3_small_050", proposals=0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_masks_in_the_engine_are_those_of_pytorch(net: Any, engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    path = tmp_path / ("net.onnx" if engine == "onnxruntime" else "net.xml")
    boxes = refold.detections(net)
    report = refold.export(boxes, path, torch.randn(1, 3, *SIZE), engine=engine, dynamic_size=True)
    assert report.checked
    assert any(kind in report.contents.operators for kind in ("RoiAlign", "ROIAlign")), (
        report.contents.operators
    )
    session = get_engine(engine).open(path)
    for batch, size in [(1, SIZE), (2, (97, 131)), (5, (64, 64)), (1, (160, 224))]:
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            expected = boxes(images)
        found = session(images)
        assert found[3].shape[1:] == (28, 28)
        between = difference(expected, found)
        assert between.boxes > 0
        assert between.worst < 1e-4
