"""Matching and losses against plain double loops in float64."""

import math

import pytest
import torch
from drawn import drawn_boxes
from torch import Tensor
from torchvision.ops import box_iou

from refold.boxes.losses import box_loss, focal_loss, quality_loss
from refold.boxes.matching import BACKGROUND, IGNORED, align, match_by_overlap


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return shared / (sum(areas) - shared)


@pytest.mark.parametrize("every_box", [True, False])
def test_overlap_matching_is_the_double_loop(every_box: bool) -> None:
    anchors, boxes = drawn_boxes(60), drawn_boxes(7)
    expected = []
    for anchor in anchors.tolist():
        overlaps = [overlap(anchor, box) for box in boxes.tolist()]
        best = max(overlaps)
        kind = BACKGROUND if best < 0.4 else IGNORED if best < 0.5 else overlaps.index(best)
        expected.append(kind)
    if every_box:
        for box in boxes.tolist():
            overlaps = [overlap(anchor, box) for anchor in anchors.tolist()]
            place = overlaps.index(max(overlaps))
            own = [overlap(anchors[place].tolist(), other) for other in boxes.tolist()]
            expected[place] = own.index(max(own))
    found = match_by_overlap(anchors, boxes, foreground=0.5, background=0.4, every_box=every_box)
    assert found.tolist() == expected
    assert max(expected) >= 0


def test_without_boxes_everything_is_background() -> None:
    found = match_by_overlap(drawn_boxes(5), torch.zeros(0, 4), foreground=0.5, background=0.4)
    assert found.tolist() == [BACKGROUND] * 5


def looped_alignment(
    scores: Tensor,
    predicted: Tensor,
    centres: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    count: int,
) -> dict[int, tuple[int, float]]:
    """For each place that learns a box, its number and quality, by loops over places and boxes."""
    taken: dict[int, list[tuple[float, float, int]]] = {}
    agreements: list[dict[int, float]] = []
    for number, box in enumerate(boxes.tolist()):
        ranked = []
        for place in range(len(centres)):
            x, y = centres[place].tolist()
            middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
            steps = [abs(x - middle[0]) / float(strides[place]), abs(y - middle[1]) / float(strides[place])]
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if not inside and not max(steps) < 1.5:
                continue
            shared = overlap(predicted[place].tolist(), box)
            agreement = max(float(scores[place, labels[number]]), 1e-4) ** 0.5 * shared**4
            ranked.append((agreement + 1e-9 * math.exp(-math.hypot(*steps)), place, shared, agreement))
        ranked.sort(reverse=True)
        agreements.append({place: agreement for _, place, _, agreement in ranked[:count]})
        for ranking, place, shared, _ in ranked[:count]:
            taken.setdefault(place, []).append((shared + 1e-6 * min(ranking, 1), shared, number))
    found = {}
    for place, wishes in taken.items():
        _, _, number = max(wishes, key=lambda wish: (wish[0], -wish[2]))
        own = agreements[number]
        highest = max(0.1, *(overlap(predicted[p].tolist(), boxes[number].tolist()) for p in own))
        found[place] = (number, own[place] / (max(own.values()) + 1e-12) * highest)
    return found


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("near", [True, False])
def test_alignment_is_the_double_loop(count: int, near: bool) -> None:
    places = torch.arange(64)
    centres = torch.stack([places % 8 * 8 + 4, places // 8 * 8 + 4], 1).double()
    strides = torch.full((64,), 8.0, dtype=torch.float64)
    boxes, labels = drawn_boxes(6, 30.0), torch.randint(4, (6,))
    scores = torch.rand(64, 4, dtype=torch.float64)
    half = torch.rand(64, 2, dtype=torch.float64) * 20 + 2
    shift = 0.0 if near else 1000.0  # so far away that nothing overlaps: the nearest are taken
    predicted = torch.cat([centres - half + shift, centres + half + shift], 1)
    found = align(scores, predicted, centres, strides, boxes, labels, count=count)
    expected = looped_alignment(scores, predicted, centres, strides, boxes, labels, count)
    assert found.places.tolist() == sorted(expected)
    for place, number, quality in zip(found.places, found.boxes, found.qualities, strict=True):
        assert expected[int(place)][0] == int(number)
        assert math.isclose(expected[int(place)][1], float(quality), rel_tol=1e-9, abs_tol=1e-12)
    if not near:
        assert len(found.places) > 0


def test_without_boxes_nothing_is_aligned() -> None:
    found = align(
        torch.rand(5, 2),
        drawn_boxes(5),
        torch.rand(5, 2),
        torch.ones(5),
        torch.zeros(0, 4),
        torch.zeros(0).long(),
        count=3,
    )
    assert [len(found.places), len(found.boxes), len(found.qualities)] == [0, 0, 0]


def test_losses_are_their_formulas() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64)
    wanted = torch.rand(6, 3, dtype=torch.float64) * (torch.rand(6, 3) > 0.5)
    expected = 0.0
    for x, q in zip(logits.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        entropy = -(q * math.log(p) + (1 - q) * math.log(1 - p))
        expected += entropy * (1.0 if q > 0 else 0.75 * p**2)
    assert math.isclose(float(quality_loss(logits, wanted)), expected, rel_tol=1e-12)
    truth = (wanted > 0).double()
    expected = 0.0
    for x, y in zip(logits.flatten().tolist(), truth.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        right, alpha = (p, 0.25) if y else (1 - p, 0.75)
        expected -= alpha * (1 - right) ** 2 * math.log(right)
    assert math.isclose(float(focal_loss(logits, truth)), expected, rel_tol=1e-9)


def test_the_box_loss_is_one_minus_giou_and_its_gradient_is_right() -> None:
    predicted, boxes = drawn_boxes(5).requires_grad_(), drawn_boxes(5)
    weights = torch.rand(5, dtype=torch.float64)
    expected = 0.0
    for a, b, weight in zip(predicted.tolist(), boxes.tolist(), weights.tolist(), strict=True):
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
        shared = overlap(a, b)
        union = areas / (1 + shared)
        expected += weight * (1 - shared + (hull - union) / hull)
    assert math.isclose(float(box_loss(predicted, boxes, weights).detach()), expected, rel_tol=1e-6)
    assert torch.autograd.gradcheck(lambda p: box_loss(p, boxes, weights), (predicted,), eps=1e-7, atol=1e-5)


def test_boxes_without_area_give_finite_gradients() -> None:
    predicted = torch.tensor([[5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    box_loss(predicted, torch.tensor([[5.0, 5.0, 5.0, 5.0]]), torch.ones(1)).backward()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()
    assert float(box_iou(predicted, predicted).isnan().sum()) == 1  # which is what it has to stand
