"""A compact training loop: timm's optimiser and schedule, held-out accuracy after every epoch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from refold.errors import InputError
from refold.training.data import TransformedImages


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, a linear warm-up and a cosine down to zero, label smoothing."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    warm_up_epochs: int = 1
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean training loss, and the share of held-out images answered right."""

    number: int
    loss: float
    accuracy: float


def train(
    net: nn.Module,
    training: TransformedImages,
    held_out: TransformedImages,
    recipe: Recipe,
    *,
    seed: int = 0,
    on_batch: Callable[[], object] = lambda: None,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
) -> list[Epoch]:
    """Train ``net`` in place, on its own device; it ends in eval mode with the last epoch's weights.

    ``on_batch`` is called after each of `batches_per_epoch` batches, ``on_epoch`` after each epoch.
    Raises `InputError` where a setting is out of range or the loss stops being a number.
    """
    if recipe.epochs < 1 or recipe.batch_size < 2:
        raise InputError(
            f"Cannot train for {recipe.epochs} epochs in batches of {recipe.batch_size}; "
            "give at least 1 epoch and batches of at least 2 images."
        )
    _seed(seed)
    device = next(net.parameters()).device
    net.to(memory_format=torch.channels_last)  # pointwise and depthwise convolutions train faster so
    batches = batches_per_epoch(len(training), recipe.batch_size)
    loader = DataLoader(
        training,
        batch_size=min(recipe.batch_size, len(training)),
        shuffle=True,
        # Batch statistics of a single left-over image would be meaningless.
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer = create_optimizer_v2(net, "adamw", lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=min(recipe.warm_up_epochs, recipe.epochs - 1),
        warmup_lr=recipe.learning_rate / 100,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=batches,
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    history = []
    step = 0
    for number in range(1, recipe.epochs + 1):
        net.train()
        total = 0.0
        for images, targets in loader:
            optimizer.zero_grad()
            images = images.to(device, memory_format=torch.channels_last)
            loss = criterion(net(images), targets.to(device))
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            total += loss.item()
            on_batch()
        if not math.isfinite(total):
            raise InputError(
                f"The training loss is no longer a number in epoch {number}; "
                f"lower the learning rate (it is {recipe.learning_rate:g})."
            )
        predictions, targets = predict(net, held_out)
        accuracy = (predictions == targets).double().mean().item()
        history.append(Epoch(number, total / batches, accuracy))
        on_epoch(history[-1])
    net.to(memory_format=torch.contiguous_format)
    return history


def batches_per_epoch(images: int, batch_size: int) -> int:
    """How many batches an epoch of `train` has; a smaller last batch is left out."""
    return max(1, images // batch_size)


def predict(
    classify: Callable[[Tensor], Tensor], images: TransformedImages, *, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of all images, two int64 tensors ``(images,)`` on the CPU.

    ``classify`` is a network, put in eval mode, or any function from images to logits.
    """
    device = torch.device("cpu")
    if isinstance(classify, nn.Module):
        classify.eval()
        device = next((parameter.device for parameter in classify.parameters()), device)
    predictions, truth = [], []
    with torch.inference_mode():
        for batch, targets in DataLoader(images, batch_size=batch_size):
            predictions.append(classify(batch.to(device)).argmax(dim=1).cpu())
            truth.append(targets)
    return torch.cat(predictions), torch.cat(truth)


def _seed(seed: int) -> None:
    """timm's transforms draw from all three."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
