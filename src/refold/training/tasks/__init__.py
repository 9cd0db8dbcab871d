"""The tasks that a network can be trained for."""

from refold.training.images import LabelledImages
from refold.training.recipe import Recipe
from refold.training.tasks.base import Measures, Task
from refold.training.tasks.classification import ClassificationTask
from refold.training.tasks.detection import DetectionTask
from refold.training.tasks.instances import InstanceTask
from refold.training.tasks.segmentation import SegmentationTask

__all__ = [
    "TASKS",
    "ClassificationTask",
    "DetectionTask",
    "InstanceTask",
    "Measures",
    "SegmentationTask",
    "Task",
    "task_for",
]


TASKS: dict[str, type[Task]] = {
    kind.name: kind for kind in (ClassificationTask, DetectionTask, InstanceTask, SegmentationTask)
}
"""The kinds of tasks by their names."""


def task_for(images: LabelledImages, recipe: Recipe) -> Task:
    """The task that the images are for."""
    if images.task == "detect":
        return DetectionTask(images.class_names)
    if images.task == "instances":
        return InstanceTask(images.class_names)
    if images.task == "segment":
        return SegmentationTask(images.class_names)
    return ClassificationTask(
        images.class_names,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        label_smoothing=recipe.label_smoothing,
    )
