"""What Lightning trains: a network for a task by a recipe, beside the moving average of its weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from refold.blocks.parallel.synchronised import synchronise_norms
from refold.errors import InputError, RecipeError
from refold.training.answers import Questions
from refold.training.batches import Batch, held_out_loader, reseed, training_loader
from refold.training.distillation import FeatureLosses
from refold.training.images import LabelledImages
from refold.training.measures import MeanLoss
from refold.training.recipe import Recipe
from refold.training.tasks import Task
from refold.training.teaching import Teaching

TRAINED, AVERAGE = "trained", "average"


class TrainingModule(LightningModule):
    """Train ``net`` for ``task`` by ``recipe``; with an ``ema_decay``, ``average`` follows its weights and buffers.

    ``preprocessing`` is what the network's images look like, in timm's terms. ``accumulate`` batches make one
    step, and together with all ``processes`` ``recipe.batch_size`` images, or all there are if they are fewer.
    ``sync_batch_norm`` takes batch statistics over the processes; ``compile`` runs the training form through
    `torch.compile`. With a ``teaching`` the network learns from its teacher, too, and the held-out images tell also how
    far the answers are from the teacher's.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        images: LabelledImages,
        preprocessing: dict[str, Any],
        task: Task,
        *,
        seed: int,
        workers: int = 0,
        accumulate: int = 1,
        processes: int = 1,
        sync_batch_norm: bool = False,
        channels_last: bool = True,
        compile: bool = False,
        teaching: Teaching | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.step_images = min(recipe.batch_size, len(images.training))
        # A set smaller than a batch is taken whole, and the learning rate follows.
        self.recipe = recipe = dataclasses.replace(recipe, batch_size=max(2, self.step_images))
        self.images = images
        self.preprocessing = preprocessing
        self.seed = seed
        self.workers = workers
        self.processes = processes
        self.synchronises = sync_batch_norm and processes > 1
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compiles = compile
        self.task = task
        self.teaching = teaching
        self.batch_images = self.step_images // accumulate
        if self.batch_images // processes < 2:
            raise InputError(
                f"{self.step_images} images in {accumulate} accumulated batches on {processes} processes leave fewer "
                "than 2 a batch; give more images, a larger batch_size or fewer accumulated batches."
            )
        # A step that is not whole, at the end of an epoch, is left out.
        self.steps = len(images.training) // self.step_images
        self.batches = self.steps * accumulate
        self.augment, self.measure = task.transforms(recipe, preprocessing, images.mirror)
        self.average: ModelEmaV3 | None = None
        if recipe.ema_decay is not None:
            power = _warm_up_power(recipe.ema_decay, self.steps * recipe.epochs)
            self.average = ModelEmaV3(
                net, recipe.ema_decay, use_warmup=recipe.ema_warm_up, warmup_power=power
            ).requires_grad_(False)
        self.training_loss = MeanLoss()
        names = [TRAINED] if self.average is None else [TRAINED, AVERAGE]
        self.held_out_losses: Any = nn.ModuleDict({name: MeanLoss() for name in names})
        self.held_out_measures: Any = nn.ModuleDict({name: task.measures() for name in names})
        self.divergences: Any = nn.ModuleDict()
        self.feature_losses: FeatureLosses | None = None
        if teaching is not None:
            self.divergences.update({name: MeanLoss() for name in names})
            # A module of its own here, so that its weights move, learn and are kept with the others.
            self.feature_losses = teaching.feature_losses
        self._averaged_steps = 0

    def network(self, name: str) -> nn.Module:
        """The network with the weights of that name: as trained, or their moving average."""
        if name == TRAINED:
            return self.net
        assert self.average is not None
        averaged: nn.Module = self.average.module
        return averaged

    def configure_model(self) -> None:
        if self.synchronises:
            self.net = synchronise_norms(self.net, self.trainer.strategy.root_device)

    def on_fit_start(self) -> None:
        if self.teaching is not None:
            self.teaching.begin(self.net, self._questions())
        if self.compiles:
            self.net.compile()  # in place, so that names, files and the average know nothing of it

    def _questions(self) -> Questions:
        """What a teacher may be asked before training begins."""
        return Questions(
            self.images.training,
            len(self.images.class_names),
            self.augment,
            self.task.collate,
            self.preprocessing,
            self.recipe,
            batch_size=self.batch_images,
            seed=self.seed,
            workers=self.workers,
            rank=self.global_rank,
            processes=self.processes,
            device=self.device,
        )

    def on_train_start(self) -> None:
        self._averaged_steps = self.global_step  # a resumed run has made steps already

    def train_dataloader(self) -> DataLoader[Any]:
        return training_loader(
            self.images.training,
            self.augment,
            self.batch_images,
            seed=self.seed,
            workers=self.workers,
            rank=self.global_rank,
            processes=self.processes,
            collate=self.task.collate,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return held_out_loader(
            self.images.held_out,
            self.measure,
            max(self.batch_images // self.processes, 32),
            workers=self.workers,
            rank=self.global_rank,
            processes=self.processes,
            collate=self.task.collate,
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Chance (dropout, mixup) depends on seed, place and process alone, so that a resumed run meets the same.
        reseed(self.seed, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        images, targets = batch.images, batch.targets
        if len(images) < 2:  # the statistics of one image are none
            if self.processes == 1:
                return None
            raise InputError(
                f"A process has {len(images)} readable images of its batch and needs 2; repair the images, or give "
                "a larger batch_size."
            )
        images, targets = self.task.mix(images, targets)
        images = images.contiguous(memory_format=self.memory_format)
        outputs = self.net(images)
        loss = self.task.loss(self.net, outputs, targets)
        if self.teaching is not None:
            loss = self.teaching.loss(loss, self.net, outputs, images, batch.indices)
        if self.device.type == "cpu":  # elsewhere looking at each loss would make the device wait
            self.check(float(loss.detach()))
        self.training_loss.update(loss.detach(), len(images))
        return loss * self._weight()

    def _weight(self) -> float:
        """Of this process' mean in that of the whole batch, times the processes, over which gradients are averaged."""
        share = len(range(self.global_rank, self.batch_images, self.processes))
        return share * self.processes / self.batch_images

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.average is not None and self.global_step > self._averaged_steps:
            self.average.update(self.net, step=self.global_step)
        self._averaged_steps = self.global_step
        if self.processes > 1 and batch_idx + 1 == self.batches:
            for name in self.held_out_measures:
                _average_statistics(self.network(name), self.processes)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not len(batch.images):
            return
        for name in self.held_out_measures:
            net, count = self.network(name), len(batch.images)
            outputs = tree_map(torch.Tensor.float, net(batch.images))
            self.held_out_losses[name].update(self.task.held_out_loss(net, outputs, batch.targets), count)
            self.held_out_measures[name].update(self.task.answers(net, outputs, batch), batch.targets)
            if self.teaching is not None:
                distance = self.teaching.divergence(net, outputs, batch.images, batch_idx)
                self.divergences[name].update(distance, count)

    def epoch_results(self) -> dict[str, float]:
        """What the epoch gave: losses and the task's measures by name; raises `InputError` for a bad loss."""
        results = {"loss": float(self.training_loss.compute())}
        self.check(results["loss"])
        for name, measures in self.held_out_measures.items():
            results[f"held_out_loss_{name}"] = float(self.held_out_losses[name].compute())
            for measure, value in measures.compute().items():
                results[f"held_out_{measure}_{name}"] = value
            if self.teaching is not None:
                results[f"held_out_divergence_{name}"] = float(self.divergences[name].compute())
        for group in (self.held_out_losses, self.held_out_measures, self.divergences):
            for metric in (self.training_loss, *group.values()):
                metric.reset()
        self.check(results[f"held_out_loss_{TRAINED}"])
        return results

    def check(self, loss: float) -> None:
        """Raise `InputError` where a loss is no number."""
        if not math.isfinite(loss):
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise InputError(
                f"The loss is no longer a number in epoch {self.current_epoch + 1} (learning rate {rate:g}); "
                "lower the learning rate (--set learning_rate=...), or clip the gradient (--set gradient_clip=1), in "
                "this run or in a new one in its place (--overwrite)."
            )

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = make_optimizer(self.net, recipe)
        learnt_along = [] if self.feature_losses is None else list(self.feature_losses.parameters())
        if learnt_along:
            optimizer.add_param_group({"params": learnt_along})
        # Without a milestone the steps never come: timm's own name for that is younger.
        constant = recipe.schedule == "none"
        scheduler, _ = create_scheduler_v2(
            optimizer,
            "multistep" if constant else recipe.schedule,
            num_epochs=recipe.epochs,
            decay_milestones=[] if constant else list(recipe.milestones),
            decay_epochs=recipe.decay_epochs,
            decay_rate=recipe.decay_rate,
            min_lr=recipe.minimum_learning_rate,
            warmup_epochs=min(recipe.warm_up_epochs, recipe.epochs - 1),
            warmup_lr=recipe.warm_up_learning_rate or recipe.scaled_learning_rate / 100,
            warmup_prefix=False,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)


def _warm_up_power(decay: float, steps: int) -> float:
    """The power with which the decay of an average grows, 1 - (1 + step)^-power, in a run of so many steps.

    It is 3/4, and larger where the decay would else be reached only after half of the run, so that decays which the
    run is long enough for differ; where it is too short for the decay, it stays 3/4.
    """
    if decay >= 1:
        return 0.75
    needed = -math.log(1 - decay) / math.log(1 + steps / 2)
    return max(0.75, needed) if needed <= 1 else 0.75


def _average_statistics(net: nn.Module, processes: int) -> None:
    """Give all processes the same batch norm statistics: each has seen images of its own."""
    statistics = [value for name, value in net.named_buffers() if "running_" in name]
    if statistics:
        together = torch.cat(statistics)
        all_reduce(together)
        for value, total in zip(statistics, together.split([len(v) for v in statistics]), strict=True):
            value.copy_(total / processes)


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser of that name, at the learning rate that fits the batch.

    ``momentum`` is the first β of the optimisers that have two. Norms and biases are spared weight decay
    unless the recipe says otherwise.
    Raises `RecipeError` where timm has no optimiser of that name.
    """
    if recipe.optimizer not in list_optimizers():
        raise RecipeError(
            f"'optimizer' is '{recipe.optimizer}'; expected one of timm's, such as momentum, sgd, adamw or lamb."
        )
    arguments: dict[str, Any] = {}
    if get_optimizer_info(recipe.optimizer).has_betas:
        arguments["betas"] = (recipe.momentum, 0.999)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        net,
        recipe.optimizer,
        lr=recipe.scaled_learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        filter_bias_and_bn=not recipe.decay_norms_and_biases,
        **arguments,
    )
    return optimizer
