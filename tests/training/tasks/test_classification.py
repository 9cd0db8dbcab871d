"""The task of classifying: what a step sees, its loss, what held-out images tell, and answers in words."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from refold.training.batches import Batch
from refold.training.tasks import ClassificationTask
from refold.training.tasks.classification import likeliest

NET = nn.Identity()


def test_mixing_takes_pairs_and_smooths_once() -> None:
    """A fifth image has no partner; targets that are probabilities are smoothed already."""
    task = ClassificationTask(["a", "b", "c"], mixup=0.4, label_smoothing=0.3)
    images, targets = task.mix(torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert (images.shape, targets.shape) == ((4, 3, 4, 4), (4, 3))
    outputs = torch.randn(4, 3)
    assert torch.equal(task.loss(NET, outputs, targets), F.cross_entropy(outputs, targets))
    plain = ClassificationTask(["a", "b", "c"], label_smoothing=0.3)
    classes = torch.tensor([2, 0, 1, 0])
    assert plain.mix(outputs, classes) == (outputs, classes)
    assert torch.equal(
        plain.loss(NET, outputs, classes), F.cross_entropy(outputs, classes, label_smoothing=0.3)
    )


def test_measures_and_score_say_the_same() -> None:
    task = ClassificationTask(["a", "b"], label_smoothing=0.3)
    outputs, targets = torch.randn(7, 2), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    batch = Batch(outputs, targets, [], torch.arange(7))
    answers = task.answers(NET, outputs, batch)
    assert answers == task.answers_of_file([outputs], batch) == outputs.argmax(1).tolist()
    measures = task.measures()
    measures.update(answers[:4], targets[:4])
    measures.update(answers[4:], targets[4:])
    right = float((outputs.argmax(1) == targets).double().mean())
    assert measures.compute()[task.score] == pytest.approx(right)
    assert float(task.held_out_loss(NET, outputs, targets)) == float(F.cross_entropy(outputs, targets))
    measures.reset()
    measures.update([0], torch.tensor([0]))
    assert measures.compute()["accuracy"] == 1


def test_the_likeliest_classes_have_names_or_numbers() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    ((first, second),) = likeliest(logits, 2, ["cat", "dog", "owl"])
    assert (first[0], second[0]) == ("dog", "owl")
    assert first[1] == pytest.approx(float(logits.softmax(1)[0, 1]))
    assert [name for name, _ in likeliest(logits, 9, None)[0]] == ["1", "2", "0"]
