"""The time and memory that a run will take, from a few real steps of its own network, images and optimiser."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from refold.training.batches import Batch, held_out_loader, training_loader
from refold.training.images import LabelledImages
from refold.training.module import TrainingModule, make_optimizer

_PROBE = 8
_TIMED = 3
_SECONDS_A_STEP = 3.0
_SHARE_OF_FREE_MEMORY = 0.3


@dataclass(frozen=True)
class Estimate:
    """What one process of a run is expected to take: bytes, and seconds.

    ``loading`` and ``computing`` are of one batch of ``batch_images``, ``updating`` of one step of the optimiser with
    the moving average, ``validating`` of one epoch's held-out images, ``reading`` of all images before the first epoch.
    They were measured on batches of ``measured_images``. Talk between processes, and what comes after training, are
    not part of it.
    """

    measured_images: int
    batch_images: int
    program: int
    images: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    teacher: int
    activations: int
    reading: float
    loading: float
    computing: float
    updating: float
    validating: float
    workers: int
    epochs: int
    steps: int
    batches: int

    @property
    def memory(self) -> int:
        """All of it at the end of a forward pass, in bytes."""
        parts = (self.program, self.images, self.weights, self.gradients, self.optimizer, self.average)
        return sum(parts) + self.teacher + self.activations

    @property
    def epoch_seconds(self) -> float:
        """One epoch; workers prepare images while the network computes."""
        batch = (
            max(self.computing, self.loading / self.workers)
            if self.workers
            else self.computing + self.loading
        )
        return self.batches * batch + self.steps * self.updating + self.validating

    @property
    def seconds(self) -> float:
        """The whole training."""
        return self.reading + self.epochs * self.epoch_seconds


def estimate(
    module: TrainingModule,
    sample: LabelledImages,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
    *,
    reading: float,
    images: int,
    program: int,
) -> Estimate:
    """Run a few steps of ``module`` on ``sample`` images and extrapolate; its weights are other ones afterwards.

    ``context`` is what a forward pass runs in (its precision). ``reading`` seconds, bytes of ``images`` in memory and
    those of the ``program`` were found before.
    """
    module.to(device).train()
    if module.teaching is not None:
        module.teaching.attach(module.net, device)
    optimizer = make_optimizer(module.net, module.recipe)
    share = max(2, module.batch_images // module.processes)

    def step(batch: Batch) -> tuple[float, float]:
        start = _now(device)
        with context():
            loss = module.training_step(batch, 0)
        assert loss is not None
        loss.backward()
        computed = _now(device)
        optimizer.step()
        optimizer.zero_grad()
        if module.average is not None:
            module.average.update(module.net)
        return computed - start, _now(device) - computed

    probe = _batch(module, sample, min(share, _PROBE), device)[0]
    step(probe)
    with _saved(module) as saved:
        seconds = sum(step(probe))
    fits = _SHARE_OF_FREE_MEMORY * _free_memory(device) / max(saved() / len(probe.images), 1)
    quick = _SECONDS_A_STEP / (seconds / len(probe.images))
    batch, loading = _batch(module, sample, min(share, max(_PROBE, int(min(fits, quick)))), device)
    with _saved(module) as saved:
        step(batch)
    times = [step(batch) for _ in range(_TIMED)]
    measured = len(batch.images)
    scale = share / measured
    # PyTorch's optimisers keep their state in tensors of the weights' sizes.
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    held_out = len(module.images.held_out) / module.processes
    return Estimate(
        measured_images=measured,
        batch_images=share,
        program=program,
        images=images,
        weights=_bytes(module.net),
        gradients=sum(p.numel() * p.element_size() for p in module.net.parameters() if p.requires_grad),
        optimizer=sum(v.numel() * v.element_size() for v in state),
        average=0 if module.average is None else _bytes(module.average),
        teacher=0 if module.teaching is None else _bytes(module.teaching.teacher.network),
        activations=round((saved() + batch.images.nbytes) * scale),
        reading=reading,
        loading=loading * scale,
        computing=statistics.median(computing for computing, _ in times) * scale,
        updating=statistics.median(updating for _, updating in times),
        validating=_validate(module, sample, device, context) * held_out,
        workers=module.workers,
        epochs=module.recipe.epochs,
        steps=module.steps,
        batches=module.batches,
    )


def memory_of_process() -> int:
    """The bytes of memory that this process has."""
    resident: int = psutil.Process().memory_info().rss
    return resident


def _batch(
    module: TrainingModule, sample: LabelledImages, size: int, device: torch.device
) -> tuple[Batch, float]:
    """A batch of real images, repeated where the sample has fewer, and the seconds that it took to prepare."""
    part = min(size, len(sample.training))
    loader = training_loader(
        sample.training, module.augment, part, seed=module.seed, workers=0, collate=module.task.collate
    )
    start = time.perf_counter()
    batch: Batch = next(iter(loader))
    seconds = (time.perf_counter() - start) * size / part
    repeats = -(-size // len(batch.images))
    repeated = Batch(
        batch.images.repeat(repeats, 1, 1, 1)[:size],
        _repeated(batch.targets, repeats, size),
        batch.unreadable,
        batch.indices.repeat(repeats)[:size],
    )
    return move_data_to_device(repeated, device), seconds


def _repeated(targets: Any, repeats: int, size: int) -> Any:
    if isinstance(targets, Tensor):
        return targets.repeat(repeats, *[1] * (targets.dim() - 1))[:size]
    return (targets * repeats)[:size]


def _validate(
    module: TrainingModule,
    sample: LabelledImages,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Seconds that one held-out image takes."""
    module.eval()
    count = 0
    start = _now(device)
    with torch.inference_mode(), context():
        batches = held_out_loader(sample.held_out, module.measure, 32, workers=0, collate=module.task.collate)
        for number, batch in enumerate(batches):
            if len(batch.images):
                module.validation_step(move_data_to_device(batch, device), number)
                count += len(batch.images)
    return (_now(device) - start) / max(count, 1)


@contextmanager
def _saved(module: nn.Module) -> Iterator[Callable[[], int]]:
    """How many bytes a forward pass keeps for the backward pass, without weights and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = psutil.virtual_memory().available
    return free


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
