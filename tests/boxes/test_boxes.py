"""Grids, coding, letterboxing and suppression, against plain loops and torchvision."""

import pytest
import torch
from drawn import drawn_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import batched_nms, box_iou

from refold.boxes import (
    Letterbox,
    Suppression,
    anchor_boxes,
    boxes_from_deltas,
    boxes_from_distances,
    cell_centres,
    deltas_from_boxes,
    distances_from_boxes,
)
from refold.boxes.comparing import difference
from refold.boxes.grids import anchor_sizes, rows_of
from refold.errors import InputError


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 8, 32]))
def test_cells_lie_where_the_rows_of_a_map_say(height: int, width: int, stride: int) -> None:
    map_ = torch.arange(2 * 6 * height * width).view(2, 6, height, width)
    centres, rows = cell_centres(map_.float(), stride), rows_of(map_, 2)
    for y in range(height):
        for x in range(width):
            assert centres[y * width + x].tolist() == [(x + 0.5) * stride, (y + 0.5) * stride]
            for box in range(3):
                row = rows[1, (y * width + x) * 3 + box]
                assert row.tolist() == map_[1, 2 * box : 2 * box + 2, y, x].tolist()


def test_anchors_have_their_area_ratio_and_place() -> None:
    sizes = anchor_sizes(32, (1.0, 2.0), (0.5, 1.0))
    anchors = anchor_boxes(torch.zeros(1, 1, 2, 3, dtype=torch.float64), 8, sizes)
    assert anchors.shape == (2 * 3 * 4, 4)
    sides = anchors[:, 2:] - anchors[:, :2]
    for place, (scale, ratio) in enumerate([(1, 0.5), (2, 0.5), (1, 1.0), (2, 1.0)]):
        own = sides[place::4]
        assert torch.allclose(own.prod(1), torch.tensor((32.0 * scale) ** 2, dtype=torch.float64))
        assert torch.allclose(own[:, 1] / own[:, 0], torch.tensor(ratio, dtype=torch.float64))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert torch.allclose(centres[4:8], torch.tensor([12.0, 4.0], dtype=torch.float64))


def test_coding_is_undone_by_its_inverse() -> None:
    boxes, anchors = drawn_boxes(50), drawn_boxes(50)
    assert torch.allclose(boxes_from_deltas(deltas_from_boxes(boxes, anchors), anchors), boxes)
    points = drawn_boxes(50)[:, :2]
    assert torch.allclose(boxes_from_distances(distances_from_boxes(boxes, points), points), boxes)


def test_a_wild_delta_gives_a_finite_box() -> None:
    box = boxes_from_deltas(torch.tensor([[0.0, 0.0, 1e4, 1e4]]), torch.tensor([[0.0, 0.0, 8.0, 8.0]]))
    assert box.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(*(st.integers(1, 3000),) * 2, *(st.integers(1, 700),) * 2)
def test_a_letterbox_holds_the_whole_image_and_undoes_itself(
    height: int, width: int, frame_height: int, frame_width: int
) -> None:
    fitted = Letterbox((height, width), (frame_height, frame_width))
    inner = fitted.inner
    assert 1 <= inner[0] <= frame_height
    assert 1 <= inner[1] <= frame_width
    assert inner[0] == frame_height or inner[1] == frame_width or min(height, width) == 1
    whole = torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64)
    assert torch.allclose(fitted.into(whole), torch.tensor([[0.0, 0, *inner[::-1]]], dtype=torch.float64))
    assert torch.allclose(fitted.back(fitted.into(whole)), whole)


def test_a_letterboxed_picture_is_grey_beside_the_image() -> None:
    fitted = Letterbox((10, 20), (32, 32))
    framed = fitted.picture(Image.new("RGB", (20, 10), (255, 0, 0)))
    assert framed.size == (32, 32)
    assert framed.getpixel((31, 15)) == (255, 0, 0)
    assert framed.getpixel((31, 16)) == (114, 114, 114)


def test_a_letterbox_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Letterbox((0, 5), (32, 32))


@pytest.mark.parametrize("groups", [1, 5, 2000])
def test_suppression_is_torchvisions_in_float64(groups: int) -> None:
    boxes = drawn_boxes(400, 1300.0).float()
    scores, group = torch.rand(400), torch.randint(groups, (400,))
    kept = Suppression(0.4)(boxes, scores, group)
    expected = batched_nms(boxes.double(), scores.double(), group, 0.4)
    assert kept.tolist() == expected.tolist()


def test_suppression_keeps_boxes_of_other_groups_and_negative_places() -> None:
    boxes = torch.tensor([[-50.0, -50, -10, -10]] * 3)
    kept = Suppression(0.5)(boxes, torch.tensor([0.3, 0.9, 0.5]), torch.tensor([0, 0, 1]))
    assert kept.tolist() == [1, 2]
    assert Suppression(0.5)(boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_suppression_refuses_an_overlap_that_is_none() -> None:
    with pytest.raises(InputError, match=r"iou is 1\.5"):
        Suppression(1.5)


def test_equal_sets_in_another_order_do_not_differ() -> None:
    boxes, scores, labels = drawn_boxes(20), torch.rand(20) * 0.5 + 0.4, torch.randint(3, (20,))
    image = torch.randint(2, (20,))
    order = torch.randperm(20)
    found = difference((boxes, scores, labels, image), [v[order] for v in (boxes, scores, labels, image)])
    assert (found.boxes, found.unmatched, found.scores) == (40, 0, 0.0)


def test_a_box_that_moved_changed_its_label_or_is_missing_is_counted() -> None:
    boxes, scores = drawn_boxes(4), torch.tensor([0.9, 0.8, 0.7, 0.1])
    labels, image = torch.zeros(4), torch.zeros(4)
    moved = boxes.clone()
    moved[0] += (boxes[0, 2:] - boxes[0, :2]).repeat(2) * 0.1
    other = labels.clone()
    other[1] = 1
    assert float(box_iou(moved[:1], boxes[:1])) < 0.99
    assert difference((boxes, scores, labels, image), (moved, scores, labels, image)).unmatched == 2
    assert difference((boxes, scores, labels, image), (boxes, scores, other, image)).unmatched == 2
    few = [v[:2] for v in (boxes, scores, labels, image)]
    assert (
        difference((boxes, scores, labels, image), few).unmatched == 1
    )  # the lowest may be missing by rounding
