"""Which kind of labels lies in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from refold.errors import InputError
from refold.training.images import LabelledImages
from refold.training.labelled.coco import find_coco, read_coco
from refold.training.labelled.mask_folders import find_masks, read_masks
from refold.training.labelled.splits import as_set
from refold.training.labelled.voc import find_voc, read_voc
from refold.training.labelled.yolo import find_yolo, read_yolo


def open_labelled(root: Path, seed: int, task: str | None) -> LabelledImages | None:
    """The images with boxes or masks that lie in a folder, or that a file of JSON or YAML names; None for others.

    ``task`` is "detect", "instances" or "segment" where both lie there, or what else is there must not be taken.
    Raises `InputError` where both lie there and none was asked for, or the labels cannot be used.
    """
    found: dict[str, Callable[[], LabelledImages]] = {}
    masks, coco, yolo = find_masks(root), find_coco(root), find_yolo(root)
    if masks is not None:
        found["segment"] = lambda: read_masks(masks, root, seed)
    if coco:
        found["detect"] = lambda: as_set(read_coco(coco, root), root, seed, "detect")
        found["instances"] = lambda: as_set(read_coco(coco, root, outlines=True), root, seed, "instances")
    elif yolo is not None:
        found["detect"] = lambda: as_set(read_yolo(yolo, root), root, seed, "detect")
        found["instances"] = lambda: as_set(read_yolo(yolo, root, outlines=True), root, seed, "instances")
    elif find_voc(root):
        found["detect"] = lambda: as_set(read_voc(root), root, seed, "detect")
    # Outlines are boxes, too: they are read where they are asked for.
    found = {
        kind: read for kind, read in found.items() if kind == task or (task is None and kind != "instances")
    }
    if len(found) > 1:
        raise InputError(
            f"'{root}' holds boxes and masks; choose: --task {' or --task '.join(sorted(found))}."
        )
    return next(iter(found.values()))() if found else None
